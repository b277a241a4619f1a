"""Every launch configuration that ships, against the float64 oracle on a GPU; and that none is left out."""

from itertools import product

import pytest
import torch

from benchmarks import compile_report
from prism_kernels._core import configs
from prism_kernels._core.runtime import record_launches
from prism_kernels.gated_delta_rule import launch
from prism_kernels.testing import contracts, registry
from prism_kernels.testing.budgets import LIMIT, budget_rows, forward_backward
from tests.kernels.configurations import DTYPES, UPDATES, configuration_of, configurations, rows, update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARD = configs.card_of(torch.device("cuda", 0)).architecture if torch.cuda.is_available() else None
SPECS = {spec.name: spec for spec in registry()}
ALL = list(configurations())


@pytest.mark.gpu
@pytest.mark.parametrize("configuration", ALL, ids=lambda c: f"{c.op}-{c.name}".replace(" ", "_"))
def test_every_configuration_is_within_budget(configuration):
    rows = budget_rows(SPECS[configuration.op], configuration.make().to("cuda"), "triton")
    bad = [str(row) for row in rows if not row.ratio_if_random <= LIMIT]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("rows", list(rows(CARD)), ids=str)
def test_rows_of_every_architecture_are_within_budget(rows, monkeypatch):
    monkeypatch.setattr(launch, "segment_length", lambda programs, tokens, C: C)  # launches all kernels
    with configs.pretend(rows.architecture):
        measured = budget_rows(SPECS[launch.OP], rows.case().to(DEVICE), "triton")
    bad = [str(row) for row in measured if not row.ratio_if_random <= LIMIT]
    assert not bad, "\n".join(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes, dtype", list(product(UPDATES, DTYPES)))
def test_steps_of_the_convolution(sizes, dtype):
    expected = update(*sizes, torch.float64, "cpu", "torch")
    bound = 8 * torch.finfo(dtype).eps
    for got, oracle in zip(update(*sizes, dtype, "cuda", "triton"), expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), oracle, rtol=bound, atol=bound * oracle.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("op", [s.name for s in SPECS.values() if s.step and "triton" in s.paths])
def test_steps_equal_the_forward_pass(op):
    spec = SPECS[op]
    case = next(c for c in spec.cases(torch.float32) if spec.on_triton(c) and "cu_seqlens" not in c.tensors)
    contracts.step_equals_forward(spec, case.to("cuda"))


@pytest.fixture(scope="module")
def tested() -> set[tuple]:
    """What the tests above and the contracts launch."""
    calls = [(SPECS[c.op], c.make()) for c in ALL]
    calls += [(s, c) for s, d in product(SPECS.values(), DTYPES) for c in s.cases(d) if s.on_triton(c)]
    with record_launches() as launches:
        for spec, case in calls:
            if "triton" in spec.paths:
                forward_backward(lambda c, spec=spec: spec.run(c, "triton"), case)
        for sizes, dtype in product(UPDATES, DTYPES):
            update(*sizes, dtype, "cpu", "triton")
    return {configuration_of(launch) for launch in launches}


def test_what_the_compile_report_compiles_is_tested_on_a_gpu(tested):
    shipped = set()
    for _, call in compile_report.cases():
        with record_launches() as launches:
            outputs = [y for y in call() if isinstance(y, torch.Tensor) and y.requires_grad]
            torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
        shipped |= {configuration_of(launch) for launch in launches}
    missing = shipped - tested
    assert not missing, "\n".join(map(str, sorted(missing, key=str)))


def test_every_kernel_is_tested_in_every_dtype(tested):
    kernels = {(name, dtype) for name, dtype, *_ in tested}
    names = {name for name, _ in kernels}
    scans = {"scan_forward", "scan_backward", "carry_kernel"}  # on what is float32 whatever the inputs are
    assert scans | {"recurrent_kernel", "states_kernel", "rms_norm_bwd_kernel"} <= names
    assert kernels >= set(product(names - scans, map(str, DTYPES)))
