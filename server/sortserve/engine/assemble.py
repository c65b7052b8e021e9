"""From a checkpoint and plain values to an engine: the only place that constructs its parts.

parts = assemble(load_checkpoint("./my-checkpoint"), EngineOptions(max_num_seqs=8))
parts.engine.step()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sortserve.checkpoint.load import LoadedCheckpoint
from sortserve.core.budget import DEFAULT_MIN_QUALITY
from sortserve.core.errors import ConfigError
from sortserve.core.plan import Runner
from sortserve.core.ranges import numbers
from sortserve.core.request import Observer, Request
from sortserve.cost.learner import CostLearner
from sortserve.engine.calibrator import Calibrator
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.memory import CacheShape, cache_shape, return_freed_memory
from sortserve.engine.runner import ModelRunner
from sortserve.engine.step_thread import StepThread
from sortserve.engine.threads import StepThreads, limit_threads
from sortserve.model.backends import AUTO, check_backend_name, choose_backend
from sortserve.model.decoder import Decoder
from sortserve.scheduling.objective import DEFAULT_OBJECTIVE
from sortserve.text.tokenizer import TextStream, Tokenizer

__all__ = [
    "EngineOptions",
    "EngineParts",
    "assemble",
    "context_length",
    "make_engine",
    "make_tokenizer",
    "start_threads",
]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What may be chosen of an engine; names and defaults are those of ``sortserve serve``.

    Raises:
        ConfigError: a name or a number is not allowed.
    """

    max_model_len: int | None = None
    """None: what the checkpoint allows."""
    backend: str = AUTO
    policy: str = "deadline"
    objective: str = DEFAULT_OBJECTIVE
    min_quality: float = DEFAULT_MIN_QUALITY
    overload_degrade: bool = False
    overload_delay: float = 2.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    async_scheduling: bool | None = None
    """None: on a GPU."""
    kv_cache_memory: int | None = None
    """Bytes; None: a share of what is free."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_failed_steps: int = 3
    seed: int | None = None

    def __post_init__(self) -> None:
        check_backend_name(self.backend)
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_failed_steps"):
            _check_count(name, getattr(self, name))
        _check_share("min_quality", self.min_quality)
        for name, least in (("max_model_len", 2), ("kv_cache_memory", 1)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """An engine that has not run yet, and what it was made of."""

    engine: Engine
    runner: ModelRunner
    tokenizer: Tokenizer
    decoder: Decoder
    cache: CacheShape
    calibrator: Calibrator

    @property
    def num_threads(self) -> int:
        """CPU threads that a step may use."""
        return torch.get_num_threads()

    def calibrate(self, *, adapt_threads: bool = False) -> None:
        """Let the engine know what its steps cost; on the thread that will run them.

        Args:
            adapt_threads: from then on, steps use as many threads as pays, at most those that the
                calibration had. PyTorch's number of threads is the process's, so this is for a
                process that does nothing else.
        """
        self.engine.costs.learn_from(CostLearner(self.calibrator.samples()))
        if adapt_threads:
            self.runner.adapt_threads(StepThreads(self.engine.costs))


def assemble(
    checkpoint: LoadedCheckpoint,
    options: EngineOptions,
    *,
    tokenizer: Tokenizer | None = None,
    observer: Observer | None = None,
    release_weights: bool = False,
) -> EngineParts:
    """Put an engine together; nothing runs yet.

    Args:
        checkpoint: what it runs.
        options: choices and limits.
        tokenizer: of the checkpoint; None: made here.
        observer: who is told what happens.
        release_weights: the checkpoint's weights are of no use to anybody else afterwards; see
            ``Decoder``.

    Raises:
        ConfigError: options and checkpoint, or options and this machine, do not fit each other.
    """
    max_model_len = context_length(checkpoint, options.max_model_len)
    backend = choose_backend(
        checkpoint.config,
        checkpoint.weights.dtype,
        checkpoint.weights.device,
        options.backend,
    )
    decoder = Decoder(
        checkpoint.config,
        checkpoint.weights,
        exits=checkpoint.exits.layers,
        max_model_len=max_model_len,
        backend=backend,
        release_weights=release_weights,
    )
    return_freed_memory()
    cache = cache_shape(
        decoder,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_cache_memory=options.kv_cache_memory,
    )
    runner = ModelRunner(decoder, num_pages=cache.num_pages, block_size=cache.block_size)
    on_gpu = decoder.device.type != "cpu"
    overlaps = on_gpu if options.async_scheduling is None else options.async_scheduling
    launcher: Runner = StepThread(runner) if overlaps and not on_gpu else runner
    tokenizer = tokenizer or make_tokenizer(checkpoint)
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        policy=options.policy,
        objective=options.objective,
        min_quality=options.min_quality,
        overload_delay_s=options.overload_delay,
        overload_degrade=options.overload_degrade,
        enable_prefix_caching=options.enable_prefix_caching,
        pages_are_resident=on_gpu,
        async_scheduling=overlaps,
        max_failed_steps=options.max_failed_steps,
        seed=options.seed,
        vocab_size=checkpoint.config.vocab_size,
    )
    engine = make_engine(launcher, checkpoint, tokenizer, config, observer=observer)
    return EngineParts(
        engine=engine,
        runner=runner,
        tokenizer=tokenizer,
        decoder=decoder,
        cache=cache,
        calibrator=Calibrator(engine, launcher, decoder),
    )


def make_engine(
    runner: Runner,
    checkpoint: LoadedCheckpoint,
    tokenizer: Tokenizer,
    config: EngineConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    observer: Observer | None = None,
) -> Engine:
    """An engine that says what its runner gives in the checkpoint's words."""

    def make_text(request: Request) -> TextStream:
        return TextStream(tokenizer, request.sampling, request.prompt_token_ids)

    return Engine(
        runner,
        checkpoint.exits,
        eos_token_ids=checkpoint.eos_token_ids,
        make_text=make_text,
        config=config,
        clock=clock,
        observer=observer,
    )


def make_tokenizer(checkpoint: LoadedCheckpoint, *, max_tokens: int | None = None) -> Tokenizer:
    """The checkpoint's; ``max_tokens`` as in ``Tokenizer``."""
    return Tokenizer(
        checkpoint.tokenizer,
        checkpoint.eos_token_ids,
        checkpoint.chat_template,
        model_vocab_size=checkpoint.config.vocab_size,
        max_tokens=max_tokens,
    )


def context_length(checkpoint: LoadedCheckpoint, wanted: int | None) -> int:
    """Most tokens of prompt and answer together: the checkpoint's, or fewer.

    Raises:
        ConfigError: more than the checkpoint was made for.
    """
    limit = checkpoint.max_model_len
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"--max-model-len={wanted} is more than the checkpoint was made for: "
            f"at most {limit} tokens.",
            param="max-model-len",
        )
    return wanted if wanted is not None else limit


def start_threads(wanted: int | None) -> None:
    """See ``limit_threads``; what is no number of threads is refused."""
    if wanted is not None:
        _check_count("num_threads", wanted)
    limit_threads(wanted)


def _check_count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag}={value!r} is not allowed: an integer >= {least}.", param=flag)


def _check_share(name: str, value: object) -> None:
    share = numbers(0, 1)
    if value not in share:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag}={value!r} is not allowed: {share.allowed}.", param=flag)
