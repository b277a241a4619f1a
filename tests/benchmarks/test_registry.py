"""Who computes each op, layer and model, and that what they compute is what ours do."""

import shutil

import pytest
import torch

from benchmarks.judge import judge, limit_of
from benchmarks.ranking import COMPILED, EAGER, INDUCTOR, OURS, PATHS, REFERENCE, races
from benchmarks.registry import Skip, benches
from tests.benchmarks.fakes import row

KINDS = {  # of provider, and the names of which one must be there
    "kernels": PATHS[:1],
    "PyTorch path": PATHS[1:],
    "reference": (REFERENCE,),
    "plain PyTorch": EAGER,
    "compiler": (INDUCTOR, COMPILED),
}
NO_PEER = {  # benches that nobody else computes, and what they are compared with instead
    "selective_scan_step": "plain PyTorch: mamba-ssm's and lrnnx's steps are other functions",
    "S4DComplex": "the module with eager time loops: its shape is our own",
    "PRISM": "the published code: benchmarks/signal_model_vs_published.py",
}


@pytest.mark.parametrize("name", benches())
def test_every_bench_has_every_kind_of_provider(name):
    providers = benches()[name].providers
    missing = [kind for kind, names in KINDS.items() if not set(names) & set(providers)]
    assert not missing
    assert all(name in providers for name in (*PATHS, REFERENCE))


@pytest.mark.parametrize("name", benches())
def test_every_bench_has_a_peer_or_a_reason_for_none(name):
    peers = set(benches()[name].providers) - {*OURS, REFERENCE, *EAGER, INDUCTOR}
    assert bool(peers) != (name in NO_PEER)


@pytest.mark.parametrize("name", benches())
def test_who_cannot_run_says_why(name):
    """Every factory gives something to call, or a reason in words: none is silent, none breaks."""
    bench = benches()[name]
    setting = bench.setting(bench.cpu[0], torch.float32, "cpu")
    for provider in bench.providers.values():
        try:
            made = provider.factory(setting)
        except Skip as reason:
            assert len(str(reason).split()) > 2, provider.name
        else:
            assert callable(made), provider.name


def test_what_a_compiler_makes_of_ours_is_neither_a_peer_nor_our_own_time():
    names = ("torch", COMPILED, INDUCTOR, "eager")
    (race,) = races(row(provider=n, ms=ms) for n, ms in zip(names, (4.0, 1.0, 2.0, 8.0), strict=True))
    assert race.ours.provider == "torch" and race.ranked[0].provider == COMPILED
    assert [peer.provider for peer in race.peers] == [INDUCTOR]


COMPILERS = [
    ("selective_scan_step", INDUCTOR, "B2_H2_P3_N2"),
    ("SwiGLU", INDUCTOR, "B2_T3_D8"),
    ("SwiGLU", COMPILED, "B2_T3_D8"),
    ("SwiGLU", "transformers", "B2_T3_D8"),
    ("S4DComplex", COMPILED, "B2_T4_D8_H2_N2"),
    ("GatedDelta", COMPILED, "B2_T4_D8_H2"),
]


@pytest.mark.parametrize(("op", "provider", "shape"), COMPILERS)
def test_competitors_compute_the_same(op, provider, shape, monkeypatch):
    """Compilers with their tracing alone: code generation takes minutes, and a compiler on the machine."""
    monkeypatch.setattr(shutil, "which", lambda name: name)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend="aot_eager", **options))
    bench = benches()[op]
    backward = bench.directions != ("forward",)
    setting = bench.setting(shape, torch.float32, "cpu")
    tensors = bench.draw(setting)
    held_to = judge(bench, setting, tensors, backward)
    adapter = bench.providers[provider].factory(setting)
    ratio, where = held_to.worst(held_to.values(adapter, tensors))
    assert ratio <= limit_of(ours=False), where


def test_a_model_is_compiled_once_for_each_kind_of_block(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    whole, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend=backend, **options))
    bench = benches()["PRISM"]
    setting = bench.setting("image_1x4x3", torch.float32, "cpu")
    tensors = bench.draw(setting)
    with torch.no_grad():
        found, expected = (bench.providers[n].factory(setting)(tensors) for n in (COMPILED, "torch"))
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 2
