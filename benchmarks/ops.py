"""The ops: inputs, floors, oracles, and our own paths.

Floors count every input read once and every output written once, gradients of parameters left out (they are
small), and the fewest operations among the forms we know; a multiply-add is two. See the ops' READMEs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prism_kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
    rms_norm,
    swiglu,
)
from prism_kernels._core.runtime import triton_is_installed
from prism_kernels.causal_conv1d.reference import causal_conv1d_reference
from prism_kernels.gated_delta_rule.reference import (
    gated_delta_rule_reference,
    gated_delta_rule_step_reference,
)
from prism_kernels.rms_norm.reference import rms_norm_reference
from prism_kernels.swiglu.reference import swiglu_reference
from prism_kernels.testing.inputs import Draw

from .registry import Adapter, Bench, Floor, Setting, Sizes, Skip, Tensors, add, register

Run = Callable[[Tensors, str], Tensors]  # (tensors, impl) -> outputs


def our_path(run: Run, impl: str, setting: Setting) -> Adapter:
    """One of our paths; the Triton path on a CPU would time the interpreter."""
    if impl == "triton":
        if not triton_is_installed():
            raise Skip("triton is not installed (pip install triton)")
        if setting.device != "cuda":
            raise Skip("needs a CUDA device; Triton's interpreter is no path to time")
    return Adapter(partial(run, impl=impl))


def add_op(bench: Bench, run: Run) -> None:
    """Enter an op with its three paths. The token loop of the reference is taken only when asked for."""
    add(bench)
    for impl in ("triton", "torch", "reference"):
        factory = partial(our_path, run, impl)
        register(bench.name, impl, factory, ours=True, default=impl != "reference")


def head_width(sizes: Sizes) -> Sizes:
    """One width for keys and values."""
    return {"K": sizes["D"], "V": sizes["D"]}


# The gated delta rule, queries and keys scaled to length one in the op, as models use it.


def draw_delta(state: bool, setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    B, T, H, D = (s[n] for n in "BTHD")
    tensors = {
        "q": draw.normal(B, T, H, D),
        "k": draw.normal(B, T, H, D),
        "v": draw.normal(B, T, H, D),
        "g": draw.gate(B, T, H, low=-0.1, high=0.0),
        "beta": draw.gate(B, T, H),
    }
    return tensors | ({"initial_state": draw.wide_normal(B, H, D, D)} if state else {})


def run_chunk(t: Tensors, impl: str) -> Tensors:
    return {"o": chunk_gated_delta_rule(**t, use_qk_l2norm_in_kernel=True, impl=impl).o}


def run_recurrent(t: Tensors, impl: str) -> Tensors:
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "impl": impl}
    o, state = fused_recurrent_gated_delta_rule(**t, **options)
    return {"o": o, "final_state": state}


def define_delta(state: bool, setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: Tensors) -> Tensors:
        options = {"use_qk_l2norm_in_kernel": True, "product_dtype": product_dtype}
        o, final = gated_delta_rule_reference(**t, scale=t["q"].shape[-1] ** -0.5, **options)
        return {"o": o, "final_state": final} if state else {"o": o}

    return definition


def delta_floor(state: bool, s: Sizes, e: int, backward: bool) -> Floor:
    """Per token 1 + 3 x 2 operations per entry of the state (decay, read, write, ask); backward twice."""
    tokens, K, V = s["B"] * s["T"] * s["H"], s["K"], s["V"]
    states = 8 * s["B"] * s["H"] * K * V if state else 0  # one in, one out; in backward their gradients
    if backward:
        return Floor(tokens * (e * (4 * K + 3 * V) + 16) + states, 14 * tokens * K * V, tokens)
    return Floor(tokens * (e * (2 * K + 2 * V) + 8) + states, 7 * tokens * K * V, tokens)


DELTA = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTH", "beta": "BTH"}

add_op(
    Bench(
        name="chunk_gated_delta_rule",
        kind="op",
        axes=DELTA,
        outputs={"o": "BTHV"},
        shapes=(
            "B8_T4096_H16_D128", "B1_T2048_H8_D128", "B1_T8192_H8_D128", "B1_T32768_H8_D128",
            "B8_T1024_H8_D64", "B4_T4096_H64_D128", "B2_T2048_H8_D64",
        ),
        cpu=("B2_T512_H8_D64", "B2_T1024_H8_D64", "B2_T2048_H8_D64"),
        draw=partial(draw_delta, False),
        floor=partial(delta_floor, False),
        oracle=lambda setting: partial(run_chunk, impl="torch"),
        definition=partial(define_delta, False),
        aliases=head_width,
        split="H",
        looped=True,
    ),
    run_chunk,
)  # fmt: skip

add_op(
    Bench(
        name="fused_recurrent_gated_delta_rule",
        kind="op",
        axes=DELTA | {"initial_state": "BHKV"},
        outputs={"o": "BTHV", "final_state": "BHKV"},
        shapes=("B64_T1_H16_D128", "B8_T64_H8_D64"),
        cpu=("B16_T1_H8_D64", "B4_T64_H8_D64"),
        draw=partial(draw_delta, True),
        floor=partial(delta_floor, True),
        oracle=lambda setting: partial(run_recurrent, impl="torch"),
        definition=partial(define_delta, True),
        aliases=head_width,
        split="H",
        looped=True,
    ),
    run_recurrent,
)


# The small ones.


def draw_conv(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    weights = {"weight": draw.normal(s["D"], s["W"], scale=0.5), "bias": draw.normal(s["D"], scale=0.1)}
    return {"x": draw.normal(s["B"], s["T"], s["D"])} | weights


def run_conv(t: Tensors, impl: str) -> Tensors:
    return {"y": causal_conv1d(**t, activation="silu", impl=impl).y}


def define_conv(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    return lambda t: {"y": causal_conv1d_reference(**t, activation="silu", product_dtype=product_dtype)[0]}


def conv_floor(s: Sizes, e: int, backward: bool) -> Floor:
    n, W = s["B"] * s["T"] * s["D"], s["W"]
    return Floor(3 * e * n, 6 * W * n, n) if backward else Floor(2 * e * n, 2 * W * n, n)


add_op(
    Bench(
        name="causal_conv1d",
        kind="op",
        axes={"x": "BTD", "weight": "DW", "bias": "D"},
        outputs={"y": "BTD"},
        shapes=("B8_T4096_D2048_W4",),
        cpu=("B4_T1024_D512_W4",),
        draw=draw_conv,
        floor=conv_floor,
        oracle=lambda setting: partial(run_conv, impl="torch"),
        definition=define_conv,
        split="D",
    ),
    run_conv,
)


def draw_norm(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    return {"x": draw.normal(s["B"], s["T"], s["D"]), "weight": 1 + draw.normal(s["D"], scale=0.1)}


def run_norm(t: Tensors, impl: str) -> Tensors:
    return {"y": rms_norm(**t, impl=impl).y}


def define_norm(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    return lambda t: {"y": rms_norm_reference(**t)[0]}


def norm_floor(s: Sizes, e: int, backward: bool) -> Floor:
    rows, D = s["B"] * s["T"], s["D"]
    return Floor(3 * e * rows * D, 9 * rows * D) if backward else Floor(2 * e * rows * D, 4 * rows * D, rows)


add_op(
    Bench(
        name="rms_norm",
        kind="op",
        axes={"x": "BTD", "weight": "D"},
        outputs={"y": "BTD"},
        shapes=("B8_T4096_D2048",),
        cpu=("B4_T1024_D1024",),
        draw=draw_norm,
        floor=norm_floor,
        oracle=lambda setting: partial(run_norm, impl="reference"),
        definition=define_norm,
    ),
    run_norm,
)


def draw_swiglu(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    return {n: draw.normal(s["B"], s["T"], s["F"]) for n in ("gate", "up")}


def run_swiglu(t: Tensors, impl: str) -> Tensors:
    return {"y": swiglu(**t, impl=impl)}


def define_swiglu(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: dict[str, Tensor]) -> Tensors:
        return {"y": swiglu_reference(**t)}

    return definition


def swiglu_floor(s: Sizes, e: int, backward: bool) -> Floor:
    n = s["B"] * s["T"] * s["F"]
    return Floor(5 * e * n, 9 * n, n) if backward else Floor(3 * e * n, 4 * n, n)


add_op(
    Bench(
        name="swiglu",
        kind="op",
        axes={"gate": "BTF", "up": "BTF"},
        outputs={"y": "BTF"},
        shapes=("B8_T4096_F5632",),
        cpu=("B4_T1024_F2048",),
        draw=draw_swiglu,
        floor=swiglu_floor,
        oracle=lambda setting: partial(run_swiglu, impl="reference"),
        definition=define_swiglu,
    ),
    run_swiglu,
)


# Decoding with the gated delta rule: gates from raw inputs too, as models have them.

RAW = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def draw_decode(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(1, setting.dtype)
    tensors = draw_delta(True, setting)
    shape = tuple(s[n] for n in "BTH")
    raw = {"g": draw.wide_normal(*shape), "beta": draw.wide_normal(*shape)}
    raw |= {"A_log": draw.gate(s["H"], low=-3.0, high=0.0), "dt_bias": draw.wide_normal(s["H"])}
    return {"state": tensors.pop("initial_state")} | tensors | raw


def run_decode(t: Tensors, impl: str) -> Tensors:
    o, state, _ = gated_delta_rule_step(**t, **RAW, use_gate_in_kernel=True, impl=impl)
    return {"o": o, "new_state": state}


def define_decode(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: Tensors) -> Tensors:
        options = RAW | {"scale": t["q"].shape[-1] ** -0.5, "product_dtype": product_dtype}
        o, state, _ = gated_delta_rule_step_reference(**t, **options)
        return {"o": o, "new_state": state}

    return definition


add_op(
    Bench(
        name="gated_delta_rule_step",
        kind="op",
        axes={"state": "BHKV"} | DELTA | {"A_log": "H", "dt_bias": "H"},
        outputs={"o": "BTHV", "new_state": "BHKV"},
        shapes=("B64_T1_H16_D128", "B64_T4_H16_D128"),
        cpu=("B16_T1_H8_D64",),
        draw=draw_decode,
        floor=partial(delta_floor, True),
        oracle=lambda setting: partial(run_decode, impl="torch"),
        definition=define_decode,
        aliases=head_width,
        split="H",
        looped=True,
        directions=("forward",),
    ),
    run_decode,
)
