"""Launch tables: which row an architecture takes, what a file may say, and that kernels follow."""

import pytest
import torch

from prism_kernels import chunk_gated_delta_rule
from prism_kernels._core import configs
from prism_kernels._core.configs import Config, Key, nearest, pretend, trying, use_launch_table
from prism_kernels._core.runtime import record_launches

OP, CPU = "chunk_gated_delta_rule", torch.device("cpu")
SCAN = Key("scan_kernel", "16-bit", "sm_90", 64)
ROW = Config((("BV", 16),), 2, 1, 20)


@pytest.fixture(autouse=True)
def shipped_rows():
    yield
    use_launch_table(None)


def scan_row(width=64, dtype=torch.bfloat16):
    return configs.config(OP, "scan_kernel", dtype, width, CPU)


@pytest.mark.parametrize(
    "architecture, known, taken",
    [
        ("sm_90", ["sm_80", "sm_90", "sm_100"], "sm_90"),
        ("sm_89", ["sm_80", "sm_90"], "sm_80"),
        ("sm_103", ["sm_90", "sm_100", "sm_120"], "sm_100"),
        ("sm_121", ["sm_90", "sm_100", "sm_120"], "sm_120"),
        ("sm_75", ["sm_90", "sm_80", "gfx942"], "sm_80"),
        ("gfx942", ["sm_90", "sm_80"], "sm_90"),
        ("gfx950", ["sm_90", "gfx942"], "gfx942"),
        ("gfx90a", ["sm_90", "gfx942"], "gfx942"),
        ("gfx1100", ["gfx942", "gfx90a"], "gfx942"),
    ],
)
def test_an_architecture_takes_its_row_or_the_nearest_older_one(architecture, known, taken):
    assert nearest(architecture, known) == taken


def test_without_a_gpu_rows_are_those_of_the_default():
    here = scan_row()
    with pretend(configs.DEFAULT):
        assert scan_row() == here


def scan_launch(K=64, dtype=torch.bfloat16):
    x = torch.zeros(1, 9, 2, K, dtype=dtype)
    with record_launches() as launches:
        chunk_gated_delta_rule(x, x, x, impl="triton")
    return next(launch for launch in launches if launch.kernel.__name__ == "scan_kernel")


def test_kernels_are_launched_with_the_row_of_the_architecture():
    rows = {SCAN: ROW, SCAN._replace(architecture="sm_80"): Config((("BV", 32),), 8, 2, 30)}
    with trying(OP, rows):
        assert scan_launch().options == {"num_warps": 2, "num_stages": 1}
        with pretend("sm_86"):
            launched = scan_launch()
            assert launched.constexprs["BV"] == 32
            assert launched.options == {"num_warps": 8, "num_stages": 2}
    assert scan_launch().options == {"num_warps": scan_row().warps, "num_stages": scan_row().stages}


def test_blocks_are_no_wider_than_the_values():
    x, v = torch.zeros(1, 9, 2, 64), torch.zeros(1, 9, 2, 7)
    with record_launches() as launches:
        chunk_gated_delta_rule(x, x, v, impl="triton")
    assert next(n for n in launches if n.kernel.__name__ == "scan_kernel").constexprs["BV"] == 16


def test_every_width_and_dtype_has_a_row_of_every_kernel():
    for op, table in configs.shipped().items():
        kernels = {(k.kernel, k.kind, k.width) for k in table.rows if k.architecture == configs.DEFAULT}
        assert kernels == {
            (k, c, w) for k in table.search for c in configs.CLASSES for w in configs.WIDTHS
        }, op


def test_a_file_that_is_written_reads_the_same(tmp_path):
    for op, table in configs.shipped().items():
        path = tmp_path / "table.toml"
        path.write_text(configs.dump(op, table.rows, "all of it"))
        assert configs.read(path) == (op, table.rows, {})


def test_rows_of_a_file_come_first_until_taken_back(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(configs.dump(OP, {SCAN: ROW}, "tuned"))
    before = scan_row()
    use_launch_table(path)
    assert scan_row() == ROW != before
    assert scan_row(128).shared > ROW.shared
    use_launch_table(None)
    assert scan_row() == before


def test_the_environment_names_a_file(tmp_path, monkeypatch):
    path = tmp_path / "table.toml"
    path.write_text(configs.dump(OP, {SCAN: ROW}, "tuned"))
    monkeypatch.setenv("PRISM_LAUNCH_TABLE", str(path))
    monkeypatch.setattr(configs, "_given", None)
    configs._forget()
    assert scan_row() == ROW


HEAD = f'format = 1\nop = "{OP}"\n'
SECTION = HEAD + "[scan_kernel.16-bit.sm_90]\n"
BAD = {
    "not TOML": ("rows: []", "expected a file in TOML"),
    "of another program": ('{"BLOCK": 64}', "expected a file in TOML"),
    "another version": ('format = 7\nop = "x"', "expected `format = 1`, got 7"),
    "another op": (
        'format = 1\nop = "flash_attention"',
        "expected `op` to be one of .*got 'flash_attention'",
    ),
    "another kernel": (HEAD + "[fwd.16-bit.sm_90]\n64 = {}", "expected kernels among .* got fwd.16-bit"),
    "another class": (HEAD + "[scan_kernel.int8.sm_90]\n64 = {}", "expected classes among 16-bit, 32-bit"),
    "another maker": (HEAD + "[scan_kernel.16-bit.xpu]\n64 = {}", "expected architectures such as sm_90"),
    "another width": (SECTION + "48 = {}", "expected widths among 16, 32, 64, 128, 256"),
    "no row": (SECTION + "64 = 3", "expected a table per row, got scan_kernel.16-bit.sm_90.64 = 3"),
    "no table": (HEAD + "scan_kernel = 3", "expected a table per class, got scan_kernel = 3"),
    "parts left out": (SECTION + "64 = { BV = 32 }", "expected BV, warps, stages at .* got BV"),
    "an odd block": (SECTION + "64 = { BV = 48, warps = 4, stages = 1 }", "expected `BV` of .*one of 16, 32"),
    "a truth value": (
        SECTION + "64 = { BV = 32, warps = 4, stages = true }",
        "expected `stages` of .* got True",
    ),
    "no memory": (
        SECTION + "64 = { BV = 32, warps = 4, stages = 1, shared = -1 }",
        "KiB as `shared`.*got -1",
    ),
}


@pytest.mark.parametrize("text, reason", BAD.values(), ids=BAD)
def test_a_file_that_is_wrong_is_refused_with_the_reason(text, reason, tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(text)
    before = scan_row()
    with pytest.raises(ValueError, match=f"launch table {path}: .*{reason}"):
        use_launch_table(path)
    assert scan_row() == before


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        use_launch_table(tmp_path / "none.toml")
