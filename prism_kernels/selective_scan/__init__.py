"""Selective scan with a complex diagonal, by zero-order hold. See README.md for the mathematics."""

from .api import (
    SelectiveScanOutput,
    SelectiveScanStepOutput,
    selective_scan,
    selective_scan_step,
)

__all__ = ["SelectiveScanOutput", "SelectiveScanStepOutput", "selective_scan", "selective_scan_step"]
