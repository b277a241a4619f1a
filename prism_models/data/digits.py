"""Handwritten digits: 1,797 real images of 8 x 8 pixels, in scikit-learn's package."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._extras import need
from .dataset import Data, Split, stratified

SIDE, PATCH, SEED = 8, 2, 0
TURN, STRETCH, SHIFT = math.radians(12), 0.1, 1.0


def load_digits() -> Data:
    """Digits as 16 tokens of one 2 x 2 patch each, in raster order.

    Split 60/20/20 by class with seed 0. All pixels are scaled by the mean and deviation of the
    training pixels. Training images are turned by up to 12 degrees, stretched by up to a tenth and
    shifted by up to one pixel.
    """
    pixels, digits = need("sklearn.datasets", "data", "load_digits").load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().view(-1, SIDE, SIDE), torch.from_numpy(digits).long()
    parts = stratified(labels, [0.6, 0.2, 0.2], SEED)
    seen = images[parts[0]]
    tokens = patchify((images - seen.mean()) / seen.std())
    train, validation, test = (Split(list(tokens[i]), labels[i]) for i in parts)
    return Data(
        name="digits",
        classes=[str(i) for i in range(10)],
        train=train,
        validation=validation,
        test=test,
        source="scikit-learn load_digits: optical recognition of handwritten digits, UCI (Alpaydin 1998)",
        patch_size=PATCH,
        augment=warp,
    )


def patchify(images: Tensor) -> Tensor:
    """Images [...,SIDE,SIDE] to tokens [...,T,PATCH*PATCH] in raster order."""
    grid = images.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH)).transpose(-3, -2)
    return grid.flatten(-2).flatten(-3, -2)


def unpatchify(tokens: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    grid = tokens.unflatten(-1, (PATCH, PATCH)).unflatten(-3, (SIDE // PATCH, -1))
    return grid.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def warp(tokens: Tensor) -> Tensor:
    """Turn, stretch and shift the image a little, at random; its border is repeated."""
    angle, width, height = (torch.rand(3) * 2 - 1).mul_(torch.tensor([TURN, STRETCH, STRETCH])).tolist()
    cos, sin = math.cos(angle), math.sin(angle)
    right, down = ((torch.rand(2) * 2 - 1) * (2 * SHIFT / SIDE)).tolist()
    matrix = [[cos * (1 + width), -sin, right], [sin, cos * (1 + height), down]]
    grid = F.affine_grid(torch.tensor([matrix]), [1, 1, SIDE, SIDE], align_corners=False)
    image = unpatchify(tokens)[None, None]
    return patchify(F.grid_sample(image, grid, padding_mode="border", align_corners=False)[0, 0])
