"""What the contracts need to know about an op: cases, paths, names of axes and states.

One `OpSpec` describes one op, once; `contracts.py`, `verify.py` and the tests run over the registry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .inputs import Draw

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an op: tensors by argument name, and the options that are not tensors.

    Floating and complex tensors are differentiated by the contracts, integer ones are not.
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    hostile: bool = False

    def double(self) -> "Case":
        """The same values in float64 and complex128: what the oracle is given."""
        wide = {torch.complex64: torch.complex128}
        cast = {
            n: t.to(wide.get(t.dtype, torch.float64)) if t.is_floating_point() or t.is_complex() else t
            for n, t in self.tensors.items()
        }
        return replace(self, tensors=cast)

    def to(self, device: str) -> "Case":
        """The same case on another device."""
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()})

    def with_tensors(self, **tensors: Tensor) -> "Case":
        """A copy with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **tensors})


@dataclass(frozen=True)
class ErrorCase:
    """A call that must fail: what is wrong, the call, the exception and a pattern of its message."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    pattern: str


@dataclass(frozen=True)
class OpSpec:
    """One op, described once.

    Args:
        name: Name of the public function.
        run: `(case, impl) -> {"o": ..., "final_state": ...}` through the public function.
        reference: `(case, product_dtype) -> outputs`; the definition. With a `product_dtype` the
            operands of its products are rounded to that dtype: plain PyTorch in that precision.
        cases: `(dtype) -> list of Case`, small (a Triton interpreter runs them), hostile ones included.
        hand: A T = 2 case in float64 and its outputs, worked out by hand (plain arithmetic, no call).
        errors: Calls that must fail with a clear message.
        opcheck: `(case, impl) -> [(custom op, args)]` for torch.library.opcheck.
        paths: Paths beside the reference.
        on_triton: Whether the Triton path covers a case.
        dtypes: Dtypes that the kernels take.
        time_inputs: Arguments with time on axis 1 (and batch on axis 0).
        state: Pair of argument and output that carry the state, or None.
        step: `(case of one token, state) -> (outputs, state)`: the step form, where there is one.
        reverse_time: `(case) -> bool`, whether the case runs backward in time.
        packed: Whether the op takes cu_seqlens.
        bounded: Arguments with a range of their own (log decays, step sizes, ...), which the training
            contract holds fixed.
        random_case: `(draw) -> Case` of drawn sizes and options, small enough for the interpreter.
    """

    name: str
    run: Callable[[Case, str | None], Outputs]
    reference: Callable[[Case, torch.dtype | None], Outputs]
    cases: Callable[[torch.dtype], list[Case]]
    hand: Callable[[], tuple[Case, Outputs]]
    errors: Callable[[], list[ErrorCase]]
    opcheck: Callable[[Case, str], list[tuple[Any, tuple]]]
    paths: Sequence[str] = ("torch", "triton")
    on_triton: Callable[[Case], bool] = lambda case: True
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    time_inputs: Sequence[str] = ()
    state: tuple[str, str] | None = None
    step: Callable[[Case, Tensor | None], tuple[Outputs, Tensor]] | None = None
    reverse_time: Callable[[Case], bool] = lambda case: False
    packed: bool = False
    bounded: Sequence[str] = ("g", "beta", "dt", "A")
    random_case: Callable[[Draw], Case] | None = None
