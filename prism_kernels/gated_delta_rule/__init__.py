"""Gated delta rule: a linear memory per head that erases before it writes. See README.md."""

from .api import GatedDeltaRuleOutput, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from .checkpoints import GatedDeltaRuleCheckpointsOutput, chunk_gated_delta_rule_with_checkpoints
from .decode import GatedDeltaRuleStepOutput, gated_delta_rule_step

__all__ = [
    "GatedDeltaRuleCheckpointsOutput",
    "GatedDeltaRuleOutput",
    "GatedDeltaRuleStepOutput",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_with_checkpoints",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
]
