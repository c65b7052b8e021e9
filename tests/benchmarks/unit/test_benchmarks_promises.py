"""Goodput and overload: a promise counts as kept only if the client saw it kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.goodput import Measurement, parse_arguments, simulate_all
from benchmarks.lib.budget_classes import CLASSES, Budgeted, Unloaded
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.journal import Journal
from benchmarks.lib.loadgen import RequestRecord, Run
from benchmarks.lib.machines import MACHINES
from benchmarks.lib.replay import Crowd, Exits, figures
from benchmarks.lib.workload import RequestSpec, load_trace

from benchmarks import overload
from sortserve.cost.model import RowShape, StepShape
from sortserve.process.profiling import measured_machine
from support.scripted_http import scripted_server
from support.tiny_models import make_tiny_checkpoint

TIGHT, MEDIUM, LOOSE = CLASSES
UNLOADED = Unloaded(lambda num_tokens: 0.1, 0.01)
CROWD = Crowd(32, 96, 0.03)
SPEC = RequestSpec(num_prompt_tokens=10, num_output_tokens=11)  # 200 ms alone, so 300, 600, 1600
EXITS = Exits([15, 30], {15: 0.5, 30: 1.0})


def served(due_s: float, took_s: float, *exits: int) -> RequestRecord:
    by_exit = {str(e): exits.count(e) for e in exits}
    return RequestRecord(
        exit_layer=None,
        due_s=due_s,
        sent_s=due_s,
        status=200,
        chunk_times_s=[due_s + took_s],
        num_output_tokens=len(exits),
        budget={"exit_layer": exits[-1], "tokens_by_exit": by_exit},
    )


def refused(due_s: float, took_s: float) -> RequestRecord:
    return RequestRecord(
        exit_layer=None,
        due_s=due_s,
        sent_s=due_s,
        answered_s=due_s + took_s,
        status=429,
        error="HTTP 429",
    )


def figures_of(records: Sequence[RequestRecord], classes: Sequence[Any]) -> dict[str, Any]:
    run = Run(records=records, started_s=0.0, ended_s=10.0, cpu_s=0.1)
    budgets = [Budgeted({}, budget_class) for budget_class in classes]
    return figures(run, [SPEC] * len(records), budgets, UNLOADED, EXITS)


def test_refusals_are_misses_of_all_and_not_of_those_admitted() -> None:
    records = [served(0, 0.29, 30), served(1, 0.7, 15), served(2, 1.5, 15), refused(3, 0.02)]

    found = figures_of(records, [TIGHT, MEDIUM, LOOSE, TIGHT])

    assert found["goodput_share"] == 0.5
    assert found["met_of_admitted"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["refused_share"] == 0.25
    assert found["by_class"] == {"tight": 0.5, "medium": 0.0, "loose": 1.0}
    assert found["num_failed"] == 0


def test_depth_and_quality_are_means_over_tokens() -> None:
    found = figures_of([served(0, 0.1, 15, 15, 30, 30)], [TIGHT])

    assert found["mean_depth_share"] == 0.75
    assert found["mean_score"] == 0.75
    assert found["quality_goodput"] == 0.75


def test_an_answer_counts_its_quality_if_it_was_in_time_and_nothing_if_not() -> None:
    records = [served(0, 0.29, 30), served(1, 0.5, 15, 30), served(2, 1.7, 30), refused(3, 0.02)]

    found = figures_of(records, [TIGHT, MEDIUM, LOOSE, TIGHT])

    assert found["quality_goodput"] == pytest.approx((1.0 + 0.75) / 4, abs=1e-4)
    assert found["quality_by_class"] == {"tight": 0.5, "medium": 0.75, "loose": 0.0}


def test_a_refusal_takes_from_sending_to_the_whole_answer() -> None:
    found = figures_of([refused(0, 0.010), refused(1, 0.030)], [TIGHT, TIGHT])

    assert (found["refusal_ms_p50"], found["refusal_ms_p99"]) == (20.0, 29.8)


def write_trace(path: Path) -> Path:
    line = '{"t": %d, "prompt_tokens": 400, "output_tokens": 80}\n'
    path.write_text("".join(line % i for i in range(40)))
    return path


def test_the_simulated_twin_runs_the_same_requests(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    systems = ("full", "quality")
    flags = ["--num-requests", "30", "--systems", *systems]
    machine = MACHINES["cpu2"]
    alone = Unloaded(lambda num_tokens: machine.model.prefill_s(30, num_tokens), 0.015)
    specs = load_trace(trace, num_requests=30)

    arguments = parse_arguments([str(trace), *flags])
    speeds = {name: {0.2: (1.0, 1.0), 8.0: (1.0, 1.0)} for name in systems}

    found = simulate_all(arguments, specs, machine, alone, CROWD, speeds)

    assert {s: list(rates) for s, rates in found.items()} == {s: [0.2, 8.0] for s in systems}
    assert found["full"][0.2]["goodput_share"] == 1.0
    assert found["full"][8.0]["goodput_share"] < found["quality"][8.0]["goodput_share"]


def test_the_twin_is_as_slow_as_the_machine_was_just_then(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    specs, machine = load_trace(trace, num_requests=30), MACHINES["cpu2"]
    alone = Unloaded(lambda num_tokens: machine.model.prefill_s(30, num_tokens), 0.015)
    arguments = parse_arguments([str(trace), "--num-requests", "30"])

    def met(slowdown: tuple[float, float]) -> float:
        speeds = {"full": {1.0: slowdown}}
        found = simulate_all(arguments, specs, machine, alone, CROWD, speeds)
        share = found["full"][1.0]["goodput_share"]
        assert isinstance(share, float)
        return share

    assert met((2.0, 2.0)) < met((1.0, 1.0))
    assert met((1.0, 4.0)) < met((1.0, 1.0))


async def test_a_journal_that_has_everything_leaves_nothing_to_run(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    flags = ["--loads", "0.5", "1", "--systems", "full", "lockstep"]
    journal = Journal(tmp_path / "journal.jsonl", {})
    journal.add("alone", {"first_64_s": 0.05, "first_512_s": 0.3, "token_s": 0.01})
    journal.add("crowd", vars(CROWD))
    journal.add("half_rate", 4.0)
    for system in ("full", "lockstep"):
        for rate in (2, 4):
            journal.add(f"{system} at {rate}", {"goodput_share": 1 / rate})

    results = await Measurement(parse_arguments([str(trace), *flags]), journal).run()

    assert results["half_rate"] == 4.0
    assert {s: list(rates) for s, rates in results["systems"].items()} == {
        "full": [2.0, 4.0],
        "lockstep": [2.0, 4.0],
    }


def test_a_machine_is_timed_with_the_exits_that_are_opened(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", exits=[2, 4, 6])

    machine = measured_machine(str(model), "2,6")

    assert machine.exits == (2, 6)
    assert machine.compute[2] < machine.compute[6] == 1.0
    assert machine.model.prefill_s(6, 64) > 0
    assert machine.score is not None
    assert machine.score[2] < machine.score[6] == 1.0
    assert machine.curve is not None
    assert machine.step_s(StepShape.of([RowShape(6, 64, 64, samples=True)])) > 0


# Overload

METRICS = (
    b"# TYPE sortserve_num_requests_running gauge\n"
    b'sortserve_num_requests_running{exit_layer="15"} 2.0\n'
    b'sortserve_num_requests_running{exit_layer="30"} 1.0\n'
    b"sortserve_num_requests_waiting 4.0\n"
    b"process_resident_memory_bytes 3.145728e+06\n"
)


async def test_memory_and_queue_are_read_from_the_metrics() -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(METRICS)}\r\n\r\n".encode()
    async with scripted_server(head + METRICS) as url:
        client = HttpClient(url)
        try:
            state = await overload.read_state(client)
        finally:
            client.close()

    assert state == {"memory_mib": 3.0, "running": 3.0, "waiting": 4.0}


async def test_draining_waits_for_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([(3, 1), (1, 0), (0, 1), (0, 0)])
    naps: list[float] = []

    async def read_state(client: object) -> dict[str, float]:
        running, waiting = next(left)
        return {"running": running, "waiting": waiting}

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    monkeypatch.setattr(overload, "read_state", read_state)
    monkeypatch.setattr(asyncio, "sleep", nap)

    assert await overload.drain_s(HttpClient("http://127.0.0.1:1")) is not None
    assert len(naps) == 3


def test_memory_is_told_in_quarters() -> None:
    assert overload.quarters([100, 110, 120, 130, 140, 150, 160, 170, 180]) == (
        "100, 120, 140, 160, 180"
    )
    assert overload.quarters([7]) == "7, 7, 7, 7, 7"


def test_an_overload_needs_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = overload.parse_arguments(["trace.jsonl"])

    assert (arguments.rate, arguments.seconds, arguments.on_miss) == (8.0, 120.0, "reject")
    with pytest.raises(SystemExit):
        overload.parse_arguments([])
    assert "trace" in capsys.readouterr().err
