"""One configuration under all loads: started, warmed, measured, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.lib.common import percentile
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.loadgen import Planned, RequestRecord, Run, run_closed_loop
from benchmarks.lib.report import report
from benchmarks.lib.server_process import ServerStartError, free_port, run_server, tail
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec
from benchmarks.peers.catalogue import Configuration, Launch, Where
from benchmarks.peers.process_facts import avx512_threads, memory_bytes

__all__ = ["Load", "Subject", "figures", "measure", "num_requests", "open_subject", "read_run"]

GRACE_S = 60.0
"""Beyond the time of a load, for a process that measures itself."""
WARMUP_TOKENS = 16
MODEL = "model"
"""Every server serves the weights under this name."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A closed loop."""

    num_clients: int
    num_requests: int
    prompt_tokens: int = 128
    output_tokens: int = 128
    max_seconds: float = 60.0
    """Answers that are unfinished then are cut; their tokens count."""
    seed: int = 0
    vocab_size: int = 32000


def num_requests(num_clients: int) -> int:
    """Enough for a figure, few enough for a table in minutes: three rounds, two of many clients."""
    return num_clients * (3 if num_clients <= 8 else 2)


@dataclass(frozen=True)
class Subject:
    """A running configuration."""

    pid: int
    start_s: float
    """From the start of the process to its first readiness."""
    _client: HttpClient | None
    _process: asyncio.subprocess.Process | None
    _configuration: Configuration

    async def run(self, load: Load) -> Run:
        """One load.

        Raises:
            ServerStartError: the process that measures itself has ended, or does not answer.
        """
        if self._client is not None:
            return await _run_http(self._client, self._configuration, load)
        assert self._process is not None
        try:
            async with asyncio.timeout(load.max_seconds + GRACE_S):
                return read_run(await _ask(self._process, json.dumps(asdict(load))))
        except TimeoutError:
            raise ServerStartError("the process did not end its load in time") from None


@asynccontextmanager
async def open_subject(
    configuration: Configuration, where: Where, log: Path, ready_s: float
) -> AsyncIterator[Subject]:
    """Starts a configuration and waits until it is ready, at most ``ready_s``.

    Raises:
        ServerStartError: it is not.
    """
    where = replace(where, port=free_port())
    launch = configuration.launch(where)
    started_s = time.monotonic()
    if configuration.in_process:
        async with _run_worker(launch, log, ready_s) as process:
            yield Subject(process.pid, time.monotonic() - started_s, None, process, configuration)
        return
    async with run_server(
        launch.command, port=where.port, log=log, env=launch.env, timeout_s=ready_s
    ) as server:
        start_s = time.monotonic() - started_s
        yield Subject(server.pid, start_s, server.client, None, configuration)


async def measure(subject: Subject, load: Load) -> dict[str, Any]:
    """Warms the subject up for this load, then measures."""
    warmup = replace(
        load, num_requests=load.num_clients, output_tokens=WARMUP_TOKENS, seed=load.seed + 1
    )
    await subject.run(warmup)
    run = await subject.run(load)
    found = figures(run)
    found["avx512_threads"] = avx512_threads(subject.pid, run.wall_s * 1e3)
    found["memory_mib"] = round(memory_bytes(subject.pid) / 2**20)
    return found


def figures(run: Run) -> dict[str, Any]:
    """What the table and the JSON document keep of one load."""
    described = report(run)
    finished = [record for record in run.records if record.ok]
    gaps = [gap for record in finished for gap in record.itls_s]
    kept = ("wall_s", "num_finished", "num_failed", "num_cut", "errors", "generator_cpu_share")
    return {name: described[name] for name in kept} | {
        "output_tokens_per_s": described["output_tokens_per_s"],
        "num_output_tokens": sum(record.num_output_tokens for record in run.records),
        "ttft_p50_ms": _percentile_ms([record.ttft_s for record in finished], 0.5),
        "tpot_p50_ms": _percentile_ms([record.tpot_s for record in finished], 0.5),
        "itl_p99_ms": _percentile_ms(gaps, 0.99),
    }


def _percentile_ms(seconds: Sequence[float | None], share: float) -> float | None:
    known = [value * 1e3 for value in seconds if value is not None]
    return round(percentile(known, share), 2) if known else None


def read_run(line: str) -> Run:
    """What a process that measures itself has printed.

    Raises:
        ServerStartError: it is something else.
    """
    try:
        document = json.loads(line)
        records = [RequestRecord(**record) for record in document["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ServerStartError(f"the process printed no load ({error!r}): {line[:200]}") from None
    times = {name: document[name] for name in ("started_s", "ended_s", "cpu_s")}
    return Run(records=records, **times)


async def _run_http(client: HttpClient, configuration: Configuration, load: Load) -> Run:
    maker = RequestMaker(
        model=MODEL,
        prompts=PromptMaker(random.Random(load.seed), vocab_size=load.vocab_size),
        extra_body=configuration.extra_body,
    )
    spec = RequestSpec(num_prompt_tokens=load.prompt_tokens, num_output_tokens=load.output_tokens)

    def endless() -> Iterator[Planned]:
        while True:
            yield Planned(maker.make(spec, None))

    return await run_closed_loop(
        client,
        [endless() for _ in range(load.num_clients)],
        num_requests=load.num_requests,
        duration_s=load.max_seconds,
    )


@asynccontextmanager
async def _run_worker(
    launch: Launch, log: Path, ready_s: float
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that takes loads on its standard input; its first line says that it is ready."""
    with log.open("wb") as stream:
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=dict(os.environ) | dict(launch.env),
                limit=1 << 26,
            )
        except OSError as error:
            raise ServerStartError(
                f"{launch.command[0]} cannot be started: {error.strerror}."
            ) from error
    try:
        async with asyncio.timeout(ready_s):
            line = await _read(process)
        if not line.startswith('{"ready"'):
            raise ServerStartError(f"the process is not ready: {line[:200]}\n{tail(log)}")
        yield process
    except TimeoutError:
        raise ServerStartError(f"the process was not ready in time:\n{tail(log)}") from None
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ask(process: asyncio.subprocess.Process, line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    await process.stdin.drain()
    return await _read(process)


async def _read(process: asyncio.subprocess.Process) -> str:
    """The next line; an empty one where the process has ended."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode(errors="replace")
