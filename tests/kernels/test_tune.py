"""The tuner, driven under the interpreter with a clock of its own."""

import pytest
import torch

from prism_kernels import tune
from prism_kernels._core import configs
from prism_kernels._core.configs import Key
from prism_kernels.testing import budgets

OP, SHAPE = "chunk_gated_delta_rule", (1, 9, 1, 16, 16)
KEY = Key("scan_kernel", "32-bit", configs.DEFAULT, 16)
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times for itself")


def job(kernels=("scan_kernel",), shape=SHAPE):
    return tune.Job(OP, shape, torch.float32, kernels, torch.device("cpu"))


@pytest.fixture
def quick(monkeypatch):
    """One case, and few rows."""
    cases = tune.cases
    monkeypatch.setattr(tune, "cases", lambda job: [next(cases(job))])
    search = {**configs.shipped()[OP].search, "scan_kernel": {"BV": [16], "warps": [2, 4, 8], "stages": [1]}}
    monkeypatch.setitem(configs.shipped(), OP, configs.shipped()[OP]._replace(search=search))


def clock(times):
    """Milliseconds by the warps of the row in use."""
    return lambda call: times[job().in_use("scan_kernel").warps]


@CPU_ONLY
def test_the_fastest_row_is_found_written_and_loaded(quick, tmp_path):
    said = []
    best = tune.tune(job(), clock({2: 0.5, 4: 2.0, 8: 1.0}), said.append)
    assert best[KEY].warps == 2 != configs.shipped()[OP].rows[KEY].warps
    assert "0.5000 ms  0.500" in "".join(said) and "[3/3]" in said[-2]
    path = tmp_path / "table.toml"
    path.write_text(configs.dump(OP, best, "by a fake clock"))
    try:
        configs.use_launch_table(path)
        assert job().in_use("scan_kernel") == best[KEY]
    finally:
        configs.use_launch_table(None)


@CPU_ONLY
def test_rows_that_are_wrong_or_fail_are_never_timed(quick, monkeypatch):
    measured = budgets.budget_rows

    def faulty(spec, case, impl):
        warps = job().in_use("scan_kernel").warps
        if warps == 4:
            raise RuntimeError("out of resource: shared memory")
        x = measured(spec, case, impl)
        return [tune.replace(row, relative=(1.0, 1.0)) for row in x] if warps == 2 else x

    monkeypatch.setattr(budgets, "budget_rows", faulty)
    found = tune.results(job(), "scan_kernel", clock({8: 1.0}), lambda text: None)
    reasons = {r.config.warps: r.reason for r in found}
    assert reasons[4] == "RuntimeError: out of resource: shared memory"
    assert reasons[2].startswith("wrong: chunk_gated_delta_rule [unit keys] triton float32 o")
    assert [r.config.warps for r in found if r.median is not None] == [8]


@CPU_ONLY
def test_where_nothing_is_right_nothing_is_found(quick, monkeypatch):
    monkeypatch.setattr(budgets, "LIMIT", -1.0)
    said = []
    assert tune.tune(job(), clock({}), said.append) == {}
    assert "NO ROW IS RIGHT" in said[-1]


@CPU_ONLY
def test_kernels_are_timed_in_the_calls_that_launch_them(quick):
    forward, backward = tune.timed(job())
    assert tune.launched_by(forward) == {"prepare_kernel", "scan_kernel"}
    assert tune.launched_by(backward) == {"states_kernel", "inputs_kernel"}
    said = []
    assert tune.tune(job(("segments_kernel",)), clock({}), said.append) == {}
    assert "segments_kernel is not launched at this shape" in said


@CPU_ONLY
def test_every_kernel_is_launched_by_a_case_of_its_check():
    launched = [tune.launched_by(lambda c=c: tune.run(job(), c)) for c in tune.cases(job())]
    assert set().union(*launched) == set(configs.shipped()[OP].search)


def test_the_row_in_use_comes_first_and_once():
    rows = job().candidates("carry_kernel")
    assert rows[0] == job().in_use("carry_kernel")
    assert len({(r.blocks, r.warps, r.stages) for r in rows}) == len(rows) > 1


@CPU_ONLY
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--shape", "1,64,2,64,64"]) == 2
    assert "expected a GPU to time kernels on, found none" in capsys.readouterr().err


def test_a_dry_run_lists_what_would_be_tried(capsys):
    assert tune.main(["--shape", "1,64,2,64,48", "--kernel", "scan_kernel", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert ".64: the row in use, and others" in text
    assert "{ BV = 32, warps = 4, stages = 1, shared = 0 }" in text and "BV = 128" not in text


@pytest.mark.parametrize(
    "arguments", [["--shape", "1,2,3"], ["--shape", "1,9,1,512,16"], ["--kernel", "fwd"]]
)
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shape", "1,9,1,16,16", *arguments])
    assert arguments[0] in capsys.readouterr().err
