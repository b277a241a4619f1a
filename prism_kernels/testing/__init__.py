"""Test tools that users may import too: seeded inputs, error budgets, guards, and the contracts.

`registry()` lists every op once; the contracts, `prism_kernels.verify` and the tests run over it.
"""

import importlib

from .budgets import Row, budget_rows
from .spec import Case, ErrorCase, OpSpec

CATALOGUES = (
    "causal_conv1d",
    "gated_delta_rule",
    "gated_delta_rule_checkpoints",
    "gated_delta_rule_step",
    "rms_norm",
    "selective_scan",
    "swiglu",
)


def registry() -> list[OpSpec]:
    """The description of every op."""
    modules = (importlib.import_module(f".catalogue.{name}", __package__) for name in CATALOGUES)
    return [spec for module in modules for spec in module.SPECS]


def find(name: str) -> OpSpec:
    """The description of one op."""
    return next(spec for spec in registry() if spec.name == name)


__all__ = ["CATALOGUES", "Case", "ErrorCase", "OpSpec", "Row", "budget_rows", "find", "registry"]
