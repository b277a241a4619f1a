"""The rows of `python -m prism_kernels.verify`: for every op and path, the worst case of each tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._core.runtime import interpreting
from . import peers
from .budgets import LIMIT, differentiable
from .recipes import CALL, Recipe, Target, drawn, fixed, path_target, ratio, rows, shrink, snippet
from .spec import OpSpec

PATHS = ("torch", "triton")
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        specs: The ops.
        paths: The paths, unless a peer is named.
        dtypes: The dtypes, of those that an op takes.
        device: Where; None for a GPU for kernels and peers if there is one, and the CPU for the rest.
        cases: How many random cases instead of the catalogue's; None for the catalogue.
        seed: Seed of the first random case.
        against: The peer, or None.
    """

    specs: tuple[OpSpec, ...]
    paths: tuple[str, ...] = PATHS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    device: str | None = None
    cases: int | None = None
    seed: int = 0
    against: str | None = None

    def device_of(self, path: str) -> str:
        kernels = path == "triton" and not interpreting()
        gpu = kernels or (self.against is not None and torch.cuda.is_available())
        return self.device or ("cuda" if gpu else "cpu")

    def targets(self) -> Iterator[tuple[OpSpec, Target | None]]:
        """Every op with what computes it; None where the peer has nothing."""
        for spec in self.specs:
            if self.against is not None:
                yield spec, peers.target(self.against, spec.name)
            else:
                yield from ((spec, path_target(spec, path)) for path in spec.paths if path in self.paths)

    def recipes(self, spec: OpSpec, dtype: torch.dtype, target: Target) -> list[Recipe]:
        """Cases of the catalogue or random ones; random ones too where a peer covers none of the former."""
        if self.cases is not None:
            return drawn(spec, dtype, target, self.cases, self.seed)
        covered = fixed(spec, dtype, target)
        return covered or (drawn(spec, dtype, target, 8, self.seed) if self.against else [])


def expected_rows(job: Job) -> set[Key]:
    """The rows that must be there: every output and gradient of every op on every path and dtype."""
    keys = set()
    for spec, target in job.targets() if job.against is None else ():
        for dtype in (d for d in spec.dtypes if d in job.dtypes) if target else ():
            cases = [recipe.case() for recipe in job.recipes(spec, dtype, target)]
            names = {f"d{n}" for c in cases for n, t in c.tensors.items() if differentiable(t)}
            names |= set(spec.hand()[1]) if cases else set()
            keys |= {(spec.name, target.name, _short(dtype), n) for n in names}
    return keys


def measure(job: Job) -> Iterator[dict]:
    """Yield a dictionary a row; one with "skipped", a reason, for what nothing covers."""
    for spec, target in job.targets():
        if target is None:
            yield _skipped(spec, job.against or "", "", f"{job.against} has no such op")
            continue
        for dtype in (d for d in spec.dtypes if d in job.dtypes):
            recipes = job.recipes(spec, dtype, target)
            if not recipes:
                yield _skipped(spec, target.name, _short(dtype), _why_none(spec, dtype, target))
            yield from _worst(recipes, target, job.device_of(target.name))


def _worst(recipes: list[Recipe], target: Target, device: str) -> Iterator[dict]:
    """The worst row of each tensor; the worst of all, if above the limit, with a program that shows it."""
    worst: dict[str, tuple[dict, Recipe]] = {}
    failing: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        for row in _rows(recipe, target, device):
            best = worst.get(row["tensor"])
            if best is None or not row["ratio"] <= best[0]["ratio"]:
                worst[row["tensor"]] = (row, recipe)
            if not row["ok"]:
                failing.setdefault(row["tensor"], []).append(recipe)
    if failing:
        tensor = max(failing, key=lambda name: _rank(worst[name][0]["ratio"]))
        recipe = worst[tensor][1]
        if recipe.random:
            recipe = shrink(recipe, target, device, tensor)
        else:
            recipe = min(failing[tensor], key=_elements)
        interpreted = target.name == "triton" and interpreting()
        worst[tensor][0]["snippet"] = snippet(recipe, target, device, tensor, interpreted)
    yield from (row for row, _ in worst.values())


def _rows(recipe: Recipe, target: Target, device: str) -> Iterator[dict]:
    case = recipe.case().name
    base = {"op": recipe.spec.name, "path": target.name, "dtype": _short(recipe.dtype), "case": case}
    try:
        found = rows(recipe, target, device)
    except Exception as error:  # a call that raises is a finding; the other cases go on
        message = f"{type(error).__name__}: {error}"
        nan = float("nan")
        yield {**base, "tensor": CALL, "ratio": nan, "max_error": nan, "ok": False, "error": message}
        return
    for row in found:
        number = ratio(recipe, row)
        rest = {"ratio": number, "max_error": row.max_error, "ok": number <= LIMIT}
        yield {**base, "tensor": row.tensor, **rest}


def _skipped(spec: OpSpec, path: str, dtype: str, reason: str) -> dict:
    return {"op": spec.name, "path": path, "dtype": dtype, "skipped": reason}


def _why_none(spec: OpSpec, dtype: torch.dtype, target: Target) -> str:
    reasons = dict.fromkeys(r for c in spec.cases(dtype) if (r := target.lacks(c)))
    return "; ".join(reasons) if spec.random_case or reasons else "the op draws no random cases"


def _elements(recipe: Recipe) -> int:
    return sum(t.numel() for t in recipe.case().tensors.values())


def _rank(number: float) -> float:
    return float("inf") if number != number else number


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
