"""From settings to a server's parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from sortserve import __version__
from sortserve.api.bodies.limits import max_encoded_tokens
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.budget import ExitTable
from sortserve.core.errors import ConfigError, InvalidRequestError
from sortserve.core.request import Observer
from sortserve.cost.model import StepShape
from sortserve.engine.assemble import (
    EngineOptions,
    assemble,
    context_length,
    make_tokenizer,
    start_threads,
)
from sortserve.engine.memory import CacheShape
from sortserve.engine.tensor_parallel.ranks import Ranks, other_ranks
from sortserve.engine.worker import EngineWorker
from sortserve.model.weights import quantization_of
from sortserve.process.api_keys import check_exits
from sortserve.process.config import ServeSettings
from sortserve.process.notices import tell_of_exits
from sortserve.process.traces import make_tracing
from sortserve.telemetry.logs import Observers, RequestLogger
from sortserve.telemetry.logs import fields as log_fields
from sortserve.telemetry.metrics import Metrics
from sortserve.telemetry.status_line import phase, phase_over
from sortserve.telemetry.totals import Totals
from sortserve.telemetry.vllm_names import MetricsWithVllmNames
from sortserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sortserve.telemetry.traces import Tracing

__all__ = ["Serving", "build"]

logger = logging.getLogger(__name__)


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
    survey: Callable[[], list[tuple[StepShape, float]]]
    """Time many steps, for a simulation; likewise."""
    metrics: Metrics
    totals: Totals
    tracing: Tracing | None
    """Makes the spans of requests, and is closed with the rest; None: nothing is traced."""
    cache: CacheShape
    close: Callable[[], None]
    """End what is not of this process, after the worker's end."""
    computed_in: Mapping[str, str]
    """``dtype``, ``quantization``, ``backend``, ``isa`` and ``threads``: what each auto became; and
    ``failed_backends``, those that failed their check and so are not the backend."""

    @property
    def exits(self) -> ExitTable:
        """What requests may be served at."""
        return self.worker.exits

    @property
    def license(self) -> str | None:
        """Of the weights, if it is known."""
        return self.checkpoint.license

    @property
    def generation_defaults(self) -> Mapping[str, float]:
        """How the checkpoint recommends to sample."""
        return self.checkpoint.generation_defaults


def build(settings: ServeSettings) -> Serving:
    """Load the checkpoint and put the engine together; nothing runs yet.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: settings and checkpoint do not fit each other.
    """
    options = EngineOptions(**{f.name: getattr(settings, f.name) for f in fields(EngineOptions)})
    start_threads(settings.num_threads, num_ranks=options.tensor_parallel_size)
    names = ("exits", "dtype", "device", "quantize", "revision")
    loading = {name: getattr(settings, name) for name in names}
    with other_ranks(settings.model, loading, options, settings.num_threads) as ranks:
        return _build(settings, options, loading, ranks)


def _build(
    settings: ServeSettings,
    options: EngineOptions,
    loading: Mapping[str, Any],
    ranks: Ranks | None,
) -> Serving:
    tracing = make_tracing(settings.otlp_traces_endpoint, clock=time.monotonic)
    started_s = time.monotonic()
    start_phase = f"loading {settings.model}"
    logger.info("%s", start_phase, extra=phase(start_phase))
    checkpoint = load_checkpoint(
        settings.model, **loading, tensor_parallel_size=options.tensor_parallel_size
    )
    loaded_s = time.monotonic()
    max_model_len = context_length(checkpoint, settings.max_model_len)
    tokenizer = make_tokenizer(checkpoint, max_tokens=max_encoded_tokens(max_model_len))
    tokenizer.grammars.prepare()
    tokenizer.allow_special_in_content = settings.allow_special_in_content
    model_name = settings.served_model_name or checkpoint.name
    kind = MetricsWithVllmNames if settings.vllm_metric_names else Metrics
    metrics = kind(model_name, checkpoint.exits.layers, version=__version__)
    totals = Totals()
    observers: list[Observer] = [metrics, totals, RequestLogger()]
    if tracing is not None:
        observers.append(tracing)
    parts = assemble(
        checkpoint,
        options,
        tokenizer=tokenizer,
        observer=Observers(observers),
        release_weights=True,
        ranks=ranks,
    )
    logger.info(
        "loaded",
        extra={
            **log_fields(
                checkpoint_s=round(loaded_s - started_s, 2),
                engine_s=round(time.monotonic() - loaded_s, 2),
            ),
            **phase_over(start_phase),
        },
    )
    tell_of_exits(parts.engine.exits)
    _check_default_budget(settings, parts.engine.exits)
    check_exits(settings.key_policies(), parts.engine.exits.layers)
    worker = EngineWorker(
        parts.engine,
        max_num_queued_reqs=settings.max_num_queued_reqs,
        max_num_queued_tokens=settings.max_num_queued_tokens,
        step_timeout_s=settings.step_timeout or None,
        debug=settings.debug,
    )
    parts.watch(worker.fail)

    def prepare() -> None:
        parts.runner.record_graphs()
        if settings.calibrate:
            parts.calibrate(adapt_threads=settings.num_threads is None)

    def close() -> None:
        parts.close()
        if tracing is not None:
            tracing.close()

    cache, decoder = parts.cache, parts.decoder
    computed_in = {
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "quantization": quantization_of(decoder.formats),
        "backend": decoder.backend.name,
        "isa": decoder.backend.detail or "none",
        "failed_backends": ",".join(parts.failed_backends) or "none",
        "threads": str(parts.num_threads),
    }
    metrics.watch(worker.stats, partial(worker.admission_stats, settings.budget_by_default))
    metrics.set_model_config(computed_in)
    metrics.set_cache_config(
        block_size=cache.block_size,
        # Gateways read it as vLLM's: block_size times this is the tokens that fit, at full depth.
        num_gpu_blocks=cache.num_pages // decoder.slabs.count(worker.exits.layers[-1]),
        slab_size=cache.slab_size,
        page_bytes=cache.page_bytes,
        cache_dtype=computed_in["dtype"],
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    return Serving(
        model_name=model_name,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        worker=worker,
        prepare=prepare,
        measure=parts.calibrator.measure,
        survey=parts.calibrator.survey,
        metrics=metrics,
        totals=totals,
        tracing=tracing,
        cache=cache,
        close=close,
        computed_in=computed_in,
    )


def _check_default_budget(settings: ServeSettings, exits: ExitTable) -> None:
    """Refuse a default budget that this checkpoint can never keep: it would refuse everybody."""
    try:
        exits.allowed(settings.budget_by_default)
    except InvalidRequestError as error:
        raise ConfigError(
            f"--default-budget={settings.default_budget}: {error.message}", param="default-budget"
        ) from error
