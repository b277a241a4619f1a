"""The drift over 65,536 tokens, which decides the selective scan's default accuracy."""

import inspect
import json

import pytest

from benchmarks import scan_drift
from benchmarks.report import fill
from prism_kernels import selective_scan, selective_scan_step

REPORT = json.loads(scan_drift.REPORT.read_text(encoding="utf-8"))


def test_the_page_has_the_committed_table():
    text = scan_drift.PAGE.read_text(encoding="utf-8")
    assert fill(text, {"drift": scan_drift.markdown}, REPORT) == text, f"run `{scan_drift.COMMAND}`"


def test_drift_decides_the_default():
    """Accurate stays below plain PyTorch; fast may be the default once it holds its bars too."""
    report = scan_drift.measure()
    for row, committed in zip(report["rows"], REPORT["rows"], strict=True):
        assert row["accurate"] <= row["plain PyTorch"]
        for way in ("accurate", "fast", "special"):
            assert row[way] == pytest.approx(committed[way], rel=0.5)
    holds = all("does not hold" not in line for line in scan_drift.verdict(report))
    for function in (selective_scan, selective_scan_step):
        default = inspect.signature(function).parameters["accuracy"].default
        assert default == ("fast" if holds else "accurate")
