"""Other people's code, one adapter per library and op, imported only when it is asked for and never copied.

Where a library cannot be had, its row is a skip that says how to get it. `PRISM_PEERS=<folder>` points at
checkouts (`git clone https://github.com/state-spaces/mamba`, `.../SforAiDl/lrnnx`) from which the
pure-PyTorch references of mamba-ssm and lrnnx are read: one function each, since their modules import CUDA
extensions.

Everybody gets inputs in their own layout before the clock starts. mamba-ssm's scan is Euler's rule and is
held to our Euler; its step kernel and its Mamba-2 and Mamba-3 kernels have no complex diagonal, and lrnnx's
step writes its state in place of ours, so these have no row. flash-linear-attention's backward raises on
Hopper with Triton 3.4 to 3.7.0; the guard is lifted, and the gradients then pass the check or the row says
"wrong".

`torch.compile`: our PyTorch paths are opaque ops, on which the compiler has nothing to do. What it gets
instead is the plain form, whole where it is one expression (`loops.py`) and the body of the time loop where
it is a loop. Inductor has no complex arithmetic, so the scan is a skip, and its step is written in pairs.
Layers and models, which are more than their ops, are compiled as they are ("compiled torch", `modules.py`).
"""

import ast
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from . import loops
from .registry import Adapter, Setting, Skip, Tensors, register

PACKAGES = {  # what to import, by the name that pip knows
    "flash-linear-attention": "fla",
    "flash-qla": "flash_qla",
    "mamba-ssm": "mamba_ssm",
    "accelerated-scan": "accelerated_scan",
    "causal-conv1d": "causal_conv1d",
    "liger-kernel": "liger_kernel",
    "transformers": "transformers",
    "lrnnx": "lrnnx",
}
FOLDER = "PRISM_PEERS"


def installed() -> dict[str, str]:
    """Peers that are here, with their versions."""
    found = {}
    for package, module in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "of unknown version"
    return found


def need(package: str, module: str, setting: Setting | None = None) -> Any:
    """Import a module of a peer, or skip with the reason. With a setting, it must be on a GPU."""
    if importlib.util.find_spec(PACKAGES[package]) is None:
        raise Skip(f"{package} is not installed (pip install {package})")
    if setting is not None and setting.device != "cuda":
        raise Skip(f"{package} needs a CUDA device")
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        raise Skip(f"{package} cannot be imported: {str(error).splitlines()[0]}") from error


def function_of_file(package: str, inside: str, name: str, names: dict[str, Any]) -> Callable:
    """One function of a peer's file, from an installed package or a checkout, without importing the file."""
    roots = [Path(os.environ[FOLDER])] if os.environ.get(FOLDER) else []
    places = [p for root in roots for p in (root / inside, *sorted(root.glob(f"*/{inside}")))]
    spec = importlib.util.find_spec(PACKAGES[package])
    for root in (spec.submodule_search_locations or []) if spec else []:
        places.append(Path(root).parent / inside)
    for place in places:
        if place.is_file():
            tree = ast.parse(place.read_text(encoding="utf-8"))
            nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
            if not nodes:
                raise Skip(f"{place} has no function {name}")
            exec(compile(ast.Module(nodes, []), str(place), "exec"), names)
            return names[name]
    raise Skip(f"{package} is not installed, and no checkout of it is in {FOLDER}=<folder>")


def transformers_function(name: str, module: str = "qwen3_next") -> Callable:
    """A PyTorch fallback itself: its wrapper would look for a faster library first."""
    path = f"transformers.models.{module}.modeling_{module}"
    return unwrap(getattr(need("transformers", path), name))


# The gated delta rule.

NORMED = {"use_qk_l2norm_in_kernel": True}


def fla_delta(setting: Setting) -> Adapter:
    rule = need("flash-linear-attention", "fla.ops.gated_delta_rule", setting).chunk_gated_delta_rule
    guard = importlib.import_module("fla.ops.common.chunk_o")
    note = ""
    if not getattr(guard, "TRITON_ABOVE_3_7_1", True):
        guard.TRITON_ABOVE_3_7_1 = True
        note = "its guard against Triton 3.4 to 3.7.0 on Hopper lifted"
    return Adapter(lambda t: {"o": rule(**t, **NORMED)[0]}, note=note)


def fla_recurrent(setting: Setting) -> Adapter:
    rule = need(
        "flash-linear-attention", "fla.ops.gated_delta_rule", setting
    ).fused_recurrent_gated_delta_rule
    return Adapter(partial(outputs_and_state, rule))


def outputs_and_state(rule: Callable, t: Tensors) -> Tensors:
    o, state = rule(**t, **NORMED, output_final_state=True)
    return {"o": o, "final_state": state}


def flash_qla(setting: Setting) -> Adapter:
    rule = need("flash-qla", "flash_qla", setting).chunk_gated_delta_rule
    if setting.sizes["D"] != 128 or setting.dtype.itemsize != 2:
        raise Skip("flash-qla has K = V = 128 in 16 bits only")
    return Adapter(lambda t: {"o": rule(**t, **NORMED)[0]})


def transformers_chunk(setting: Setting) -> Adapter:
    rule = transformers_function("torch_chunk_gated_delta_rule")
    names = {"q": "query", "k": "key", "v": "value"}
    return Adapter(lambda t: {"o": rule(**{names.get(n, n): x for n, x in t.items()}, **NORMED)[0]})


def transformers_recurrent(setting: Setting) -> Adapter:
    rule = transformers_function("torch_recurrent_gated_delta_rule")

    def call(t: Tensors) -> Tensors:
        q, k, v = (t[n] for n in "qkv")
        # It writes the state it is given.
        state = t["initial_state"].clone()
        options = {"initial_state": state, "output_final_state": True}
        o, state = rule(q, k, v, t["g"], t["beta"], **options, **NORMED)
        return {"o": o, "final_state": state}

    return Adapter(call)


def eager_delta(state: bool, compiled: bool, setting: Setting) -> Adapter:
    step = torch_compile(loops.delta_step) if compiled else loops.delta_step

    def call(t: Tensors) -> Tensors:
        o, final = loops.delta_loop(**t, **NORMED, step=step)
        return {"o": o, "final_state": final} if state else {"o": o}

    return Adapter(call, note="the body of the time loop compiled" if compiled else "")


for name, state in (("chunk_gated_delta_rule", False), ("fused_recurrent_gated_delta_rule", True)):
    register(name, "eager time loop", partial(eager_delta, state, False))
    register(name, "torch.compile", partial(eager_delta, state, True))
register("chunk_gated_delta_rule", "flash-linear-attention", fla_delta)
register("chunk_gated_delta_rule", "flash-qla", flash_qla)
register("chunk_gated_delta_rule", "transformers", transformers_chunk)
register("fused_recurrent_gated_delta_rule", "flash-linear-attention", fla_recurrent)
register("fused_recurrent_gated_delta_rule", "transformers", transformers_recurrent)


def decoding(recurrent: Callable[[Setting], Adapter], setting: Setting) -> Adapter:
    """A step by a function without gates of its own, which are made before it, as models do."""
    peer = recurrent(setting)

    def call(t: Tensors) -> Tensors:
        made = {n: t[n] for n in "qkv"} | {"initial_state": t["state"], "beta": t["beta"].sigmoid()}
        outputs = peer.call(made | {"g": -t["A_log"].exp() * F.softplus(t["g"] + t["dt_bias"])})
        return {"o": outputs["o"], "new_state": outputs["final_state"]}

    return Adapter(call, note=peer.note)


for name, peer in (
    ("eager time loop", partial(eager_delta, True, False)),
    ("torch.compile", partial(eager_delta, True, True)),
    ("flash-linear-attention", fla_recurrent),
    ("transformers", transformers_recurrent),
):
    register("gated_delta_rule_step", name, partial(decoding, peer))


# The selective scan.


def to_channels(t: Tensors) -> Tensors:
    """mamba's layout: u, delta r[B,D,L] with time last; A, B, C c[D,N]; no conjugate on C."""
    u, P = t["u"], t["u"].shape[3]
    wide = {n: t[n].repeat_interleave(P, 0) for n in "ABC"}
    delta = t["dt"].repeat_interleave(P, 2).mT.to(u.dtype).contiguous()
    return {"u": u.flatten(2).mT.contiguous(), "delta": delta} | wide | {"C": wide["C"].conj_physical()}


def from_channels(P: int, outputs: Tensors) -> Tensors:
    return {"y": outputs["y"].mT.unflatten(2, (-1, P))}


def channelwise(scan: Callable, setting: Setting) -> Adapter:
    restore = partial(from_channels, setting.sizes["P"])
    return Adapter(lambda t: {"y": scan(**t)}, to_channels, restore)


def cuda_scan(setting: Setting) -> Callable:
    """`selective_scan_fn` of mamba-ssm, in CUDA."""
    module = need("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", setting)
    if getattr(module, "selective_scan_cuda", None) is None:
        raise Skip(
            "mamba-ssm was built without selective_scan_cuda (MAMBA_KEEP_CUDA_BUILD=TRUE pip install ...)"
        )
    return module.selective_scan_fn


def mamba_call(scan: Callable) -> Adapter:
    return Adapter(lambda t: {"y": scan(**t, delta_softplus=True)})


def pure_mamba(setting: Setting) -> Adapter:
    return mamba_call(reference_scan("mamba-ssm", MAMBA))


def eager_mamba(compiled: bool, setting: Setting) -> Adapter:
    step = torch_compile(loops.mamba_step) if compiled else loops.mamba_step
    note = "the body of the time loop compiled" if compiled else ""
    return Adapter(lambda t: {"y": loops.mamba_loop(**t, step=step)}, note=note)


def reference_scan(package: str, inside: str) -> Callable:
    """`selective_scan_ref` of a package, in pure PyTorch."""
    einops = importlib.import_module("einops")
    names = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    return function_of_file(package, inside, "selective_scan_ref", names)


def pure_scan(package: str, inside: str, options: dict[str, str], setting: Setting) -> Adapter:
    return channelwise(partial(reference_scan(package, inside), **options), setting)


def accelerated(setting: Setting) -> Adapter:
    scan = need("accelerated-scan", "accelerated_scan.complex", setting).scan

    def call(t: Tensors) -> Tensors:
        u = t["u"].float()
        a, x = loops.scan_inputs(u, t["dt"], t["A"], t["B"])
        a, x = (z.flatten(2).mT.contiguous() for z in (a.expand_as(x), x))
        h = scan(a, x).mT.unflatten(2, (*u.shape[2:], -1))
        return {"y": 2 * torch.einsum("bthpn,hn->bthp", h, t["C"].conj()).real.to(t["u"].dtype)}

    return Adapter(call)


def eager_scan(method: str, setting: Setting) -> Adapter:
    return Adapter(lambda t: {"y": loops.scan_loop(**t, discretization=method).y})


def no_complex(setting: Setting) -> Adapter:
    raise Skip("inductor has no complex arithmetic, and our PyTorch path is one opaque op")


MAMBA, LRNNX = "mamba_ssm/ops/selective_scan_interface.py", "lrnnx/ops/selective_scan.py"
for name, method, rule in (("selective_scan", "zoh", "zoh"), ("selective_scan_euler", "euler", "mamba")):
    register(name, "eager time loop", partial(eager_scan, method))
    register(name, "torch.compile", no_complex)
    register(name, "lrnnx reference", partial(pure_scan, "lrnnx", LRNNX, {"discretization": rule}))
register("selective_scan", "accelerated-scan", accelerated)
register("selective_scan_euler", "mamba-ssm", lambda setting: channelwise(cuda_scan(setting), setting))
register("selective_scan_euler", "mamba-ssm reference", partial(pure_scan, "mamba-ssm", MAMBA, {}))
register("selective_scan_fn", "eager time loop", partial(eager_mamba, False))
register("selective_scan_fn", "torch.compile", partial(eager_mamba, True))
register("selective_scan_fn", "mamba-ssm", lambda setting: mamba_call(cuda_scan(setting)))
register("selective_scan_fn", "mamba-ssm reference", pure_mamba)


def eager_step(setting: Setting) -> Adapter:
    def call(t: Tensors) -> Tensors:
        a, x = loops.scan_inputs(t["u"][:, None], t["dt"][:, None], t["A"], t["B"][0, :, 0])
        h = a[:, 0] * t["state"] + x[:, 0]
        return {"y": 2 * (h * t["C"].conj()).sum(-1).real.to(t["u"].dtype), "new_state": h}

    return Adapter(call)


def compiled_step(setting: Setting) -> Adapter:
    call = torch_compile(loops.scan_step)

    def in_pairs(t: Tensors) -> Tensors:
        return {n: torch.view_as_real(x) if x.is_complex() else x for n, x in t.items()}

    return Adapter(
        lambda t: dict(zip(("y", "new_state"), call(**t), strict=True)),
        in_pairs,
        lambda outputs: outputs | {"new_state": torch.view_as_complex(outputs["new_state"])},
        note="in real pairs",
    )


register("selective_scan_step", "eager", eager_step)
register("selective_scan_step", "torch.compile", compiled_step)


# The small ones.


def fla_conv(setting: Setting) -> Adapter:
    conv = need("flash-linear-attention", "fla.modules.conv.causal_conv1d", setting).causal_conv1d
    return Adapter(lambda t: {"y": conv(**t, activation="silu")[0]})


def channels_first(conv: Callable) -> Adapter:
    """x r[B,D,T], as a view of ours: both libraries take channels-last memory."""
    return Adapter(
        lambda t: {"y": conv(t["x"], t["weight"], t["bias"], activation="silu")},
        lambda t: t | {"x": t["x"].mT},
        lambda outputs: {"y": outputs["y"].mT},
    )


def cuda_conv(setting: Setting) -> Adapter:
    return channels_first(need("causal-conv1d", "causal_conv1d", setting).causal_conv1d_fn)


def transformers_conv(setting: Setting) -> Adapter:
    return channels_first(transformers_function("causal_conv1d_fn"))


def fla_norm(setting: Setting) -> Adapter:
    norm = need("flash-linear-attention", "fla.modules.layernorm", setting).rms_norm
    return Adapter(lambda t: {"y": norm(t["x"], t["weight"], None, eps=1e-6)})


def liger_norm(setting: Setting) -> Adapter:
    # Not in place: that would write into the cotangent, which every run shares.
    norm = need("liger-kernel", "liger_kernel.ops.rms_norm", setting).LigerRMSNormFunction
    return Adapter(lambda t: {"y": norm.apply(t["x"], t["weight"], 1e-6, 0.0, "llama", False)})


def fla_swiglu(setting: Setting) -> Adapter:
    gated = need("flash-linear-attention", "fla.modules.activations", setting).swiglu
    return Adapter(lambda t: {"y": gated(t["gate"], t["up"])})


def liger_swiglu(setting: Setting) -> Adapter:
    # Its backward writes the gradients over its inputs, so it gets copies of its own.
    gated = need("liger-kernel", "liger_kernel.ops.swiglu", setting).LigerSiLUMulFunction
    return Adapter(
        lambda t: {"y": gated.apply(t["gate"], t["up"])}, lambda t: {n: x.clone() for n, x in t.items()}
    )


def transformers_mlp(setting: Setting) -> Adapter:
    path = "transformers.models.llama"
    config = need("transformers", f"{path}.configuration_llama").LlamaConfig(
        hidden_size=setting.sizes["D"], intermediate_size=2 * setting.sizes["D"], num_attention_heads=1
    )
    with torch.device("meta"):
        layer = need("transformers", f"{path}.modeling_llama").LlamaMLP(config)

    def own_names(t: Tensors) -> Tensors:
        gate, up = t["p.in_proj.weight"].chunk(2)
        down = t["p.out_proj.weight"]
        weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return {"x": t["x"]} | weights

    def call(t: Tensors) -> Tensors:
        return {"y": functional_call(layer, {n: w for n, w in t.items() if n != "x"}, (t["x"],))}

    return Adapter(call, own_names)


def eager_mlp(compiled: bool, setting: Setting) -> Adapter:
    call = torch_compile(loops.feed_forward) if compiled else loops.feed_forward
    return Adapter(lambda t: {"y": call(t["x"], t["p.in_proj.weight"], t["p.out_proj.weight"])})


def plain(function: Callable[..., Tensor], compiled: bool, setting: Setting) -> Adapter:
    call = torch_compile(function) if compiled else function
    return Adapter(lambda t: {"y": call(**t)})


def torch_compile(function: Callable) -> Callable:
    """`function` compiled for one set of shapes, where a compiler is here."""
    if shutil.which(os.environ.get("CXX", "")) is None and not any(
        map(shutil.which, ("g++", "clang++", "c++"))
    ):
        raise Skip("inductor needs a C++ compiler, and none is on the path")
    # Afresh for each group: past eight recompilations Dynamo runs plain code; `fullgraph` makes it say so.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


for name, function in (
    ("causal_conv1d", loops.convolution),
    ("rms_norm", loops.norm),
    ("swiglu", loops.gated),
):
    register(name, "eager", partial(plain, function, False))
    register(name, "torch.compile", partial(plain, function, True))
register("SwiGLU", "eager", partial(eager_mlp, False))
register("SwiGLU", "torch.compile", partial(eager_mlp, True))
register("SwiGLU", "transformers", transformers_mlp)
register("causal_conv1d", "causal-conv1d", cuda_conv)
register("causal_conv1d", "flash-linear-attention", fla_conv)
register("causal_conv1d", "transformers", transformers_conv)
register("rms_norm", "torch.nn.functional", lambda setting: partial(torch_norm))
register("rms_norm", "flash-linear-attention", fla_norm)
register("rms_norm", "liger-kernel", liger_norm)
register("swiglu", "flash-linear-attention", fla_swiglu)
register("swiglu", "liger-kernel", liger_swiglu)


def torch_norm(t: Tensors) -> Tensors:
    return {"y": F.rms_norm(t["x"], t["weight"].shape, t["weight"], 1e-6)}
