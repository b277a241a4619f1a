"""The equivalence table: what it can be asked, what it refuses, and what it prints when an op is wrong."""

import contextlib
import io
import json
import math
import re

import pytest
import torch

from prism_kernels import RMSNormOutput, verify
from prism_kernels import rms_norm as right
from prism_kernels.testing import find, registry
from prism_kernels.testing.catalogue import rms_norm as entry
from prism_kernels.testing.inputs import Draw
from prism_kernels.testing.measure import Job, measure
from prism_kernels.testing.recipes import Recipe, drawn, path_target, shrink

QUICK = ["--op", "rms_norm", "--dtype", "float32", "--path", "torch", "--device", "cpu"]
SPECS = {s.name: s for s in registry() if s.random_case}


def run(code):
    """What a program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def snippet(output):
    """The program at the end of a report."""
    program = output.split(": a small case\n")[1]
    return program[: program.rindex("\n\n")]


def off_in_the_third_channel(x, *args, **options):
    """rms_norm with an error of a thousandth in one channel, in the forward pass alone."""
    y, residual = right(x, *args, **options)
    wrong = torch.zeros(x.shape[-1], dtype=y.dtype)
    wrong[2:3] = 1e-3
    return RMSNormOutput(y + wrong * y.detach(), residual)


def test_rows_of_one_op_are_within_budget(capsys):
    assert verify.main(QUICK) == 0
    output = capsys.readouterr().out
    assert "rms_norm                          torch    float32   y" in output
    assert output.strip().endswith("all within budget")


def test_random_cases_repeat_from_their_seed(capsys):
    outputs = []
    for _ in range(2):
        assert verify.main([*QUICK, "--cases", "3", "--seed", "11"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert set(re.findall(r"seed (\d+): rows", outputs[0])) <= {"11", "12", "13"}


def test_json_has_every_row_and_the_environment(tmp_path, capsys):
    assert verify.main([*QUICK, "--json", str(tmp_path / "rows.json")]) == 0
    capsys.readouterr()
    assert verify.main([*QUICK, "--json"]) == 0
    data, printed = json.loads((tmp_path / "rows.json").read_text()), json.loads(capsys.readouterr().out)
    assert data == printed
    assert {"op", "path", "dtype", "tensor", "ratio", "max_error", "case", "ok"} == set(data["rows"][0])
    assert {"y", "dx", "dweight", "dgate"} <= {row["tensor"] for row in data["rows"]}
    assert data["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--op", "rms_nrom"], "unknown op 'rms_nrom'. Did you mean rms_norm?"),
        (["--op", "zzzz"], "There are: causal_conv1d"),
        (["--dtype", "fp32"], "Did you mean float32"),
        (["--path", "tritn"], "Did you mean triton"),
        (["--device", "cuad"], "Did you mean cuda"),
        (["--device", "cpu:1"], "Did you mean cpu?"),
        (["--device", "cuda:99"], "device cuda:99 is not there: PyTorch sees"),
        (["--against", "transformer"], "Did you mean transformers?"),
        (["--against", "fla"], "fla is not installed. `pip install flash-linear-attention` brings it."),
        (["--cases", "0"], "--cases must be at least 1, got 0"),
        (["--json", "/no/such/folder/rows.json"], "there is no folder /no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_exist_is_refused_with_the_nearest(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("prism_kernels.testing.peers.Peer.installed", lambda self: False)
    with pytest.raises(SystemExit) as stopped:
        verify.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--cases", "4"]], ids=["catalogue", "random"])
def test_a_wrong_op_is_found_and_its_snippet_shows_it(monkeypatch, capsys, extra):
    monkeypatch.setattr(entry, "rms_norm", off_in_the_third_channel)
    assert verify.main([*QUICK, *extra]) == 1
    output = capsys.readouterr().out
    assert "ABOVE THE LIMIT" in output and "1 above the limit, 0 missing" in output
    code = snippet(output)
    shown = [line for line in run(code).splitlines() if line.startswith("y ") and "times" in line]
    assert float(shown[0].split()[1]) > 100
    monkeypatch.setattr(entry, "rms_norm", right)
    shown = [line for line in run(code).splitlines() if line.startswith("y ") and "times" in line]
    assert float(shown[0].split()[1]) <= 2


def test_a_failing_random_case_is_shrunk_to_what_is_needed(monkeypatch):
    monkeypatch.setattr(entry, "rms_norm", off_in_the_third_channel)
    spec = find("rms_norm")
    small = shrink(Recipe(spec, torch.float32, seed=5), path_target(spec, "torch"), "cpu", "y")
    assert {n: t.shape for n, t in small.case().tensors.items()} == {"x": (1, 3)}


def test_a_call_that_raises_is_a_row_and_the_run_goes_on(monkeypatch, capsys):
    def broken(x, *args, **options):
        if x.shape[-1] == 1:
            raise RuntimeError("no single channels today")
        return right(x, *args, **options)

    monkeypatch.setattr(entry, "rms_norm", broken)
    assert verify.main(QUICK) == 1
    output = capsys.readouterr().out
    assert "RuntimeError: no single channels today" in output and "1 above the limit, 0 missing" in output
    with pytest.raises(RuntimeError, match="no single channels today"):
        run(snippet(output))


def test_a_row_that_is_not_there_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(verify, "sources", lambda job, arguments: iter(()))
    assert verify.main(QUICK) == 1
    assert "MISSING  rms_norm  torch  float32  y" in capsys.readouterr().out


def test_nan_is_above_the_limit_and_null_in_json(monkeypatch, capsys):
    monkeypatch.setattr(
        entry, "rms_norm", lambda x, *a, **o: RMSNormOutput(right(x, *a, **o).y * math.nan, None)
    )
    assert verify.main([*QUICK, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["ratio"] is None and not row["ok"] for row in rows if row["tensor"] == "y")


def test_triton_snippets_switch_the_interpreter_on(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    monkeypatch.setattr(entry, "rms_norm", off_in_the_third_channel)
    job = Job((find("rms_norm"),), ("triton",), (torch.float32,), cases=1)
    (code,) = [row["snippet"] for row in measure(job) if "snippet" in row]
    assert code.index('os.environ["TRITON_INTERPRET"] = "1"') < code.index("import torch")
    assert "times the error of plain PyTorch" in run(code)


def test_a_peer_is_measured_by_the_same_budget(capsys):
    pytest.importorskip("transformers")
    arguments = ["--dtype", "float32", "--cases", "2", "--against", "transformers", "--device", "cpu"]
    assert verify.main(["--op", "fused_recurrent_gated_delta_rule", "selective_scan", *arguments]) == 0
    output = capsys.readouterr().out
    assert "fused_recurrent_gated_delta_rule" in output and " dbeta " in output
    assert "skipped: transformers has no such op" in output
    measured = [line.split()[-1] for line in output.splitlines() if "real poles" in line and " dA " in line]
    assert measured


@pytest.mark.parametrize("name", SPECS)
def test_random_cases_are_reproducible_and_small(name):
    spec = SPECS[name]
    for seed in range(20):
        first, again = (spec.random_case(Draw(seed)) for _ in range(2))
        assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
        assert sum(t.numel() for t in first.tensors.values()) < 20_000
    for path in spec.paths:
        assert len(drawn(spec, torch.float32, path_target(spec, path), 3, seed=0)) == 3


def test_every_op_of_the_catalogue_draws_random_cases():
    assert {s.name.split(" ")[0] for s in registry()} == {name.split(" ")[0] for name in SPECS}
