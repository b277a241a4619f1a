"""Optional dependencies: imported where they are used, and missed in words that help."""

import importlib
from types import ModuleType


def need(module: str, extra: str, user: str) -> ModuleType:
    """Import and return `module`, which belongs to the extra `extra`, for the caller named `user`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{user}: expected `{module}` to be installed, got: {error}. "
            f'Install the extra it belongs to: `pip install "prism-kernels[{extra}]"`.'
        ) from error
