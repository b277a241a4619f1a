"""`python -m benchmarks list` and `run`: selection, checks before clocks, and files that survive."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.progress import Progress
from benchmarks.registry import Adapter, Bench, Skip, benches
from benchmarks.results import DIRECTIONS, ResultError, Roofline, load
from tests.benchmarks.fakes import rows_of

ROOT = Path(__file__).parents[2]
TINY = {
    "chunk_gated_delta_rule": "B2_T17_H4_D8",
    "fused_recurrent_gated_delta_rule": "B2_T9_H4_D8",
    "gated_delta_rule_step": "B2_T3_H4_D8",
    "selective_scan": "B2_T5_H2_P3_N2",
    "selective_scan_euler": "B3_D32_L16_N8",
    "selective_scan_fn": "B3_D32_L16_N8",
    "selective_scan_step": "B2_H2_P3_N2",
    "causal_conv1d": "B2_T6_D8_W4",
    "rms_norm": "B2_T3_D8",
    "swiglu": "B2_T3_F8",
    "S4DComplex": "B2_T4_D8_H2_N2",
    "GatedDelta": "B2_T4_D8_H2",
    "SwiGLU": "B2_T3_D8",
}
FAST = ("--seconds", "0.01", "--repeats", "3")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """A roofline of small copies and products: these tests time nothing."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(measure.PRODUCT, "cpu", 32)


def bench(tmp_path, *options, status=0):
    """Run the bench in this process; the result file."""
    out = tmp_path / "out.json"
    assert main(["run", *FAST, "--out", str(out), *options]) == status
    return load(out) if out.exists() else None


@pytest.fixture
def provider(monkeypatch):
    """Add a provider to rms_norm for one test."""

    def add(name, call):
        known = benches()["rms_norm"]
        from benchmarks.registry import Provider

        monkeypatch.setitem(known.providers, name, Provider(name, lambda setting: Adapter(call)))

    return add


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name, entry in benches().items():
        assert name in text
        assert all(provider in text for provider in entry.providers)
    assert "is not installed (pip install" in text


def test_every_op_is_right_on_both_paths(tmp_path):
    options = ["--op", *TINY, "--sizes", *TINY.values(), "--provider", "torch", "reference"]
    result = bench(tmp_path, *options)
    assert {row.op for row in result.rows} == set(TINY)
    for row in result.rows:
        assert row.status == "ok", row
        assert row.floor_bytes > 0 and row.floor_flops > 0
        assert row.peak_bytes is None or row.peak_bytes > 0


def floors(entry: Bench, shapes):
    for shape in shapes:
        setting = entry.setting(shape, torch.float32, "cpu")
        yield from (entry.floor_of(setting, direction) for direction in DIRECTIONS)


def test_floors_are_positive_and_grow_with_the_backward():
    for entry in benches().values():
        for forward, both in zip(*[floors(entry, (*entry.cpu, *entry.shapes))] * 2, strict=True):
            assert 0 < forward.bytes < both.bytes and 0 < forward.flops < both.flops, entry.name


def test_the_shapes_of_the_field_are_there():
    delta, scan = benches()["chunk_gated_delta_rule"], benches()["selective_scan"]
    known = {"B8_T4096_H16_D128", "B1_T32768_H8_D128", "B8_T1024_H8_D64", "B4_T4096_H64_D128"}
    assert known <= set(delta.shapes)
    assert {"B8_T4096_D2048_N16", "B64_T128_H8_P32_N64"} <= set(scan.shapes)


def test_whole_shapes_are_judged_by_a_cut(tmp_path):
    """More tokens and heads than the definition is run on."""
    sizes = ["B3_T300_H9_D16", "B3_T200_H130_P1_N2"]
    ops = ["chunk_gated_delta_rule", "selective_scan"]
    result = bench(tmp_path, "--op", *ops, "--sizes", *sizes, "--provider", "torch")
    assert [row.status for row in result.rows] == ["ok"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "rms_nrom"], "no op 'rms_nrom'. Did you mean rms_norm"),
        (["--shape", "B8_T4096_H16_D12"], "Did you mean B8_T4096_H16_D128"),
        (["--provider", "transformer"], "Did you mean transformers"),
        (["--op", "rms_norm", "--sizes", "B2_T3"], "spelt like no shape"),
        (["--op", "rms_norm", "--provider", "zzz"], "There are: triton, torch"),
        (["--op", "selective_scan_step", "--direction", "forward+backward"], "the selection is empty"),
        (["--plugin", "no/such/file.py"], "not a Python file"),
        (["--repeats", "0"], "expected --repeats of 1 or more, got 0"),
        (["--seconds", "nan"], "expected --seconds of 0 or more, got nan"),
        (["--threads", "-1"], "expected --threads of 1 or more, got -1"),
    ],
)
def test_what_cannot_be_selected(options, message, tmp_path, capsys):
    assert bench(tmp_path, *options, status=2) is None
    assert message in capsys.readouterr().err


def test_a_wrong_provider_is_called_wrong_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(benches()["rms_norm"], "providers", dict(benches()["rms_norm"].providers))
    plugin = ("--plugin", str(ROOT / "tests" / "broken_provider.py"))
    providers = ("--provider", "torch", "broken", "broken gradient")
    result = bench(tmp_path, *plugin, "--op", "rms_norm", "--sizes", "B2_T3_D8", *providers)
    rows = {(row.provider, row.direction): row for row in result.rows}
    assert rows["broken gradient", "forward"].status == "ok"  # its outputs are right
    wrong = {key: row for key, row in rows.items() if row.status == "wrong"}
    assert set(wrong) == {
        ("broken", "forward"),
        ("broken", "forward+backward"),
        ("broken gradient", "forward+backward"),
    }
    for row in wrong.values():
        assert row.error_ratio > 100 and row.ms_p50 is None and row.samples == 0
    assert wrong["broken gradient", "forward+backward"].reason.startswith("dx is")
    assert rows["torch", "forward+backward"].status == "ok"


def test_a_narrower_result_and_a_written_input_are_wrong(tmp_path, provider):
    def rms(t):
        return torch.nn.functional.rms_norm(t["x"], t["x"].shape[-1:], t["weight"], 1e-6)

    provider("narrow", lambda t: {"y": (rms(t) * 1.02).bfloat16()})
    provider("writes", lambda t: {"y": rms({**t, "x": t["x"].add_(1) - 1})})
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--direction", "forward")
    result = bench(tmp_path, *options, "--provider", "writes", "narrow", "torch")
    rows = {row.provider: row for row in result.rows}
    assert rows["torch"].status == "ok"  # its inputs are what they were
    assert rows["narrow"].status == "wrong" and rows["narrow"].error_ratio > 100
    assert rows["writes"].status == "wrong" and rows["writes"].reason == "writes to its inputs: x"


def test_inputs_that_cannot_be_drawn_are_rows(tmp_path):
    options = ("--op", "GatedDelta", "rms_norm", "--sizes", "B2_T4_D7_H2", "B2_T3_D8", "--provider", "torch")
    result = bench(tmp_path, *options, status=1)
    assert {(row.op, row.status) for row in result.rows} == {("GatedDelta", "failed"), ("rms_norm", "ok")}


def test_an_eager_loop_is_no_peer(tmp_path, capsys):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", "eager", "--require-peer")
    bench(tmp_path, *options, status=1)
    assert "no peer at all" in capsys.readouterr().err


def test_our_own_wrong_path_fails_the_run(tmp_path, monkeypatch, capsys):
    known = benches()["rms_norm"]
    ours = replace(known.providers["torch"], factory=lambda setting: lambda t: {"y": t["x"] * 1.001})
    monkeypatch.setitem(known.providers, "torch", ours)
    bench(tmp_path, "--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", status=1)
    assert "ours, wrong: rms_norm" in capsys.readouterr().err


def raise_(error):
    def call(tensors):
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (raise_(ZeroDivisionError("first line\nsecond")), "failed", "ZeroDivisionError: first line"),
        (raise_(MemoryError()), "out of memory", "MemoryError: no message"),
        (raise_(torch.cuda.OutOfMemoryError("CUDA out of memory.")), "out of memory", "CUDA out of memory"),
        (
            raise_(RuntimeError("DefaultCPUAllocator: not enough memory")),
            "out of memory",
            "not enough memory",
        ),
        (lambda t: {"y": t["x"] * float("nan")}, "not finite", "NaN or infinity in y"),
        (lambda t: {"y": t["x"][:1]}, "failed", "expected a result of shape"),
        (lambda t: {}, "failed", "KeyError"),
        (raise_(Skip("not today")), "failed", "not today"),
        (raise_(SystemExit(1)), "failed", "SystemExit(1)"),
    ],
)
def test_a_provider_that_breaks_is_a_row(call, status, reason, provider, tmp_path):
    provider("breaks", call)
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "breaks", "torch")
    rows = bench(tmp_path, *options, "--direction", "forward").rows
    by_name = {row.provider: row for row in rows}
    assert by_name["breaks"].status == status and reason in by_name["breaks"].reason
    assert by_name["torch"].status == "ok"


def test_a_provider_that_breaks_on_the_clock(provider, tmp_path):
    calls = []

    def tires(t):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return {"y": torch.nn.functional.rms_norm(t["x"], t["weight"].shape, t["weight"], 1e-6)}

    provider("tires", tires)
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--direction", "forward")
    rows = {row.provider: row for row in bench(tmp_path, *options, "--provider", "tires", "torch").rows}
    assert rows["tires"].status == "failed" and "while timing: RuntimeError: tired" in rows["tires"].reason
    assert rows["torch"].status == "ok"


def test_peers_that_are_not_here_are_named(tmp_path):
    result = bench(tmp_path, "--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "liger-kernel")
    row = result.rows[0]
    if "liger-kernel" in result.environment.peers:
        pytest.skip("liger-kernel is installed here")
    assert (
        row.status == "skipped" and row.reason == "liger-kernel is not installed (pip install liger-kernel)"
    )


def test_a_run_without_any_peer_fails_if_asked(tmp_path, capsys):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", "reference")
    bench(tmp_path, *options, "--require-peer", status=1)
    assert "no peer at all could run" in capsys.readouterr().err


def test_no_group_starts_after_the_time_given(tmp_path, capsys):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch")
    assert not bench(tmp_path, *options, "--within", "1e-9").rows
    assert "2 rows not reached" in capsys.readouterr().out
    assert len(bench(tmp_path, *options, "--resume").rows) == 2


def test_pure_references_are_read_from_checkouts(tmp_path, monkeypatch):
    """A stand-in for mamba's file: one function of a module that cannot be imported here."""
    from benchmarks.peers import MAMBA, function_of_file

    file = tmp_path / "mamba" / MAMBA
    file.parent.mkdir(parents=True)
    file.write_text("import selective_scan_cuda\n\ndef selective_scan_ref(x):\n    return torch.sin(x)\n")
    monkeypatch.setenv("PRISM_PEERS", str(tmp_path))
    read = function_of_file("mamba-ssm", MAMBA, "selective_scan_ref", {"torch": torch})
    assert read(torch.zeros(1)) == 0
    with pytest.raises(Skip, match="has no function other"):
        function_of_file("mamba-ssm", MAMBA, "other", {})


# Interruptions.

RESUMED = ["--op", "rms_norm", "swiglu", "causal_conv1d", "--sizes", "B2_T3_D8", "B2_T3_F8", "B2_T6_D8_W4",
           "--provider", "torch", "reference", "--no-memory", "--threads", "1"]  # fmt: skip


def test_a_row_is_in_the_file_before_it_is_on_the_screen(tmp_path, monkeypatch):
    shown = []

    def look(self, row):
        assert row.key in load(tmp_path / "out.json").finished()
        shown.append(row.key)

    monkeypatch.setattr(Progress, "row", look)
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "triton", "torch", "eager")
    assert [row.key for row in bench(tmp_path, *options).rows] == shown and len(shown) == 6


def test_sigkill_loses_no_finished_row(tmp_path):
    """The last op waits for ever, so that the kill always falls half-way."""
    out, plugin = tmp_path / "out.json", tmp_path / "waits.py"
    plugin.write_text(
        "import time\nfrom benchmarks.registry import register\n"
        "register('swiglu', 'torch', lambda setting: lambda t: time.sleep(3600), ours=True)\n"
    )
    command = [sys.executable, "-m", "benchmarks", "run", *FAST, "--out", str(out), *RESUMED]
    process = subprocess.Popen(
        [*command, "--plugin", str(plugin)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if out.exists() and len(load(out).rows) >= 8:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    before = rows_of(out)
    assert len(before) == 8
    assert main(["run", *FAST, "--out", str(out), *RESUMED, "--resume"]) == 0
    after = rows_of(out)
    assert after[:8] == before
    assert {row.op for row in after[8:]} == {"swiglu"} and len(after) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON"),
        (lambda text: "[1, 2]", "not a result of"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema 99"),
        (lambda text: json.dumps(json.loads(text) | {"rows": [{}]}), "missing or unknown"),
        (lambda text: text.replace('"op": "rms_norm"', '"op": ["rms_norm"]'), "op is ['rms_norm']"),
    ],
)
def test_torn_and_foreign_files_are_refused(change, message, tmp_path, capsys):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", "--direction", "forward")
    bench(tmp_path, *options)
    file = tmp_path / "out.json"
    file.write_text(change(file.read_text()))
    kept = file.read_text()
    assert main(["run", *FAST, *options, "--out", str(file), "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert main(["run", *FAST, *options, "--out", str(file)]) == 2
    assert "is not written over" in capsys.readouterr().err
    assert file.read_text() == kept
    with pytest.raises(ResultError):
        load(file)


def test_a_dtype_asked_for_twice_is_measured_once(tmp_path):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", "--direction", "forward")
    assert len(bench(tmp_path, *options, "--dtype", "float32", "float32").rows) == 1


def test_a_file_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out.json")
    assert main(["run", *FAST, "--op", "rms_norm", "--sizes", "B2_T3_D8", "--out", out]) == 2
    assert f"--out {out} cannot be written" in capsys.readouterr().err


def test_a_plugin_may_define_dataclasses_and_may_not_exit(tmp_path, capsys):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from __future__ import annotations\nimport dataclasses\n\n"
        "@dataclasses.dataclass\nclass Mine:\n    x: dataclasses.InitVar[int]\n\nraise SystemExit(0)\n"
    )
    bench(tmp_path, "--plugin", str(plugin), status=2)
    assert "SystemExit: 0" in capsys.readouterr().err


def test_results_of_elsewhere_are_resumed_only_by_force(tmp_path, capsys):
    options = ("--op", "rms_norm", "--sizes", "B2_T3_D8", "--provider", "torch", "--direction", "forward")
    result = bench(tmp_path, *options)
    result.environment.commit = "0" * 40
    result.save(tmp_path / "out.json")
    bench(tmp_path, *options, "--resume", status=2)
    assert "commit" in capsys.readouterr().err
    bench(tmp_path, *options, "--resume", "--force")


def test_the_ceilings_are_the_better_of_before_and_after(tmp_path, monkeypatch):
    """So that a machine that was busy at first does not make every row look close to its floor."""
    measured = [Roofline(10.0, {"float32": 2.0}), Roofline(40.0, {"float32": 1.0})]
    monkeypatch.setattr(measure, "roofline", lambda device, dtypes: measured.pop(0))
    result = bench(tmp_path, "--op", "rms_norm", "--sizes", TINY["rms_norm"], "--provider", "torch")
    assert result.roofline == Roofline(40.0, {"float32": 2.0})
    for row in result.rows:
        expected = 100 * max(row.floor_bytes / 40e6, row.floor_flops / 2e9) / row.ms_p50
        assert row.roofline_percent == pytest.approx(expected)


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    command = [sys.executable, "-m", "benchmarks", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE
