"""Cases of the RMS normalisation."""

import math

import torch

from ... import rms_norm
from ...rms_norm.op import rms_norm_bwd, rms_norm_fwd
from ...rms_norm.reference import rms_norm_reference
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs


def run(case: Case, impl: str | None) -> Outputs:
    y, residual = rms_norm(**case.tensors, **case.options, impl=impl)
    return {"y": y} if residual is None else {"y": y, "residual": residual}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    y, residual = rms_norm_reference(**case.tensors, **case.options)
    return {"y": y} if residual is None else {"y": y, "residual": residual}


def cases(dtype: torch.dtype) -> list[Case]:
    draw = Draw(0, dtype)
    x, weight = draw.normal(2, 5, 12), 1 + draw.wide_normal(12, scale=0.1)
    residual, gate = draw.wide_normal(2, 5, 12), draw.normal(2, 5, 12)
    more = Draw(1, dtype)
    return [
        Case("weight", {"x": x, "weight": weight}),
        Case("no weight", {"x": x}),
        Case("residual and gate", {"x": x, "weight": weight, "residual": residual, "gate": gate}),
        Case("residual of the same dtype", {"x": x, "weight": weight, "residual": residual.to(dtype)}),
        Case("gate without weight", {"x": x, "gate": gate}),
        Case("heads cut from one projection", {"x": x, "weight": weight, "gate": _heads(more)}),
        Case("one channel", {"x": draw.normal(3, 1), "weight": weight[:1]}),
        Case("one row", {"x": more.normal(40), "weight": more.wide_normal(40)}),
        Case("many rows", {"x": more.normal(301, 24), "weight": more.wide_normal(24)}),
        Case("a wide row", {"x": more.normal(2, 1025), "weight": more.wide_normal(1025)}),
        Case("rows of zero", {"x": 0 * x, "weight": weight}, hostile=True),
        Case("large rows", {"x": draw.normal(2, 12, scale=1e3), "weight": weight}, hostile=True),
        Case("largest rows", {"x": more.normal(2, 12).sign() * 6e4, "weight": weight}, hostile=True),
        Case("gates at both ends", {"x": x, "gate": more.normal(2, 5, 12, scale=40)}, hostile=True),
        Case(
            "tiny rows", {"x": draw.normal(2, 12, scale=1e-4), "weight": weight}, {"eps": 1e-6}, hostile=True
        ),
        Case("rows far below eps", {"x": more.normal(2, 12, scale=1e-7), "weight": weight}, hostile=True),
    ]


def _heads(draw: Draw) -> torch.Tensor:
    """r[2,5,12]: five heads of a projection 70 wide, at the front of each token."""
    return draw.normal(2, 70)[:, :60].unflatten(-1, (5, 12))


def random_case(draw: Draw) -> Case:
    shape = (draw.size("rows", 1, 5), draw.size("D", 1, 40))
    tensors = {"x": draw.normal(*shape, scale=draw.pick("scale", (1.0, 1e-3, 1e3)))}
    if draw.flag("weight"):
        tensors["weight"] = 1 + draw.wide_normal(shape[1], scale=0.1)
    if draw.flag("residual"):
        tensors["residual"] = draw.wide_normal(*shape)
    if draw.flag("gate"):
        tensors["gate"] = draw.normal(*shape)
    return Case("drawn", tensors)


def hand() -> tuple[Case, Outputs]:
    x, eps = [3.0, 4.0], 0.5
    root = math.sqrt((9 + 16) / 2 + eps)
    y = [3 / root * 2, 4 / root * 3]
    tensors = {"x": torch.tensor([x], dtype=torch.float64), "weight": torch.tensor([2.0, 3.0]).double()}
    return Case("two channels", tensors, {"eps": eps}), {"y": torch.tensor([y], dtype=torch.float64)}


def errors() -> list[ErrorCase]:
    x, w = torch.randn(2, 3), torch.ones(3)
    return [
        ErrorCase(
            "weight of other width", lambda: rms_norm(x, w[:2]), ValueError, r"`weight` \[D\].*got \(2,\)"
        ),
        ErrorCase(
            "residual of other shape", lambda: rms_norm(x, w, residual=x[:1]), ValueError, "`residual`"
        ),
        ErrorCase("gate of other shape", lambda: rms_norm(x, w, gate=x[:1]), ValueError, "`gate`"),
        ErrorCase("integers", lambda: rms_norm(x.int(), w), TypeError, "`x` of dtype float16"),
        ErrorCase(
            "devices differ", lambda: rms_norm(x, w.to("meta")), ValueError, "`weight` on cpu.*got meta"
        ),
        ErrorCase("no channels", lambda: rms_norm(x[:, :0]), ValueError, "D >= 1"),
        ErrorCase("negative eps", lambda: rms_norm(x, w, eps=-1.0), ValueError, "`eps` >= 0, got -1.0"),
        ErrorCase("no such path", lambda: rms_norm(x, w, impl="cuda"), ValueError, "`impl` to be one of"),
    ]


def opcheck(case: Case, impl: str) -> list[tuple]:
    names = ("x", "weight", "residual", "gate")
    args = [case.tensors.get(n) for n in names]
    detached = [None if t is None else t.detach() for t in args]
    y, total, rstd = rms_norm_fwd(*detached, 1e-6, impl)
    backward = (torch.ones_like(y), torch.ones_like(total), *detached, rstd, impl)
    return [(rms_norm_fwd, (*args, 1e-6, impl)), (rms_norm_bwd, backward)]


SPECS = [
    OpSpec(
        name="rms_norm",
        run=run,
        reference=reference,
        cases=cases,
        hand=hand,
        errors=errors,
        opcheck=opcheck,
        random_case=random_case,
    )
]
