"""How a case is made: from the catalogue or from a seed. So it can be made again, made smaller, and shown.

A `Target` is what computes an op, one of our paths or a peer. A `Recipe` makes one case of an op. `shrink`
looks for the smallest case that a target still gets wrong, `snippet` writes it down as a program.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from .budgets import LIMIT, Row, budget_rows, forward_backward, forward_only
from .inputs import Draw
from .spec import Case, OpSpec, Outputs

CALL = "call"  # the name of the row of a call that raises
ATTEMPTS = 60  # cases tried when shrinking one, seconds each at most under the interpreter
TRIES = 200  # seeds looked at for each case that a target covers


@dataclass(frozen=True)
class Target:
    """What computes an op.

    Args:
        name: Path or peer.
        run: From a case to its outputs.
        lacks: What a case asks for beyond it, in words; "" for nothing.
        code: How a program gets at `run`, with the spec as `op`.
        gradients: Whether it has a backward.
        imports: What `code` needs.
    """

    name: str
    run: Callable[[Case], Outputs]
    lacks: Callable[[Case], str]
    code: str
    gradients: bool = True
    imports: str = ""


def path_target(spec: OpSpec, path: str) -> Target:
    """One of the op's own paths."""

    def lacks(case: Case) -> str:
        covered = path != "triton" or spec.on_triton(case)
        return "" if covered else "the Triton path does not cover it"

    return Target(
        path, lambda c: spec.run(c, path), lacks, f'def run(case):\n    return op.run(case, "{path}")\n\n'
    )


@dataclass(frozen=True)
class Recipe:
    """A case of an op: the one of that name, or the one that `seed` gives (with some sizes overruled)."""

    spec: OpSpec
    dtype: torch.dtype
    name: str = ""
    seed: int | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    made: Case | None = field(default=None, compare=False, repr=False)

    @property
    def random(self) -> bool:
        return self.seed is not None

    def case(self) -> Case:
        return self._drawn()[0] if self.made is None else self.made

    def smaller(self) -> Iterator["Recipe"]:
        """Recipes with one size reduced: to its least, half-way there, by one."""
        drawn = self._drawn()[1]
        for name, (value, low) in drawn.items():
            for less in sorted({low, (low + value) // 2, value - 1}):
                if low <= less < value:
                    sizes = {n: v for n, (v, _) in drawn.items()} | {name: less}
                    yield replace(self, sizes=tuple(sizes.items()))

    def code(self) -> str:
        """An expression that makes the case, with the spec as `op`."""
        if not self.random:
            return f"next(c for c in op.cases({self.dtype}) if c.name == {self.name!r})"
        sizes = f", {dict(self.sizes)}" if self.sizes else ""
        return f"op.random_case(Draw({self.seed}, {self.dtype}{sizes}))"

    def _drawn(self) -> tuple[Case, dict[str, tuple[int, int]]]:
        if not self.random:
            return next(c for c in self.spec.cases(self.dtype) if c.name == self.name), {}
        if self.spec.random_case is None:
            raise ValueError(f"{self.spec.name} draws no random cases")
        draw = Draw(self.seed or 0, self.dtype, dict(self.sizes))
        case = self.spec.random_case(draw)
        sizes = ", ".join(f"{n} {v}" for n, (v, _) in draw.drawn.items())
        return replace(case, name=f"seed {self.seed}: {sizes}"), draw.drawn


def fixed(spec: OpSpec, dtype: torch.dtype, target: Target) -> list[Recipe]:
    """The cases of the catalogue that a target covers."""
    return [Recipe(spec, dtype, c.name, made=c) for c in spec.cases(dtype) if not target.lacks(c)]


def drawn(spec: OpSpec, dtype: torch.dtype, target: Target, count: int, seed: int) -> list[Recipe]:
    """The first `count` random cases from `seed` on that a target covers; fewer where it covers few."""
    if spec.random_case is None:
        return []
    recipes = (Recipe(spec, dtype, seed=s) for s in range(seed, seed + TRIES * count))
    return list(islice((r for r in recipes if not target.lacks(r.case())), count))


def rows(recipe: Recipe, target: Target, device: str) -> list[Row]:
    """Errors of a target on a case."""
    case = recipe.case().to(device)
    evaluate = forward_backward if target.gradients else forward_only
    return budget_rows(recipe.spec, case, target.name, target.run, evaluate)


def ratio(recipe: Recipe, row: Row) -> float:
    """The number that is held against the limit."""
    return row.ratio_if_random if recipe.random else row.ratio


def badness(recipe: Recipe, target: Target, device: str, tensor: str) -> float:
    """How far above the limit one output or gradient is; infinite where it is NaN, or the call fails."""
    try:
        found = [ratio(recipe, row) for row in rows(recipe, target, device) if row.tensor == tensor]
    except Exception:
        return float("inf") if tensor == CALL else 0.0
    return max((float("inf") if r != r else r for r in found), default=0.0)


def shrink(recipe: Recipe, target: Target, device: str, tensor: str) -> Recipe:
    """Reduce sizes as long as the same tensor stays wrong, about as wrong as it was."""
    threshold = max(LIMIT, badness(recipe, target, device, tensor) / 2)
    left, best, moved = ATTEMPTS, recipe, True
    while moved and left > 0:
        moved = False
        for less in best.smaller():
            left -= 1
            if left < 0:
                break
            if not target.lacks(less.case()) and badness(less, target, device, tensor) > threshold:
                best, moved = less, True
                break
    return best


PROGRAM = """{interpreter}import torch

from prism_kernels.testing import find
from prism_kernels.testing.budgets import budget_rows, definition, {evaluate}
from prism_kernels.testing.inputs import Draw
{imports}
op = find({op!r})
case = {case}
print({{**case.tensors, **case.options}})

{run}
outputs, gradients = {evaluate}(run, case)
exact, exact_gradients = definition(op, case.double(), outputs, evaluate={evaluate})  # in float64
{show}
for row in budget_rows(op, case, {name!r}, run, {evaluate}):
    print(f"{{row.tensor:<16}}{{row.{ratio}:8.3f}} times the error of plain PyTorch (limit {limit:g})")"""

SHOW = """print("{tensor}", (outputs | gradients)["{tensor}"])
print("in float64", (exact | exact_gradients)["{tensor}"])
"""


def snippet(recipe: Recipe, target: Target, device: str, tensor: str, interpreted: bool) -> str:
    """A program that makes the case, runs it on the target and in float64, and prints the ratios."""
    switch = 'import os\n\nos.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported\n'
    return PROGRAM.format(
        interpreter=switch if interpreted else "",
        evaluate="forward_backward" if target.gradients else "forward_only",
        imports=target.imports,
        op=recipe.spec.name,
        case=recipe.code() + ("" if device == "cpu" else f".to({device!r})"),
        run=target.code,
        show=SHOW.format(tensor=tensor) if tensor != CALL else "",
        name=target.name,
        ratio="ratio_if_random" if recipe.random else "ratio",
        limit=LIMIT,
    )
