"""Ways out of (and back into) this package."""

from .folder import load_pretrained_folder, save_pretrained_folder

__all__ = ["load_pretrained_folder", "save_pretrained_folder"]
