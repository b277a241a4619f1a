"""The verdict on two results, and two revisions measured in turns."""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import BROKEN, FASTER, SAME, SLOWER
from tests.benchmarks.fakes import failed, result, row

HERE = Path(compare.__file__).parent.parent


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args(list(map(str, arguments))))


def spread(low: float, middle: float, high: float):
    return replace(row(), ms_p20=low, ms_p50=middle, ms_p80=high)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (spread(9, 10, 11), spread(10.5, 12, 13), SAME),  # quantiles overlap
        (spread(9.9, 10, 10.05), spread(10.1, 10.2, 10.3), SAME),  # apart, but 2 % only
        (spread(9, 10, 11), spread(11.5, 12, 13), SLOWER),
        (spread(11.5, 12, 13), spread(9, 10, 11), FASTER),
        (spread(9, 10, 11), failed("wrong", "off by one"), f"{BROKEN}: wrong"),
        (failed("skipped", "missing"), spread(9, 10, 11), "right now"),
        (failed("skipped", "missing"), failed("skipped", "missing"), "both skipped"),
        (failed("skipped", "missing"), failed("failed", "crash"), "failed"),
    ],
)
def test_verdicts_take_noise_into_account(a, b, expected):
    assert compare.verdict(a, b, threshold=3.0) == expected


def test_rounds_merge_into_the_middle_and_the_widest():
    merged = compare.merge([result(rows=[spread(9, 10, 11)]), result(rows=[spread(10, 12, 13)])]).rows[0]
    assert (merged.ms_p20, merged.ms_p50, merged.ms_p80, merged.samples) == (9, 11, 13, 50)
    assert (
        compare.merge([result(rows=[row()]), result(rows=[failed("failed", "crash")])]).rows[0].status
        == "failed"
    )


@pytest.fixture
def files(tmp_path):
    """B is slower in one row, faster in another, and has a row of its own."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    result(rows=[row(ms=10.0), row(ms=10.0, provider="peer"), row(shape="B1_T1", ms=1.0)]).save(a)
    result(rows=[row(ms=12.0), row(ms=5.0, provider="peer"), row(shape="B2_T2", ms=1.0)]).save(b)
    return a, b


def test_files_give_a_table_and_an_exit_code(files, capsys):
    assert run(*files) == 1
    out = capsys.readouterr().out
    assert "only in A: selective_scan B1_T1" in out and "only in B: selective_scan B2_T2" in out
    assert "2 rows: 1 faster, 1 slower, 0 no longer right, 0 same within noise" in out
    assert "0.83" in out and "2.00" in out
    assert run(*files, "--allow-slower") == 0
    assert run(*files, "--threshold", "30") == 0
    assert run(files[0], files[0]) == 0


def test_the_table_is_plain_without_rich(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    run(*files)
    assert capsys.readouterr().out.startswith("op              shape            dtype")


def test_other_devices_are_refused_unless_forced(files, tmp_path, capsys):
    other = tmp_path / "gpu.json"
    result("cuda", rows=[row(ms=1.0)]).save(other)
    assert run(files[0], other) == 2
    assert "device_name 'AMD EPYC 7763' against 'NVIDIA H100 80GB HBM3'" in capsys.readouterr().err
    assert run(files[0], other, "--force") == 0


def test_what_is_neither_file_nor_revision_is_refused(files, capsys):
    assert run(files[0], "no-such-thing") == 2
    assert run("no-such-thing", "HEAD") == 2
    assert "neither a file nor a git revision" in capsys.readouterr().err
    files[1].write_text('{"kind": "benchmark", "rows"')
    assert run(*files) == 2
    assert "not whole JSON" in capsys.readouterr().err


FAKE_BENCH = """
import os, sys, time
sys.path.append({here!r})
from tests.benchmarks.fakes import result, row
if "--hang" in sys.argv:
    open({log!r}, "w").write(str(os.getpid()))
    time.sleep(60)
result(rows=[row(ms={ms})]).save(__import__("pathlib").Path(sys.argv[sys.argv.index("--out") + 1]))
open({log!r}, "a").write("{ms} " + " ".join(sys.argv[1:-2]) + chr(10))
"""


@pytest.fixture
def repository(tmp_path):
    """Two commits, the second with a slower bench; each run leaves a line in a log."""
    folder, log = tmp_path / "repository", tmp_path / "log"
    (folder / "benchmarks").mkdir(parents=True)

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-b", "main")
    for ms in (10.0, 20.0):
        code = FAKE_BENCH.format(here=str(HERE), log=str(log), ms=ms)
        # `benchmarks` of the checkout would hide ours, which the fake needs for its result files
        code = code.replace("from tests", "del sys.modules['benchmarks']; sys.path.pop(0)\nfrom tests")
        (folder / "benchmarks" / "__main__.py").write_text(code)
        (folder / "benchmarks" / "__init__.py").write_text("")
        git("add", ".")
        git("commit", "-m", f"{ms}")
    return folder, log


def test_revisions_take_turns_and_leave_nothing_behind(repository):
    folder, log = repository
    a, b = compare.measure(("HEAD~1", "HEAD"), "--op x", 2, folder)
    assert log.read_text().splitlines() == ["10.0 run --op x", "20.0 run --op x"] * 2
    assert compare.compare(a, b, 3.0)[0][0].verdict == SLOWER
    assert not (folder / ".git" / "worktrees").exists()


def test_a_failing_run_and_an_unknown_revision_leave_nothing_behind(repository):
    folder, _ = repository
    (folder / "benchmarks" / "__main__.py").write_text("raise SystemExit(3)")
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qam", "broken"],
                   cwd=folder, check=True)  # fmt: skip
    with pytest.raises(compare.Refusal, match=r"HEAD measured nothing \(exit code 3\)"):
        compare.measure(("HEAD~1", "HEAD"), "", 1, folder)
    assert not (folder / ".git" / "worktrees").exists()
    with pytest.raises(compare.Refusal, match="git worktree failed"):
        compare.worktrees(("HEAD", "gone"), folder).__enter__()
    assert not (folder / ".git" / "worktrees").exists()


def test_termination_removes_the_checkouts_and_ends_the_child(repository):
    folder, log = repository
    code = f"from pathlib import Path; from benchmarks import compare; compare.measure(('HEAD', 'HEAD'), '--hang', 1, Path({str(folder)!r}))"  # noqa: E501
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not (folder / ".git" / "worktrees").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
