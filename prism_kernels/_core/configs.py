"""Launch tables: the blocks, warps and stages a kernel is launched with, by dtype, architecture and width.

The table of an op is data, `launch_table.toml` in its folder:

    format = 1
    op = "chunk_gated_delta_rule"

    [search.scan_kernel]                # what a row of this kernel may say; the tuner tries all of it
    BV = [16, 32, 64, 128]
    warps = [2, 4, 8]
    stages = [1, 2]

    [scan_kernel.16-bit.sm_90]          # kernel, class of dtypes, architecture
    128 = { BV = 32, warps = 4, stages = 2, shared = 101 }

A row is found by the padded width of a head and says how many KiB of shared memory a program takes. An
architecture without a row takes that of the nearest older one of its maker, else of the oldest, else of
DEFAULT: so rows stand where something differs. Nothing is timed here. `use_launch_table(file)`, or
PRISM_LAUNCH_TABLE=file, puts rows that `python -m prism_kernels.tune` wrote before those that ship.
"""

import contextlib
import functools
import itertools
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .checks import fail

FORMAT = 1
WIDTHS = (16, 32, 64, 128, 256)  # of heads in registers
DEFAULT = "sm_90"  # whose rows are taken where no kernel is compiled, too
NARROW, WIDE = CLASSES = ("16-bit", "32-bit")  # of the dtype of operands; wider ones count to the second
# KiB of shared memory that a program may take
ROOM = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
ROOM |= {"gfx90a": 64, "gfx942": 64}
PACKAGE = Path(__file__).parent.parent


class Key(NamedTuple):
    """What a row is found by."""

    kernel: str
    kind: str
    architecture: str
    width: int


@dataclass(frozen=True)
class Config:
    """A row: sizes of blocks by the name of their constexpr, warps, stages, and KiB of shared memory."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    shared: int = 0

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def options(self, **most: int) -> dict[str, int]:
        """Keywords for `launch`; blocks are at most as large as in `most`."""
        blocks = {name: min(size, most.get(name, size)) for name, size in self.blocks}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        pairs = [*self.blocks, ("warps", self.warps), ("stages", self.stages), ("shared", self.shared)]
        return f"{{ {', '.join(f'{name} = {value}' for name, value in pairs)} }}"


Rows = Mapping[Key, Config]
Search = Mapping[str, Mapping[str, list[int]]]


class Table(NamedTuple):
    """The rows of one op, and what rows of each kernel may say (empty in a file that a tuner wrote)."""

    op: str
    rows: dict[Key, Config]
    search: Search


class Card(NamedTuple):
    """What a row depends on: the architecture, and bytes of shared memory that a program may take, if
    limited.
    """

    architecture: str
    room: int | None


_pretended: Card | None = None
_given: Table | None = None  # what the user gave
_tried: dict[str, Rows] = {}


def card_of(device: torch.device) -> Card:
    """The card that a device is; the default where kernels are interpreted or only recorded."""
    if _pretended is not None:
        return _pretended
    return _card(device) if device.type == "cuda" else Card(DEFAULT, None)


@functools.cache
def _card(device: torch.device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", None)
    if torch.version.hip:
        return Card(properties.gcnArchName.split(":")[0], room)
    return Card(f"sm_{properties.major}{properties.minor}", room or properties.shared_memory_per_block)


@contextlib.contextmanager
def pretend(architecture: str, room: int | None = None) -> Iterator[None]:
    """Choose rows as on another card, with `room` bytes of shared memory if given. For tools and tests."""
    global _pretended
    known = ROOM[architecture] * 1024 if architecture in ROOM else None
    outer, _pretended = _pretended, Card(architecture, known if room is None else room)
    try:
        yield
    finally:
        _pretended = outer


def is_amd(device: torch.device) -> bool:
    """Whether kernels are for AMD's cards."""
    return card_of(device).architecture.startswith("gfx")


def class_of(dtype: torch.dtype) -> str:
    """The class of dtypes by which rows are found."""
    return NARROW if dtype.itemsize <= 2 else WIDE


def config(op: str, kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Config:
    """The row of a kernel for operands of `dtype` and heads of `width` in registers."""
    return _find(op, kernel, class_of(dtype), width, card_of(device).architecture)


def check_room(op: str, dtype: torch.dtype, width: int, device: torch.device, what: str) -> None:
    """Raise NotImplementedError where a kernel of `op` needs more shared memory than the card has."""
    kind, (architecture, room) = class_of(dtype), card_of(device)
    if room is None or (needed := _shared(op, kind, width, architecture)) * 1024 <= room:
        return
    fitting = itertools.takewhile(lambda w: _shared(op, kind, w, architecture) * 1024 <= room, WIDTHS)
    advice = f"{what} up to {max(fitting, default=0)} fit; impl='torch' takes any."
    expected = f"{needed} KiB of shared memory for {what} of {width} on the 'triton' path"
    fail(op, expected, f"{room // 1024} KiB on {architecture}", advice, NotImplementedError)


@functools.cache
def _find(op: str, kernel: str, kind: str, width: int, architecture: str) -> Config:
    rows = active(op)
    known = [k.architecture for k in rows if (k.kernel, k.kind, k.width) == (kernel, kind, width)]
    return rows[Key(kernel, kind, nearest(architecture, known), width)]


@functools.cache
def _shared(op: str, kind: str, width: int, architecture: str) -> int:
    return max(_find(op, kernel, kind, width, architecture).shared for kernel in shipped()[op].search)


def nearest(architecture: str, known: list[str]) -> str:
    """The one of `known` whose row an architecture takes."""
    maker, number = generation(architecture)
    same = sorted((generation(name)[1], name) for name in known if generation(name)[0] == maker)
    older = [name for age, name in same if age <= number]
    return older[-1] if older else same[0][1] if same else DEFAULT


def generation(architecture: str) -> tuple[str, int]:
    """Maker and age of an architecture such as "sm_90" or "gfx942"."""
    maker, number = re.fullmatch(r"(sm_|gfx)(\w+)", architecture).groups()  # type: ignore[union-attr]
    return maker, int(number, 10 if maker == "sm_" else 16)


@functools.cache
def shipped() -> dict[str, Table]:
    """The tables of all ops that have one."""
    tables = (read(path) for path in sorted(PACKAGE.glob("*/launch_table.toml")))
    return {table.op: table for table in tables}


def active(op: str) -> Rows:
    """The rows in use: those on trial, then the user's, then those that ship."""
    global _given
    if _given is None and (path := os.environ.get("PRISM_LAUNCH_TABLE")):
        _given = read(Path(path))
    given = _given.rows if _given is not None and _given.op == op else {}
    return {**shipped()[op].rows, **given, **_tried.get(op, {})}


def candidates(op: str, key: Key, only: Mapping[str, Sequence[int]] | None = None) -> Iterator[Config]:
    """Every row that a kernel may have, blocks no wider than the head, of those parts in `only`."""
    parts = shipped()[op].search[key.kernel]
    for values in itertools.product(*((only or {}).get(part, allowed) for part, allowed in parts.items())):
        config = _row(dict(zip(parts, values, strict=True)))
        if max((size for _, size in config.blocks), default=0) <= key.width:
            yield config


def _row(numbers: dict[str, int]) -> Config:
    parts = ("warps", "stages", "shared")
    blocks = tuple((name, size) for name, size in numbers.items() if name not in parts)
    return Config(blocks, **{part: numbers[part] for part in parts if part in numbers})


def use_launch_table(path: str | Path | None) -> None:
    """Launch with the rows of a file, for all calls from now on; None goes back to those that ship.

    Raises:
        ValueError: The file is no launch table, or one for kernels or blocks that do not exist.
    """
    global _given
    _given = Table("", {}, {}) if path is None else read(Path(path))
    _forget()


@contextlib.contextmanager
def trying(op: str, rows: Rows) -> Iterator[None]:
    """Put some rows before all others. For the tuner and tests."""
    outer = _tried.get(op, {})
    _tried[op] = {**outer, **rows}
    _forget()
    try:
        yield
    finally:
        _tried[op] = outer
        _forget()


def _forget() -> None:
    _find.cache_clear()
    _shared.cache_clear()


def read(path: Path) -> Table:
    """A table from its file.

    Raises:
        ValueError: With the reason, in the house's form.
    """
    name = f"launch table {path}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _bad(name, "a file in TOML", str(error))
    if (version := data.pop("format", None)) != FORMAT:
        _bad(name, f"`format = {FORMAT}`", repr(version))
    op, search = data.pop("op", None), data.pop("search", {})
    if not search and op not in shipped():
        _bad(name, f"`op` to be one of {', '.join(shipped())}", repr(op))
    rows = dict(_rows(name, data, search or shipped()[op].search))
    return Table(op, rows, search)


def _rows(name: str, data: dict, search: Search) -> Iterator[tuple[Key, Config]]:
    for (kernel, kind, architecture, width), row in _leaves(name, data, ("kernel", "class", "card", "width")):
        where = f"{kernel}.{kind}.{architecture}.{width}"
        if kernel not in search:
            _bad(name, f"kernels among {', '.join(search)}", where)
        if kind not in CLASSES:
            _bad(name, f"classes among {', '.join(CLASSES)}", where)
        if not re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", architecture):
            _bad(name, "architectures such as sm_90 or gfx942", where)
        if width not in map(str, WIDTHS):
            _bad(name, f"widths among {', '.join(map(str, WIDTHS))}", where)
        yield Key(kernel, kind, architecture, int(width)), _config(name, where, row, search[kernel])


def _leaves(name: str, value: Any, levels: Sequence[str], path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Path and value of whatever is nested as deep as there are levels."""
    if not isinstance(value, dict):
        _bad(name, f"a table per {levels[0] if levels else 'row'}", f"{'.'.join(path)} = {value!r}")
    if not levels:
        yield path, value
    for part, inner in value.items() if levels else ():
        yield from _leaves(name, inner, levels[1:], (*path, part))


def _config(name: str, where: str, row: dict, allowed: Mapping[str, list[int]]) -> Config:
    shared = row.get("shared", 0)
    if type(shared) is not int or shared < 0:
        _bad(name, f"KiB as `shared` of {where}", repr(shared))
    numbers = {part: value for part, value in row.items() if part != "shared"}
    if numbers.keys() != allowed.keys():
        _bad(name, f"{', '.join(allowed)} at {where}", ", ".join(numbers) or "nothing")
    for part, value in numbers.items():
        if type(value) is not int or value not in allowed[part]:
            _bad(name, f"`{part}` of {where} to be one of {', '.join(map(str, allowed[part]))}", repr(value))
    return _row(row)


def _bad(name: str, expected: str, got: str) -> NoReturn:
    fail(name, expected, got, "Take a file that `python -m prism_kernels.tune` wrote with this version.")


def dump(op: str, rows: Rows, about: str) -> str:
    """The text of a file with these rows; `about` is its first line."""
    text, section = [f"# {about}", f"format = {FORMAT}", f'op = "{op}"'], ""
    for key in sorted(rows):
        if section != (section := f"[{key.kernel}.{key.kind}.{key.architecture}]"):
            text += ["", section]
        text.append(f"{key.width} = {rows[key]}")
    return "\n".join(text) + "\n"
