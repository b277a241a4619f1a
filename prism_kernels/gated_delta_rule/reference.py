"""The definition: one token at a time, in at least float32, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.runtime import accumulate_dtype, without_autocast


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    every: int = 0,
    kept: dict[tuple[int, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `o` r[B,T,HV,V] and the final state r[B or S,HV,K,V]; shapes as in `api.py`.

    With `A_log`, `g` is the raw input of the gate. With `product_dtype`, operands of products are rounded to
    it: plain PyTorch in that precision. `kept` takes the state after each `every` tokens of a sequence, keys
    before values, under its place in checkpoints: see `placed`.
    """

    def rounded(x: Tensor) -> Tensor:
        return x if product_dtype is None else x.to(product_dtype).to(x.dtype)

    with without_autocast(q.device):
        o_dtype, wide, r = v.dtype, accumulate_dtype(q.dtype), v.shape[2] // k.shape[2]
        q, k, v, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (rounded(x).repeat_interleave(r, dim=2) for x in (q, k))
        if cu_seqlens is None:
            rows = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
        else:
            ends = cu_seqlens.tolist()
            rows = [(0, start, end) for start, end in zip(ends, ends[1:], strict=False)]
        if initial_state is None:
            initial_state = v.new_zeros(len(rows), v.shape[2], k.shape[3], v.shape[3])
        elif state_v_first:
            initial_state = initial_state.mT
        outputs, states = [], []
        for s, (b, start, end) in enumerate(rows):
            M, out = initial_state[s].to(wide), []
            for t in range(start, end):
                decay, strength = g[b, t], beta[b, t]
                if A_log is not None:
                    decay = -A_log.to(wide).exp() * _softplus(decay, dt_bias)
                if use_beta_sigmoid_in_kernel:
                    strength = strength.sigmoid() * (2 if allow_neg_eigval else 1)
                M = decay.exp()[:, None, None] * M
                u = strength[:, None] * (rounded(v[b, t]) - (k[b, t, :, :, None] * rounded(M)).sum(1))
                M = M + k[b, t, :, :, None] * rounded(u)[:, None]
                out.append(scale * (q[b, t, :, :, None] * rounded(M)).sum(1))
                if kept is not None and (t + 1 - start) % every == 0:
                    kept[b, start // every + (t - start) // every] = M
            outputs += out
            states.append(M)
        tail = q.shape[0] * q.shape[1] - len(outputs)
        o = F.pad(torch.stack(outputs), (0, 0, 0, 0, 0, tail)) if outputs else torch.zeros_like(v)
        final = torch.stack(states)
        return o.reshape(v.shape).to(o_dtype), final.mT.contiguous() if state_v_first else final


def placed(
    kept: dict[tuple[int, int], Tensor], B: int, T: int, final: Tensor, every: int, state_v_first: bool
) -> Tensor:
    """Checkpoints r[B,T//every,HV,K,V] from what the loop above kept; 0 where packed rows are unused."""
    like = final.mT if state_v_first else final
    unused = torch.zeros_like(like[0])
    rows = [kept.get((b, j), unused)[None] for b in range(B) for j in range(T // every)]
    # Without a row too, the result asks for a gradient where the inputs did.
    states = torch.cat([like[:0], *rows]).unflatten(0, (B, T // every))
    return (states.mT if state_v_first else states).contiguous()


def _softplus(x: Tensor, bias: Tensor | None) -> Tensor:
    """log(exp(0) + exp(x + bias))."""
    x = x if bias is None else x + bias.to(x.dtype)
    return torch.logaddexp(x, torch.zeros_like(x))


def gated_delta_rule_step_reference(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm_in_kernel: bool = False,
    product_dtype: torch.dtype | None = None,
    *,
    state_indices: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of a batch from the state that it names: `o`, all states, and the states after each token."""
    B, T = v.shape[:2]
    outputs, new, snapshots = [], list(state.unbind(0)), []
    for b, s in enumerate(range(B) if state_indices is None else state_indices.tolist()):
        if s < 0:
            outputs.append(torch.zeros_like(v[b]))
            snapshots.append(state.new_zeros(T, *state.shape[1:]))
            continue
        M, out, seen = state[s : s + 1], [], []
        for t in range(T):
            q_t, k_t, v_t, g_t, beta_t = (x[b : b + 1, t : t + 1] for x in (q, k, v, g, beta))
            o, M = gated_delta_rule_reference(
                q_t,
                k_t,
                v_t,
                g_t,
                beta_t,
                scale,
                M,
                use_qk_l2norm_in_kernel,
                product_dtype=product_dtype,
                A_log=A_log,
                dt_bias=dt_bias,
                use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
                allow_neg_eigval=allow_neg_eigval,
                state_v_first=state_v_first,
            )
            out.append(o[0, 0])
            seen.append(M[0].to(state.dtype))
        outputs.append(torch.stack(out))
        snapshots.append(torch.stack(seen))
        new[s] = seen[-1]
    return torch.stack(outputs), torch.stack(new), torch.stack(snapshots)
