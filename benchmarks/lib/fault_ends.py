"""Faults after which the engine or the process ends, and those that a start meets."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from benchmarks.lib import rude_clients
from benchmarks.lib.fault_case import FOUND_S, FaultCase, Outcome, Strike, at
from benchmarks.lib.faulty_process import FaultyProcess

__all__ = ["ends", "starts"]


def ends() -> list[FaultCase]:
    """The engine or the process ends."""
    over = Outcome.ENGINE_ENDS

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
        at("step", "forward", "raise", over, times=None, flags=first),
        at("step", "sampling", "raise", over, times=None, flags=first),
        at("step", "schedule", "exit", over, name="the engine's thread is told to exit"),
        FaultCase(
            name="prefix look-up raises",
            part="step",
            outcome=over,
            strike=looked_up,
            point="prefix look-up",
        ),
        FaultCase(name="abort raises", part="step", outcome=over, strike=aborted, point="abort"),
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
        *(at("step", name, "raise", over) for name in raises),
        *(at("step", name, "hang", over) for name in hangs),
    ]


def starts() -> list[FaultCase]:
    """What a start meets."""
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
