"""Pictures of a run (extra `plot`)."""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._extras import need

COLOURS = ("#0b6e99", "#d9730d", "#8a8a8a", "#448361")


def learning_curves(metrics: Path, picture: Path) -> None:
    """Validation accuracy and loss of every run in a metrics CSV, one column per modality."""
    plt = _pyplot("learning_curves")
    runs: dict[str, list[dict[str, str]]] = defaultdict(list)
    with metrics.open() as file:
        for row in csv.DictReader(file):
            runs[row["run"]].append(row)
    first = next(iter(runs.values()))[0]
    names = [key.removesuffix("/val_accuracy") for key in first if key.endswith("/val_accuracy")]
    figure, axes = plt.subplots(
        2, len(names), figsize=(5 * len(names), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        top, bottom = axes[:, column]
        for colour, (run, rows) in zip(COLOURS, runs.items(), strict=False):
            epochs = [int(row["epoch"]) for row in rows]
            accuracy = [100 * float(row[f"{name}/val_accuracy"]) for row in rows]
            top.plot(epochs, accuracy, color=colour, marker=".", ms=3, label=run)
            bottom.plot(epochs, [float(row[f"{name}/val_loss"]) for row in rows], color=colour)
            bottom.plot(epochs, [float(row[f"{name}/train_loss"]) for row in rows], color=colour, ls=":")
        top.set(title=name, ylim=(None, 101))
        bottom.set(xlabel="epoch", yscale="log")
    axes[0][0].set_ylabel("validation accuracy, %")
    axes[1][0].set_ylabel("loss (dotted: training)")
    axes[0][-1].legend(loc="lower right", frameon=False)
    _finish(plt, figure, axes.flat, picture)


def confusion_matrices(matrices: Mapping[str, tuple[Tensor, list[str]]], picture: Path) -> None:
    """Counts of true against predicted classes, one panel per modality.

    Args:
        matrices: By title: counts i[classes,classes] with true classes in rows, and the class names.
        picture: The PNG to write.
    """
    plt = _pyplot("confusion_matrices")
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(5.2 * len(matrices), 5), squeeze=False, layout="constrained"
    )
    for axis, (title, (counts, classes)) in zip(axes[0], matrices.items(), strict=True):
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if share[i, j] > 0.5 else "black"
                    axis.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=9)
        axis.set(title=title, xlabel="predicted", ylabel="true")
        turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(classes[0]) > 2 else {}
        axis.set_xticks(range(len(classes)), classes, **turn)
        axis.set_yticks(range(len(classes)), classes)
        axis.tick_params(length=0)
    _finish(plt, figure, axes[0], picture)


def _pyplot(user: str):
    # The Agg backend writes files and needs no screen.
    need("matplotlib", "plot", user).use("Agg")
    return need("matplotlib.pyplot", "plot", user)


def _finish(plt, figure, axes, picture: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
