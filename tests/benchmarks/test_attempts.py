"""Providers that end the whole process, and runs that get past them."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.attempts import CHECKING, OPENING, ORACLE, TIMING, Attempts
from benchmarks.results import ResultError
from tests.benchmarks.fakes import rows_of
from tests.benchmarks.test_run import FAST, ROOT

KEY = ("rms_norm", "B2_T3_D8", "float32", "forward", "peer")
OTHER = ("rms_norm", "B2_T4_D8", "float32", "forward", "peer")

PLUGIN = """
import os, signal
import torch
from benchmarks import measure
from benchmarks.registry import register

measure.COPY_BYTES["cpu"], measure.PRODUCT["cpu"] = 2**16, 32
calls = []


def dies(t):
    calls.append(1)
    if len(calls) > {calls}:
        {death}
    return {{"y": torch.nn.functional.rms_norm(t["x"], t["weight"].shape, t["weight"], 1e-6)}}


register("rms_norm", "dies", lambda setting: dies)
"""


@pytest.mark.parametrize(
    ("calls", "death", "number", "step"),
    [
        (0, "os.abort()", signal.SIGABRT, CHECKING),
        (1, "os.kill(os.getpid(), signal.SIGSEGV)", signal.SIGSEGV, TIMING),
    ],
    ids=["while it is checked", "on the clock"],
)
def test_a_run_gets_past_a_provider_that_ends_the_process(tmp_path, calls, death, number, step):
    out, plugin = tmp_path / "out.json", tmp_path / "dies.py"
    plugin.write_text(PLUGIN.format(calls=calls, death=death))
    options = [
        "--op",
        "rms_norm",
        "--sizes",
        "B2_T3_D8",
        "B2_T4_D8",
        "--direction",
        "forward",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-m", "benchmarks", "run", *FAST, *options, "--plugin", str(plugin)]
    command += ["--provider", "dies", "torch", "reference", "--threads", "1", "--out", str(out)]
    before = []
    for more, code in ([], -number), (["--resume"], -number), (["--resume"], 0):
        done = subprocess.run([*command, *more], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rows = rows_of(out)
        assert done.returncode == code and rows[: len(before)] == before
        before = rows
    found = {(row.shape, row.provider): row for row in rows}
    assert len(rows) == 6 and all(found[s, p].status == "ok" for s, p in found if p != "dies")
    first, second = found["B2_T3_D8", "dies"], found["B2_T4_D8", "dies"]
    assert (first.status, first.reason) == ("failed", f"the process died 2 times while {step}")
    assert (second.status, second.reason) == (
        "skipped",
        f"not tried: the process died 2 times while {step} on B2_T3_D8",
    )


def dies(tmp_path, step, *keys):
    """What the next process finds after one that ended in a step."""
    attempts = Attempts(tmp_path / "out.json", resume=True)
    with attempts.during(step, keys):
        left = attempts.path.read_text()
    attempts.path.write_text(left)
    return Attempts(tmp_path / "out.json", resume=True)


def test_one_death_gives_nobody_up(tmp_path):
    attempts = dies(tmp_path, CHECKING, KEY)
    assert attempts.given_up(KEY) is None and attempts.count(CHECKING, KEY) == 1
    attempts = dies(tmp_path, TIMING, KEY)
    assert attempts.given_up(KEY) is None  # another step
    attempts.finished(KEY)
    assert not list(tmp_path.iterdir())
    dies(tmp_path, CHECKING, KEY)
    assert not Attempts(tmp_path / "out.json", resume=False).begun and not list(tmp_path.iterdir())


def test_a_step_of_several_counts_for_each_and_is_held_against_no_other_shape(tmp_path):
    neighbour = (*KEY[:4], "neighbour")
    for _ in range(2):
        attempts = dies(tmp_path, ORACLE, KEY, neighbour)
    assert attempts.given_up(KEY) == ("failed", f"the process died 2 times while {ORACLE}")
    assert attempts.given_up(neighbour)[0] == "failed" and attempts.given_up(OTHER) is None


def test_what_is_held_against_other_shapes(tmp_path):
    for _ in range(2):
        attempts = dies(tmp_path, OPENING, KEY)
    attempts.finished(KEY)  # as a row that says so
    assert attempts.given_up(OTHER)[0] == "skipped"
    for i, name in enumerate(("swiglu", None, "float16", "forward+backward", "torch")):
        assert name is None or attempts.given_up((*OTHER[:i], name, *OTHER[i + 1 :])) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_can_be_caught_is_no_death(tmp_path, error):
    attempts = dies(tmp_path, CHECKING, KEY)
    with pytest.raises(error), attempts.during(CHECKING, [KEY]):
        raise error
    assert attempts.count(CHECKING, KEY) == 1


@pytest.mark.parametrize("text", ["[[", "{}", "[[1]]", '[["a", "b", "c", "d", "e", 6]]'])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "out.json.unfinished").write_text(text)
    with pytest.raises(ResultError, match="unfinished: .* Remove it to go on without"):
        Attempts(tmp_path / "out.json", resume=True)
    assert (tmp_path / "out.json.unfinished").read_text() == text
