# `make demo` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: install demo test test-full lint verify compile-report bench clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all]"
	touch $@

demo: install
	$(BIN)/python -m prism_models.training.demo --out $(OUT)

test: install
	$(BIN)/python -m pytest -n auto -m "not full"

test-full: install
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

verify: install
	$(BIN)/python -m prism_kernels.verify

compile-report: install
	$(BIN)/python -m benchmarks.compile_report --matrix

# Ours against other people's code on a CPU, then tables and figures: about seven minutes on two cores.
bench: install
	$(BIN)/python -m benchmarks run --device cpu --threads 2 --seconds 2 --within 400 --require-peer --out benchmarks/results/bench_cpu.json
	$(BIN)/python -m benchmarks report

clean:
	rm -rf .venv .tritons build *.egg-info
