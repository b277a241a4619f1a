"""`selective_scan_step` on a pool of states: rows name their state, -1 is padding, in place or not."""

from functools import partial

import pytest
import torch

from prism_kernels import selective_scan_step

S, B, H, P, N = 7, 4, 4, 3, 5


def inputs(number="complex", weights="token", full=True, dtype=torch.float64):
    torch.manual_seed(0)
    A = -torch.rand(H, N, dtype=dtype) - 0.1
    A = A if number == "real" else torch.complex(A, 3 * torch.randn(H, N, dtype=dtype))
    draw = partial(torch.randn, dtype=A.dtype)
    shape = {"token": (B, 1, 2, N), "head": (H, N), "channel": (1, H, P, N)}[weights]
    given = {"u": torch.randn(B, H, P, dtype=dtype), "dt": torch.rand(B, H, dtype=dtype), "A": A}
    given |= {"B": draw(shape), "C": draw(shape), "state": draw(S, H, P, N)}
    if full:
        given |= {"D": torch.randn(H, dtype=dtype), "z": torch.randn(B, H, P, dtype=dtype)}
        given |= {"dt_bias": torch.rand(H, dtype=dtype)}
    if number == "pairs":
        given |= {n: torch.view_as_real(given[n]) for n in "ABC"} | {
            "state": torch.view_as_real(given["state"])
        }
    return given


AT = torch.tensor([5, -1, 0, 2])
LIVE = [0, 2, 3]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("weights", ["token", "head", "channel"])
@pytest.mark.parametrize("number", ["real", "complex", "pairs"])
def test_rows_move_the_states_they_name(number, weights, inplace):
    given = inputs(number, weights)
    pool = given.pop("state")
    expected = selective_scan_step(pool[AT.clamp(min=0)], **given)
    mine, before = pool.clone(), pool.clone()
    y, new = selective_scan_step(mine, **given, state_indices=AT, inplace=inplace)
    torch.testing.assert_close(y[LIVE], expected.y[LIVE])
    assert not y[1].any()
    torch.testing.assert_close(new[AT[LIVE]], expected.state[LIVE])
    assert torch.equal(new[[1, 3, 4, 6]], before[[1, 3, 4, 6]])
    assert (new is mine) == inplace and (inplace or torch.equal(mine, before))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("at", [[-1, -1, -1, -1], [-1, -1, -1, 0]])
def test_what_padding_holds_goes_nowhere(at, inplace):
    given = inputs("real")
    pool, at = given.pop("state"), torch.tensor(at)
    for name in ("u", "dt", "B", "C", "z"):
        given[name][at < 0] = float("nan")
    mine = pool.clone()
    y, new = selective_scan_step(mine, **given, state_indices=at, inplace=inplace)
    assert not y[at < 0].any() and new.isfinite().all()
    assert torch.equal(new[1:], pool[1:]) and torch.equal(new[0], pool[0]) == bool(at[-1] < 0)


def test_a_step_size_that_its_bias_would_turn_does_not_matter_in_padding():
    given = inputs("real", full=False)
    given["dt"] += 1
    given["dt"][1] = 0
    y, _ = selective_scan_step(**given, dt_bias=torch.full((H,), -0.5, dtype=torch.float64), state_indices=AT)
    assert not y[1].any()


@pytest.mark.parametrize("weights", ["token", "head"])
def test_gradients_are_those_of_the_rows(weights):
    given = inputs("complex", weights)
    leaves = {n: x.requires_grad_() for n, x in given.items()}
    names = [n for n in leaves if n != "state"]

    def gradients(step):
        y, new = step()
        torch.manual_seed(1)
        loss = (torch.randn(y.shape) * y).sum() + (torch.randn(new.shape) * new).real.sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    def by_rows():
        rest = {n: leaves[n] for n in names}
        out = selective_scan_step(leaves["state"][AT.clamp(min=0)], **rest)
        live = torch.zeros(S, dtype=torch.bool).index_fill(0, AT[LIVE], True)[:, None, None, None]
        spread = torch.zeros_like(leaves["state"]).index_copy(0, AT[LIVE], out.state[LIVE])
        return out.y * (AT >= 0)[:, None, None], torch.where(live, spread, leaves["state"])

    ours = gradients(lambda: selective_scan_step(**leaves, state_indices=AT))
    for mine, expected in zip(ours, gradients(by_rows), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_pool_keeps_its_dtype_and_strides():
    given = inputs("real", dtype=torch.float32)
    memory = torch.zeros(H, S, P, N, dtype=torch.bfloat16)
    pool = memory.transpose(0, 1).copy_(given.pop("state"))
    expected = selective_scan_step(pool.float().contiguous(), **given, state_indices=AT)
    y, new = selective_scan_step(pool, **given, state_indices=AT, inplace=True)
    assert new is pool and torch.equal(y, expected.y)
    assert torch.equal(memory.transpose(0, 1), expected.state.bfloat16())


def test_a_step_on_a_pool_compiles_whole():
    given = inputs("real", dtype=torch.float32)
    step = torch.compile(selective_scan_step, fullgraph=True, backend="aot_eager")
    pools = [given["state"].clone() for _ in range(2)]
    results = [
        f(**(given | {"state": pool}), state_indices=AT, inplace=True).y
        for f, pool in zip((step, selective_scan_step), pools, strict=True)
    ]
    assert torch.equal(*results) and torch.equal(*pools)


GIVEN = inputs("real")
BAD = {
    "an index beyond the pool": ({"state_indices": AT + 3}, "below 7, the number of states, got 8"),
    "an index given twice": ({"state_indices": AT * 0}, r"`state_indices` that differ, got \[0, 0, 0, 0\]"),
    "too few": ({"state_indices": AT[:3]}, r"`state_indices` \[B\] of shape \(4,\), got \(3,\)"),
    "a state per row": ({"state_indices": AT, "state": GIVEN["state"][:, :3]}, r"`state` \[S, H, P, N\]"),
    "no state": ({"state_indices": AT, "state": GIVEN["state"][:0]}, "at least one state"),
    "weights of another batch": ({"state_indices": AT, "B": GIVEN["B"][:1]}, "`B`"),
    "entries that overlap": (
        {"state_indices": AT, "state": GIVEN["state"][:1].expand(S, -1, -1, -1), "inplace": True},
        "a `state` of separate entries",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changes, pattern = BAD[name]
    with pytest.raises(ValueError, match=pattern):
        selective_scan_step(**(GIVEN | changes))


def test_an_index_of_floats_is_refused():
    with pytest.raises(TypeError, match="`state_indices` of dtype int32"):
        selective_scan_step(**GIVEN, state_indices=AT.double())
