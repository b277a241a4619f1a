"""Choose the path that computes an op: by the device of its inputs, never by a failure.

"triton"     the fused kernels; the choice for CUDA and ROCm tensors
"torch"      fast pure PyTorch; the choice for every other device
"reference"  the definition, one token at a time; only when asked for
"""

from collections.abc import Sequence

import torch

from .checks import check_choice, fail
from .runtime import interpreting, recording, triton_is_installed

PATHS = ("triton", "torch", "reference")


def choose_impl(
    op: str,
    impl: str | None,
    device: torch.device,
    *,
    triton_lacks: Sequence[str] = (),
    paths: Sequence[str] = PATHS,
) -> str:
    """Return the path for this call, or raise with advice. Nothing falls back in silence.

    Args:
        op: Name of the public function, for messages.
        impl: What the caller asked for; None chooses by device.
        device: Device of the inputs.
        triton_lacks: What this call asks for and the Triton path cannot do, in words.
        paths: The paths that this op has at all.
    """
    if impl is None:
        impl = "triton" if device.type == "cuda" and "triton" in paths else "torch"
    check_choice(op, "impl", impl, [None, *paths])
    if impl != "triton":
        return impl
    if triton_lacks:
        fail(
            op,
            "a call that the 'triton' path covers",
            " and ".join(triton_lacks),
            "Pass impl='torch' or impl='reference', which have it.",
            NotImplementedError,
        )
    if not triton_is_installed():
        fail(op, "an installed Triton for impl='triton'", "none", "`pip install triton`, or impl='torch'.")
    if device.type != "cuda" and not interpreting() and not recording():
        fail(
            op,
            "CUDA tensors for impl='triton'",
            f"tensors on {device}",
            "Use impl='torch', or set TRITON_INTERPRET=1 before the first call to interpret the kernels.",
        )
    return impl
