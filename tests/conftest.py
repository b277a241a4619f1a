"""Before anything else: interpret Triton kernels where there is no GPU; seeds and poisoned memory for all."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must stand before any kernel is imported

import pytest

from prism_kernels.testing.guards import poisoned_memory

torch.set_num_threads(1)  # threads cost more than they bring at these sizes, and pytest-xdist uses the cores

with contextlib.suppress(ImportError):  # a machine that is borrowed for its GPU may lack hypothesis
    from hypothesis import settings

    settings.register_profile("dev", deadline=None, print_blob=True)
    settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    on_gpu = torch.cuda.is_available()
    for item in items:
        path = item.callspec.params.get("impl") if hasattr(item, "callspec") else None
        if on_gpu and path == "triton" and item.path.name == "test_contracts.py":
            item.add_marker("gpu")  # interpreted elsewhere
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield
