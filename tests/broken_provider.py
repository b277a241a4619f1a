"""Deliberately wrong providers: `python -m benchmarks run --plugin tests/broken_provider.py` must say so."""

from benchmarks.registry import register


def broken(tensors):
    """Divides by the mean absolute value, not by the root mean square."""
    x, weight = tensors["x"], tensors["weight"]
    return {"y": x / (x.abs().mean(-1, keepdim=True) + 1e-6) * weight}


def broken_gradient(tensors):
    """Right outputs, wrong gradients: forgets that the root mean square depends on the input."""
    x, weight = tensors["x"], tensors["weight"]
    rms = (x.detach().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return {"y": x / rms * weight}


register("rms_norm", "broken", lambda setting: broken)
register("rms_norm", "broken gradient", lambda setting: broken_gradient)
