"""mamba_ssm's functions by ours: against definitions written here, and where a checkout is its references.

`PRISM_PEERS=<folder>` points at the folder that holds a checkout of github.com/state-spaces/mamba.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from benchmarks.registry import Skip, benches
from prism_kernels import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update
from prism_kernels.selective_scan import torch_impl

SIZES = (2, 6, 19, 5)


def peer(inside, name, **more):
    """One function of mamba_ssm, from a checkout: its modules would import CUDA extensions."""
    benches()
    from benchmarks import peers

    names = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat, **more}
    try:
        return peers.function_of_file("mamba-ssm", f"mamba_ssm/ops/{inside}", name, names)
    except Skip as reason:
        pytest.skip(str(reason))


def scan_definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """One number after the other; B and C as functions of batch row, channel and token."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = torch.log1p(torch.exp(dt)) if delta_softplus else dt
    h, ys = [[[0] * A.shape[1] for _ in row] for row in u], torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            for t in range(u.shape[2]):
                y = 0
                for n in range(A.shape[1]):
                    step = dt[b, d, t]
                    h[b][d][n] = (
                        torch.exp(step * A[d, n]) * h[b][d][n] + step * weight(B, A, b, d, n, t) * u[b, d, t]
                    )
                    y = y + weight(C, A, b, d, n, t) * h[b][d][n]
                y = 2 * y.real if A.is_complex() else y
                ys[b, d, t] = y if D is None else y + D[d] * u[b, d, t]
    ys = ys if z is None else ys * z * torch.sigmoid(z)
    return ys, torch.stack([torch.stack([torch.stack(x) for x in row]) for row in h])


def weight(x, A, b, d, n, t):
    if x.ndim == 2:
        return x[d, n]
    x = x[b] if x.ndim == 3 else x[b, d // (A.shape[0] // x.shape[1])]
    return torch.complex(x[n, 2 * t], x[n, 2 * t + 1]) if A.is_complex() else x[n, t]


def scan_inputs(form="variable", number="real", full=True, dtype=torch.float64, sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    B, D, L, N = sizes
    deep = {torch.float64: torch.float64}.get(dtype, torch.float32)
    A = -torch.rand(D, N, dtype=deep) - 0.1
    A = torch.complex(A, 3 * torch.randn(D, N, dtype=deep)) if number == "complex" else A
    columns = 2 * L if number == "complex" else L
    shapes = {"static": (D, N), "variable": (B, N, columns), "grouped": (B, 2, N, columns)}
    forms = form.split("+") * 2
    b, c = (torch.randn(shapes[f], dtype=A.dtype if f == "static" else dtype) for f in forms[:2])
    given = {
        "u": torch.randn(B, D, L, dtype=dtype),
        "delta": torch.rand(B, D, L, dtype=dtype),
        "A": A,
        "B": b,
        "C": c,
    }
    if full:
        given |= {"D": torch.randn(D, dtype=deep), "z": torch.randn(B, D, L, dtype=dtype)}
        given |= {"delta_bias": torch.rand(D, dtype=deep), "delta_softplus": True}
    return given


FORMS = ["static", "variable", "grouped", "static+grouped", "variable+static"]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("number", ["real", "complex"])
@pytest.mark.parametrize("form", FORMS)
def test_scan_is_its_definition(form, number, full):
    given = scan_inputs(form, number, full, sizes=(2, 4, 5, 3))
    y, state = selective_scan_fn(**given, return_last_state=True)
    expected = scan_definition(**given)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(state, expected[1])


def gradients(function, given, names, *outputs):
    leaves = {n: given[n].detach().clone().requires_grad_() for n in names if n in given}
    made = function(**(given | leaves))
    made = made if isinstance(made, tuple) else (made,)
    torch.manual_seed(1)
    loss = sum((torch.randn(y.shape, dtype=y.dtype) * y).real.sum() for y in made)
    return made, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.mark.parametrize("number", ["real", "complex"])
@pytest.mark.parametrize("form", FORMS)
def test_scan_and_gradients_are_those_of_mamba_ssm(form, number):
    reference = peer("selective_scan_interface.py", "selective_scan_ref")
    given = scan_inputs(form, number, dtype=torch.float32)
    call = partial(selective_scan_fn, return_last_state=True)
    ours, theirs = (gradients(f, given, TENSORS) for f in (call, partial(reference, return_last_state=True)))
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for name, other in theirs[1].items():
        assert ours[1][name].dtype == other.dtype
        torch.testing.assert_close(ours[1][name], other, rtol=1e-4, atol=1e-4)


def step_inputs(form="plain", dtype=torch.float64, groups=2):
    """A token for `selective_state_update`: plain, with heads, or with heads that share a step size."""
    torch.manual_seed(0)
    B, H, D, N = 3, 4, 5, 6
    channels = (D,) if form == "plain" else (H, D)
    weights = (B, N) if form == "plain" else (B, groups, N)
    given = {
        "state": torch.randn(B, *channels, N, dtype=dtype),
        "x": torch.randn(B, *channels, dtype=dtype),
        "dt": torch.rand(B, *channels, dtype=dtype),
        "A": -torch.rand(*channels, N, dtype=dtype),
        "B": torch.randn(weights, dtype=dtype),
        "C": torch.randn(weights, dtype=dtype),
        "D": torch.randn(channels, dtype=dtype),
        "z": torch.randn(B, *channels, dtype=dtype),
        "dt_bias": torch.rand(channels, dtype=dtype),
        "dt_softplus": True,
    }
    if form == "tied":
        for name, axes in {"dt": 1, "dt_bias": 1, "A": 2}.items():
            x = given[name][(..., *[slice(1)] * axes)]
            given[name] = x.expand(*x.shape[:-axes], *[D, N][:axes])
    return given


def step_definition(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """The new state and y, by broadcasting."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (torch.log1p(torch.exp(dt)) if dt_softplus else dt)[..., None]
    if state.ndim == 4:
        B, C = (w.repeat_interleave(state.shape[1] // w.shape[1], 1) for w in (B, C))
    state = torch.exp(dt * A) * state + dt * B[..., None, :] * x[..., None]
    y = (state * C[..., None, :]).sum(-1)
    y = y if D is None else y + D * x
    return state, y if z is None else y * z * torch.sigmoid(z)


STEPS = ["plain", "heads", "tied"]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("form", STEPS)
def test_update_is_its_definition(form, full):
    given = step_inputs(form)
    given = given if full else {n: given[n] for n in ("state", "x", "dt", "A", "B", "C")}
    state, y = step_definition(**given)
    made = selective_state_update(**given)
    torch.testing.assert_close(made, y)
    torch.testing.assert_close(given["state"], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", STEPS)
def test_update_is_that_of_mamba_ssm(form, dtype):
    reference = peer("triton/selective_state_update.py", "selective_state_update_ref")
    ours, theirs = step_inputs(form, dtype), step_inputs(form, dtype)
    mine, other = selective_state_update(**ours), reference(**theirs)
    assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-1}
    torch.testing.assert_close(mine, other, **limit)
    torch.testing.assert_close(ours["state"], theirs["state"], **limit)


def test_update_writes_through_any_strides():
    given = step_inputs("heads")
    memory = torch.zeros(3, 5, 4, 6, dtype=torch.float64)
    turned = memory.transpose(1, 2).copy_(given["state"])
    y, expected = selective_state_update(**(given | {"state": turned})), selective_state_update(**given)
    assert torch.equal(y, expected) and torch.equal(memory.transpose(1, 2), given["state"])


@pytest.mark.parametrize("form", STEPS)
def test_update_moves_the_states_it_is_told_and_pads_the_rest(form):
    given = step_inputs(form)
    pool = torch.randn(7, *given["state"].shape[1:], dtype=torch.float64)
    before, at = pool.clone(), torch.tensor([5, -1, 2], dtype=torch.int32)
    given["x"][1] = given["z"][1] = given["B"][1] = float("nan")
    y = selective_state_update(**(given | {"state": pool}), state_batch_indices=at)
    state, expected = step_definition(**(given | {"state": before[at.clamp(min=0)]}))
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(pool[[5, 2]], state[[0, 2]])
    assert not y[1].any() and torch.equal(pool[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])


def chunk_inputs(full=True, dtype=torch.float64, G=2, sizes=(2, 21, 4, 8, 6)):
    torch.manual_seed(0)
    B, T, H, P, N = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        "x": torch.randn(B, T, H, P, dtype=dtype),
        "dt": torch.rand(B, T, H, dtype=dtype),
        "A": -torch.rand(H, dtype=wide) - 0.1,
        "B": torch.randn(B, T, G, N, dtype=dtype),
        "C": torch.randn(B, T, G, N, dtype=dtype),
        "chunk_size": 8,
    }
    if full:
        given |= {"D": torch.randn(H, P, dtype=wide), "z": torch.randn(B, T, H, P, dtype=dtype)}
        given |= {"dt_bias": torch.rand(H, dtype=wide), "dt_softplus": True}
    return given


def chunk_definition(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                     seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):  # fmt: skip
    """Token by token, by the definition of a step; y and all states."""
    (batch, T, H, P), N = x.shape, B.shape[-1]
    state = x.new_zeros(batch, H, P, N) if initial_states is None else initial_states
    index = torch.zeros(batch, 1) if seq_idx is None else torch.cat([seq_idx[:, :1] * 0, seq_idx], 1)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (torch.log1p(torch.exp(dt)) if dt_softplus else dt).clamp(*dt_limit)
    D = None if D is None else D.reshape(H, -1).expand(H, P)
    ys, states = [], []
    for t in range(T):
        if seq_idx is not None:
            state = state * (index[:, t] == index[:, t + 1])[:, None, None, None]
        gate = None if z is None else z[:, t]
        step = dt[:, t, :, None].expand(-1, -1, P)
        state, y = step_definition(state, x[:, t], step, A[:, None, None], B[:, t], C[:, t], D, gate)
        ys.append(y)
        states.append(state)
    return torch.stack(ys, 1), torch.stack(states, 1)


@pytest.mark.parametrize("full", [True, False])
def test_mamba2_is_its_definition(full):
    given = chunk_inputs(full)
    state = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    y, final = mamba_chunk_scan_combined(**given, initial_states=state, return_final_states=True)
    expected, states = chunk_definition(**given, initial_states=state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, states[:, -1])
    assert torch.equal(mamba_chunk_scan_combined(**given | {"chunk_size": 64}, initial_states=state), y)


@pytest.mark.parametrize("softplus", [True, False])
def test_mamba2_limits_the_step_size_and_its_gradient(softplus):
    given = chunk_inputs() | {"dt_softplus": softplus, "dt_limit": (0.3, 0.9)}
    given["dt"] = given["dt"] - 0.5
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    ours = gradients(mamba_chunk_scan_combined, given, names)
    theirs = gradients(lambda **g: chunk_definition(**g)[0], given, names)
    torch.testing.assert_close(ours[0][0], theirs[0][0])
    assert (theirs[1]["dt"] == 0).any()
    for name in names:
        torch.testing.assert_close(ours[1][name], theirs[1][name])


@pytest.mark.parametrize("state", [True, False])
def test_mamba2_keeps_documents_apart(state):
    given = chunk_inputs()
    index = torch.tensor([[0] * 9 + [1] * 1 + [2] * 11, [3] * 17 + [0] * 4], dtype=torch.int32)
    given |= {"seq_idx": index}
    if state:
        given["initial_states"] = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    call = partial(mamba_chunk_scan_combined, return_final_states=True)

    def expected(**tensors):
        y, states = chunk_definition(**tensors)
        return y, states[:, -1]

    ours, theirs = gradients(call, given, names), gradients(expected, given, names)
    for mine, other in zip((*ours[0], *ours[1].values()), (*theirs[0], *theirs[1].values()), strict=True):
        torch.testing.assert_close(mine, other)


def test_mamba2_returns_the_states_of_sequences():
    given = chunk_inputs(sizes=(1, 21, 4, 8, 6))
    bounds = torch.tensor([0, 9, 10, 21])
    index = torch.repeat_interleave(torch.arange(3), bounds.diff())[None].int()
    expected, states = chunk_definition(**given, seq_idx=index)
    call = partial(mamba_chunk_scan_combined, **given, cu_seqlens=bounds, return_varlen_states=True)
    y, each = call(seq_idx=index)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(each, states[0, bounds[1:] - 1])
    _, final, each = call(return_final_states=True, state_dtype=torch.bfloat16)
    assert each.dtype == torch.bfloat16 and each.shape == (3, 4, 8, 6)
    torch.testing.assert_close(final, states[:, -1])
    given["cu_seqlens"] = bounds  # without return_varlen_states it says nothing
    torch.testing.assert_close(
        mamba_chunk_scan_combined(**given), chunk_definition(**chunk_inputs(sizes=(1, 21, 4, 8, 6)))[0]
    )
    with pytest.raises(ValueError, match="`cu_seqlens` that agrees with `seq_idx`"):
        call(seq_idx=index * 0)


@pytest.mark.parametrize("full", [True, False])
def test_mamba2_and_its_gradients_are_those_of_mamba_ssm(full):
    refs = {
        n: peer(f"triton/ssd_{f}.py", n)
        for f, n in {
            "chunk_state": "chunk_state_ref",
            "state_passing": "state_passing_ref",
            "chunk_scan": "chunk_scan_ref",
        }.items()
    }
    reference = peer("triton/ssd_combined.py", "ssd_chunk_scan_combined_ref", **refs)
    given = chunk_inputs(full, torch.float32, sizes=(2, 24, 4, 8, 6))
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    ours, theirs = gradients(mamba_chunk_scan_combined, given, names), gradients(reference, given, names)
    torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=1e-4, atol=1e-4)
    for name, other in theirs[1].items():
        torch.testing.assert_close(ours[1][name], other, rtol=1e-3, atol=1e-3)


PLAIN = scan_inputs(dtype=torch.float32)
COMPLEX = scan_inputs("grouped", "complex", dtype=torch.float32)
TOKEN, HEADS, CHUNK = step_inputs(), step_inputs("heads"), chunk_inputs()
ERRORS = {
    "time before channels": (selective_scan_fn, PLAIN, {"delta": PLAIN["delta"].mT}, r"`delta` \[B, D, L\]"),
    "B of another length": (
        selective_scan_fn,
        PLAIN,
        {"B": PLAIN["B"][..., 1:]},
        r"`B` \[B, N, L\] of shape",
    ),
    "half of C": (selective_scan_fn, COMPLEX, {"C": COMPLEX["C"][..., :19]}, r"`C` \[B, G, N, 2L\] of shape"),
    "groups": (selective_scan_fn, COMPLEX, {"C": COMPLEX["C"].repeat(1, 2, 1, 1)}, "G dividing D = 6"),
    "D per state": (selective_scan_fn, PLAIN, {"D": torch.ones(5)}, r"`D` \[D\] of shape \(6,\)"),
    "a growing state": (
        selective_scan_fn,
        PLAIN,
        {"A": -PLAIN["A"], "impl": "triton"},
        "`Re A` <= 0 everywhere.*torch",
    ),
    "state of another size": (
        selective_state_update,
        TOKEN,
        {"state": HEADS["state"][:, 0, 1:]},
        r"`x` \[B, D\]",
    ),
    "A of one head": (selective_state_update, HEADS, {"A": TOKEN["A"]}, r"`A` \[H, D, N\]"),
    "groups of heads": (selective_state_update, HEADS, {"B": HEADS["B"].repeat(1, 3, 1)}, "G dividing H = 4"),
    "an expanded state": (
        selective_state_update,
        TOKEN,
        {"state": TOKEN["state"][:1].expand(3, -1, -1)},
        "of separate entries",
    ),
    "a matrix A": (mamba_chunk_scan_combined, CHUNK, {"A": CHUNK["A"][:, None]}, r"`A` \[H\]"),
    "C of other groups' tokens": (
        mamba_chunk_scan_combined,
        CHUNK,
        {"C": CHUNK["C"][:, 1:]},
        r"`C` \[B, T, G, N\]",
    ),
    "no chunk": (mamba_chunk_scan_combined, CHUNK, {"chunk_size": 0}, "`chunk_size` of at least 1"),
    "one index per row": (
        mamba_chunk_scan_combined,
        CHUNK,
        {"seq_idx": torch.zeros(2, dtype=torch.int32)},
        r"`seq_idx` \[B, T\]",
    ),
    "no bounds": (mamba_chunk_scan_combined, CHUNK, {"return_varlen_states": True}, "`cu_seqlens`"),
    "a negative limit": (
        mamba_chunk_scan_combined,
        CHUNK,
        {"dt": CHUNK["dt"] - 9, "dt_softplus": False, "dt_limit": (-1.0, 1.0)},
        "`dt` >= 0 everywhere",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    function, given, changes, pattern = ERRORS[name]
    with pytest.raises(ValueError, match=pattern):
        function(**(given | changes))


def test_dtypes_that_mean_nothing_are_refused():
    with pytest.raises(TypeError, match=r"`B` of dtype .*real: \[B, G, N, 2L\]"):
        selective_scan_fn(**(COMPLEX | {"B": torch.view_as_complex(COMPLEX["B"].unflatten(-1, (-1, 2)))}))
    with pytest.raises(TypeError, match="`selective_scan_step` takes a complex A"):
        selective_state_update(**(TOKEN | {"A": TOKEN["A"] + 0j}))
    with pytest.raises(TypeError, match="`selective_scan` takes complex poles"):
        mamba_chunk_scan_combined(**(CHUNK | {"A": CHUNK["A"] + 0j}))


def test_gradients_flow_through_the_state_of_an_update():
    given = step_inputs("heads")
    leaf = given.pop("state").requires_grad_()

    def loss(step):
        return torch.autograd.grad((step() ** 2).sum(), leaf)[0]

    def ours():
        state = leaf.clone()
        first = selective_state_update(state, **given)
        return first + selective_state_update(state, **given)

    def theirs():
        state, first = step_definition(leaf, **given)
        return first + step_definition(state, **given)[1]

    torch.testing.assert_close(loss(ours), loss(theirs))


@pytest.mark.parametrize("G", [1, 2, 4])
def test_one_pole_per_head_across_chunks_is_as_many_equal_ones(G, monkeypatch):
    given = chunk_inputs(G=G, sizes=(2, 150, 4, 4, 3))
    given["A"] *= 40  # forgets within a token at times
    given["initial_states"] = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    call = partial(mamba_chunk_scan_combined, return_final_states=True)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    ours = gradients(call, given, names)
    again = gradients(partial(call, impl="reference"), given, names)
    for mine, other in zip((*ours[0], *ours[1].values()), (*again[0], *again[1].values()), strict=True):
        torch.testing.assert_close(mine, other)
    monkeypatch.setattr(torch_impl, "SLAB", 1)  # a run for each chunk
    for mine, other in zip(ours[1].values(), gradients(call, given, names)[1].values(), strict=True):
        torch.testing.assert_close(mine, other)


def test_one_pole_per_head_is_causal_to_the_bit_and_stays_finite():
    given = chunk_inputs(dtype=torch.float32, sizes=(1, 100, 4, 8, 6))
    given["A"] *= 1e4
    y = mamba_chunk_scan_combined(**given)
    assert y.isfinite().all()
    later = {n: x.clone() for n, x in given.items() if isinstance(x, torch.Tensor) and x.ndim > 2}
    for x in later.values():
        x[:, 70:] = torch.rand_like(x[:, 70:]) * 100
    assert torch.equal(mamba_chunk_scan_combined(**(given | later))[:, :70], y[:, :70])
