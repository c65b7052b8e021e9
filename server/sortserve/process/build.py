"""From settings to a running engine: the only place that constructs its parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from sortserve import __version__
from sortserve.api.bodies.limits import max_encoded_tokens
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import ConfigError
from sortserve.core.request import GenerationRequest
from sortserve.core.user_cache import open_user_cache
from sortserve.cost.cache import (
    cache_path,
    machine_name,
    read_samples,
    write_samples,
)
from sortserve.cost.calibration import calibrate, fault_of, slowed, spot_check
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, Samples, StepShape
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.engine.worker import EngineWorker
from sortserve.model.attention import KVCache
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from sortserve.process.config import ServeSettings
from sortserve.telemetry.logs import Observers, RequestLogger
from sortserve.telemetry.metrics import Metrics
from sortserve.text.tokenizer import TextStream, Tokenizer

__all__ = ["Serving", "available_memory_bytes", "build", "num_kv_pages"]

logger = logging.getLogger(__name__)

CALIBRATION_ATTEMPTS = 2
MAX_DRIFT = 1.5
"""An earlier calibration that is further off than this factor is made anew."""
MEMORY_SHARE = 0.25
"""Share of the free memory that the KV cache takes unless told."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Everything the HTTP service needs of a loaded model."""

    model_name: str
    checkpoint: LoadedCheckpoint
    tokenizer: Tokenizer
    worker: EngineWorker
    prepare: Callable[[], None]
    """What the engine's thread does before the first request (``EngineWorker.start``)."""
    measure: Callable[[], list[tuple[StepShape, float]]]
    """Time steps afresh, for ``sortserve profile``; only before the worker is started."""
    metrics: Metrics
    cache: CacheShape


@dataclass(frozen=True)
class CacheShape:
    """The KV cache in numbers."""

    num_pages: int
    block_size: int
    slab_size: int
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self.num_pages * self.page_bytes


def build(settings: ServeSettings) -> Serving:
    """Load the checkpoint and put the engine together; nothing runs yet.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: settings and checkpoint do not fit each other.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(num_threads(settings.num_threads))
    checkpoint = load_checkpoint(
        settings.model,
        exits=settings.exits,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
    )
    max_model_len = _max_model_len(settings, checkpoint)
    backend = choose_backend(
        checkpoint.config,
        checkpoint.weights.dtype,
        checkpoint.weights.device,
        attention=settings.attention_backend,
        linear=settings.linear_backend,
    )
    decoder = Decoder(
        checkpoint.config,
        checkpoint.weights,
        exits=checkpoint.exits.layers,
        max_model_len=max_model_len,
        backend=backend,
        release_weights=True,
    )
    cache = _cache_shape(settings, decoder, max_model_len)
    runner = ModelRunner(decoder, num_pages=cache.num_pages, block_size=cache.block_size)
    tokenizer = Tokenizer(
        checkpoint.tokenizer,
        checkpoint.eos_token_ids,
        checkpoint.chat_template,
        model_vocab_size=checkpoint.config.vocab_size,
        max_tokens=max_encoded_tokens(max_model_len),
    )

    def make_text(request: GenerationRequest) -> TextStream:
        return TextStream(tokenizer, request.sampling, request.prompt_token_ids)

    model_name = settings.served_model_name or checkpoint.name
    metrics = Metrics(model_name, checkpoint.exits.layers, version=__version__)
    engine = Engine(
        runner,
        checkpoint.exits,
        eos_token_ids=checkpoint.eos_token_ids,
        make_text=make_text,
        config=EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            policy=settings.policy,
            overload_delay_s=settings.overload_delay,
            enable_prefix_caching=settings.enable_prefix_caching,
            max_failed_steps=settings.max_failed_steps,
            seed=settings.seed,
            vocab_size=checkpoint.config.vocab_size,
        ),
        observer=Observers([metrics, RequestLogger()]),
    )
    worker = EngineWorker(
        engine,
        max_num_queued_reqs=settings.max_num_queued_reqs,
        max_num_queued_tokens=settings.max_num_queued_tokens,
        step_timeout_s=settings.step_timeout or None,
        debug=settings.debug,
    )

    calibrator = _Calibrator(engine, runner, settings, checkpoint, decoder)

    def prepare() -> None:
        if settings.calibrate:
            engine.costs.learn_from(CostLearner(calibrator.samples()))

    metrics.watch(worker.stats)
    metrics.set_cache_config(
        block_size=cache.block_size,
        num_gpu_blocks=cache.num_pages,  # the name that gateways look for, on any device
        slab_size=cache.slab_size,
        page_bytes=cache.page_bytes,
        cache_dtype=str(decoder.dtype).removeprefix("torch."),
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    return Serving(
        model_name=model_name,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        worker=worker,
        prepare=prepare,
        measure=calibrator.measure,
        metrics=metrics,
        cache=cache,
    )


def num_threads(wanted: int) -> int:
    """Threads to start: those that are wanted, but no more than there are cores to run them."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if wanted > num_cores:
        logger.warning("--num-threads=%d: only %d are started, one a core.", wanted, num_cores)
    return min(wanted, num_cores)


def _max_model_len(settings: ServeSettings, checkpoint: LoadedCheckpoint) -> int:
    wanted, limit = settings.max_model_len, checkpoint.max_model_len
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"--max-model-len={wanted} is more than the checkpoint was made for: "
            f"at most {limit} tokens.",
            param="max-model-len",
        )
    return wanted if wanted is not None else limit


class _Calibrator:
    """Times the steps of an engine that serves nobody yet, or finds that it has been done."""

    def __init__(
        self,
        engine: Engine,
        runner: ModelRunner,
        settings: ServeSettings,
        checkpoint: LoadedCheckpoint,
        decoder: Decoder,
    ) -> None:
        self._runner = runner
        self._clock = engine.clock
        self._shapes = _Shapes(
            exits=engine.exits.layers,
            vocab_size=checkpoint.config.vocab_size,
            max_model_len=engine.config.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
        )
        self._key = _calibration_key(settings, checkpoint, decoder)
        cache = open_user_cache()
        self._path = None if cache is None else cache_path(cache, self._key)

    def samples(self) -> list[tuple[StepShape, float]]:
        """Those of an earlier start, at the machine's present speed; else new ones."""
        kept = None if self._path is None else read_samples(self._path)
        if kept is not None and (fault := self._fault_of(kept)) is not None:
            logger.warning("the calibration in %s is not used: %s", self._path, fault)
            kept = None
        if kept is None:
            return self._new_samples()
        ratio = spot_check(self._runner, CostModel.fit(kept), clock=self._clock, **self._shapes)
        logger.info("calibration of an earlier start: steps take %.2f times as long now", ratio)
        if not 1 / MAX_DRIFT <= ratio <= MAX_DRIFT:
            return self._new_samples()
        return [(shape, seconds * ratio) for shape, seconds in kept]

    def measure(self) -> list[tuple[StepShape, float]]:
        """New ones, kept for the next start if they can be believed, else tried once more."""
        for _ in range(CALIBRATION_ATTEMPTS):
            samples = calibrate(self._runner, clock=self._clock, **self._shapes)
            fault = self._fault_of(samples)
            if fault is None:
                if self._path is not None:
                    write_samples(self._path, samples, self._key)
                break
            logger.warning("this calibration is not kept: %s", fault)
        return samples

    def _new_samples(self) -> list[tuple[StepShape, float]]:
        """New ones to serve with: made slower where they cannot be believed."""
        samples = self.measure()
        if self._fault_of(samples) is None:
            return samples
        logger.warning(
            "no calibration that can be believed: times are predicted with caution until the steps "
            "that run have shown better, and the next start measures again"
        )
        return slowed(samples)

    def _fault_of(self, samples: Samples) -> str | None:
        return fault_of(samples, self._runner, **self._shapes)


class _Shapes(TypedDict):
    """What steps are possible."""

    exits: Sequence[int]
    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int


def _calibration_key(
    settings: ServeSettings, checkpoint: LoadedCheckpoint, decoder: Decoder
) -> dict[str, object]:
    """All that step times depend on."""
    device = decoder.device
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": machine_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "model": checkpoint.config,
        "exits": checkpoint.exits.layers,
        "dtype": decoder.dtype,
        "backends": (decoder.backend.attention.name, decoder.backend.linear.name),
        "block_size": settings.block_size,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }


# The size of the KV cache


def _cache_shape(settings: ServeSettings, decoder: Decoder, max_model_len: int) -> CacheShape:
    page_bytes = KVCache.page_bytes(
        decoder.config, decoder.slab_size, settings.block_size, decoder.dtype
    )
    if settings.kv_cache_memory is not None:
        memory_bytes = int(settings.kv_cache_memory)
    else:
        memory_bytes = int(MEMORY_SHARE * available_memory_bytes(decoder.device))
    num_pages = num_kv_pages(
        memory_bytes=memory_bytes,
        page_bytes=page_bytes,
        pages_per_seq=-(-max_model_len // settings.block_size) * decoder.num_slabs,
        max_num_seqs=settings.max_num_seqs,
    )
    cache = CacheShape(num_pages, settings.block_size, decoder.slab_size, page_bytes)
    limit = total_memory_bytes(decoder.device)
    if cache.num_bytes > limit:
        raise ConfigError(
            f"--kv-cache-memory={settings.kv_cache_memory}: the KV cache would take "
            f"{cache.num_bytes / 2**20:.0f} MiB, but there are only {limit / 2**20:.0f} MiB here.",
            param="kv-cache-memory",
        )
    return cache


def num_kv_pages(
    *, memory_bytes: int, page_bytes: int, pages_per_seq: int, max_num_seqs: int
) -> int:
    """Pages that fit the memory, and no more than full sequences at full depth could ever use.

    Raises:
        ConfigError: not even one such sequence fits.
    """
    num_pages = min(memory_bytes // page_bytes, pages_per_seq * max_num_seqs)
    if num_pages < pages_per_seq:
        need_mib = -(-pages_per_seq * page_bytes // 2**20)
        raise ConfigError(
            f"the KV cache has {memory_bytes / 2**20:.1f} MiB, but one sequence of full length "
            f"needs {need_mib} MiB: give --kv-cache-memory={need_mib}MiB or more, or a smaller "
            "--max-model-len.",
            param="kv-cache-memory",
        )
    return num_pages


def total_memory_bytes(device: torch.device) -> int:
    """Memory that there is at most: free on the GPU, or of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (limit_text := limit.read_text().strip()) != "max":
        total = min(total, int(limit_text))
    return total


def available_memory_bytes(device: torch.device) -> int:
    """Memory that may be taken now: of the GPU, or of the machine within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _meminfo_available_bytes(Path("/proc/meminfo"))
    free = [total // 2 if available is None else available]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (limit_text := limit.read_text().strip()) != "max":
        free.append(max(0, int(limit_text) - int(used.read_text())))
    return min(free)


def _meminfo_available_bytes(path: Path) -> int | None:
    """``MemAvailable`` of Linux; None on systems without it."""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None
