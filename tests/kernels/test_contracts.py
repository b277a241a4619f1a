"""Every contract over every op and path. See prism_kernels/testing/contracts.py for what each promises."""

import itertools
import re

import pytest
import torch

from prism_kernels.testing import contracts, registry

pytestmark = pytest.mark.usefixtures("poisoned")
SPECS = {spec.name: spec for spec in registry()}
WIDE = torch.float64
GPU = torch.cuda.is_available()


def device_of(impl):
    return "cuda" if impl == "triton" and GPU else "cpu"


def paths(*extra, long=False):
    """(op, path) for every path that an op has.

    What takes `long` in the interpreter is `full` for "an op with ...": the same kernels on other cases.
    """
    pairs = [(s.name, p) for s in SPECS.values() for p in (*s.paths, *extra)]
    full = [long and impl == "triton" and re.search("[ _]with[ _]", op) is not None for op, impl in pairs]
    marked = [
        pytest.param(*pair, id="-".join(pair), marks=pytest.mark.full if slow else ())
        for pair, slow in zip(pairs, full, strict=True)
    ]
    return pytest.mark.parametrize("op, impl", marked)


def plain_case(spec, impl, dtype=WIDE, batch=2):
    """The first ordinary case that the path covers, preferably with several rows and tokens."""
    cases = [c for c in spec.cases(dtype) if not c.hostile and "cu_seqlens" not in c.tensors]
    cases = [c for c in cases if impl != "triton" or spec.on_triton(c)]
    return cases[0].to(device_of(impl))


def budget_matrix():  # every op, path, dtype and case
    for spec, dtype in itertools.product(SPECS.values(), (torch.float32, torch.bfloat16, torch.float16)):
        if dtype not in spec.dtypes:
            continue
        for impl, case in itertools.product(spec.paths, spec.cases(dtype)):
            if impl != "triton" or spec.on_triton(case):
                name = f"{spec.name}-{impl}-{str(dtype).removeprefix('torch.')}-{case.name}"
                yield pytest.param(spec, case, impl, id=name.replace(" ", "_"))


@pytest.mark.parametrize("spec, case, impl", list(budget_matrix()))
def test_error_stays_within_twice_plain_pytorch(spec, case, impl):
    contracts.within_budget(spec, case.to(device_of(impl)), impl)


@paths("reference")
def test_two_tokens_equal_the_definition(op, impl):
    if device_of(impl) == "cuda":
        pytest.skip("hand values are float64, which the interpreter covers")
    contracts.equals_definition(SPECS[op], impl)


@paths("reference", long=True)
def test_gradients_equal_finite_differences(op, impl):
    if device_of(impl) == "cuda":
        pytest.skip("float64 kernels are for the interpreter")
    contracts.gradients_are_right(SPECS[op], plain_case(SPECS[op], impl), impl)


@paths(long=True)
def test_ops_are_registered_rightly(op, impl):
    contracts.registered_rightly(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths(long=True)
def test_ops_compile_into_one_graph_for_any_length(op, impl):
    contracts.compiles_whole(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths()
def test_inputs_stay_untouched_and_backward_repeats(op, impl):
    contracts.leaves_inputs_alone(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths()
def test_any_strides_do(op, impl):
    contracts.takes_any_strides(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths()
def test_runs_repeat_to_the_bit(op, impl):
    contracts.repeats_to_the_bit(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths("reference")
def test_autocast_changes_no_bit(op, impl):
    contracts.same_under_autocast(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths()
def test_second_order_gradients_raise(op, impl):
    contracts.second_order_raises(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


@paths(long=True)
def test_training_ends_where_the_reference_ends(op, impl):
    contracts.trains_like_reference(SPECS[op], plain_case(SPECS[op], impl, torch.float32), impl)


def sequence_paths(packed=False):
    pairs = [(s.name, p) for s in SPECS.values() for p in s.paths if s.state and (s.packed or not packed)]
    if packed:
        pairs = [(op, impl) for op, impl in pairs if impl != "triton" or covers_packing(SPECS[op])]
    return pytest.mark.parametrize("op, impl", pairs, ids=map("-".join, pairs))


def covers_packing(spec):
    packed = [c for c in spec.cases(WIDE) if "cu_seqlens" in c.tensors]
    return any(spec.on_triton(c) for c in packed)


@sequence_paths()
@pytest.mark.parametrize("where", ["after one token", "in the middle"])
def test_split_with_carried_state_equals_the_whole(op, impl, where):
    if device_of(impl) == "cuda":
        pytest.skip("float64 kernels are for the interpreter")
    case = plain_case(SPECS[op], impl)
    T = case.tensors[SPECS[op].time_inputs[0]].shape[1]
    contracts.split_equals_whole(SPECS[op], case, impl, 1 if where == "after one token" else T // 2)


@sequence_paths()
def test_the_past_never_sees_the_future(op, impl):
    case = plain_case(SPECS[op], impl, torch.float32)
    T = case.tensors[SPECS[op].time_inputs[0]].shape[1]
    for cut in {1, T // 2, T - 1}:
        contracts.causal_to_the_bit(SPECS[op], case, impl, cut)


@sequence_paths()
def test_a_row_alone_equals_the_row_in_a_batch(op, impl):
    dtype = torch.float32 if device_of(impl) == "cuda" else WIDE
    contracts.rows_are_independent(SPECS[op], plain_case(SPECS[op], impl, dtype), impl)


@sequence_paths(packed=True)
def test_packed_rows_equal_separate_rows(op, impl):
    dtype = torch.float32 if device_of(impl) == "cuda" else WIDE
    contracts.packed_equals_separate(SPECS[op], plain_case(SPECS[op], impl, dtype), impl)


@pytest.mark.parametrize("op", [s.name for s in SPECS.values() if s.step])
def test_steps_equal_the_forward_pass(op):
    for case in SPECS[op].cases(WIDE):
        if "cu_seqlens" not in case.tensors:
            contracts.step_equals_forward(SPECS[op], case)


ERRORS = [(s.name, e.name) for s in SPECS.values() for e in s.errors()]


@pytest.mark.parametrize("op, name", ERRORS, ids=[f"{o}-{n}".replace(" ", "_") for o, n in ERRORS])
def test_bad_input_is_refused_with_advice(op, name):
    error = next(e for e in SPECS[op].errors() if e.name == name)
    with pytest.raises(error.error) as caught:
        error.call()
    assert re.search(error.pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_every_op_with_kernels_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for spec in SPECS.values():
        if "triton" in spec.paths:
            case = next(c for c in spec.cases(torch.float32) if spec.on_triton(c))
            with pytest.raises(ValueError, match="CUDA tensors for impl='triton'.*TRITON_INTERPRET=1"):
                spec.run(case, "triton")
