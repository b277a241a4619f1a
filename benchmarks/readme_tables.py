"""`python -m benchmarks.readme_tables`: write the README's tables anew from the committed results."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def result(name: str) -> dict:
    """A committed result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def demo_table() -> str:
    """The table of the demonstration."""
    report = result("demo_cpu")
    runs = ["hybrid", "no state", "no delta", "majority"]
    lines = ["| test accuracy, % | " + " | ".join(runs) + " |", "| --- |" + " ---: |" * len(runs)]
    for modality, values in report["test_accuracy_percent"].items():
        lines.append(f"| {modality} | " + " | ".join(f"{values[run]:.2f}" for run in runs) + " |")
    return "\n".join(lines)


def cpu_table() -> str:
    """The table of comparisons on a CPU."""
    delta, model = result("gated_delta_rule_vs_transformers_cpu"), result("signal_model_vs_published_cpu")
    lines = ["| what | against | ratio | command |", "| --- | --- | ---: | --- |"]
    for row in delta["rows"]:
        what = f"`chunk_gated_delta_rule`, {row['name']}, B2 T2048 H8 K=V=64"
        command = "`python -m benchmarks.gated_delta_rule_vs_transformers`"
        lines.append(f"| {what} | transformers' PyTorch fallback | {row['ratio']:.1f} | {command} |")
    for row in model["rows"]:
        what = f"a training step of the default model, {row['case']} {' x '.join(map(str, row['shape']))}"
        command = "`python -m benchmarks.signal_model_vs_published`"
        lines.append(f"| {what} | the published code | {row['ratio']:.1f} | {command} |")
    return "\n".join(lines)


TABLES = {"demo": demo_table, "cpu": cpu_table}


def fill(text: str) -> str:
    """`text` with every table between its markers replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
