"""``sortserve serve --replicas``: engines under Ray Serve behind this process's own HTTP server.

So the socket, its limits, TLS, signals and logs are those of any ``sortserve serve``, and a token
takes one way through Ray: from its replica to here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from sortserve.core.errors import CheckpointError
from sortserve.process.config import ServeSettings
from sortserve.ray.model import IngressWords, RemoteModel, ingress_words, remote_model

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

__all__ = ["start_replicas"]

logger = logging.getLogger(__name__)

APP = "sortserve"
OBJECT_STORE_BYTES = 100 << 20
"""Of a Ray that is started here: messages are small, and pass by it."""


def start_replicas(settings: ServeSettings) -> RemoteModel:
    """Start Ray, unless ``RAY_ADDRESS`` names a cluster, and the engines; returns when they run.

    Raises:
        CheckpointError: the checkpoint cannot be served, or no engine could start.
    """
    words = ingress_words(settings)  # refuses most of what is wrong before anything is started
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own default, 15, has engines wait for whatever else runs on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Linux ends Ray's processes with the thread that started them, so it lives as long as they do.
    thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
    try:
        return thread.submit(_start, settings, words, thread).result()
    except BaseException:
        thread.shutdown(wait=False)
        raise


def _start(settings: ServeSettings, words: IngressWords, thread: ThreadPoolExecutor) -> RemoteModel:
    import ray
    from ray import serve

    from sortserve.ray.link import RayLink
    from sortserve.replicas.messages import Ask

    _log_as_we_do()
    is_ours = _connect(settings)

    def end_here() -> None:
        with suppress(Exception):
            if is_ours:
                serve.shutdown()
            else:
                serve.delete(APP)
        ray.shutdown()

    def end() -> None:
        thread.submit(end_here).result()
        thread.shutdown()

    try:
        link = RayLink(_engines_of(settings))
        facts = asyncio.run(link.ask(Ask(what="facts"), timeout_s=60.0))
        return remote_model(settings, facts, link, words, end)
    except BaseException:
        end_here()  # some of Ray's processes would outlive this one for minutes
        raise


def _engines_of(settings: ServeSettings) -> DeploymentHandle:
    """The handle of the engines, once they run."""
    from ray import serve

    from sortserve.ray.application import engines

    serve.start(proxy_location="Disabled")
    try:
        return serve.run(engines(settings), name=APP, route_prefix=None)
    except RuntimeError as error:
        of_all = serve.status().applications[APP].deployments.values()
        reason = _reason_of("\n".join(own.message for own in of_all)) or error
        raise CheckpointError(f"No engine could start under Ray Serve: {reason}") from error


def _reason_of(status: str) -> str:
    """What an engine has said that could not start, of all that Ray tells of it; "": nothing."""
    said = re.findall(r"^sortserve\.core\.errors\.\w+: (.+)$", status, re.MULTILINE)
    return said[-1] if said else ""


def _log_as_we_do() -> None:
    """Ray's loggers in this process write lines as ours do, of warnings and worse."""
    for name in ("ray", "ray.serve", "ray.data", "ray.tune"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def _connect(settings: ServeSettings) -> bool:
    """Whether the Ray is one that was started here."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(
            address=os.environ["RAY_ADDRESS"],
            namespace="serve",
            log_to_driver=False,
            configure_logging=False,
        )
        return False
    replicas = settings.max_replicas or settings.replicas or 1
    ray.init(
        address="local",  # and no cluster that happens to run here
        num_cpus=max(os.cpu_count() or 1, replicas * (settings.num_threads or 1) + 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=settings.log_format == "human",
        configure_logging=False,
        namespace="serve",
    )
    return True
