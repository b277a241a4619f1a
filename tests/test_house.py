"""House rules that a search can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for top in ("prism_kernels", "prism_models", "benchmarks") for p in (ROOT / top).rglob("*.py")
)
PACKAGES = [p for p in SOURCES if "benchmarks" not in p.parts]
KERNELS = [p for p in PACKAGES if "prism_kernels" in p.parts]
OPS = sorted(p.parent for p in (ROOT / "prism_kernels").glob("*/api.py"))


def lines(paths, pattern):
    """Places where a line matches."""
    return [
        f"{p.relative_to(ROOT)}:{i}"
        for p in paths
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def imported(path):
    """Modules that a file imports absolutely, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_kernels_import_only_the_hard_dependencies():
    allowed = {"torch", "triton", "einops", "numpy"}
    import sys

    foreign = {m.split(".")[0] for p in KERNELS for m in imported(p)} - allowed - set(sys.stdlib_module_names)
    assert not foreign


@pytest.mark.parametrize(
    "pattern",
    [
        r"tl\.(make_block_ptr|advance)\b",
        r"tl\.atomic_",
        r"torch\.load\((?!.*weights_only=True)",
        r"\bpickle\b",
    ],
)
def test_banned_calls_are_absent(pattern):
    assert not lines(SOURCES, pattern)


def test_every_dot_names_its_precision():
    assert not lines(KERNELS, r"tl\.dot\((?!.*input_precision)")


def test_user_errors_are_never_asserts():
    checked = [p for p in PACKAGES if "testing" not in p.parts]
    asserts = [
        f"{p.relative_to(ROOT)}:{node.lineno}"
        for p in checked
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not asserts


def test_no_option_is_swallowed():
    assert not lines([p for p in KERNELS if p.name == "api.py"], r"\*\*\w+:")


def test_every_op_has_the_same_rooms():
    for op in OPS:
        names = {"README.md", "__init__.py", "api.py", "op.py", "reference.py", "torch_impl.py"}
        assert names <= {p.name for p in op.iterdir()}, op.name


def test_files_stay_one_room():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert not [f"{p}: {n}" for p in SOURCES + tests if (n := len(p.read_text().splitlines())) > 500]
