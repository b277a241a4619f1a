"""The Lightning module: one backbone, a batch of every modality in each step."""

import math
from typing import cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from ..data import Batch
from ..signal import PRISMConfig, PRISMForClassification


class JointClassifier(lightning.LightningModule):
    """Train PRISMForClassification on all its modalities at once.

    A step sees one batch of every modality; the loss is the sum of their cross-entropies. AdamW with
    a linear warm-up and a cosine to zero; weight decay acts on the matrices of linear layers alone.

    Args:
        config: The model.
        lr: Largest learning rate.
        weight_decay: Weight decay of the matrices.
        warmup: Fraction of the steps that the learning rate rises.
        label_smoothing: Share of probability that the training target spreads over all classes.
    """

    def __init__(
        self,
        config: PRISMConfig,
        *,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = PRISMForClassification(config)
        self.names = [m.name for m in config.modalities]
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.label_smoothing = label_smoothing
        self.pooled = MeanMetric()
        self.accuracy = nn.ModuleDict(
            {m.name: MulticlassAccuracy(m.num_classes, average="micro") for m in config.modalities}
        )

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """Sum of the modalities' losses."""
        losses = []
        for name in self.names:
            x, labels, lengths = batch[name]
            out = self.model(x, name, labels, lengths=lengths)
            self._log(f"{name}/train_loss", cast(Tensor, out.loss).detach(), batch[name])
            losses.append(F.cross_entropy(out.logits, labels, label_smoothing=self.label_smoothing))
        return torch.stack(losses).sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and accuracy of one batch; loader i serves modality i."""
        name = self.names[dataloader_idx]
        out = self.model(batch.x, name, batch.labels, lengths=batch.lengths)
        accuracy = cast(Metric, self.accuracy[name])
        accuracy.update(out.logits, batch.labels)
        self.pooled.update((out.logits.argmax(-1) == batch.labels).float())
        self._log(f"{name}/val_loss", cast(Tensor, out.loss), batch)
        self._log(f"{name}/val_accuracy", accuracy, batch)

    def on_validation_epoch_end(self) -> None:
        """Accuracy over the validation sequences of all modalities, each counted once."""
        self.log("val_accuracy", self.pooled)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and its schedule by step."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.weight_decay), lr=self.lr)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, total, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _log(self, name: str, value: Tensor | Metric, batch: Batch) -> None:
        self.log(name, value, on_step=False, on_epoch=True, batch_size=len(batch.x), add_dataloader_idx=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices of linear layers with weight decay; norms, biases, filters, A, B, C, D and dt without."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[id(parameter) in decayed].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: 0 to 1 over the first `warmup` of the steps, then a cosine to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))
