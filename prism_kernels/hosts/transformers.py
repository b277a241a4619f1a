"""Make the models of Hugging Face transformers call our gated delta rule and our selective scan."""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import gated_delta_rule
from .._core.checks import check_choice, fail
from .._core.impl import PATHS
from ..selective_scan import mamba, mamba2
from .patching import Counter, Replacement, Shadow, Use

_CHUNK, _RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
_COUNTER = Counter(_CHUNK, _RECURRENT)

_SCAN, _UPDATE, _HEADS = "selective_scan_fn", "selective_state_update", "mamba_chunk_scan_combined"
_HOMES = {_SCAN: mamba, _UPDATE: mamba, _HEADS: mamba2}
_SCAN_COUNTER = Counter(*_HOMES)
_SCANS = {  # by transformers' names: ours, or None for a fused layer, which then gives way to its parts
    "mamba_selective_scan": _SCAN,
    "mamba_selective_state_update": _UPDATE,
    "mamba_inner_fn": None,
    "mamba2_chunk_scan": _HEADS,
    "mamba2_selective_state_update": _UPDATE,
    "mamba2_split_conv1d_scan_combined": None,
}


def use_gated_delta_rule(*, impl: str | None = None) -> Use:
    """Make every transformers model with a gated delta rule use ours, until undone.

    Concerns Qwen3-Next, Qwen3.5, OLMo Hybrid and whatever else the installed transformers builds on the same
    two functions: models made before and after the call alike, on CPU and GPU, in training and generation.
    The weights and the cache stay as they are, so the switch may be thrown in mid-generation.

    Numerics are those of our functions; in float32 the logits agree with transformers' own to rounding.
    Holds for the whole process, all threads. Uses may be nested and undone in any order; the latest made
    holds. Calls inside a compiled graph run our op too but are not counted.

    Args:
        impl: 'triton', 'torch' or 'reference' for every call. None: by the device of the inputs.

    Returns:
        A handle: `undo()` ends the use, once or several times; so does the end of a `with` block. `calls`
        says how often each of our two functions ran meanwhile.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: The installed transformers has no model with a gated delta rule.
        ValueError: An unknown `impl`. Inside the models, packed sequences without both `cu_seq_lens_q` and
            `seq_idx`.
        TypeError: Inside the models, an argument that the gated delta rule does not know.

    Example:
        >>> from transformers import Qwen3NextForCausalLM
        >>> model = Qwen3NextForCausalLM.from_pretrained(path)
        >>> with use_gated_delta_rule() as use:
        ...     tokens = model.generate(prompt, max_new_tokens=20)
        >>> use.calls
        {'chunk_gated_delta_rule': 36, 'fused_recurrent_gated_delta_rule': 684}

    Source: the layers follow Yang, Kautz, Hatamizadeh, "Gated Delta Networks", ICLR 2025 (arXiv 2412.06464).
    """
    check_choice("use_gated_delta_rule", "impl", impl, [None, *PATHS])
    models = _found("use_gated_delta_rule", "a gated delta rule", _models)
    found = [r for name, binds in models for r in _replacements(name, binds, impl)]
    return Use(found, _COUNTER)


def use_selective_scan(*, impl: str | None = None) -> Use:
    """Make every transformers model with a Mamba or Mamba-2 layer use our selective scan, until undone.

    Concerns Mamba, FalconMamba, Jamba, Zamba; Mamba-2, Zamba2, Bamba, Falcon-H1, Granite-MoE-Hybrid,
    Nemotron-H; and whatever else the installed transformers builds on the same functions: models made
    before and after the call alike, in training and generation. On a GPU pass impl="torch": the Triton path
    of the scan has no real A yet, and says so (NotImplementedError). The weights and the cache
    stay as they are, so the switch may be thrown in mid-generation.

    Numerics are those of our functions: in float32 the logits agree with transformers' own to rounding; in
    16 bits step sizes and states stay in float32. Holds for the whole process, all threads. Uses may be
    nested and undone in any order; the latest made holds. Calls inside a compiled graph run our op too but
    are not counted.

    Args:
        impl: 'triton', 'torch' or 'reference' for every call. None: by the device of the inputs.

    Returns:
        A handle: `undo()` ends the use, once or several times; so does the end of a `with` block. `calls`
        says how often each of our functions ran meanwhile.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: The installed transformers has no model with a selective scan.
        ValueError: An unknown `impl`. Inside the models, packed sequences without `seq_idx`.

    Example:
        >>> from transformers import Mamba2ForCausalLM
        >>> model = Mamba2ForCausalLM.from_pretrained(path)
        >>> with use_selective_scan() as use:
        ...     tokens = model.generate(prompt, max_new_tokens=20)
        >>> use.calls
        {'selective_scan_fn': 0, 'selective_state_update': 1216, 'mamba_chunk_scan_combined': 64}

    Source: the layers follow Gu and Dao, Mamba (arXiv 2312.00752), and Dao and Gu (arXiv 2405.21060).
    """
    check_choice("use_selective_scan", "impl", impl, [None, *PATHS])
    models = _found("use_selective_scan", "a selective scan", _scan_models)
    modules = [import_module(name) for name in models]
    return Use(
        [
            Replacement(module, theirs, _fused_layer if op is None else _scan_function(op, impl))
            for module in modules
            for theirs, op in _SCANS.items()
            if hasattr(module, theirs)
        ],
        _SCAN_COUNTER,
    )


def _found(op: str, kind: str, find: Callable[[str], tuple]) -> tuple:
    """What `find` finds in the installed transformers, or the error that says what to install."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        advice = '`pip install "prism-kernels[hf]"` brings it.'
        fail(op, "an installed transformers", "none", advice, ImportError)
    models = find(spec.submodule_search_locations[0])
    if not models:
        version = import_module("transformers").__version__
        advice = '`pip install --upgrade "prism-kernels[hf]"` brings one.'
        fail(op, f"models with {kind}", f"none in transformers {version}", advice, RuntimeError)
    return models


@cache
def _models(folder: str) -> tuple[tuple[str, bool], ...]:
    """Modules that define the rule, and whether their layers bind it to themselves when they are made."""
    found = []
    for path in sorted(Path(folder).glob("models/*/modeling_*.py")):
        source = path.read_bytes()
        if b"\ndef torch_chunk_gated_delta_rule(" in source:
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            found.append((name, b"self.chunk_gated_delta_rule = " in source))
    return tuple(found)


def _replacements(name: str, binds: bool, impl: str | None) -> Iterator[Replacement]:
    """In one module. Layers look the functions up among its globals at each call, or (older) bind them."""
    module = import_module(name)
    for kind, op in (("chunk", _CHUNK), ("recurrent", _RECURRENT)):
        function = _function(op, impl)
        if not binds:
            yield Replacement(module, f"torch_{kind}_gated_delta_rule", function)
            continue
        for layer in vars(module).values():
            if isinstance(layer, type) and layer.__name__.endswith("GatedDeltaNet"):
                attribute = f"{kind}_gated_delta_rule"
                yield Replacement(layer, attribute, Shadow(attribute, function))


@cache  # so that a compiled model meets the same two functions in every use
def _function(op: str, impl: str | None) -> Callable:
    """One of ours with transformers' signature; what follows `beta` goes by keyword, as in all its models."""
    own = {"initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens"}
    own |= {"chunk_size"} if op == _CHUNK else set()
    of_models = import_module("transformers.utils").TransformersKwargs
    passed_by = of_models.__required_keys__ | of_models.__optional_keys__ | {"use_cache"}

    def call(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        _check(op, options, own | passed_by)
        _COUNTER.add(op)
        ours = {name: x for name, x in options.items() if name in own}
        return getattr(gated_delta_rule, op)(q=query, k=key, v=value, g=g, beta=beta, impl=impl, **ours)

    return call


def _check(op: str, options: dict[str, Any], known: frozenset[str]) -> None:
    """Refuse what would be ignored. Layers hand on all that a model was called with; most is not for us."""
    unknown = sorted(options.keys() - known)
    if unknown:
        advice = "Leave them out of the call of the model, or undo `use_gated_delta_rule`."
        fail(op, "arguments of the gated delta rule or of a model", ", ".join(unknown), advice, TypeError)
    given = [name for name in ("cu_seqlens", "seq_idx") if options.get(name) is not None]
    if len(given) == 1:
        advice = (
            "Call the model with both: the rule tells documents by the one, its convolution by the other."
        )
        fail(op, "both of `cu_seq_lens_q` and `seq_idx` for packed sequences", f"{given[0]} alone", advice)


@cache
def _scan_models(folder: str) -> tuple[str, ...]:
    """Modules that define one of the scans."""
    marks = [f"\ndef {name}(".encode() for name, op in _SCANS.items() if op in (_SCAN, _HEADS)]
    return tuple(
        f"transformers.models.{path.parent.name}.{path.stem}"
        for path in sorted(Path(folder).glob("models/*/modeling_*.py"))
        if any(mark in path.read_bytes() for mark in marks)
    )


@cache  # so that a compiled model meets the same functions in every use
def _scan_function(op: str, impl: str | None) -> Callable:
    """One of ours as transformers calls it: tensors up to D in order, the rest by keyword.

    Layers hand on whatever they were called with, and expect what is not for the function to be dropped.
    """
    own = signature(getattr(_HOMES[op], op)).parameters.keys() - {"impl"}

    def call(*tensors: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        if op == _HEADS and options.get("cu_seq_lens_q") is not None and options.get("seq_idx") is None:
            advice = "Call the model with both: the scan and its convolution tell documents by `seq_idx`."
            fail(op, "`seq_idx` for packed sequences", "cu_seq_lens_q alone", advice)
        _SCAN_COUNTER.add(op)
        ours = {name: x for name, x in options.items() if name in own}
        return getattr(_HOMES[op], op)(*tensors, impl=impl, **ours)

    return call


def _fused_layer(*_: Any, **__: Any) -> None:
    """A whole layer in one call; None tells transformers to go through its parts instead."""
