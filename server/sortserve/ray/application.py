"""The Serve application: an ingress with the HTTP service, and the engines behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.app import create_app
from sortserve.process.api_settings import api_settings
from sortserve.process.config import ServeSettings, load_settings
from sortserve.process.key_reload import key_ledger, start_reloading
from sortserve.ray.engine import EngineReplica
from sortserve.ray.link import RayLink
from sortserve.ray.model import ingress_words, remote_model
from sortserve.ray.router import BudgetRouter
from sortserve.ray.scaling import replicas_by_pressure
from sortserve.replicas.messages import Ask
from sortserve.telemetry.logs import logging_to

__all__ = ["ENGINES", "build_app", "engines"]

ENGINES = "engines"
"""The deployment of engines; its options can be set in a Serve config file under this name."""
INGRESS = "ingress"
REPORT_PERIOD_S = 0.5
HEALTH_PERIOD_S = 2.0
MARGIN_S = 10.0
"""Seconds beyond ``--shutdown-timeout`` after which Ray ends a replica by force."""


def build_app(arguments: Mapping[str, Any]) -> Application:
    """The application for ``serve run sortserve.ray:build_app max_num_seqs=64``.

    Args:
        arguments: settings by field name; the others are read from variables and the file.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = load_settings(arguments)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(settings, engines(settings))


def engines(settings: ServeSettings) -> Application:
    """The deployment of engines alone."""
    least = settings.replicas or 1
    most = settings.max_replicas or least
    number: dict[str, Any] = {"num_replicas": least}
    if most > least:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                policy=AutoscalingPolicy(policy_function=replicas_by_pressure),
            )
        }
    deployment = serve.deployment(
        EngineReplica,
        name=ENGINES,
        # The engine batches and queues by itself, and refuses what is too much: Ray must not wait.
        max_ongoing_requests=2 * (settings.max_num_seqs + settings.max_num_queued_reqs),
        graceful_shutdown_timeout_s=settings.shutdown_timeout + MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_PERIOD_S,
        max_constructor_retry_count=3,
        request_router_config=RequestRouterConfig(
            request_router_class=BudgetRouter,
            request_routing_stats_period_s=REPORT_PERIOD_S,
        ),
        ray_actor_options=_resources(settings),
        **number,
    )
    return deployment.bind(settings)


def _resources(settings: ServeSettings) -> dict[str, Any]:
    """What Ray must find for one engine; options in a Serve config file say otherwise."""
    options: dict[str, Any] = {"num_cpus": settings.num_threads or 1}
    if settings.device == "cuda":
        options["num_gpus"] = settings.tensor_parallel_size
    return options


class Ingress:
    """Tokenises, validates and streams; the engines' replicas do the rest."""

    def __init__(self, settings: ServeSettings, handle: DeploymentHandle) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(
            logging_to(level=settings.log_level, log_format=settings.log_format)
        )
        self._settings = settings
        self._link = RayLink(handle)
        self._reloading: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP service, once an engine is there to say what it serves."""
        settings = self._settings
        words = asyncio.create_task(asyncio.to_thread(ingress_words, settings))
        facts = await self._link.ask(Ask(what="facts"), timeout_s=None)
        model = remote_model(settings, facts, self._link, await words)
        self._stack.callback(model.close)
        keys = model.metrics.keys
        ledger = key_ledger(settings, keys)
        self._reloading = start_reloading(
            settings, ledger, keys, model.exits.layers, asyncio.Event()
        )
        app = create_app(
            model.worker,
            model.tokenizer,
            api_settings(settings, model),
            model.metrics,
            model.totals,
            ledger,
            model.tracing,
        )
        return _WithoutId(app)

    def __del__(self) -> None:
        """Called by Ray when no request runs here any more, or has run for too long."""
        self._stack.close()


class _WithoutId:
    """Leaves the id of a reply to Ray's proxy, which appends its own to whatever is there.

    It is the one that our routes find in the request's headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                pairs = message["headers"]
                message["headers"] = [pair for pair in pairs if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)
