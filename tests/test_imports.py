"""Importing is inert: quick, silent, and possible without Triton, a GPU or any extra."""

import subprocess
import sys

HARD = {"torch", "triton", "einops", "numpy", "prism_kernels", "prism_models"}
EXTRAS = "lightning jsonargparse torchmetrics sklearn aeon matplotlib rich transformers safetensors"

BLOCKER = """
import sys
class Without:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {names!r}:
            found = (f.find_spec(name, path, target) for f in self.finders if hasattr(f, "find_spec"))
            return next((spec for spec in found if spec is not None), None)
sys.meta_path[:] = [Without(list(sys.meta_path))]
"""


def python(code, blocked=""):
    """Run `code` in a fresh interpreter in which `blocked` is not installed; return its output."""
    names = set(blocked.split())
    script = (BLOCKER.format(names=names) if names else "") + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_prints_nothing_and_loads_no_triton():
    code = "import prism_kernels, sys; assert 'triton' not in sys.modules, 'triton was imported'"
    assert python("import torch") == python(code)


def test_import_costs_little_more_than_torch():
    code = "import torch, time; t = time.perf_counter(); import prism_kernels; print(time.perf_counter() - t)"
    assert min(float(python(code)[0]) for _ in range(3)) <= 0.2


def test_ops_work_where_triton_cannot_be_imported():
    code = """
import torch, prism_kernels as pk
q = torch.randn(1, 5, 2, 8)
beta = torch.rand(1, 5, 2)
assert pk.chunk_gated_delta_rule(q, q, q, -beta, beta).o.shape == q.shape
A = torch.complex(-torch.rand(2, 4), torch.rand(2, 4))
assert pk.selective_scan(q, beta, A, A, A).y.shape == q.shape
assert pk.causal_conv1d(torch.randn(1, 5, 8), torch.randn(8, 4)).y.shape == (1, 5, 8)
"""
    python(code, blocked="triton")


def test_forcing_triton_without_triton_says_what_to_install():
    code = """
import torch, prism_kernels as pk
try:
    pk.causal_conv1d(torch.randn(1, 5, 8), torch.randn(8, 4), impl="triton")
except ValueError as error:
    print(error)
"""
    assert "pip install triton" in python(code, blocked="triton")[0]


def test_models_need_the_four_hard_dependencies_only():
    code = """
import torch
from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification
config = PRISMConfig(hidden_dim=32, num_heads=4, num_layers=4, modalities=[ModalityConfig("ecg", 12, 5)])
out = PRISMForClassification(config)(torch.randn(2, 20, 12), "ecg", labels=torch.tensor([0, 4]))
out["loss"].backward()
"""
    python(code, blocked=EXTRAS)


def test_importing_the_models_loads_no_extra():
    code = "import sys, prism_models, prism_models.data, prism_models.layers\n"
    code += f"print([n for n in {EXTRAS.split()!r} if n in sys.modules])"
    assert python(code)[0].strip() == "[]"
