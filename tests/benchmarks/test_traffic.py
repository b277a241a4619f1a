"""Bytes and FLOPs of the chunked gated delta rule, counted in the interpreter."""

import json

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import kinds, traffic
from benchmarks.results import ResultError
from benchmarks.traffic import CASES, Case, metered, of_case, total
from prism_kernels._core import configs
from prism_kernels._core.runtime import interpreting

REPORT = json.loads(traffic.REPORT.read_text(encoding="utf-8"))
interpreted = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")


def by_hand(case):
    """Bytes read, bytes written and FLOPs of every launch: the table and the text in the op's README."""
    from prism_kernels.gated_delta_rule import launch

    D, r, dtype = case.width, case.group, torch.bfloat16
    C = launch.inner_chunk(64, D, D, dtype)
    tops = (
        8
        * (D // configs.config(launch.OP, "states_kernel", dtype, D, torch.device("cpu"))["BV"])
        * (1 + D / C)
    )
    states, unit = 4 * D**2 / C, 8 * case.l2norm
    pairs, inverse = (3, 4.5) if C == 64 else (4, 16)
    return {
        "prepare_kernel": (4 * D / r + 8, 4 * C + 12 + unit, pairs * C * D + inverse * C**2),
        "scan_kernel": ((2 + 4 / r) * D + 4 * C + 12 + unit, 2 * D, 6 * C * D + 8 * D**2),
        "states_kernel": (
            (4 + 4 / r) * D + 4 * C + 12 + unit, 4 * D + states + tops, 12 * C * D + 14 * D**2,
        ),
        "inputs_kernel": (
            (6 + 4 / r) * D + states + tops + 8 + unit, (2 + 4 / r) * D + 12, 22 * C * D + 14 * D**2,
        ),
    }  # fmt: skip


def as_counted(rows):
    return {row["kernel"]: (row["read"], row["written"], row["flops"]) for row in rows}


@triton.jit
def toy_kernel(p_x, p_w, p_y, n):
    """Two programs, each: 16 rows of x, the last ones masked; all of w twice; a product; one number."""
    o = tl.arange(0, 16)
    o_x = (tl.program_id(0) * 16 + o)[:, None] * 16 + o[None, :]
    o_w = o[:, None] * 16 + o[None, :]
    x = tl.load(p_x + o_x, mask=(o < n)[:, None] & (o < 16)[None, :], other=0.0)
    w = tl.load(p_w + o_w) + tl.load(p_w + o_w)
    y = tl.dot(x.to(tl.float32), w, input_precision="ieee")
    tl.store(p_y + tl.program_id(0), tl.sum(tl.sum(y, 1), 0))


@interpreted
def test_a_kernel_counted_by_hand():
    x, w, y = torch.zeros(32, 16, dtype=torch.float16), torch.zeros(16, 16), torch.ones(2)
    with metered() as meter:
        toy_kernel[(2,)](x, w, y, 5)
    read = 2 * (5 * 16 * 2)
    assert meter.counts() == {
        "read": read + 16 * 16 * 4,
        "written": 2 * 4,
        "issued": read + 2 * 2 * 16 * 16 * 4 + 2 * 4,
        "flops": 2 * 2 * 16**3,
    }
    toy_kernel[(2,)](x, w, y, 5)
    assert meter.flops == 2 * 2 * 16**3, "counts after its end"
    assert y.eq(0).all()


def test_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="traffic: expected Triton's interpreter.*TRITON_INTERPRET=1"):
        traffic.rows(Case(16))


@interpreted
@pytest.mark.parametrize("case", [Case(16, group=2, l2norm=True), Case(64, l2norm=True)], ids=str)
def test_counts_are_those_by_hand(case):
    assert as_counted(traffic.rows(case)) == by_hand(case)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_committed_counts_are_those_by_hand(case):
    assert as_counted(of_case(REPORT, case)) == by_hand(case)


SLOW = [pytest.param(case, marks=pytest.mark.full) for case in CASES if case.width > 64]


@interpreted
@pytest.mark.parametrize("case", [*(case for case in CASES if case.width <= 64), *SLOW], ids=str)
def test_committed_counts_are_those_of_the_kernels(case):
    assert of_case(REPORT, case) == traffic.rows(case), f"run `{traffic.COMMAND}`"


def test_the_table_in_the_readme_is_that_of_the_committed_counts():
    text = traffic.PAGE.read_text(encoding="utf-8")
    assert traffic.page(text, REPORT) == text, f"run `{traffic.COMMAND}`"


@pytest.mark.parametrize("direction, most", [("forward", 2100), ("backward", 6700)])
@pytest.mark.parametrize("l2norm", [False, True], ids=["as given", "unit rows"])
def test_bytes_per_token_and_head_stay_low(direction, most, l2norm):
    assert total(REPORT, Case(128, l2norm=l2norm), direction)["bytes"] <= most


def test_floors_are_each_input_and_output_once():
    floors = [
        case.floor(direction)
        for case in (Case(128), Case(128, group=4))
        for direction in ("forward", "backward")
    ]
    assert floors == [1032, 1808, 648, 1040]


def test_a_file_without_counts_is_refused(tmp_path):
    path = tmp_path / "traffic.json"
    row = REPORT["rows"][0]
    for rows, reason in (([], "no rows"), ([{**row, "issued": 1.0}], "prepare_kernel: counts")):
        path.write_text(json.dumps({**REPORT, "rows": rows}))
        with pytest.raises(ResultError, match=reason):
            kinds.check(path)
