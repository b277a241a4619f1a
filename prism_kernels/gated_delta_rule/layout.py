"""Tokens as rows of chunks, dense or packed, for the torch path.

A row is one chunk of one sequence. Rows are ordered by chunk step, then by sequence, longest first, so that
step c works on the first rows of the running state and nothing is spent on sequences that have ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each token lies. A dense batch is a view [steps, B, C, ...]; a packed one is gathered."""

    C: int
    width: int  # sequences per unit of `offsets`: B when dense, 1 when packed
    offsets: list[int]  # step c owns units offsets[c] : offsets[c + 1]
    sequences: int
    bound: int  # rows, or an upper bound of them that does not depend on the lengths
    index: Tensor | None = None  # i[rows * C], token of each slot; T in padding slots
    order: Tensor | None = None  # i[sequences], by falling length

    @staticmethod
    def of(B: int, T: int, C: int, cu_seqlens: Tensor | None) -> "Layout":
        """Lay out B sequences of T tokens, or the packed ones of `cu_seqlens`."""
        steps = -(-T // C)
        if cu_seqlens is None:
            return Layout(C, B, list(range(steps + 1)), B, B * steps)
        bounds = cu_seqlens.cpu().to(torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        counts = (lengths + C - 1) // C
        step = torch.arange(int(counts.max()))
        rank, chunk = torch.meshgrid(torch.arange(len(counts)), step, indexing="ij")
        alive = (chunk < counts[:, None]).T
        rank, chunk = rank.T[alive], chunk.T[alive]
        slot = chunk[:, None] * C + torch.arange(C)
        index = torch.where(slot < lengths[rank, None], starts[rank, None] + slot, T).flatten()
        offsets = [0, *alive.sum(1).cumsum(0).tolist()]
        device = cu_seqlens.device
        bound = T // C + len(counts)
        return Layout(C, 1, offsets, len(counts), bound, index.to(device), order.to(device))

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, H, D] as [units, width, H, 1, C, D], zero in padding slots."""
        if self.index is None:
            pad = -x.shape[1] % self.C
            x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
            x = x.unflatten(1, (-1, self.C)).transpose(0, 1)
        else:
            x = F.pad(x[0], (0, 0, 0, 0, 0, 1))[self.index].unflatten(0, (-1, 1, self.C))
        return x.transpose(2, 3).unsqueeze(3)

    def new_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for rows of a tensor like [B, T, H, D]: the storage, and its rows."""
        if self.index is None:
            B, _, H, D = like.shape
            base = like.new_empty(B, self.offsets[-1] * self.C, H, D)
            return base, base.unflatten(1, (-1, self.C)).transpose(0, 1)
        base = like.new_empty(self.offsets[-1], 1, self.C, *like.shape[2:])
        return base, base

    def tokens(self, base: Tensor, rows: Tensor, T: int) -> Tensor:
        """Undo `rows` on what `new_rows` gave: [B, T, H, D], zero beyond the last packed token."""
        if self.index is None:
            return base[:, :T].contiguous()
        out = base.new_zeros(T + 1, *base.shape[3:])
        out[self.index] = rows.flatten(0, 2)
        return out[None, :T].clone()

    def take(self, rows: Tensor, c0: int, c1: int, heads: int, dtype: torch.dtype) -> Tensor:
        """Steps c0:c1 as fresh [units * width * heads, C, D] in `dtype`."""
        n = self.matrices(c0, c1, heads)
        out = torch.empty(n.stop - n.start, self.C, rows.shape[-1], dtype=dtype, device=rows.device)
        return self.take_into(out, rows, c0, c1, heads)

    def take_into(
        self, out: Tensor, rows: Tensor, c0: int, c1: int, heads: int, factor: Tensor | float | None = None
    ) -> Tensor:
        """Copy steps c0:c1 into `out` [units * width * heads, C, D], times `factor` [.., C, 1] where there is
        one; key heads repeat for value heads.
        """
        x = rows[self.offsets[c0] : self.offsets[c1]]
        units, width, H = x.shape[:3]
        shape = (units, width, H, heads // H, self.C)
        factor = factor.view(*shape, 1) if isinstance(factor, Tensor) else factor
        into = out.view(*shape, x.shape[-1])
        _ = into.copy_(x) if factor is None else torch.mul(x, factor, out=into)
        return out

    def matrices(self, c0: int, c1: int, heads: int) -> slice:
        """Where the matrices, one per row and head, of steps c0:c1 lie."""
        per_unit = self.width * heads
        return slice(self.offsets[c0] * per_unit, self.offsets[c1] * per_unit)

    def sizes(self, c0: int, c1: int, heads: int) -> list[int]:
        """How many matrices each of the steps c0:c1 has."""
        per_unit = self.width * heads
        return [(b - a) * per_unit for a, b in pairwise(self.offsets[c0 : c1 + 1])]

    def store(
        self, rows: Tensor, c0: int, c1: int, x: Tensor, heads: int, factor: Tensor | None = None
    ) -> None:
        """Undo `take` into `rows`, summing value heads that share a key head; `factor` as there."""
        out = rows[self.offsets[c0] : self.offsets[c1]].transpose(2, 3)
        units, width, H = out.shape[:3]
        shape = (units, width, H, heads // H, self.C)
        x = x.view(*shape, x.shape[-1])
        if heads != H:
            out.copy_((x if factor is None else x * factor.view(*shape, 1)).sum(3))
        elif factor is None:
            out.copy_(x.squeeze(3))
        else:
            torch.mul(x.squeeze(3), factor.view(*shape, 1).squeeze(3), out=out)

    def steps(self, c0: int, c1: int, heads: int) -> Iterator[slice]:
        """The matrices of each step of a segment, counted from its start."""
        first = self.matrices(c0, c1, heads).start
        for c in range(c0, c1):
            m = self.matrices(c, c + 1, heads)
            yield slice(m.start - first, m.stop - first)

    def first_states(self, state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A fresh running state [sequences * heads, K, V] from [sequences, heads, K, V] or zeros."""
        if state is None:
            return like.new_zeros(self.sequences * shape[0], *shape[1:])
        state = state.clone() if self.order is None else state[self.order]
        return state.reshape(-1, *shape[1:]).contiguous()

    def final_states(self, state: Tensor, heads: int) -> Tensor:
        """Undo `first_states`."""
        state = state.unflatten(0, (-1, heads))
        return state if self.order is None else state[self.order.argsort()]

    def checkpoints(self, T: int, every: int, cu_seqlens: Tensor | None) -> dict[int, Tensor]:
        """Steps at whose end the first sequences of the running state have a checkpoint, and the rows of
        these. A sequence of a batch has T // every; a packed one that starts at token t has its own from row
        t // every on.
        """
        if every == 0:
            return {}
        if cu_seqlens is None or self.order is None:
            counts = torch.full((self.sequences,), T // every)
            first = counts.cumsum(0) - counts
        else:
            bounds, order = cu_seqlens.cpu().to(torch.int64), self.order.cpu()
            first, counts = bounds[:-1][order] // every, bounds.diff()[order] // every
        rows = (first[: int((counts > j).sum())] + j for j in range(int(counts.max())))
        return {(j + 1) * every // self.C - 1: r for j, r in enumerate(rows)}
