"""`python -m benchmarks.compile_report`: what every kernel compiles to, on a machine without a GPU.

Each op is called once with its launches recorded instead of run, so what is compiled is what would
have been launched: the same kernel, configuration and argument specialisation. Columns:

regs      registers a thread            spill/loop  local-memory instructions, in all and in loops
smem      shared memory in bytes        HGMMA/HMMA  tensor-core instructions (warp-group, warp)
MUFU      special-function instructions instrs      instructions in the kernel and in its longest loop

Exits with 1 if a kernel does not compile. AMD targets are compiled, not disassembled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import prism_kernels as pk
from prism_kernels._core.runtime import Launch, record_launches

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
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
    hgmma: int = 0
    hmma: int = 0
    mufu: int = 0
    instructions: int = 0
    loop: int = 0
    error: str = ""


def cases() -> list[tuple[str, Callable[[], object]]]:
    """The calls whose kernels are compiled: name and a call that returns differentiable outputs."""
    calls: list[tuple[str, Callable[[], object]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        short = "bf16" if dtype == torch.bfloat16 else "fp32"
        calls.append((f"D2048 W4 {short}", partial(_conv, dtype)))
        for size in (32, 64, 128):
            calls.append((f"K=V={size} {short}", partial(_delta, pk.chunk_gated_delta_rule, size, dtype)))
        calls.append((f"K=V=64 {short}", partial(_delta, pk.fused_recurrent_gated_delta_rule, 64, dtype)))
        for P, N in ((1, 16), (1, 64), (32, 64)):
            calls.append((f"P{P} N{N} {short}", partial(_scan, P, N, dtype)))
        calls.append((f"step P1 N16 {short}", partial(_scan_step, 1, 16, dtype)))
    return calls


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _conv(dtype: torch.dtype) -> tuple:
    x, weight, bias = _leaf(2, 256, 2048, dtype=dtype), _leaf(2048, 4), _leaf(2048)
    return pk.causal_conv1d(x, weight, bias, activation="silu", impl="triton")[:1]


def _delta(op: Callable, size: int, dtype: torch.dtype) -> tuple:
    q, k, v = (_leaf(2, 256, 16, size, dtype=dtype) for _ in range(3))
    g, beta, h0 = _leaf(2, 256, 16), _leaf(2, 256, 16), _leaf(2, 16, size, size)
    return op(q, k, v, g, beta, initial_state=h0, output_final_state=True, impl="triton")


def _scan_arguments(P: int, N: int, dtype: torch.dtype) -> tuple[tuple, dict]:
    H = 64
    u, dt = _leaf(2, 256, H, P, dtype=dtype), _leaf(2, 256, H)
    A, B, C = (_leaf(H, N, 2) for _ in range(3))
    return (u, dt, A, B, C, _leaf(H)), {"dt_bias": _leaf(H), "dt_softplus": True, "impl": "triton"}


def _scan(P: int, N: int, dtype: torch.dtype) -> tuple:
    tensors, options = _scan_arguments(P, N, dtype)
    return pk.selective_scan(*tensors, **options, output_final_state=True)


def _scan_step(P: int, N: int, dtype: torch.dtype) -> tuple:
    (u, dt, *rest), options = _scan_arguments(P, N, dtype)
    return pk.selective_scan_step(_leaf(2, 64, P, N, 2), u[:, 0], dt[:, 0], *rest, **options)


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of one call, forward and backward; each kernel and configuration once."""
    with record_launches() as launches:
        outputs = [y for y in call() if isinstance(y, torch.Tensor) and y.requires_grad]
        torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
    return launches


def compile_launch(launch: Launch, case: str, target: str) -> Entry:
    """Compile one recorded launch for a target such as "sm_90" or "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = launch.options
    entry = Entry(launch.kernel.__name__, case, target, options["num_warps"], options["num_stages"])
    signature, constexprs, attrs = specialise(launch)
    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    try:
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        compiled = triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": True})
    except Exception as error:  # whatever the compiler raises is the row's result
        entry.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return entry
    entry.smem = compiled.metadata.shared
    if cuda:
        disassemble(compiled.asm["cubin"], entry)
    return entry


def specialise(launch: Launch) -> tuple[dict, dict, dict]:
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
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attrs


def disassemble(cubin: bytes, entry: Entry) -> None:
    """Fill in registers and instruction counts from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "--print-code", file.name)
    entry.regs = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    code, labels, back_edges = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append(found.group(1))
            target = re.search(r"\((\.L_x_\d+)\)", found.group(2))
            if found.group(1).startswith("BRA") and target and target.group(1) in labels:
                back_edges.append((labels[target.group(1)], len(code)))
    local = [op.startswith(("LDL", "STL")) for op in code]
    loops = [(a, b) for a, b in back_edges if b - a > 1]
    entry.instructions = len(code)
    entry.loop = max((b - a for a, b in loops), default=0)
    entry.spill = sum(local)
    entry.spill_in_loops = sum(
        any(a <= i < b for a, b in loops) for i, is_local in enumerate(local) if is_local
    )
    entry.hgmma, entry.hmma, entry.mufu = (
        sum(op.startswith(n) for op in code) for n in ("HGMMA", "HMMA", "MUFU")
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def run(targets: list[str], only: str) -> list[Entry]:
    """Compile everything, printing a line as each kernel is done."""
    print(
        f"{'kernel':<42}{'case':<18}{'target':<8}{'w/s':>5}{'regs':>6}{'spill/loop':>11}{'smem':>8}"
        f"{'HGMMA':>7}{'HMMA':>6}{'MUFU':>6}{'instrs/loop':>13}"
    )
    entries: list[Entry] = []
    for case, call in cases():
        seen = set()
        for launch in record(call):
            key = (launch.kernel.__name__, str(launch.constexprs))
            if key in seen or only not in launch.kernel.__name__:
                continue
            seen.add(key)
            for target in targets:
                entries.append(compile_launch(launch, case, target))
                print(_line(entries[-1]), flush=True)
    return entries


def _line(e: Entry) -> str:
    left = f"{e.kernel:<42}{e.case:<18}{e.target:<8}{f'{e.warps}/{e.stages}':>5}"
    if e.error:
        return f"{left}  FAILED {e.error}"
    spill, code = f"{e.spill}/{e.spill_in_loops}", f"{e.instructions}/{e.loop}"
    return f"{left}{e.regs:>6}{spill:>11}{e.smem:>8}{e.hgmma:>7}{e.hmma:>6}{e.mufu:>6}{code:>13}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", default=["sm_90"], help="sm_80, sm_90, sm_100, gfx942, ...")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    args = parser.parse_args()

    import triton

    entries = run(args.target, args.kernel)
    failed = sum(bool(e.error) for e in entries)
    print(f"\n{len(entries)} kernels compiled with triton {triton.__version__}, {failed} failed")
    if args.out:
        head = {"command": "python -m benchmarks.compile_report " + " ".join(sys.argv[1:])}
        head |= {"torch": torch.__version__, "triton": triton.__version__}
        rows = [asdict(e) for e in entries]
        args.out.write_text(json.dumps({**head, "kernels": rows}, indent=1) + "\n", encoding="utf-8")
    return int(failed > 0 or not entries)


if __name__ == "__main__":
    sys.exit(main())
