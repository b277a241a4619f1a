"""The one command for a GPU, as far as it goes without one."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, profile_row
from benchmarks.gpu import ROOT, Run, Stage
from tests.benchmarks.fakes import failed, row

SCRIPT = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
PYTHON = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}


def test_a_dry_run_prints_stages_commands_and_budgets_and_writes_nothing(tmp_path):
    arguments = ["--dry-run", "--seconds", "1000", "--out", "here", "--wheels", "."]
    done = subprocess.run([*SCRIPT, *arguments], cwd=tmp_path, env=PYTHON, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage, seconds in (
        ("doctor", 50),
        ("contracts", 250),
        ("tests", 100),
        ("benchmarks", 520),
        ("profile", 80),
    ):
        assert f"{stage}: {seconds} s" in done.stdout
    assert f"benchmarks run --device cuda --out {tmp_path}/here/bench.json --resume" in done.stdout
    assert "-m gpu" in done.stdout and "-o addopts=" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(SCRIPT, cwd=tmp_path, env=PYTHON, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a GPU that torch can use, got none" in done.stderr


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def run(out, seconds, *stages):
    runner = Run(out, list(stages), seconds, gpu.environment(None))
    return runner.all("some device", ["a note"]), json.loads((out / "summary.json").read_text())


def test_stages_run_in_order_and_a_failed_one_is_told(tmp_path, capsys):
    good = Stage("good", 1, "good.log", [python("print('fine')")])
    bad = Stage("bad", 1, "bad.log", [python("print('why'); raise SystemExit(3)"), python("print('still')")])
    code, summary = run(tmp_path, 60, good, bad, Stage("none", 1, "none.log", []))
    assert code == 1
    assert [s["status"] for s in summary["stages"]] == ["done", "failed", "skipped"]
    assert summary["stages"][1]["exit_codes"] == [3, 0] and summary["device"] == "some device"
    assert "still" in (tmp_path / "bad.log").read_text() and "    why" in capsys.readouterr().out


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("wrote what it had", flush=True)
    {then}
"""


@pytest.mark.parametrize("then", ["raise SystemExit(2)", "time.sleep(60)"], ids=["ends", "does not end"])
def test_a_stage_that_runs_over_is_stopped_and_the_next_begins(tmp_path, then):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background has it
    hangs = Stage("hangs", 1, "hangs.log", [python(HANGS.format(then=then)), python("print('never')")])
    start = time.monotonic()
    try:
        code, summary = run(tmp_path, 10, hangs, Stage("next", 1, "next.log", [python("print('next')")]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    assert code == 0
    assert [s["status"] for s in summary["stages"]] == ["stopped", "done"]
    log = (tmp_path / "hangs.log").read_text()
    assert "wrote what it had" in log and "never" not in log
    child = int(log.split("\n$ ")[1].splitlines()[-2])
    time.sleep(0.2)
    assert (
        subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout[:1]
        in "Z"
    )


@pytest.mark.parametrize(
    "end",
    ["raise SystemExit(3)", "os.abort()", "os.kill(os.getpid(), signal.SIGSEGV)"],
    ids=["lost", "6", "11"],
)
def test_a_bench_that_loses_the_gpu_or_crashes_goes_on_in_a_new_process(tmp_path, end, capsys):
    code = f"""
import os, signal
from pathlib import Path
path = Path({str(tmp_path / "turns")!r})
turns = int(path.read_text()) if path.exists() else 0
path.write_text(str(turns + 1))
if turns < 2:
    {end}
"""
    stage, other = (Stage(n, 1, f"{n}.log", [python(code)]) for n in ("bench", "other"))
    stage.commands[0].append("--resume")
    assert run(tmp_path, 60, stage)[0] == 0 and (tmp_path / "turns").read_text() == "3"
    assert capsys.readouterr().out.count("ended that process" if "os." in end else "the GPU was lost") == 2
    (tmp_path / "turns").unlink()
    assert run(tmp_path, 60, other)[0] == 1 and (tmp_path / "turns").read_text() == "1"


def test_a_bench_that_always_crashes_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESTARTS", 2)
    stage = Stage("bench", 1, "bench.log", [[*python("import os; print('up'); os.abort()"), "--resume"]])
    code, summary = run(tmp_path, 60, stage)
    assert code == 1 and summary["stages"][0]["exit_codes"] == [-signal.SIGABRT]
    assert (tmp_path / "bench.log").read_text().count("\nup") == 3


def test_what_earlier_stages_save_later_ones_may_use(tmp_path):
    quick, late = (Stage(name, 1, "a.log", [python("")]) for name in ("quick", "late"))
    _, summary = run(tmp_path, 100, quick, late)
    assert summary["stages"][0]["budget_s"] == 50 and summary["stages"][1]["budget_s"] > 90


def test_termination_ends_the_stage_and_leaves_a_summary(tmp_path):
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu import *
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
command = [sys.executable, "-u", "-c", "import time; print('up'); time.sleep(60)"]
stage = Stage("long", 1, "long.log", [command])
Run(Path({str(tmp_path)!r}), [stage], 60, environment(None)).all("some device", [])
"""
    process = subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "long.log", time.monotonic() + 30
    while not (log.exists() and "\nup" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["status"] == "stopped"


def test_files_stay_small(tmp_path):
    log, data, torn = tmp_path / "a.log", tmp_path / "a.json", tmp_path / "a.json.tmp"
    for path in (log, data, torn):
        path.write_text("begin" + "x" * 5000 + "end")
        gpu.shrink(path, 1000)
    text = log.read_text()
    assert (
        text.startswith("begin") and text.endswith("end") and "bytes left out" in text and len(text) <= 1000
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json.gz", "a.log"]


def test_modules_that_need_what_is_missing_are_left_out(monkeypatch):
    assert gpu.missing_imports(ROOT / "tests" / "kernels") == {}
    installed = gpu._installed
    monkeypatch.setattr(
        gpu, "_installed", lambda name: name not in ("hypothesis", "xdist") and installed(name)
    )
    left_out = gpu.missing_imports(ROOT / "tests" / "kernels")
    assert left_out["tests/kernels/test_properties.py"] == "hypothesis"
    assert "tests/kernels/test_contracts.py" not in left_out and "tests/kernels/test_gpu.py" not in left_out
    contracts = next(s for s in gpu.stages(ROOT) if s.name == "contracts")
    assert "test_properties.py left out: hypothesis is not installed" in contracts.note
    assert (
        "--ignore=tests/kernels/test_properties.py" in contracts.commands[0]
        and "-n" not in contracts.commands[0]
    )


def test_wheels_go_into_a_side_folder_one_by_one(tmp_path):
    wheels, side = tmp_path / "wheels", tmp_path / "side"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "a_peer-1.0-py3-none-any.whl", "w") as file:
        file.writestr("a_peer.py", "x = 1\n")
        meta = "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\nRequires-Dist: not-to-be-had\n"
        file.writestr("a_peer-1.0.dist-info/METADATA", meta)
        file.writestr(
            "a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("a_peer-1.0.dist-info/RECORD", "")
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"")
    (wheels / "triton-9.0-py3-none-any.whl").write_bytes(b"")
    notes = gpu.install(wheels, side)
    assert notes[0] == "a_peer-1.0-py3-none-any.whl: installed" and (side / "a_peer.py").exists()
    assert "not installed" in notes[1] and "left out" in notes[2]
    assert gpu.environment(side)["PYTHONPATH"].startswith(str(side))


def test_stages_never_see_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in gpu.environment(None)


def test_the_slowest_is_our_kernel_furthest_from_its_floor():
    kernel = replace(row(provider="triton"), roofline_percent=30.0)
    far = replace(row(provider="triton", shape="B1_T1_D1_N1"), roofline_percent=20.0)
    others = [replace(row(), roofline_percent=1.0), replace(row(provider="peer"), roofline_percent=0.1)]
    assert profile_row.slowest([kernel, far, *others, failed("wrong", "off")]) is far
    assert profile_row.slowest(others).provider == "torch"
    assert profile_row.slowest([]) is None
