"""Cases of the SwiGLU activation."""

import math

import torch
from torch import Tensor

from ... import swiglu
from ...swiglu.op import swiglu_bwd, swiglu_fwd
from ...swiglu.reference import swiglu_reference
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs


def run(case: Case, impl: str | None) -> Outputs:
    return {"y": swiglu(**case.tensors, impl=impl)}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    return {"y": swiglu_reference(**case.tensors)}


def cases(dtype: torch.dtype) -> list[Case]:
    draw = Draw(0, dtype)
    wide = Draw(1, dtype)
    both, huge = wide.normal(2, 5, 16), wide.normal(2, 9).sign() * 1e4
    return [
        Case("rows", {"gate": draw.normal(2, 7, 12), "up": draw.normal(2, 7, 12)}),
        Case("one element", {"gate": draw.normal(1), "up": draw.normal(1)}),
        Case(
            "gates at both ends", {"gate": wide.normal(2, 9, scale=40), "up": wide.normal(2, 9)}, hostile=True
        ),
        Case("both in one", {"gate": Draw(2, dtype).normal(3, 5, 14)}),
        Case("both in one, axes apart", {"gate": wide.normal(2, 6, 3, 4).transpose(0, 1)[::2]}),
        Case("both in one row", {"gate": wide.normal(10)}),
        Case("both in one, of one channel", {"gate": wide.normal(4, 2)}),
        Case("a prime width beyond a block", {"gate": wide.normal(3, 2 * 263)}),
        Case("strided halves", {"gate": both[..., :7], "up": both[..., 8:15]}),
        Case("many rows", {"gate": wide.normal(2, 331, 3), "up": wide.normal(2, 331, 3)}),
        Case("huge and tiny", {"gate": wide.normal(2, 9, scale=1e-7), "up": huge}, hostile=True),
        Case("gates of zero", {"gate": 0 * draw.normal(3, 4), "up": draw.normal(3, 4)}, hostile=True),
    ]


def random_case(draw: Draw) -> Case:
    rows, F = draw.size("rows", 1, 5), draw.size("F", 1, 40)
    scale = draw.pick("scale", (1.0, 30.0))
    if draw.flag("both in one"):
        return Case("drawn", {"gate": draw.normal(rows, 2 * F, scale=scale)})
    return Case("drawn", {"gate": draw.normal(rows, F, scale=scale), "up": draw.normal(rows, F)})


def hand() -> tuple[Case, Outputs]:
    gate, up = [1.0, -2.0], [3.0, 0.5]
    y = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    tensors = {"gate": _row(gate), "up": _row(up)}
    return Case("two elements", tensors), {"y": _row(y)}


def errors() -> list[ErrorCase]:
    x = torch.randn(2, 3)
    return [
        ErrorCase("shapes differ", lambda: swiglu(x, x[:1]), ValueError, r"`up`.*\(2, 3\), got \(1, 3\)"),
        ErrorCase(
            "dtypes differ", lambda: swiglu(x, x.double()), TypeError, "`up` of dtype float32, got float64"
        ),
        ErrorCase("integers", lambda: swiglu(x.int(), x.int()), TypeError, "`gate` of dtype float16"),
        ErrorCase("devices differ", lambda: swiglu(x, x.to("meta")), ValueError, "`up` on cpu.*got meta"),
        ErrorCase("an odd axis", lambda: swiglu(x), ValueError, r"`gate` \[..., 2F\].*\(2, 3\)"),
        ErrorCase("no such path", lambda: swiglu(x, x, impl="cuda"), ValueError, "`impl` to be one of"),
    ]


def opcheck(case: Case, impl: str) -> list[tuple]:
    gate, up = case.tensors["gate"], case.tensors.get("up")
    detached = (gate.detach(), None if up is None else up.detach(), impl)
    return [(swiglu_fwd, (gate, up, impl)), (swiglu_bwd, (torch.ones_like(swiglu(gate, up)), *detached))]


def _row(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SPECS = [
    OpSpec(
        name="swiglu",
        run=run,
        reference=reference,
        cases=cases,
        hand=hand,
        errors=errors,
        opcheck=opcheck,
        random_case=random_case,
    )
]
