"""Every kernel has a budget of registers, spills, shared memory and instructions, and keeps it."""

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budgets, compile_matrix, sass
from benchmarks.compile_report import Entry

ROOT = Path(__file__).parent.parent
ALLOWED = budgets.load()


def compiled(folder, *options):
    """The report of a process that compiles for real; its own cache: no old success hides anything."""
    out = folder / "report.json"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", *options, "--out", str(out)],
        cwd=ROOT,
        env=clean | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


def broken(report):
    entries = [Entry(**row) for row in report["kernels"]]
    return "\n".join(budgets.judge(entries, ALLOWED, report["triton"]))


def test_one_configuration_of_every_kernel_keeps_its_budget(tmp_path):
    report = compiled(tmp_path, "--first", "--target", "sm_90")
    assert not broken(report), broken(report)
    launched = {tuple(pair) for pair in report["launches"]}
    budgeted = {(kernel, case) for kernel, cases in ALLOWED.items() for case in cases}
    assert launched - budgeted == set(), "no budget in benchmarks/budgets.toml"
    assert budgeted - launched == set(), "budgets of what is gone"


def test_every_kernel_compiles_for_amd(tmp_path):
    report = compiled(tmp_path, "--first", "--target", "gfx942")
    assert not broken(report), broken(report)


WITH_CHECKPOINTS = """
import sys, torch
from functools import partial
from benchmarks import compile_report
from prism_kernels._core import configs

for size in (128, 256):
    with configs.pretend("gfx942"):
        for kernel in ("states_kernel", "segments_kernel"):
            row = configs.config("chunk_gated_delta_rule", kernel, torch.bfloat16, size, torch.device("cpu"))
            assert row.shared <= configs.ROOM["gfx942"]
            call = partial(compile_report._delta_checkpoints, (1, 4096, 1, size), torch.bfloat16)
            back = [x for x in compile_report.record(call) if x.kernel.__name__ == kernel][-1]
            assert back.constexprs["EVERY"] == 128
            entry = compile_report.compile_launch(back, str(size), "gfx942")
            print(kernel, size, entry.smem, row.shared * 1024, entry.error)
"""


def test_gradients_of_checkpoints_keep_to_the_rows_of_amd(tmp_path):
    """Rows say what fits a card, with and without checkpoints: what passes the check can be launched."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_CHECKPOINTS], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        kernel, size, taken, allowed, *error = line.split()
        assert 0 < int(taken) <= int(allowed) and not error, line


@pytest.mark.full
def test_every_configuration_keeps_its_budget(tmp_path):
    report = compiled(tmp_path, "--target", "sm_90")
    assert not broken(report), broken(report)


def kernels_of_the_package():
    """Names of the `@triton.jit` functions that no other one calls."""
    defined, called = set(), set()
    for path in sorted((ROOT / "prism_kernels").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(decorator, node.decorator_list):
                defined.add(node.name)
                called |= {getattr(x.func, "id", "") for x in ast.walk(node) if isinstance(x, ast.Call)}
    return defined - called


def decorator(node):
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def test_every_kernel_of_the_package_has_a_budget_and_no_other():
    assert kernels_of_the_package() == set(ALLOWED)


def test_budgets_above_the_limits_of_the_house_give_a_reason():
    assert not budgets.unexplained(ALLOWED)


def test_budgets_that_went_up_give_a_reason():
    history = budgets.history()
    if not history:
        pytest.skip("no git history here")
    assert not [line for version in history for line in budgets.raised(version, ALLOWED)]


def test_the_committed_report_keeps_the_budgets():
    report = json.loads(budgets.REPORT.read_text(encoding="utf-8"))
    assert not budgets.complaints(budgets.rows(report), ALLOWED)


def test_the_page_comes_from_the_committed_report():
    report = json.loads(budgets.REPORT.read_text(encoding="utf-8"))
    page = compile_matrix.PAGE.read_text(encoding="utf-8")
    assert compile_matrix.fill(page, report) == page, "run `python -m benchmarks.compile_matrix`"


ROW = Entry("some_kernel", "bf16", "sm_90", 4, 2, regs=117, smem=1024)
BUDGET = {"some_kernel": {"bf16": {"sm_90": {"regs": 120, "spill": 0, "spill_in_loops": 0, "smem": 1024}}}}


def changed(**numbers):
    new = copy.deepcopy(BUDGET)
    reason = numbers.pop("reason", None)
    new["some_kernel"]["bf16"]["sm_90"] |= numbers
    return (
        new if reason is None else {"some_kernel": {"bf16": new["some_kernel"]["bf16"] | {"reason": reason}}}
    )


@pytest.mark.parametrize(
    "row, allowed, words",
    [
        ({}, BUDGET, []),
        ({"regs": 121}, BUDGET, ["some_kernel [bf16] sm_90: regs 121, allowed 120"]),
        ({"spill": 2, "spill_in_loops": 1}, BUDGET, ["spill 2, allowed 0", "spill_in_loops 1, allowed 0"]),
        ({"error": "CompilationError: x"}, BUDGET, ["some_kernel [bf16] sm_90: CompilationError: x"]),
        ({"error": "x"}, {"some_kernel": {"bf16": {"sm_90": {"compiles": False}}}}, []),
        ({}, {"some_kernel": {"bf16": {"sm_90": {"compiles": False}}}}, ["compiles now"]),
        ({"kernel": "new_kernel"}, BUDGET, ["new_kernel [bf16] sm_90: has no budget"]),
    ],
)
def test_a_broken_budget_is_told_with_kernel_measured_and_allowed(row, allowed, words):
    told = budgets.complaints([Entry(**(vars(ROW) | row))], allowed)
    assert len(told) == len(words)
    assert all(word in line for word, line in zip(words, told, strict=True))


def test_another_triton_is_held_to_compiling_only():
    rows = [Entry(**(vars(ROW) | change)) for change in ({"regs": 200}, {"error": "no"})]
    assert budgets.judge(rows, BUDGET, "3.6.0") == ["some_kernel [bf16] sm_90: no"]
    known = changed(**{"except": ["3.6.0"]})
    assert not budgets.judge(rows, known, "3.6.0") and budgets.judge(rows, known, "3.9.0")
    assert budgets.unexplained(known)


def test_a_triton_that_cannot_be_had_is_a_named_failure(monkeypatch, tmp_path):
    def pip(command, **_):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution found"
        )

    monkeypatch.setattr(compile_matrix, "SIDE", tmp_path)
    monkeypatch.setattr(compile_matrix.subprocess, "run", pip)
    why = compile_matrix.one("0.0.1", "")
    assert why == "pip could not install it: ERROR: No matching distribution found"
    assert why in compile_matrix.summary_table({"versions": {"triton": {"0.0.1": why}}, "kernels": []})


def test_raising_needs_a_new_reason_and_lowering_none():
    assert not budgets.raised(BUDGET, changed(regs=112))
    assert "regs 120 -> 128" in budgets.raised(BUDGET, changed(regs=128))[0]
    assert not budgets.raised(BUDGET, changed(regs=128, reason="packed sequences"))
    assert budgets.raised(changed(reason="old"), changed(regs=128, reason="old"))


def test_a_limit_of_the_house_needs_a_reason():
    assert "spill_in_loops 3 above 0" in budgets.unexplained(changed(spill_in_loops=3))[0]
    assert not budgets.unexplained(changed(spill_in_loops=3, reason="float32 without tensor cores"))
    assert budgets.unexplained({"k": {"c": {"sm_80": {"compiles": False}}}})


def test_writing_tightens_and_never_raises_without_a_reason():
    better, worse = (Entry(**(vars(ROW) | {"regs": n})) for n in (90, 150))
    assert budgets.update(BUDGET, [better], "")["some_kernel"]["bf16"]["sm_90"]["regs"] == 96
    assert budgets.update(BUDGET, [worse], "") == BUDGET
    risen = budgets.update(BUDGET, [worse], "why")["some_kernel"]["bf16"]
    assert (risen["sm_90"]["regs"], risen["reason"]) == (152, "why")
    assert budgets.load(budgets.dump(risen := {"some_kernel": {"bf16": risen}})) == risen


def instructions(line, *names):
    yield f'\t//## File "/x/kernels.py", line {line}'
    yield from (f"        /*{i:04x}*/                   {name} R1, R2 ;" for i, name in enumerate(names))


def test_kernels_by_chunks_count_each_loop_as_often_as_it_turns():
    names = ["MOV"] * 20
    names[5] = names[12] = "MUFU.EX2"
    code = sass.Code(names, [("", 0)] * 20, [(2, 8), (3, 5), (10, 18), (11, 13)])
    # of ten instructions in two loops, four are in loops inside those
    assert sass.per_chunk(code, False, 1, 32, 64) == ((20 - 4) / 2, 1 / 2)
    assert sass.per_chunk(code, False, 3, 32, 64) == ((6 + 3 * 10) / 2, 3 / 2)
    assert sass.per_chunk(code, True, 1, 32, 64) == (6 / 2, 0)


def disassembly(*loop):
    """A loop from line 12, whose body has helpers from line 3, in a longer loop from line 11."""
    return "\n".join(
        (
            *(".L_x_0:", *instructions(11, "IADD3", "STL"), ".L_x_1:", *loop),
            "        /*0100*/              @!P0 BRA `(.L_x_1) ;",
            *instructions(11, "IADD3"),
            "        /*0200*/               @P1 BRA P2, `(.L_x_0) ;",
            *instructions(14, "STL", "EXIT"),
            *(".L_x_2:", *instructions(15, "STL", "FADD")),
            # from cold code, back to where it came from
            "        /*0400*/                   BRA `(.L_x_1) ;",
        )
    )


def test_a_loop_runs_from_its_label_to_the_branch_back():
    once = (*instructions(12, "LDG.E", "FFMA"), *instructions(3, "MUFU.EX2"), *instructions(12, "STG.E"))
    code = sass.parse(disassembly(*once), sass.NVIDIA, sass.NVIDIA_LABEL, "BRA")
    assert code.loops == [(2, 7), (0, 9)] and code.innermost() == [(2, 7)]
    assert (code.count("STL"), code.count_in_loops("STL"), code.count("MUFU")) == (3, 1, 1)
    assert sass.machine_loop(code, "kernels.py", range(12, 13)) == (2, 7)
    with pytest.raises(sass.NoTimeLoop):
        sass.machine_loop(code, "kernels.py", range(30, 40))


def test_an_unrolled_loop_counts_its_steps(monkeypatch):
    here = ".loc 1 12 4\n@%p1 ld.global.b32 {r1}\nst.global.b32 r2\n"
    ptx = '.file 1 "/x/kernels.py"\n' + here + ".loc 1 3 1\nld.global.b32 r"
    assert sass.ptx_accesses(ptx, "kernels.py", range(12, 13)) == 2
    once = (*instructions(12, "LDG.E", "FFMA"), *instructions(3, "MUFU.EX2"), *instructions(12, "STG.E"))
    monkeypatch.setattr(sass, "time_loops", lambda kernel: [range(12, 13)])
    monkeypatch.setattr(sass, "source_file", lambda kernel: "kernels.py")
    for times, expected in ((1, (5 * 32 / 64, 32 / 64)), (2, (9 * 32 / 128, 2 * 32 / 128))):
        code = sass.parse(disassembly(*once * times), sass.NVIDIA, sass.NVIDIA_LABEL, "BRA")
        assert sass.per_element(None, code, ptx, 32, 64) == pytest.approx(expected, abs=0.01)


def test_time_loops_are_the_innermost_over_range():
    class kernel:
        @staticmethod
        def fn(T, SEGMENT, static_range):
            for s in range(T):
                for _ in range(SEGMENT):
                    for _ in static_range(4):
                        s += 1
                for _ in range(s):
                    s -= 1

    first = kernel.fn.__code__.co_firstlineno
    assert [(r.start - first, r.stop - first) for r in sass.time_loops(kernel)] == [(3, 6), (6, 8)]
