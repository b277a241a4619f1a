"""The layers alone: a token at a time, in pieces, padded, and at their start."""

import pytest
import torch
from torch import nn

from prism_models.layers import GatedDelta, RMSNorm, S4DComplex, ShortCausalConv1d, SwiGLU, linear
from prism_models.layers.linear import Linear
from prism_models.signal import ModalityConfig, PRISMConfig, PRISMForClassification

B, T, D, H = 3, 21, 16, 4

STATEFUL = {
    "S4DComplex": lambda: S4DComplex(D, H, state_dim=4),
    "S4DComplex with C per channel": lambda: S4DComplex(D, H, state_dim=4, c_per_channel=True),
    "S4DComplex without its state path": lambda: S4DComplex(D, H, state_dim=4, state_path=False),
    "GatedDelta": lambda: GatedDelta(D, H, chunk_size=16),
    "GatedDelta with output norm": lambda: GatedDelta(D, H, chunk_size=16, output_norm=True),
    "GatedDelta without its state path": lambda: GatedDelta(D, H, state_path=False),
    "ShortCausalConv1d": lambda: ShortCausalConv1d(D),
    "ShortCausalConv1d of width 2 with SiLU": lambda: ShortCausalConv1d(D, 2, "silu"),
}


@pytest.fixture(params=STATEFUL.values(), ids=STATEFUL.keys())
def layer(request):
    torch.manual_seed(1)
    return request.param()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_steps_give_the_forward_pass(layer):
    x = torch.randn(B, T, D)
    y, final = layer(x)
    state, steps = layer.init_state(B), []
    for t in range(T):
        y_t, state = layer.step(x[:, t], state)
        steps.append(y_t)
    close(torch.stack(steps, 1), y)
    close(state, final)


@pytest.mark.parametrize("cut", [1, 2, 16, T - 1])
def test_two_pieces_give_the_whole(layer, cut):
    x = torch.randn(B, T, D)
    y, final = layer(x)
    first, state = layer(x[:, :cut])
    second, state = layer(x[:, cut:], state)
    close(torch.cat([first, second], 1), y)
    close(state, final)


def test_state_stops_at_the_last_valid_token(layer):
    x = torch.randn(B, T, D)
    lengths = torch.tensor([T, 1, 9])
    start = torch.randn_like(layer.init_state(B))
    y, final = layer(x, start, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        own, state = layer(x[row : row + 1, :length], start[row : row + 1])
        close(y[row, :length], own[0])
        close(final[row], state[0])


def test_state_of_a_row_without_tokens_does_not_move(layer):
    start = torch.randn_like(layer.init_state(2))
    _, final = layer(torch.randn(2, 5, D), start, lengths=torch.tensor([0, 5]))
    assert torch.equal(final[0], start[0])


def test_inputs_and_state_are_not_written_to(layer):
    x, state = torch.randn(B, T, D), torch.randn_like(layer.init_state(B))
    before = x.clone(), state.clone()
    layer(x, state)
    layer.step(x[:, 0], state)
    assert torch.equal(x, before[0]) and torch.equal(state, before[1])


def test_gradients_reach_input_state_and_parameters():
    for make in (STATEFUL["S4DComplex with C per channel"], STATEFUL["GatedDelta with output norm"]):
        layer = make()
        nn.init.normal_(layer.in_proj.weight, std=0.3)
        x = torch.randn(B, T, D, requires_grad=True)
        state = torch.randn_like(layer.init_state(B)).requires_grad_()
        y, final = layer(x, state)
        (y.square().sum() + final.square().sum()).backward()
        for name, tensor in {"x": x, "state": state, **dict(layer.named_parameters())}.items():
            assert tensor.grad is not None and tensor.grad.isfinite().all(), name
            assert tensor.grad.abs().max() > 0, name


def test_parameters_are_real(layer):
    assert not any(p.is_complex() for p in layer.parameters())


def test_s4d_starts_as_s4d_lin_with_its_step_sizes_spread():
    layer = S4DComplex(256, 8, 32)
    close(layer.A[..., 0], torch.full((8, 32), -0.5))
    close(layer.A[..., 1], torch.pi * torch.arange(32.0).expand(8, 32))
    dt = nn.functional.softplus(layer.dt_bias)
    assert (dt > 0.001).all() and (dt < 0.1).all()
    slots = (torch.log(dt / 0.001) / torch.log(torch.tensor(100.0)) * 8).floor()
    assert torch.equal(slots, torch.arange(8.0))


@pytest.mark.parametrize("c_per_channel", [False, True])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_s4d_state_path_and_skip_start_at_one_scale(tokens, c_per_channel):
    """For unit-normal u: the ratio of RMS lies in [0.1, 10] in every head, not on average alone."""
    from prism_kernels import selective_scan

    layer = S4DComplex(256, 8, 32, c_per_channel=c_per_channel)
    u = torch.randn(2, tokens, 8, 32)
    dt = torch.zeros(2, tokens, 8)
    with torch.no_grad():
        y, _ = selective_scan(u, dt, layer.A, layer.B, layer.C, dt_bias=layer.dt_bias, dt_softplus=True)
        skip = layer.D * u
    ratio = y.square().mean((0, 1, 3)).sqrt() / skip.square().mean((0, 1, 3)).sqrt()
    assert (ratio >= 0.1).all() and (ratio <= 10).all(), ratio


@pytest.mark.parametrize(("modality", "shape"), [("image", (2, 64, 48)), ("ecg", (2, 1000, 12))])
def test_every_parameter_of_the_default_model_has_a_gradient_to_learn_from(modality, shape):
    config = PRISMConfig(modalities=[ModalityConfig("image", 48, 10), ModalityConfig("ecg", 12, 5)])
    model = PRISMForClassification(config)
    model(torch.randn(shape), modality, labels=torch.tensor([1, 3])).loss.backward()
    other = "ecg" if modality == "image" else "image"
    for name, parameter in model.named_parameters():
        if f".{other}." not in name:
            rms = parameter.grad.square().mean().sqrt().item()
            assert rms >= 1e-6, f"{name}: {rms:.1e}"


def test_gated_delta_forgets_at_once_without_overflow():
    layer = GatedDelta(D, H, gate_bias_init=-30.0)
    x = torch.randn(2, 130, D, requires_grad=True)
    y, state = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and state.isfinite().all() and x.grad.isfinite().all()


def test_norm_and_mlp_match_their_formulas():
    x = torch.randn(B, T, D)
    norm = RMSNorm(D)
    nn.init.normal_(norm.weight)
    close(norm(x), x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight)
    mlp = SwiGLU(D, expand=3)
    gate, up = mlp.in_proj.weight.chunk(2)
    close(mlp(x), (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.out_proj.weight.T)


def test_layers_run_in_bfloat16_with_float32_states(layer):
    layer.bfloat16()
    y, state = layer(torch.randn(2, 5, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    wanted = torch.bfloat16 if isinstance(layer, ShortCausalConv1d) else torch.float32
    assert state.dtype == layer.init_state(2).dtype == wanted


def test_layers_train_inside_a_plain_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.out = S4DComplex(8, 2, 4), nn.Linear(8, 1)

        def forward(self, x):
            return self.out(self.mixer(x)[0])

    net, x = Net(), torch.randn(4, 12, 8)
    target = x.cumsum(1)[..., :1]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4DComplex(10, 4), r"S4DComplex: expected `dim` divisible by `num_heads`, got 10 and 4"),
        (lambda: GatedDelta(10, 4), r"GatedDelta: expected `dim` divisible by `num_heads`, got 10 and 4"),
        (lambda: ShortCausalConv1d(8, 5), r"`kernel_size` to be one of 2, 3, 4, got 5"),
        (
            lambda: S4DComplex(8, 2)(torch.randn(2, 5, 9)),
            r"`x` \[B, T, D\] with D = 8, got shape \(2, 5, 9\)",
        ),
        (lambda: GatedDelta(8, 2)(torch.randn(2, 0, 8)), r"at least one time step in `x`, got T = 0"),
        (lambda: GatedDelta(8, 2).step(torch.randn(2, 1, 8), None), r"`x_t` \[B, D\] with D = 8"),
        (
            lambda: S4DComplex(8, 2)(torch.randn(2, 5, 8), lengths=torch.tensor([5])),
            r"`lengths` \[B\] of shape \(2,\), got \(1,\)",
        ),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_linear_by_onednn_gives_what_linear_gives(monkeypatch):
    """Large products on a CPU take another way; values and gradients stay within float32 rounding."""
    layer, x, dy = Linear(24, 40), torch.randn(5, 30, 24, requires_grad=True), torch.randn(5, 30, 40)
    results = []
    for rows in (150, 151):
        monkeypatch.setattr(linear, "ROWS", rows)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight), dy)))
    for fast, plain in zip(*results, strict=True):
        close(fast, plain)
    monkeypatch.setattr(linear, "ROWS", 1)
    with torch.no_grad():
        close(layer(x), results[0][0].detach())
    layer.weight.requires_grad_(False)
    close(torch.autograd.grad(layer(x), x, dy)[0], results[0][1])


def test_gradients_of_a_wide_linear_layer_can_be_differentiated_again():
    layer, x = Linear(8, 16), torch.randn(128, 8, requires_grad=True)

    def twice(forward):
        loss = forward(x).square().sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + g.square().sum(), layer.weight)[0]

    torch.testing.assert_close(twice(layer), twice(lambda x: nn.functional.linear(x, layer.weight)))
