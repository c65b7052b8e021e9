"""Where the newcomers of an engine are judged, and who is told of it (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from sortserve.admission.choose import ExitChoice
from sortserve.admission.desk import AdmissionDesk
from sortserve.admission.room import Room
from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import EngineStats, Request
from sortserve.engine.engine import Engine
from sortserve.engine.probe import prober_of
from sortserve.replicas.load import MAX_PREFIXES, EngineLoad, load_of

__all__ = ["Reception", "desk_of", "load_report", "room_of"]


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
        overload_degrade=engine.config.overload_degrade,
        clock=engine.clock,
        expect=engine.expect,
        costs=engine.costs,
        held=lambda request: engine.kv_cache.held_tokens(request, engine.exits.layers),
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
        slabs=kv_cache.slabs,
    )


def load_report(
    engine: Engine, desk: AdmissionDesk, stats: EngineStats, *, is_accepting: bool = True
) -> EngineLoad:
    """What an engine says of itself to those who could send it requests.

    Args:
        engine: between two steps, or at any moment for the thread of the desk.
        desk: its own.
        stats: after its last step.
        is_accepting: whether it takes requests.
    """
    prefixes = engine.kv_cache.held_prefixes(engine.exits.layers, most=MAX_PREFIXES)
    return desk.look(
        partial(
            load_of,
            exits=engine.exits,
            stats=stats,
            room=room_of(engine),
            time_s=engine.clock(),
            prefixes=prefixes,
            is_accepting=is_accepting,
        )
    )


class Reception:
    """Lets requests in on the event loop's thread; the engine's observer is told of refusals."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.prober = prober_of(engine)
        """Times steps while all are refused."""
        self.desk = desk_of(
            engine,
            busy_until_s=self.prober.busy_until_s,
            on_failure=self._forecast_failed,
        )

    def choose(
        self, request: Request, *, exit_layer: int | None = None, num_sequences: int = 1
    ) -> ExitChoice:
        """Where a request starts.

        Args:
            request: to be validated.
            exit_layer: as ``AdmissionDesk.choose`` has it.
            num_sequences: likewise.

        Raises:
            InvalidRequestError: it can never be served; ``param`` names the field.
            BudgetUnattainableError: no exit fits and the budget says reject.
        """
        allowed = self._engine.validate(request)
        try:
            return self.desk.choose(
                request, allowed, exit_layer=exit_layer, num_sequences=num_sequences
            )
        except BudgetUnattainableError:
            self.prober.want()
            self.rejected("budget_unattainable", request.budget)
            raise

    def load(self, stats: EngineStats, *, is_accepting: bool) -> EngineLoad:
        """See ``load_report``."""
        return load_report(self._engine, self.desk, stats, is_accepting=is_accepting)

    def rejected(self, reason: str, budget: Budget | None = None) -> None:
        """A request is refused before any compute."""
        self._engine.tell(lambda observer: observer.on_rejected(reason, budget))

    def _forecast_failed(self) -> None:
        self._engine.tell(lambda observer: observer.on_forecast_failed())
