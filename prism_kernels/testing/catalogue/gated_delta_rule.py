"""Cases of the gated delta rule; both forms, chunked and token by token, share them.

Each form has a second spec, "with raw gates": the options that make gates inside the op, and states that have
values before keys.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ... import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from ...gated_delta_rule import op
from ...gated_delta_rule.reference import gated_delta_rule_reference
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs

CHUNK, RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
FUNCTIONS: dict[str, Callable] = {
    CHUNK: chunk_gated_delta_rule,
    RECURRENT: fused_recurrent_gated_delta_rule,
}
TIME_INPUTS = ("q", "k", "v", "g", "beta")
UNIT = {"use_qk_l2norm_in_kernel": True}
GATE = {"use_gate_in_kernel": True}
SIGMOID = {"use_beta_sigmoid_in_kernel": True}
REFLECTING = SIGMOID | {"allow_neg_eigval": True}
V_FIRST = {"state_v_first": True}


def run(name: str, case: Case, impl: str | None) -> Outputs:
    options = {n: x for n, x in case.options.items() if n != "chunk_size" or name == CHUNK}
    o, state = FUNCTIONS[name](**case.tensors, **options, output_final_state=True, impl=impl)
    return {"o": o, "final_state": state}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    tensors, options = dict(case.tensors), dict(case.options)
    q, v = tensors["q"], tensors["v"]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    tensors.setdefault("g", v.new_zeros(v.shape[:3], dtype=wide))
    tensors.setdefault("beta", v.new_ones(v.shape[:3], dtype=wide))
    options = {"scale": q.shape[-1] ** -0.5} | options
    options = {n: x for n, x in options.items() if n not in ("chunk_size", "use_gate_in_kernel")}
    o, state = gated_delta_rule_reference(**tensors, **options, product_dtype=product_dtype)
    return {"o": o, "final_state": state}


def step(case: Case, state: Tensor | None) -> tuple[Outputs, Tensor]:
    tensors = {n: t for n, t in case.tensors.items() if n != "initial_state"}
    outputs = run(RECURRENT, Case(case.name, tensors | {"initial_state": state}, case.options), None)
    return {"o": outputs["o"]}, outputs["final_state"]


def draw_case(
    draw: Draw,
    name: str,
    sizes: tuple[int, int, int, int, int],
    *,
    groups: int = 1,
    decay: float = -0.5,
    strength: tuple[float, float] = (0.0, 1.0),
    sequences: int | None = None,
    leave_out: tuple[str, ...] = (),
    hostile: bool = False,
    raw: float = 1.0,
    **options,
) -> Case:
    """One case of sizes B, T, H, K, V with keys of length one; `groups` value heads share a key head.

    Gates made inside the op come from raw inputs of size `raw`.
    """
    B, T, H, K, V = sizes
    HV = groups * H
    tensors = {
        "q": draw.normal(B, T, H, K),
        "k": draw.unit(B, T, H, K),
        "v": draw.normal(B, T, HV, V),
        "g": draw.gate(B, T, HV, low=decay, high=0.0),
        "beta": draw.gate(B, T, HV, low=strength[0], high=strength[1]),
        "initial_state": draw.wide_normal(sequences or B, HV, K, V),
    }
    if options.get("use_beta_sigmoid_in_kernel"):
        tensors["beta"] = draw.normal(B, T, HV, scale=raw)
    if options.get("use_gate_in_kernel"):
        tensors["g"] = draw.normal(B, T, HV, scale=raw)
        tensors["A_log"] = draw.gate(HV, low=-3.0, high=0.0)
        tensors["dt_bias"] = draw.wide_normal(HV)
    if options.get("state_v_first"):
        tensors["initial_state"] = tensors["initial_state"].mT.contiguous()
    tensors = {n: t for n, t in tensors.items() if n not in leave_out}
    return Case(name, tensors, {"chunk_size": 16} | options, hostile)


def cases(dtype: torch.dtype) -> list[Case]:
    """Each case has a stream of its own, so that one may change and the others stay."""

    def make(seed: int, *args, **options) -> Case:
        return draw_case(Draw(seed, dtype), *args, **options)

    bounds = torch.tensor([0, 0, 5, 22, 22])
    packed = make(8, "packed, empty sequences among them", (1, 24, 1, 8, 4), groups=2, sequences=4)
    same = make(20, "identical keys, strengths up to 2", (1, 7, 4, 16, 16), strength=(0, 2), hostile=True)
    extremes = make(10, "strengths 0, 1 and 2", (1, 17, 4, 8, 8), hostile=True)
    strong = make(1, "a decay of -30 in a step, and none", (1, 18, 2, 8, 8), hostile=True)
    halves = make(
        2, "two halves of a chunk, decays of -30", (1, 65, 2, 40, 16), chunk_size=64, hostile=True, **UNIT
    )
    empty = make(12, "zero keys and tiny ones", (1, 7, 4, 8, 4), hostile=True, **UNIT)
    k, beta = same.tensors["k"], (torch.arange(17) % 3).view(1, 17, 1).expand(1, 17, 4)
    zero = empty.tensors["k"].clone()
    zero[:, ::2] = 0
    zero[:, 1::4] *= 1e-4

    def sharp(case: Case) -> Case:
        g = case.tensors["g"]
        some = (torch.arange(g.shape[1]) % 3 == 1).view(1, -1, 1)
        return case.with_tensors(g=torch.where(some, -30.0, torch.zeros_like(g)))

    # Over 65 decaying tokens rounding in float32, a token loop's too, can pass the limit by its order alone:
    # see "Numerics" in the op's README. So 32 bits and more leave g out of that one case.
    bare = {"leave_out": ("g", "beta", "initial_state")}
    return [
        make(0, "with all there is", (2, 18, 2, 8, 4), scale=0.5, **UNIT),
        make(1, "one token", (2, 1, 8, 16, 16)),
        make(2, "two tokens, no decay, strength 1, no state", (1, 2, 1, 4, 4), **bare),
        make(3, "a chunk less one", (1, 15, 2, 16, 16)),
        make(0, "a chunk", (1, 16, 2, 16, 16), leave_out=("g",)),
        make(5, "odd sizes, a prime length", (1, 37, 1, 5, 19), chunk_size=32, leave_out=("initial_state",)),
        make(6, "value heads in groups", (1, 17, 2, 8, 4), groups=2, **UNIT),
        make(2, "two halves of a chunk, and one token more", (1, 65, 1, 40, 16), chunk_size=64,
             decay=-2.0, leave_out=() if dtype.itemsize == 2 else ("g",), **UNIT),
        packed.with_tensors(cu_seqlens=bounds),
        extremes.with_tensors(beta=beta.to(extremes.tensors["g"].dtype)),
        sharp(strong),
        sharp(halves),
        empty.with_tensors(k=zero),
        same.with_tensors(k=k[:, :1].expand_as(k).clone()),
    ]  # fmt: skip


def raw_cases(dtype: torch.dtype) -> list[Case]:
    """Gates made inside the op, states that have values before keys."""

    def make(seed: int, *args, **options) -> Case:
        return draw_case(Draw(seed, dtype), *args, **options)

    every = GATE | REFLECTING | V_FIRST | UNIT
    packed = make(8, "packed, all options", (1, 24, 1, 8, 4), groups=2, sequences=4, **every)
    far = make(
        9, "raw inputs up to a hundred", (1, 18, 2, 8, 8), raw=40.0, hostile=True, **GATE, **REFLECTING
    )
    return [
        make(8, "all options", (2, 18, 2, 8, 4), scale=0.5, **every),
        make(6, "a gate without a bias", (1, 17, 2, 8, 8), leave_out=("dt_bias", "initial_state"), **GATE),
        make(5, "strengths from logits", (1, 18, 2, 8, 4), **SIGMOID),
        make(11, "strengths up to 2, values before keys", (1, 19, 2, 8, 16), **REFLECTING, **V_FIRST),
        make(10, "one token, value heads in groups", (2, 1, 2, 8, 8), groups=2, **every),
        packed.with_tensors(cu_seqlens=torch.tensor([0, 0, 5, 22, 22])),
        far.with_tensors(A_log=far.tensors["A_log"] - 4),
    ]  # fmt: skip


def random_case(draw: Draw, raw: bool = False) -> Case:
    T, H, K, V = draw.size("T", 1, 36), draw.size("H", 1, 2), draw.size("K", 4, 20), draw.size("V", 4, 20)
    sequences = draw.size("sequences", 1, 4) if draw.flag("packed") else None
    options = {}
    if raw:
        reflecting = draw.flag("allow_neg_eigval")
        options = {
            "use_gate_in_kernel": draw.flag("gate"),
            "use_beta_sigmoid_in_kernel": reflecting or draw.flag("sigmoid"),
            "allow_neg_eigval": reflecting,
            "state_v_first": draw.flag("state_v_first"),
        }
    needed = {"g": options.get("use_gate_in_kernel"), "beta": options.get("use_beta_sigmoid_in_kernel")}
    case = draw_case(
        draw,
        "drawn",
        (1 if sequences else draw.size("B", 1, 2), T, H, K, V),
        groups=draw.size("groups", 1, 2),
        decay=draw.pick("decay", (-0.5, -2.0)),
        sequences=sequences,
        leave_out=tuple(n for n in ("g", "beta", "initial_state") if not draw.flag(n) and not needed.get(n)),
        chunk_size=draw.pick("chunk_size", (16, 32, 64)),
        use_qk_l2norm_in_kernel=draw.flag("l2norm"),
        **options,
    )
    return case.with_tensors(cu_seqlens=draw.bounds(sequences, T)) if sequences else case


def hand() -> tuple[Case, Outputs]:
    """K = 2, V = 1: the second token erases what it reads, decays, and writes 5 undecayed."""
    tensors = {
        "q": [[1.0, 0.0], [1.0, 2.0]],
        "k": [[1.0, 0.0], [0.6, 0.8]],
        "v": [[2.0], [5.0]],
        "g": [[0.0], [math.log(0.5)]],
        "beta": [[1.0], [0.5]],
    }
    given = {n: torch.tensor(x, dtype=torch.float64).view(1, 2, 1, -1) for n, x in tensors.items()}
    given["g"], given["beta"] = given["g"][..., 0], given["beta"][..., 0]
    state = torch.tensor([[4.0], [-1.0]], dtype=torch.float64).view(1, 1, 2, 1)
    # M1 = (2, -1): the 4 along the first key is replaced by 2.
    # k2^T M1 = 1.2 - 0.8 = 0.4; M2 = 0.5 (M1 - 0.5 * 0.4 k2) + 0.5 * 5 k2 = (1 + 1.44, -0.5 + 1.92)
    final = torch.tensor([[2.44], [1.42]], dtype=torch.float64).view(1, 1, 2, 1)
    o = torch.tensor([2.0, 2.44 + 2 * 1.42], dtype=torch.float64).view(1, 2, 1, 1)
    return Case("two tokens", given | {"initial_state": state}, {"scale": 1.0}), {
        "o": o,
        "final_state": final,
    }


def raw_hand() -> tuple[Case, Outputs]:
    """The same from raw gates; here the first token halves the state too, which so starts twice as large."""
    case, expected = hand()
    wide = torch.float64
    tensors = case.tensors | {
        "g": torch.full((1, 2, 1), -1.0, dtype=wide),  # exp(-softplus(-1 + 1)) = 1/2
        "A_log": torch.zeros(1, dtype=wide),
        "dt_bias": torch.ones(1, dtype=wide),
        "beta": torch.tensor([0.0, -math.log(3)], dtype=wide).view(1, 2, 1),  # 2 sigmoid: 1 and 1/2
        "initial_state": 2 * case.tensors["initial_state"].mT,
    }
    options = case.options | GATE | REFLECTING | V_FIRST
    return replace(case, tensors=tensors, options=options), expected | {
        "final_state": expected["final_state"].mT.contiguous()
    }


def errors(name: str) -> list[ErrorCase]:
    q, v, g = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 4, 5), -torch.rand(2, 6, 4)
    given = {"q": q, "k": q, "v": v, "g": g, "beta": -g}
    row = {n: x[:1] for n, x in given.items()}
    state = torch.zeros(2, 4, 8, 5)

    def case(what: str, error: type[Exception], pattern: str, **changes) -> ErrorCase:
        return ErrorCase(
            what, partial(FUNCTIONS[name], **(given | changes)), error, f"^{name}: expected {pattern}"
        )

    def bounds(*values: float) -> dict[str, Tensor]:
        return row | {"cu_seqlens": torch.tensor(values)}

    big = torch.zeros(2, 6, 4, 257)
    listed = [
        case("rank of q", ValueError, r"`q` of rank 4, \[B, T, H, K\], got shape \(2, 6, 4\)", q=q[..., 0]),
        case("rank of v", ValueError, r"`v` of rank 4, \[B, T, HV, V\]", v=v[0]),
        case("shape of q", ValueError, r"`q` \[B, T, H, K\] of shape \(2, 6, 4, 8\), got", q=q[:, :5]),
        case("v with heads before time", ValueError, r"`v` .* heads before time\?", v=v.transpose(1, 2)),
        case("g with heads before time", ValueError, r"`g` .* heads before time\?", g=g.transpose(1, 2)),
        case("shape of beta", ValueError, r"`beta` \[B, T, HV\] of shape \(2, 6, 4\)", beta=g[..., :1]),
        case("grouped heads that do not divide", ValueError, "HV a positive multiple of H, got H = 4",
             v=v[:, :, :3], g=g[..., :3], beta=g[..., :3]),
        case("no token", ValueError, "at least one time step in `k`, got T = 0",
             **{n: x[:, :0] for n, x in given.items()}),
        case("integers", TypeError, "`q` of dtype float16, bfloat16, float32, float64, got int32", q=q.int()),
        case("dtypes that differ", TypeError, "`v` of dtype float32, got float64. `v` and `q`", v=v.double()),
        case("integer decay", TypeError, "`g` of dtype float16", g=g.int()),
        case("device", ValueError, "`beta` on cpu, where `q` is, got meta", beta=g.to("meta")),
        case("growing state", ValueError, "`g` <= 0 everywhere, got a largest value of 0.5", g=g * 0 + 0.5),
        case("state of a row", ValueError, r"`initial_state` \[B or S, HV, K, V\] of shape \(2, 4, 8, 5\)",
             initial_state=state[:1]),
        case("state with values before keys", ValueError, "`initial_state`.*keys before values",
             initial_state=state.transpose(2, 3)),
        case("complex state", TypeError, "`initial_state` of dtype", initial_state=state.to(torch.complex64)),
        case("keys too wide", ValueError, "K from 1 to 256, got K = 257", q=big, k=big),
        case("values too wide", ValueError, "V from 1 to 256, got V = 257", v=big),
        case("path", ValueError, "`impl` to be one of", impl="cuda"),
        case("bounds of floats", TypeError, "`cu_seqlens` of dtype int32, int64", **bounds(0.0, 6.0)),
        case("bounds in a list", TypeError, "`cu_seqlens` to be a tensor, got a list", cu_seqlens=[0, 6]),
        case("bounds that fall", ValueError, "`cu_seqlens` that never decreases", **bounds(0, 4, 2, 6)),
        case("bounds past the end", ValueError, "`cu_seqlens` from 0 to at most T = 6", **bounds(0, 9)),
        case("bounds from one", ValueError, "`cu_seqlens` from 0", **bounds(1, 6)),
        case("packed batch", ValueError, "packed inputs of batch size 1", cu_seqlens=torch.tensor([0, 6])),
        case("scale out of place", TypeError, r"no tensor for `scale`.*\(2, 6, 4\).*by name", scale=g),
    ]  # fmt: skip
    per_head = torch.zeros(4)
    gated = GATE | {"A_log": per_head}
    listed += [
        case("gate without its rate", ValueError, "`A_log` with use_gate_in_kernel=True, got None", **GATE),
        case("gate of nothing", ValueError, "`g` with use_gate_in_kernel=True, got None", **gated, g=None),
        case("rate without the gate", ValueError, "use_gate_in_kernel=True with `A_log`", A_log=per_head),
        case("bias without the gate", ValueError, "use_gate_in_kernel=True with `dt_bias`", dt_bias=per_head),
        case("rate per key", ValueError, r"`A_log` \[HV\] of shape \(4,\), got \(8,\)",
             **gated | {"A_log": torch.zeros(8)}),
        case("integer rate", TypeError, "`A_log` of dtype", **gated | {"A_log": per_head.int()}),
        case("bias elsewhere", ValueError, "`dt_bias` on cpu", **gated, dt_bias=per_head.to("meta")),
        case("rate too large", ValueError, r"a finite `exp\(A_log\)`", **gated | {"A_log": per_head + 100}),
        case("infinite bias", ValueError, "a finite `dt_bias`", **gated, dt_bias=per_head - math.inf),
        case("logits of nothing", ValueError, "`beta` with use_beta_sigmoid", **SIGMOID, beta=None),
        case("strengths that are no logits", ValueError, "use_beta_sigmoid_in_kernel=True with allow_neg_eig",
             allow_neg_eigval=True),
        case("state with keys before values", ValueError, "`initial_state`.*values before keys",
             **V_FIRST, initial_state=state),
    ]  # fmt: skip
    return listed + (chunk_errors(case) if name == CHUNK else recurrent_errors(case))


def chunk_errors(case: Callable[..., ErrorCase]) -> list[ErrorCase]:
    """What the chunked form alone can be asked for."""
    bounds = torch.tensor([0, 6])
    return [
        case("chunk size", ValueError, "`chunk_size` to be one of 16, 32, 64, got 48", chunk_size=48),
        case("chunk size as a float", ValueError, "`chunk_size` to be one of", chunk_size=64.0),
        case("several devices", NotImplementedError, "`cp_context` None .*several devices", cp_context=()),
        case("bounds on the host alone", ValueError, "`cu_seqlens` with `cu_seqlens_cpu`",
             cu_seqlens_cpu=bounds),
        case("places of chunks alone", ValueError, "`cu_seqlens` with `chunk_indices`", chunk_indices=bounds),
    ]  # fmt: skip


def recurrent_errors(case: Callable[..., ErrorCase]) -> list[ErrorCase]:
    """What the form token by token alone can be asked for."""
    beta = torch.rand(2, 6, 4)
    return [
        case("strengths in the place of gk", NotImplementedError, "`gk` None .*as `beta=`", gk=beta),
        case("decays of values", NotImplementedError, "`gv` None .*per value channel", gv=beta),
    ]


def opcheck(name: str, case: Case, impl: str) -> list[tuple]:
    q, v, tensors = case.tensors["q"], case.tensors["v"], case.tensors
    g = tensors.get("g", torch.zeros(v.shape[:3]))
    beta = tensors.get("beta", torch.ones(v.shape[:3]))
    names = ("initial_state", "cu_seqlens", "A_log", "dt_bias")
    inputs = [q, tensors["k"], v, g, beta, *(tensors.get(n) for n in names)]
    given = case.options
    beta_top = given.get("use_beta_sigmoid_in_kernel", 0) * (1 + given.get("allow_neg_eigval", 0))
    options = (given.get("scale", 0.25), given.get("use_qk_l2norm_in_kernel", False))
    options += (int(beta_top), given.get("state_v_first", False))
    options += (case.options["chunk_size"],) if name == CHUNK else ()
    forward, backward = {
        CHUNK: (op.chunk_fwd, op.chunk_bwd),
        RECURRENT: (op.recurrent_fwd, op.recurrent_bwd),
    }[name]
    detached = [None if x is None else x.detach() for x in inputs]
    o, final, *residuals = forward(*detached, *options, True, impl)
    given = (torch.ones_like(o), torch.ones_like(final), *detached, residuals, *options, impl)
    return [(forward, (*inputs, *options, True, impl)), (backward, given)]


def spec(name: str) -> OpSpec:
    return OpSpec(
        name=name,
        run=partial(run, name),
        reference=reference,
        cases=cases,
        hand=hand,
        errors=partial(errors, name),
        opcheck=partial(opcheck, name),
        random_case=random_case,
        time_inputs=TIME_INPUTS,
        state=("initial_state", "final_state"),
        step=step,
        packed=True,
        bounded=("g", "beta"),
    )


def raw_spec(name: str) -> OpSpec:
    """The same op with the options that make gates inside it."""
    return replace(
        spec(name),
        name=f"{name} with raw gates",
        cases=raw_cases,
        hand=raw_hand,
        errors=list,
        bounded=(),
        random_case=partial(random_case, raw=True),
    )


SPECS = [make(name) for make in (spec, raw_spec) for name in (CHUNK, RECURRENT)]
