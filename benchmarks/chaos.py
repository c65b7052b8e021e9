"""Faults injected into a server under load, one by one: is everybody answered, is health right?

Each fault of ``lib/fault_cases.py`` strikes while twelve requests of all kinds are live. Then every
one of them must be answered, with its result or with an error of the API, within two seconds of
the moment at which the fault can be known (a hang is known after ``--step-timeout``, here a
second); ``/health`` and ``/livez`` must say what is true; what is answered must be, token for
token, what is answered without a fault; and the server must go on with nothing left over, or end
with the exit code that docs/operations.md names. The checkpoint is a tiny one of random weights.
Faults are put before functions of the product by a launcher: the product has no hook for them.
Linux only. The last line is one JSON document; the exit code is 1 if anything was wrong.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --only schedule --output benchmarks/results/chaos.json
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib import rude_clients
from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.fault_case import FLAGS, FaultCase, Outcome
from benchmarks.lib.fault_cases import fault_cases
from benchmarks.lib.fault_load import Round, live_requests, run_load
from benchmarks.lib.fault_verdicts import problems_with
from benchmarks.lib.faulty_process import FaultyProcess, children_of, open_files, start_faulty
from benchmarks.lib.server_process import ServerStartError, tail
from benchmarks.lib.tiny_checkpoint import write_adapter, write_tiny_checkpoint

__all__ = ["main"]

ANSWER_S = 2.0
EXIT_S = 15.0
MODEL = "chaos"
WARM_UP_ROUNDS = 2


@dataclass
class Result:
    """What came of one fault."""

    case: FaultCase
    problems: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    longest_s: float = 0.0
    health: tuple[int, int] = (0, 0)
    exit_code: int | None = None

    def row(self) -> list[object]:
        """For the table."""
        ends = " ".join(f"{name} {count}" for name, count in self.ends.items() if count)
        health = "/".join(str(status or "-") for status in self.health)
        return [
            self.case.name,
            self.case.part,
            self.case.outcome.name.lower(),
            ends,
            round(self.longest_s, 2),
            health,
            self.exit_code,
            "ok" if not self.problems else "WRONG",
        ]


class Chaos:
    """Runs the faults; keeps a server as long as they leave it alive."""

    def __init__(self, folder: Path, *, is_hasty: bool = False) -> None:
        self._folder = folder
        self._is_hasty = is_hasty
        self._spare: asyncio.Task[FaultyProcess] | None = None
        """A server that starts while the one before it is struck."""
        self._model = write_tiny_checkpoint(folder / "tiny")
        write_adapter(folder / "adapter", self._model)
        self._server: FaultyProcess | None = None
        self._expected: dict[str, str] = {}
        self._usual_s = 0.0
        self._asks = live_requests(MODEL)

    async def run(self, case: FaultCase) -> Result:
        """One fault."""
        result = Result(case)
        if case.outcome is Outcome.REFUSED:
            await self._refused(case, result)
            return result
        try:
            server, is_own = await self._server_for(case)
        except ServerStartError as error:
            result.problems.append(f"no start: {error}")
            return result
        try:
            await self._strike(server, case, result)
        except (AssertionError, OSError) as error:
            result.problems.append(f"{type(error).__name__}: {error}")
        lives = server.process.poll() is None
        if is_own or not lives or result.problems:
            if result.problems:
                result.problems.append(f"the log's end: {tail(server.log, 4)}")
            self._end(server)
        return result

    async def close(self) -> None:
        """End the servers."""
        if self._server is not None:
            self._end(self._server)
        if self._spare is not None:
            self._spare.cancel()
            with suppress(asyncio.CancelledError, ServerStartError):
                (await self._spare).end()

    def _end(self, server: FaultyProcess) -> None:
        server.end()
        if server is self._server:
            self._server = None

    async def _server_for(self, case: FaultCase) -> tuple[FaultyProcess, bool]:
        if case.needs_own_server:
            env = {} if case.prepare is None else case.prepare(self._folder)
            server = await self._start(case, env)
            if not case.is_fresh:
                await self._learn(server)
            elif not self._expected:
                other = await self._start(None, {})
                await self._learn(other)
                other.end()
            return server, True
        if self._server is None:
            self._server = await (self._spare or self._start(None, {}))
            self._spare = asyncio.create_task(self._start(None, {})) if self._is_hasty else None
            if case.outcome not in ENDING or not self._expected:
                await self._learn(self._server)
        return self._server, False

    async def _start(self, case: FaultCase | None, env: dict[str, str]) -> FaultyProcess:
        model = self._model if case is None or case.model is None else self._folder / case.model
        flags = () if case is None else case.flags
        server = await start_faulty(
            [str(model), "--served-model-name", MODEL, *FLAGS, *flags],
            folder=self._folder,
            orders=() if case is None else case.orders,
            env=env,
            log=None if case is None or case.log is None else Path(case.log),
        )
        server.client.authorise(rude_clients.KEY)
        server.notes["files"] = _own_files(server)
        return server

    async def _learn(self, server: FaultyProcess) -> None:
        """What is answered without a fault, and how long it takes."""
        for _ in range(WARM_UP_ROUNDS):
            calm = await run_load(server.client, self._asks)
            assert calm.count("whole") == len(self._asks), [
                (a.ask.name, a.end, a.status, a.error) for a in calm.answers if a.end != "whole"
            ]
        self._expected, self._usual_s = calm.texts(), calm.longest_s
        await rude_clients.ask(server.client, structured="[xy]{2}")
        await rude_clients.big_requests(server.client)
        await server.left_over()
        server.client.close()  # its idle connections are open files of the server
        await asyncio.sleep(0.3)
        server.notes["files"] = _own_files(server)

    async def _strike(self, server: FaultyProcess, case: FaultCase, result: Result) -> None:
        strike = case.strike

        async def struck() -> None:
            if strike is not None:
                await strike(server)

        asks = [ask for ask in self._asks if ask.is_plain or not case.is_fresh]
        got = await run_load(server.client, asks, struck)
        result.ends = {name: got.count(name) for name in ("whole", "error", "cut", "none")}
        result.longest_s = got.longest_s
        result.health = (await server.status("/health"), await server.status("/livez"))
        if case.outcome in ENDING:
            result.exit_code = await server.exit_code(EXIT_S)
        result.problems += problems_with(
            case.outcome,
            got,
            expected=self._expected,
            within_s=self._within_s(case, got),
            health=result.health,
            exit_code=result.exit_code,
        )
        if case.outcome not in ENDING:
            await self._look_after(server, case, result)
        elif case.outcome is Outcome.PROCESS_GONE:
            again = await self._start(None, {})
            after = await run_load(again.client, self._asks)
            again.end()
            if after.texts() != self._expected:
                result.problems.append("the next start does not serve the same")

    def _within_s(self, case: FaultCase, got: Round) -> float:
        """Requests that go on take their usual time beside the two seconds."""
        goes_on = case.outcome not in ENDING or case.outcome is Outcome.DRAINS
        return ANSWER_S + case.found_s + (4.0 * self._usual_s if goes_on else 0.0)

    async def _look_after(self, server: FaultyProcess, case: FaultCase, result: Result) -> None:
        """The fault is over: all must be as it was."""
        look = await server.order("look")
        if case.point is not None and not look["struck"].get(case.point):
            result.problems.append(f"the fault at {case.point} did not strike")
        await server.order("disarm")
        await server.order("clocks")
        after = await run_load(server.client, self._asks)
        if after.texts() != self._expected:
            wrong = [(a.ask.name, a.end, a.status) for a in after.answers if a.end != "whole"]
            result.problems.append(f"afterwards the answers are others: {wrong}")
        result.problems += await server.left_over()
        server.client.close()
        more = await _settled_files(server, server.notes["files"])
        if more > 0:
            result.problems.append(f"{more} more open files")

    async def _refused(self, case: FaultCase, result: Result) -> None:
        env = {} if case.prepare is None else case.prepare(self._folder)
        server = await start_faulty(
            [str(self._folder / (case.model or "tiny")), *FLAGS, *case.flags],
            folder=self._folder,
            env=env,
            wait=False,
        )
        result.exit_code = await server.exit_code(60.0)
        if result.exit_code != 2:
            result.problems.append(f"exit code {result.exit_code}, not 2: {tail(server.log, 4)}")
        server.end()


ENDING = frozenset(
    {
        Outcome.ENGINE_ENDS,
        Outcome.PROCESS_GONE,
        Outcome.DRAINS,
        Outcome.FORCED,
        Outcome.LOOP_LOST,
    }
)


def _own_files(server: FaultyProcess) -> int:
    """Open files but for one to each helper: there are more of those when chats come at once."""
    return open_files(server.pid) - len(children_of(server.pid))


async def _settled_files(server: FaultyProcess, usual: int, patience_s: float = 5.0) -> int:
    """How many more files are open than usual, when connections have had time to close."""
    end_s = time.monotonic() + patience_s
    while (more := _own_files(server) - usual) > 0 and time.monotonic() < end_s:
        await asyncio.sleep(0.1)
    return more


async def _run(cases: Sequence[FaultCase], attempts: int) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        is_hasty = sum(case.outcome in ENDING for case in cases) > 1
        chaos = Chaos(Path(folder), is_hasty=is_hasty)
        try:
            for case in cases:
                for _ in range(attempts):
                    result = await chaos.run(case)
                    if not result.problems:
                        break
                results.append(result)
                print(*result.row(), sep="  ", file=sys.stderr, flush=True)
                for problem in result.problems:
                    print("   ", problem, file=sys.stderr, flush=True)
        finally:
            await chaos.close()
            _unmount(Path(folder))
    return results


def _unmount(folder: Path) -> None:
    import subprocess

    for mount in folder.glob("*-fs"):
        subprocess.run(["umount", str(mount)], check=False, capture_output=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--from", dest="first", default="", help="begin at the first such fault")
    parser.add_argument("--attempts", type=int, default=2, help="on a busy machine the best counts")
    parser.add_argument("--output", type=Path, help="write the JSON document there, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the faults, prints what came of them; 1 if anything was wrong."""
    arguments = parse_arguments(argv)
    described = environment()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the server ends, too
    faults = fault_cases()
    begin = next((i for i, case in enumerate(faults) if arguments.first in case.name), len(faults))
    cases = [case for case in faults[begin:] if arguments.only in case.name]
    results = asyncio.run(_run(cases, arguments.attempts))
    header = ["fault", "part", "outcome", "answers", "last after s", "health", "exit", ""]
    print_table(header, [result.row() for result in results])
    wrong = [result for result in results if result.problems]
    document: dict[str, Any] = {
        "faults": {
            r.case.name: {
                "outcome": r.case.outcome.value,
                "answers": r.ends,
                "last_after_s": round(r.longest_s, 3),
                "health": r.health,
                "exit_code": r.exit_code,
                "problems": r.problems,
            }
            for r in results
        },
        "num_faults": len(results),
        "num_wrong": len(wrong),
    }
    print_json("chaos", arguments, described, document, arguments.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
