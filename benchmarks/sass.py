"""Reading machine code: instructions, loops, local memory, and the cost of a scan per element.

A loop is what lies between a label and a branch back to it. Code that is rarely reached stands behind the
end of a kernel, and a branch back from there closes none. The time loop of a scan kernel is found through the
line numbers that the compiler leaves beside the instructions: it is the innermost machine loop whose
instructions come from the body of an innermost `for ... in range(...)` of the source of the kernel. A token
passes once through each such `for` (in a backward kernel that is the replay, and then the way back), so

    instructions per element = sum over them of  instructions in the loop x threads / (steps x states)

where `states` counts the (channel, state) pairs of one program and `steps` the tokens of one pass through the
machine loop: 1, unless the assembler unrolled, which shows as loads and stores repeated against the PTX.

Kernels that walk chunks count by `per_chunk` instead.
"""

import ast
import inspect
import re
import subprocess
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NVIDIA = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
NVIDIA_LABEL = re.compile(r"(\.L_x_\d+):")
AMD = re.compile(r"\t([a-z]+_\w+)(.*)")
AMD_LABEL = re.compile(r"(\.LBB\w+):")
ENDS = ("EXIT", "s_endpgm")
NVIDIA_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')


class NoTimeLoop(Exception):
    """A `for` of the source that no machine loop could be matched with."""


@dataclass
class Code:
    """The instructions of one kernel, the source line each comes from, and its loops [first, after last)."""

    names: list[str]
    places: list[tuple[str, int]]
    loops: list[tuple[int, int]]

    def count(self, *prefixes: str) -> int:
        """Instructions whose name begins with one of these."""
        return sum(name.startswith(prefixes) for name in self.names)

    def count_in_loops(self, *prefixes: str) -> int:
        """The same, inside any loop."""
        inside = {i for a, b in self.loops for i in range(a, b)}
        return sum(self.names[i].startswith(prefixes) for i in inside)

    def innermost(self) -> list[tuple[int, int]]:
        """Loops that hold no other."""
        return [
            x for x in self.loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in self.loops)
        ]


def parse(text: str, instruction: re.Pattern, label: re.Pattern, branch: str) -> Code:
    """Read a disassembly; `branch` is how the name of a branch begins."""
    code, labels, place, ended = Code([], [], []), {}, ("", 0), 0
    for line in text.splitlines():
        if found := NVIDIA_LINE.search(line):
            place = Path(found.group(1)).name, int(found.group(2))
        elif found := label.match(line):
            labels[found.group(1)] = len(code.names)
        elif found := instruction.search(line):
            code.names.append(found.group(1))
            code.places.append(place)
            target = re.search(r"\.L\w+", found.group(2))
            start = labels.get(target.group(0)) if target and found.group(1).startswith(branch) else None
            if start is not None and start >= ended and len(code.names) - start > 1:
                code.loops.append((start, len(code.names)))
            if found.group(1) in ENDS and "@" not in line:
                ended = len(code.names)
    return code


def disassemble(cubin: bytes) -> tuple[Code, int]:
    """Return the code of an NVIDIA kernel and the registers of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        text = tool("nvdisasm", "--print-code", "--print-line-info", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return parse(text, NVIDIA, NVIDIA_LABEL, "BRA"), registers


def read_amd(assembly: str) -> tuple[Code, int]:
    """Return the code of an AMD kernel and the vector registers of a thread."""
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", assembly))
    return parse(assembly, AMD, AMD_LABEL, "s_cbranch"), registers


def tool(name: str, *arguments: str) -> str:
    """Output of a program from Triton's own package."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def time_loops(kernel: Any) -> list[range]:
    """Lines of the innermost `for ... in range(...)` statements of a kernel's source."""
    source, first = inspect.getsourcelines(kernel.fn)
    tree = ast.parse(textwrap.dedent("".join(source)))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and _over_range(node)]
    inner = [x for x in loops if not any(y is not x and y in loops for y in ast.walk(x))]
    return [range(first + x.lineno - 1, first + (x.end_lineno or x.lineno)) for x in inner]


def source_file(kernel: Any) -> str:
    """Name of the file that defines a kernel; without the folder, which differs where a cache is shared."""
    return Path(inspect.getsourcefile(kernel.fn) or "").name


def _over_range(node: ast.For) -> bool:
    """Whether a `for` runs over `range` or `tl.range`; `tl.static_range` leaves no loop behind."""
    function = node.iter.func if isinstance(node.iter, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", "")) == "range"


def per_element(kernel: Any, code: Code, ptx: str, threads: int, states: int) -> tuple[float, float]:
    """Instructions, and special-function instructions, per element of a scan kernel."""
    file = source_file(kernel)
    instructions = special = 0.0
    for lines in time_loops(kernel):
        a, b = machine_loop(code, file, lines)
        own = [code.names[i] for i in range(a, b) if _within(code.places[i], file, lines)]
        moved = sum(name.startswith(("LDG", "STG")) for name in own)
        steps = max(1, round(moved / max(1, ptx_accesses(ptx, file, lines))))
        share = threads / (steps * states)
        instructions += (b - a) * share
        special += sum(name.startswith("MUFU") for name in code.names[a:b]) * share
    return round(instructions, 2), round(special, 2)


def per_chunk(code: Code, walks: bool, turns: int, threads: int, states: int) -> tuple[float, float]:
    """About so many instructions, and special-function ones, per element of a kernel in chunks of tokens.

    Counted are those of its loop over chunks if it `walks` them, else the whole kernel, whose loops over
    blocks of states make `turns`; but not loops inside those, which only poles far apart need. `states` are
    those of a chunk: tokens times channels times states.
    """
    outer = [x for x in code.loops if not any(x != y and y[0] <= x[0] and x[1] <= y[1] for y in code.loops)]
    inner = {i for a, b in code.loops if (a, b) not in outer for i in range(a, b)}
    longest = max((b - a for a, b in outer), default=0)
    looped = {i for a, b in outer if not walks or b - a == longest for i in range(a, b)} - inner
    once = set() if walks else set(range(len(code.names))) - looped - inner
    weights = dict.fromkeys(once, 1) | dict.fromkeys(looped, turns)
    special = sum(n for i, n in weights.items() if code.names[i].startswith("MUFU"))
    return sum(weights.values()) * threads / states, special * threads / states


def machine_loop(code: Code, file: str, lines: range) -> tuple[int, int]:
    """The innermost machine loop that holds most of the instructions of these source lines.

    Of several that hold about as many (a function inlined twice, a tail) it is the longest.
    """
    votes = {(a, b): sum(_within(p, file, lines) for p in code.places[a:b]) for a, b in code.innermost()}
    most = max(votes.values(), default=0)
    loop = max((x for x, n in votes.items() if 3 * n >= 2 * most), key=lambda x: x[1] - x[0], default=(0, 0))
    if not most:
        raise NoTimeLoop(f"no machine loop comes from {file}:{lines.start}-{lines.stop - 1}")
    return loop


def ptx_accesses(ptx: str, file: str, lines: range) -> int:
    """Loads from and stores to global memory that these source lines have in the PTX: those of one step."""
    numbers = set(re.findall(rf'\.file\s+(\d+)\s+"[^"]*{re.escape(file)}"', ptx))
    found, inside = 0, False
    for line in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            inside = place.group(1) in numbers and int(place.group(2)) in lines
        found += inside and bool(re.search(r"\b(ld|st)\.global", line))
    return found


def _within(place: tuple[str, int], file: str, lines: range) -> bool:
    return place[0] == file and place[1] in lines
