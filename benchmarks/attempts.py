"""What was in progress when a process died: a small file beside a result file, `<result>.unfinished`.

A segmentation fault, an abort or the kernel's out-of-memory killer cannot be caught. So a step that may bring
one enters its rows here, on disk, before it begins, and takes them out when it returns, raises or is
interrupted by Ctrl-C. What is still there was in progress when the process died. Anybody's SIGKILL may have
done that once, so `--resume` tries again; a row whose same step died `TWICE` is given up. Steps that several
rows share count for each of them, until each is tried alone.

The file is gone once nothing in it matters; removing it by hand forgets what it says.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .results import Key, ResultError, replace

TWICE = 2
INPUTS, ORACLE = "drawing the inputs", "computing the oracle"
OPENING, CHECKING, TIMING = "opening it", "checking it", "timing it"  # a provider's own doing


class Attempts:
    """Steps that were begun and not ended, and how often.

    Args:
        result: The result file.
        resume: Whether to read what an earlier process left; otherwise it is forgotten.

    Raises:
        ResultError: What lies beside the result file is no such list.
    """

    def __init__(self, result: Path, resume: bool) -> None:
        self.path = result.with_name(result.name + ".unfinished")
        self.begun: Counter[tuple[str, ...]] = Counter()
        if resume and self.path.exists():
            self.begun.update(read(self.path))
        else:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def during(self, step: str, keys: Iterable[Key]) -> Iterator[None]:
        """Enter rows for the length of one step; a provider that asks to exit has raised."""
        marks = [(*key, step) for key in keys]
        self.begun.update(marks)
        self.save()
        try:
            yield
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise RuntimeError(repr(error)) from error
        finally:
            self.begun.subtract(marks)
            self.save()

    def count(self, step: str, key: Key) -> int:
        """How often the process died in this step of a row."""
        return self.begun[*key, step]

    def finished(self, key: Key) -> None:
        """Forget the deaths that a row has survived."""
        survived = [mark for mark, n in self.begun.items() if mark[:5] == key and n < TWICE]
        for mark in survived:
            del self.begun[mark]
        if survived:
            self.save()

    def given_up(self, key: Key) -> tuple[str, str] | None:
        """Status and reason of a row that is not tried again: itself, or after the same on another shape."""
        often = {mark: n for mark, n in self.begun.items() if n >= TWICE}
        for (*before, step), n in often.items():
            if tuple(before) == key:
                return "failed", f"the process died {n} times while {step}"
        op, _, dtype, direction, provider = key
        for (*before, step), n in often.items():
            same = (before[0], *before[2:]) == (op, dtype, direction, provider)
            if same and step in (OPENING, CHECKING, TIMING):
                return "skipped", f"not tried: the process died {n} times while {step} on {before[1]}"
        return None

    def save(self) -> None:
        """Replace the file, or remove it when it is empty."""
        left = sorted(self.begun.elements())
        if left:
            replace(self.path, json.dumps(left, indent=1))
        else:
            self.path.unlink(missing_ok=True)


def read(path: Path) -> list[tuple[str, ...]]:
    """The marks of a file.

    Raises:
        ResultError: It is not a list of them.
    """
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read ({error}). Remove it to go on without.") from error
    whole = isinstance(marks, list) and all(
        isinstance(mark, list) and len(mark) == 6 and all(isinstance(x, str) for x in mark) for mark in marks
    )
    if not whole:
        raise ResultError(f"{path}: not a list of unfinished steps. Remove it to go on without.")
    return [tuple(mark) for mark in marks]
