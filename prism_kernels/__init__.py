"""Fused sequence-model ops: Triton kernels, pure-PyTorch paths, and the references both are held to."""

from .causal_conv1d import (
    CausalConv1dOutput,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from .gated_delta_rule import (
    GatedDeltaRuleCheckpointsOutput,
    GatedDeltaRuleOutput,
    GatedDeltaRuleStepOutput,
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_with_checkpoints,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
)
from .rms_norm import RMSNormOutput, rms_norm
from .selective_scan import (
    SelectiveScanBidirectionalOutput,
    SelectiveScanOutput,
    SelectiveScanStepOutput,
    mamba_chunk_scan_combined,
    selective_scan,
    selective_scan_bidirectional,
    selective_scan_fn,
    selective_scan_step,
    selective_state_update,
)
from .swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "CausalConv1dOutput",
    "GatedDeltaRuleCheckpointsOutput",
    "GatedDeltaRuleOutput",
    "GatedDeltaRuleStepOutput",
    "RMSNormOutput",
    "SelectiveScanBidirectionalOutput",
    "SelectiveScanOutput",
    "SelectiveScanStepOutput",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_with_checkpoints",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
    "mamba_chunk_scan_combined",
    "rms_norm",
    "selective_scan",
    "selective_scan_bidirectional",
    "selective_scan_fn",
    "selective_scan_step",
    "selective_state_update",
    "swiglu",
]
