"""The doctor: known-bad pairs by simulated versions, probes that fail, machines with less on them."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import prism_kernels
from prism_kernels import doctor
from prism_kernels._core.known import KNOWN, LEVELS, Facts, numbers, problems, within
from tests.test_imports import python

CPU = Facts("3.11.7", "2.13.0+cpu", "3.7.1", "2.3.5", "0.8.2", "12.8.93")
H100 = replace(CPU, torch="2.11.0+cu130", triton="3.6.0", numpy="2.5.0", capabilities=((9, 0),), gpus=1)


def names(facts):
    return [problem.name for problem in problems(facts)]


def test_versions_are_compared_as_numbers():
    assert numbers("3.10.0+cu130") == (3, 10, 0) and numbers(None) == () and numbers("main") == ()
    assert within("3.10", "3.9") and within("3.7.1", "3.4") and not within("3.7.1", "3.4", "3.7.1")
    assert not within(None, below="9") and within("2.4.0", "2.4")


def test_the_pinned_stack_has_no_known_problem():
    assert names(CPU) == []


@pytest.mark.parametrize(
    "facts, name, level",
    [
        (replace(CPU, numpy="2.4.0"), "triton before 3.9 with numpy 2.4 or later, interpreted", "limit"),
        (replace(CPU, triton=None), "no Triton", "limit"),
        (replace(H100, triton=None), "a GPU without Triton", "broken"),
        (replace(CPU, torch="2.6.0"), "torch before 2.7", "broken"),
        (replace(CPU, python="3.10.2"), "Python before 3.11", "broken"),
        (replace(CPU, triton_for_torch="3.6.0"), "another triton than this torch requires", "limit"),
        (replace(H100, interpreting=True), "the interpreter is on, and there is a GPU", "limit"),
        (H100, "ptxas 12.8 to 13.0 on a GPU", "limit"),
        (H100, "ptxas before 13.3 on Hopper", "limit"),
        (H100, "triton 3.4 to 3.7.0 on Hopper", "note"),
        (H100, "triton 3.6.0 on Hopper", "note"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_bad_pairs_are_told(facts, name, level):
    assert {p.name: p.level for p in problems(facts)}[name] == level


@pytest.mark.parametrize(
    "facts, name",
    [
        (
            replace(CPU, numpy="2.4.0", triton="3.9.0"),
            "triton before 3.9 with numpy 2.4 or later, interpreted",
        ),
        (H100, "triton before 3.9 with numpy 2.4 or later, interpreted"),  # nothing is interpreted there
        (replace(H100, triton="3.7.1"), "triton 3.4 to 3.7.0 on Hopper"),
        (replace(H100, ptxas="13.4.10"), "ptxas before 13.3 on Hopper"),
        (replace(H100, ptxas="13.1.80"), "ptxas 12.8 to 13.0 on a GPU"),
        (replace(H100, capabilities=((8, 0),)), "triton 3.4 to 3.7.0 on Hopper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_good_pairs_are_left_alone(facts, name):
    assert name not in names(facts)


def test_every_known_problem_has_a_reason_and_a_remedy():
    assert all(p.level in LEVELS and p.reason and p.remedy for p in KNOWN)
    assert len({p.name for p in KNOWN}) == len(KNOWN)


def test_the_report_names_every_op_its_path_and_ends_with_a_verdict(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = doctor.examine()
    assert doctor.lines(report)[-1].startswith("verdict: ")
    functions = {n for n in prism_kernels.__all__ if n[0].islower()}
    assert {row["op"] for row in report["paths"] if row["device"] == "cpu"} == functions
    assert {row["path"] for row in report["paths"] if row["device"] == "cpu"} == {"torch"}
    assert any("expected CUDA tensors for impl='triton'" in line for line in doctor.lines(report))
    assert json.loads(json.dumps(report))["versions"]["torch"] == torch.__version__


def quick(monkeypatch, **probes):
    """The report with the given probes replaced, and nothing run."""
    monkeypatch.setattr(doctor, "_try", lambda spec, device: "ran")
    for name, function in probes.items():
        monkeypatch.setattr(doctor, name, function)
    return doctor.examine()


def test_probes_that_fail_are_reported_and_limit_the_verdict(monkeypatch, capsys):
    def fails():
        raise OSError("no such tool")

    report = quick(monkeypatch, ptxas=fails, driver=fails, extras=fails)
    text = "\n".join(doctor.lines(report))
    assert "ptxas           probe failed: OSError: no such tool" in text
    assert report["state"] == "works with limits" and "driver: probe failed" in report["because"]
    assert "optional packages\n  probe failed" in text


def test_an_op_that_fails_breaks_the_verdict_and_the_exit_code(monkeypatch, capsys):
    def fails(spec, device):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor, "_try", fails)
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "FAILED, probe failed: RuntimeError: no compiler" in output
    assert "verdict: broken" in output.splitlines()[-1]


def test_simulated_versions_reach_the_verdict(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "facts", lambda found, present: H100)
    report = quick(monkeypatch)
    assert report["state"] == "works with limits"
    assert {p["name"] for p in report["problems"]} == set(names(H100))
    assert any("remedy: " in line for line in doctor.lines(report))


def test_devices_that_cannot_be_listed_do_not_end_it(monkeypatch):
    def fails():
        raise RuntimeError("driver too old")

    assert "probe failed: RuntimeError: driver too old" in "\n".join(
        doctor.lines(quick(monkeypatch, devices=fails))
    )


def test_it_works_where_triton_cannot_be_imported():
    code = "import runpy; runpy.run_module('prism_kernels.doctor', run_name='__main__')"
    code = code.replace("; ", "\ntry:\n  ") + "\nexcept SystemExit as end:\n  print('exit', end.code)"
    output, _ = python(code, blocked="triton")
    assert "triton          none" in output
    if not torch.cuda.is_available():
        assert "verdict: works with limits (no Triton)\nexit 0" in output


def test_extras_are_those_of_setup():
    tree = ast.parse((Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8"))
    listed = {
        node.targets[0].id.lower(): {
            numbers_off(c.value) for c in ast.walk(node.value) if isinstance(c, ast.Constant)
        }
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    assert {extra: set(packages) for extra, packages in doctor.EXTRAS.items()} == listed


def numbers_off(requirement):
    """The name in a requirement."""
    return requirement.split(">")[0].split("[")[0]
