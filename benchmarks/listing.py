"""`python -m benchmarks list`: what can be measured here, and who is missing.

    python -m benchmarks list
    python -m benchmarks list --op rms_norm 'selective*'

A provider that cannot run on this machine is listed with the reason.
"""

import argparse
import sys

import torch

from .registry import Bench, Provider, Skip, benches
from .selection import Refusal, chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `list`."""
    parser.add_argument("--op", nargs="+", default=["*"], metavar="NAME", help="ops, layers and models")


def run(args: argparse.Namespace) -> int:
    """Print every bench that is selected."""
    everything = benches()
    try:
        names = chosen("op", args.op, list(everything))
    except Refusal as error:
        print(error, file=sys.stderr)
        return 2
    for name in names:
        show(everything[name])
    return 0


def show(bench: Bench) -> None:
    """One bench: kind, shapes, providers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{bench.name} ({bench.kind})")
    print(f"  shapes on a CPU  {'  '.join(bench.cpu)}")
    print(f"  shapes on a GPU  {'  '.join(bench.shapes)}")
    setting = bench.setting((bench.cpu if device == "cpu" else bench.shapes)[0], torch.float32, device)
    for provider in bench.providers.values():
        print(f"  {provider.name:<24}{state(provider, setting)}".rstrip())


def state(provider: Provider, setting) -> str:
    """Why a provider cannot run here, or what it is."""
    try:
        provider.factory(setting)
    except Skip as reason:
        return f"skipped: {reason}"
    except Exception as error:
        return f"fails: {error}"
    return ("ours" if provider.ours else "peer") + ("" if provider.default else ", only when asked for")
