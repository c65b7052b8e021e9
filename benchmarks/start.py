"""How long a server takes to its first token, without a cache and with one.

    python -m benchmarks.start [--model NAME] [--warm-starts 3] [--cold-starts 1] [-- ARGUMENTS]

A cold start has an empty cache folder, as after an install: kernels are compiled, weights converted
and merged, step times measured. A warm one has what the cold one left. Times count from the start
of the process: to listening (probes are answered), to ready (``/health`` is 200), and to the first
token of one streamed completion. Processor seconds are those of the server and all it has started,
to its end; on a machine that is busy with something else they say more than the clock. The floor is
a process that does nothing but import the libraries without which no start can do. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.server_process import ServerStartError, free_port

POLL_S = 0.05  # a probe takes the interpreter from what loads
FLOOR = "import torch; from transformers import AutoTokenizer, LlamaConfig"
TIMEOUT_S = 600.0
FIGURES = ("listening_s", "checkpoint_s", "engine_s", "ready_s", "first_token_s", "cpu_s")


def main() -> None:
    arguments = _parse_arguments()
    described = environment()
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(arguments.cold_starts):
        with tempfile.TemporaryDirectory(prefix="sortserve-start-") as folder:
            cache = Path(folder) / "cache"
            runs["cold"].append(start_once(arguments.model, arguments.serve, cache))
            warm = [
                start_once(arguments.model, arguments.serve, cache)
                for _ in range(arguments.warm_starts)
            ]
            runs["warm"] += warm
    medians = {
        kind: {name: round(statistics.median(run[name] for run in found), 2) for name in FIGURES}
        for kind, found in runs.items()
        if found
    }
    floor = _floor(max(1, arguments.warm_starts))
    print_table(["start", *FIGURES], ([kind, *found.values()] for kind, found in medians.items()))
    print(f"floor: {floor['wall_s']} s, {floor['cpu_s']} s of processor time: {FLOOR}")
    print_json("start", arguments, described, {"median": medians, "floor": floor, "runs": runs})


def start_once(model: str, arguments: list[str], cache: Path) -> dict[str, float]:
    """The figures of one start.

    Raises:
        ServerStartError: the server ended, or gave no token within ``TIMEOUT_S``.
    """
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--log-format", "json"]
    command = [sys.executable, "-m", "sortserve", "serve", model, *flags, *arguments]
    with tempfile.TemporaryFile("w+") as log:
        start_s = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=_environment(SORTSERVE_CACHE_DIR=str(cache)),
        )
        figures: dict[str, float] = {}
        try:
            while "ready_s" not in figures:
                elapsed_s = time.monotonic() - start_s
                if process.poll() is not None or elapsed_s > TIMEOUT_S:
                    log.seek(0)
                    raise ServerStartError(f"the server is not ready: {log.read()[-2000:]}")
                status = _health(port)
                if status is not None:
                    figures.setdefault("listening_s", time.monotonic() - start_s)
                if status == 200:
                    figures["ready_s"] = time.monotonic() - start_s
                time.sleep(POLL_S)
            _first_token(port)
            figures["first_token_s"] = time.monotonic() - start_s
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        figures["cpu_s"] = usage.ru_utime + usage.ru_stime
        log.seek(0)
        figures.update(_phases(log.read()))
    return {name: round(value, 3) for name, value in figures.items()}


def _floor(num_runs: int) -> dict[str, float]:
    """Median seconds of a process that imports torch and transformers, and ends."""
    walls, cpus = [], []
    for _ in range(num_runs):
        start_s = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", FLOOR], env=_environment())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        walls.append(time.monotonic() - start_s)
        cpus.append(usage.ru_utime + usage.ru_stime)
    medians = {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}
    return {name: round(value, 2) for name, value in medians.items()}


def _environment(**more: str) -> dict[str, str]:
    """Ours, but the compiled form of modules may be kept: an installed package has it."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | more


def _health(port: int) -> int | None:
    """The status of ``/health``; None: nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def _first_token(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    body = {"prompt": "Once upon a time", "max_tokens": 4, "stream": True, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    line = response.readline()
    while line and not line.startswith(b"data:"):
        line = response.readline()
    if response.status != 200 or not line:
        raise ServerStartError(f"no token: {response.status} {line.decode(errors='replace')}")
    connection.close()


def _phases(log: str) -> dict[str, float]:
    """What the server says of its own start."""
    for line in log.splitlines():
        with suppress(ValueError):
            record: dict[str, Any] = json.loads(line)
            if "checkpoint_s" in record:
                return {name: float(record[name]) for name in ("checkpoint_s", "engine_s")}
    raise ServerStartError("the server did not say how long it loaded")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sorted-smollm2-135m")
    parser.add_argument("--cold-starts", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--warm-starts", type=int, default=3, help="after each cold one; default: 3"
    )
    parser.add_argument("serve", nargs="*", help="further arguments of sortserve serve, after --")
    arguments = parser.parse_args()
    if arguments.cold_starts < 1 or arguments.warm_starts < 0:
        parser.error("at least one cold start, and no less than no warm ones")
    return arguments


if __name__ == "__main__":
    main()
