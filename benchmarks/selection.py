"""What `python -m benchmarks run` measures: names and globs to groups of rows, or a refusal that says why."""

import argparse
import difflib
import fnmatch
import importlib.util
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .registry import Bench, Provider, Setting, benches
from .results import Key


class Refusal(Exception):
    """Why a run does not start."""


@dataclass
class Group:
    """One op, shape, dtype and direction: what is timed together."""

    bench: Bench
    setting: Setting
    direction: str
    providers: list[Provider] = field(default_factory=list)

    def key(self, provider: str) -> Key:
        dtype = str(self.setting.dtype).removeprefix("torch.")
        return self.bench.name, self.setting.shape, dtype, self.direction, provider

    def keys(self, providers: Iterable[Provider]) -> list[Key]:
        return [self.key(p.name) for p in providers]


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse counts and times that nothing can be measured with."""
    for name, least in (("threads", 1), ("repeats", 1), ("seconds", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise Refusal(f"run: expected --{name} of {least} or more, got {value}.")


def load_plugin(path: Path) -> None:
    """Run a file that registers providers."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_plugin_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Refusal(f"run: --plugin {path} is not a Python file.")
    benches()
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is the user's code: say what it said
        raise Refusal(f"run: --plugin {path}: {type(error).__name__}: {error}") from error


def chosen(what: str, patterns: Iterable[str], names: list[str]) -> list[str]:
    """Names that match, in their order; a pattern without a match is refused with the nearest names."""
    taken = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not matches:
            raise Refusal(unknown(what, pattern, names))
        taken |= matches
    return [name for name in names if name in taken]


def unknown(what: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.4)
    advice = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
    return f"run: no {what} {name!r}. {advice} `python -m benchmarks list` prints all."


def select(args: argparse.Namespace) -> list[Group]:
    """Groups of a selection, in order.

    Raises:
        Refusal: A name is unknown, or nothing is left.
    """
    everything = benches()
    picked = [everything[name] for name in chosen("op", args.op, list(everything))]
    if args.provider:
        known = list(dict.fromkeys(name for bench in picked for name in bench.providers))
        chosen("provider", args.provider, known)
    shapes = {bench.name: shapes_of(bench, args) for bench in picked}
    if args.shape:
        names = [name for bench in picked for name in (*bench.cpu, *bench.shapes)]
        chosen("shape", args.shape, list(dict.fromkeys(names)))
    for sizes in args.sizes or ():
        if not any(bench.sizes(sizes) for bench in picked):
            examples = ", ".join(dict.fromkeys(bench.cpu[0] for bench in picked))
            raise Refusal(f"run: --sizes {sizes!r} is spelt like no shape of these ops: {examples}.")
    dtypes = dict.fromkeys(args.dtype or (["float32"] if args.device == "cpu" else ["bfloat16"]))
    groups = [
        Group(
            bench,
            bench.setting(shape, getattr(torch, dtype), args.device),
            direction,
            providers_of(bench, args),
        )
        for bench in picked
        for shape in shapes[bench.name]
        for dtype in dtypes
        for direction in bench.directions
        if direction in args.direction
    ]
    groups = [group for group in groups if group.providers]
    if not groups:
        raise Refusal("run: the selection is empty: no provider, shape and direction fit together.")
    return groups


def shapes_of(bench: Bench, args: argparse.Namespace) -> list[str]:
    if not args.shape and not args.sizes:
        return list(bench.cpu if args.device == "cpu" else bench.shapes)
    patterns, known = args.shape or (), dict.fromkeys((*bench.cpu, *bench.shapes))
    named = [name for name in known if any(fnmatch.fnmatchcase(name, x) for x in patterns)]
    return list(dict.fromkeys(named + [sizes for sizes in args.sizes or () if bench.sizes(sizes)]))


def providers_of(bench: Bench, args: argparse.Namespace) -> list[Provider]:
    if not args.provider:
        return [p for p in bench.providers.values() if p.default]
    patterns = args.provider
    return [p for p in bench.providers.values() if any(fnmatch.fnmatchcase(p.name, x) for x in patterns)]
