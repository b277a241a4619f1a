"""The README is true: its code runs, its tables come from committed results, its map exists."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=[f"snippet {i}" for i in range(len(SNIPPETS))])
def test_snippets_run(code):
    torch.manual_seed(0)
    if "from transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_layer_of_the_first_snippet_learns():
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    exec(compile(SNIPPETS[0], "README.md", "exec"), names)
    assert names["loss"].item() < 0.5


def test_the_map_names_what_exists():
    tree = README.split("## Where things are")[1].split("## ")[0]
    folder = None
    for line in tree.splitlines():
        if not line.startswith("    "):
            continue
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{3,}", line.strip())[0].split()
        for name in (n for n in names if n.endswith(("/", ".py"))):
            path = ROOT / name if indent == 4 else folder / name
            assert path.exists(), name
        if indent == 4:
            folder = ROOT / names[0]


def test_tables_come_from_committed_results():
    assert not report.stale(report.read()), "run `python -m benchmarks report`"
