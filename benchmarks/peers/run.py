"""Servers in turns (A B C A B C), one at a time, on the cores of the load generator."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lib.common import ROOT, environment, print_json
from benchmarks.lib.server_process import ServerStartError
from benchmarks.peers.catalogue import FORCE_AVX2, Configuration, Where, choose
from benchmarks.peers.floor import Ceiling, Rates, ceiling, model_size, read_rates
from benchmarks.peers.journal import Journal
from benchmarks.peers.layout import Layout
from benchmarks.peers.measure import Load, Subject, measure, num_requests, open_subject
from benchmarks.peers.table import Measured, print_rows, summarise_rows

__all__ = ["run", "take_turns"]

MAX_REASON_CHARS = 500


def run(arguments: argparse.Namespace) -> int:
    """Measures what was asked for; 1 if nothing could be measured."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
        os.sched_setaffinity(0, cores)  # children inherit it
    os.environ.pop("OMP_NUM_THREADS", None)  # every server is told its threads in its own way
    described = environment()
    layout = Layout(arguments.root.resolve())
    chosen = choose(arguments.peers)
    journal = Journal(
        _journal_path(layout, arguments),
        _circumstances(arguments, described),
        fresh=arguments.fresh,
    )
    rates = _measure_rates(arguments.isa, arguments.cores)
    failures = asyncio.run(take_turns(chosen, layout, arguments, journal))
    ceilings = _ceilings(chosen, layout, arguments, rates)
    rows = summarise_rows(chosen, journal.measured, ceilings)
    _print_machine(rates, described, arguments)
    print_rows(rows, failures)
    results = {
        "versions": {c.peer: versions(layout, c.peer) for c in chosen},
        "launches": {c.name: _described_launch(c, layout, arguments) for c in chosen},
        "machine": asdict(rates),
        "ceilings": {f"{name} x {n}": asdict(limit) for (name, n), limit in ceilings.items()},
        "rows": [asdict(row) for row in rows],
        "failures": failures,
        "measured": [asdict(m) for m in journal.measured],
    }
    if arguments.output is not None:
        _write(arguments.output, described, results)
    print_json("peers", arguments, described, results)
    return 0 if rows else 1


def _shortened(reason: str) -> str:
    """Its beginning, which says what happened, and its end, which is the end of a log."""
    if len(reason) <= MAX_REASON_CHARS:
        return reason
    return f"{reason[:80]} ... {reason[80 - MAX_REASON_CHARS :]}"


def _write(output: Path, described: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    document = {"benchmark": "peers", "environment": described, "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _described_launch(
    configuration: Configuration, layout: Layout, arguments: argparse.Namespace
) -> dict[str, Any]:
    """How a server was started, without the paths of this machine."""
    launch = configuration.launch(Where(layout, 0, arguments.isa, arguments.cores))
    return {
        "command": _without_paths(" ".join(launch.command), layout),
        "env": {name: _without_paths(value, layout) for name, value in launch.env.items()},
        "forced_by": launch.forced_by,
    }


def _without_paths(text: str, layout: Layout) -> str:
    """Paths of the comparison's folder and of the repository become relative to them."""
    programs = str(Path(sys.executable).parent)
    for folder, name in ((layout.root, "ROOT"), (ROOT, "REPOSITORY"), (programs, "BIN")):
        text = text.replace(f"{folder}/", f"{name}/")
    return text


async def take_turns(
    chosen: Sequence[Configuration],
    layout: Layout,
    arguments: argparse.Namespace,
    journal: Journal,
) -> dict[str, str]:
    """All turns; returns who failed, and why. Who failed is not tried again in the next turn."""
    failures: dict[str, str] = {}
    end_s = time.monotonic() + 60 * arguments.max_minutes
    for turn in range(arguments.repeat):
        for configuration in chosen:
            missing = [n for n in arguments.clients if not journal.has(configuration.name, n, turn)]
            if not missing or configuration.name in failures:
                continue
            if time.monotonic() > end_s:
                over = f"{arguments.max_minutes} minutes were over in turn {turn}"
                return failures | {"time": f"{over}; the same command goes on."}
            where = Where(layout, 0, arguments.isa, arguments.cores)
            log = layout.logs / f"{configuration.name}-{arguments.isa}-{turn}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            try:
                ready_s = arguments.ready_seconds
                async with open_subject(configuration, where, log, ready_s) as subject:
                    await _measure_all(configuration, subject, missing, turn, arguments, journal)
            except ServerStartError as error:
                reason = _without_paths(" ".join(str(error).split()), layout)
                failures[configuration.name] = _shortened(reason)
                _say(f"{configuration.name}: {failures[configuration.name]}")
    return failures


async def _measure_all(
    configuration: Configuration,
    subject: Subject,
    clients: Sequence[int],
    turn: int,
    arguments: argparse.Namespace,
    journal: Journal,
) -> None:
    for num_clients in clients:
        load = Load(
            num_clients=num_clients,
            num_requests=num_requests(num_clients),
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
            max_seconds=arguments.max_seconds,
            seed=1000 * turn + num_clients,
        )
        found = await measure(subject, load)
        if not found["num_output_tokens"]:
            raise ServerStartError(f"{num_clients} clients got nothing: {found['errors']}")
        found["start_s"] = round(subject.start_s, 1)
        journal.add(
            Measured(
                configuration=configuration.name, num_clients=num_clients, turn=turn, figures=found
            )
        )
        _say(
            f"turn {turn}, {configuration.name}, {num_clients} clients: "
            f"{found['output_tokens_per_s']:.1f} tok/s in {found['wall_s']:.0f} s"
        )


def _ceilings(
    chosen: Sequence[Configuration], layout: Layout, arguments: argparse.Namespace, rates: Rates
) -> dict[tuple[str, int], Ceiling]:
    try:
        size = model_size(layout.model)
    except OSError:
        return {}
    return {
        (configuration.name, num_clients): ceiling(
            rates,
            size,
            bits_per_weight=configuration.bits_per_weight,
            bits=configuration.bits,
            num_clients=num_clients,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
        )
        for configuration in chosen
        for num_clients in arguments.clients
    }


def _measure_rates(isa: str, num_threads: int) -> Rates:
    env = dict(os.environ) | {
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": str(ROOT / "server"),
    }
    env |= FORCE_AVX2 if isa != "native" else {}
    command = [sys.executable, "-m", "benchmarks.peers.floor", "--isa", isa]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return read_rates(done.stdout)


def versions(layout: Layout, peer: str) -> str | None:
    """What is installed of a peer: its packages' names and versions."""
    if peer == "sortserve":
        return None  # the commit says it
    wanted = re.compile(r"^(vllm|torch|openvino|nncf|optimum)", re.I)
    found = layout.venv(peer).glob("lib/python*/site-packages/*.dist-info")
    names = sorted(path.stem for path in found if wanted.match(path.name))
    if peer == "llamacpp":
        names = sorted(path.name for path in layout.llama_source.glob("llama_cpp_python-*"))
    return ", ".join(names) or None


def _circumstances(arguments: argparse.Namespace, described: Mapping[str, Any]) -> dict[str, Any]:
    names = ("isa", "cores", "prompt_tokens", "output_tokens", "max_seconds")
    return {name: getattr(arguments, name) for name in names} | {
        "commit": described["commit"],
        "cpu": described["cpu"],
    }


def _journal_path(layout: Layout, arguments: argparse.Namespace) -> Path:
    return arguments.journal or layout.root / f"journal-{arguments.isa}.jsonl"


def _print_machine(
    rates: Rates, described: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    products = ", ".join(
        f"{bits} bits {rate / 1e9:.0f}" for bits, rate in rates.flops_per_s.items()
    )
    flags = ", ".join(described["cpu_flags"])
    print(f"\n{described['cpu']} ({flags}), {arguments.cores} cores, isa {arguments.isa}")
    print(f"memory {rates.bytes_per_s / 1e9:.1f} GB/s, products in GFLOP/s: {products}\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
