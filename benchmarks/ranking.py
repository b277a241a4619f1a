"""Who is compared with whom: rows of one measurement side by side, ours and peers, and their floor."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .results import Roofline, Row

COMPILED = "compiled torch"  # inductor around our PyTorch path: ours, and no path of its own
PATHS = ("triton", "torch")
OURS = (*PATHS, COMPILED)
REFERENCE = "reference"  # the definition: ours, and not meant to be fast
EAGER = ("eager time loop", "eager")  # what one writes without an op
INDUCTOR = "torch.compile"  # of eager code


@dataclass
class Race:
    """Every provider on one op, shape, dtype and direction; only rows that are right take part."""

    op: str
    shape: str
    dtype: str
    direction: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ranked(self) -> list[Row]:
        """Rows that came out right, fastest first."""
        return sorted((r for r in self.rows if r.status == "ok"), key=lambda r: r.ms_p50 or 0.0)

    @property
    def unranked(self) -> list[Row]:
        """Rows that are wrong, failed or were skipped; never compared."""
        return [r for r in self.rows if r.status != "ok"]

    @property
    def ours(self) -> Row | None:
        """Our fastest path."""
        return next((r for r in self.ranked if r.provider in PATHS), None)

    @property
    def peers(self) -> list[Row]:
        """Other people's code, and what inductor makes of eager code; fastest first."""
        return [r for r in self.ranked if r.provider not in (*OURS, REFERENCE, *EAGER)]

    @property
    def eager(self) -> Row | None:
        """Plain eager PyTorch: a loop over time where the op has one."""
        return next((r for r in self.ranked if r.provider in EAGER), None)


def races(rows: Iterable[Row]) -> list[Race]:
    """Rows gathered by op, shape, dtype and direction, in the order of their first row."""
    found: dict[tuple[str, str, str, str], Race] = {}
    for row in rows:
        found.setdefault(row.key[:4], Race(*row.key[:4])).rows.append(row)
    return list(found.values())


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """How many times faster `fast` is than `slow`; None where either is missing."""
    if slow is None or fast is None or not slow.ms_p50 or not fast.ms_p50:
        return None
    return slow.ms_p50 / fast.ms_p50


def floor_ms(row: Row, roofline: Roofline) -> float | None:
    """The least time this machine could need: bytes at the speed of a copy, or FLOPs at that of a product."""
    peak = roofline.tflop_s.get(row.dtype)
    bytes_ms = row.floor_bytes / (roofline.copy_gb_s * 1e6)
    flops_ms = row.floor_flops / (peak * 1e9) if peak else 0.0
    return max(bytes_ms, flops_ms) or None


def sweeps(rows: Iterable[Row], least: int = 3) -> dict[tuple[str, str, str], dict[int, list[Race]]]:
    """Shapes that differ in T only, at `least` lengths or more: (op, shape with T left open, dtype) -> T."""
    found: dict[tuple[str, str, str], dict[int, list[Race]]] = {}
    for race in races(rows):
        if length := re.search(r"(?<![A-Za-z])T(\d+)", race.shape):
            name = race.shape[: length.start()] + "T*" + race.shape[length.end() :]
            by_length = found.setdefault((race.op, name, race.dtype), {})
            by_length.setdefault(int(length.group(1)), []).append(race)
    return {key: dict(sorted(lengths.items())) for key, lengths in found.items() if len(lengths) >= least}
