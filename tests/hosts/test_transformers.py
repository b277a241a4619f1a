"""transformers' models with our gated delta rule: the same numbers, and nothing left behind.

Both sides compute the rule in float32, so that they part by rounding alone; the norm behind the rule divides
by the size of its output, and lets the rounding of a token grow whose output nearly cancels. Over forty draws
of each model they parted by 4e-5 of the largest logit at most; ours and the reference by 8e-6.
"""

import copy
import operator
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from prism_kernels import causal_conv1d_fn, gated_delta_rule
from prism_kernels.hosts import transformers as host
from prism_kernels.hosts.transformers import use_gated_delta_rule
from tests.test_imports import python

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CHUNK, RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
LIMIT = 1e-4
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
HEAD = {"head_dim": 16}
DENSE = {"intermediate_size": 32}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 128,
    "indexer_compress_ratio": 4,
}
MODELS = {
    "Qwen3Next": ("Qwen3NextConfig", HEAD | DENSE | EXPERTS),
    "Qwen3_5": ("Qwen3_5TextConfig", HEAD | DENSE),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", HEAD | EXPERTS),
    "OlmoHybrid": ("OlmoHybridConfig", DENSE | {"linear_a_log_max": 1.0}),
    "Qwen4Exp": ("Qwen4ExpTextConfig", HEAD | EXPERTS | INDEXED),
}


def build(name="Qwen3Next", **changes):
    config, options = MODELS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    made = getattr(transformers, config)(**COMMON | options | changes)
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


@pytest.fixture(scope="module")
def qwen():
    return build()


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 70))  # a chunk and a bit


def delta_layer(model):
    return model.model.layers[0].linear_attn


def agree(ours, theirs, limit=LIMIT):
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


def generate(model, ids, **options):
    made = model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return made.sequences, torch.stack(made.logits)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_generation_agree(name, ids):
    model = build(name)
    theirs = model(ids).logits, gradients(model, ids), generate(model, ids)
    with use_gated_delta_rule() as use:
        ours = model(ids).logits, gradients(model, ids), generate(model, ids)
    agree(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for parameter in theirs[1]:
        agree(ours[1][parameter], theirs[1][parameter], 10 * LIMIT)  # sums over tokens that cancel
    assert torch.equal(ours[2][0], theirs[2][0])
    agree(ours[2][1], theirs[2][1])
    assert use.calls == {CHUNK: 3, RECURRENT: 5}
    assert torch.equal(model(ids).logits, theirs[0])
    assert torch.equal(generate(model, ids)[1], theirs[2][1])


def test_the_comparison_would_notice_one_per_cent(qwen, ids, monkeypatch):
    rule = gated_delta_rule.chunk_gated_delta_rule

    def off(**tensors):
        o, state = rule(**tensors)
        return o * 1.01 + 0.01, state

    monkeypatch.setattr(gated_delta_rule, CHUNK, off)
    theirs = qwen(ids).logits
    with use_gated_delta_rule():
        ours = qwen(ids).logits
    assert (ours - theirs).abs().max() > 10 * LIMIT * theirs.abs().max()


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_a_failure_of_our_op_is_the_models_failure(qwen, ids, monkeypatch, function):
    def fails(**_):
        raise ArithmeticError(function)

    monkeypatch.setattr(gated_delta_rule, function, fails)
    with pytest.raises(ArithmeticError, match=function), use_gated_delta_rule():
        generate(qwen, ids)
    generate(qwen, ids)  # undone


def test_a_training_step_agrees(ids):
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model, ids)
        optimizer.step()
        return model(ids).logits

    theirs = step(build())
    with use_gated_delta_rule():
        agree(step(build()), theirs)


def test_a_left_padded_batch_agrees_and_a_row_is_as_if_alone(qwen, ids):
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    kept = mask.bool()
    given = {"attention_mask": mask}
    theirs, made = qwen(ids, **given).logits[kept], generate(qwen, ids, **given)
    with use_gated_delta_rule():
        ours, alone = qwen(ids, **given).logits, qwen(ids[:1, 23:]).logits
        ours_made = generate(qwen, ids, **given)
    agree(ours[kept], theirs)
    agree(ours[:1, 23:], alone)
    assert torch.equal(ours_made[0], made[0])
    agree(ours_made[1], made[1])


@pytest.mark.parametrize("pieces", [[40] + [1] * 30, [30, 1, 39]])
def test_a_cache_filled_piece_by_piece_gives_the_whole(qwen, ids, pieces):
    with use_gated_delta_rule(), torch.no_grad():
        whole, cache, parts = qwen(ids).logits, None, []
        for piece in ids.split(pieces, dim=1):
            out = qwen(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    agree(torch.cat(parts, dim=1), whole)


def test_the_switch_may_be_thrown_in_mid_generation(qwen, ids):
    with torch.no_grad():
        whole = qwen(ids).logits[:, -1:]
        cache = qwen(ids[:, :-2], use_cache=True).past_key_values
        with use_gated_delta_rule():
            qwen(ids[:, -2:-1], past_key_values=cache, use_cache=True)
        agree(qwen(ids[:, -1:], past_key_values=cache, use_cache=True).logits, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_to_their_rounding(ids, dtype):
    model = build("Qwen3_5").to(dtype)
    limit = {torch.float64: LIMIT}.get(dtype, 8 * torch.finfo(dtype).eps)  # theirs is float32 inside
    theirs = generate(model, ids)
    with use_gated_delta_rule():
        ours = generate(model, ids)
    assert ours[1].dtype == theirs[1].dtype
    agree(ours[1][0].double(), theirs[1][0].double(), limit)


def test_the_state_that_goes_into_the_cache_is_as_theirs(qwen, ids):
    def state():
        return qwen(ids, use_cache=True).past_key_values.layers[0].recurrent_states[0]

    theirs = state()
    with use_gated_delta_rule():
        ours = state()
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == ((2, 4, 8, 16), torch.float32)
    agree(ours, theirs)


def test_models_made_meanwhile_are_whole_afterwards(qwen, ids):
    theirs = qwen(ids).logits
    with use_gated_delta_rule() as use:
        made, copied = build(), copy.deepcopy(qwen)
        ours = made(ids).logits
    agree(ours, theirs)
    assert use.calls[CHUNK] == 1
    assert torch.equal(made(ids).logits, theirs) and torch.equal(copied(ids).logits, theirs)
    assert use.calls[CHUNK] == 1


def test_undoing_puts_back_the_very_functions(qwen):
    names = [name for name, _ in host._models(transformers.__path__[0])]
    assert "transformers.models.qwen3_next.modeling_qwen3_next" in names
    modules = [host.import_module(name) for name in names]
    functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    before = [getattr(module, name) for module in modules for name in functions]
    first, second = use_gated_delta_rule(), use_gated_delta_rule(impl="reference")
    for use in (first, second):
        now = [getattr(module, name) for module in modules for name in functions]
        assert not any(map(operator.is_, now, before))
        use.undo()
    assert [getattr(module, name) for module in modules for name in functions] == before


def test_uses_nest_and_the_inner_path_holds(qwen, ids):
    ids = ids[:, :5]
    theirs = qwen(ids).logits
    with use_gated_delta_rule() as outer:
        one = qwen(ids).logits
        with use_gated_delta_rule(impl="reference") as inner:
            reference = qwen(ids).logits
        assert torch.equal(qwen(ids).logits, one)
    for ours in (one, reference):
        agree(ours, theirs)
    assert not torch.equal(one, reference)
    assert (outer.calls[CHUNK], inner.calls[CHUNK]) == (3, 1)
    assert torch.equal(qwen(ids).logits, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_triton_path_agrees(device):
    model = build(linear_num_value_heads=2).to(device)
    ids = torch.randint(1, 64, (1, 5), device=device)
    theirs = generate(model, ids)
    with use_gated_delta_rule(impl="triton"):
        ours = generate(model, ids)
    agree(ours[1], theirs[1])


@pytest.mark.parametrize("backend, trains", [("eager", True), ("aot_eager", False)])
def test_a_layer_compiles_whole_and_follows_the_switch(qwen, backend, trains):
    """Without gradients in the second: the backward of the layer itself, as it is, fails there in a view."""
    torch._dynamo.reset()
    layer, x = delta_layer(qwen), torch.randn(2, 20, 32, requires_grad=trains)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)

    def run(f):
        with torch.set_grad_enabled(trains):
            out = f(x)
            return out, *(torch.autograd.grad(out.square().sum(), x) if trains else ())

    theirs = run(compiled)
    for _ in range(2):
        with use_gated_delta_rule() as use:
            ours = [run(compiled), run(compiled)]
            expected = run(layer)
        assert use.calls[CHUNK] == 1  # a compiled graph does not count
        for made in ours:
            assert all(map(torch.equal, made, expected))
        assert all(map(torch.equal, run(compiled), theirs))
    assert graphs.frame_count == 2  # one with each rule; none for a second use
    nodes = {str(n.target) for g in graphs.graphs for n in g.graph.nodes}
    assert any(f"prism_kernels.{CHUNK}" in node for node in nodes)


def test_packed_documents_are_as_if_alone(qwen, monkeypatch):
    """As with the package `causal-conv1d` installed, whose place ours takes here."""
    module = host.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    monkeypatch.setattr(module, "causal_conv1d_fn", convolution)
    layer, x = delta_layer(qwen), torch.randn(1, 20, 32)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(3), bounds.diff())[None].int()
    with use_gated_delta_rule():
        packed = layer(x, cu_seq_lens_q=bounds, seq_idx=seq_idx)
        alone = [layer(piece) for piece in x.split(bounds.diff().tolist(), dim=1)]
    agree(packed, torch.cat(alone, dim=1))


def convolution(x, weight, bias=None, activation=None, seq_idx=None, **_):
    return causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation=activation)


def test_packed_documents_that_the_convolution_would_mix_are_refused(qwen):
    x = torch.randn(1, 20, 32)
    with (
        use_gated_delta_rule(),
        pytest.raises(ValueError, match="cu_seqlens alone. Call the model with both"),
    ):
        delta_layer(qwen)(x, cu_seq_lens_q=torch.tensor([0, 7, 20]))


def test_what_a_model_is_called_with_passes_and_what_nobody_knows_does_not(qwen, ids):
    with use_gated_delta_rule():
        qwen(ids, labels=ids, output_router_logits=True, num_items_in_batch=torch.tensor(9), is_causal=True)
        with pytest.raises(TypeError, match="got scale"):
            delta_layer(qwen)(torch.randn(1, 5, 32), scale=1.0)


def test_an_unknown_path_is_refused_at_once():
    with pytest.raises(ValueError, match="use_gated_delta_rule: expected .*'torch'"):
        use_gated_delta_rule(impl="tritno")


def test_a_transformers_without_such_models_is_refused(monkeypatch):
    monkeypatch.setattr(host, "_models", lambda folder: ())
    with pytest.raises(RuntimeError, match=f"none in transformers {transformers.__version__}"):
        use_gated_delta_rule()


def test_threads_lose_no_call(qwen, ids):
    def work():
        with torch.no_grad():
            for _ in range(5):
                qwen(ids[:1, :4])

    with use_gated_delta_rule() as use:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert use.calls[CHUNK] == 20


def test_importing_the_adapter_loads_neither_transformers_nor_triton():
    code = "import sys, prism_kernels.hosts.transformers, prism_kernels.hosts.patching\n"
    code += "print([n for n in ('transformers', 'triton') if n in sys.modules])"
    assert python(code)[0].strip() == "[]"


WITHOUT = """
from prism_kernels.hosts.transformers import use_gated_delta_rule
try:
    use_gated_delta_rule()
except ImportError as error:
    print(error)
"""


def test_without_transformers_the_error_names_the_extra():
    assert 'pip install "prism-kernels[hf]"' in python(WITHOUT, blocked="transformers")[0]


OLDER = """
import torch
from torch import nn

def torch_chunk_gated_delta_rule(*tensors, **options):
    return "theirs", None

torch_recurrent_gated_delta_rule = torch_chunk_gated_delta_rule

class SomeGatedDeltaNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.chunk_gated_delta_rule = torch_chunk_gated_delta_rule
        self.recurrent_gated_delta_rule = torch_recurrent_gated_delta_rule

    def forward(self, x):
        for rule in (self.chunk_gated_delta_rule, self.recurrent_gated_delta_rule):
            o = rule(x, x, x, g=-x[..., 0].abs(), beta=x[..., 0].sigmoid(), output_final_state=True)[0]
        return o
"""
IN_OLDER = """
import torch
from transformers.models.some.modeling_some import SomeGatedDeltaNet
from prism_kernels.hosts.transformers import use_gated_delta_rule
before, x = SomeGatedDeltaNet(), torch.randn(1, 5, 2, 8)
with use_gated_delta_rule() as use:
    inside = SomeGatedDeltaNet()
    assert before(x).shape == inside(x).shape == x.shape
assert set(use.calls.values()) == {2}
assert before(x) == inside(x) == "theirs"
"""


def test_layers_that_bind_the_rule_when_they_are_made_change_too(tmp_path):
    """As in transformers 5.0, of which this is the outline."""
    for folder in ("", "models", "models/some"):
        (tmp_path / "transformers" / folder).mkdir(exist_ok=True)
        (tmp_path / "transformers" / folder / "__init__.py").touch()
    keys = "from typing import TypedDict\n\nclass TransformersKwargs(TypedDict):\n    position_ids: int\n"
    (tmp_path / "transformers" / "utils.py").write_text(keys)
    (tmp_path / "transformers/models/some/modeling_some.py").write_text(OLDER)
    python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{IN_OLDER}")
