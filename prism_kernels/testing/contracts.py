"""What every op promises, each promise written once. A contract raises AssertionError with the reason.

Most take `(spec, case, impl)`; the case is small, in float64 where the promise is about the algorithm
and in a narrower dtype where it is about bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import guards
from .budgets import budget_rows, cotangents, differentiable, forward_backward
from .spec import Case, OpSpec, Outputs


def equals_definition(spec: OpSpec, impl: str) -> None:
    """Two tokens worked out by hand come out the same."""
    case, expected = spec.hand()
    got = spec.reference(case, None) if impl == "reference" else spec.run(case, impl)
    _close(got, expected, 1e-12, "hand-computed values")


def within_budget(spec: OpSpec, case: Case, impl: str) -> None:
    """Outputs, final state and gradients are finite and within the error budget."""
    bad = [str(row) for row in budget_rows(spec, case, impl) if not row.ok]
    assert not bad, "\n".join(bad)


def gradients_are_right(spec: OpSpec, case: Case, impl: str) -> None:
    """Gradients agree with finite differences in float64."""
    names = [n for n, t in case.tensors.items() if differentiable(t)]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        moved = case.with_tensors(**dict(zip(names, tensors, strict=True)))
        got = spec.reference(moved, None) if impl == "reference" else spec.run(moved, impl)
        return tuple(got.values())

    leaves = [case.tensors[n].clone().requires_grad_() for n in names]
    # steps leave room to the bounds of decays and step sizes, which the cases of this contract keep off
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


def registered_rightly(spec: OpSpec, case: Case, impl: str) -> None:
    """torch.library.opcheck passes: schema, autograd, fakes, ahead-of-time dispatch; two layouts."""
    for layout in (lambda x: x, guards.permuted):
        leaves = {
            n: layout(t).detach().requires_grad_(differentiable(t) and not t.is_complex())
            for n, t in case.tensors.items()
        }
        for op, args in spec.opcheck(case.with_tensors(**leaves), impl):
            torch.library.opcheck(op, args)


def compiles_whole(spec: OpSpec, case: Case, impl: str) -> None:
    """One graph, forward and backward, for any T without recompiling."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda c: spec.run(c, impl), fullgraph=True, dynamic=True, backend="aot_eager")
    T = case.tensors[spec.time_inputs[0]].shape[1] if spec.time_inputs else 0
    lengths = [T, T - 1, T - 2] if spec.time_inputs and T > 4 and "cu_seqlens" not in case.tensors else [T]
    for i, length in enumerate(lengths):
        part = _cut(spec, case, 0, length) if spec.time_inputs else case
        part = part.with_tensors(**{n: t.contiguous().clone() for n, t in part.tensors.items()})
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = forward_backward(compiled, part)
        _close_pair(got, forward_backward(lambda c: spec.run(c, impl), part), 1e-12, "eager")


def leaves_inputs_alone(spec: OpSpec, case: Case, impl: str) -> None:
    """No input is written, in value or version; a second backward gives the same gradients."""
    inputs = {n: t.clone().requires_grad_(differentiable(t)) for n, t in case.tensors.items()}
    before = {n: (t.detach().clone(), t._version) for n, t in inputs.items()}
    outputs = spec.run(case.with_tensors(**inputs), impl)
    loss = sum(y.abs().square().sum() for y in outputs.values())
    leaves = [t for t in inputs.values() if t.requires_grad]
    once = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, leaves, allow_unused=True)
    for a, b in zip(once, again, strict=True):
        assert a is None or torch.equal(a, b), "a second backward gave other gradients"
    for name, (value, version) in before.items():
        assert torch.equal(inputs[name].detach(), value), f"`{name}` was written to"
        assert inputs[name]._version == version, f"`{name}` changed version"
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    for name, y in outputs.items():
        assert y.numel() == 0 or y.untyped_storage().data_ptr() not in own, f"`{name}` aliases an input"


def takes_any_strides(spec: OpSpec, case: Case, impl: str) -> None:
    """Permuted, sliced, NaN-framed and expanded inputs give what contiguous ones give."""
    expected = forward_backward(lambda c: spec.run(c, impl), case)
    for name, layout in guards.LAYOUTS.items():
        moved = case.with_tensors(**{n: layout(t) for n, t in case.tensors.items()})
        _close_pair(
            forward_backward(lambda c: spec.run(c, impl), moved), expected, 1e-12, f"contiguous ({name})"
        )
    rows = _row(spec, case, 0)
    wide, tall = {}, {}
    for n, t in rows.tensors.items():
        wide[n] = t.expand(2, *t.shape[1:]) if n in _batched(spec) else t
        tall[n] = wide[n].contiguous()
    got, expected = spec.run(case.with_tensors(**wide), impl), spec.run(case.with_tensors(**tall), impl)
    _close(got, expected, 1e-12, "contiguous (expanded)")


def split_equals_whole(spec: OpSpec, case: Case, impl: str, cut: int) -> None:
    """Two halves with the state carried give the whole, gradients included."""
    argument, result = spec.state
    T = case.tensors[spec.time_inputs[0]].shape[1]

    def halves(c: Case) -> Outputs:
        parts = [(0, cut), (cut, T)]
        if spec.reverse_time(c):
            parts.reverse()
        pieces, state = {}, c.tensors.get(argument)
        for start, end in parts:
            piece = _cut(spec, c, start, end)
            piece = piece if state is None else piece.with_tensors(**{argument: state})
            pieces[start] = spec.run(piece, impl)
            state = pieces[start][result]
        time = {n: torch.cat([pieces[0][n], pieces[cut][n]], 1) for n in pieces[0] if n != result}
        return {**time, result: state}

    whole = forward_backward(lambda c: spec.run(c, impl), case)
    _close_pair(forward_backward(halves, case), whole, 1e-9, "the whole")


def step_equals_forward(spec: OpSpec, case: Case) -> None:
    """T steps give what one call over T tokens gives."""
    argument, result = spec.state
    T = case.tensors[spec.time_inputs[0]].shape[1]
    order = reversed(range(T)) if spec.reverse_time(case) else range(T)
    whole, state = spec.run(case, None), case.tensors.get(argument)
    for t in order:
        outputs, state = spec.step(_cut(spec, case, t, t + 1), state)
        for name, y in outputs.items():
            _close({name: y}, {name: whole[name][:, t : t + 1]}, 1e-10, f"the forward pass at t = {t}")
    _close({result: state}, {result: whole[result]}, 1e-10, "the forward pass")


def causal_to_the_bit(spec: OpSpec, case: Case, impl: str, cut: int) -> None:
    """Other inputs from `cut` on leave every output before `cut` bit-identical."""
    backward = spec.reverse_time(case)
    later = slice(None, cut) if backward else slice(cut, None)
    earlier = slice(cut, None) if backward else slice(None, cut)
    changed = {}
    for name in spec.time_inputs:
        if name in case.tensors:
            changed[name] = case.tensors[name].clone()
            changed[name][:, later] = changed[name][:, later].flip(1) * 1.5
    before, after = spec.run(case, impl), spec.run(case.with_tensors(**changed), impl)
    for name in before:
        if spec.state is None or name != spec.state[1]:
            assert torch.equal(before[name][:, earlier], after[name][:, earlier]), f"`{name}` saw the future"


def rows_are_independent(spec: OpSpec, case: Case, impl: str) -> None:
    """A row alone gives what it gives in a batch, gradients included."""
    batch, grads = forward_backward(lambda c: spec.run(c, impl), case)
    weights = cotangents(batch)
    names = [n for n in _batched(spec) if n in case.tensors]
    for i in range(case.tensors[names[0]].shape[0]):
        own = {n: w[i : i + 1] for n, w in weights.items()}
        alone, own_grads = forward_backward(lambda c: spec.run(c, impl), _row(spec, case, i), own)
        _close(alone, {n: y[i : i + 1] for n, y in batch.items()}, 1e-11, f"row {i} in the batch")
        expected = {f"d{n}": grads[f"d{n}"][i : i + 1] for n in names}
        _close(own_grads, expected, 1e-11, f"row {i} in the batch")


def packed_equals_separate(spec: OpSpec, case: Case, impl: str) -> None:
    """Packed rows (an empty one among them, NaN after the last) give what each gives alone."""
    time = [n for n in spec.time_inputs if n in case.tensors]
    rows = [_row(spec, case, i) for i in range(case.tensors[time[0]].shape[0])]
    lengths = [r.tensors[time[0]].shape[1] - 2 * i for i, r in enumerate(rows)]
    rows = [_cut(spec, r, 0, n) for r, n in zip(rows, lengths, strict=True)]
    packed = {}
    for name in time:
        pieces = [r.tensors[name] for r in rows]
        packed[name] = torch.cat([*pieces, torch.full_like(pieces[0][:, :3], float("nan"))], 1)
    cu = torch.tensor([0, lengths[0], *torch.tensor(lengths).cumsum(0).tolist()])  # the second is empty
    tensors = {**case.tensors, **packed, "cu_seqlens": cu.to(case.tensors[time[0]].device)}
    argument, result = spec.state or (None, None)
    if argument in case.tensors:
        state = case.tensors[argument]
        tensors[argument] = torch.cat([state[:1], torch.ones_like(state[:1]), state[1:]])
    got, grads = forward_backward(lambda c: spec.run(c, impl), case.with_tensors(**tensors))
    start = 0
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = spec.run(row, impl)
        state = i if i == 0 else i + 1
        for name, y in got.items():
            part = y[state : state + 1] if name == result else y[:, start : start + length]
            _close({name: part}, {name: alone[name]}, 1e-10, f"sequence {i} alone")
        start += length
    for name, y in got.items():
        assert name == result or not y[:, start:].any(), f"`{name}` is not zero after the last sequence"
    for name, g in grads.items():
        assert torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all(), f"{name} saw padding"
    if argument in case.tensors:
        assert torch.equal(got[result][1].to(tensors[argument].dtype), tensors[argument][1]), "empty sequence"


def repeats_to_the_bit(spec: OpSpec, case: Case, impl: str, times: int = 3) -> None:
    """The same call gives the same bits, forward and backward."""
    first = forward_backward(lambda c: spec.run(c, impl), case)
    for _ in range(times - 1):
        again = forward_backward(lambda c: spec.run(c, impl), case)
        for a, b in zip(first, again, strict=True):
            for name in a:
                assert torch.equal(a[name], b[name]), f"`{name}` differs between two runs"


def same_under_autocast(spec: OpSpec, case: Case, impl: str) -> None:
    """Inside an autocast region an op gives the bits it gives outside, on every path."""
    device = next(iter(case.tensors.values())).device.type
    expected = forward_backward(lambda c: spec.run(c, impl), case)
    with torch.autocast(device_type=device, dtype=torch.bfloat16):
        got = forward_backward(lambda c: spec.run(c, impl), case)
    for a, b in zip(got, expected, strict=True):
        for name in a:
            assert a[name].dtype == b[name].dtype, f"`{name}` is {a[name].dtype} under autocast"
            assert torch.equal(a[name], b[name]), f"`{name}` differs under autocast"


def second_order_raises(spec: OpSpec, case: Case, impl: str) -> None:
    """Differentiating a gradient is an error, not a silent constant."""
    leaves = {n: t.clone().requires_grad_(differentiable(t)) for n, t in case.tensors.items()}
    outputs = spec.run(case.with_tensors(**leaves), impl)
    loss = sum(y.abs().square().sum() for y in outputs.values())
    wrt = [t for t in leaves.values() if t.requires_grad]
    grads = torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True)
    try:
        torch.autograd.grad(sum(g.abs().sum() for g in grads if g is not None), wrt, allow_unused=True)
    except NotImplementedError as error:
        assert "first-order" in str(error), str(error)
    else:
        raise AssertionError("a second-order gradient came back")


def trains_like_reference(spec: OpSpec, case: Case, impl: str, steps: int = 32) -> None:
    """32 steps of gradient descent with a path end where the reference ends."""
    fixed = set(spec.bounded)

    def train(run: Callable[[Case], Outputs]) -> tuple[list[float], list[Tensor]]:
        free = {
            n: t.clone().requires_grad_()
            for n, t in case.tensors.items()
            if differentiable(t) and n not in fixed
        }
        optimiser = torch.optim.SGD(free.values(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(steps):
            outputs = run(case.with_tensors(**free))
            loss = sum((y - 0.5).abs().square().mean() for y in outputs.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in free.values()]

    losses, parameters = train(lambda c: spec.run(c, impl))
    expected_losses, expected = train(lambda c: spec.reference(c, None))
    assert losses[-1] < losses[0], "the loss did not fall"
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True))
    assert worst < 1e-4, f"losses part by {worst:.1e}"
    for a, b in zip(parameters, expected, strict=True):
        gap = ((a - b).norm() / b.norm()).item()
        assert gap < 1e-4, f"parameters part by {gap:.1e}"


def _batched(spec: OpSpec) -> list[str]:
    return [*spec.time_inputs, *([spec.state[0]] if spec.state else [])]


def _row(spec: OpSpec, case: Case, i: int) -> Case:
    names = [n for n in _batched(spec) if n in case.tensors]
    return case.with_tensors(**{n: case.tensors[n][i : i + 1] for n in names})


def _cut(spec: OpSpec, case: Case, start: int, end: int) -> Case:
    T = case.tensors[spec.time_inputs[0]].shape[1]
    names = [n for n in spec.time_inputs if n in case.tensors and case.tensors[n].shape[1] == T]  # not static
    return case.with_tensors(**{n: case.tensors[n][:, start:end] for n in names})


def _close_pair(
    got: tuple[Outputs, Outputs], expected: tuple[Outputs, Outputs], bound: float, what: str
) -> None:
    for a, b in zip(got, expected, strict=True):
        _close(a, b, bound, what)


def _close(got: Outputs, expected: Outputs, bound: float, what: str) -> None:
    """Relative to the largest entry; `bound` is for float64 and scales with eps for others."""
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape, f"`{name}` has shape {tuple(a.shape)}, {what} {tuple(b.shape)}"
        scale = torch.finfo(a.dtype).eps / torch.finfo(torch.float64).eps
        gap = (a - b).abs().max().item() if a.numel() else 0.0
        peak = b.abs().max().item() if b.numel() else 0.0
        assert gap <= bound * scale * max(peak, 1.0), (
            f"`{name}` is {gap:.2e} away from {what} (peak {peak:.2e})"
        )
