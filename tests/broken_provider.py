"""A deliberately wrong provider: `python -m benchmarks run --plugin tests/broken_provider.py` must say so.

Its outputs are right and its gradients are not: it forgets that the root mean square depends on the input.
"""

from benchmarks.registry import register


def broken(tensors):
    x, weight = tensors["x"], tensors["weight"]
    rms = (x.detach().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return {"y": x / rms * weight}


register("rms_norm", "broken", lambda setting: broken)
