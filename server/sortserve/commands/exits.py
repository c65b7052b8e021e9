"""``sortserve exits``: what each exit costs, how good it is, and how fast it would be now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sortserve.commands.asking import add_server_flags, client_errors, first_key
from sortserve.commands.terminal import tint
from sortserve.process.arguments import Parser

if TYPE_CHECKING:
    from sortserve_client import ExitInfo, ScheduleInfo

__all__ = ["exits_command", "exits_parser", "exits_table"]

NONE = "-"


def exits_parser() -> Parser:
    """The command line of ``sortserve exits``."""
    parser = Parser(
        prog="sortserve exits",
        description="Show the exits of a running server, or of a checkpoint: what each costs, how "
        "good it is, and, of a server, how long a request of 128 tokens would take now.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="a folder, a Hugging Face id or a checkpoint that comes with sortserve (needs the "
        "extra `server`); default: ask the server",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    add_server_flags(parser)
    return parser


def exits_command(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit code.

    Raises:
        SortserveError: the checkpoint cannot be read.
        CommandFailedError: there is no server.
    """
    options = exits_parser().parse_args(arguments)
    if options.checkpoint is not None:
        exits, schedules = _of_checkpoint(options.checkpoint)
    else:
        from sortserve_client import Client

        key = first_key(options.api_key)
        with client_errors(options.url), Client(options.url, key) as client:
            exits, schedules = client.exits(), client.schedules()
    if options.json:
        entries = [_plain(asdict(info)) for info in exits]
        print(json.dumps({"exits": entries, "schedules": [_plain(asdict(s)) for s in schedules]}))
        return 0
    print(exits_table(exits))
    for measured in schedules:
        parts = ",".join(f"{k}:{exit_layer}" for k, exit_layer in measured.schedule)
        print(
            f"schedule {parts}: compute {_number(measured.compute, '.2f')}, "
            f"score {_number(measured.score, '.3f')}"
        )
    return 0


def exits_table(exits: Sequence[ExitInfo], tints: Mapping[int, str] | None = None) -> str:
    """The exits as a table; times in milliseconds, for 128 tokens in and 128 out.

    Args:
        exits: shallowest first.
        tints: an escape sequence for the name of each.
    """
    from sortserve_client import LatencyEstimate

    has_estimates = any(info.estimate is not None for info in exits)
    head = ["exit", "parameters", "compute", "score"]
    head += ["ttft ms", "tpot ms", "total ms"] if has_estimates else []
    rows = [head]
    for info in exits:
        row = [
            str(info.exit_layer),
            NONE if info.num_parameters is None else f"{info.num_parameters / 1e6:.1f} M",
            _number(info.compute, ".2f"),
            _number(info.score, ".3f"),
        ]
        if has_estimates:
            times = info.estimate or LatencyEstimate()
            row.append(_number(times.ttft_ms, ".0f"))
            row.append(_number(times.tpot_ms, ".1f"))
            row.append(_number(times.latency_ms, ".0f"))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    for i, info in enumerate(exits, start=1):
        name = rows[i][0].rjust(widths[0])
        lines[i] = tint(name, (tints or {}).get(info.exit_layer)) + lines[i][len(name) :]
        lines[i] = "  ".join([lines[i], *_notes(info)])
    return "\n".join(lines)


def _notes(info: ExitInfo) -> list[str]:
    notes = ["not usable"] if info.usable is False else []
    notes += ["only for who names it"] if info.served_unasked is False else []
    return [", ".join(notes)] if notes else []


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _of_checkpoint(reference: str) -> tuple[list[ExitInfo], list[ScheduleInfo]]:
    from sortserve.checkpoint.exits_of import exits_of
    from sortserve.commands.talkers import exit_infos, schedule_infos
    from sortserve.process.config import ServeSettings

    _, table = exits_of(reference)
    floor = ServeSettings.model_fields["min_quality"].default
    return exit_infos(replace(table, min_quality=floor)), schedule_infos(table)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is not known."""
    return {name: value for name, value in values.items() if value is not None}
