"""Properties over drawn shapes, cuts and lengths, on the torch path in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels.testing import contracts, registry
from prism_kernels.testing.budgets import forward_backward
from tests.strategies import FACTORIES, LENGTHS, cases

SPECS = {spec.name: spec for spec in registry()}
LINEAR = {
    "chunk_gated_delta_rule": ("v", "initial_state"),
    "fused_recurrent_gated_delta_rule": ("v", "initial_state"),
    "selective_scan": ("u", "initial_state"),
    "causal_conv1d": ("x", "initial_state"),
}
every_op = pytest.mark.parametrize("op", FACTORIES)


def outputs_and_gradients(spec, case, impl):
    run = (lambda c: spec.reference(c, None)) if impl == "reference" else (lambda c: spec.run(c, impl))
    outputs, gradients = forward_backward(run, case)
    return {**outputs, **gradients}


@every_op
@settings(max_examples=12)
@given(data=st.data())
def test_the_torch_path_equals_the_definition_for_any_shape(op, data):
    case = data.draw(cases(op, max_time=40))
    got, expected = (outputs_and_gradients(SPECS[op], case, impl) for impl in ("torch", "reference"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_op
@settings(max_examples=12)
@given(data=st.data())
def test_any_cut_with_carried_state_gives_the_whole(op, data):
    case = data.draw(cases(op, min_time=2))
    T = case.tensors[SPECS[op].time_inputs[0]].shape[1]
    contracts.split_equals_whole(SPECS[op], case, "torch", data.draw(st.integers(1, T - 1)))


@every_op
@settings(max_examples=12)
@given(data=st.data(), lengths=LENGTHS)
def test_packed_sequences_of_any_length_equal_separate_ones(op, data, lengths):
    spec = SPECS[op]
    argument, result = spec.state
    case = data.draw(cases(op, batch=1, min_time=sum(lengths), max_time=sum(lengths)))
    states = torch.cat([(i + 1.0) * case.tensors[argument] for i in range(len(lengths))])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = spec.run(case.with_tensors(cu_seqlens=bounds, **{argument: states}), "torch")
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = states[i : i + 1]
        if start == end:
            torch.testing.assert_close(packed[result][i : i + 1], state)
            continue
        moved = {n: case.tensors[n][:, start:end] for n in spec.time_inputs if n in case.tensors}
        alone = spec.run(case.with_tensors(**moved, **{argument: state}), "torch")
        for name, value in alone.items():
            part = packed[name][i : i + 1] if name == result else packed[name][:, start:end]
            torch.testing.assert_close(part, value, rtol=1e-9, atol=1e-10)


@every_op
@settings(max_examples=8)
@given(data=st.data(), factor=st.floats(-8, 8))
def test_outputs_are_linear_in_input_and_state(op, data, factor):
    case = data.draw(cases(op))
    scaled = case.with_tensors(**{n: factor * case.tensors[n] for n in LINEAR[op]})
    once, more = SPECS[op].run(case, "torch"), SPECS[op].run(scaled, "torch")
    for name in once:
        torch.testing.assert_close(more[name], factor * once[name], rtol=1e-9, atol=1e-10)
