"""A model whose engines are replicas, as a server process or an ingress serves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sortserve import __version__
from sortserve.api.bodies.limits import max_encoded_tokens
from sortserve.checkpoint.words import Words, open_words
from sortserve.core.budget import ExitTable
from sortserve.engine.memory import CacheShape
from sortserve.model.config import ModelConfig
from sortserve.process.api_keys import check_exits
from sortserve.process.config import ServeSettings
from sortserve.process.traces import make_tracing
from sortserve.ray.engine import Facts
from sortserve.ray.link import RayLink
from sortserve.remote.client import RemoteEngines
from sortserve.remote.metrics import RemoteMetrics, RemoteTotals
from sortserve.telemetry.metrics import Metrics
from sortserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sortserve.telemetry.traces import Tracing

__all__ = ["IngressWords", "RemoteModel", "ingress_words", "remote_model"]

IngressWords = tuple[Words, ModelConfig]
"""What an ingress reads of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """Implements ``Served``."""

    model_name: str
    license: str | None
    exits: ExitTable
    generation_defaults: Mapping[str, float]
    tokenizer: Tokenizer
    worker: RemoteEngines
    prepare: Callable[[], None]
    metrics: RemoteMetrics
    totals: RemoteTotals
    tracing: Tracing | None
    cache: CacheShape
    """Of one replica."""
    computed_in: Mapping[str, str]
    close: Callable[[], None]


def ingress_words(settings: ServeSettings) -> IngressWords:
    """The checkpoint's tokenizer and template, without its weights.

    Raises:
        CheckpointError: the checkpoint cannot be served.
    """
    return open_words(settings.model, revision=settings.revision)


def remote_model(
    settings: ServeSettings,
    facts: Facts,
    link: RayLink,
    words: IngressWords,
    end: Callable[[], None] = lambda: None,
) -> RemoteModel:
    """The parts of an ingress.

    Args:
        settings: of the server.
        facts: what a replica says of its model.
        link: carries messages.
        words: see ``ingress_words``.
        end: ends the replicas, if they are this process's.
    """
    own, config = words
    tokenizer = Tokenizer(
        own.tokenizer,
        own.eos_token_ids,
        own.chat_template,
        model_vocab_size=config.vocab_size,
        max_tokens=max_encoded_tokens(facts.max_model_len),
    )
    tokenizer.grammars.prepare()
    tokenizer.allow_special_in_content = settings.allow_special_in_content
    check_exits(settings.key_policies(), facts.exits.layers)
    tracing = make_tracing(settings.otlp_traces_endpoint, clock=time.monotonic)

    def close() -> None:
        end()
        if tracing is not None:
            tracing.close()

    return RemoteModel(
        model_name=facts.model_name,
        license=facts.license,
        exits=facts.exits,
        generation_defaults=facts.generation_defaults,
        tokenizer=tokenizer,
        worker=RemoteEngines(
            link,
            facts.exits,
            facts.max_model_len,
            max_num_queued_reqs=settings.max_num_queued_reqs,
            max_num_queued_tokens=settings.max_num_queued_tokens,
        ),
        prepare=lambda: None,
        metrics=RemoteMetrics(
            Metrics(facts.model_name, facts.exits.layers, version=__version__), link
        ),
        totals=RemoteTotals(link),
        tracing=tracing,
        cache=facts.cache,
        computed_in=facts.computed_in,
        close=close,
    )
