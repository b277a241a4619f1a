"""Selective scan with a complex diagonal, by zero-order hold. See README.md for the mathematics."""

from .api import (
    SelectiveScanOutput,
    SelectiveScanStepOutput,
    selective_scan,
    selective_scan_step,
)
from .bidirectional import SelectiveScanBidirectionalOutput, selective_scan_bidirectional
from .mamba import selective_scan_fn, selective_state_update
from .mamba2 import mamba_chunk_scan_combined

__all__ = [
    "SelectiveScanBidirectionalOutput",
    "SelectiveScanOutput",
    "SelectiveScanStepOutput",
    "mamba_chunk_scan_combined",
    "selective_scan",
    "selective_scan_bidirectional",
    "selective_scan_fn",
    "selective_scan_step",
    "selective_state_update",
]
