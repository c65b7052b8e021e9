"""What a replica says of itself, so that a router can tell what a request would get (no torch).

A report is a plain value of some kilobytes: it can be pickled, and ``document`` and
``from_document`` carry it as JSON. ``load_of`` makes it on demand, in about a millisecond, from
what admission, the cost model and the page pool know anyhow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from sortserve.admission.forecast import forecast
from sortserve.admission.outlook import Newcomer, Outlook
from sortserve.admission.room import Room
from sortserve.core.budget import ExitInfo, ExitTable
from sortserve.core.request import EngineStats

__all__ = ["MAX_DUE", "MAX_PREFIXES", "TYPICAL_TOKENS", "EngineLoad", "ExitLoad", "load_of"]

MAX_PREFIXES = 256
"""Most prefixes that a report names, the latest used."""
MAX_DUE = 8
"""Most moments of which a report says what is due by then."""
TYPICAL_TOKENS = 128
"""Prompt and answer length of the newcomer whose times a report predicts."""


@dataclass(frozen=True, kw_only=True)
class ExitLoad:
    """One exit of a replica: what it is worth, what it costs, and how busy it is."""

    exit_layer: int
    score: float
    """What one of its tokens is worth beside one of the full model (``ExitTable.scores``)."""
    compute: float
    """Share of the full model's FLOPs per token; in (0, 1]."""
    num_rows: int = 0
    """Requests that hold pages and are at this exit now."""
    ttft_ms: float | None = None
    """Predicted for a newcomer of ``TYPICAL_TOKENS`` without a budget; None: not calibrated."""
    tpot_ms: float | None = None
    """Predicted time per token of the same newcomer."""
    step_ms: float = 0.0
    """A step to this exit, however many rows."""
    row_ms: float = 0.0
    """One more row that decodes in such a step, with a context of ``TYPICAL_TOKENS``."""
    prompt_ms: float = 0.0
    """A step that reads a prompt to this exit, however many tokens."""
    prompt_token_ms: float = 0.0
    """One more token of the prompt."""
    steps_per_s: float = 0.0
    """Steps to this exit or deeper that the live requests need each second."""


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """A replica at one moment. Times are predicted with the safety factor of admission."""

    time_s: float
    """When it was made, on the replica's clock."""
    exits: tuple[ExitLoad, ...]
    """Ascending; the last is the full model."""
    min_quality: float = 0.0
    """The floor of requests that name none."""
    is_measured: bool = True
    """Whether the scores are measured quality; else they are shares of the layers."""
    pressure: float = 0.0
    """Share of the machine that the live promises need at their present exits; above 1 some are
    late, or will go shallower."""
    decode_pressure: float = 0.0
    """The part of it that lasts once all prompts are read."""
    floor_pressure: float = 0.0
    """The pressure if all of them were as shallow as they may be."""
    floor_decode_pressure: float = 0.0
    """The lasting part of that."""
    floor_loss: float = 0.0
    """What would be lost by that: scores times weights, summed over their requests."""
    due: tuple[tuple[float, float], ...] = ()
    """Prompts to be read: milliseconds of work in all that are due within so many milliseconds.
    At most ``MAX_DUE`` pairs (due, work), both ascending."""
    spare_ms: float | None = None
    """What the answer with the least time to spare has if from now on each step runs everybody;
    None: nobody has an end to keep."""
    full_batch: tuple[tuple[float, float], ...] = ()
    """Such a course: steps, and milliseconds until they are over; after none, what reading the
    prompts adds to them. At most ``MAX_DUE`` pairs and one, both ascending."""
    full_batch_layer: int = 0
    """The deepest exit of its rows."""
    busy_ms: float = 0.0
    """What it still does for no request."""
    step_left_ms: float = 0.0
    """What the step under way still takes, in the mean."""
    soft_ms: float = 0.0
    """Work of the prompts that nobody was promised a time for."""
    num_running: int = 0
    num_waiting: int = 0
    """Requests that hold no pages yet."""
    num_waiting_tokens: int = 0
    """Of their prompts."""
    num_slots: int = 1
    """Requests that may run at once."""
    num_free_pages: int = 0
    """Cached ones included."""
    num_pages: int = 0
    block_size: int = 16
    """Tokens of a page."""
    prefixes: Mapping[str, int] = field(default_factory=dict)
    """Digests of leading blocks that the cache holds (``prefix_digests``), and the deepest exit
    that it holds them for. At most ``MAX_PREFIXES``."""
    is_calibrated: bool = True
    """Whether the times mean anything: false without a cost model."""
    is_accepting: bool = True
    """Whether it takes new requests: false while it loads or drains, or has failed."""

    @cached_property
    def table(self) -> ExitTable:
        """The exits as budgets are read with them."""
        infos = (
            ExitInfo(
                exit_layer=own.exit_layer, num_parameters=0, compute=own.compute, score=own.score
            )
            for own in self.exits
        )
        return ExitTable(tuple(infos), min_quality=self.min_quality)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON has it; ``from_document`` reads it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> EngineLoad:
        """The load that a document stands for; what a newer server says beside it is left out.

        Raises:
            ValueError: it is no such document.
        """
        try:
            values = _known(cls, document)
            values["exits"] = tuple(ExitLoad(**_known(ExitLoad, own)) for own in values["exits"])
            for name in ("due", "full_batch"):
                values[name] = tuple((float(a), float(b)) for a, b in values.get(name, ()))
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is not what a replica says of its load: {error!r}.") from None


def _known(cls: type, document: Mapping[str, Any]) -> dict[str, Any]:
    names = {own.name for own in fields(cls)}
    return {name: value for name, value in document.items() if name in names}


def load_of(
    outlook: Outlook | None,
    *,
    exits: ExitTable,
    stats: EngineStats,
    room: Room,
    time_s: float,
    prefixes: Mapping[str, int] | None = None,
    is_accepting: bool = True,
) -> EngineLoad:
    """The report of an engine.

    Args:
        outlook: what a newcomer would meet; None: not calibrated.
        exits: of its checkpoint.
        stats: after its last step.
        room: its slots and pages.
        time_s: now.
        prefixes: see ``EngineLoad.prefixes``.
        is_accepting: whether it takes requests.
    """
    parts = () if outlook is None else tuple(_exit_loads(exits, stats, outlook))
    return EngineLoad(
        time_s=time_s,
        exits=parts or tuple(_bare_exits(exits, stats)),
        min_quality=exits.min_quality,
        is_measured=exits.is_measured,
        **({} if outlook is None else _pressures(outlook)),
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_slots=room.num_slots,
        num_free_pages=room.num_free_pages,
        num_pages=room.num_pages,
        block_size=room.block_size,
        prefixes=dict(prefixes or {}),
        is_calibrated=outlook is not None,
        is_accepting=is_accepting,
    )


def _bare_exits(exits: ExitTable, stats: EngineStats) -> list[ExitLoad]:
    return [
        ExitLoad(
            exit_layer=info.exit_layer,
            score=exits.scores[info.exit_layer],
            compute=info.compute,
            num_rows=stats.running_by_exit.get(info.exit_layer, 0),
        )
        for info in exits.exits
    ]


def _exit_loads(exits: ExitTable, stats: EngineStats, outlook: Outlook) -> list[ExitLoad]:
    costs, table = outlook.costs, outlook.table
    newcomer = Newcomer(
        num_prompt_tokens=TYPICAL_TOKENS,
        num_output_tokens=TYPICAL_TOKENS,
        arrival_s=outlook.load.now,
    )
    asks = table.decodes.copy()
    asks[table.prompts] = True
    rates, depths = table.rate[asks], table.layers[table.level[asks]]
    rows = dict(stats.running_by_exit)
    loads = []
    for info in exits.exits:
        depth = info.exit_layer
        estimate = forecast(depth, newcomer, outlook).estimate
        at_all, per_layer = costs.reading_line(TYPICAL_TOKENS, 0)
        token_s = costs.token_s(depth, TYPICAL_TOKENS // 2)
        loads.append(
            ExitLoad(
                exit_layer=depth,
                score=exits.scores[depth],
                compute=info.compute,
                num_rows=rows.get(depth, 0),
                ttft_ms=1e3 * estimate.ttft_s,
                tpot_ms=1e3 * estimate.tpot_s,
                step_ms=1e3 * costs.base_s(depth),
                row_ms=1e3 * costs.row_s(depth, TYPICAL_TOKENS),
                prompt_ms=1e3 * max(0.0, at_all + depth * per_layer - TYPICAL_TOKENS * token_s),
                prompt_token_ms=1e3 * token_s,
                steps_per_s=float(rates[depths >= depth].max(initial=0.0)),
            )
        )
    return loads


def _pressures(outlook: Outlook) -> dict[str, Any]:
    table, paced = outlook.table, outlook.pacing
    asks = table.decodes.copy()
    asks[table.prompts] = True
    lost = outlook.worth[table.level] - outlook.worth[table.floor]
    return {
        "pressure": table.need(table.level, **paced).share,
        "decode_pressure": table.decode_share(asks),
        "floor_pressure": table.need(table.floor, **paced).share,
        "floor_decode_pressure": replace(table, level=table.floor).decode_share(asks),
        "floor_loss": float((table.weight * table.left_share * lost).sum()),
        "due": _due(outlook),
        **_full_batch(outlook),
        "busy_ms": 1e3 * max(0.0, outlook.ahead_s),
        "step_left_ms": 1e3 * outlook.busy_s,
        "soft_ms": 1e3 * float(outlook.prompts.work_s[~outlook.prompts.is_hard].sum()),
    }


def _full_batch(outlook: Outlook) -> dict[str, Any]:
    """The course in which each step runs everybody."""
    table, found = outlook.table, outlook.full_batch
    if not len(found.rows):
        return {}
    spare_s = found.least_spare_s(table, now=outlook.load.now, busy_s=outlook.ahead_s)
    at = np.unique(np.linspace(0, len(found.rows) - 1, MAX_DUE).round().astype(int))
    return {
        "spare_ms": 1e3 * spare_s if np.isfinite(spare_s) else None,
        "full_batch": (
            (0.0, 1e3 * found.reading_s),
            *((float(found.num_steps[i]), 1e3 * float(found.over_s[i])) for i in at),
        ),
        "full_batch_layer": int(table.layers[table.level[found.rows].max()]),
    }


def _due(outlook: Outlook) -> tuple[tuple[float, float], ...]:
    """What is to be read by when; of many prompts, those at which most has come together."""
    prompts = outlook.prompts
    hard = np.flatnonzero(prompts.is_hard)
    if not len(hard):
        return ()
    order = hard[np.argsort(prompts.due_s[hard], kind="stable")]
    due_ms = 1e3 * (prompts.due_s[order] - outlook.load.now)
    work_ms = 1e3 * np.cumsum(prompts.work_s[order])
    at = np.unique(np.linspace(0, len(order) - 1, MAX_DUE).round().astype(int))
    return tuple((float(due_ms[i]), float(work_ms[i])) for i in at)
