"""`python -m benchmarks report`: tables and figures from the committed results.

Writes the tables between markers in README.md and benchmarks/RESULTS.md, and the figures into
benchmarks/figures/, from benchmarks/results/*.json and nothing else. `--check` writes nothing and exits with
1 if a table is not what the results say, or a figure is missing.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .kinds import check
from .plots import Picture, pictures
from .ranking import Race, races, ratio
from .results import DIRECTIONS, RESULTS, Result, ResultError, Row, load

ROOT = Path(__file__).parent.parent
FIGURES = "figures"


@dataclass
class Files:
    """What is committed, by name of the file."""

    folder: Path
    benchmarks: dict[str, Result]
    others: dict[str, dict]

    def of(self, device: str) -> dict[str, Result]:
        """Benchmarks of one kind of device, "cpu" or "cuda"."""
        return {name: r for name, r in self.benchmarks.items() if r.environment.device == device}

    def pictures(self) -> list[Picture]:
        """Every figure of every benchmark."""
        return [p for name, result in self.benchmarks.items() for p in pictures(result, name)]


def read(folder: Path = RESULTS) -> Files:
    """Read and validate every result file of a folder."""
    files = Files(folder, {}, {})
    for path in sorted(folder.glob("*.json")):
        if check(path) == "benchmark":
            files.benchmarks[path.stem] = load(path)
        else:
            files.others[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return files


def demo_table(files: Files) -> str:
    """README: accuracies of the demonstration."""
    runs = ["hybrid", "no state", "no delta", "majority"]
    rows = [
        [modality, *(f"{values[run]:.2f}" for run in runs)]
        for modality, values in files.others["demo_cpu"]["test_accuracy_percent"].items()
    ]
    return table(["test accuracy, %", *runs], rows)


def cpu_table(files: Files) -> str:
    """README: ours against the best peer and eager PyTorch on a CPU, and models against published code."""
    parts = [compact_table(result) for result in files.of("cpu").values()]
    published = [data for data in files.others.values() if data["kind"] == "published"]
    rows = [row for data in published for row in published_rows(data)]
    if rows:
        parts.append(table(["what", "against", "ratio", "command"], rows, text=(0, 1, 3)))
    return "\n\n".join(parts)


def published_rows(data: dict) -> list[list[str]]:
    """Rows of a training step against published code."""
    command = f"`{data['command'].split(' --')[0]}`"
    what = "a training step of the default model, {} {}"
    names = [what.format(r["case"], " x ".join(map(str, r["shape"]))) for r in data["rows"]]
    return [
        [name, "the published code", f"{row['ratio']:.1f}", command]
        for name, row in zip(names, data["rows"], strict=True)
    ]


def gpu_table(files: Files) -> str:
    """README: the same on GPUs, or the admission that there is none yet."""
    found = files.of("cuda").values()
    return "\n\n".join(map(compact_table, found)) or "Speed on a GPU: **not yet measured on a GPU**."


def compact_table(result: Result) -> str:
    """One line per op, shape and dtype: our fastest path, against the best peer and eager PyTorch."""
    lines: dict[tuple[str, str, str], dict[str, Race]] = {}
    for race in races(result.rows):
        if race.ours:
            lines.setdefault((race.op, race.shape, race.dtype), {})[race.direction] = race
    head = ["op", "shape", "dtype"]
    for direction in DIRECTIONS:
        head += [f"{direction}, ms", "over best peer", "over eager"]
    rows = []
    for (op, shape, dtype), by_direction in lines.items():
        rows.append([f"`{op}`", shape, dtype])
        for direction in DIRECTIONS:
            rows[-1] += compact_cells(by_direction.get(direction))
    return f"{table(head, rows, text=(0, 1, 2))}\n\n{provenance(result)}"


def compact_cells(race: Race | None) -> list[str]:
    """Our time, and how many times faster that is than the best peer and than eager PyTorch."""
    if race is None:
        return ["", "", ""]
    best = race.peers[0] if race.peers else None
    over_peer, over_eager = ratio(best, race.ours), ratio(race.eager, race.ours)
    peer = f"{number(over_peer)} ({best.provider})" if best else "no peer"
    return [number(race.ours.ms_p50), peer, number(over_eager)]


def provenance(result: Result) -> str:
    """Command, machine and versions, in one paragraph."""
    e = result.environment
    where = f"{e.device_name}, " + (f"driver {e.driver}" if e.driver else f"{e.threads} threads")
    versions = {"torch": e.torch, "triton": e.triton, **e.peers}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f"commit {e.commit[:10] or 'unknown'}" + (" with uncommitted changes" if e.dirty else "")
    return f"`{result.command}` on {where}; Python {e.python}, {named}; {commit}."


def results_table(files: Files) -> str:
    """RESULTS.md: everything, a section per result file and op; wrong and failed rows listed, not ranked."""
    sections = []
    for name, result in files.benchmarks.items():
        e, roof = result.environment, result.roofline
        products = ", ".join(f"{dtype} {number(rate)}" for dtype, rate in roof.tflop_s.items())
        ceilings = f"Measured there: a copy, {number(roof.copy_gb_s)} GB/s; a product, TFLOP/s: {products}."
        heading = f"## {e.device_name} ({e.device}), `results/{name}.json`"
        sections += [heading, f"{provenance(result)} Started {result.started}.", ceilings]
        its = pictures(result, name)
        for op in dict.fromkeys(row.op for row in result.rows):
            rows = [row for race in races(r for r in result.rows if r.op == op) for row in full_rows(race)]
            sections += [f"### `{op}`", table(FULL, rows, text=(0, 1, 2, 3, 11))]
            sections += [f"![{p.caption}]({FIGURES}/{p.file})" for p in its if p.op == op]
    return "\n\n".join(sections) or "No benchmark is committed yet."


FULL = ["shape", "dtype", "direction", "provider", "median, ms", "20 to 80 %, ms", "over best peer",
        "GB/s", "TFLOP/s", "% of roofline", "peak, MiB", "status"]  # fmt: skip


def full_rows(race: Race) -> list[list[str]]:
    """One line per provider, fastest first, then those that are not ranked, with the reason."""
    best = race.peers[0] if race.peers else None
    where = [race.shape, race.dtype, race.direction]
    rows = []
    for row in race.ranked:
        peak = number(row.peak_bytes / 2**20) if row.peak_bytes else ""
        quantiles = f"{number(row.ms_p20)} to {number(row.ms_p80)}"
        rates = map(number, (row.gb_s, row.tflop_s, row.roofline_percent))
        times = [number(row.ms_p50), quantiles, number(ratio(best, row))]
        rows.append([*where, row.provider, *times, *rates, peak, "ok"])
    return rows + [[*where, row.provider, *[""] * 7, status(row)] for row in race.unranked]


def status(row: Row) -> str:
    """What is the matter with a row, and why, on one line."""
    return f"{row.status}: " + " ".join(row.reason.replace("|", "/").split())


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]], text: tuple[int, ...] = (0,)) -> str:
    """A Markdown table; columns are to the right but for those in `text`."""
    rule = ["---" if i in text else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


Table = Callable[[Files], str]
README: dict[str, Table] = {"demo": demo_table, "cpu": cpu_table, "gpu": gpu_table}
DOCUMENTS: dict[str, dict[str, Table]] = {
    "README.md": README,
    "benchmarks/RESULTS.md": {"results": results_table},
}


Source = TypeVar("Source")


def fill(text: str, tables: dict[str, Callable[[Source], str]], source: Source) -> str:
    """`text` with every table between its markers replaced by what it says of `source`."""
    for name, make in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ResultError(f"report: expected {begin} and {end} once each.")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{make(source)}\n{end}{rest.split(end)[1]}"
    return text


def stale(files: Files, root: Path = ROOT) -> list[str]:
    """What is not as the results say: documents with other tables, figures that are missing."""
    problems = []
    for name, tables in DOCUMENTS.items():
        text = (root / name).read_text(encoding="utf-8")
        if fill(text, tables, files) != text:
            problems.append(f"{name}: its tables are not those of the committed results")
    folder = root / "benchmarks" / FIGURES
    return problems + [f"{p.file}: missing" for p in files.pictures() if not (folder / p.file).exists()]


def write(files: Files, root: Path = ROOT) -> list[Path]:
    """Write documents and figures, remove figures of results that are gone; return what was written."""
    written = []
    for name, tables in DOCUMENTS.items():
        path = root / name
        path.write_text(fill(path.read_text(encoding="utf-8"), tables, files), encoding="utf-8")
        written.append(path)
    folder, its = root / "benchmarks" / FIGURES, files.pictures()
    for picture in its:
        picture.draw(folder / picture.file)
        written.append(folder / picture.file)
    for path in folder.glob("*.png"):
        if path.name not in {p.file for p in its}:
            path.unlink()
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if something is out of date"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose documents are written")


def run(args: argparse.Namespace) -> int:
    """Write, or check."""
    try:
        files = read(args.results)
        if args.check:
            problems = stale(files, args.root)
            print("\n".join(problems) + "\nRun `python -m benchmarks report`." if problems else "up to date")
            return int(bool(problems))
        for path in write(files, args.root):
            print(path)
    except (ResultError, ImportError) as error:
        print(error)
        return 1
    return 0
