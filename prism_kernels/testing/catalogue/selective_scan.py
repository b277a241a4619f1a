"""Cases of the selective scan: static B and C, input-dependent ones, and the real channelwise form."""

import cmath
import math
import zlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ... import selective_scan, selective_scan_step
from ...selective_scan.api import to_numbers, to_pairs
from ...selective_scan.op import selective_scan_bwd, selective_scan_fwd
from ...selective_scan.reference import scan_reference
from ..budgets import LOW
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs

OPTIONS = ("dt_softplus", "reverse", "discretization")


def run(case: Case, impl: str | None) -> Outputs:
    y, state = selective_scan(**case.tensors, **case.options, output_final_state=True, impl=impl)
    return {"y": y, "final_state": state}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    A, tensors = case.tensors["A"], dict(case.tensors)
    for name in ("A", "B", "C", "initial_state"):
        if name in tensors:
            tensors[name] = to_numbers(tensors[name], A)
    options = {n: v for n, v in case.options.items() if n != "accuracy"}
    y, state = scan_reference(**tensors, **options, product_dtype=product_dtype)
    return {"y": y, "final_state": torch.view_as_real(state) if A.ndim == 3 else state}


def step(case: Case, state: Tensor | None) -> tuple[Outputs, Tensor]:
    A = case.tensors["A"]
    tokens = {n: case.tensors[n][:, 0] for n in ("u", "dt", "z") if n in case.tensors}
    for name in ("B", "C"):
        x = case.tensors[name]
        by_channel = x.ndim - (A.ndim == 3) == 3
        tokens[name] = x[None] if by_channel else x  # [1,H,P,N] is never read as one token's [B,G,N]
    if state is None:
        state = A.new_zeros(*tokens["u"].shape, A.shape[1], *A.shape[2:])
    rest = {n: case.tensors[n] for n in ("A", "D", "dt_bias") if n in case.tensors}
    options = {n: v for n, v in case.options.items() if n != "reverse"}
    y, state = selective_scan_step(state, **tokens, **rest, **options)
    return {"y": y[:, None]}, state


def draw_case(
    dtype: torch.dtype,
    name: str,
    sizes: tuple[int, int, int, int, int],
    *,
    weights: tuple[str, str] = ("head", "head"),
    real: bool = False,
    steps: tuple[float, float] = (1e-2, 0.5),
    state: bool = True,
    full: bool = True,
    hostile: bool = False,
    draw: Draw | None = None,
    **options,
) -> Case:
    """One case of sizes B, T, H, P, N; `weights` says how B and C come, `full` adds D, z and dt_bias.

    The name is the seed, so that a case added or changed redraws no other.
    """
    draw = draw or Draw(zlib.crc32(name.encode()), dtype)
    B, T, H, P, N = sizes
    number = draw.wide_normal if real else draw.complex_normal
    shapes = {"head": (H, N), "channel": (H, P, N), "token": (B, T, 1, N)}
    A = -draw.gate(H, N, low=0.2, high=1.5)
    tensors = {
        "u": draw.normal(B, T, H, P),
        "dt": draw.log_uniform(B, T, H, low=steps[0], high=steps[1]),
        "A": A if real else torch.complex(A, 4 * draw.wide_normal(H, N)),
        "B": number(*shapes[weights[0]]),
        "C": number(*shapes[weights[1]]),
    }
    if full:
        tensors |= {"D": draw.wide_normal(H, P), "z": draw.normal(B, T, H, P)}
        tensors["dt_bias"] = draw.gate(H, low=0.05, high=0.1)
    if state:
        tensors["initial_state"] = number(B, H, P, N)
    return Case(name, tensors, options, hostile)


def static_cases(dtype: torch.dtype) -> list[Case]:
    make = partial(draw_case, dtype)
    zero_pole = make("a pole at zero, and one beside it", (1, 5, 16, 4, 4))
    A = zero_pole.tensors["A"].clone()
    A[:, 0], A[:, 1] = 0, torch.complex(torch.tensor(-1e-7), torch.tensor(1e-7))
    packed = make("packed, empty sequences among them", (1, 11, 24, 4, 6), dt_softplus=True)
    bounds = torch.tensor([0, 0, 6, 9, 9])
    states = Draw(1, dtype).complex_normal(4, 24, 4, 6)
    pairs = make("real pairs", (2, 6, 16, 4, 5))
    in_pairs = {n: torch.view_as_real(pairs.tensors[n]) for n in ("A", "B", "C", "initial_state")}
    oscillating = make("undamped poles", (1, 9, 16, 4, 8), hostile=True)
    undamped = torch.complex(torch.zeros_like(oscillating.tensors["A"].real), oscillating.tensors["A"].imag)
    turning = make("many turns in a step", (1, 6, 4, 1, 4), steps=(1e-5, 1e1), hostile=True)
    return [
        make("a step size per head, with all there is", (2, 6, 4, 4, 8)),
        make("one token", (2, 1, 16, 4, 8), dt_softplus=True),
        make("a step size per channel, across two segments", (1, 67, 32, 1, 8), full=False),
        make("read-out per channel, five channels", (1, 5, 16, 5, 3), weights=("head", "channel")),
        make(
            "both per channel, no state given", (1, 6, 4, 3, 7), weights=("channel", "channel"), state=False
        ),
        make("chunk edge plus one, backward in time", (1, 17, 16, 4, 8), reverse=True),
        make("Euler", (1, 18, 4, 4, 8), discretization="euler"),
        packed.with_tensors(initial_state=states, cu_seqlens=bounds),
        pairs.with_tensors(**in_pairs),
        zero_pole.with_tensors(A=A),
        make("one state", (1, 5, 40, 1, 1), reverse=True),
        make("seventeen states", (1, 3, 2, 1, 17)),
        make("three hundred states", (1, 3, 1, 1, 300), full=False),
        make("tiny steps", (1, 11, 16, 4, 16), steps=(1e-7, 1e-5), full=False, hostile=True),
        make("huge steps", (1, 8, 4, 4, 8), steps=(1e1, 1e2), full=False, hostile=True),
        make("tiny and huge steps by turns", (1, 18, 16, 4, 8), steps=(1e-6, 1e2), hostile=True),
        oscillating.with_tensors(A=undamped),
        turning.with_tensors(A=torch.complex(turning.tensors["A"].real, 1e3 * turning.tensors["A"].imag)),
        *fast_case(make, (2, 9, 16, 1, 16), dtype, dt_softplus=True),
        *wide_cases(dtype),
    ]


def fast_case(
    make, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, name: str = "fast", **options
) -> list[Case]:
    """For 16 bits only: special functions are right to a few 2**-22, so that float32 knows better."""
    return [make(name, sizes, accuracy="fast", **options)] if dtype in LOW else []


def token_cases(dtype: torch.dtype) -> list[Case]:
    make = partial(draw_case, dtype, weights=("token", "token"))
    packed = make("packed", (1, 20, 16, 4, 6))
    grouped = make("real B and C in two groups", (2, 9, 16, 4, 2))
    groups = {"B": Draw(3, dtype).normal(2, 9, 2, 2), "C": Draw(6, dtype).normal(2, 9, 2, 2)}
    return [
        make("complex B and C per token, two rows", (2, 5, 8, 2, 8)),
        make("complex B and C per token", (1, 9, 16, 4, 8)),
        packed.with_tensors(
            initial_state=Draw(4, dtype).complex_normal(2, 16, 4, 6), cu_seqlens=torch.tensor([0, 17, 19])
        ),
        grouped.with_tensors(**groups),
        make("B alone, backward in time", (1, 6, 4, 1, 3), weights=("token", "head"), reverse=True),
        make("C alone, Euler", (1, 6, 16, 3, 3), weights=("head", "token"), discretization="euler"),
        make("huge steps", (1, 17, 4, 4, 8), steps=(1e1, 1e2), full=False, hostile=True),
    ]


def real_cases(dtype: torch.dtype) -> list[Case]:
    make = partial(draw_case, dtype, weights=("token", "token"), real=True, reverse=True)
    shared = make("one pole for all modes of a head", (1, 67, 4, 8, 5), discretization="euler")
    stiff = make("one pole, forgetting at once", (2, 9, 4, 5, 3), steps=(1e-6, 1e2), discretization="euler")
    return [
        make("channelwise, backward in time", (2, 9, 8, 1, 6)),
        make("Euler, softplus", (3, 7, 24, 1, 6), discretization="euler", dt_softplus=True),
        make("a step size per head", (2, 17, 8, 4, 8)),
        make("static weights", (1, 9, 8, 1, 16), weights=("head", "channel")),
        *fast_case(make, (1, 9, 8, 1, 16), dtype, weights=("head", "channel")),
        *fast_case(make, (1, 35, 8, 1, 16), dtype, "fast, Euler", discretization="euler", dt_softplus=True),
        make("tiny steps", (1, 6, 8, 1, 6), steps=(1e-7, 1e-5), full=False, hostile=True),
        make("huge steps", (1, 6, 8, 1, 6), steps=(1e1, 1e2), full=False, hostile=True),
        *(case.with_tensors(A=case.tensors["A"][:, :1]) for case in (shared, stiff)),
    ]


def wide_cases(dtype: torch.dtype) -> list[Case]:
    """Heads wide enough for matrix products of 16 bits; wider dtypes take such complex poles channelwise.

    D, the bias and a pole for all of a head come with enough entries that plain PyTorch is not right by luck;
    other cases have few heads, since the interpreter takes a tenth of a second for a chunk.
    """
    if dtype not in LOW:
        return []

    def make(name: str, *sizes: int, full: bool = False, **options) -> Case:
        return draw_case(dtype, f"wide heads: {name}", sizes, full=full, **options)

    sizes = (1, 18, 2, 24, 22)
    packed = make("packed, empty sequences among them", 1, 24, 2, 24, 22)
    bounds, states = torch.tensor([0, 0, 17, 20, 20]), Draw(1, dtype).complex_normal(4, 2, 24, 22)
    tied = make("one real part in a head, three chunks", 1, 33, 2, 24, 22)
    zero_pole = make("a pole at zero, and one beside it", *sizes)
    A = zero_pole.tensors["A"].clone()
    A[:, 0], A[:, 1] = 0, torch.complex(torch.tensor(-1e-7), torch.tensor(1e-7))
    apart = make("real parts far apart", 1, 20, 2, 24, 22, steps=(1e-1, 1e1))
    still = make("some steps are zero", *sizes)
    steps = still.tensors["dt"].clone()
    steps[:, ::3] = 0
    undamped = make("undamped poles", *sizes, hostile=True)
    turning = make("many turns in a step", *sizes, steps=(1e-5, 1e1), hostile=True)
    return [
        make("two chunks, with all there is", 2, 18, 2, 24, 22, full=True),
        make("softplus, eight heads", 1, 17, 8, 24, 22, full=True, dt_softplus=True),
        make("Euler, backward in time", *sizes, discretization="euler", reverse=True),
        make("fast, two blocks of channels", 1, 3, 2, 40, 30, accuracy="fast"),
        packed.with_tensors(initial_state=states, cu_seqlens=bounds),
        tied.with_tensors(
            A=torch.complex(tied.tensors["A"].real[:, :1].expand(-1, 22), tied.tensors["A"].imag)
        ),
        zero_pole.with_tensors(A=A),
        apart.with_tensors(A=torch.complex(8 * apart.tensors["A"].real, apart.tensors["A"].imag)),
        still.with_tensors(dt=steps),
        make("tiny steps", *sizes, steps=(1e-7, 1e-5), hostile=True),
        make("huge steps", *sizes, steps=(1e1, 1e2), hostile=True),
        make("tiny and huge steps by turns", *sizes, steps=(1e-6, 1e2), hostile=True),
        undamped.with_tensors(A=torch.complex(0 * undamped.tensors["A"].real, undamped.tensors["A"].imag)),
        turning.with_tensors(A=torch.complex(turning.tensors["A"].real, 1e3 * turning.tensors["A"].imag)),
    ]


def wide_token_cases(dtype: torch.dtype) -> list[Case]:
    """The same with B and C per token: Mamba-2's in any dtype, complex ones in 16 bits."""
    make = partial(draw_case, dtype, weights=("token", "token"), full=False)
    mamba = {"real": True, "discretization": "euler", "dt_softplus": True}
    one_pole = make("Mamba-2: one real pole", (1, 33, 8, 24, 22), full=True, **mamba)
    packed = make("Mamba-2, packed", (1, 24, 8, 24, 22), **mamba)
    bounds, states = torch.tensor([0, 17, 17, 20]), Draw(4, dtype).wide_normal(3, 8, 24, 22)
    packed = packed.with_tensors(initial_state=states, cu_seqlens=bounds)
    forgetting = make("one pole, forgetting at once", (1, 18, 16, 24, 22), steps=(1e-6, 1e2), **mamba)
    cases = [
        make("poles of their own, two rows", (2, 5, 2, 24, 22), real=True, discretization="euler"),
        *(c.with_tensors(A=c.tensors["A"][:, :1]) for c in (one_pole, packed, forgetting)),
        make("real poles of their own, backward in time", (1, 33, 2, 24, 22), real=True, reverse=True),
    ]
    if dtype not in LOW:
        return cases
    plain = make("complex B and C in two groups", (2, 18, 2, 24, 22), full=True)
    groups = {n: Draw(i, dtype).complex_normal(2, 18, 2, 22) for n, i in (("B", 3), ("C", 6))}
    return [
        *cases,
        plain.with_tensors(**groups),
        make("B alone", (1, 18, 2, 24, 22), weights=("token", "head")),
        make("C alone, Euler", (1, 18, 2, 24, 22), weights=("head", "token"), discretization="euler"),
        make("huge steps", (1, 18, 2, 24, 22), steps=(1e1, 1e2), hostile=True),
    ]


def random_case(draw: Draw, *, real: bool = False, token: bool = False, wide: bool = False) -> Case:
    T, H = draw.size("T", 1, 30), draw.size("H", 2, 4)
    if wide:
        P, N = draw.size("P", 24, 40), draw.size("N", 22, 32)
    else:
        N = draw.size("N", 2, 10)
        P = 1 if draw.flag("channels in heads") else draw.size("P", 1, 5)
    sequences = draw.size("sequences", 1, 3) if draw.flag("packed") else None
    B = 1 if sequences else draw.size("B", 1, 2)
    kind = "token" if token else draw.pick("weights", ("head", "channel"))
    case = draw_case(
        draw.dtype,
        "drawn",
        (B, T, H, P, N),
        weights=(kind, kind),
        real=real,
        state=draw.flag("state"),
        full=draw.flag("full"),
        draw=draw,
        dt_softplus=draw.flag("softplus"),
        reverse=draw.flag("reverse"),
        discretization=draw.pick("discretization", ("zoh", "euler")),
    )
    if not sequences:
        return case
    packed = case.with_tensors(cu_seqlens=draw.bounds(sequences, T))
    if "initial_state" not in packed.tensors:
        return packed
    number = draw.wide_normal if real else draw.complex_normal
    return packed.with_tensors(initial_state=number(sequences, H, P, N))


def hand() -> tuple[Case, Outputs]:
    A, B, C, D, h = -1 + 2j, 2 + 0j, 1 - 1j, 0.5, 0.25 + 0.5j
    y, tokens = [], [(1.0, 0.5, 0.3), (-2.0, 0.25, -1.0)]
    for u, dt, z in tokens:
        a = cmath.exp(dt * A)
        h = a * h + (a - 1) / A * B * u
        y.append((2 * (C.conjugate() * h).real + D * u) * z / (1 + math.exp(-z)))
    column = [torch.tensor(x, dtype=torch.float64).reshape(1, 2, 1, 1) for x in zip(*tokens, strict=True)]
    number = {n: torch.tensor([[x]], dtype=torch.complex128) for n, x in (("A", A), ("B", B), ("C", C))}
    start = torch.full((1, 1, 1, 1), 0.25 + 0.5j, dtype=torch.complex128)
    tensors = {"u": column[0], "dt": column[1][..., 0], "z": column[2], **number, "initial_state": start}
    tensors["D"] = torch.tensor([D], dtype=torch.float64)
    expected = {"y": torch.tensor(y, dtype=torch.float64).reshape(1, 2, 1, 1)}
    return Case("one state", tensors), expected | {"final_state": torch.full_like(start, h)}


def errors() -> list[ErrorCase]:
    u, dt, c = torch.randn(2, 6, 4, 3), torch.rand(2, 6, 4), torch.complex64
    square = {"state": torch.zeros(4, 4, 1, 5, dtype=c), "u": torch.ones(4, 4, 1), "dt": torch.ones(4, 4)}
    A = torch.complex(-torch.rand(4, 5), torch.randn(4, 5))
    B, C, state = torch.ones(4, 5, dtype=c), torch.ones(4, 3, 5, dtype=c), torch.zeros(2, 4, 3, 5, dtype=c)
    given = {"u": u, "dt": dt, "A": A, "B": B, "C": C}
    row = {"u": u[:1], "dt": dt[:1]}
    pair = torch.view_as_real

    def case(name: str, error: type[Exception], pattern: str, **changes) -> ErrorCase:
        call = partial(selective_scan, **(given | changes))
        return ErrorCase(name, call, error, f"selective_scan: expected .*{pattern}")

    def bad_step(name: str, pattern: str, **changes) -> ErrorCase:
        token = {"state": state, **given, "u": u[:, 0], "dt": dt[:, 0]} | changes
        return ErrorCase(name, partial(selective_scan_step, **token), ValueError, pattern)

    def bounds(*values: float) -> dict[str, Tensor]:
        return row | {"cu_seqlens": torch.tensor(values)}

    return [
        case("rank of u", ValueError, r"`u` of rank 4, \[B, T, H, P\], got shape \(2, 6, 4\)", u=u[..., 0]),
        case("heads before time", ValueError, r"`A` \[H, N\] with H = 6", u=u.transpose(1, 2)),
        case("step size per channel", ValueError, r"`dt` \[B, T, H\] of shape \(2, 6, 4\)", dt=u),
        case("no token", ValueError, "at least one time step in `u`, got T = 0", u=u[:, :0], dt=dt[:, :0]),
        case("integers", TypeError, "`u` of dtype float16", u=u.int()),
        case("integer step", TypeError, "`dt` of dtype float16", dt=dt.int()),
        case("device", ValueError, "`D` on cpu, where `u` is, got meta", D=torch.ones(4, device="meta")),
        case("growing pole", ValueError, "`Re A` <= 0 everywhere, got a largest value of 0.5", A=A * 0 + 0.5),
        case("negative step", ValueError, "`dt` >= 0 everywhere, got a smallest value of -1", dt=dt * 0 - 1),
        case("rank of A", ValueError, r"`A` as \[H, N\], or as real pairs", A=A[0]),
        case("shape of B", ValueError, r"`B` \[H, N\] = \(4, 5\) or .*, got \(4, 4\)", B=B[:, :4]),
        case("groups", ValueError, r"`C` \[B, T, G, N\] with G dividing H = 4", C=torch.ones(2, 6, 3, 5)),
        case("shape of D", ValueError, r"`D` \[H\] or \[H, P\] of shape \(4, 3\)", D=torch.ones(3, 4)),
        case("shape of z", ValueError, r"`z` \[B, T, H, P\], like `u`", z=u[:, :5]),
        case("shape of dt_bias", ValueError, r"`dt_bias` \[H\]", dt_bias=torch.ones(3)),
        case("state of a row", ValueError, r"`initial_state`.*\(2, 4, 3, 5\)", initial_state=state[:1]),
        case("pairs for a complex A", ValueError, "real pairs", B=pair(B)),
        case("a complex B for pairs", TypeError, "`B` of dtype.*if and only if", A=pair(A), C=pair(C)),
        case("a real state", TypeError, "`initial_state` of dtype complex64", initial_state=state.real),
        case("a complex B for a real A", TypeError, "`B` of dtype", A=A.real),
        case("discretisation", ValueError, "`discretization` to be one of", discretization="exact"),
        case("path", ValueError, "`impl` to be one of", impl="cuda"),
        case("bounds of floats", TypeError, "`cu_seqlens` of dtype int32", **bounds(0.0, 6.0)),
        case("bounds that fall", ValueError, "never decreases", **bounds(0, 4, 2, 6)),
        case("bounds past the end", ValueError, "at most T = 6", **bounds(0, 9)),
        case("packed batch", ValueError, "batch size 1", cu_seqlens=torch.tensor([0, 6])),
        case("accuracy", ValueError, "`accuracy` to be one of", accuracy="exact"),
        bad_step("a step with a time axis", r"selective_scan_step: expected `u` of rank 3", u=u),
        bad_step(
            "a gradient in place",
            "without gradient",
            state=torch.zeros_like(state, requires_grad=True),
            inplace=True,
        ),
        bad_step("weights that may be both", "which is both", **square, C=torch.ones(4, 1, 5)),
    ]


def opcheck(case: Case, impl: str) -> list[tuple]:
    A = case.tensors["A"]
    tensors = {n: t.detach() for n, t in case.tensors.items()}
    for name in ("A", "B", "C", "initial_state"):
        if name in tensors:
            tensors[name] = to_pairs(tensors[name], A).clone().requires_grad_()
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens")
    inputs = [tensors.get(n) for n in names]
    for i in (0, 1, 5, 6, 7):
        inputs[i] = None if inputs[i] is None else inputs[i].requires_grad_()
    softplus, reverse, method = (case.options.get(n, False) for n in OPTIONS)
    options = (softplus, reverse, method == "euler", case.options.get("accuracy") != "fast", False)
    detached = [None if x is None else x.detach() for x in inputs]
    y, final_state, *residuals = selective_scan_fwd(*detached, *options, True, impl)
    residuals.append(final_state)
    backward = (torch.ones_like(y), torch.ones_like(final_state), residuals, *detached, *options, impl)
    forward = [(selective_scan_fwd, (*inputs, *options, save, impl)) for save in (True, False)]
    return [*forward, (selective_scan_bwd, backward)]


STATIC = OpSpec(
    name="selective_scan",
    run=run,
    reference=reference,
    cases=static_cases,
    hand=hand,
    errors=errors,
    opcheck=opcheck,
    time_inputs=("u", "dt", "z"),
    state=("initial_state", "final_state"),
    step=step,
    reverse_time=lambda case: case.options.get("reverse", False),
    packed=True,
    bounded=("A", "dt", "dt_bias"),
    random_case=random_case,
)


def variant(name: str, cases, **drawn: bool) -> OpSpec:
    """The same op with B and C along time."""
    return replace(
        STATIC,
        name=name,
        cases=cases,
        errors=list,
        time_inputs=("u", "dt", "z", "B", "C"),
        random_case=partial(random_case, token=True, **drawn),
    )


SPECS = [
    STATIC,
    variant("selective_scan with B and C per token", token_cases),
    variant("selective_scan with real poles, channelwise", real_cases, real=True),
    variant("selective_scan with wide heads", wide_token_cases, wide=True),
]
