r"""The proof: who meets the budgets of a real arrival trace, at what depth, on a real server.

Replays a trace (JSON lines with t, prompt_tokens, output_tokens) open-loop at several rates. Each
request has a latency budget from one of three classes: 1.5, 3 or 8 times what it takes alone at
full depth, which is measured first. Compared at each rate, in turn and each on a fresh server:

    full, shallow, middle         every request at one exit, lock-step batches, no admission
    lockstep                      our admission, lock-step batches
    quality, attainment, depth    our admission and policy, with that objective

All are graded alike, as the client saw it: due time to last chunk. What counts is
`quality_goodput`: the mean `score` of the tokens of each answer that was in time, 0 of all others,
over all requests. `goodput_share` is the share of all requests that were met, refused ones counted
as not met; `met_of_admitted` leaves those out. Where the checkpoint has no scores, the share of the
layers stands in.

`--loads` are multiples of the rate at which `full` meets half of the budgets. It is searched for
first, or given as `--half-rate`; `--rates` are requests a second. With `--simulate` the steps of
this machine are timed first, and brought to what requests take over HTTP. The simulator then runs
the same requests through the same scheduling with those times, and its goodput is printed beside
the real one. Before and after each run a few requests alone say how fast the machine is just then
(`slowdown`), and so fast is the simulated one.

With `--journal` a run that was cut off goes on where it was when it is started again. `--report`
writes the tables and the JSON line as a page in Markdown, `--plot` the figure. The last line is one
JSON document. Five loads and six systems take 24 minutes:

    python -m benchmarks.goodput trace.jsonl --num-requests 100 --simulate --journal run.jsonl \
        --report promises.md --plot goodput.svg
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import Unloaded
from benchmarks.lib.common import environment, json_line, print_table
from benchmarks.lib.goodput_page import COLUMNS, cell, cells, class_line, draw, markdown
from benchmarks.lib.half_rate import HalfRateSearch
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.journal import Journal
from benchmarks.lib.loadgen import run_open_loop
from benchmarks.lib.machines import document_of
from benchmarks.lib.replay import (
    Alone,
    Crowd,
    Exits,
    figures,
    measure_alone,
    measure_crowd,
    measure_slowdown,
    plan_requests,
    read_exits,
)
from benchmarks.lib.server_process import ServerStartError, serve
from benchmarks.lib.systems import DEFAULT_SYSTEMS, SYSTEMS, System
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec, load_trace
from benchmarks.serving import detect_model
from benchmarks.simulate import LOADS, find_half_rate, over_http, run_system, scaled_to, slower
from sortserve.cost.machine import Machine
from sortserve.process.profiling import measured_machine

__all__ = ["main", "simulate_all"]

UNJOURNALED = ("journal", "report", "plot", "simulate")
"""Arguments that do not change what is measured."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument("--model", help="default: the server's default")
    parser.add_argument("--exits", help="that the server opens; default: the checkpoint's own")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates", type=float, nargs="+", help="requests a second")
    rates.add_argument("--loads", type=float, nargs="+", default=list(LOADS))
    parser.add_argument("--half-rate", type=float, help="at which full meets half; default: found")
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), default=list(DEFAULT_SYSTEMS)
    )
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--min-quality", type=float, default=0.5, help="floor of every budget")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--simulate", action="store_true", help="the same in the simulator, too")
    parser.add_argument("--journal", type=Path, help="keep parts that are done, and go on from it")
    parser.add_argument("--report", type=Path, help="write the tables as a page in Markdown")
    parser.add_argument("--plot", type=Path, help="draw goodput over rate: an SVG, or a .png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more flags, separated by spaces")
    return parser.parse_args(argv)


class Measurement:
    """One run of the program: every system at every rate, each part kept when it is done.

    Args:
        arguments: of the command line.
        journal: of what is done.
    """

    def __init__(self, arguments: argparse.Namespace, journal: Journal) -> None:
        self._arguments = arguments
        self._journal = journal
        self._trace = load_trace(arguments.trace, num_requests=arguments.num_requests)
        self._machine = (
            measured_machine(arguments.model, arguments.exits) if arguments.simulate else None
        )

    async def run(self) -> dict[str, Any]:
        """All systems, one after the other."""
        arguments, journal = self._arguments, self._journal
        await self._on_server(SYSTEMS["full"])  # before the rates are known
        alone, crowd = Alone(**journal["alone"]), Crowd(**journal["crowd"])
        half_rate = None if arguments.rates else arguments.half_rate or journal["half_rate"]
        rates = arguments.rates or [round(load * half_rate, 3) for load in arguments.loads]
        for rate in rates:  # one system after the other: machines change their speed
            for name in arguments.systems:
                if _part(name, rate) not in journal:
                    await self._on_server(SYSTEMS[name], rate)
        results: dict[str, Any] = {
            "unloaded": vars(alone),
            "crowd": vars(crowd),
            "half_rate": half_rate,
            "systems": {
                name: {rate: journal[_part(name, rate)] for rate in rates}
                for name in arguments.systems
            },
        }
        if self._machine is not None:
            slowdowns = {
                name: {
                    rate: (found["slowdown"], found["prompt_slowdown"])
                    for rate, found in by_rate.items()
                }
                for name, by_rate in results["systems"].items()
            }
            results["machine"] = document_of(self._machine)
            results["simulated"] = simulate_all(
                arguments, self._trace, self._machine, alone.unloaded, crowd, slowdowns
            )
        return results

    async def _on_server(self, system: System, rate: float | None = None) -> None:
        """One system at a rate, on a server of its own; without a rate, what all of them need."""
        arguments, journal = self._arguments, self._journal
        missing = {"alone", "crowd"}
        if not (arguments.rates or arguments.half_rate):
            missing.add("half_rate")
        if rate is None and all(part in journal for part in missing):
            return
        model = [arguments.model] if arguments.model else []
        opened = ["--exits", arguments.exits] if arguments.exits else []
        flags = [*model, *system.flags, *opened, *arguments.server_args.split()]
        async with serve(flags) as client:
            exits, name = await read_exits(client), await detect_model(client)
            if "alone" not in journal:
                maker = RequestMaker(model=name, prompts=self._prompts("alone"))
                alone = await measure_alone(client, maker, exits.layers[-1])
                journal.add("alone", vars(alone))
            if "crowd" not in journal:
                maker = RequestMaker(model=name, prompts=self._prompts("crowd"))
                journal.add("crowd", vars(await measure_crowd(client, maker, exits.layers[-1])))
            if "half_rate" in missing and "half_rate" not in journal:
                journal.add("half_rate", await self._find_half_rate(client, name, exits))
            if rate is not None:
                found = await self._at(client, name, exits, system, rate)
                journal.add(_part(system.name, rate), found)

    async def _find_half_rate(self, client: HttpClient, model: str, exits: Exits) -> float:
        unloaded, arguments = Alone(**self._journal["alone"]).unloaded, self._arguments
        alone_s = sum(map(unloaded.e2e_s, scaled_to(self._trace, 1.0, arguments)))
        guess = len(self._trace) / alone_s
        if self._machine is not None:
            guess = find_half_rate(self._machine, self._trace, unloaded, arguments)
        search = HalfRateSearch(guess, tolerance=0.05, precision=1.08, max_tries=6)
        while not search.is_done:
            rate = round(search.rate, 3)
            found = await self._at(client, model, exits, SYSTEMS["full"], rate)
            search.tell(found["goodput_share"] or 0.0)
            self._journal.add(_part("full", rate), found)  # load 1 is one of them
        print(f"full depth meets half of the budgets at {search.rate:.3g} requests a second")
        return round(search.rate, 3)

    async def _at(
        self, client: HttpClient, model: str, exits: Exits, system: System, rate: float
    ) -> dict[str, Any]:
        """One system at one rate; the prompts are the same for every system."""
        print(f"{system.name} at {rate:g} a second ...", flush=True)
        alone, full = Alone(**self._journal["alone"]), exits.layers[-1]
        unloaded = alone.unloaded
        maker = RequestMaker(model=model, prompts=self._prompts(f"{rate:g}"))
        probes = RequestMaker(model=model, prompts=self._prompts(f"{rate:g}/probes"))
        specs = scaled_to(self._trace, rate, self._arguments)
        planned, budgets = plan_requests(
            specs,
            maker,
            unloaded,
            system,
            exits,
            seed=self._arguments.seed,
            on_miss=self._arguments.on_miss,
            min_quality=self._arguments.min_quality,
        )
        before = await measure_slowdown(client, probes, full, alone)
        run = await run_open_loop(client, planned)
        after = await measure_slowdown(client, probes, full, alone)
        found = figures(run, specs, budgets, unloaded, exits)
        found["slowdown"] = round((before[0] + after[0]) / 2, 3)
        found["prompt_slowdown"] = round((before[1] + after[1]) / 2, 3)
        print(f"  {class_line(system.name, found)}", flush=True)
        return found

    def _prompts(self, of: str) -> PromptMaker:
        """Prompts that no other rate has, or the prefix cache would know them."""
        rng = random.Random(f"{self._arguments.seed}/{of}")
        return PromptMaker(rng, vocab_size=self._arguments.vocab_size)


def _part(system: str, rate: float) -> str:
    return f"{system} at {rate:g}"


def simulate_all(
    arguments: argparse.Namespace,
    trace: Sequence[RequestSpec],
    machine: Machine,
    unloaded: Unloaded,
    crowd: Crowd,
    slowdowns: Mapping[str, Mapping[float, tuple[float, float]]],
) -> dict[str, dict[float, dict[str, Any]]]:
    """The same requests with the same budgets, for every system and rate, on the machine.

    Args:
        arguments: of the command line.
        trace: as it is replayed.
        machine: timed here.
        unloaded: what requests took alone over HTTP.
        crowd: what many took at once.
        slowdowns: by system and rate, how many times as long short requests and long prompts took
            when that was measured.
            Where the queue is near its limit a machine that is a tenth slower meets a quarter less.
    """
    machine = over_http(machine, unloaded, crowd)

    def run(name: str, rate: float, slowdown: tuple[float, float]) -> dict[str, Any]:
        specs = scaled_to(trace, rate, arguments)
        return run_system(slower(machine, *slowdown), specs, SYSTEMS[name], unloaded, arguments)

    return {
        name: {rate: run(name, rate, slowdown) for rate, slowdown in by_rate.items()}
        for name, by_rate in slowdowns.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Measures every system at every rate, prints and draws them."""
    arguments = parse_arguments(argv)
    described = environment()
    run = {n: v for n, v in vars(arguments).items() if n not in UNJOURNALED}
    try:
        journal = Journal(arguments.journal, run)
        results = asyncio.run(Measurement(arguments, journal).run())
    except (ServerStartError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    show(results)
    document = json_line("goodput", arguments, described, results)
    if arguments.report is not None:
        page = f"{markdown(results)}\n\n## JSON lines\n\n```\n{document}\n```\n"
        arguments.report.write_text(page, encoding="utf-8")
        print(f"report: {arguments.report}")
    if arguments.plot is not None:
        arguments.plot.write_bytes(draw(results, arguments.plot.suffix.lstrip(".") or "svg"))
        print(f"plot: {arguments.plot}")
    print(document)
    return 0


def show(results: Mapping[str, Any]) -> None:
    """A table for each rate, the classes, and the simulator beside the server."""
    for rate in next(iter(results["systems"].values())):
        print(f"\nrate {rate:g} a second")
        rows = ([name, *cells(rates[rate])] for name, rates in results["systems"].items())
        print_table(["system", *COLUMNS], rows)
        for name, rates in results["systems"].items():
            print(class_line(name, rates[rate]))
        for name, simulated in results.get("simulated", {}).items():
            real, predicted = results["systems"][name][rate], simulated[rate]
            for figure in ("quality_goodput", "goodput_share"):
                print(f"{name}: {figure} {cell(real[figure])}, simulated {cell(predicted[figure])}")


if __name__ == "__main__":
    sys.exit(main())
