"""A model as a folder: config.json and model.safetensors. Loading reads numbers and runs no code."""

import hashlib
import json
import os
from pathlib import Path

import torch

from prism_kernels._core.checks import fail

from .._extras import need
from ..signal import PRISMConfig, PRISMForClassification

FORMAT = "prism-signal-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained_folder(model: PRISMForClassification, folder: str | Path) -> None:
    """Write the configuration and the weights of `model`; each file appears whole or not at all.

    Args:
        model: The model.
        folder: Where to; made if need be. Files of the same names are replaced.

    Raises:
        ImportError: safetensors (extra `train`) is missing.
    """
    safetensors = need("safetensors.torch", "train", "save_pretrained_folder")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    blob = safetensors.save(weights, metadata={"format": "pt"})
    described = {
        "format": FORMAT,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "model": model.config.to_dict(),
    }
    _replace(folder / WEIGHTS, blob)
    _replace(folder / CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def load_pretrained_folder(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> PRISMForClassification:
    """Build the model that `save_pretrained_folder` wrote, in evaluation mode.

    Args:
        folder: The folder.
        device: Where the weights go.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged, or the two do not belong together.
        ImportError: safetensors (extra `train`) is missing.
    """
    safetensors = need("safetensors.torch", "train", "load_pretrained_folder")
    folder = Path(folder)
    described = _described(folder)
    blob = _read(folder / WEIGHTS)
    if hashlib.sha256(blob).hexdigest() != described["sha256"]:
        got = f"{len(blob)} bytes with another one"
        advice = "The file is torn, altered, or from another model: restore both files together."
        fail("load_pretrained_folder", f"{WEIGHTS} with the SHA-256 that {CONFIG} states", got, advice)
    model = PRISMForClassification(PRISMConfig.from_dict(described["model"]))
    weights = safetensors.load(blob)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if wanted != found:
        differ = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        name = differ[0]
        got = f"{len(differ)} that differ, first `{name}`: {found.get(name)} for {wanted.get(name)}"
        advice = f"{CONFIG} and {WEIGHTS} are of different models or versions."
        fail("load_pretrained_folder", "the weights that the configuration describes", got, advice)
    model.load_state_dict(weights)
    return model.to(device).eval()


def _described(folder: Path) -> dict:
    try:
        described = json.loads(_read(folder / CONFIG))
        known = described["format"] == FORMAT and {"sha256", "model"} <= described.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        fail("load_pretrained_folder", f"a {CONFIG} of format {FORMAT!r}", got, "Save the model again.")
    if not known:
        got = repr(described["format"])
        fail("load_pretrained_folder", f"a {CONFIG} of format {FORMAT!r}", got, "Save the model again.")
    return described


def _read(path: Path) -> bytes:
    if not path.is_file():
        got = f"none at {path}"
        advice = "Give the folder that save_pretrained_folder wrote."
        fail("load_pretrained_folder", f"a file {path.name}", got, advice, FileNotFoundError)
    return path.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
