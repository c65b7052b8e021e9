"""Hours of mixed load on one server: does memory stay flat, is nothing left over, does speed last?

Starts a server, then keeps it busy with requests of every route and budget, with clients that leave
in mid-stream, read slowly or reset their connections, with wrong input of every kind, and with keys
at their limits. A fixed probe request runs beside them every two seconds, and a fixed computation
of our own beside the probe, which tells a slower machine from a slower server. After the warm-up (a
fifth of the time) the load pauses once, so that what an idle server holds is known.

Held to: resident memory within 3 % from the first third after the warm-up to the last; TTFT and
TPOT of the probe within 15 % (as they are, or divided by the time of our own computation and by how
long the server's threads wait for a processor; not judged where that changed by a quarter); no 5xx
and no stream without its end; no page, request or open file more at the end than at the pause; and
on SIGTERM under load every request that can end within the time-out does, with exit code 0. Linux
only. The last line is one JSON document; the exit code is 1 if any of that does not hold.

    python -m benchmarks.soak --minutes 60
    python -m benchmarks.soak --minutes 10 --tiny --output benchmarks/results/soak.json
    python -m benchmarks.soak --minutes 1 --tiny --disconnects 5000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.common import environment, metric_total, print_json, print_table
from benchmarks.lib.fault_load import live_requests, run_load, wait_running
from benchmarks.lib.faulty_process import FaultyProcess, start_plain
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.process_samples import ProcessSample, sample_process
from benchmarks.lib.rude_clients import slow_readers
from benchmarks.lib.server_process import ServerStartError
from benchmarks.lib.soak_cases import KEYS, keys_file, pick, soak_cases
from benchmarks.lib.soak_probe import Probe, probe
from benchmarks.lib.soak_verdict import drift_of, growth_of
from benchmarks.lib.storm_cases import Case, Hangup, Target
from benchmarks.storm import run_case, violation_of

__all__ = ["main"]

PROBE_EVERY_S = 2.0
SLOW_READERS_EVERY_S = 20.0
WARM_UP_SHARE = 0.2
MAX_GROWTH = 0.03
LONG_MINUTES = 5.0
"""Below that the warm-up is too short to speak of growth and drift."""
MAX_HELPERS = 5
"""The process that renders chat templates, and its workers: they come as chats do."""
MAX_LATE_THREADS = 4
"""Pools start threads when they first need them, some after the pause."""
MAX_DRIFT = 1.15
MAX_CHANGE = 1.25
"""Of the machine: beyond that a queue's wait says nothing of the server."""
ANSWER_S = 120.0
DRAIN_S = 60.0
SHUTDOWN_TIMEOUT_S = 60
MAX_BODY_BYTES = 1 << 20
KV_CACHE = "48MiB"


@dataclass
class Tally:
    """What was seen."""

    answers: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    probes: list[Probe] = field(default_factory=list)
    samples: list[tuple[float, ProcessSample]] = field(default_factory=list)
    most_pages: float = 0.0
    most_live: float = 0.0
    idle: list[ProcessSample] = field(default_factory=list)
    """At the pause, and at the end."""
    left_over: list[str] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)
    drained: dict[str, Any] = field(default_factory=dict)


class Soak:
    """One run against one server."""

    def __init__(self, server: FaultyProcess, target: Target, exits: Sequence[int]) -> None:
        self.tally = Tally()
        self._server = server
        self._target = target
        self._exits = exits
        self._cases = soak_cases(target, exits)
        self._rng = random.Random(1)
        self._started_s = time.monotonic()

    async def run(self, seconds: float, num_clients: int) -> None:
        """Warm up, pause, go on, end."""
        await self._load(WARM_UP_SHARE * seconds, num_clients, is_warm_up=True)
        await self._be_idle()
        await self._load((1 - WARM_UP_SHARE) * seconds, num_clients, is_warm_up=False)
        await self._be_idle()

    async def disconnect(self, count: int, at_once: int = 40) -> None:
        """So many clients that leave at a random moment."""
        places = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with places:
                await self._send(self._rng.choice(self._cases["rude"]))

        await asyncio.gather(*(one() for _ in range(count)))
        await self._be_idle()

    async def drain(self) -> None:
        """SIGTERM under load."""

        async def strike() -> None:
            os.kill(self._server.pid, signal.SIGTERM)

        shallow, *others = self._exits
        asks = live_requests(self._target.model, 64, (shallow, (others or [shallow])[0]))
        got = await run_load(self._server.client, asks, strike, wait_s=DRAIN_S)
        code = await self._server.exit_code(DRAIN_S)
        ends = {name: got.count(name) for name in ("whole", "error", "cut", "none")}
        self.tally.drained = {"answers": ends, "exit_code": code}

    async def _load(self, seconds: float, num_clients: int, *, is_warm_up: bool) -> None:
        end_s = time.monotonic() + seconds
        tasks = [asyncio.create_task(self._client(end_s)) for _ in range(num_clients)]
        tasks.append(asyncio.create_task(self._slow_readers(end_s)))
        tasks.append(asyncio.create_task(self._watch(end_s, is_kept=not is_warm_up)))
        await asyncio.gather(*tasks)

    async def _client(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            await self._send(pick(self._cases, self._rng))

    async def _send(self, case: Case) -> None:
        task = asyncio.create_task(run_case(self._server.client, case, self._rng))
        await wait_running([task], ANSWER_S)
        if not task.done():
            task.cancel()
            self.tally.violations[f"{case.name}: nothing within {ANSWER_S:g} s"] += 1
            return
        outcome = await task
        name = "hung up" if outcome.hung_up else f"HTTP {outcome.status}"
        self.tally.answers[name] += 1
        problem = violation_of(outcome)
        if problem is not None and case.hangup is Hangup.NEVER:
            self.tally.violations[f"{case.name}: {problem}"] += 1

    async def _slow_readers(self, end_s: float) -> None:
        while (left_s := end_s - time.monotonic()) > 0:
            if left_s > SLOW_READERS_EVERY_S:
                await slow_readers(self._server)
            await asyncio.sleep(min(SLOW_READERS_EVERY_S, max(0.0, left_s)))

    async def _watch(self, end_s: float, *, is_kept: bool) -> None:
        while time.monotonic() < end_s:
            seen = await probe(self._server, self._target.model, time.monotonic())
            sample = sample_process(self._server.pid)
            await self._look_at_metrics()
            if is_kept:
                self.tally.samples.append((time.monotonic() - self._started_s, sample))
                if seen is not None:
                    self.tally.probes.append(seen)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _look_at_metrics(self) -> None:
        text = (await self._server.client.request("GET", "/metrics")).body.decode()
        pages = metric_total(text, "sortserve_kv_pages_used") or 0.0
        live = metric_total(text, "sortserve_num_requests_running") or 0.0
        self.tally.most_pages = max(self.tally.most_pages, pages)
        self.tally.most_live = max(self.tally.most_live, live)

    async def _be_idle(self) -> None:
        self.tally.left_over += await self._server.left_over()
        self._server.client.close()  # its idle connections are open files of the server
        best: ProcessSample | None = None
        for _ in range(20):  # connections and threads need a moment to end
            await asyncio.sleep(0.25)
            sample = sample_process(self._server.pid)
            if best is None or sample.num_files <= best.num_files:
                best = sample
        assert best is not None
        self.tally.idle.append(best)


def problems_of(tally: Tally, *, is_long: bool) -> tuple[list[str], dict[str, float]]:
    """What does not hold, and the figures it was judged by.

    Args:
        tally: of a whole run.
        is_long: whether it was long enough to speak of drift.
    """
    problems = [f"{name} ({count} times)" for name, count in tally.violations.items()]
    problems += tally.left_over
    figures: dict[str, float] = {}
    times_s = [at_s for at_s, _ in tally.samples]
    if is_long:
        for name in ("rss_mib", "pss_mib"):
            growth = growth_of([getattr(sample, name) for _, sample in tally.samples])
            figures[f"growth_of_{name}"] = growth
        if figures["growth_of_rss_mib"] > MAX_GROWTH:
            problems.append(f"resident memory grew by {figures['growth_of_rss_mib']:.1%}")
        problems += _slower(tally, figures)
        figures["minutes"] = (times_s[-1] - times_s[0]) / 60
    pause, end = tally.idle[0], tally.idle[-1]
    late = {"num_threads": MAX_LATE_THREADS, "num_children": MAX_HELPERS}
    late["num_files"] = max(0, end.num_children - pause.num_children)  # each has a socket
    for name, allowed in late.items():
        before, after = getattr(pause, name), getattr(end, name)
        figures[f"{name}_at_pause"], figures[f"{name}_at_end"] = before, after
        if after > (allowed if name == "num_children" else before + allowed):
            problems.append(f"{name} was {before} at the pause and is {after} at the end")
    figures["rss_mib_at_pause"], figures["rss_mib_at_end"] = pause.rss_mib, end.rss_mib
    drained = tally.drained
    if drained["exit_code"] != 0 or set(drained["answers"].values()) - {0} != {
        drained["answers"]["whole"]
    }:
        problems.append(f"SIGTERM under load: {drained}")
    return problems, figures


def _slower(tally: Tally, figures: dict[str, float]) -> list[str]:
    """How much later the probe's tokens come at the end, where the machine is as it was."""
    problems = []
    at_s = [probe.at_s for probe in tally.probes]
    machine = drift_of(at_s, [probe.machine_ms for probe in tally.probes])
    slowdown = drift_of(at_s, [probe.slowdown for probe in tally.probes])
    figures |= {"slowdown_first": slowdown.first, "slowdown_last": slowdown.last}
    figures["machine_ratio"] = machine.ratio
    for name in ("ttft_ms", "tpot_ms"):
        drift = drift_of(at_s, [getattr(probe, name) for probe in tally.probes])
        even = drift_of(at_s, [getattr(probe, name) / probe.machine_ms for probe in tally.probes])
        figures |= {f"{name}_first": drift.first, f"{name}_last": drift.last}
        figures |= {f"{name}_ratio": drift.ratio, f"{name}_ratio_to_machine": even.ratio}
        if min(drift.ratio, even.ratio) <= MAX_DRIFT:
            continue
        said = f"{name} went from {drift.first:.2f} to {drift.last:.2f}"
        if 1 / MAX_CHANGE <= machine.ratio <= MAX_CHANGE:
            problems.append(said)
        else:
            tally.not_judged.append(f"{said}; the machine's time for the same: {machine.ratio:.2f}")
    return problems


async def _describe(client: HttpClient) -> tuple[Target, list[int]]:
    model = (await client.request("GET", "/v1/models")).json()["data"][0]
    exits = (await client.request("GET", "/exits")).json()
    layers = [entry["exit_layer"] for entry in exits["exits"]]
    target = Target(
        model=model["id"], max_model_len=model["max_model_len"], max_body_bytes=MAX_BODY_BYTES
    )
    return target, layers


async def _run(arguments: argparse.Namespace) -> Tally:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "keys.yaml").write_text(keys_file(), encoding="utf-8")
        model = arguments.model
        if arguments.tiny:
            from benchmarks.lib.tiny_checkpoint import write_tiny_checkpoint

            model = str(write_tiny_checkpoint(folder / "tiny"))
        flags = [*([model] if model else []), "--api-keys-file", str(folder / "keys.yaml")]
        flags += ["--max-body-size", str(MAX_BODY_BYTES), "--debug"]
        flags += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S), "--write-timeout", "2"]
        flags += ["--kv-cache-memory", KV_CACHE] if arguments.tiny else []
        server = await start_plain([*flags, *arguments.flags], folder=folder)
        server.client.authorise(KEYS["soak"])
        try:
            target, exits = await _describe(server.client)
            soak = Soak(server, target, exits)
            await soak.run(60 * arguments.minutes, arguments.num_clients)
            if arguments.disconnects:
                await soak.disconnect(arguments.disconnects)
            await soak.drain()
            return soak.tally
        finally:
            with suppress(OSError):
                if arguments.log is not None:
                    arguments.log.write_bytes(server.log.read_bytes())
            server.end()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a checkpoint; default: the one we ship")
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint of random weights")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--num-clients", type=int, default=6, help="requests at once")
    parser.add_argument("--disconnects", type=int, default=0, help="clients that leave, at the end")
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of the server")
    parser.add_argument("--log", type=Path, help="keep the server's log there")
    parser.add_argument("--output", type=Path, help="write the JSON document there, too")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes={arguments.minutes:g} is not allowed: it should be above 0")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the soak, prints what came of it; 1 if anything does not hold."""
    arguments = parse_arguments(argv)
    described = environment()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the server ends, too
    try:
        tally = asyncio.run(_run(arguments))
    except ServerStartError as error:
        print(error, file=sys.stderr)
        return 1
    problems, figures = problems_of(tally, is_long=arguments.minutes >= LONG_MINUTES)
    print_table(["answer", "requests"], sorted(tally.answers.items()))
    print_table(["figure", "value"], [[n, f"{v:,.3f}"] for n, v in sorted(figures.items())])
    print_table(["checked", "result"], [["problems", len(problems)]])
    for told in (*problems, *(f"not judged: {told}" for told in tally.not_judged)):
        print(f"  {told}")
    results = {
        "answers": tally.answers,
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "most_pages": tally.most_pages,
        "most_live_requests": tally.most_live,
        "num_probes": len(tally.probes),
        "drained": tally.drained,
        "samples": [
            {"at_s": round(at_s), **asdict(sample)}
            for at_s, sample in tally.samples[:: max(1, len(tally.samples) // 60)]
        ],
        "problems": problems,
        "not_judged": tally.not_judged,
    }
    print_json("soak", arguments, described, results, arguments.output)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
