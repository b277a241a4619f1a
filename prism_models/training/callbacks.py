"""Callbacks: a live line per run, a CSV of every epoch, and the weights of the best one."""

import copy
import csv
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def validation(trainer: lightning.Trainer, what: str) -> dict[str, float]:
    """The metrics `<modality>/val_<what>` of the last epoch, by modality."""
    metrics = trainer.callback_metrics
    return {k.split("/")[0]: float(v) for k, v in metrics.items() if k.endswith(f"/val_{what}")}


class BestWeights(Callback):
    """Keep the weights of the epoch with the best validation accuracy, and end with them.

    The accuracy is that over the sequences of all modalities: a mean of the modalities' accuracies
    would follow the noise of the smallest set. Of equal epochs the one with the smaller loss counts.
    """

    def __init__(self) -> None:
        self.best: tuple[float, float] | None = None
        self.epoch = -1
        self.weights: dict[str, Any] = {}

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Compare, and copy if better."""
        loss = sum(validation(trainer, "loss").values())
        score = (float(trainer.callback_metrics["val_accuracy"]), -loss)
        if self.best is None or score > self.best:
            self.best, self.epoch = score, trainer.current_epoch
            self.weights = copy.deepcopy(module.state_dict())

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Put the best weights back."""
        module.load_state_dict(self.weights)


class MetricsCSV(Callback):
    """Append one row per epoch to a CSV file, under the name of the run, as training goes on.

    Args:
        path: The file; several runs may share it.
        run: Value of the column `run`.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run, self.start = path, run, 0.0

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write the row."""
        row = {"run": self.run, "epoch": trainer.current_epoch + 1}
        row |= {k: f"{float(v):.6g}" for k, v in sorted(trainer.callback_metrics.items()) if "/" in k}
        row["seconds"] = f"{time.perf_counter() - self.start:.1f}"
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)


class Line(Callback):
    """One live line for a whole fit; ten lines where the output is not a terminal.

    Args:
        console: Where to.
        run: Name at the start of the line.
    """

    def __init__(self, console: Console, run: str) -> None:
        self.console, self.run = console, run
        self.progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("epochs  {task.fields[news]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Show the empty bar."""
        self.task = self.progress.add_task(self.run, total=trainer.max_epochs, news="")
        self.progress.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Move the bar a little."""
        done = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches
        self.progress.update(self.task, completed=round(done, 2))

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Show the news."""
        news = "  ".join(f"{name} {100 * v:.1f} %" for name, v in validation(trainer, "accuracy").items())
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 1
        self.progress.update(self.task, completed=done, news=news)
        if not self.console.is_terminal and (done == total or done % max(1, total // 5) == 0):
            self.console.print(f"{self.run:<9} epoch {done}/{total}  {news}")

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leave the finished line."""
        self.progress.stop()

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Give the terminal back."""
        self.progress.stop()
