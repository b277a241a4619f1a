"""Layers and the model: our modules as they are, their ops on a path of choice.

Parameters are inputs like any other, named "p.<name>", so that one backward pass gives all gradients. What
stands in for plain PyTorch, and as a competitor, is the same module with eager time loops (`loops.py`) in
place of the mixers' ops, at float32 or wider inside; of SwiGLU, which has no mixer, the plain formula.
"compiled torch" is torch.compile of the module on our PyTorch path: inductor fuses what stands around the
ops, which stay one node each. Floors count parameters and activations once, products
with the weights, and the mixer's own operations; in the model the mixers' operations are left out.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from prism_kernels import causal_conv1d, chunk_gated_delta_rule, rms_norm, selective_scan, swiglu
from prism_kernels.testing.inputs import Draw
from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification
from prism_models.layers import GatedDelta, S4DComplex, SwiGLU
from prism_models.signal.blocks import Block

from . import loops
from .ranking import COMPILED
from .registry import Adapter, Bench, Floor, Setting, Sizes, Skip, Tensors, add, register

OPS = {f.__name__: f for f in (causal_conv1d, chunk_gated_delta_rule, rms_norm, selective_scan, swiglu)}
LOOPS = {"selective_scan": loops.scan_loop, "chunk_gated_delta_rule": loops.delta_loop}

Build = Callable[[Setting], nn.Module]
Call = Callable[[nn.Module, Tensors, Tensors], Tensors]  # (module, parameters, inputs) -> outputs


@contextlib.contextmanager
def ops_replaced(by: dict[str, Callable]) -> Iterator[None]:
    """The layers' ops, by name, replaced for a while."""
    places = [
        (module, name)
        for module in [m for n, m in sys.modules.items() if n.startswith("prism_models.layers.")]
        for name in by
        if hasattr(module, name)
    ]
    kept = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, by[name])
        yield
    finally:
        for (module, name), op in zip(places, kept, strict=True):
            setattr(module, name, op)


def module_run(build: Build, call: Call, by: dict[str, Callable], setting: Setting) -> Callable:
    """Run a module with the parameters given and its ops replaced."""
    module = build(setting)

    def run(tensors: Tensors) -> Tensors:
        parameters = {n.removeprefix("p."): t for n, t in tensors.items() if n.startswith("p.")}
        with ops_replaced(by):
            return call(module, parameters, {n: t for n, t in tensors.items() if not n.startswith("p.")})

    return run


def forced(impl: str) -> dict[str, Callable]:
    """Every op on one path."""
    return {name: partial(op, impl=impl) for name, op in OPS.items()}


def our_module(build: Build, call: Call, impl: str, setting: Setting) -> Adapter:
    if impl == "triton" and setting.device != "cuda":
        raise Skip("needs a CUDA device; Triton's interpreter is no path to time")
    return Adapter(module_run(build, call, {} if impl == "triton" else forced(impl), setting))


def compiled_module(build: Build, call: Call, setting: Setting) -> Adapter:
    """The module on our PyTorch path, compiled: a layer whole, a model block by block, each kind once."""
    from .peers import torch_compile

    def compiled(setting: Setting) -> nn.Module:
        module = build(setting)
        parts = [part for part in module.modules() if isinstance(part, Block)] or [module]
        for part in parts:
            part.forward = torch_compile(part.forward)
        return module

    run = module_run(compiled, call, forced("torch"), setting)
    return Adapter(run, note="our PyTorch path, what stands around its ops compiled")


def looped(build: Build, call: Call, setting: Setting, product_dtype: torch.dtype | None = None) -> Callable:
    """The module with time loops for its mixers' ops, and our PyTorch path for the small ops."""
    return module_run(build, call, forced("torch") | LOOPS, setting)


def fallback_inside(build: Build, call: Call, setting: Setting) -> Adapter:
    """The module with transformers' PyTorch fallback as its delta rule."""
    from .peers import transformers_function

    fallback = transformers_function("torch_chunk_gated_delta_rule")

    def rule(q, k, v, g, beta, *, scale, initial_state, output_final_state, **options):
        o, state = fallback(q, k, v, g, beta, output_final_state=True, **options)
        return o * (scale * k.shape[-1] ** 0.5), state  # it always scales by K^-0.5

    return Adapter(module_run(build, call, forced("torch") | {"chunk_gated_delta_rule": rule}, setting))


def draw_module(build: Build, axes: str, setting: Setting) -> Tensors:
    draw, module = Draw(0, setting.dtype), build(setting)
    parameters = {f"p.{n}": p.detach().to(setting.dtype) for n, p in module.named_parameters()}
    return {"x": draw.normal(*(setting.sizes[a] for a in axes))} | parameters


def add_module(bench: Bench, build: Build, call: Call) -> None:
    """Enter a module with its three paths, the compiled one and the plain form; the reference as in ops."""
    add(bench)
    for impl in ("triton", "torch", "reference"):
        factory = partial(our_module, build, call, impl)
        register(bench.name, impl, factory, ours=True, default=impl != "reference")
    register(bench.name, COMPILED, partial(compiled_module, build, call), ours=True)
    if bench.name != "SwiGLU":
        register(bench.name, "eager time loop", bench.definition)


def module_bench(
    name: str,
    kind: str,
    build: Build,
    call: Call,
    axes: str,
    outputs: dict[str, str],
    mixer: Callable,
    plain: Callable | None = None,
    **shapes,
) -> Bench:
    """A bench whose oracle is our PyTorch path, tied to `plain` or to the module with time loops."""

    def floor(sizes: Sizes, e: int, backward: bool) -> Floor:
        module = build(Setting("", sizes, torch.float32, "meta"))
        weights = sum(p.numel() for p in module.parameters())
        products = 2 * sum(p.numel() for p in module.parameters() if p.ndim == 2)
        tokens = sizes["B"] * sizes["T"]
        ends = tokens * sizes["D"] + torch.Size([sizes[a] for a in next(iter(outputs.values()))]).numel()
        extra = mixer(sizes, backward)
        if backward:
            return Floor(e * (2 * weights + 2 * ends), 2 * tokens * products + extra)
        return Floor(e * (weights + ends), tokens * products + extra)

    return Bench(
        name=name,
        kind=kind,
        axes={"x": axes},
        outputs=outputs,
        draw=partial(draw_module, build, axes),
        floor=floor,
        oracle=lambda setting: module_run(build, call, forced("torch"), setting),
        definition=plain or partial(looped, build, call),
        looped=True,
        **shapes,
    )


def built(make: Callable[[Sizes], nn.Module], setting: Setting) -> nn.Module:
    """The module of a shape, the same weights every time; no gradients of its own."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu" if setting.device == "cuda" else setting.device),
    ):
        torch.manual_seed(0)
        return make(setting.sizes).requires_grad_(False)


def call_layer(module: nn.Module, parameters: Tensors, inputs: Tensors) -> Tensors:
    y = functional_call(module, parameters, (inputs["x"],))
    return {"y": y[0] if isinstance(y, tuple) else y}


def call_model(module: nn.Module, parameters: Tensors, inputs: Tensors) -> Tensors:
    return {"logits": functional_call(module, parameters, (inputs["x"], "signal"))["logits"]}


def plain_swiglu(setting: Setting, product_dtype: torch.dtype | None = None) -> Callable:
    """The feed-forward layer, with nothing of ours."""
    return lambda t: {"y": loops.feed_forward(t["x"], t["p.in_proj.weight"], t["p.out_proj.weight"])}


def delta_flops(s: Sizes, backward: bool) -> int:
    return (14 if backward else 7) * s["B"] * s["T"] * s["D"] ** 2 // s["H"]


def scan_flops(s: Sizes, backward: bool) -> int:
    return (20 if backward else 8) * s["B"] * s["T"] * s["D"] * s["N"]


def nothing(s: Sizes, backward: bool) -> int:
    return 0


LAYERS = (
    ("S4DComplex", lambda s: S4DComplex(s["D"], s["H"], s["N"]), scan_flops,
     ("B16_T2048_D1024_H16_N32",), ("B4_T256_D256_H8_N32",)),
    ("GatedDelta", lambda s: GatedDelta(s["D"], s["H"]), delta_flops,
     ("B8_T4096_D2048_H16",), ("B4_T256_D256_H8",)),
    ("SwiGLU", lambda s: SwiGLU(s["D"]), nothing,
     ("B8_T4096_D2048",), ("B4_T256_D256",)),
)  # fmt: skip

for name, make, flops, gpu, cpu in LAYERS:
    build = partial(built, make)
    plain = plain_swiglu if name == "SwiGLU" else None
    outputs = {"y": "BTD"}
    bench = module_bench(name, "layer", build, call_layer, "BTD", outputs, flops, plain, shapes=gpu, cpu=cpu)
    add_module(bench, build, call_layer)
    if name == "GatedDelta":
        register(name, "transformers", partial(fallback_inside, build, call_layer))


def model_sizes(sizes: Sizes) -> Sizes:
    """Rows, tokens and features of "ecg_4x1000x12", and the classes of the task."""
    named = {"B": sizes["x0"], "T": sizes["x1"], "D": sizes["x2"]} if "x2" in sizes else {}
    return named | {"C": 10 if "image" in sizes else 5}


def default_model(s: Sizes) -> nn.Module:
    return PRISMForClassification(PRISMConfig(modalities=[ModalityConfig("signal", s["D"], s["C"])]))


MODEL_SHAPES = ("image_16x64x48", "ecg_4x1000x12")
build_model = partial(built, default_model)
model_bench = module_bench(
    "PRISM",
    "model",
    build_model,
    call_model,
    "BTD",
    {"logits": "BC"},
    nothing,
    shapes=MODEL_SHAPES,
    cpu=MODEL_SHAPES,
)
model_bench.aliases = model_sizes
model_bench.looped = False  # a handful of logits: their error on a cut says nothing of the whole
add_module(model_bench, build_model, call_model)
