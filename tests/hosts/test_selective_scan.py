"""transformers' Mamba and Mamba-2 layers on our selective scan: the same numbers, and nothing left behind.

Both sides compute the scan in float32 here, so that they part by rounding alone.
"""

import copy
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from prism_kernels._core.runtime import interpreting, watch_launches
from prism_kernels.hosts import transformers as host
from prism_kernels.hosts.transformers import use_gated_delta_rule, use_selective_scan

from .test_transformers import agree, convolution, generate, gradients

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SCAN, UPDATE, HEADS = "selective_scan_fn", "selective_state_update", "mamba_chunk_scan_combined"
LIMIT = 1e-4
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
ONE = {"state_size": 8}
TWO = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}
JAMBA = {"mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
BAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
ZAMBA = {"mamba_d_state": 8, "n_mamba_heads": 2, "layers_block_type": ["hybrid", "hybrid"]}
ZAMBA2 = {"mamba_d_state": 8, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 16, "mamba_headdim": 8}
GRANITE = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "num_local_experts": 2}
NEMOTRON = {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16}
MODELS = {
    "Mamba": ONE,
    "FalconMamba": ONE,
    "Jamba": JAMBA,
    "Zamba": ZAMBA,
    "Mamba2": TWO,
    "Bamba": BAMBA | {"attn_layer_indices": [1]},
    "FalconH1": BAMBA | {"mamba_d_ssm": 64, "head_dim": 16},
    "GraniteMoeHybrid": BAMBA | GRANITE,
    "NemotronH": NEMOTRON | {"layers_block_type": ["mamba", "attention"], "head_dim": 16},
    "Zamba2": ZAMBA2 | {"layers_block_type": ["mamba", "hybrid"]},
}


def build(name="Mamba2", **changes):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    options = COMMON | MODELS[name] | changes
    made = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(1, 64, (2, 37))  # two chunks and a bit


def calls(layers, scans, steps, name):
    """Of each function, for a number of layers with a scan."""
    scan, other = (SCAN, HEADS) if name in ("Mamba", "FalconMamba", "Jamba", "Zamba") else (HEADS, SCAN)
    return {scan: layers * scans, other: 0, UPDATE: layers * steps}


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_generation_agree(name, ids):
    model = build(name)

    def run():
        return model(ids).logits, gradients(model.train(), ids), generate(model.eval(), ids)

    theirs = run()
    with use_selective_scan() as use:
        ours = run()
    agree(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for parameter in theirs[1]:
        agree(ours[1][parameter], theirs[1][parameter], 10 * LIMIT)  # sums over tokens that cancel
    assert torch.equal(ours[2][0], theirs[2][0])
    agree(ours[2][1], theirs[2][1])
    layers = {"Jamba": 1, "Bamba": 1, "GraniteMoeHybrid": 1, "NemotronH": 1, "Zamba": 4}.get(name, 2)
    assert use.calls == calls(layers, 3, 5, name)  # Zamba scans each of two heads by itself
    assert torch.equal(model(ids).logits, theirs[0])
    assert torch.equal(generate(model, ids)[1], theirs[2][1])


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter, or a GPU and its own tests")
@pytest.mark.parametrize(
    "name, sizes",
    [("Mamba", {}), ("Mamba2", {"state_size": 32, "num_heads": 2, "head_dim": 32, "n_groups": 1})],
)
def test_the_kernels_agree_too(name, sizes, ids):
    """Mamba's channelwise, Mamba-2's per head: logits, gradients and the next tokens."""
    model, short = build(name, num_hidden_layers=1, **sizes), ids[:1, :9]

    def run():
        return model(short).logits, gradients(model.train(), short), generate(model.eval(), short)[0]

    theirs = run()
    with use_selective_scan(impl="triton"), watch_launches() as launches:
        ours = run()
    assert ("scan_backward" if name == "Mamba" else "heads_backward_kernel") in {n for n, _ in launches}
    agree(ours[0], theirs[0])
    for parameter in theirs[1]:
        agree(ours[1][parameter], theirs[1][parameter], 10 * LIMIT)
    assert torch.equal(ours[2], theirs[2])


BOTH = pytest.mark.parametrize("name", ["Mamba", "Mamba2"])


@BOTH
def test_the_comparison_would_notice_one_per_cent(name, ids, monkeypatch):
    op = SCAN if name == "Mamba" else HEADS
    home, scan, model = host._HOMES[op], getattr(host._HOMES[op], op), build(name)
    monkeypatch.setattr(home, op, lambda *tensors, **options: scan(*tensors, **options) * 1.01 + 0.01)
    theirs = model(ids, use_cache=False).logits
    with use_selective_scan():
        ours = model(ids, use_cache=False).logits
    assert (ours - theirs).abs().max() > 10 * LIMIT * theirs.abs().max()


@pytest.mark.parametrize(
    "name, op", [("Mamba", SCAN), ("Mamba2", HEADS), ("Mamba", UPDATE), ("Mamba2", UPDATE)]
)
def test_a_failure_of_our_op_is_the_models_failure(name, op, ids, monkeypatch):
    def fails(*_, **__):
        raise ArithmeticError(op)

    model = build(name)
    monkeypatch.setattr(host._HOMES[op], op, fails)
    with pytest.raises(ArithmeticError, match=op), use_selective_scan():
        generate(model, ids)
    generate(model, ids)  # undone


@BOTH
def test_a_training_step_agrees(name, ids):
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model.train(), ids)
        optimizer.step()
        return model.eval()(ids).logits

    theirs = step(build(name))
    with use_selective_scan():
        agree(step(build(name)), theirs)


@BOTH
def test_a_fused_layer_gives_way_in_training(name, ids, monkeypatch):
    """As where mamba_ssm is installed: its fused layer would pass our scan by."""
    model = build(name).train()
    module = host.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    fused = "mamba_inner_fn" if name == "Mamba" else "mamba2_split_conv1d_scan_combined"

    def whole(zxbcdt, *_, **__):
        raise AssertionError("the fused layer ran")

    monkeypatch.setattr(module, fused, whole)
    with pytest.raises(AssertionError, match="the fused layer ran"):
        gradients(model, ids)
    with use_selective_scan() as use:
        gradients(model, ids)
    assert use.calls == calls(2, 1, 0, name)


@BOTH
def test_a_left_padded_batch_agrees(name, ids):
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    model, given = build(name), {"attention_mask": mask}
    theirs, made = model(ids, **given).logits[mask.bool()], generate(model, ids, **given)
    with use_selective_scan():
        ours, ours_made = model(ids, **given).logits[mask.bool()], generate(model, ids, **given)
    agree(ours, theirs)
    assert torch.equal(ours_made[0], made[0])
    agree(ours_made[1], made[1])


@pytest.mark.parametrize("pieces", [[20] + [1] * 17, [30, 1, 6]])
def test_a_cache_filled_piece_by_piece_gives_the_whole(ids, pieces):
    model = build("Mamba2")  # transformers starts a Mamba scan of several tokens from zero
    with use_selective_scan(), torch.no_grad():
        whole, cache, parts = model(ids).logits, None, []
        for piece in ids.split(pieces, dim=1):
            out = model(piece, cache_params=cache, use_cache=True)
            cache = out.cache_params
            parts.append(out.logits)
    agree(torch.cat(parts, dim=1), whole)


@BOTH
@pytest.mark.parametrize("grad", [True, False])
def test_the_switch_may_be_thrown_in_mid_generation(name, grad, ids):
    model = build(name)
    with torch.set_grad_enabled(grad):
        whole = model(ids).logits[:, -1:]
        cache = model(ids[:, :-2], use_cache=True).cache_params
        with use_selective_scan() as use:
            model(ids[:, -2:-1], cache_params=cache, use_cache=True)
        assert use.calls == calls(2, 0, 1, name)
        agree(model(ids[:, -1:], cache_params=cache, use_cache=True).logits, whole)


@BOTH
def test_the_state_that_goes_into_the_cache_is_as_theirs(name, ids):
    model = build(name)

    def state():
        return model(ids, use_cache=True).cache_params.layers[0].recurrent_states[0]

    theirs = state()
    with use_selective_scan():
        ours = state()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    agree(ours, theirs)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_to_their_rounding(name, dtype, ids):
    model = build(name).to(dtype)
    limit = {torch.float64: LIMIT}.get(dtype, 16 * torch.finfo(dtype).eps)
    theirs = generate(model, ids)
    with use_selective_scan():
        ours = generate(model, ids)
    assert ours[1].dtype == theirs[1].dtype
    agree(ours[1][0].double(), theirs[1][0].double(), limit)


@BOTH
def test_models_made_meanwhile_are_whole_afterwards(name, ids):
    before = build(name)
    theirs = before(ids).logits
    with use_selective_scan() as use:
        made, copied = build(name), copy.deepcopy(before)
        agree(made(ids).logits, theirs)
    assert use.calls == calls(2, 1, 0, name)
    assert torch.equal(made(ids).logits, theirs) and torch.equal(copied(ids).logits, theirs)
    assert use.calls == calls(2, 1, 0, name)


def test_undoing_puts_back_the_very_functions():
    names = host._scan_models(transformers.__path__[0])
    assert {f"transformers.models.{n.lower()}.modeling_{n.lower()}" for n in ("Mamba", "Mamba2")} <= set(
        names
    )
    places = [(host.import_module(m), n) for m in names for n in host._SCANS]
    places = [(module, name) for module, name in places if hasattr(module, name)]
    before = [getattr(*place) for place in places]
    first, second = use_selective_scan(), use_selective_scan(impl="reference")
    for use in (first, second):
        assert all(getattr(*place) is not function for place, function in zip(places, before, strict=True))
        use.undo()
    assert [getattr(*place) for place in places] == before


def test_uses_nest_with_each_other_and_with_the_delta_rules(ids):
    model, ids = build(), ids[:, :5]
    theirs = model(ids).logits
    with use_selective_scan() as outer, use_gated_delta_rule():
        one = model(ids).logits
        with use_selective_scan(impl="reference") as inner:
            reference = model(ids).logits
        assert torch.equal(model(ids).logits, one)
    for ours in (one, reference):
        agree(ours, theirs)
    assert not torch.equal(one, reference)
    assert (outer.calls[HEADS], inner.calls[HEADS]) == (6, 2)
    assert torch.equal(model(ids).logits, theirs)


@BOTH
def test_a_layer_compiles_whole_and_follows_the_switch(name):
    torch._dynamo.reset()
    model, x = build(name), torch.randn(2, 20, 32)
    layer = model.backbone.layers[0].mixer
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    with torch.no_grad():
        theirs = compiled(x)
        with use_selective_scan() as use:
            ours = compiled(x)
            torch.testing.assert_close(ours, layer(x))
        assert sum(use.calls.values()) == 1  # a compiled graph does not count
        agree(ours, theirs)
        assert torch.equal(compiled(x), theirs)
    nodes = {str(n.target) for g in graphs.graphs for n in g.graph.nodes}
    assert any("prism_kernels.selective_scan" in node for node in nodes)


def test_packed_documents_are_as_if_alone(monkeypatch):
    """As with the package `causal-conv1d` installed, whose place ours takes here."""
    model = build("Mamba2")
    module = host.import_module("transformers.models.mamba2.modeling_mamba2")
    monkeypatch.setattr(module, "causal_conv1d_fn", convolution)
    layer, x = model.backbone.layers[0].mixer, torch.randn(1, 20, 32)
    lengths = [7, 1, 12]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    with use_selective_scan():
        packed = layer(x, seq_idx=seq_idx)
        alone = [layer(piece) for piece in x.split(lengths, dim=1)]
        with pytest.raises(ValueError, match="cu_seq_lens_q alone. Call the model with both"):
            layer(x, cu_seq_lens_q=torch.tensor([0, 7, 8, 20]))
    agree(packed, torch.cat(alone, dim=1))


def test_an_unknown_path_is_refused_at_once():
    with pytest.raises(ValueError, match="use_selective_scan: expected .*'torch'"):
        use_selective_scan(impl="tritno")


def test_a_transformers_without_such_models_is_refused(monkeypatch):
    monkeypatch.setattr(host, "_scan_models", lambda folder: ())
    with pytest.raises(
        RuntimeError, match=f"selective scan, got none in transformers {transformers.__version__}"
    ):
        use_selective_scan()


def test_threads_lose_no_call(ids):
    model = build()

    def work():
        with torch.no_grad():
            for _ in range(5):
                model(ids[:1, :4])

    with use_selective_scan() as use:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert use.calls[HEADS] == 40
