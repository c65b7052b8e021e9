"""The flags that the commands which ask a server share, and how its errors end them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sortserve.core.errors import ConfigError
from sortserve.process.arguments import finite_number, integer, schedule
from sortserve.process.console import CommandFailedError

if TYPE_CHECKING:
    from sortserve_client import Budget

__all__ = [
    "DEFAULT_URL",
    "add_budget_flags",
    "add_server_flags",
    "budget_of",
    "client_errors",
    "first_key",
]

DEFAULT_URL = "http://127.0.0.1:8000"


def add_server_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--url`` and ``--api-key``; returns their group."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        default=os.environ.get("SORTSERVE_URL") or DEFAULT_URL,
        help=f"default: {DEFAULT_URL}; env: SORTSERVE_URL",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("SORTSERVE_API_KEY"),
        help="env: SORTSERVE_API_KEY",
    )
    return server


def add_budget_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """One flag for each field of a budget; returns their group."""
    budget = parser.add_argument_group("budget", "what an answer may cost; all combine")
    times: dict[str, Any] = {"type": finite_number, "metavar": "MS"}
    budget.add_argument("--budget-ms", **times, help="arrival to last token")
    budget.add_argument("--ttft-ms", **times, help="arrival to first token")
    budget.add_argument("--tpot-ms", **times, help="per token after the first")
    budget.add_argument("--exit", type=integer, metavar="LAYER", help="exactly this exit layer")
    budget.add_argument(
        "--schedule",
        type=schedule,
        metavar="K:E,...",
        help="from output token K on, exit E, as in 0:30,32:27,96:24",
    )
    budget.add_argument(
        "--compute", type=finite_number, metavar="SHARE", help="of the full model's FLOPs"
    )
    budget.add_argument("--min-exit-layer", type=integer, metavar="LAYER", help="no shallower exit")
    budget.add_argument("--min-quality", type=finite_number, metavar="SCORE", help="no worse exit")
    budget.add_argument(
        "--on-miss",
        choices=("degrade", "truncate", "reject"),
        help="if no exit fits the times; default: degrade",
    )
    return budget


def budget_of(options: argparse.Namespace) -> Budget:
    """The budget that the flags of ``add_budget_flags`` ask for.

    Raises:
        ValueError: they contradict each other, or a value is not allowed.
    """
    from sortserve_client import Budget

    return Budget(
        latency_ms=options.budget_ms,
        ttft_ms=options.ttft_ms,
        tpot_ms=options.tpot_ms,
        compute=options.compute,
        exit_layer=options.exit,
        schedule=options.schedule,
        min_exit_layer=options.min_exit_layer,
        min_quality=options.min_quality,
        on_miss=options.on_miss,
    )


def first_key(keys: str | None) -> str | None:
    """The key to send: ``SORTSERVE_API_KEY`` is the server's variable too, and may hold several."""
    return keys.partition(",")[0].strip() or None if keys else None


@contextmanager
def client_errors(url: str) -> Iterator[None]:
    """What goes wrong between client and server, in the words of a command.

    Args:
        url: of the server, to name it where nobody listens.

    Raises:
        ConfigError: the request was the user's mistake.
        CommandFailedError: the server failed, or is not there.
    """
    from sortserve_client import APIConnectionError, BadRequestError
    from sortserve_client import SortserveError as ClientError

    try:
        yield
    except BadRequestError as error:
        raise ConfigError(error.message) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except APIConnectionError as error:
        # `sent` is False where there was no connection at all: then no server is the likely cause.
        hint = "" if error.sent or url != DEFAULT_URL else " Start one with `sortserve serve`."
        raise CommandFailedError(f"{error}{hint}") from error
    except ClientError as error:
        raise CommandFailedError(str(error)) from error
