"""The signal model: streams, padding, errors, causality, size, and the quick start of old."""

import json
import subprocess
import sys

import pytest
import torch

from prism_models import ModalityConfig, PRISMConfig, PRISMForClassification
from prism_models.signal import PRISMOutput

ECG, IMAGE = ModalityConfig("ecg", 12, 5), ModalityConfig("image", 48, 10)


def small(**changes):
    torch.manual_seed(1)
    fields = {
        "hidden_dim": 16,
        "num_heads": 2,
        "num_layers": 4,
        "delta_chunk_size": 16,
        "modalities": [ECG, IMAGE],
    }
    return PRISMForClassification(PRISMConfig(**{**fields, **changes})).eval()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def close_states(a, b):
    for x, y in zip(flat(a), flat(b), strict=True):
        close(x, y, 3e-5)


def flat(states):
    return [t for block in states.blocks for t in block] + list(states.pool)


@pytest.mark.parametrize("pool_type", ["mean", "last"])
def test_streamed_logits_equal_one_shot_logits_at_every_token(pool_type):
    model = small(pool_type=pool_type)
    x = torch.randn(2, 23, 12)
    state = model.init_state(2)
    for t in range(23):
        out = model.step(x[:, t], "ecg", state)
        state = out.states
        close(out.logits, model(x[:, : t + 1], "ecg").logits)
    close_states(state, model(x, "ecg").states)


@pytest.mark.parametrize("pool_type", ["mean", "last"])
def test_chunks_of_any_size_equal_one_shot(pool_type):
    model = small(pool_type=pool_type)
    x = torch.randn(2, 40, 12)
    whole = model(x, "ecg")
    for cuts in ([1, 2, 3], [16, 32], [39], [7, 8, 30]):
        states = None
        for start, end in zip([0, *cuts], [*cuts, 40], strict=True):
            out = model(x[:, start:end], "ecg", states=states)
            states = out.states
        close(out.logits, whole.logits)
        close_states(states, whole.states)


def test_state_bytes_do_not_grow():
    model = small()
    state = model.init_state(2)
    size = state.nbytes()
    for _ in range(5):
        state = model.step(torch.randn(2, 12), "ecg", state).states
        assert state.nbytes() == size
    assert model(torch.randn(2, 50, 12), "ecg", states=state).states.nbytes() == size


def test_rows_of_a_stream_can_end_at_different_chunks():
    model = small()
    x, lengths = torch.randn(3, 30, 12), torch.tensor([30, 10, 17])
    whole = model(x, "ecg", lengths=lengths)
    first = model(x[:, :10], "ecg")
    second = model(x[:, 10:], "ecg", states=first.states, lengths=lengths - 10)
    close(second.logits, whole.logits)
    close_states(second.states, whole.states)


@pytest.mark.parametrize("pool_type", ["mean", "last"])
def test_nan_in_padding_reaches_nothing(pool_type):
    model = small(pool_type=pool_type)
    lengths = torch.tensor([20, 7, 1])
    x = torch.randn(3, 20, 12)
    poisoned = x.masked_fill(torch.arange(20)[None, :, None] >= lengths[:, None, None], float("nan"))
    poisoned.requires_grad_()
    out = model(poisoned, "ecg", torch.tensor([0, 1, 4]), lengths=lengths)
    out.loss.backward()
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, :length], "ecg")
        close(out.logits[row], alone.logits[0])
        close_states(out.states.map(lambda t, r=row: t[r : r + 1]), alone.states)
        assert (poisoned.grad[row, :length] != 0).any() and (poisoned.grad[row, length:] == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mask_says_the_same_as_lengths():
    model, x, lengths = small(), torch.randn(2, 9, 12), torch.tensor([9, 4])
    mask = torch.arange(9) < lengths[:, None]
    assert torch.equal(model(x, "ecg", mask=mask).logits, model(x, "ecg", lengths=lengths).logits)


def test_full_lengths_change_nothing():
    model, x = small(), torch.randn(2, 9, 12)
    close(model(x, "ecg", lengths=torch.tensor([9, 9])).logits, model(x, "ecg").logits)


def test_a_row_alone_equals_the_row_in_a_batch():
    model, x = small(), torch.randn(4, 20, 12)
    close(model(x[2:3], "ecg").logits[0], model(x, "ecg").logits[2])


def test_backbone_is_causal_bit_for_bit():
    model = small(num_layers=8)
    x = torch.randn(2, 50, 16)
    before, _ = model.backbone(x)
    for t in (0, 15, 16, 40):
        changed = x.clone()
        changed[:, t + 1 :] = 100 * torch.randn_like(changed[:, t + 1 :])
        after, _ = model.backbone(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])


def test_forward_and_backward_repeat_bit_for_bit():
    model, x = small(), torch.randn(2, 40, 12)
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(x, "ecg", torch.tensor([0, 1])).loss
        loss.backward()
        runs.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_default_model_has_about_eight_million_parameters():
    model = PRISMForClassification(PRISMConfig(modalities=[ECG, IMAGE]))
    assert 7.4e6 < sum(p.numel() for p in model.parameters()) < 8.2e6


def test_defaults_and_layer_pattern():
    config = PRISMConfig()
    defaults = {
        "hidden_dim": 256,
        "num_heads": 8,
        "num_layers": 12,
        "delta_every": 4,
        "s4_state_mult": 2,
        "s4_dt_min": 0.001,
        "s4_dt_max": 0.1,
        "delta_chunk_size": 64,
        "qk_norm": True,
        "gate_bias_init": 4.0,
        "conv_kernel_size": 4,
        "ffn_expand": 2,
        "modalities": (),
        "pool_type": "mean",
        "force_block_type": None,
        "dropout": 0.0,
        "ablate": "none",
    }
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.head_dim == 32 and config.s4_state_dim == 64
    assert config.layer_pattern() == ["s4", "s4", "s4", "delta"] * 3
    assert PRISMConfig(force_block_type="delta").layer_pattern() == ["delta"] * 12
    assert PRISMConfig(num_layers=2, force_block_type="s4").layer_pattern() == ["s4"] * 2


def test_config_survives_json():
    config = PRISMConfig(modalities=[ECG, IMAGE], dropout=0.1, ablate="delta")
    assert PRISMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("ablate", ["none", "state", "delta"])
def test_what_ablation_leaves(ablate):
    """Without its state paths the model sees only what convolutions and pooling reach."""
    model = small(ablate=ablate, pool_type="last")
    x = torch.randn(1, 40, 12)
    far, near = x.clone(), x.clone()
    far[:, 5], near[:, 36] = 3.0, 3.0
    base = model(x, "ecg").logits
    assert not torch.equal(model(near, "ecg").logits, base)
    assert torch.equal(model(far, "ecg").logits, base) == (ablate == "state")


def test_output_reads_as_attributes_and_by_name():
    model, x = small(), torch.randn(2, 5, 12)
    out = model(x, "ecg")
    assert isinstance(out, PRISMOutput) and out["logits"] is out.logits and out["states"] is out.states
    assert "loss" not in out and list(out) == out.keys() == ["logits", "states"]
    with pytest.raises(KeyError, match="A loss needs labels"):
        out["loss"]
    out = model(x, "ecg", labels=torch.tensor([0, 1]))
    assert dict(out)["loss"] is out.loss
    close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1])))


X, LABELS = torch.zeros(2, 6, 12), torch.tensor([0, 1])
HOLE = torch.tensor([[True] * 6, [True, False, True, False, False, False]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(X, "sonar"), ValueError, r"a modality out of 'ecg', 'image', got 'sonar'"),
        (
            lambda m: m(X, "image"),
            ValueError,
            r"`x` \[B, T, 48\] for modality 'image', got shape \(2, 6, 12\)",
        ),
        (lambda m: m(X[0], "ecg"), ValueError, r"`x` \[B, T, 12\] for modality 'ecg', got shape \(6, 12\)"),
        (lambda m: m(X[:, :0], "ecg"), ValueError, r"at least one time step in `x`, got T = 0"),
        (lambda m: m(X, "ecg", torch.tensor([0, 5])), ValueError, r"`labels` from 0 to 4, got 0 to 5"),
        (lambda m: m(X, "ecg", torch.tensor([-1, 2])), ValueError, r"`labels` from 0 to 4, got -1 to 2"),
        (lambda m: m(X, "ecg", torch.tensor([1])), ValueError, r"`labels` \[B\] of shape \(2,\), got \(1,\)"),
        (lambda m: m(X, "ecg", LABELS.float()), TypeError, r"`labels` of dtype int64.*got float32"),
        (
            lambda m: m(X, "ecg", lengths=torch.tensor([7, 1])),
            ValueError,
            r"`lengths` from 1 to T = 6, got 1 to 7",
        ),
        (
            lambda m: m(X, "ecg", lengths=torch.tensor([3, 0])),
            ValueError,
            r"`lengths` from 1 to T = 6, got 0 to 3",
        ),
        (lambda m: m(X, "ecg", lengths=torch.tensor([3.0, 1.0])), TypeError, r"`lengths` of dtype int64"),
        (lambda m: m(X, "ecg", mask=HOLE), ValueError, r"a right-padded `mask`.*got a hole in row 1"),
        (lambda m: m(X, "ecg", mask=HOLE.flip(1)), ValueError, r"a right-padded `mask`"),
        (lambda m: m(X, "ecg", mask=HOLE.float()), TypeError, r"`mask` of dtype bool, got float32"),
        (
            lambda m: m(X, "ecg", mask=HOLE[:, :5]),
            ValueError,
            r"`mask` \[B, T\] of shape \(2, 6\), got \(2, 5\)",
        ),
        (
            lambda m: m(X, "ecg", mask=HOLE, lengths=torch.tensor([6, 6])),
            ValueError,
            r"expected `lengths` or `mask`, got both",
        ),
        (lambda m: m.step(X, "ecg", m.init_state(2)), ValueError, r"`x_t` \[B, 12\] for modality 'ecg'"),
        (lambda m: m(X, "ecg", states=m.init_state(3)), ValueError, r"got \(3, "),
    ],
)
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(small())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 30, "num_heads": 8}, r"`hidden_dim` divisible by `num_heads`, got 30 and 8"),
        ({"pool_type": "max"}, r"`pool_type` to be one of 'mean', 'last', got 'max'"),
        ({"force_block_type": "attn"}, r"`force_block_type` to be one of None, 's4', 'delta', got 'attn'"),
        ({"ablate": "all"}, r"`ablate` to be one of"),
        ({"delta_every": 0}, r"`delta_every` to be an integer >= 1, got 0"),
        ({"num_layers": 1.5}, r"`num_layers` to be an integer >= 1, got 1.5"),
        ({"s4_dt_min": 0.2}, r"0 < `s4_dt_min` <= `s4_dt_max`, got 0.2 and 0.1"),
        ({"hidden_dim": 24, "s4_state_mult": 1}, r"an even state size.*got 3 x 1"),
        ({"dropout": 1.0}, r"`dropout` in \[0, 1\), got 1.0"),
        ({"conv_kernel_size": 7}, r"`conv_kernel_size` to be one of 2, 3, 4, got 7"),
        ({"modalities": [ECG, ECG]}, r"modalities of different names, got \['ecg', 'ecg'\]"),
    ],
)
def test_bad_configuration_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        PRISMConfig(**fields)


def test_unknown_key_names_its_nearest_kin():
    with pytest.raises(ValueError, match=r"got 'hiden_dim'. Did you mean `hidden_dim`\?"):
        PRISMConfig.from_dict({"hiden_dim": 3})
    with pytest.raises(ValueError, match=r"ModalityConfig: .*`input_dim`"):
        PRISMConfig.from_dict({"modalities": [{"name": "a", "inputdim": 3, "num_classes": 2}]})
    with pytest.raises(ValueError, match=r"`name` to be an identifier, got '12-lead'"):
        ModalityConfig("12-lead", 12, 5)


QUICK_START = """
import sys

for name in ("sklearn", "aeon", "lightning", "safetensors", "matplotlib", "torchmetrics", "rich", "pandas"):
    sys.modules[name] = None  # importing it fails, as where it is not installed

import torch
from prism_models import PRISMConfig, ModalityConfig, PRISMForClassification

cfg = PRISMConfig(
    hidden_dim=256,
    num_heads=8,
    num_layers=12,
    modalities=[
        ModalityConfig(name="ecg",   input_dim=12, num_classes=5),
        ModalityConfig(name="image", input_dim=48, num_classes=10),
    ]
)

model = PRISMForClassification(cfg)

# ECG: 12-lead, 128 timesteps
ecg = torch.randn(4, 128, 12)
out = model(ecg, modality="ecg", labels=torch.randint(0, 5, (4,)))
print(out["loss"].item())

# Image: 64 patches of size 4x4x3=48
img = torch.randn(4, 64, 48)
out = model(img, modality="image", labels=torch.randint(0, 10, (4,)))
print(out["loss"].item())
"""


def test_quick_start_runs_on_hard_dependencies_alone():
    done = subprocess.run([sys.executable, "-c", QUICK_START], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(0 < float(line) < 10 for line in done.stdout.split())


def test_float64_stays_float64_and_autocast_trains():
    model, x = small().double(), torch.randn(2, 9, 12, dtype=torch.float64)
    out = model(x, "ecg")
    assert {t.dtype for t in flat(out.states)} == {torch.float64, torch.int64}
    close(model.step(x[:, 0], "ecg", model.init_state(2)).logits, model(x[:, :1], "ecg").logits, 1e-12)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x.float(), "ecg", torch.tensor([0, 1]), lengths=torch.tensor([9, 4]))
    mixed.loss.backward()
    plain = model(x.float(), "ecg", torch.tensor([0, 1]), lengths=torch.tensor([9, 4]))
    assert (mixed.loss - plain.loss).abs() < 0.05
    assert all(block.mixer.dtype == torch.float32 for block in mixed.states.blocks)


def test_compiles_whole():
    model, x = small(), torch.randn(2, 9, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x, "ecg", torch.tensor([0, 1])).loss, model(x, "ecg", torch.tensor([0, 1])).loss)
