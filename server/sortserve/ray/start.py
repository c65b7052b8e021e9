"""``sortserve serve --replicas``: engines under Ray Serve behind this process's own HTTP server.

So the socket, its limits, TLS, signals and logs are those of any ``sortserve serve``, and a token
takes one way through Ray: from its replica to here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from sortserve.core.errors import CheckpointError
from sortserve.process.config import ServeSettings
from sortserve.ray.model import IngressWords, RemoteModel, ingress_words, remote_model

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

    from sortserve.ray.application import engines
    from sortserve.ray.link import RayLink
    from sortserve.replicas.messages import Ask

    _log_as_we_do()
    is_ours = _connect(settings)
    serve.start(proxy_location="Disabled")
    application = engines(settings)
    try:
        handle = serve.run(application, name=APP, route_prefix=None)
    except RuntimeError as error:
        raise CheckpointError(f"No engine could start under Ray Serve: {error}") from error
    link = RayLink(handle)
    facts = asyncio.run(link.ask(Ask(what="facts"), timeout_s=60.0))

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

    return remote_model(settings, facts, link, words, end)


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
