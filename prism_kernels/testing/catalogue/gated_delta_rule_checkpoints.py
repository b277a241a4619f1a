"""Cases of the gated delta rule with checkpoints.

No state is named: contracts that cut time would cut intervals too, which start anew with each piece.
tests/kernels/test_gated_delta_rule_checkpoints.py has what holds instead.
"""

from functools import partial
from typing import Any

import torch

from ... import chunk_gated_delta_rule_with_checkpoints
from ...gated_delta_rule import checkpoints_op
from ...gated_delta_rule.reference import placed
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs
from . import gated_delta_rule as whole

NAME = checkpoints_op.NAME
ALL = whole.GATE | whole.REFLECTING | whole.V_FIRST | whole.UNIT


def run(case: Case, impl: str | None) -> Outputs:
    o, state, checkpoints, _ = chunk_gated_delta_rule_with_checkpoints(
        **case.tensors, **case.options, impl=impl
    )
    return {"o": o, "final_state": state, "checkpoints": checkpoints}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    options: dict[str, Any] = {"kept": {}} | case.options
    dtype = options.pop("checkpoint_dtype", None)
    outputs = whole.reference(Case(case.name, case.tensors, options), product_dtype)
    (B, T), final = outputs["o"].shape[:2], outputs["final_state"]
    states = placed(options["kept"], B, T, final, options["every"], options.get("state_v_first", False))
    return outputs | {"checkpoints": states.to(dtype or final.dtype)}


def draw_case(draw: Draw, *args: Any, every: int = 16, **options: Any) -> Case:
    """A case of the whole with states kept."""
    case = whole.draw_case(draw, *args, **options)
    kept = {n: x for n, x in case.options.items() if n != "chunk_size"} | {"every": every}
    return Case(case.name, case.tensors, kept, case.hostile)


def cases(dtype: torch.dtype) -> list[Case]:
    """Each case has a stream of its own, so that one may change and the others stay."""

    def make(seed: int, *args: Any, **options: Any) -> Case:
        return draw_case(Draw(seed, dtype), *args, **options)

    packed = make(1, "packed, empty sequences among them, all options", (1, 56, 1, 8, 4),
                  groups=2, sequences=5, **ALL)  # fmt: skip
    strong = make(2, "a decay of -30 in a step, and none", (1, 34, 2, 8, 8), hostile=True)
    g = strong.tensors["g"]
    some = (torch.arange(34) % 3 == 1).view(1, -1, 1)
    return [
        make(0, "two intervals and a part of one", (2, 37, 2, 8, 4), scale=0.5, **whole.UNIT),
        make(0, "less than an interval", (2, 9, 2, 8, 8), every=64),
        make(1, "intervals of two chunks, to the last token", (1, 64, 2, 8, 8), every=32,
             leave_out=("g", "initial_state")),
        make(1, "intervals of three chunks, value heads in groups", (1, 50, 1, 16, 8), every=48, groups=2,
             **whole.V_FIRST),
        packed.with_tensors(cu_seqlens=torch.tensor([0, 0, 18, 18, 50, 53])),
        strong.with_tensors(g=torch.where(some, -30.0, torch.zeros_like(g))),
    ]  # fmt: skip


def random_case(draw: Draw) -> Case:
    case = whole.random_case(draw, raw=draw.flag("raw"))
    every = 16 * draw.size("every", 1, 3)
    return Case(case.name, case.tensors, {n: x for n, x in case.options.items() if n != "chunk_size"}
                | {"every": every})  # fmt: skip


def hand() -> tuple[Case, Outputs]:
    """The two tokens of the whole, 14 that leave the state as it is, and one that halves it."""
    case, expected = whole.hand()
    given = {n: case.tensors[n] for n in whole.TIME_INPUTS}
    idle = {n: x[:, 1:].repeat_interleave(15, 1) for n, x in given.items()}
    idle["beta"], idle["g"] = torch.zeros_like(idle["beta"]), torch.zeros_like(idle["g"])
    idle["g"][:, -1] = given["g"][:, 1]  # log of a half
    tokens = {n: torch.cat([given[n], idle[n]], 1) for n in given}
    state, o = expected["final_state"], expected["o"]
    return Case("17 tokens", case.tensors | tokens, case.options | {"every": 16}), {
        "o": torch.cat([o, o[:, 1:].repeat_interleave(14, 1), o[:, 1:] / 2], 1),
        "final_state": state / 2,
        "checkpoints": state[:, None],
    }


def errors() -> list[ErrorCase]:
    q, g = torch.randn(2, 20, 4, 8), -torch.rand(2, 20, 4)
    given = {"q": q, "k": q, "v": q, "g": g, "beta": -g, "every": 16}

    def case(what: str, error: type[Exception], pattern: str, **changes: Any) -> ErrorCase:
        call = partial(chunk_gated_delta_rule_with_checkpoints, **(given | changes))
        return ErrorCase(what, call, error, f"^{NAME}: expected {pattern}")

    multiple = "`every` a positive multiple of 16, got"
    return [
        case("no interval", ValueError, f"{multiple} 0", every=0),
        case("a negative interval", ValueError, f"{multiple} -16", every=-16),
        case("every token", ValueError, f"{multiple} 1. .*output_snapshots=True", every=1),
        case("a chunk and a half", ValueError, f"{multiple} 24", every=24),
        case("an interval that is no whole number", TypeError, f"{multiple} 16.0", every=16.0),
        case("a flag for an interval", TypeError, f"{multiple} True", every=True),
        case("a tensor for an interval", TypeError, r"`every`.* got one of shape", every=torch.tensor(16)),
        case("integer checkpoints", TypeError, "`checkpoint_dtype` float16, .* or None, got torch.int8",
             checkpoint_dtype=torch.int8),
        case("rank of q", ValueError, r"`q` of rank 4, \[B, T, H, K\]", q=q[..., 0]),
        case("growing state", ValueError, "`g` <= 0 everywhere, got a largest value of 0.5", g=g * 0 + 0.5),
        case("gate without its rate", ValueError, "`A_log` with use_gate_in_kernel=True", **whole.GATE),
        case("bounds that fall", ValueError, "`cu_seqlens` that never decreases",
             **{n: x[:1] for n, x in given.items() if n != "every"}, cu_seqlens=torch.tensor([0, 9, 5])),
        case("scale out of place", TypeError, "no tensor for `scale`", scale=g),
        case("path", ValueError, "`impl` to be one of", impl="cuda"),
    ]  # fmt: skip


def opcheck(case: Case, impl: str) -> list[tuple]:
    (_, (*inputs, save, _)), _ = whole.opcheck(whole.CHUNK, case_of_chunks(case), impl)
    inputs[-1] = case.options["every"]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    o, final, checkpoints, *residuals = checkpoints_op.forward(*detached, save, torch.bfloat16, impl)
    ones = [torch.ones_like(x) for x in (o, final, checkpoints)]
    given = (*ones, *detached[:9], residuals, *detached[9:], impl)
    forwards = [(*inputs, save, dtype, impl) for dtype in (torch.float32, torch.bfloat16)]
    return [*((checkpoints_op.forward, args) for args in forwards), (checkpoints_op.backward, given)]


def case_of_chunks(case: Case) -> Case:
    """The same call without checkpoints."""
    options = {n: x for n, x in case.options.items() if n not in ("every", "checkpoint_dtype")}
    return Case(case.name, case.tensors, options | {"chunk_size": 16})


SPECS = [
    OpSpec(
        name=NAME,
        run=run,
        reference=reference,
        cases=cases,
        hand=hand,
        errors=errors,
        opcheck=opcheck,
        time_inputs=whole.TIME_INPUTS,
        bounded=("g", "beta"),
        random_case=random_case,
    )
]
