"""Cases of decoding: a few tokens of each row against the state that it names."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import gated_delta_rule_step
from ...gated_delta_rule.decode_op import step, step_inplace
from ...gated_delta_rule.reference import gated_delta_rule_step_reference
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs
from . import gated_delta_rule as whole

NAME = "gated_delta_rule_step"
ALL = whole.GATE | whole.REFLECTING | whole.V_FIRST | whole.UNIT


def run(case: Case, impl: str | None) -> Outputs:
    o, state, _ = gated_delta_rule_step(**case.tensors, **case.options, impl=impl)
    return {"o": o, "new_state": state}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    tensors, options = dict(case.tensors), dict(case.options)
    v, wide = tensors["v"], torch.float64 if tensors["v"].dtype == torch.float64 else torch.float32
    tensors.setdefault("g", v.new_zeros(v.shape[:3], dtype=wide))
    tensors.setdefault("beta", v.new_ones(v.shape[:3], dtype=wide))
    options = {"scale": tensors["q"].shape[-1] ** -0.5} | options
    options.pop("use_gate_in_kernel", None)
    o, state, _ = gated_delta_rule_step_reference(**tensors, **options, product_dtype=product_dtype)
    return {"o": o, "new_state": state}


def draw_case(
    draw: Draw,
    name: str,
    sizes: tuple[int, int, int, int, int],
    *,
    rows: list[int] | None = None,
    pool: int = 5,
    state: torch.dtype | None = None,
    **options: Any,
) -> Case:
    """One case of sizes B, T, H, K, V; `rows` are the states named, of `pool`, and `state` their dtype."""
    drawn = whole.draw_case(draw, name, sizes, sequences=None if rows is None else pool, **options)
    tensors = dict(drawn.tensors)
    states = tensors.pop("initial_state")
    wide = states.dtype == torch.float64
    tensors["state"] = states if state is None or wide else states.to(state)
    if rows is not None:
        tensors["state_indices"] = torch.tensor(rows)
    return Case(name, tensors, {n: x for n, x in drawn.options.items() if n != "chunk_size"}, drawn.hostile)


def cases(dtype: torch.dtype) -> list[Case]:
    """Each case has a stream of its own, so that one may change and the others stay."""

    def make(seed: int, *args: Any, **options: Any) -> Case:
        return draw_case(Draw(seed, dtype), *args, **options)

    bare = ("g", "beta")
    extremes = make(7, "a decay of -30, strengths 0, 1 and 2", (2, 6, 2, 8, 8), hostile=True)
    g, beta = extremes.tensors["g"].clone(), extremes.tensors["beta"].clone()
    g[:, 2] = -30.0
    beta[:] = (torch.arange(6) % 3).view(1, 6, 1)
    padded = make(3, "NaN in a row without a state", (3, 4, 2, 8, 4), rows=[3, -1, 0], hostile=True)
    nan = {n: padded.tensors[n].clone() for n in whole.TIME_INPUTS}
    for x in nan.values():
        x[1] = float("nan")
    return [
        make(0, "a few tokens", (2, 5, 2, 8, 4), scale=0.5, **whole.UNIT),
        make(1, "one token, no decay, strength 1", (2, 1, 2, 16, 16), leave_out=bare),
        make(1, "all options, value heads in groups", (2, 4, 2, 8, 4), groups=2, **ALL),
        make(4, "odd sizes, a gate without a bias", (1, 8, 1, 5, 19), leave_out=("dt_bias",), **whole.GATE),
        make(5, "a pool, value heads in groups", (3, 3, 1, 8, 8), groups=2, rows=[4, 0, 2]),
        make(6, "a pool of 16-bit states, padding among them", (3, 2, 2, 8, 8), rows=[1, -1, 3],
             state=torch.bfloat16, **ALL),
        make(1, "16-bit states", (2, 4, 2, 16, 8), state=torch.float16),
        make(9, "raw inputs up to a hundred", (1, 6, 2, 8, 8), raw=40.0, hostile=True,
             **whole.GATE, **whole.REFLECTING),
        extremes.with_tensors(g=g, beta=beta),
        padded,
    ]  # fmt: skip


def random_case(draw: Draw) -> Case:
    B, T, H = draw.size("B", 1, 3), draw.size("T", 1, 8), draw.size("H", 1, 2)
    K, V, pool = draw.size("K", 4, 20), draw.size("V", 4, 20), draw.size("states", 3, 6)
    rows = None
    if draw.flag("state_indices"):
        rows = torch.randperm(pool, generator=draw.generator)[:B].tolist()
        # one is left to differentiate
        rows = [-1 if b and draw.flag(f"padding {b}") else s for b, s in enumerate(rows)]
    gate, reflecting = draw.flag("gate"), draw.flag("allow_neg_eigval")
    sigmoid = draw.flag("sigmoid") or reflecting
    needed = {"g": gate, "beta": sigmoid, "dt_bias": False}
    return draw_case(
        draw,
        "drawn",
        (B, T, H, K, V),
        rows=rows,
        pool=pool,
        state=draw.pick("state", (None, torch.bfloat16, torch.float16)),
        groups=draw.size("groups", 1, 2),
        leave_out=tuple(n for n in needed if not draw.flag(n) and not needed[n]),
        use_qk_l2norm_in_kernel=draw.flag("l2norm"),
        use_gate_in_kernel=gate,
        use_beta_sigmoid_in_kernel=sigmoid,
        allow_neg_eigval=reflecting,
        state_v_first=draw.flag("state_v_first"),
    )


def hand() -> tuple[Case, Outputs]:
    """The two tokens of the whole."""
    case, expected = whole.hand()
    tensors = {n: t for n, t in case.tensors.items() if n != "initial_state"}
    tensors["state"] = case.tensors["initial_state"]
    return Case(case.name, tensors, case.options), {"o": expected["o"], "new_state": expected["final_state"]}


def errors() -> list[ErrorCase]:
    q, v, g = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 5), -torch.rand(2, 3, 4)
    pool, row = torch.zeros(3, 4, 8, 5), torch.zeros(1, 4, 8, 5)
    given = {"state": pool[:2], "q": q, "k": q, "v": v, "g": g, "beta": -g}

    def case(what: str, error: type[Exception], pattern: str, **changes: Any) -> ErrorCase:
        call = partial(gated_delta_rule_step, **(given | changes))
        return ErrorCase(what, call, error, f"^{NAME}: expected {pattern}")

    def named(*rows: float) -> dict[str, Tensor]:
        return {"state": pool, "state_indices": torch.tensor(rows)}

    tall = torch.zeros(3, 1, 8, 5).expand(3, 4, 8, 5)
    return [
        case("rank of q", ValueError, r"`q` of rank 4, \[B, T, H, K\], got shape \(2, 3, 4\)", q=q[..., 0]),
        case("v with heads before time", ValueError, r"`v` .* heads before time\?", v=v.transpose(1, 2)),
        case("growing state", ValueError, "`g` <= 0 everywhere, got a largest value of 0.5", g=g * 0 + 0.5),
        case("gate without its rate", ValueError, "`A_log` with use_gate_in_kernel=True", **whole.GATE),
        case("scale out of place", TypeError, "no tensor for `scale`", scale=g),
        case("rank of the state", ValueError, r"`state` of rank 4, \[S, HV, K, V\]", state=pool[0]),
        case("more states than rows", ValueError, r"`state`.*\(2, 4, 8, 5\).*S = B unless", state=pool),
        case("state with values first", ValueError, "`state`.*keys before values", state=pool[:2].mT),
        case("state with keys first", ValueError, "`state`.*values before keys", **whole.V_FIRST),
        case("complex state", TypeError, "`state` of dtype", state=pool[:2].to(torch.complex64)),
        case("state elsewhere", ValueError, "`state` on cpu, where `q` is", state=pool[:2].to("meta")),
        case("index of floats", TypeError, "`state_indices` of dtype int32, int64", **named(0.0, 1.0)),
        case("index too short", ValueError, r"`state_indices` \[B\] of shape \(2,\)", **named(1)),
        case("index beyond the pool", ValueError, "`state_indices` below 3, .* got 3", **named(0, 3)),
        case("index given twice", ValueError, r"`state_indices` that differ, got \[1, 1\]", **named(1, 1)),
        case("no state at all", ValueError, "at least one state", **named(-1, -1) | {"state": pool[:0]}),
        case("gradient in place", ValueError, "no gradient for inplace=True, got `q`.*fused_recurrent_gated",
             q=q.clone().requires_grad_(), inplace=True),
        case("states that are one", ValueError, r"a `state` of separate entries, got strides \(0, 40, 5, 1\)",
             state=row.expand(2, 4, 8, 5), inplace=True),
        case("heads that are one", ValueError, "a `state` of separate entries",
             **named(0, 2) | {"state": tall}, inplace=True),
        case("states that overlap", ValueError, "a `state` of separate entries",
             state=torch.zeros(400).as_strided((2, 4, 8, 5), (40, 40, 5, 1)), inplace=True),
        case("path", ValueError, "`impl` to be one of", impl="cuda"),
    ]  # fmt: skip


def opcheck(case: Case, impl: str) -> list[tuple]:
    names = ("state", "q", "k", "v", "g", "beta", "A_log", "dt_bias", "state_indices")
    inputs, given = [case.tensors.get(n) for n in names], case.options
    beta_top = given.get("use_beta_sigmoid_in_kernel", 0) * (1 + given.get("allow_neg_eigval", 0))
    options = (0.5, given.get("use_qk_l2norm_in_kernel", False), int(beta_top))
    options += (given.get("state_v_first", False),)
    detached = [None if x is None else x.detach() for x in inputs]
    return [
        *((step, (*inputs, *options, snapshots, impl)) for snapshots in (True, False)),
        *((step_inplace, (*detached, *options, snapshots, impl)) for snapshots in (True, False)),
    ]


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
        state=("state", "new_state"),
        bounded=("g", "beta"),
        random_case=random_case,
    )
]
