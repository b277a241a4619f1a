"""The classifier: a projection and a head for each modality around one backbone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_kernels._core.checks import check_dtype, check_shape, check_time, fail, values_are_checked

from ..layers._numerics import valid_tokens
from .backbone import PRISMBackbone
from .config import ModalityConfig, PRISMConfig
from .heads import ModalityHead
from .pooling import init_pool, pool
from .state import PRISMOutput, PRISMState

NAME = "PRISMForClassification"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class PRISMForClassification(nn.Module):
    """Classify sequences of any modality with one causal backbone.

    A stream may come token by token (`step`) or chunk by chunk (`states=`), with the pooled features
    carried along: after any cut the logits are those of the whole sequence at once.

    Args:
        config: The model and its modalities.

    Example:
        >>> config = PRISMConfig(32, 4, 4, modalities=[ModalityConfig("ecg", input_dim=12, num_classes=5)])
        >>> model = PRISMForClassification(config)
        >>> model(torch.randn(2, 50, 12), "ecg").logits.shape
        torch.Size([2, 5])
    """

    def __init__(self, config: PRISMConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_dim
        self.projection = nn.ModuleDict(
            {m.name: nn.Linear(m.input_dim, D, bias=False) for m in config.modalities}
        )
        self.backbone = PRISMBackbone(config)
        self.head = nn.ModuleDict({m.name: ModalityHead(m, D) for m in config.modalities})

    def forward(
        self,
        x: Tensor,
        modality: str,
        labels: Tensor | None = None,
        states: PRISMState | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> PRISMOutput:
        """Classify x, or continue the streams whose `states` are given.

        What stands in the padding, NaN included, reaches no output, state or gradient.

        Args:
            x: r[B,T,input_dim].
            modality: Name of the modality; all rows share it.
            labels: i[B], 0 to num_classes - 1. Gives the mean cross-entropy as `loss`.
            states: The states of an earlier call; None for the start of all rows.
            lengths: i[B], valid tokens of each right-padded row, 1 to T (0 to T with states).
            mask: b[B,T], True for valid tokens; the same as lengths, so give one of them. Right-padded:
                a hole is an error.

        Returns:
            PRISMOutput(logits r[B,num_classes], states, loss), also read as out["logits"].

        Raises:
            ValueError: Unknown modality; a wrong width or shape; labels or lengths out of range; a mask
                with holes; both mask and lengths.
            TypeError: Labels, lengths or mask of a wrong dtype.
        """
        spec = self._modality(modality)
        _check_input(x, spec)
        lengths = _valid_lengths(x, lengths, mask, least=0 if states is not None else 1)
        _check_labels(labels, x, spec)
        if lengths is not None:
            x = torch.where(valid_tokens(lengths, x.shape[1])[..., None], x, 0.0)
        blocks, seen = (None, None) if states is None else states
        features, blocks = self.backbone(self.projection[modality](x), blocks, lengths=lengths)
        pooled, seen = pool(features, self.config.pool_type, seen, lengths)
        logits = self.head[modality](pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels.long())
        return PRISMOutput(logits, PRISMState(blocks, seen), loss)

    def step(self, x_t: Tensor, modality: str, state: PRISMState) -> PRISMOutput:
        """Take one token per row and classify what was seen so far.

        Time and memory of a step do not depend on how many came before.

        Args:
            x_t: r[B,input_dim].
            modality: Name of the modality.
            state: From `init_state`, or of the last call.

        Returns:
            PRISMOutput(logits r[B,num_classes], states).
        """
        spec = self._modality(modality)
        if x_t.ndim != 2 or x_t.shape[-1] != spec.input_dim:
            expected = f"`x_t` [B, {spec.input_dim}] for modality {modality!r}"
            fail(NAME, expected, f"shape {tuple(x_t.shape)}", "Give `step` one token per row.")
        features, blocks = self.backbone.step(self.projection[modality](x_t), state.blocks)
        pooled, seen = pool(features[:, None], self.config.pool_type, state.pool, None)
        return PRISMOutput(self.head[modality](pooled), PRISMState(blocks, seen))

    def init_state(self, batch_size: int) -> PRISMState:
        """The state before the first token, on the device of the weights."""
        features = next(self.backbone.parameters()).new_zeros(batch_size, 1, self.config.hidden_dim)
        return PRISMState(self.backbone.init_state(batch_size), init_pool(features))

    def _modality(self, name: str) -> ModalityConfig:
        for modality in self.config.modalities:
            if modality.name == name:
                return modality
        known = ", ".join(repr(m.name) for m in self.config.modalities)
        fail(
            NAME, f"a modality out of {known or 'an empty list'}", repr(name), "Add it to the configuration."
        )


def _check_input(x: Tensor, spec: ModalityConfig) -> None:
    if x.ndim != 3 or x.shape[-1] != spec.input_dim:
        expected = f"`x` [B, T, {spec.input_dim}] for modality {spec.name!r}"
        fail(NAME, expected, f"shape {tuple(x.shape)}", "Inputs are [batch, time, features].")
    check_time(NAME, "x", x.shape[1])


def _check_labels(labels: Tensor | None, x: Tensor, spec: ModalityConfig) -> None:
    if labels is None:
        return
    check_dtype(NAME, "labels", labels, INTEGERS, "Labels are class numbers: use `.long()`.")
    check_shape(NAME, "labels", labels, x.shape[:1], "[B]", "Give one label per row of the batch.")
    if _may_read(labels) and not 0 <= labels.min() <= labels.max() < spec.num_classes:
        got = f"{labels.min().item()} to {labels.max().item()}"
        fail(NAME, f"`labels` from 0 to {spec.num_classes - 1}", got, "Labels count from 0.")


def _valid_lengths(x: Tensor, lengths: Tensor | None, mask: Tensor | None, least: int) -> Tensor | None:
    """Lengths i[B] out of lengths or mask, checked; None where all tokens are valid."""
    if mask is not None:
        if lengths is not None:
            fail(NAME, "`lengths` or `mask`", "both", "They say the same: leave one out.")
        check_dtype(NAME, "mask", mask, (torch.bool,), "Use `mask.bool()`; True marks a valid token.")
        check_shape(NAME, "mask", mask, x.shape[:2], "[B, T]", "Give one flag per token.")
        lengths = mask.sum(1)
        if _may_read(mask) and not torch.equal(mask, valid_tokens(lengths, x.shape[1])):
            row = int((mask != valid_tokens(lengths, x.shape[1])).any(1).nonzero()[0])
            advice = "Move each row's valid tokens to its left."
            fail(NAME, "a right-padded `mask`: True, then False", f"a hole in row {row}", advice)
    if lengths is None:
        return None
    check_dtype(NAME, "lengths", lengths, INTEGERS, "Lengths count tokens: use `.long()`.")
    check_shape(NAME, "lengths", lengths, x.shape[:1], "[B]", "Give one length per row of the batch.")
    if _may_read(lengths) and not least <= lengths.min() <= lengths.max() <= x.shape[1]:
        got = f"{lengths.min().item()} to {lengths.max().item()}"
        fail(NAME, f"`lengths` from {least} to T = {x.shape[1]}", got, "Lengths count the valid tokens.")
    return lengths.to(x.device, torch.int64)


def _may_read(tensor: Tensor) -> bool:
    """Whether the values may be looked at: not while a graph is captured, nor where it stalls a GPU."""
    return not torch.compiler.is_compiling() and tensor.numel() > 0 and values_are_checked(tensor)
