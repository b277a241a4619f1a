"""Configuration of the signal model: frozen dataclasses, checked when they are built."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from prism_kernels._core.checks import check_choice, fail


@dataclass(frozen=True)
class ModalityConfig:
    """One kind of signal.

    Args:
        name: Key of the modality; a valid Python identifier.
        input_dim: Features of a token.
        num_classes: Classes of its head.
        patch_size: Side of an image patch. Not used by the model; kept with it.
        window_size: Time steps of a window. Not used by the model; kept with it.
    """

    name: str
    input_dim: int
    num_classes: int
    patch_size: int | None = None
    window_size: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.name.isidentifier():
            advice = "It names parameters: use letters, digits and underscores."
            fail("ModalityConfig", "`name` to be an identifier", repr(self.name), advice)
        _check_positive("ModalityConfig", input_dim=self.input_dim, num_classes=self.num_classes)


@dataclass(frozen=True)
class PRISMConfig:
    """The signal model.

    Args:
        hidden_dim: Width D of the backbone.
        num_heads: Heads H of both mixers.
        num_layers: Blocks.
        delta_every: Block i (from 0) is a delta block where (i + 1) % delta_every == 0.
        s4_state_mult: State of an S4 channel, in real numbers, as a multiple of the width of a head.
        s4_dt_min, s4_dt_max: Range of the step size at the start.
        delta_chunk_size: Tokens that the chunked delta rule handles at once.
        qk_norm: Whether queries and keys of the delta rule have length 1.
        gate_bias_init: Bias of the delta rule's forget gate at the start; sigmoid(4) = 0.98.
        conv_kernel_size: Width of the short convolutions, 2 to 4.
        ffn_expand: Hidden width of the feed-forward layers as a multiple of D.
        modalities: The kinds of signal.
        pool_type: "mean" over the valid tokens, or the "last" one.
        force_block_type: None, or "s4" or "delta" for all blocks.
        s4_c_per_channel: Whether every channel of an S4 head has its own read-out C.
        delta_output_norm: Whether a norm precedes the delta rule's output gate.
        dropout: Probability of dropping a feature of a residual branch in training.
        ablate: A control for experiments. "state" zeroes the state paths of both mixers and keeps
            convolutions, skips, gates and feed-forward layers; "delta" zeroes the delta path alone.
    """

    hidden_dim: int = 256
    num_heads: int = 8
    num_layers: int = 12
    delta_every: int = 4
    s4_state_mult: int = 2
    s4_dt_min: float = 0.001
    s4_dt_max: float = 0.1
    delta_chunk_size: int = 64
    qk_norm: bool = True
    gate_bias_init: float = 4.0
    conv_kernel_size: int = 4
    ffn_expand: int = 2
    modalities: Sequence[ModalityConfig] = ()
    pool_type: str = "mean"
    force_block_type: str | None = None
    s4_c_per_channel: bool = False
    delta_output_norm: bool = False
    dropout: float = 0.0
    ablate: str = "none"

    def __post_init__(self) -> None:
        """Check the fields, and freeze the list of modalities."""
        op = "PRISMConfig"
        object.__setattr__(self, "modalities", tuple(self.modalities))
        positive = ("hidden_dim", "num_heads", "num_layers", "delta_every", "s4_state_mult", "ffn_expand")
        _check_positive(op, **{name: getattr(self, name) for name in positive})
        if self.hidden_dim % self.num_heads:
            advice = "Change one of them so that every head has the same width."
            got = f"{self.hidden_dim} and {self.num_heads}"
            fail(op, "`hidden_dim` divisible by `num_heads`", got, advice)
        if self.s4_state_dim % 2:
            got = f"{self.head_dim} x {self.s4_state_mult}"
            fail(op, "an even state size, head width x `s4_state_mult`", got, "Complex modes are pairs.")
        check_choice(op, "pool_type", self.pool_type, ("mean", "last"))
        check_choice(op, "force_block_type", self.force_block_type, (None, "s4", "delta"))
        check_choice(op, "ablate", self.ablate, ("none", "state", "delta"))
        check_choice(op, "conv_kernel_size", self.conv_kernel_size, (2, 3, 4))
        if not 0 < self.s4_dt_min <= self.s4_dt_max:
            got = f"{self.s4_dt_min} and {self.s4_dt_max}"
            fail(op, "0 < `s4_dt_min` <= `s4_dt_max`", got, "The defaults are 0.001 and 0.1.")
        if not 0 <= self.dropout < 1:
            fail(op, "`dropout` in [0, 1)", str(self.dropout), "0 turns it off.")
        names = [m.name for m in self.modalities]
        if len(set(names)) < len(names):
            fail(op, "modalities of different names", str(names), "Rename one of them.")

    @property
    def head_dim(self) -> int:
        """Width P of a head."""
        return self.hidden_dim // self.num_heads

    @property
    def s4_state_dim(self) -> int:
        """State size of an S4 channel, in real numbers; half as many complex modes N make it up."""
        return self.head_dim * self.s4_state_mult

    def layer_type(self, i: int) -> str:
        """ "s4" or "delta": the mixer of block i, counted from 0."""
        if self.force_block_type is not None:
            return self.force_block_type
        return "delta" if (i + 1) % self.delta_every == 0 else "s4"

    def layer_pattern(self) -> list[str]:
        """The mixers of all blocks."""
        return [self.layer_type(i) for i in range(self.num_layers)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "modalities": [asdict(m) for m in self.modalities]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PRISMConfig":
        """The configuration of `to_dict`; an unknown key is an error that names its nearest kin."""
        _check_keys(cls, values)
        given = dict(values)
        modalities = given.pop("modalities", ())
        for modality in modalities:
            _check_keys(ModalityConfig, modality)
        return cls(**given, modalities=[ModalityConfig(**m) for m in modalities])


def _check_positive(op: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            fail(op, f"`{name}` to be an integer >= 1", repr(value), "Sizes count things.")


def _check_keys(cls: type, values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(known)}."
            fail(cls.__name__, "known keys", repr(key), advice)
