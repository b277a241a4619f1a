"""Replace attributes of another library's modules and classes, count the calls, take it back in any order."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

_ABSENT = object()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Replacement:
    """`value` for the attribute `name` of `owner`."""

    owner: ModuleType | type
    name: str
    value: Any


class Shadow:
    """Value of a class attribute that hides the instances' own attributes of that name while it stands.

    What an instance stores meanwhile goes to its own dictionary, and shows again afterwards.
    """

    def __init__(self, name: str, value: Any):
        self.name, self.value = name, value

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


class Counter:
    """Calls by function name; not those inside a compiled graph, which would guard on the count."""

    def __init__(self, *names: str):
        self._counts = dict.fromkeys(names, 0)

    def add(self, name: str) -> None:
        if torch.compiler.is_compiling():
            return
        with _LOCK:
            self._counts[name] += 1

    def snapshot(self) -> dict[str, int]:
        with _LOCK:
            return dict(self._counts)


class Use:
    """Replacements in force, in the whole process, from the making of this handle until `undo`.

    Uses may overlap and end in any order: of those in force the latest made holds, and when the last is
    undone the attributes are what they were before the first. In a `with` statement the end of the block
    undoes, an exception included.
    """

    def __init__(self, replacements: Iterable[Replacement], counter: Counter):
        self._counter, self._before = counter, counter.snapshot()
        self._after: dict[str, int] | None = None
        with _LOCK:
            for r in replacements:
                slot = _SLOTS.setdefault((id(r.owner), r.name), _Slot(r.owner, r.name))
                slot.put(self, r.value)

    @property
    def in_force(self) -> bool:
        return self._after is None

    @property
    def calls(self) -> dict[str, int]:
        """Calls of each function through the library since this use began, until it ended."""
        after = self._counter.snapshot() if self._after is None else self._after
        return {name: count - self._before[name] for name, count in after.items()}

    def undo(self) -> None:
        """End this use; a second time does nothing."""
        after = self._counter.snapshot()
        with _LOCK:
            if self._after is not None:
                return
            self._after = after
            for key, slot in list(_SLOTS.items()):
                slot.take(self)
                if not slot.values:
                    del _SLOTS[key]

    def __enter__(self) -> "Use":
        if not self.in_force:
            raise RuntimeError("This use was undone already. Make a new one for each `with`.")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@dataclass
class _Slot:
    """One attribute: what it was, and what the uses in force put there, in order."""

    owner: Any
    name: str
    values: dict[Use, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = vars(self.owner).get(self.name, _ABSENT)

    def put(self, use: Use, value: Any) -> None:
        self.values[use] = value
        setattr(self.owner, self.name, value)

    def take(self, use: Use) -> None:
        if self.values.pop(use, _ABSENT) is _ABSENT:
            return
        value = next(reversed(self.values.values()), self.original)
        if value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


_SLOTS: dict[tuple[int, str], _Slot] = {}
