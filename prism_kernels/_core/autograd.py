"""Gradients of opaque ops: first order only, and said so."""

from typing import Any

from torch.library import CustomOpDef


def first_order_only(op: CustomOpDef, name: str) -> None:
    """Make differentiating a backward op an error with advice, instead of a silent constant."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{name}: expected a first-order gradient, got a second one. "
            "Use impl='reference', which can be differentiated any number of times."
        )

    op.register_autograd(backward)
