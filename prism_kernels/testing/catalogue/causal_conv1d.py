"""Cases of the short causal convolution."""

import torch
from torch import Tensor

from ... import causal_conv1d
from ...causal_conv1d.op import causal_conv1d_bwd, causal_conv1d_fwd
from ...causal_conv1d.reference import causal_conv1d_reference
from ..inputs import Draw
from ..spec import Case, ErrorCase, OpSpec, Outputs


def run(case: Case, impl: str | None) -> Outputs:
    y, final = causal_conv1d(**case.tensors, **case.options, output_final_state=True, impl=impl)
    return {"y": y, "final_state": final}


def reference(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    y, final = causal_conv1d_reference(**case.tensors, **case.options, product_dtype=product_dtype)
    return {"y": y, "final_state": final}


def step(case: Case, state: Tensor | None) -> tuple[Outputs, Tensor]:
    tensors = {n: t for n, t in case.tensors.items() if n != "initial_state"}
    y, state = causal_conv1d(**tensors, **case.options, initial_state=state, output_final_state=True)
    return {"y": y}, state


def cases(dtype: torch.dtype) -> list[Case]:
    draw = Draw(0, dtype)

    def make(name: str, B: int, T: int, D: int, W: int, state: bool = False, **options) -> Case:
        tensors = {"x": draw.normal(B, T, D), "weight": draw.wide_normal(D, W), "bias": draw.wide_normal(D)}
        if state:
            tensors["initial_state"] = draw.normal(B, D, W - 1)
        return Case(name, tensors, options)

    silu = {"activation": "silu"}

    def packed(name: str, bounds: list[int], T: int, D: int, W: int, dtype=torch.int32, **options) -> Case:
        case, state = make(name, 1, T, D, W, **options), draw.normal(len(bounds) - 1, D, W - 1)
        return case.with_tensors(initial_state=state, cu_seqlens=torch.tensor(bounds, dtype=dtype))

    whole = make("batch with state", 2, 13, 20, 4, state=True, **silu)
    zero = {n: 0 * t for n, t in whole.tensors.items()}
    return [
        whole,
        make("one token, shorter than the filter", 1, 1, 5, 4, state=True, **silu),
        make("two taps, no activation", 2, 6, 4, 2),
        make("three taps, prime length across a block edge", 1, 67, 3, 3, state=True),
        packed("packed sequences, one empty", [0, 2, 2, 9, 14], 14, 6, 4, dtype=torch.int64, **silu),
        packed("empty sequences at both ends, others short, padding", [0, 0, 1, 3, 3, 4, 8, 8], 11, 5, 4),
        packed("one packed sequence across block edges", [0, 66], 70, 16, 3, **silu),
        packed("packed sequences, all empty", [0, 0, 0], 3, 4, 2, **silu),
        Case("zeros", zero, silu, hostile=True),
        Case(
            "saturating inputs", {**whole.tensors, "x": draw.normal(2, 13, 20, scale=30)}, silu, hostile=True
        ),
    ]


def random_case(draw: Draw) -> Case:
    T, D, W = draw.size("T", 1, 40), draw.size("D", 1, 20), draw.size("W", 2, 4)
    sequences = draw.size("sequences", 1, 4) if draw.flag("packed") else 0
    B = 1 if sequences else draw.size("B", 1, 3)
    tensors = {"x": draw.normal(B, T, D), "weight": draw.wide_normal(D, W)}
    if draw.flag("bias"):
        tensors["bias"] = draw.wide_normal(D)
    if draw.flag("state"):
        tensors["initial_state"] = draw.normal(sequences or B, D, W - 1)
    if sequences:
        tensors["cu_seqlens"] = draw.bounds(sequences, T)
    return Case("drawn", tensors, {"activation": draw.pick("activation", (None, "silu"))})


def document_cases(dtype: torch.dtype) -> list[Case]:
    draw = Draw(1, dtype)

    def make(name: str, ids: list[list[int]], D: int, W: int, **options) -> Case:
        seq_idx = torch.tensor(ids, dtype=torch.int32)
        x = draw.normal(*seq_idx.shape, D)
        tensors = {"x": x, "weight": draw.wide_normal(D, W), "bias": draw.wide_normal(D), "seq_idx": seq_idx}
        return Case(name, tensors, options)

    silu = {"activation": "silu"}
    rows = [[0] * 5 + [1] * 7, [7, 2, 2, 3] + [4] * 8]
    return [
        make("documents in two rows", rows, 6, 4, **silu),
        make("padding between and after documents", [[0, 0, -1, 0, 1, 1, -1, -1]], 5, 3),
        make("documents that take turns", [[0, 1, 0, 1, 1, 0, 0, 1]], 4, 4, **silu),
        make("one document across a block edge", [[3] * 35], 16, 2, **silu),
    ]


def random_documents(draw: Draw) -> Case:
    B, T, D, W = draw.size("B", 1, 3), draw.size("T", 1, 40), draw.size("D", 1, 20), draw.size("W", 2, 4)
    documents, run = draw.size("documents", 1, 4), draw.size("run", 1, 12)
    # Runs of one document each, which may come back; -1 is padding, and may stand anywhere.
    names = torch.randint(-1, documents, (B, T), generator=draw.generator, dtype=torch.int32)
    seq_idx = names[:, torch.arange(T) // run]
    tensors = {"x": draw.normal(B, T, D), "weight": draw.wide_normal(D, W), "seq_idx": seq_idx}
    if draw.flag("bias"):
        tensors["bias"] = draw.wide_normal(D)
    return Case("drawn", tensors, {"activation": draw.pick("activation", (None, "silu"))})


def run_documents(case: Case, impl: str | None) -> Outputs:
    return {"y": causal_conv1d(**case.tensors, **case.options, impl=impl).y}


def reference_documents(case: Case, product_dtype: torch.dtype | None) -> Outputs:
    y, _ = causal_conv1d_reference(**case.tensors, **case.options, product_dtype=product_dtype)
    return {"y": y}


def hand_documents() -> tuple[Case, Outputs]:
    case, outputs = hand()
    tensors = {n: t for n, t in case.tensors.items() if n != "initial_state"}
    y = torch.tensor([[[100 * 1 + 0.5], [100 * 2 + 0.5]]], dtype=torch.float64)
    return Case("two documents", {**tensors, "seq_idx": torch.tensor([[0, 1]])}), {"y": y}


def hand() -> tuple[Case, Outputs]:
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    weight, bias = torch.tensor([[10.0, 100.0]]).double(), torch.tensor([0.5]).double()
    state = torch.tensor([[[3.0]]], dtype=torch.float64)
    y = torch.tensor([[[10 * 3 + 100 * 1 + 0.5], [10 * 1 + 100 * 2 + 0.5]]], dtype=torch.float64)
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_state": state}
    return Case("two taps", tensors), {"y": y, "final_state": torch.tensor([[[2.0]]], dtype=torch.float64)}


def errors() -> list[ErrorCase]:
    x, w, s = torch.randn(2, 6, 4), torch.randn(4, 3), torch.randn(2, 4, 2)
    row, cu, ids = x[:1], torch.tensor([0, 2, 6]), torch.zeros(2, 6, dtype=torch.int32)

    def case(name: str, error: type[Exception], pattern: str, *args, **options) -> ErrorCase:
        return ErrorCase(
            name, lambda: causal_conv1d(*args, **options), error, f"causal_conv1d: expected .*{pattern}"
        )

    return [
        case("rank", ValueError, r"`x` of rank 3, \[B, T, D\], got shape \(6, 4\)", x[0], w),
        case("channels before time", ValueError, r"`x` \[B, T, D\] of shape", x.transpose(1, 2), w),
        case("wide filter", ValueError, "`weight`.*W from 2 to 4, got W = 5", x, torch.randn(4, 5)),
        case(
            "bias of other width",
            ValueError,
            r"`bias` \[D\] of shape \(4,\), got \(3,\)",
            x,
            w,
            torch.ones(3),
        ),
        case("no token", ValueError, "at least one time step", x[:, :0], w),
        case("integers", TypeError, "`x` of dtype", x.int(), w),
        case("device", ValueError, "`weight` on cpu.*got meta", x, w.to("meta")),
        case("activation", ValueError, "`activation` to be one of", x, w, activation="relu"),
        case(
            "state", ValueError, r"`initial_state`.*\(2, 4, 2\), got \(1, 4, 2\)", x, w, initial_state=s[:1]
        ),
        case("boundaries of floats", TypeError, "`cu_seqlens` of dtype int32", row, w, cu_seqlens=cu.float()),
        case(
            "boundaries that fall",
            ValueError,
            "never decreases",
            row,
            w,
            cu_seqlens=torch.tensor([0, 4, 2, 6]),
        ),
        case("boundaries past the end", ValueError, "at most T = 6", row, w, cu_seqlens=torch.tensor([0, 9])),
        case("boundaries not from 0", ValueError, "from 0", row, w, cu_seqlens=torch.tensor([1, 6])),
        case("packed batch", ValueError, "batch size 1", x, w, cu_seqlens=cu),
        case("document indices of floats", TypeError, "`seq_idx` of dtype int32", x, w, seq_idx=x[..., 0]),
        case("a document too many", ValueError, r"`seq_idx` \[B, T\] of shape", x, w, seq_idx=ids[:, 1:]),
        case("documents with a state", ValueError, "alone, got `init", x, w, seq_idx=ids, initial_state=s),
    ]


def opcheck(case: Case, impl: str) -> list[tuple]:
    names = ("x", "weight", "bias", "initial_state", "cu_seqlens", "seq_idx")
    args = [case.tensors.get(n) for n in names]
    detached = [None if t is None else t.detach() for t in args]
    tail = (case.options.get("activation") or "none", impl)
    y, final = causal_conv1d_fwd(*detached, *tail)
    backward = (torch.ones_like(y), torch.ones_like(final), *detached, *tail)
    return [(causal_conv1d_fwd, (*args, *tail)), (causal_conv1d_bwd, backward)]


SPECS = [
    OpSpec(
        name="causal_conv1d",
        run=run,
        reference=reference,
        cases=cases,
        hand=hand,
        errors=errors,
        opcheck=opcheck,
        random_case=random_case,
        time_inputs=("x",),
        state=("initial_state", "final_state"),
        step=step,
        packed=True,
    ),
    OpSpec(
        name="causal_conv1d (documents)",
        run=run_documents,
        reference=reference_documents,
        cases=document_cases,
        hand=hand_documents,
        errors=list,
        opcheck=opcheck,
        random_case=random_documents,
        time_inputs=("x", "seq_idx"),
    ),
]
