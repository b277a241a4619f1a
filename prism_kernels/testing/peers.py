"""Other libraries' implementations of our ops, called as our cases are written; imported only when asked for.

An adapter says what it lacks of a case, and turns a case into the other library's call. The error of a peer
is measured by the same budget as ours.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .recipes import Target
from .spec import Case, Outputs

CHUNK, RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
CONV, NORM, SCAN = "causal_conv1d", "rms_norm", "selective_scan with real poles, channelwise"


@dataclass(frozen=True)
class Adapter:
    """One function of a peer.

    Args:
        module: What to import.
        run: `(module, case) -> outputs`, of which some may be left out.
        lacks: What a case may ask for beyond it, in words, and whether this one does.
        gradients: Whether it has a backward.
    """

    module: str
    run: Callable[[Any, Case], Outputs]
    lacks: Callable[[Case], dict[str, bool]]
    gradients: bool = True


@dataclass(frozen=True)
class Peer:
    """A library: its name for pip, the module that shows whether it is there, its adapters by op."""

    package: str
    module: str
    adapters: dict[str, Adapter]

    def installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            return False


def target(peer: str, op: str) -> Target | None:
    """What a peer has for an op, or None."""
    adapter = PEERS[peer].adapters.get(op)
    if adapter is None:
        return None
    module = importlib.import_module(adapter.module)
    return Target(
        name=peer,
        run=lambda case: adapter.run(module, case),
        lacks=lambda case: " and ".join(what for what, asked in adapter.lacks(case).items() if asked),
        code=f"run = target({peer!r}, op.name).run",
        gradients=adapter.gradients,
        imports="from prism_kernels.testing.peers import target\n",
    )


def own_form(function: Callable) -> Callable:
    """The PyTorch fallback itself, where a wrapper would look for a faster library first."""
    return getattr(function, "__wrapped__", function)


def on_gpu(case: Case) -> dict[str, bool]:
    return {"a CPU": not torch.cuda.is_available()}


def gated_delta(name: str) -> Callable[[Any, Case], Outputs]:
    def run(module: Any, case: Case) -> Outputs:
        tensors, options = dict(case.tensors), dict(case.options)
        q, k, v = (tensors.pop(n) for n in "qkv")
        if "chunk" not in name or not name.startswith("torch_"):
            options.pop("chunk_size", None)  # it changes rounding only
        tensors.setdefault("g", torch.zeros(v.shape[:3], device=v.device))
        tensors.setdefault("beta", torch.ones(v.shape[:3], device=v.device))
        function = own_form(getattr(module, name))
        o, state = function(q, k, v, **tensors, **options, output_final_state=True)
        return {"o": o, "final_state": state}

    return run


def gated_delta_lacks(case: Case) -> dict[str, bool]:
    return {"packed sequences": "cu_seqlens" in case.tensors, "a scale": "scale" in case.options}


def conv_fallback(module: Any, case: Case) -> Outputs:
    """[B,D,T]. With a state, the form that carries it, which writes it in place."""
    x, weight, bias, state = (case.tensors.get(n) for n in ("x", "weight", "bias", "initial_state"))
    activation = case.options.get("activation")
    if state is None:
        return {"y": own_form(module.causal_conv1d_fn)(x.mT, weight, bias, activation).mT}
    state = state.clone()
    y = own_form(module.causal_conv1d_update)(x.mT, state, weight, bias, activation).mT
    return {"y": y, "final_state": state}


def conv_lacks(case: Case) -> dict[str, bool]:
    return {"packed sequences": "cu_seqlens" in case.tensors}


def conv_cuda(module: Any, case: Case) -> Outputs:
    x, weight, bias = (case.tensors.get(n) for n in ("x", "weight", "bias"))
    activation = case.options.get("activation")
    return {"y": module.causal_conv1d_fn(x.mT.contiguous(), weight, bias, activation=activation).mT}


def conv_cuda_lacks(case: Case) -> dict[str, bool]:
    return on_gpu(case) | conv_lacks(case) | {"an initial state": "initial_state" in case.tensors}


def norm_fallback(module: Any, case: Case) -> Outputs:
    x, weight, gate = (case.tensors.get(n) for n in ("x", "weight", "gate"))
    layer = module.Qwen3NextRMSNormGated(x.shape[-1], eps=case.options.get("eps", 1e-6))
    return {"y": torch.func.functional_call(layer, {"weight": weight}, (x, gate))}


def norm_lacks(case: Case) -> dict[str, bool]:
    absent = {f"no {n}": n not in case.tensors for n in ("weight", "gate")}
    return absent | {"a residual": "residual" in case.tensors}


def scan(name: str) -> Callable[[Any, Case], Outputs]:
    """[B,D,L]; with one channel a head, our heads are its channels."""

    def run(module: Any, case: Case) -> Outputs:
        given = case.tensors
        B, C, D, z = given["B"][:, :, 0].mT, given["C"][:, :, 0].mT, given.get("D"), given.get("z")
        y = own_form(getattr(module, name))(
            given["u"].squeeze(3).mT,
            given["dt"].mT,
            given["A"],
            B,
            C,
            D=None if D is None else D.flatten(),
            z=None if z is None else z.squeeze(3).mT,
            delta_bias=given.get("dt_bias"),
            delta_softplus=case.options.get("dt_softplus", False),
        )
        return {"y": y.mT[..., None]}

    return run


def scan_lacks(case: Case) -> dict[str, bool]:
    return {
        "several channels in a head": case.tensors["u"].shape[3] != 1,
        "zero-order hold": case.options.get("discretization", "zoh") != "euler",
        "an initial state": "initial_state" in case.tensors,
        "time backward": bool(case.options.get("reverse")),
        "packed sequences": "cu_seqlens" in case.tensors,
        "step sizes wider than the data": case.tensors["u"].dtype != case.tensors["dt"].dtype,
    }


def scan_cuda_lacks(case: Case) -> dict[str, bool]:
    return on_gpu(case) | scan_lacks(case)


QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
MAMBA = "transformers.models.mamba.modeling_mamba"
PEERS = {
    "transformers": Peer(
        "transformers",
        "transformers",
        {
            CHUNK: Adapter(QWEN, gated_delta("torch_chunk_gated_delta_rule"), gated_delta_lacks),
            RECURRENT: Adapter(QWEN, gated_delta("torch_recurrent_gated_delta_rule"), gated_delta_lacks),
            CONV: Adapter(QWEN, conv_fallback, conv_lacks),
            NORM: Adapter(QWEN, norm_fallback, norm_lacks),
            SCAN: Adapter(MAMBA, scan("mamba_selective_scan"), scan_lacks),
        },
    ),
    "fla": Peer(
        "flash-linear-attention",
        "fla",
        {
            CHUNK: Adapter("fla.ops.gated_delta_rule", gated_delta(CHUNK), on_gpu),
            RECURRENT: Adapter("fla.ops.gated_delta_rule", gated_delta(RECURRENT), on_gpu, gradients=False),
        },
    ),
    "mamba_ssm": Peer(
        "mamba-ssm",
        "mamba_ssm",
        {SCAN: Adapter("mamba_ssm.ops.selective_scan_interface", scan("selective_scan_fn"), scan_cuda_lacks)},
    ),
    "causal_conv1d": Peer(
        "causal-conv1d", "causal_conv1d", {CONV: Adapter("causal_conv1d", conv_cuda, conv_cuda_lacks)}
    ),
}
