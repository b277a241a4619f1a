"""Gated delta rule: a linear memory per head that erases before it writes. See README.md."""

from .api import GatedDeltaRuleOutput, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

__all__ = ["GatedDeltaRuleOutput", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
