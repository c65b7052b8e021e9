"""What a person should know of a server, said once at its start."""

from __future__ import annotations

import logging

from sortserve.core.budget import ExitTable
from sortserve.telemetry.logs import fields

__all__ = ["tell_of_exits", "warn_of_open_door"]

logger = logging.getLogger(__name__)


def tell_of_exits(exits: ExitTable) -> None:
    """Log what the scores are, which exits nobody gets unasked, and which are not fit to be used.

    Args:
        exits: as the engine serves them, with the floor of requests that name none.
    """
    if not exits.is_measured:
        logger.info(
            "no measured quality: each exit's score is its share of the layers "
            "(`sortserve eval` measures it)",
            extra=fields(scores=", ".join(f"{e}: {s:.2f}" for e, s in exits.scores.items())),
        )
    asked = [e for e in exits.layers if e not in exits.served_unasked]
    if asked:
        logger.info(
            "exits below --min-quality are served only to requests that name the exit, "
            "min_exit_layer or min_quality",
            extra=fields(exits=asked, min_quality=exits.min_quality),
        )
    unusable = [info.exit_layer for info in exits.exits if info.usable is False]
    if unusable:
        logger.warning(
            "exits that the evaluation found not usable: their text repeats itself or is far less "
            "likely than that of the full depth",
            extra=fields(exits=unusable),
        )


def warn_of_open_door(*, is_guarded: bool, is_local: bool) -> None:
    """Warn if whoever reaches the machine may ask the server.

    Args:
        is_guarded: whether a key is needed.
        is_local: whether only this machine reaches it: by a loopback address or a Unix socket.
    """
    if not (is_guarded or is_local):
        logger.warning(
            "no API key is needed, and other machines may reach this server: give it keys "
            "(--api-keys-file, --api-key-file), or let a proxy guard it"
        )
