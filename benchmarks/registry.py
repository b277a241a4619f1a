"""Every op, layer and model once: inputs, shapes, the least it must move and compute, and who computes it.

A `Bench` describes one of them; `benches()` has them all. Tensors are declared by their axes, one letter
each ("BTHK"), and a shape by its sizes ("B8_T4096_H16_D128"), so that inputs can be cut into heads and
checked without a word more from the op. Providers register themselves by name:

    register("rms_norm", "mine", factory)        # factory(setting) -> Adapter, or a plain callable

A factory runs once per shape and dtype, before anything is timed, and raises `Skip` where its provider
cannot run.
"""

import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .results import DIRECTIONS

Tensors = dict[str, Tensor]
Sizes = dict[str, int]

CATALOGUES = ("ops", "scans", "modules", "peers")  # modules of this package that add benches and providers


class Skip(Exception):
    """A provider cannot run here, and why. It becomes a row that says so."""


@dataclass(frozen=True)
class Floor:
    """The least that any implementation must move and compute."""

    bytes: int
    flops: int
    special: int = 0  # exponentials, sines, cosines, square roots

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.flops + other.flops, self.special + other.special)


def same(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Adapter:
    """How to call a provider. Only `call` is timed; all three must be differentiable.

    Args:
        call: Inputs to outputs, both in the provider's own layout.
        prepare: From our layout to its own.
        restore: Its outputs in our layout, under our names.
        note: What a reader of its row must know.
    """

    call: Callable[[Tensors], Tensors]
    prepare: Callable[[Tensors], Tensors] = same
    restore: Callable[[Tensors], Tensors] = same
    note: str = ""

    def __call__(self, tensors: Tensors) -> Tensors:
        return self.restore(self.call(self.prepare(tensors)))


@dataclass(frozen=True)
class Setting:
    """What one group of rows is measured on."""

    shape: str
    sizes: Sizes
    dtype: torch.dtype
    device: str


Factory = Callable[[Setting], Adapter | Callable[[Tensors], Tensors]]


@dataclass(frozen=True)
class Provider:
    """Somebody who computes a bench.

    Args:
        ours: Held to the error budget of our own paths; others have a looser one.
        default: Whether `run` takes it without being asked by name.
    """

    name: str
    factory: Factory
    ours: bool = False
    default: bool = True


@dataclass
class Bench:
    """One op, layer or model.

    Args:
        kind: "op", "layer" or "model".
        axes: Axes of each input, one letter each. Parameters of modules are left out.
        outputs: Axes of each output.
        shapes: Names of shapes for a GPU; `cpu` those for a CPU. Letters as in `axes`, or aliases.
        draw: `(setting) -> tensors`, seeded, on the CPU.
        floor: `(sizes, bytes of an element, backward) -> Floor` of the forward or of the backward pass.
        oracle: `(setting) -> run` that is fast enough in float64 for every shape.
        definition: `(setting, product_dtype)`: the definition itself; with a `product_dtype`, plain PyTorch
            in that precision.
        aliases: Sizes that follow from those in the name, for example K and V from D.
        split: Axis along which the work is independent (heads, channels); "" where there is none.
        looped: Whether the definition is a loop over time that keeps every state, and so runs on a cut.
        directions: What makes sense to time.
    """

    name: str
    kind: str
    axes: dict[str, str]
    outputs: dict[str, str]
    shapes: tuple[str, ...]
    cpu: tuple[str, ...]
    draw: Callable[[Setting], Tensors]
    floor: Callable[[Sizes, int, bool], Floor]
    oracle: Callable[[Setting], Callable[[Tensors], Tensors]]
    definition: Callable[[Setting, torch.dtype | None], Callable[[Tensors], Tensors]]
    aliases: Callable[[Sizes], Sizes] = lambda sizes: {}
    split: str = ""
    looped: bool = False
    directions: tuple[str, ...] = DIRECTIONS
    providers: dict[str, Provider] = field(default_factory=dict)

    def sizes(self, shape: str) -> Sizes | None:
        """Sizes of a named shape, or of any other spelt with the same letters; None if it is neither."""
        sizes = parse(shape)
        if any(list(parse(known)) == list(sizes) for known in (*self.shapes, *self.cpu)) and sizes:
            return sizes | self.aliases(sizes)
        return None

    def setting(self, shape: str, dtype: torch.dtype, device: str) -> Setting:
        """One shape of this bench, by a name that `sizes` knows."""
        sizes = self.sizes(shape)
        if sizes is None:
            known = ", ".join((*self.cpu, *self.shapes))
            raise ValueError(f"{self.name}: expected a shape spelt like {known}, got {shape!r}.")
        return Setting(shape, sizes, dtype, device)

    def floor_of(self, setting: Setting, direction: str) -> Floor:
        """The floor of a direction: the backward pass comes on top of the forward one."""
        itemsize = setting.dtype.itemsize
        forward = self.floor(setting.sizes, itemsize, False)
        return forward if direction == "forward" else forward + self.floor(setting.sizes, itemsize, True)


def parse(shape: str) -> Sizes:
    """{"B": 8, "T": 4096} of "B8_T4096"; of "ecg_4x1000x12", {"ecg": 1, "x0": 4, "x1": 1000, "x2": 12}."""
    if re.fullmatch(r"[A-Z]\d+(_[A-Z]\d+)*", shape):
        sizes = {part[0]: int(part[1:]) for part in shape.split("_")}
        return sizes if all(sizes.values()) else {}
    if match := re.fullmatch(r"([a-z]+)_(\d+(?:x\d+)*)", shape):
        return {match[1]: 1} | {f"x{i}": int(n) for i, n in enumerate(match[2].split("x"))}
    return {}


_benches: dict[str, Bench] = {}


def add(bench: Bench) -> Bench:
    """Enter a bench. Its providers follow by `register`."""
    _benches[bench.name] = bench
    return bench


def register(
    bench: str, provider: str, factory: Factory, *, ours: bool = False, default: bool = True
) -> None:
    """Enter a provider of a bench. A later one of the same name takes its place.

    Raises:
        ValueError: There is no such bench; the message has the nearest names.
    """
    if bench not in _benches:
        near = difflib.get_close_matches(bench, list(_benches), 3, 0.4) or list(_benches)
        raise ValueError(f"register: no op {bench!r}. Did you mean {' or '.join(near)}?")
    _benches[bench].providers[provider] = Provider(provider, factory, ours, default)


def benches() -> dict[str, Bench]:
    """All benches by name, their providers with them."""
    for name in CATALOGUES:
        importlib.import_module(f".{name}", __package__)
    return _benches
