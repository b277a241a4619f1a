"""Tables and figures from result files, and the committed files themselves."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import kinds, report
from benchmarks.plots import pictures
from benchmarks.ranking import floor_ms, races, ratio, sweeps
from benchmarks.results import RESULTS, ResultError, load
from tests.benchmarks.fakes import failed, result, row

COMMITTED = sorted(RESULTS.glob("*.json"))


@pytest.fixture
def root(tmp_path):
    """A checkout with documents to fill, and the committed files that are no benchmarks."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for path in COMMITTED:
        if kinds.check(path) != "benchmark":
            shutil.copy(path, tmp_path / "benchmarks" / "results")
    for name in report.DOCUMENTS:
        shutil.copy(report.ROOT / name, tmp_path / name)
    return tmp_path


def results_of(root: Path) -> report.Files:
    return report.read(root / "benchmarks" / "results")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_results_are_whole(path):
    assert kinds.check(path) in kinds.KINDS


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_no_row_beats_the_roofline_of_a_cpu(path):
    """A floor that is too high or a ceiling measured too low would show here; 3 % is the clock's noise."""
    if kinds.check(path) != "benchmark" or (measured := load(path)).environment.device != "cpu":
        return
    timed = [row for row in measured.rows if row.ms_p50]
    percent = {row.key: 100 * (floor_ms(row, measured.roofline) or 0.0) / row.ms_p50 for row in timed}
    assert {key: found for key, found in percent.items() if found > 103} == {}


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"kind": "demo", "command"', "cannot be read as JSON"),
        ("[]", "kind None"),
        ('{"kind": "poem", "command": "python -m x"}', "expected one of 'benchmark', 'demo'"),
        ('{"kind": "published", "command": "python -m x", "rows": []}', "no rows"),
        ('{"kind": "published", "command": "x", "rows": [{"ratio": 2.0}]}', "no command"),
        (
            '{"kind": "published", "command": "python -m x", "rows": [{"name": "a", "ratio": NaN}]}',
            "a: ratio nan",
        ),
        ('{"kind": "compile report", "command": "python -m x", "rows": [1]}', "no versions"),
        ('{"kind": "benchmark", "schema": 1}', "a field is missing"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=reason):
        kinds.check(path)


def test_only_right_rows_are_ranked():
    race = races([row(ms=4.0), row(provider="peer", ms=8.0), failed("wrong", "off", provider="fast")])[0]
    assert [r.provider for r in race.ranked] == ["torch", "peer"]
    assert [r.provider for r in race.unranked] == ["fast"]
    assert ratio(race.peers[0], race.ours) == 2.0
    assert race.eager is None and ratio(race.eager, race.ours) is None


def test_floor_is_the_larger_of_bytes_and_products():
    roofline = result().roofline
    assert floor_ms(row(floor_bytes=21 * 10**9, floor_flops=0), roofline) == pytest.approx(1000)
    assert floor_ms(row(floor_bytes=0, floor_flops=11 * 10**10), roofline) == pytest.approx(1000)
    assert floor_ms(row(floor_bytes=0, floor_flops=0), roofline) is None


def test_sweeps_differ_in_length_only():
    found = sweeps(result().rows)
    assert [(key, list(lengths)) for key, lengths in found.items()] == [
        (("selective_scan", "B8_T*_D64_N16", "float32"), [512, 1024, 2048, 4096])
    ]


def test_documents_and_figures_are_written_and_then_up_to_date(root):
    result().save(root / "benchmarks" / "results" / "bench_cpu.json")
    files = results_of(root)
    assert any("README.md" in p for p in report.stale(files, root))
    (root / "benchmarks" / "figures").mkdir()
    (root / "benchmarks" / "figures" / "gone.png").write_bytes(b"")
    written = report.write(files, root)
    assert report.stale(files, root) == []
    figures = [p for p in written if p.suffix == ".png"]
    assert len(figures) == len(pictures(result(), "bench_cpu")) == 4
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in figures)
    assert not (root / "benchmarks" / "figures" / "gone.png").exists()
    figures[0].unlink()
    assert report.stale(files, root) == [f"{figures[0].name}: missing"]


def test_readme_has_the_bench_beside_the_published_code(root):
    before = report.cpu_table(results_of(root))
    result().save(root / "benchmarks" / "results" / "bench_cpu.json")
    after = report.cpu_table(results_of(root))
    assert all("benchmarks.signal_model_vs_published" in table for table in (before, after))
    assert (
        "| `selective_scan` | B8_T512_D64_N16 | float32 | 5.12 | 1.5 (torch.compile) | 24 | 17.9 |" in after
    )
    assert "| `causal_conv1d` | B2_T1024_D512_W4 | float32 | 2 | 0.8 (transformers) |  |" in after
    assert "`python -m benchmarks run --device cpu` on AMD EPYC 7763, 2 threads; Python 3.12.3" in after


def test_a_gpu_table_says_so_until_there_is_one(root):
    assert "not yet measured on a GPU" in report.gpu_table(results_of(root))
    result("cuda").save(root / "benchmarks" / "results" / "bench_cuda.json")
    table = report.gpu_table(results_of(root))
    assert "not yet" not in table and "NVIDIA H100 80GB HBM3, driver 580.1" in table


def test_full_tables_list_what_is_not_ranked_with_its_reason(root):
    result().save(root / "benchmarks" / "results" / "bench_cpu.json")
    lines = report.results_table(results_of(root)).splitlines()
    wrong = [line for line in lines if "liger-kernel" in line]
    assert len(wrong) == 2 and all("wrong: y: error 31 times plain PyTorch's / limit 2 |" in w for w in wrong)
    assert sum("skipped: mamba_ssm is not installed" in line for line in lines) == 8
    right = next(line for line in lines if "| torch.nn |" in line)
    assert right.split(" | ")[4:] == ["9", "8.82 to 9.18", "0.178", "12.5", "0.031", "41", "64", "ok |"]
    assert {line.count(" | ") for line in lines if line.startswith("| ") and "median" not in line} == {11}


def test_check_and_a_damaged_file(root, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    options = ["--root", str(root), "--results", str(root / "benchmarks" / "results")]
    assert report.run(parser.parse_args(options)) == 0
    assert report.run(parser.parse_args([*options, "--check"])) == 0
    (root / "benchmarks" / "results" / "torn.json").write_text(json.dumps({"kind": "benchmark"}))
    assert report.run(parser.parse_args([*options, "--check"])) == 1
    assert "torn.json" in capsys.readouterr().out
