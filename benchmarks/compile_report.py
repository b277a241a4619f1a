"""`python -m benchmarks.compile_report`: what every kernel compiles to, on a machine without a GPU.

Each op is called once with its launches recorded instead of run, so what is compiled is what would
have been launched on the target: the same kernel, configuration and argument specialisation. Columns:

regs      registers a thread            spill/loop  local-memory instructions, in all and in loops
smem      shared memory in bytes        group/warp  tensor-core instructions, by a warp group (HGMMA, UTC*MMA)
MUFU      special-function instructions             or a warp (HMMA, MFMA)
per el.   scans: instructions and MUFU  instrs      instructions, in all and in the longest innermost loop
          per (token, channel, state): sass.py

With --matrix, every target and every supported Triton; that writes `results/compile_report.json` and the
tables of `COMPILE_REPORT.md` (compile_matrix.py). Exits with 1 if a kernel does not compile or does not fit
its target, unless `budgets.toml` records that with a reason, or if a budget is broken (budgets.py).
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import prism_kernels as pk
from prism_kernels._core.configs import ROOM, pretend
from prism_kernels._core.runtime import Launch, interpreting, record_launches
from prism_kernels.causal_conv1d.op import causal_conv1d_state_update

from . import budgets, sass

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_MEMORY = 512  # columns, from sm_100
SCANS = ("scan_forward", "scan_adjoint", "scan_backward")  # kernels that walk the tokens one by one
CHUNKS = ("heads_forward_kernel", "heads_adjoint_kernel", "heads_backward_kernel")  # or by chunks
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Entry:
    """One compiled kernel."""

    kernel: str
    case: str
    target: str
    warps: int
    stages: int
    regs: int = 0
    spill: int = 0
    spill_in_loops: int = 0
    smem: int = 0
    group_mma: int = 0
    warp_mma: int = 0
    mufu: int = 0
    instructions: int = 0
    loop: int = 0
    per_element: float | None = None
    mufu_per_element: float | None = None
    error: str = ""


def cases() -> list[tuple[str, Callable[[], object]]]:
    """The calls whose kernels are compiled: name and a call that returns differentiable outputs.

    The first that launches a kernel is the one that continuous integration compiles.
    """
    calls: list[tuple[str, Callable[[], object]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        short = "bf16" if dtype == torch.bfloat16 else "fp32"
        calls.append((f"D2048 W4 {short}", partial(_conv, dtype)))
        calls.append((f"D2048 W4 packed {short}", partial(_conv_packed, dtype)))
        calls.append((f"D2048 W4 documents {short}", partial(_conv_documents, dtype)))
        calls.append((f"D2048 W4 L4 ring {short}", partial(_conv_update, dtype)))
        for size in (64, 32, 128, 256):
            calls.append((f"K=V={size} {short}", partial(_delta, pk.chunk_gated_delta_rule, size, dtype)))
            calls.append((f"K=V={size} few heads {short}", partial(_delta_few, size, dtype)))
        calls.append((f"K=V=64 l2 {short}", partial(_delta, pk.chunk_gated_delta_rule, 64, dtype, l2=True)))
        for size in (128, 32):
            grouped = partial(_delta, pk.chunk_gated_delta_rule, size, dtype, l2=True, groups=2)
            calls.append((f"K=V={size} l2 grouped {short}", grouped))
        for size in (64, 128):
            recurrent = partial(_delta, pk.fused_recurrent_gated_delta_rule, size, dtype)
            calls.append((f"K=V={size} {short}", recurrent))
        for op in (pk.fused_recurrent_gated_delta_rule, pk.chunk_gated_delta_rule):
            calls.append((f"K=V=64 packed {short}", partial(_delta_packed, op, dtype)))
        calls.append((f"K=V=128 checkpoints {short}", partial(_delta_checkpoints, (2, 256, 16, 128), dtype)))
        calls.append(
            (f"K=V=64 checkpoints, few heads {short}", partial(_delta_checkpoints, (1, 4096, 1, 64), dtype))
        )
        for size in (128, 64, 256):
            calls.append((f"step K=V={size} {short}", partial(_delta_step, size, dtype)))
        calls.append((f"step K=V=128 drafts {short}", partial(_delta_step, 128, dtype, drafts=True)))
        for N in (16, 64):
            calls.append((f"P1 N{N} {short}", partial(_scan, 1, N, dtype)))
        for name, call in SCAN_CALLS.items():
            calls.append((f"P1 N16 {name} {short}", partial(_scan, 1, 16, dtype, **call)))
        calls.append((f"P32 N64 {short}", partial(_scan, 32, 64, dtype)))
        for N in (64, 32) if dtype == torch.bfloat16 else ():  # in float32 channelwise, as P1
            calls.append(
                (f"P32 N{N} packed, fused {short}", partial(_scan, 32, N, dtype, packed=True, fused=True))
            )
        if dtype == torch.bfloat16:
            calls.append((f"P32 N64 split {short}", partial(_scan, 32, 64, dtype, split=True)))
        N = 128 if dtype == torch.bfloat16 else 64
        calls.append((f"P64 N{N} mamba {short}", partial(_scan, 64, N, dtype, **SCAN_CALLS["mamba"])))
        calls.append((f"step P1 N16 {short}", partial(_scan_step, 1, 16, dtype)))
        for D in (2048, 4096):
            calls.append((f"D{D} {short}", partial(_norm, D, dtype)))
            calls.append((f"F{D} {short}", partial(_swiglu, D, dtype)))
    return calls


def is_cuda(target: str) -> bool:
    """Whether a target such as "sm_90" is NVIDIA's; AMD's have names such as "gfx942"."""
    return target.startswith("sm_")


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _conv(dtype: torch.dtype) -> tuple:
    x, weight, bias = _leaf(2, 256, 2048, dtype=dtype), _leaf(2048, 4), _leaf(2048)
    return pk.causal_conv1d(x, weight, bias, activation="silu", impl="triton")[:1]


def _conv_packed(dtype: torch.dtype) -> tuple:
    x, weight, bias, state = _leaf(1, 256, 2048, dtype=dtype), _leaf(2048, 4), _leaf(2048), _leaf(4, 2048, 3)
    options = {"cu_seqlens": torch.zeros(5, dtype=torch.int32), "activation": "silu", "impl": "triton"}
    return pk.causal_conv1d(x, weight, bias, initial_state=state, output_final_state=True, **options)


def _conv_documents(dtype: torch.dtype) -> tuple:
    x, weight, bias = _leaf(2, 256, 2048, dtype=dtype), _leaf(2048, 4), _leaf(2048)
    options = {"seq_idx": torch.zeros(2, 256, dtype=torch.int32), "activation": "silu", "impl": "triton"}
    return pk.causal_conv1d(x, weight, bias, **options)[:1]


def _conv_update(dtype: torch.dtype) -> tuple:
    x, state = torch.zeros(2, 2048, 1, dtype=dtype), torch.zeros(2, 2048, 4, dtype=dtype)
    index = torch.arange(2, dtype=torch.int32)
    options = {"cache_seqlens": index, "conv_state_indices": index, "activation": "silu", "impl": "triton"}
    return (causal_conv1d_state_update(x, state, torch.zeros(2048, 4), torch.zeros(2048), **options),)


def _delta(op: Callable, size: int, dtype: torch.dtype, l2: bool = False, groups: int = 1) -> tuple:
    q, k, v = (_leaf(2, 256, H, size, dtype=dtype) for H in (16 // groups, 16 // groups, 16))
    g, beta, h0 = _leaf(2, 256, 16), _leaf(2, 256, 16), _leaf(2, 16, size, size)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": l2, "impl": "triton"}
    return op(q, k, v, g, beta=beta, initial_state=h0, **options)


def _delta_few(size: int, dtype: torch.dtype) -> tuple:
    """So few heads that sequences are cut into segments."""
    q, k, v = (_leaf(1, 4096, 1, size, dtype=dtype) for _ in range(3))
    options = {"initial_state": _leaf(1, 1, size, size), "output_final_state": True, "impl": "triton"}
    return pk.chunk_gated_delta_rule(q, k, v, _leaf(1, 4096, 1), beta=_leaf(1, 4096, 1), **options)


def _delta_checkpoints(shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
    """States after every 128 tokens; with few heads of segments, as with `_delta_few`."""
    q, k, v = (_leaf(*shape, dtype=dtype) for _ in range(3))
    options = {"initial_state": _leaf(shape[0], *shape[2:], shape[3]), "every": 128, "impl": "triton"}
    return pk.chunk_gated_delta_rule_with_checkpoints(
        q, k, v, _leaf(*shape[:3]), _leaf(*shape[:3]), **options
    )


def _delta_packed(op: Callable, dtype: torch.dtype) -> tuple:
    (q, k), v = (_leaf(1, 256, 8, 64, dtype=dtype) for _ in range(2)), _leaf(1, 256, 16, 64, dtype=dtype)
    g, beta, h0 = _leaf(1, 256, 16), _leaf(1, 256, 16), _leaf(2, 16, 64, 64)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "impl": "triton"}
    bounds = torch.zeros(3, dtype=torch.int32)
    return op(q, k, v, g, beta=beta, initial_state=h0, cu_seqlens=bounds, **options)


def _delta_step(size: int, dtype: torch.dtype, drafts: bool = False) -> tuple:
    """Everything a model decodes with; draft tokens on a state in the dtype of q."""
    T, rates = 4 if drafts else 1, torch.zeros(2, 16)
    q, k, v = (torch.zeros(2, T, 16, size, dtype=dtype) for _ in range(3))
    pool = torch.zeros(8, 16, size, size, dtype=dtype if drafts else torch.float32)
    options = {f"use_{name}_in_kernel": True for name in ("qk_l2norm", "gate", "beta_sigmoid")}
    options |= {"A_log": rates[0], "dt_bias": rates[1], "state_indices": torch.arange(2, dtype=torch.int32)}
    options |= {"output_snapshots": drafts, "inplace": True, "impl": "triton"}
    return pk.gated_delta_rule_step(pool, q, k, v, q[..., 0].float(), q[..., 0].float(), **options)[:1]


SCAN_CALLS: dict[str, dict[str, bool]] = {
    "accurate": {"fast": False},
    "fused": {"fused": True},
    "token": {"token": True},
    "mamba": {"token": True, "real": True, "fused": True},
    "packed": {"packed": True},
    "split": {"split": True},
}


def _scan(
    P: int,
    N: int,
    dtype: torch.dtype,
    *,
    fast: bool = True,
    fused: bool = False,
    token: bool = False,
    real: bool = False,
    packed: bool = False,
    split: bool = False,
) -> tuple:
    """A scan of 2,048 channels; `fused` adds bias, softplus, skip and gate, `real` is Euler's rule."""
    B, T, H = (1, 4096, 64) if split else (1 if packed else 2, 256, 2048 // P)
    pair = () if real else (2,)
    u, dt = _leaf(B, T, H, P, dtype=dtype), _leaf(B, T, H, dtype=dtype)
    weights = [_leaf(B, T, 1, N, *pair) if token else _leaf(H, N, *pair) for _ in range(2)]
    options: dict[str, Any] = {"initial_state": _leaf(2 if packed else B, H, P, N, *pair)}
    if packed:
        options |= {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "reverse": True}
    if fused:
        options |= {
            "D": _leaf(H),
            "z": _leaf(B, T, H, P, dtype=dtype),
            "dt_bias": _leaf(H),
            "dt_softplus": True,
        }
    options |= {"accuracy": "fast" if fast else "accurate", "discretization": "euler" if real else "zoh"}
    return pk.selective_scan(
        u, dt, _leaf(H, N, *pair), *weights, **options, output_final_state=True, impl="triton"
    )


def _scan_step(P: int, N: int, dtype: torch.dtype) -> tuple:
    H = 2048 // P
    u, dt, z = _leaf(2, H, P, dtype=dtype), _leaf(2, H, dtype=dtype), _leaf(2, H, P, dtype=dtype)
    A, B, C = (_leaf(H, N, 2) for _ in range(3))
    options: dict[str, Any] = {"dt_bias": _leaf(H), "dt_softplus": True, "accuracy": "fast", "impl": "triton"}
    return pk.selective_scan_step(_leaf(2, H, P, N, 2), u, dt, A, B, C, _leaf(H), z, **options)


def _norm(D: int, dtype: torch.dtype) -> tuple:
    x, residual, gate = (_leaf(2, 256, D, dtype=dtype) for _ in range(3))
    return pk.rms_norm(x, _leaf(D), residual=residual, gate=gate, impl="triton")


def _swiglu(F: int, dtype: torch.dtype) -> tuple:
    return (pk.swiglu(_leaf(2, 256, 2 * F, dtype=dtype), impl="triton"),)


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of one call, forward and backward; each specialisation of a kernel once."""
    with record_launches() as launches:
        outputs = [y for y in call() if isinstance(y, torch.Tensor) and y.requires_grad]
        torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
    seen: dict[tuple, Launch] = {}
    for launch in launches:
        absent = tuple(x is None for x in launch.args)
        seen.setdefault((launch.kernel.__name__, str(launch.constexprs), absent), launch)
    return list(seen.values())


def launches(only: str, target: str) -> list[tuple[str, Launch]]:
    """Name of the case and launch, of every kernel whose name contains `only`, on a card of `target`."""
    with pretend(target):
        recorded = [(case, launch) for case, call in cases() for launch in record(call)]
    return [(case, launch) for case, launch in recorded if only in launch.kernel.__name__]


def first_of_each(found: list[tuple[str, Launch]]) -> list[tuple[str, Launch]]:
    """One configuration per kernel."""
    return list({launch.kernel.__name__: (case, launch) for case, launch in reversed(found)}.values())[::-1]


def compile_launch(launch: Launch, case: str, target: str) -> Entry:
    """Compile one recorded launch for a target such as "sm_90" or "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = launch.options
    entry = Entry(launch.kernel.__name__, case, target, options["num_warps"], options["num_stages"])
    cuda = is_cuda(target)
    signature, constexprs, attrs = specialise(launch, cuda)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    try:
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        compiled = triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": True})
    except Exception as error:  # whatever the compiler raises is the row's result
        return replace(entry, error=_cause(error))
    try:
        return measure(entry, launch, compiled)
    except sass.NoTimeLoop as error:
        return replace(entry, error=str(error))


def _cause(error: BaseException) -> str:
    """The innermost error and its last line: outer ones quote the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def measure(entry: Entry, launch: Launch, compiled: Any) -> Entry:
    """Fill in what the machine code says."""
    cuda = is_cuda(entry.target)
    code, regs = sass.disassemble(compiled.asm["cubin"]) if cuda else sass.read_amd(compiled.asm["amdgcn"])
    smem, limit = compiled.metadata.shared, ROOM.get(entry.target, 0) * 1024
    local = ("LDL", "STL") if cuda else ("scratch_",)
    entry = replace(
        entry,
        regs=regs,
        spill=code.count(*local),
        spill_in_loops=code.count_in_loops(*local),
        smem=smem,
        group_mma=code.count("HGMMA", "UTCHMMA", "UTCQMMA"),
        warp_mma=code.count("HMMA", "v_mfma"),
        mufu=code.count("MUFU"),
        instructions=len(code.names),
        loop=max((b - a for a, b in code.innermost()), default=0),
    )
    if limit and smem > limit:
        entry.error = f"needs {smem} bytes of shared memory, {entry.target} has {limit}"
    if (columns := getattr(compiled.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY:
        entry.error = f"needs {columns} columns of tensor memory, {entry.target} has {TENSOR_MEMORY}"
    if cuda and entry.kernel in SCANS:
        module, found = inspect.getmodule(launch.kernel.fn), (0.0, 0.0)
        for walker, states in walkers(launch):
            walks = getattr(module, walker)
            part = sass.per_element(walks, code, compiled.asm["ptx"], 32 * entry.warps, states)
            found = found[0] + part[0], found[1] + part[1]
        entry.per_element, entry.mufu_per_element = (round(x, 2) for x in found)
    if cuda and entry.kernel in CHUNKS:
        size = launch.constexprs
        walks, blocks = entry.kernel != "heads_backward_kernel", -(-size["N"] // size.get("BJ", size["N"]))
        states = (
            size["C"] * size["BP"] * (size["BJ"] if entry.kernel == "heads_adjoint_kernel" else size["N"])
        )
        found = sass.per_chunk(code, walks, 1 if walks else blocks, 32 * entry.warps, states)
        entry.per_element, entry.mufu_per_element = (round(x, 2) for x in found)
    return entry


def walkers(launch: Launch) -> list[tuple[str, int]]:
    """The functions by which a scan's kernel usually walks the tokens; states that a turn of each updates."""
    constants = launch.constexprs
    states = constants["BLOCK_C"] * constants["BLOCK_N"]
    if launch.kernel.__name__ != "scan_backward":
        walker = "walk" if launch.kernel.__name__ == "scan_forward" else "walk_back"
        return [(walker, states * constants["UNROLL"])]
    if constants["SHIFTED"]:
        return [("walk_by_differences", states)]
    return [(walker, states // constants["PARTS"]) for walker in ("rerun", "walk")]


def specialise(launch: Launch, cuda: bool) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that Triton's launcher would derive from the arguments."""
    signature, constexprs, attrs = {}, {}, {}
    params = launch.kernel.params
    values = dict(zip((p.name for p in params), launch.args, strict=False)) | launch.constexprs
    for i, param in enumerate(params):
        value = values[param.name]
        fixed = param.is_constexpr or value is None
        special = isinstance(value, int) and not param.do_not_specialize
        if fixed or (special and value == 1):
            signature[param.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]] + ([] if cuda else [["tt.pointer_range", 32]])
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attrs


def run(found: dict[str, list[tuple[str, Launch]]]) -> list[Entry]:
    """Compile what each target would launch, printing a line as each kernel is done."""
    print(
        f"{'kernel':<28}{'case':<18}{'target':<8}{'w/s':>5}{'regs':>6}{'spill/loop':>11}{'smem':>8}"
        f"{'group/warp':>12}{'MUFU':>6}{'instrs/loop':>13}{'per el.':>14}"
    )
    entries: list[Entry] = []
    for target, launched in found.items():
        for case, launch in launched:
            entries.append(compile_launch(launch, case, target))
            print(_line(entries[-1]), flush=True)
    return entries


def _line(e: Entry) -> str:
    left = f"{e.kernel:<28}{e.case:<18}{e.target:<8}{f'{e.warps}/{e.stages}':>5}"
    if e.error:
        return f"{left}  FAILED {e.error}"
    spill, mma, code = (
        f"{e.spill}/{e.spill_in_loops}",
        f"{e.group_mma}/{e.warp_mma}",
        f"{e.instructions}/{e.loop}",
    )
    scan = "" if e.per_element is None else f"{e.per_element}, {e.mufu_per_element}"
    return f"{left}{e.regs:>6}{spill:>11}{e.smem:>8}{mma:>12}{e.mufu:>6}{code:>13}{scan:>14}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", default=["sm_90"], help=", ".join(TARGETS) + ", ...")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--triton", default="", help="fail unless this is the version that is imported")
    parser.add_argument("--matrix", action="store_true", help="all configurations, targets and Tritons")
    args = parser.parse_args()
    if args.matrix:
        from .compile_matrix import matrix

        return matrix(args.kernel)

    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled. Unset it.")
    import triton

    if args.triton and triton.__version__ != args.triton:
        parser.error(f"triton {triton.__version__} was imported, not {args.triton}")
    found = {target: launches(args.kernel, target) for target in args.target}
    entries = run({t: first_of_each(launched) if args.first else launched for t, launched in found.items()})
    failed = sum(bool(e.error) for e in entries)
    print(f"\n{len(entries)} kernels compiled with triton {triton.__version__}, {failed} failed")
    broken = budgets.judge(entries, budgets.load(), triton.__version__)
    print("".join(f"{line}\n" for line in broken), end="")
    if args.out:
        report = {
            "triton": triton.__version__,
            "launches": [
                [launch.kernel.__name__, case] for launched in found.values() for case, launch in launched
            ],
            "kernels": [asdict(e) for e in entries],
        }
        args.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return int(bool(broken) or not entries)


if __name__ == "__main__":
    sys.exit(main())
