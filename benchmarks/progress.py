"""One line per finished row, and a bar under them where rich is installed and a terminal listens."""

import sys
from types import TracebackType

from .results import Row


def line(row: Row) -> str:
    """A finished row in words."""
    name = f"{row.op} {row.shape} {row.dtype} {row.direction}: {row.provider}"
    if row.status != "ok":
        return f"{name}: {row.status}: {row.reason}"
    memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 1e6:.0f} MB"
    times = f"{row.ms_p50:.3g} ms ({row.ms_p20:.3g} to {row.ms_p80:.3g}, {row.samples} samples)"
    share = "" if row.roofline_percent is None else f", {row.roofline_percent:.3g} % of the roofline"
    return f"{name}: {times}{share}, error {row.error_ratio:.2g}{memory}"


class Progress:
    """Counts rows to `total`."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.bar, self.task = total, 0, None, None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                return self
            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
            self.bar = progress.Progress(*columns)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def skip(self, rows: int) -> None:
        """Rows that were there already."""
        self.done += rows
        if self.bar is not None:
            self.bar.advance(self.task, rows)

    def row(self, row: Row) -> None:
        """Report a finished row."""
        self.done += 1
        text = f"[{self.done}/{self.total}] {line(row)}"
        if self.bar is None:
            print(text, flush=True)
            return
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.bar.advance(self.task)
