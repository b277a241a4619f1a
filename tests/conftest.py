"""Before anything else: interpret Triton kernels where there is no GPU; seeds and poisoned memory for all."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must stand before any kernel is imported

import pytest
from hypothesis import settings

from prism_kernels.testing.guards import poisoned_memory

torch.set_num_threads(1)  # threads cost more than they bring at these sizes, and pytest-xdist uses the cores

settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield
