"""From a checkpoint and plain values to an engine: the only place that constructs its parts.

parts = assemble(load_checkpoint("./my-checkpoint"), EngineOptions(max_num_seqs=8))
parts.engine.step()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sortserve.checkpoint.load import LoadedCheckpoint, LoadedModel
from sortserve.core.errors import ConfigError
from sortserve.core.plan import Runner
from sortserve.core.request import Observer, Request
from sortserve.cost.learner import CostLearner
from sortserve.engine.calibrator import Calibrator
from sortserve.engine.cores import num_usable_cores
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.memory import CacheShape
from sortserve.engine.model_parts import make_cache, make_decoder, make_runner
from sortserve.engine.options import EngineOptions, check_count
from sortserve.engine.runner import ModelRunner
from sortserve.engine.step_thread import StepThread
from sortserve.engine.tensor_parallel.ranks import Ranks
from sortserve.engine.threads import StepThreads, limit_threads
from sortserve.model.decoder import Decoder
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
class EngineParts:
    """An engine that has not run yet, and what it was made of."""

    engine: Engine
    runner: ModelRunner
    tokenizer: Tokenizer
    decoder: Decoder
    cache: CacheShape
    calibrator: Calibrator
    failed_backends: tuple[str, ...] = ()
    """Those that were to be used before the one that is, and failed their check on any rank."""
    ranks: Ranks | None = None
    """The others, if there are any."""

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
        self.runner.record_graphs()
        self.engine.costs.learn_from(CostLearner(self.calibrator.samples()))
        if adapt_threads:
            self.runner.adapt_threads(StepThreads(self.engine.costs))

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have ``on_failure`` called, with the reason, once nothing can be run any more."""
        if self.ranks is not None:
            self.ranks.watch(on_failure)

    def close(self) -> None:
        """End what is not of this process, when the engine has ended. Idempotent."""
        if self.ranks is not None:
            self.ranks.close()


def assemble(
    checkpoint: LoadedCheckpoint,
    options: EngineOptions,
    *,
    tokenizer: Tokenizer | None = None,
    observer: Observer | None = None,
    release_weights: bool = False,
    ranks: Ranks | None = None,
) -> EngineParts:
    """Put an engine together; nothing runs yet.

    Args:
        checkpoint: what it runs.
        options: choices and limits.
        tokenizer: of the checkpoint; None: made here.
        observer: who is told what happens.
        release_weights: the checkpoint's weights are of no use to anybody else afterwards; see
            ``Decoder``.
        ranks: those that have the rest of the model, if the checkpoint is a share of it.

    Raises:
        ConfigError: options and checkpoint, or options and this machine, do not fit each other.
    """
    assert checkpoint.shape.num_ranks == (1 if ranks is None else ranks.num_ranks)
    max_model_len = context_length(checkpoint, options.max_model_len)
    group = None if ranks is None else ranks.group(checkpoint.weights.device)
    made = make_decoder(
        checkpoint, options, max_model_len, group=group, release_weights=release_weights
    )
    decoder = made.decoder
    cache = make_cache(made, options, max_model_len, num_ranks=checkpoint.shape.num_ranks)
    if ranks is not None:
        cache = replace(cache, num_pages=ranks.start(cache.num_pages))
    failed_of_ranks = () if ranks is None else ranks.failed_backends
    runner = make_runner(decoder, cache, ranks, options)
    on_gpu = decoder.device.type != "cpu"
    overlaps = on_gpu if options.async_scheduling is None else options.async_scheduling
    # Only rank 0 samples, so the others cannot take its tokens on their devices.
    on_thread = overlaps and (not on_gpu or ranks is not None)
    launcher: Runner = StepThread(runner) if on_thread else runner
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
        failed_backends=tuple(dict.fromkeys((*made.failed_backends, *failed_of_ranks))),
        ranks=ranks,
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


def context_length(checkpoint: LoadedModel, wanted: int | None) -> int:
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


def start_threads(wanted: int | None, *, num_ranks: int = 1) -> None:
    """See ``limit_threads``; what is no number of threads is refused.

    Ranks share the cores: unless told, each has as many as any other.
    """
    if wanted is not None:
        check_count("num_threads", wanted)
    elif num_ranks > 1:
        wanted = max(1, min(torch.get_num_threads(), num_usable_cores()) // num_ranks)
    limit_threads(wanted)
