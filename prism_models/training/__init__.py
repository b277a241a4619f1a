"""Training with Lightning. All of it needs the extra `train`."""

from .._extras import need

for _module in ("lightning", "torchmetrics", "rich"):
    need(_module, "train", "prism_models.training")
