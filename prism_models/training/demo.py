"""Teach one backbone two kinds of signal: `python -m prism_models.training.demo`.

Trains one small PRISM jointly on handwritten digits and on spoken vowels, then two controls that
lack part of its memory; tests all three once; saves the model, loads it again, and lets it hear one
utterance frame by frame.
"""

import contextlib
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

# Needed before the first product on a GPU for results that repeat.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import lightning
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from torch.utils import deterministic

from .._extras import need
from ..data import Data, load
from ..export import load_pretrained_folder, save_pretrained_folder
from ..signal import PRISMConfig, PRISMForClassification
from .callbacks import BestWeights, Line, MetricsCSV
from .datamodule import JointData
from .evaluate import Predictions, predict, stream
from .figures import confusion_matrices, learning_curves
from .module import JointClassifier

RUNS = {"hybrid": "none", "no state": "state", "no delta": "delta"}
STREAM_TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 if the streamed logits equal the one-shot ones."""
    start, args = time.perf_counter(), parse(argv)
    for module, extra in (("matplotlib", "plot"), ("safetensors", "train")):
        need(module, extra, "demo")  # now, rather than after the training
    quiet()
    torch.set_num_threads(args.threads)
    console = Console(highlight=False, soft_wrap=True)
    sets = [load("digits"), load("japanese_vowels")]
    config = PRISMConfig(
        hidden_dim=args.hidden_dim,
        num_heads=4,
        num_layers=args.layers,
        modalities=[d.modality for d in sets],
        dropout=0.1,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = args.out / "metrics.csv"
    metrics.unlink(missing_ok=True)

    announce(console, config, sets)
    models = {
        run: train(replace(config, ablate=ablate), sets, run, metrics, console, args)
        for run, ablate in RUNS.items()
    }
    tests = {run: {d.name: predict(m, d.name, d.test) for d in sets} for run, m in models.items()}

    save_pretrained_folder(models["hybrid"], args.out)
    learning_curves(metrics, args.out / "learning_curves.png")
    draw_confusion(sets, tests["hybrid"], args.out / "confusion_matrices.png")
    console.print(results(sets, tests, models["hybrid"]))
    difference = replay(args.out, sets[-1], console)
    write_results(args, sets, tests, models["hybrid"], difference, time.perf_counter() - start)
    console.print(f"Run folder: {args.out}")
    return 0 if difference <= STREAM_TOLERANCE else 1


def parse(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m prism_models.training.demo",
        description="Train one backbone on digits and spoken vowels, with two controls.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    parser.add_argument("--epochs", type=int, default=32, help="passes over the training data, per run")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per modality and step")
    parser.add_argument("--hidden-dim", type=int, default=64, help="width of the backbone")
    parser.add_argument("--layers", type=int, default=4, help="blocks; every fourth is a delta block")
    parser.add_argument("--lr", type=float, default=4e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the model is too small for more")
    return parser.parse_args(argv)


def train(
    config: PRISMConfig,
    sets: Sequence[Data],
    run: str,
    metrics: Path,
    console: Console,
    args: Namespace,
) -> PRISMForClassification:
    """Train one model from the seed on, and return it with the weights of its best epoch."""
    lightning.seed_everything(args.seed, workers=True, verbose=False)
    module = JointClassifier(config, lr=args.lr, label_smoothing=0.1)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BestWeights(), MetricsCSV(metrics, run), Line(console, run)],
    )
    with repeatable():
        trainer.fit(module, JointData(sets, args.batch_size))
    return module.model


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Deterministic algorithms where there is a choice; the settings of before come back."""
    # Fresh memory full of NaN finds bugs in tests; here it costs time.
    flag = "fill_uninitialized_memory"
    mode, fill = torch.get_deterministic_debug_mode(), getattr(deterministic, flag)
    torch.set_deterministic_debug_mode("warn")
    setattr(deterministic, flag, False)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        setattr(deterministic, flag, fill)


def announce(console: Console, config: PRISMConfig, sets: Sequence[Data]) -> None:
    """Say what is about to happen."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    pattern = " ".join(config.layer_pattern())
    console.print(
        f"One backbone, {config.num_layers} blocks ({pattern}), width {config.hidden_dim}, on {device}"
    )
    for d in sets:
        sizes = f"{len(d.train)} / {len(d.validation)} / {len(d.test)}"
        console.print(f"  {d.name}: {sizes} sequences to train / validate / test; {len(d.classes)} classes")
    console.print("Accuracies below are of the validation sets; the test sets are touched once, at the end.")


def results(
    sets: Sequence[Data], tests: dict[str, dict[str, Predictions]], model: PRISMForClassification
) -> Table:
    """The table of test accuracies."""
    count = sum(p.numel() for p in model.parameters())
    table = Table(title="Test accuracy, %", caption=f"{count:,} parameters, all but the ends shared")
    for title in ("modality", *RUNS, "majority", "tokens/s"):
        table.add_column(title, justify="left" if title == "modality" else "right", no_wrap=True)
    for d in sets:
        accuracies = [f"{100 * tests[run][d.name].accuracy:.2f}" for run in RUNS]
        speed = f"{tests['hybrid'][d.name].tokens_per_second:,.0f}"
        table.add_row(d.name, *accuracies, f"{100 * d.majority():.2f}", speed)
    return table


def write_results(
    args: Namespace,
    sets: Sequence[Data],
    tests: dict[str, dict[str, Predictions]],
    model: PRISMForClassification,
    difference: float,
    seconds: float,
) -> None:
    """Everything the demonstration printed, as results.json in the run folder."""
    accuracies = {
        d.name: {run: round(100 * tests[run][d.name].accuracy, 2) for run in RUNS}
        | {"majority": round(100 * d.majority(), 2)}
        for d in sets
    }
    report = {
        "kind": "demo",
        "command": " ".join(["python -m prism_models.training.demo", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "threads": args.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seed": args.seed,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy_percent": accuracies,
        "tokens_per_second": {d.name: round(tests["hybrid"][d.name].tokens_per_second) for d in sets},
        "streaming_difference": difference,
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def draw_confusion(sets: Sequence[Data], tests: dict[str, Predictions], picture: Path) -> None:
    """Confusion matrices of the hybrid on the test sets."""
    matrices = {}
    for d in sets:
        title = f"{d.name}: {100 * tests[d.name].accuracy:.2f} % of {len(d.test)}"
        matrices[title] = (tests[d.name].confusion(len(d.classes)), d.classes)
    confusion_matrices(matrices, picture)


def replay(folder: Path, data: Data, console: Console) -> float:
    """Load the saved model, stream a test utterance, and return the largest difference of the logits."""
    model = load_pretrained_folder(folder)
    sequence, label = data.test.sequences[0], int(data.test.labels[0])
    streamed = stream(model, data.name, sequence)
    with torch.no_grad():
        whole = [model(sequence[None, :t], data.name).logits[0] for t in range(1, len(sequence) + 1)]
    difference = float((streamed - torch.stack(whole)).abs().max())
    guesses = streamed.argmax(-1)
    settled = len(guesses) - int((guesses.flip(0) == guesses[-1]).long().cumprod(0).sum()) + 1
    console.print(
        f"Loaded again, the model hears one test utterance frame by frame: it names "
        f"{data.classes[int(guesses[-1])]} (truth: {data.classes[label]}) from frame {settled} of "
        f"{len(sequence)} on.\nLargest difference of streamed to one-shot logits, over all frames: "
        f"{difference:.1e} (at most {STREAM_TOLERANCE:.0e})"
    )
    return difference


def quiet() -> None:
    """Keep Lightning's advice out of the demonstration: the data sets are too small for workers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


if __name__ == "__main__":
    raise SystemExit(main())
