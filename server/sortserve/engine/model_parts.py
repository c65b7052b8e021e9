"""The parts of an engine that belong to one device: decoder, KV cache and runner of one rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from sortserve.checkpoint.load import LoadedModel
from sortserve.engine.backend_choice import choose_checked_backend
from sortserve.engine.memory import CacheShape, cache_shape, return_freed_memory
from sortserve.engine.memory_use import measure_memory_use
from sortserve.engine.options import EngineOptions
from sortserve.engine.runner import ModelRunner
from sortserve.engine.tensor_parallel.collectives import Group
from sortserve.engine.tensor_parallel.ranks import Ranks
from sortserve.engine.tensor_parallel.runner import TensorParallelRunner
from sortserve.model.backend import Backend
from sortserve.model.decoder import Decoder
from sortserve.model.device_memory import MemoryUse, device_memory, refusing_too_much
from sortserve.model.graphs import make_graph_maker
from sortserve.model.tensor_parallel import ParallelBackend

__all__ = ["MadeDecoder", "make_cache", "make_decoder", "make_runner"]

SMALLER_MODEL = "Give --quantize, or let other programs use less."
SMALLER_CACHE = "Give a smaller --kv-cache-memory or --gpu-memory-utilization."


@dataclass(frozen=True, kw_only=True)
class MadeDecoder:
    """A decoder, and what became of its making."""

    decoder: Decoder
    num_weight_bytes: int
    """Of the model's weights, or of the rank's share of them."""
    failed_backends: tuple[str, ...]
    """Those that were to be used before the one that is, and failed their check."""
    group: Group | None
    """The rank's; None: there is one rank."""


def make_decoder(
    model: LoadedModel,
    options: EngineOptions,
    max_model_len: int,
    *,
    group: Group | None = None,
    release_weights: bool = False,
) -> MadeDecoder:
    """The decoder of a model, or of a rank's share of one, on a backend that passed its check.

    Args:
        model: what it runs.
        options: choices and limits.
        max_model_len: ``context_length``.
        group: the rank's; None: there is one rank.
        release_weights: see ``Decoder``.

    Raises:
        ConfigError: the backend does not work here, or memory does not suffice.
    """
    weights, shape = model.weights, model.shape
    memory = device_memory(weights.device)
    with refusing_too_much(memory, "what the backend makes of the weights", None, SMALLER_MODEL):
        num_weight_bytes = weights.nbytes
        choice = choose_checked_backend(
            shape.config(model.config),
            weights,
            name=options.backend,
            required=options.require_backend,
            block_size=options.block_size,
        )
        backend: Backend = choice.backend
        if group is not None:
            backend = ParallelBackend(backend, model.config, shape, group)
        decoder = Decoder(
            model.config,
            weights,
            exits=model.exits.layers,
            max_model_len=max_model_len,
            backend=backend,
            shape=shape,
            release_weights=release_weights,
        )
    return MadeDecoder(
        decoder=decoder,
        num_weight_bytes=num_weight_bytes,
        failed_backends=choice.failed,
        group=group,
    )


def make_cache(
    made: MadeDecoder, options: EngineOptions, max_model_len: int, *, num_ranks: int = 1
) -> CacheShape:
    """The KV cache that fits beside a decoder.

    Raises:
        ConfigError: see ``cache_shape``; or a GPU has no room for the largest step.
    """
    return_freed_memory()
    return cache_shape(
        made.decoder,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_cache_memory=options.kv_cache_memory,
        use=_memory_use(made, options, max_model_len),
        num_sharing=num_ranks if made.decoder.device.type == "cpu" else 1,
    )


def _memory_use(made: MadeDecoder, options: EngineOptions, max_model_len: int) -> MemoryUse | None:
    """What a largest step takes of a GPU; None where nobody needs to know."""
    memory = device_memory(made.decoder.device)
    if memory is None or options.kv_cache_memory is not None:
        return None
    with nullcontext() if made.group is None else made.group.alone():
        return measure_memory_use(
            memory,
            made.decoder,
            block_size=options.block_size,
            max_model_len=max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_weight_bytes=made.num_weight_bytes,
            utilization=options.gpu_memory_utilization,
        )


def make_runner(
    decoder: Decoder, cache: CacheShape, ranks: Ranks | None, options: EngineOptions
) -> ModelRunner:
    """What executes plans, beside the other ranks if there are any.

    Raises:
        ConfigError: a GPU has no room for the cache.
    """
    num_pages, block_size = cache.num_pages, cache.block_size
    memory = device_memory(decoder.device)
    with refusing_too_much(memory, "the KV cache", cache.num_bytes, SMALLER_CACHE):
        if ranks is not None:
            return TensorParallelRunner(
                decoder, num_pages=num_pages, block_size=block_size, ranks=ranks
            )
        return ModelRunner(
            decoder,
            num_pages=num_pages,
            block_size=block_size,
            graph_maker=None if options.enforce_eager else make_graph_maker(decoder),
            max_num_seqs=options.max_num_seqs,
        )
