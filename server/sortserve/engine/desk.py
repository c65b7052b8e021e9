"""The desk at which the newcomers of an engine are judged (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable

from sortserve.admission.desk import AdmissionDesk
from sortserve.admission.entry import Room
from sortserve.engine.engine import Engine

__all__ = ["desk_of", "room_of"]


def desk_of(
    engine: Engine,
    *,
    busy_until_s: Callable[[], float] = lambda: -math.inf,
    on_failure: Callable[[], None] = lambda: None,
) -> AdmissionDesk:
    """The desk of an engine, which asks it when to come back.

    Args:
        engine: whose policy, costs and clock the desk shares.
        busy_until_s: when what the engine does for no request should be over.
        on_failure: told each time that a forecast failed.
    """
    desk = AdmissionDesk(
        exits=engine.exits,
        policy=engine.policy,
        objective=engine.objective,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        overload_delay_s=engine.config.overload_delay_s,
        clock=engine.clock,
        expect=engine.expect,
        costs=engine.costs,
        busy_until_s=busy_until_s,
        on_failure=on_failure,
    )
    desk.see((), room=room_of(engine))
    engine.retry_after_s = desk.retry_after_s
    return desk


def room_of(engine: Engine) -> Room:
    """What requests take up of an engine while they run."""
    kv_cache = engine.kv_cache
    return Room(
        num_slots=engine.config.max_num_seqs,
        num_pages=kv_cache.pool.num_pages,
        num_free_pages=kv_cache.pool.num_free,
        block_size=kv_cache.block_size,
        slab_size=kv_cache.slab_size,
    )
