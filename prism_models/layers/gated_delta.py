"""The gated delta rule mixer: a matrix-valued associative memory."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prism_kernels import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, rms_norm

from ._checks import check_heads, check_input, check_lengths, check_token
from ._numerics import valid_tokens, wide
from .linear import Linear


class GatedDelta(nn.Module):
    """Each head keeps a matrix M [K,V] of associations that fades, is corrected, and is asked.

        q, k, v = W_q x, W_k x, W_v x        (q and k of length 1 under qk_norm; K = V = D / H)
        alpha = sigmoid(W_a x + b_a),  beta = sigmoid(W_b x + b_b)
        M_t  = alpha (M_{t-1} - beta k (k^T M_{t-1})) + beta k v^T
        out  = W_out(q^T M_t * silu(W_g x))

    The logarithm of alpha goes to the op as logsigmoid: nothing is divided by a decay and no small
    number is added, so forgetting can be as fast as it likes. The query is not scaled. Gates and
    states are float32.

    Args:
        dim: Width D.
        num_heads: Heads H.
        qk_norm: Whether queries and keys are scaled to length 1.
        gate_bias_init: b_a at the start; 4 keeps 98 % of the memory per token.
        chunk_size: Tokens that the chunked form handles at once. Changes speed, not results.
        output_norm: Whether a root-mean-square norm precedes the output gate.
        state_path: False zeroes what comes from the memory, which is all of the output: a control
            for experiments. The state then never moves.

    Example:
        >>> y, state = GatedDelta(32, num_heads=4)(torch.randn(2, 10, 32))
        >>> y.shape, state.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 4, 8, 8]))

    Source: Gated DeltaNet (Yang et al. 2024, section 3.1), with an undecayed write.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qk_norm: bool = True,
        gate_bias_init: float = 4.0,
        chunk_size: int = 64,
        output_norm: bool = False,
        state_path: bool = True,
    ) -> None:
        super().__init__()
        check_heads("GatedDelta", dim, num_heads)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.qk_norm, self.chunk_size, self.state_path = qk_norm, chunk_size, state_path
        # One product for W_q, W_k, W_v, W_g (D rows each), W_a and W_b (H each).
        self.in_proj = Linear(dim, 4 * dim + 2 * num_heads)
        self.out_proj = Linear(dim, dim)
        self.alpha_bias = nn.Parameter(torch.full((num_heads,), float(gate_bias_init)))
        self.beta_bias = nn.Parameter(torch.zeros(num_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim)) if output_norm else None

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix x r[B,T,D] over time and return y r[B,T,D] and the state after the last valid token.

        Args:
            x: r[B,T,D].
            state: r[B,H,K,V] to continue from; None for the start of a sequence.
            lengths: i[B], valid tokens of each right-padded row; None if all are valid.
        """
        check_input("GatedDelta", x, self.dim)
        check_lengths("GatedDelta", lengths, x.shape[0])
        if not self.state_path:
            return torch.zeros_like(x), self.init_state(x.shape[0]) if state is None else state
        q, k, v, gate, g, beta = self._project(x)
        if lengths is not None:
            # g = 0 and beta = 0 are the identity on the state, exactly.
            padding = ~valid_tokens(lengths, x.shape[1])[..., None]
            g, beta = g.masked_fill(padding, 0.0), beta.masked_fill(padding, 0.0)
        o, final = chunk_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.qk_norm,
            chunk_size=self.chunk_size,
        )
        return self._read_out(o, gate), cast(Tensor, final)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token x_t r[B,D]: return y_t r[B,D] and the new state."""
        check_token("GatedDelta", x_t, self.dim)
        if not self.state_path:
            return torch.zeros_like(x_t), state
        q, k, v, gate, g, beta = self._project(x_t[:, None])
        o, final = fused_recurrent_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta=beta,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.qk_norm,
        )
        return self._read_out(o, gate)[:, 0], cast(Tensor, final)

    def init_state(self, batch_size: int) -> Tensor:
        """Zeros r[B,H,K,V] in float32."""
        return wide(self.beta_bias.new_zeros(batch_size, self.num_heads, self.head_dim, self.head_dim))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, gate r[B,T,H,K]; log decay g and write strength beta r[B,T,H] in float32."""
        heads, gates = self.in_proj(x).split([4 * self.dim, 2 * self.num_heads], dim=-1)
        q, k, v, gate = heads.unflatten(-1, (4, self.num_heads, self.head_dim)).unbind(-3)
        a, b = wide(gates).chunk(2, dim=-1)
        g = F.logsigmoid(a + wide(self.alpha_bias))
        return q, k, v, gate, g, torch.sigmoid(b + wide(self.beta_bias))

    def _read_out(self, o: Tensor, gate: Tensor) -> Tensor:
        """Normalise if asked, gate, and mix the heads."""
        if self.norm_weight is None:
            return self.out_proj((o * F.silu(gate)).flatten(-2))
        return self.out_proj(rms_norm(o, self.norm_weight, gate=gate).y.flatten(-2))
