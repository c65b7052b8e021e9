"""Faults of ``benchmarks.chaos`` that a server outlives; the others are in ``fault_ends.py``."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal

from benchmarks.lib import rude_clients
from benchmarks.lib.fault_case import STEP_TIMEOUT_S, FaultCase, Outcome, Strike, at
from benchmarks.lib.fault_ends import ends, starts
from benchmarks.lib.faulty_process import FaultyProcess, children_of

__all__ = ["fault_cases"]

LIMITED_S = 1.5
"""For how long the system gives nothing."""
_serials = itertools.count(3)


def fault_cases() -> list[FaultCase]:
    """All of them, those first that leave the server as it is."""
    return [*_harmless(), *_guilty(), *_clients(), *_clocks(), *_resources(), *ends(), *starts()]


# ---- parts that may fail and cost nobody anything ----


def _harmless() -> list[FaultCase]:
    outcome = Outcome.UNNOTICED
    once = {
        "step": ("policy", "host batch", "forward", "head", "sampling", "cost update"),
        "host": ("engine's view", "step record", "learned lengths", "report"),
        "telemetry": (
            *("metrics of steps", "metrics of requests", "metrics of HTTP"),
            *("request log", "log line"),
        ),
    }
    cases = [at(part, name, "raise", outcome) for part, names in once.items() for name in names]
    always = {
        "telemetry": ("metrics of steps", "metrics of HTTP", "log line"),
        "step": ("policy", "cost update"),
    }
    cases += [
        at(part, name, "raise", outcome, times=None)
        for part, names in always.items()
        for name in names
    ]
    return [
        *cases,
        at("memory", "forward", "memory", outcome, name="an allocation fails in the forward pass"),
        at("step", "forward", "slow", outcome, seconds=0.5),
        at(
            "event loop", "chunk", "slow", outcome, seconds=0.7, name="event loop blocked for 0.7 s"
        ),
        _page("metrics page", "/metrics"),
    ]


def _page(point: str, path: str) -> FaultCase:
    async def strike(server: FaultyProcess) -> None:
        await server.arm(point, "raise", 1)
        assert await server.status(path) == 500

    return FaultCase(
        name=f"{point} raises",
        part="telemetry",
        outcome=Outcome.UNNOTICED,
        strike=strike,
        point=point,
    )


# ---- parts that fail for one request ----


def _guilty() -> list[FaultCase]:
    outcome = Outcome.ONE_FAILS
    steps = ("grammar advance", "detokenise", "stop strings", "token append", "finish")
    return [
        *(at("step", name, "raise", outcome) for name in steps),
        at("step", "grammar mask", "raise", Outcome.SOME_FAIL, times=None),
        at("API", "chunk", "raise", outcome),
        at("API", "body", "raise", outcome),
        at("API", "delivery", "raise", outcome),
        at("API", "body", "memory", outcome, name="an allocation fails as a body is written"),
        *(_newcomer(name, 500) for name in ("tokenise", "queue", "request taken")),
        *(_newcomer(name, 500) for name in ("grammar compiler", "admission entry")),
        _newcomer("admission search", 200),
    ]


def _newcomer(point: str, status: int) -> FaultCase:
    """A request that comes while others run, meets the fault, and gets a status."""

    async def strike(server: FaultyProcess) -> None:
        await server.arm(point, "raise", 1)
        form = f"[xy]{{{next(_serials)}}}"  # none that has been compiled before
        got = await rude_clients.ask(server.client, structured=form)
        assert got == status, f"a newcomer got {got}, not {status}"
        got = await rude_clients.ask(server.client, structured=form)
        assert got == 200, f"the next newcomer got {got}, not 200"

    return FaultCase(
        name=f"{point} raises for a newcomer",
        part="API",
        outcome=Outcome.UNNOTICED,
        strike=strike,
        point=point,
    )


# ---- clients ----


def _clients() -> list[FaultCase]:
    kinds: dict[str, Strike] = {
        "forty half-open connections": rude_clients.half_open,
        "twenty slow loris": rude_clients.slow_loris,
        "forty resets in mid-body": rude_clients.resets_in_mid_body,
        "forty resets in mid-stream": rude_clients.resets_in_mid_stream,
        "ten floods of headers": rude_clients.header_floods,
        "sixty pipelined requests": rude_clients.pipelined,
        "ten readers that do not read": rude_clients.slow_readers,
        "bytes that are no HTTP": rude_clients.garbage,
    }
    return [
        FaultCase(name=name, part="clients", outcome=Outcome.UNNOTICED, strike=strike, found_s=6.0)
        for name, strike in kinds.items()
    ]


# ---- clocks ----


def _clocks() -> list[FaultCase]:
    hour = 3600.0

    def jump(name: str, **clocks: float) -> FaultCase:
        async def strike(server: FaultyProcess) -> None:
            await server.order("clocks", **clocks)

        return FaultCase(name=name, part="clocks", outcome=Outcome.UNNOTICED, strike=strike)

    async def stopped(server: FaultyProcess) -> None:
        os.kill(server.pid, signal.SIGSTOP)
        await asyncio.sleep(3 * STEP_TIMEOUT_S)
        os.kill(server.pid, signal.SIGCONT)

    return [
        jump("wall clock a day ahead", wall=24 * hour),
        jump("wall clock a day back", wall=-24 * hour),
        jump("monotonic clock 20 s ahead", monotonic=20.0),
        jump("monotonic clock 5 s back", monotonic=-5.0),
        FaultCase(
            name="process stopped for 3 s (SIGSTOP)",
            part="clocks",
            outcome=Outcome.UNNOTICED,
            strike=stopped,
            found_s=0.0,
        ),
    ]


# ---- what the system gives ----


def _resources() -> list[FaultCase]:
    async def no_files(server: FaultyProcess) -> None:
        await server.order("limit", resource_name="NOFILE", seconds=2 * LIMITED_S)
        status = await rude_clients.ask(server.client, patience_s=LIMITED_S)
        assert status == 0, f"a connection was taken and got {status} although no file was left"
        status = await rude_clients.ask(server.client)
        assert status == 200, f"a connection got {status} when there were files again"

    async def no_memory(server: FaultyProcess) -> None:
        await server.order("limit", resource_name="AS", seconds=2 * LIMITED_S)
        got = await rude_clients.big_requests(server.client, 60)
        assert set(got) != {400}, "no large request met the limit of memory"
        assert set(got) <= {0, 400, 500}, f"large requests got {got}"

    async def no_threads(server: FaultyProcess) -> None:
        await server.arm("new thread", "thread")
        got = await rude_clients.big_requests(server.client)
        assert set(got) == {500}, f"large requests got {got}"

    def on_renderer(number: signal.Signals) -> Strike:
        async def strike(server: FaultyProcess) -> None:
            for pid in children_of(server.pid):
                os.kill(pid, number)
            status = await rude_clients.ask(server.client, chat=True)
            assert status == 200, f"a chat got {status} after {number.name} to the renderer"

        return strike

    unnoticed, some = Outcome.UNNOTICED, Outcome.SOME_FAIL
    return [
        FaultCase(
            name="no open files left",
            part="system",
            outcome=unnoticed,
            strike=no_files,
            found_s=2 * LIMITED_S,
        ),
        FaultCase(
            name="no address space left",
            part="memory",
            outcome=some,
            strike=no_memory,
            found_s=2 * LIMITED_S,
        ),
        FaultCase(
            name="no new threads",
            part="system",
            outcome=unnoticed,
            strike=no_threads,
            found_s=2.0,
            point="new thread",
            is_fresh=True,
        ),
        FaultCase(
            name="kill -9 of template renderer and workers",
            part="processes",
            outcome=unnoticed,
            strike=on_renderer(signal.SIGKILL),
            found_s=3.0,
        ),
        FaultCase(
            name="template renderer and workers stopped (SIGSTOP)",
            part="processes",
            outcome=unnoticed,
            strike=on_renderer(signal.SIGSTOP),
            found_s=8.0,
        ),
    ]
