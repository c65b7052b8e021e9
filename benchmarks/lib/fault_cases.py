"""The faults of ``benchmarks.chaos``: what is done to a server, and what must come of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.lib import rude_clients
from benchmarks.lib.faulty_process import FaultyProcess, children_of

__all__ = ["FLAGS", "FaultCase", "Outcome", "fault_cases"]

STEP_TIMEOUT_S = 1.0
FLAGS = (
    *("--dtype", "float32", "--step-timeout", f"{STEP_TIMEOUT_S:g}", "--shutdown-timeout", "10"),
    *("--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "1"),
)
"""Of every server: replies that are the same each time, and waits that are short."""
LIMITED_S = 1.5
"""For how long the system gives nothing."""
FOUND_S = 2 * STEP_TIMEOUT_S
"""A hang is found after the time-out, at the next look."""
_serials = itertools.count(3)
Strike = Callable[[FaultyProcess], Awaitable[object]]


class Outcome(Enum):
    """What must come of a fault."""

    UNNOTICED = "all answered as without it; healthy"
    ONE_FAILS = "one request gets an error, the others their answers; healthy"
    SOME_FAIL = "errors for those it struck, answers for the others; healthy"
    ENGINE_ENDS = "every live request gets an error; 503; exit code 1"
    PROCESS_GONE = "connections end; exit by the signal; the next start serves"
    DRAINS = "all answered; 503 for newcomers; exit code 0"
    FORCED = "answered or aborted at once; exit code 143"
    LOOP_LOST = "connections end; exit code 1"
    STARTS = "it starts with a warning and serves"
    REFUSED = "one line on stderr; exit code 2"


@dataclass(frozen=True, kw_only=True)
class FaultCase:
    """One fault."""

    name: str
    part: str
    outcome: Outcome
    strike: Strike | None = None
    """Done when all requests are live; None: the fault is in ``orders`` or ``prepare``."""
    found_s: float = 0.0
    """How long it may take until it is noticed; the two seconds of an answer count from there."""
    flags: tuple[str, ...] = ()
    orders: tuple[dict[str, Any], ...] = ()
    """What the server is told before it starts."""
    point: str | None = None
    """Of ``faulty_server.POINTS``: it must have struck."""
    prepare: Callable[[Path], dict[str, str]] | None = None
    """Makes what the start meets in a folder; returns variables of the environment."""
    model: str | None = None
    """A folder of the working folder that ``prepare`` made, instead of the checkpoint."""
    log: str | None = None
    """A path that the log goes to."""
    is_fresh: bool = False
    """The server has had plain requests alone, so that it has not all the threads it may have."""

    @property
    def needs_own_server(self) -> bool:
        """Whether it differs from the first one of its start."""
        return bool(self.flags or self.orders or self.prepare or self.log or self.is_fresh)


def at(
    part: str,
    point: str,
    kind: str,
    outcome: Outcome,
    *,
    times: int | None = 1,
    seconds: float = 0.0,
    name: str | None = None,
    **fields: Any,
) -> FaultCase:
    """A function that raises, hangs or is slow."""
    how = {"raise": "raises", "hang": "hangs", "slow": f"takes {seconds:g} s", "full": "disk full"}
    often = {None: ", always", 1: ""}.get(times, f", {times} times")
    return FaultCase(
        name=name or f"{point} {how.get(kind, kind)}{often}",
        part=part,
        outcome=outcome,
        strike=lambda server: server.arm(point, kind, times, seconds=seconds),
        point=point,
        found_s=FOUND_S if kind == "hang" else seconds,
        **fields,
    )


def fault_cases() -> list[FaultCase]:
    """All of them, those first that leave the server as it is."""
    return [*_harmless(), *_guilty(), *_clients(), *_clocks(), *_resources(), *_ends(), *_starts()]


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


# ---- the engine or the process ends ----


def _ends() -> list[FaultCase]:
    ends = Outcome.ENGINE_ENDS

    def signalled(number: signal.Signals, times: int = 1) -> Strike:
        async def strike(server: FaultyProcess) -> None:
            for _ in range(times):
                os.kill(server.pid, number)
                await asyncio.sleep(0.02)

        return strike

    raises = ("schedule", "pages", "prefix publishing", "commit")
    hangs = (
        *("schedule", "pages", "host batch", "forward", "sampling", "grammar mask"),
        *("detokenise", "commit"),
    )

    async def looked_up(server: FaultyProcess) -> None:
        await server.arm("prefix look-up", "raise", 1)
        await rude_clients.ask(server.client)  # one that is admitted meets it

    async def aborted(server: FaultyProcess) -> None:
        await server.arm("abort", "raise", 1)
        await rude_clients.leave_once(server)

    async def block_loop(server: FaultyProcess) -> None:
        await server.arm("metrics page", "hang", 1)
        await server.status("/metrics", 0.1)

    first = ("--max-failed-steps", "1")  # all may be in one step, and then no other follows
    return [
        at("step", "forward", "raise", ends, times=None, flags=first),
        at("step", "sampling", "raise", ends, times=None, flags=first),
        at("step", "schedule", "exit", ends, name="the engine's thread is told to exit"),
        FaultCase(
            name="prefix look-up raises",
            part="step",
            outcome=ends,
            strike=looked_up,
            point="prefix look-up",
        ),
        FaultCase(name="abort raises", part="step", outcome=ends, strike=aborted, point="abort"),
        FaultCase(
            name="event loop hangs",
            part="event loop",
            outcome=Outcome.LOOP_LOST,
            strike=block_loop,
            found_s=FOUND_S,
            point="metrics page",
        ),
        FaultCase(
            name="kill -9 of the server",
            part="processes",
            outcome=Outcome.PROCESS_GONE,
            strike=signalled(signal.SIGKILL),
        ),
        FaultCase(
            name="SIGTERM under load",
            part="processes",
            outcome=Outcome.DRAINS,
            strike=signalled(signal.SIGTERM),
        ),
        FaultCase(
            name="SIGTERM twice under load",
            part="processes",
            outcome=Outcome.FORCED,
            strike=signalled(signal.SIGTERM, 2),
        ),
        *(at("step", name, "raise", ends) for name in raises),
        *(at("step", name, "hang", ends) for name in hangs),
    ]


# ---- what a start meets ----


def _starts() -> list[FaultCase]:
    starts, refused = Outcome.STARTS, Outcome.REFUSED

    def armed(point: str, kind: str) -> dict[str, Any]:
        return {"do": "arm", "point": point, "kind": kind}

    def at_start(name: str, outcome: Outcome, **fields: Any) -> FaultCase:
        return FaultCase(name=name, part="files", outcome=outcome, **fields)

    return [
        at_start("log on a full disk (/dev/full)", starts, log="/dev/full"),
        at_start(
            "calibration cache: disk full",
            starts,
            orders=(armed("atomic write", "full"),),
            flags=("--backend", "reference"),
            prepare=_new_cache,
            point="atomic write",
        ),
        at_start(
            "weights cache: disk full",
            starts,
            orders=(armed("weights write", "full"),),
            flags=("--backend", "reference"),
            prepare=_new_cache,
            model="adapter",
            point="weights write",
        ),
        at_start(
            "cache on a file system of 64 KiB",
            starts,
            flags=("--backend", "reference"),
            prepare=_tiny_file_system,
            model="adapter",
        ),
        at_start("weights that end too early", refused, prepare=_cut_weights, model="cut"),
        at_start("trace collector that never answers", starts, prepare=rude_clients.mute_collector),
        _keys("keys file becomes wrong", "keys: [nonsense"),
        _keys("keys file vanishes", None),
    ]


def _new_cache(folder: Path) -> dict[str, str]:
    cache = folder / f"cache-{os.urandom(4).hex()}"
    return {"SORTSERVE_CACHE_DIR": str(cache)}


def _tiny_file_system(folder: Path) -> dict[str, str]:
    """A mount of its own where we may; else a limit of the size of files does the same."""
    mount = folder / "tiny-fs"
    mount.mkdir(exist_ok=True)
    if os.system(f"mount -t tmpfs -o size=64k,mode=700 none '{mount}' 2>/dev/null") != 0:
        return {"SORTSERVE_CACHE_DIR": "/dev/full/cache"}
    return {"SORTSERVE_CACHE_DIR": str(mount / "cache")}


def _cut_weights(folder: Path) -> dict[str, str]:
    from benchmarks.lib.tiny_checkpoint import write_tiny_checkpoint

    weights = write_tiny_checkpoint(folder / "cut") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return {}


def _keys(name: str, content: str | None) -> FaultCase:
    def prepare(folder: Path) -> dict[str, str]:
        (folder / "keys.yaml").write_text(rude_clients.KEYS_FILE, encoding="utf-8")
        return {"SORTSERVE_API_KEYS_FILE": str(folder / "keys.yaml")}

    async def strike(server: FaultyProcess) -> None:
        path = Path(server.env["SORTSERVE_API_KEYS_FILE"])
        if content is None:
            path.unlink()
        else:
            path.write_text(content, encoding="utf-8")
        os.kill(server.pid, signal.SIGHUP)
        await asyncio.sleep(1.5)
        status = await rude_clients.ask(server.client)
        assert status == 200, f"the old key got {status}"

    return FaultCase(
        name=name, part="files", outcome=Outcome.STARTS, prepare=prepare, strike=strike, found_s=1.5
    )
