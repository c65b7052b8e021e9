"""What a person reads when a server is ready: where it is, what it serves, one command to try."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sortserve import __version__
from sortserve.process.config import ServeSettings

if TYPE_CHECKING:
    from sortserve.process.served import Served

__all__ = ["banner", "base_url", "curl"]

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `sortserve chat` looks unless told."""


def banner(settings: ServeSettings, serving: Served, port: int | None) -> str:
    """What a person wants to read once the server is ready."""
    cache, exits = serving.cache, serving.exits
    url = base_url(settings, port)
    chosen = serving.computed_in
    weights = chosen["dtype"]
    if chosen["quantization"] != "none":
        weights = f"{chosen['quantization']}, all else in {weights}"
    lines = [
        f"sortserve {__version__} serves {serving.model_name} on {settings.uds or url}",
        f"  exits     {', '.join(map(str, exits.layers))} of {exits.full} layers",
        f"  weights   {weights}",
        f"  backend   {chosen['backend']} ({chosen['isa']}), threads: {chosen['threads']}",
        f"  KV cache  {cache.num_pages} pages of {cache.block_size} tokens x {cache.slab_size} "
        f"layers, {cache.num_bytes / 2**20:.0f} MiB",
    ]
    if (replicas := serving.worker.replica_states) is not None:
        lines.append(f"  replicas  {len(replicas)}, each as above")
    try_it = ["", "Try:", "", f"  {curl(settings, url)}"]
    if settings.uds is None:
        chat = "sortserve chat" if url == DEFAULT_URL else f"sortserve chat --url {url}"
        try_it.append(f"  {chat}")
    return "\n".join([*lines, *try_it, "", _places(settings, url)])


def _places(settings: ServeSettings, url: str) -> str:
    """The last line: where everything is."""
    if settings.uds is not None:
        return f"Ready on the socket {settings.uds}. Stop with Ctrl-C."
    places = [f"API {url}"]
    if settings.playground:
        places.append(f"playground {url}/")
    if settings.enable_docs:
        places.append(f"docs {url}/docs")
    places.append(f"metrics {url}/metrics")
    return f"Ready: {' | '.join(places)}. Stop with Ctrl-C."


def base_url(settings: ServeSettings, port: int | None) -> str:
    """Where a client on this machine finds the server; the port is None on a Unix socket."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    if port is None:
        return f"{scheme}://localhost"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{scheme}://{host}:{port}"


def curl(settings: ServeSettings, url: str) -> str:
    """One request with a budget, to paste into a shell."""
    body = {
        "messages": [{"role": "user", "content": "What is gravity?"}],
        "max_tokens": 48,
        "budget": {"latency_ms": 2000},
    }
    parts = ["curl", *(["--unix-socket", settings.uds] if settings.uds else []), f"{url}/generate"]
    parts += ["-H 'Content-Type: application/json'"]
    if settings.is_guarded:
        parts += ['-H "Authorization: Bearer $SORTSERVE_API_KEY"']
    return " ".join([*parts, f"-d '{json.dumps(body)}'"])
