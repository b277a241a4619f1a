"""Fast pure-PyTorch path: a sum of W shifted products over the whole sequence, and its adjoint.

`history(d)` is x delayed by d tokens inside each sequence, with the initial state before its start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.runtime import accumulate_dtype


@dataclass(frozen=True)
class Packing:
    """Where each packed token stands: sequence i[T], position inside it i[T], tokens that count."""

    sequence: Tensor
    position: Tensor
    lengths: Tensor
    starts: Tensor
    valid: int

    @staticmethod
    def of(cu_seqlens: Tensor) -> "Packing":
        """Read the boundaries; one host read."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        token = torch.arange(sequence.shape[0], device=lengths.device)
        return Packing(sequence, token - starts[sequence], lengths, starts, sequence.shape[0])


class History:
    """Delayed inputs and their adjoint, for dense rows, packed sequences, or documents seq_idx i[B,T]."""

    def __init__(
        self, x: Tensor, state: Tensor | None, W: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None
    ):
        wide = accumulate_dtype(x.dtype)
        self.documents = seq_idx
        self.packing = None if cu_seqlens is None else Packing.of(cu_seqlens)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        valid = x.shape[1] if self.packing is None else self.packing.valid
        self.W, self.valid = W, valid
        self.x = self.inside(x[:, :valid].to(wide))
        self.state = x.new_zeros(rows, W - 1, x.shape[2], dtype=wide)  # [rows, W-1, D]: time before channels
        if state is not None:
            self.state = state.transpose(1, 2).to(wide)
        if cu_seqlens is None:
            self.row = torch.cat([self.state, self.x], dim=1)  # r[B,W-1+T,D]

    def inside(self, y: Tensor) -> Tensor:
        """y r[B,valid,D] with zeros where a token belongs to no document."""
        return y if self.documents is None else y.masked_fill((self.documents < 0)[..., None], 0.0)

    def delayed(self, d: int) -> Tensor:
        """x_{t-d}, r[B,valid,D]."""
        if d == 0:
            return self.x
        if self.packing is None:
            return self._same_document(self.row[:, self.W - 1 - d : self.W - 1 - d + self.valid], d)
        past = F.pad(self.x, (0, 0, d, 0))[:, : self.valid]
        rows, sequence, slot = self._before_start(self.packing, d)
        past[0, rows] = self.state[sequence, slot]
        return past

    def add_adjoint(self, dx: Tensor, dstate: Tensor, dz: Tensor, tap: Tensor, d: int) -> None:
        """Add the gradient of `delayed(d)`, tap r[D] times dz, to dx r[B,valid,D] and dstate [rows,W-1,D]."""
        if self.packing is None:
            n, dz = min(d, self.valid), self._same_document(dz, d)
            dx[:, : self.valid - n].addcmul_(dz[:, n:], tap)
            dstate[:, self.W - 1 - d : self.W - 1 - d + n].addcmul_(dz[:, :n], tap)
            return
        rows, sequence, slot = self._before_start(self.packing, d)
        before = dstate[sequence, slot]  # each (sequence, slot) occurs once
        dstate[sequence, slot] = before.addcmul(dz[0, rows], tap)
        n = min(d, self.valid)
        dx[:, : self.valid - n].addcmul_(dz.index_fill(1, rows, 0.0)[:, n:], tap)

    def final_state(self) -> Tensor:
        """The last W-1 inputs of each sequence, r[rows,W-1,D]."""
        if self.packing is None:
            return self.row[:, self.valid :].clone()
        token, slot, is_new = self._last(self.packing)
        if self.valid == 0:
            return self.state.clone()
        rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
        return torch.where(is_new[..., None], self.x[0][token], self.state[rows, slot])

    def add_final_adjoint(self, dx: Tensor, dstate: Tensor, grad: Tensor) -> None:
        """Add the gradient of `final_state()`, r[rows,W-1,D]."""
        if self.packing is None:
            n = min(self.W - 1, self.valid)
            dx[:, self.valid - n :] += grad[:, self.W - 1 - n :]
            dstate[:, n:] += grad[:, : self.W - 1 - n]
            return
        token, slot, is_new = self._last(self.packing)
        dx[0, token[is_new]] += grad[is_new]
        rows = torch.arange(slot.shape[0], device=slot.device)[:, None].expand_as(slot)
        dstate[rows[~is_new], slot[~is_new]] += grad[~is_new]

    def _same_document(self, y: Tensor, d: int) -> Tensor:
        """y with zeros where the token d before belongs to another document."""
        if self.documents is None:
            return y
        before = F.pad(self.documents, (d, 0), value=-1)[:, : self.valid]
        return y.masked_fill((before != self.documents)[..., None], 0.0)

    def _before_start(self, packing: Packing, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Packed tokens less than d after their start, and the state entry each of them sees."""
        rows = (packing.position < d).nonzero().squeeze(1)
        slot = self.W - 1 - d + packing.position[rows]
        return rows, packing.sequence[rows], slot

    def _last(self, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """For each final-state entry [S,W-1]: its token, or its slot in the initial state; which of both."""
        lengths, starts = packing.lengths[:, None], packing.starts[:, None]
        entry = torch.arange(self.W - 1, device=lengths.device)[None]
        position = lengths - (self.W - 1) + entry
        token = (starts + position).clamp(min=0, max=max(self.valid - 1, 0))
        return token, (entry + lengths).clamp(max=self.W - 2), position >= 0


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return y like x and the final state r[rows,D,W-1]; tokens outside any sequence give 0."""
    history = History(x, state, weight.shape[1], cu_seqlens, seq_idx)
    z = _preactivation(history, weight, bias)
    y = history.inside(F.silu(z) if activation == "silu" else z).to(x.dtype)
    return _pad(y, x.shape[1]), history.final_state().transpose(1, 2).to(x.dtype).contiguous()


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and initial state, each in accumulation precision."""
    history = History(x, state, weight.shape[1], cu_seqlens, seq_idx)
    W, wide = history.W, history.x.dtype
    dz = history.inside(dy[:, : history.valid].to(wide))
    if activation == "silu":
        z = _preactivation(history, weight, bias)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    taps, dtaps = taps_of(weight, wide), []
    dx, dstate = dz * taps[0], torch.zeros_like(history.state)
    for d in range(W):
        dtaps.append((dz * history.delayed(d)).sum((0, 1)))
        if d:
            history.add_adjoint(dx, dstate, dz, taps[d], d)
    history.add_final_adjoint(dx, dstate, dfinal.transpose(1, 2).to(wide))
    dweight = torch.stack(dtaps[::-1], 1)
    return _pad(dx, x.shape[1]), dweight, dz.sum((0, 1)), dstate.transpose(1, 2).contiguous()


def update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    cache_seqlens: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """Return y like x r[B,D,T]; x enters conv_state r[rows,D,L] in place. Rows below 0 are left out."""
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    kept = torch.arange(x.shape[0], device=x.device) if rows is None else (rows >= 0).nonzero().squeeze(1)
    rows = kept if rows is None else rows[kept].long()
    x, state, (T, L, W) = x[kept], conv_state[rows], (x.shape[2], conv_state.shape[2], weight.shape[1])
    if cache_seqlens is None:
        order = torch.arange(L, device=x.device).expand(len(rows), L)
    else:  # oldest entry first
        order = (cache_seqlens[kept].long()[:, None] + torch.arange(L, device=x.device)) % L
    order = order[:, None].expand_as(state)
    state = state.gather(2, order)
    y[kept] = forward(x.mT, weight, bias, state[..., L - (W - 1) :], None, None, activation)[0].mT
    if cache_seqlens is None:
        conv_state[rows] = torch.cat([state, x], 2)[..., T:]
    else:
        state[..., : min(T, L)] = x[..., -L:]
        order = (order + max(T - L, 0)) % L
        conv_state[rows] = torch.empty_like(state).scatter_(2, order, state)
    return y


def _pad(y: Tensor, T: int) -> Tensor:
    """`y` contiguous, with zeros after the last packed token."""
    return y.contiguous() if y.shape[1] == T else F.pad(y, (0, 0, 0, T - y.shape[1]))


def _preactivation(history: History, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps = taps_of(weight, history.x.dtype)
    z = history.x * taps[0] if bias is None else torch.addcmul(bias.to(taps.dtype), history.x, taps[0])
    for d in range(1, history.W):
        z.addcmul_(history.delayed(d), taps[d])
    return z


def taps_of(weight: Tensor, wide: torch.dtype) -> Tensor:
    """The weight of each delay d as one row, r[W,D]."""
    return weight.to(wide).flip(1).T.contiguous()
