"""The channelwise backward by itself: every gradient against float64, every branch, and which branch ran.

What the forward keeps is made by the reference here, so that only the backward is on trial.
"""

import pytest
import torch
from torch import Tensor

from prism_kernels._core.runtime import interpreting
from prism_kernels.selective_scan import launch_channels_backward as backward_of
from prism_kernels.selective_scan.frame import as_pairs
from prism_kernels.selective_scan.reference import scan_reference
from prism_kernels.testing.catalogue.selective_scan import draw_case
from prism_kernels.testing.spec import Case

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not interpreting(), reason="runs on CPU tensors, under the interpreter"),
]
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
SEGMENT = backward_of.SEGMENT
SCRATCH = 24  # position of the scratch among the arguments of the launch


def kept(tensors: dict[str, Tensor], options: dict) -> list[Tensor]:
    """The states before every segment and the final state; rows that no sequence owns hold NaN."""
    u, A, bounds = tensors["u"], tensors["A"], tensors.get("cu_seqlens")
    batch, T, H, P = u.shape
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    wide = wide.to_complex() if A.is_complex() else wide
    if bounds is None:
        spans = [(b, 0, T, b * -(-T // SEGMENT)) for b in range(batch)]
    else:
        ends = bounds.tolist()
        spans = [(0, a, e, a // SEGMENT + s) for s, (a, e) in enumerate(zip(ends, ends[1:], strict=False))]
    states = torch.full((T // SEGMENT + batch + len(spans), H * P, A.shape[1]), float("nan"), dtype=wide)
    last = torch.zeros(len(spans), H, P, A.shape[1], dtype=wide)
    given = tensors.get("initial_state", last)
    for s, (b, first, end, row) in enumerate(spans):
        h = given[s : s + 1].to(wide)
        for done in range(0, end - first, SEGMENT):
            states[row + done // SEGMENT] = h.reshape(H * P, -1)
            n = min(SEGMENT, end - first - done)
            begin = end - done - n if options.get("reverse") else first + done
            part = {k: v for k, v in tensors.items() if k in ("A", "B", "C", "dt_bias")}
            along = [k for k in ("B", "C") if tensors[k].ndim == 4]
            part |= {k: tensors[k][b : b + 1, begin : begin + n] for k in ("u", "dt", *along)}
            h = scan_reference(**part, **options, initial_state=h)[1]
        last[s] = h[0]
    return [as_pairs(states).contiguous(), as_pairs(last).contiguous()]


def run(case: Case, accurate: bool, dy: Tensor, dlast: Tensor) -> dict[str, Tensor]:
    """Gradients by the kernel."""
    pairs = {n: as_pairs(x) for n, x in case.tensors.items()}
    o, residuals = case.options, kept(case.tensors, case.options)
    flags = o.get("dt_softplus", False), o.get("reverse", False), o.get("discretization", "zoh") == "euler"
    inputs = [pairs.get(n) for n in (*NAMES, "cu_seqlens")]
    out = backward_of.backward(dy, dlast.to(residuals[1].dtype), residuals, *inputs, *flags, accurate)
    assert all((n in case.tensors) == (d.numel() > 0) for n, d in zip(NAMES, out, strict=True))
    return {n: d for n, d in zip(NAMES, out, strict=True) if n in case.tensors}


def oracle(case: Case, dtype: torch.dtype, dy: Tensor, dlast: Tensor, **precision) -> dict[str, Tensor]:
    """Gradients by autograd through the reference."""
    leaves = {}
    for name, x in case.tensors.items():
        wide = dtype.to_complex() if x.is_complex() else dtype
        leaves[name] = x if name == "cu_seqlens" else x.detach().to(wide).requires_grad_()
    y, h = scan_reference(**leaves, **case.options, **precision)
    names = [n for n in NAMES if n in leaves]
    grads = torch.autograd.grad(
        [y, as_pairs(h)], [leaves[n] for n in names], [dy.to(y.dtype), dlast.to(dtype)]
    )
    return {n: as_pairs(g).double() for n, g in zip(names, grads, strict=True)}


def cotangents(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    u, A, bounds = case.tensors["u"], case.tensors["A"], case.tensors.get("cu_seqlens")
    sequences = u.shape[0] if bounds is None else len(bounds) - 1
    pair = (2,) if A.is_complex() else ()
    return torch.randn(u.shape).to(u.dtype), torch.randn(sequences, *u.shape[2:], A.shape[1], *pair)


def judge(case: Case, accurate: bool, slack: float) -> None:
    """At most twice plain PyTorch's error, and `slack` of the largest value (small cases: PyTorch's luck)."""
    dtype = case.tensors["u"].dtype
    dy, dlast = cotangents(case)
    low = dtype in (torch.bfloat16, torch.float16)
    want = oracle(case, torch.float64, dy, dlast)
    plain = oracle(case, torch.float32, dy, dlast, product_dtype=dtype if low else None)
    for name, got in run(case, accurate, dy, dlast).items():
        right, error = want[name], got.double() - want[name]
        assert got.shape == right.shape
        assert got.dtype == as_pairs(case.tensors[name]).dtype
        for size in (lambda x: x.abs().max(), torch.linalg.vector_norm):
            bound = 2 * size(plain[name] - right) + (slack + torch.finfo(got.dtype).eps) * size(right)
            assert size(error) <= bound, f"{name}: {size(error):.2e} > {bound:.2e}"


def in_bits(case: Case, dtype: torch.dtype) -> Case:
    return case.with_tensors(**{n: case.tensors[n].to(dtype) for n in ("u", "dt", "z") if n in case.tensors})


def make(name: str, *sizes: int, **options) -> Case:
    return draw_case(torch.float32, name, sizes, **options)


def packed(name: str, **options) -> Case:
    """Two empty sequences, one of two segments, one of two tokens, and tokens after the last."""
    case = make(name, 1, 71, 4, 1, 3, **options)
    torch.manual_seed(0)
    pair = () if options.get("real") else (2,)
    states = torch.randn(4, 4, 1, 3, *pair)
    states = states if options.get("real") else torch.view_as_complex(states)
    return case.with_tensors(initial_state=states, cu_seqlens=torch.tensor([0, 0, 66, 66, 68]))


TOKEN = ("token", "token")
CASES = [
    make("all there is", 1, 9, 4, 1, 4, dt_softplus=True),
    make(
        "three channels, weights per channel, backward", 1, 5, 4, 3, 3, weights=("channel",) * 2, reverse=True
    ),
    make("bare", 2, 3, 4, 1, 5, full=False, state=False),
    make("one state, channels beyond a block", 1, 3, 5, 1, 1),
    make("steps near zero", 1, 6, 4, 1, 4, steps=(1e-7, 1e-5), full=False),
    make("huge steps", 1, 6, 4, 1, 4, steps=(1e1, 1e2), full=False),
    make("tiny and huge steps by turns", 1, 10, 4, 1, 4, steps=(1e-6, 1e2)),
    make("Euler", 1, 7, 4, 2, 4, discretization="euler"),
    make("B and C along time", 2, 6, 4, 2, 5, weights=TOKEN),
    make("C along time", 1, 6, 4, 1, 5, weights=("head", "token"), dt_softplus=True),
    make("B along time", 1, 6, 4, 1, 5, weights=("token", "head"), reverse=True),
    make("real", 1, 7, 4, 2, 5, real=True),
    make("real, B and C along time", 1, 6, 4, 1, 5, real=True, weights=TOKEN, dt_softplus=True),
    make("real, Euler", 1, 6, 4, 1, 5, real=True, weights=TOKEN, discretization="euler", reverse=True),
    packed("packed", dt_softplus=True),
    packed("packed, along time, backward", weights=TOKEN, reverse=True, full=False),
    packed("packed, real", weights=TOKEN, real=True, discretization="euler"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients(case):
    judge(case, True, 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 6, 8, 11, 14)], ids=lambda c: c.name)
def test_gradients_of_the_fast_variant(case):
    judge(case, False, 64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 8, 13, 14)], ids=lambda c: c.name)
def test_gradients_in_16_bits(case):
    judge(in_bits(case, torch.bfloat16), False, 0.0)


def test_groups():
    case = make("two groups", 1, 5, 4, 2, 3)
    torch.manual_seed(0)
    B, C = (torch.view_as_complex(torch.randn(1, 5, G, 3, 2)) for G in (2, 4))
    judge(case.with_tensors(B=B, C=C), True, 1e-6)


def test_poles_at_zero_and_beside_it():
    case = make("poles", 1, 5, 4, 1, 4)
    A = case.tensors["A"].clone()
    A[:, 0], A[:, 1] = 0, torch.complex(torch.tensor(-1e-7), torch.tensor(1e-7))
    for accurate in (True, False):
        judge(case.with_tensors(A=A), accurate, 2e-6)


def branches(monkeypatch, case: Case, accurate: bool) -> str:
    """Which way every segment went, read off the scratch that it left untouched."""
    seen = []

    def spy(kernel, grid, *args, **constants):
        args[SCRATCH].fill_(float("nan"))
        launch(kernel, grid, *args, **constants)
        block = constants["BLOCK_C"]
        tile = block * constants["BLOCK_N"] * (1 if constants["REAL"] else 2)
        scratch = args[SCRATCH].view(grid[0], -1)[:, (6 * SEGMENT + 3) * block :]
        seen.append((scratch[:, : 4 * tile].isfinite().any(), scratch[:, 4 * tile :].isfinite().any()))

    launch = backward_of.launch
    with monkeypatch.context() as patch:
        patch.setattr(backward_of, "launch", spy)
        run(case, accurate, *cotangents(case))
    ((walked, stored),) = seen
    return "stored" if stored else "reversible" if walked else "differences"


def test_which_branch_runs(monkeypatch):
    slow = make("slow", 1, 12, 4, 1, 4, full=False, steps=(0.05, 0.1))
    quick = make("quick", 1, 12, 4, 1, 4, full=False, steps=(2.0, 4.0))
    still = make("still", 1, 12, 4, 1, 4, full=False, steps=(1e-6, 1e-5))
    ways = [[branches(monkeypatch, c, a) for c in (slow, quick, still)] for a in (False, True)]
    assert ways == [["differences", "stored", "reversible"], ["stored"] * 3]


@pytest.mark.parametrize("weights, way", [(("head", "head"), "differences"), (TOKEN, "reversible")])
def test_guard_is_what_keeps_quick_decays_right(monkeypatch, weights, way):
    """Without the guard the states walked back through quick decays are wrong, visibly."""
    case = make("quick", 1, 12, 4, 1, 4, steps=(2.0, 4.0), weights=weights)
    judge(case, False, 2e-6)
    monkeypatch.setattr(backward_of, "MOST_DECAY", 1e30)
    assert branches(monkeypatch, case, False) == way
    with pytest.raises(AssertionError):
        judge(case, False, 1e-2)


def test_every_segment_chooses_for_itself(monkeypatch):
    """A slow segment, a quick one, a slow one and a still one, of one sequence."""
    case = make("mixed", 1, 3 * SEGMENT + 9, 4, 1, 2, steps=(0.01, 0.02))
    dt = case.tensors["dt"].clone()
    dt[:, SEGMENT + 5 : SEGMENT + 12] = 4.0
    dt[:, 3 * SEGMENT :] = 1e-6
    dt_bias = torch.zeros_like(case.tensors["dt_bias"])
    case = case.with_tensors(dt=dt, dt_bias=dt_bias)
    assert branches(monkeypatch, case, False) == "stored"
    judge(case, False, 64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    "options",
    [{}, {"discretization": "euler", "weights": TOKEN}, {"real": True, "reverse": True, "weights": TOKEN}],
    ids=["complex", "Euler along time", "real backward"],
)
def test_gradcheck(options):
    """The interpreted kernel in float64 against differences of the reference."""
    case = draw_case(torch.float64, "gradcheck", (1, 3, 2, 1, 2), dt_softplus=True, **options)
    names = [n for n in NAMES if n in case.tensors]

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            y, h = scan_reference(**dict(zip(names, leaves, strict=True)), **case.options)
            return y, as_pairs(h).clone()

        @staticmethod
        def backward(ctx, dy, dlast):
            tensors = dict(zip(names, ctx.saved_tensors, strict=True))
            grads = run(case.with_tensors(**{n: x.detach() for n, x in tensors.items()}), True, dy, dlast)
            return tuple(
                torch.view_as_complex(grads[n]) if tensors[n].is_complex() else grads[n] for n in names
            )

    leaves = [case.tensors[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(Scan.apply, leaves, fast_mode=True)


def test_nan_after_the_last_sequence_reaches_nothing():
    case = packed("packed", dt_softplus=True)
    dy, dlast = cotangents(case)
    clean = run(case, True, dy, dlast)
    dirty = {n: case.tensors[n].clone() for n in ("u", "dt", "z")}
    for x in (*dirty.values(), dy):
        x[:, 68:] = float("nan")
    again = run(case.with_tensors(**dirty), True, dy, dlast)
    for name in clean:
        assert torch.equal(clean[name], again[name]), name
    assert all(not clean[n][:, 68:].any() for n in ("u", "dt", "z"))


def test_no_gradient_of_the_state_and_strided_inputs():
    case = make("strided", 2, 4, 4, 2, 3)
    dy, dlast = cotangents(case)
    dense = run(case, True, dy, torch.zeros_like(dlast))
    strided = {n: case.tensors[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("u", "dt", "z")}
    spaced = run(case.with_tensors(**strided), True, dy, torch.zeros_like(dlast))
    for name in dense:
        assert torch.equal(dense[name], spaced[name]), name
