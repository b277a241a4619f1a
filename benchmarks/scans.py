"""The scans: inputs, floors, oracles, and our own paths."""

import math
from collections.abc import Callable
from functools import partial

import torch

from prism_kernels import selective_scan, selective_scan_fn, selective_scan_step
from prism_kernels.selective_scan.reference import scan_reference
from prism_kernels.testing.inputs import Draw

from .ops import Run, add_op
from .registry import Adapter, Bench, Floor, Setting, Sizes, Skip, Tensors, register

# The selective scan: zero-order hold, and Euler's rule as in mamba_ssm.


def scan_sizes(sizes: Sizes) -> Sizes:
    """A width D (mamba's letters: B, D, L, N) is D heads of one channel, each with a step size of its own."""
    channelwise = {"H": sizes["D"], "P": 1} if "D" in sizes else {}
    return channelwise | ({"T": sizes["L"]} if "L" in sizes else {})


def draw_scan(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    B, T, H, P, N = (s[n] for n in "BTHPN")
    modes = torch.pi * torch.arange(N).expand(H, N).to(draw.wide)
    return {
        "u": draw.normal(B, T, H, P),
        "dt": draw.log_uniform(B, T, H, low=1e-3, high=1e-1),
        "A": torch.complex(torch.full_like(modes, -0.5), modes),
        "B": draw.complex_normal(H, N),
        "C": draw.complex_normal(H, N, scale=1 / math.sqrt(N)),
    }


def run_scan(method: str, t: Tensors, impl: str) -> Tensors:
    return {"y": selective_scan(**t, discretization=method, impl=impl).y}


def to_channelwise(t: Tensors) -> Tensors:
    """The same call with every channel a head of its own."""
    P = t["u"].shape[3]
    wide = {n: t[n].repeat_interleave(P, 0) for n in "ABC"}
    return wide | {"u": t["u"].flatten(2)[..., None], "dt": t["dt"].repeat_interleave(P, 2)}


def channelwise_path(run: Run, setting: Setting) -> Adapter:
    """Our PyTorch path token by token, where a step size per head lets it use matrices."""
    P = setting.sizes["P"]
    if P == 1:
        raise Skip("is the torch path itself at one channel per head")
    return Adapter(
        partial(run, impl="torch"), to_channelwise, lambda o: {"y": o["y"][..., 0].unflatten(2, (-1, P))}
    )


def define_scan(method: str, setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: Tensors) -> Tensors:
        return {"y": scan_reference(**t, discretization=method, product_dtype=product_dtype)[0]}

    return definition


def scan_floor(s: Sizes, e: int, backward: bool) -> Floor:
    """An update costs 4 operations, its read-out 4; backward 2.5 times that. exp, sin, cos per mode."""
    steps, updates = s["B"] * s["T"] * s["H"], s["B"] * s["T"] * s["H"] * s["P"] * s["N"]
    special = 3 * steps * s["N"]
    if backward:
        return Floor(steps * (3 * e * s["P"] + 8), 20 * updates, special)
    return Floor(steps * (2 * e * s["P"] + 4), 8 * updates, special)


SCAN = {"u": "BTHP", "dt": "BTH", "A": "HN", "B": "HN", "C": "HN"}
SCAN_SHAPES = ("B8_T4096_D2048_N16", "B64_T128_H8_P32_N64")

SCAN_CPU = ("B2_T128_D256_N16", "B2_T256_D256_N16", "B2_T512_D256_N16", "B16_T128_H8_P32_N64")

for name, method, cpu in (
    ("selective_scan", "zoh", (*SCAN_CPU, "B2_D256_L1024_N16")),
    ("selective_scan_euler", "euler", ("B2_D256_L1024_N16",)),
):
    run = partial(run_scan, method)
    add_op(
        Bench(
            name=name,
            kind="op",
            axes=SCAN,
            outputs={"y": "BTHP"},
            shapes=SCAN_SHAPES,
            cpu=cpu,
            draw=draw_scan,
            floor=scan_floor,
            oracle=lambda setting, run=run: partial(run, impl="torch"),
            definition=partial(define_scan, method),
            aliases=scan_sizes,
            split="H",
            looped=True,
        ),
        run,
    )
    register(name, "torch channelwise", partial(channelwise_path, run), ours=True, default=False)


def draw_step(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    B, H, P, N = (s[n] for n in "BHPN")
    tensors = draw_scan(Setting(setting.shape, s | {"T": 1}, setting.dtype, setting.device))
    tensors |= {"u": tensors["u"][:, 0], "dt": tensors["dt"][:, 0]}
    # [1,H,P,N] says that the weights are static where [H,P,N] could also be per row.
    tensors |= {n: tensors[n][None, :, None].expand(1, H, P, N).contiguous() for n in "BC"}
    return {"state": draw.complex_normal(B, H, P, N)} | tensors


def run_step(t: Tensors, impl: str) -> Tensors:
    y, state = selective_scan_step(**t, impl=impl)
    return {"y": y, "new_state": state}


def step_floor(s: Sizes, e: int, backward: bool) -> Floor:
    updates, heads = s["B"] * s["H"] * s["P"] * s["N"], s["B"] * s["H"]
    return Floor(16 * updates + heads * (2 * e * s["P"] + 4), 8 * updates, 3 * heads * s["N"])


def define_step(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: Tensors) -> Tensors:
        tokens = {"u": t["u"][:, None], "dt": t["dt"][:, None], "A": t["A"], "B": t["B"][0], "C": t["C"][0]}
        y, state = scan_reference(**tokens, initial_state=t["state"], product_dtype=product_dtype)
        return {"y": y[:, 0], "new_state": state}

    return definition


add_op(
    Bench(
        name="selective_scan_step",
        kind="op",
        axes={"state": "BHPN", "u": "BHP", "dt": "BH", "A": "HN", "B": "1HPN", "C": "1HPN"},
        outputs={"y": "BHP", "new_state": "BHPN"},
        shapes=("B64_H8_P32_N64",),
        cpu=("B16_H8_P32_N64",),
        draw=draw_step,
        floor=step_floor,
        oracle=lambda setting: partial(run_step, impl="torch"),
        definition=define_step,
        split="H",
        looped=True,
        directions=("forward",),
    ),
    run_step,
)


# Mamba's own call: a real diagonal, weights per token, everything fused, channels before time.


def draw_mamba(setting: Setting) -> Tensors:
    s, draw = setting.sizes, Draw(0, setting.dtype)
    B, T, D, N = (s[n] for n in "BTDN")
    return {
        "u": draw.normal(B, D, T),
        "delta": draw.normal(B, D, T, scale=0.5),
        "A": -torch.arange(1.0, N + 1).expand(D, N).to(draw.wide).contiguous(),
        "B": draw.normal(B, N, T),
        "C": draw.normal(B, N, T, scale=1 / math.sqrt(N)),
        "D": draw.wide_normal(D),
        "z": draw.normal(B, D, T),
        "delta_bias": draw.gate(D, low=-6.0, high=-3.0),
    }


def run_mamba(t: Tensors, impl: str) -> Tensors:
    return {"y": selective_scan_fn(**t, delta_softplus=True, impl=impl)}


def define_mamba(setting: Setting, product_dtype: torch.dtype | None) -> Callable:
    def definition(t: Tensors) -> Tensors:
        u, z = (t[n].mT[..., None] for n in "uz")
        B, C = (t[n].mT[:, :, None] for n in "BC")
        options = {"dt_bias": t["delta_bias"], "dt_softplus": True, "discretization": "euler"}
        args = (u, t["delta"].mT, t["A"], B, C, t["D"], z)
        return {"y": scan_reference(*args, **options, product_dtype=product_dtype)[0][..., 0].mT}

    return definition


def mamba_floor(s: Sizes, e: int, backward: bool) -> Floor:
    """An update costs 4 operations, its read-out 2; backward 2.5 times that. An exponential per mode."""
    tokens, steps = s["B"] * s["T"], s["B"] * s["T"] * s["D"]
    if backward:
        return Floor(e * (7 * steps + 4 * tokens * s["N"]), 15 * steps * s["N"], steps * (s["N"] + 3))
    return Floor(e * (4 * steps + 2 * tokens * s["N"]), 6 * steps * s["N"], steps * (s["N"] + 3))


add_op(
    Bench(
        name="selective_scan_fn",
        kind="op",
        axes={"u": "BDT", "delta": "BDT", "A": "DN", "B": "BNT", "C": "BNT", "D": "D", "z": "BDT"}
        | {"delta_bias": "D"},
        outputs={"y": "BDT"},
        shapes=("B8_D2048_L4096_N16",),
        cpu=("B2_D256_L512_N16",),
        draw=draw_mamba,
        floor=mamba_floor,
        oracle=lambda setting: partial(run_mamba, impl="torch"),
        definition=define_mamba,
        aliases=lambda sizes: {"T": sizes["L"]},
        looped=True,
    ),
    run_mamba,
)
