"""Joint training: what a step sees, what decays, what is kept, and that it repeats."""

import csv
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console

from prism_models import PRISMConfig, PRISMForClassification
from prism_models.data import Split, load
from prism_models.training import demo
from prism_models.training.callbacks import BestWeights
from prism_models.training.datamodule import JointData
from prism_models.training.evaluate import Predictions, predict, stream
from prism_models.training.figures import confusion_matrices
from prism_models.training.module import JointClassifier, parameter_groups, warmup_cosine


def first(split, count):
    """A few sequences of every class."""
    picked = [i for label in split.labels.unique() for i in (split.labels == label).nonzero()[:count, 0]]
    return split.take(torch.stack(picked))


@pytest.fixture(scope="module")
def sets():
    return [
        replace(d, train=first(d.train, 3), validation=first(d.validation, 1), test=first(d.test, 1))
        for d in (load("digits"), load("japanese_vowels"))
    ]


@pytest.fixture
def config(sets):
    return PRISMConfig(16, 2, 4, delta_chunk_size=16, modalities=[d.modality for d in sets], dropout=0.1)


def test_an_epoch_is_one_pass_over_every_modality(sets):
    batches = list(JointData(sets, batch_size=8).train_dataloader())  # 30 digits, 27 vowels
    assert len(batches) == 4
    for name, count in {"digits": 30, "japanese_vowels": 27}.items():
        sizes = [len(batch[name].labels) for batch, _, _ in batches]
        assert sum(sizes) == count and min(sizes) >= 6


def test_weight_decay_acts_on_matrices_of_linear_layers_alone(config):
    model = PRISMForClassification(config)
    with_decay, without = parameter_groups(model, 0.1)
    assert with_decay["weight_decay"] == 0.1 and without["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in with_decay["params"]}
    spared = {names[id(p)] for p in without["params"]}
    assert len(decayed) + len(spared) == len(names) and not decayed & spared
    assert all(n.endswith("proj.weight") or n.split(".")[0] in ("projection", "head") for n in decayed)
    for part in ("A_log", "A_imag", "dt_bias", "norm1.weight", "norm.weight", "bias", "conv.weight", ".D"):
        assert any(n.endswith(part) for n in spared) and not any(n.endswith(part) for n in decayed), part


def test_learning_rate_rises_and_falls():
    rates = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and abs(rates[100]) < 1e-12
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isclose(rates[55], 0.5, abs_tol=1e-9)


def test_best_weights_are_those_of_the_best_epoch(config):
    module, keep = JointClassifier(config), BestWeights()

    class Trainer:
        def __init__(self, epoch, accuracy, loss):
            self.current_epoch = epoch
            self.callback_metrics = {"val_accuracy": accuracy, "a/val_loss": loss}

    for epoch, (accuracy, loss) in enumerate([(0.5, 0.9), (0.8, 0.7), (0.8, 0.6), (0.7, 0.1), (0.8, 0.65)]):
        with torch.no_grad():
            module.model.backbone.blocks[0].norm1.weight.fill_(epoch)
        keep.on_validation_end(Trainer(epoch, accuracy, loss), module)
    keep.on_fit_end(None, module)
    assert keep.epoch == 2 and (module.model.backbone.blocks[0].norm1.weight == 2).all()


def fit(config, sets, folder, seed=0):
    args = demo.parse(["--epochs", "2", "--batch-size", "8", "--seed", str(seed)])
    with (folder / "log.txt").open("w") as file:
        console = Console(file=file)
        return demo.train(config, sets, "run", folder / "metrics.csv", console, args)


def test_training_repeats_bit_for_bit_and_follows_the_seed(config, sets, tmp_path):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        folder.mkdir()
        runs.append(fit(config, sets, folder, seed).state_dict())
    first, again, other = runs
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    with (tmp_path / "0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and {row["run"] for row in rows} == {"run"}
    for name in ("digits", "japanese_vowels"):
        assert all(0 <= float(row[f"{name}/val_accuracy"]) <= 1 for row in rows)
        assert all(float(row[f"{name}/{kind}_loss"]) > 0 for row in rows for kind in ("train", "val"))
    assert "digits" in (tmp_path / "0" / "log.txt").read_text()


def test_training_never_looks_at_the_test_split(config, sets, tmp_path):
    poison = [
        replace(d, test=Split([s * float("nan") for s in d.test.sequences], d.test.labels)) for d in sets
    ]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    clean, poisoned = fit(config, sets, tmp_path / "a"), fit(config, poison, tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), poisoned.parameters(), strict=True))


def test_predictions_do_not_depend_on_the_batches(config, sets):
    model = PRISMForClassification(config)
    for d in sets:
        whole, single = (predict(model, d.name, d.test, batch_size=size) for size in (64, 1))
        assert torch.equal(whole.predicted, single.predicted) and torch.equal(whole.labels, d.test.labels)
        assert whole.tokens_per_second > 0


def test_confusion_counts_true_classes_in_rows():
    counts = Predictions(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 2, 1, 1]), 1.0).confusion(3)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_stream_ends_at_the_one_shot_logits(config, sets):
    model, data = PRISMForClassification(config).eval(), sets[1]
    sequence = data.test.sequences[0]
    with torch.no_grad():
        whole = model(sequence[None], data.name).logits[0]
    torch.testing.assert_close(stream(model, data.name, sequence)[-1], whole, rtol=1e-4, atol=1e-5)


def test_pictures_are_written(tmp_path):
    confusion_matrices({"a": (torch.eye(3).long(), ["x", "y", "z"])}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


HIDE = "import sys; sys.modules[{module!r}] = None; "
USE = "from prism_models.training import demo; "


@pytest.mark.parametrize(
    ("script", "module", "extra"),
    [
        (HIDE + USE, "lightning", "train"),
        (USE + HIDE + "demo.main([])", "matplotlib", "plot"),
        (USE + HIDE + "demo.main([])", "safetensors", "train"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(script, module, extra):
    command = [sys.executable, "-c", script.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and f"expected `{module}" in done.stderr
    assert f'pip install "prism-kernels[{extra}]"' in done.stderr


@pytest.mark.full
def test_demo_runs_end_to_end(tmp_path, capsys):
    assert demo.main(["--epochs", "1", "--out", str(tmp_path), "--hidden-dim", "16"]) == 0
    printed = capsys.readouterr().out
    for words in ("hybrid", "no state", "no delta", "majority", "tokens/s", "parameters", "one-shot logits"):
        assert words in printed
    names = {
        "model.safetensors",
        "config.json",
        "metrics.csv",
        "learning_curves.png",
        "confusion_matrices.png",
        "results.json",
    }
    assert {p.name for p in tmp_path.iterdir()} == names
