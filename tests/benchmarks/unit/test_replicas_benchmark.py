"""Routers over simulated replicas: the fleet is honest, and the baseline is Ray's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from benchmarks.lib.fleet import SHARED, Fleet, Replica, in_sessions
from benchmarks.lib.machines import MACHINES
from benchmarks.lib.routers import ROUTERS, PowerOfTwoChoices, RoundRobin, Router

from benchmarks import replicas
from sortserve.core.budget import Budget
from sortserve.core.request import Request
from sortserve.cost.machine import Machine
from sortserve.replicas.load import EngineLoad
from sortserve.simulation import Arrival

LINE = (1e-3, 1e-3, 1e-5, 1e-8, 1e-5)
SMALL = Machine(
    name="small",
    source="invented",
    exits=(2, 6),
    small=LINE,
    large=LINE,
    compute={2: 0.4, 6: 1.0},
    score={2: 0.6, 6: 1.0},
    noise=0.0,
)


def make_requests(num: int, *, every_s: float = 0.01, **budget: object) -> list[Request]:
    return [
        Arrival(
            due_s=every_s * i,
            num_prompt_tokens=20,
            num_output_tokens=10,
            budget=Budget.from_mapping(budget),
        ).request(str(i))
        for i in range(num)
    ]


def make_replicas(num: int) -> list[Replica]:
    return [Replica(SMALL, report_every_s=0.02, prefixes=False, seed=str(i)) for i in range(num)]


class Watched:
    """A router that says what it was told."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.sent: list[tuple[int, str, float]] = []
        self.ended: list[tuple[int, str]] = []
        self.reports: list[tuple[int, EngineLoad]] = []
        self.now = 0.0

    def choose(self, request: Request, open_to: object, now: float) -> int:
        self.now = now
        replica = self.router.choose(request, open_to, now)  # type: ignore[arg-type]
        self.sent.append((replica, request.request_id, now))
        return replica

    def on_ended(self, replica: int, request_id: str) -> None:
        self.ended.append((replica, request_id))
        self.router.on_ended(replica, request_id)

    def on_report(self, replica: int, load: EngineLoad) -> None:
        self.reports.append((replica, load))
        self.router.on_report(replica, load)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_gets_every_request_answered(name: str) -> None:
    requests = make_requests(12)

    served = Fleet(make_replicas(3), ROUTERS[name](3, 0)).run(requests)

    assert [s.request for s in served] == requests
    assert all(s.report is not None and s.report.num_output_tokens == 10 for s in served)
    assert len({s.replica for s in served}) == 3


def test_a_router_hears_of_nothing_before_it_happened() -> None:
    watched = Watched(RoundRobin(2, 0))

    Fleet(make_replicas(2), watched).run(make_requests(40))

    assert watched.ended
    assert set(watched.ended) <= {(replica, id_) for replica, id_, _ in watched.sent}
    assert all(load.time_s <= watched.now for _, load in watched.reports)
    times = [load.time_s for replica, load in watched.reports if replica == 0]
    assert times == sorted(times)
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.0


@pytest.mark.parametrize("retries", [0, 1])
def test_what_is_refused_is_tried_once_more_elsewhere(retries: int) -> None:
    requests = make_requests(3, latency_ms=1, on_miss="reject")
    watched = Watched(RoundRobin(3, 0))

    served = Fleet(make_replicas(3), watched, retries=retries).run(requests)

    assert all(s.error is not None and s.report is None for s in served)
    assert {s.num_tries for s in served} == {1 + retries}
    for i in range(3):
        tried = [replica for replica, id_, _ in watched.sent if id_ == str(i)]
        assert len(tried) == len(set(tried)) == 1 + retries
    assert len(watched.ended) == len(watched.sent)


def test_the_shorter_queue_of_two_is_taken_and_who_is_over_does_not_count() -> None:
    router, requests = PowerOfTwoChoices(2, 0), make_requests(4)

    first = router.choose(requests[0], [0, 1], 0.0)
    assert router.choose(requests[1], [0, 1], 0.0) == 1 - first
    router.on_ended(first, "0")
    assert router.choose(requests[2], [0, 1], 0.0) == first
    assert router.choose(requests[3], [first], 0.0) == first


def test_prompts_of_a_session_begin_alike_and_end_each_for_itself() -> None:
    changed = in_sessions(make_requests(200), seed=0)

    starts = [request.prompt_token_ids[: int(SHARED * 20)] for request in changed]
    assert 20 < len(set(starts)) < 80
    assert len({request.prompt_token_ids for request in changed}) == 200
    assert {len(request.prompt_token_ids) for request in changed} == {20}


def test_a_run_prints_its_table_and_goes_on_from_its_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, journal = tmp_path / "trace.jsonl", tmp_path / "journal.jsonl"
    line = '{{"t": {}, "prompt_tokens": 80, "output_tokens": 40}}\n'
    trace.write_text("".join(line.format(0.1 * i) for i in range(20)))
    monkeypatch.setitem(MACHINES, "soft-13b", SMALL)
    known = "--num-replicas 2 --half-rate 10 --loads 1 --fleets equal unequal sessions"
    run = [str(trace), *known.split(), "--journal", str(journal)]
    routers = ["--routers", "power-of-two", "ours"]
    monkeypatch.setattr(replicas, "ProcessPoolExecutor", InProcess)

    assert replicas.main([*run, *routers]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(replicas, "run_fleet", lambda *_: pytest.fail("it was run again"))
    assert replicas.main([*run, *routers]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert first["results"] == second["results"]
    for systems in first["results"]["systems"].values():
        assert set(systems) == {"power-of-two", "ours"}
        assert systems["power-of-two"]["over_baseline"] == 1.0
        assert 0.0 < systems["ours"]["quality_goodput"] <= 1.0


class InProcess:
    """A pool without processes."""

    def __init__(self, jobs: int) -> None:
        assert jobs >= 1

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: object, *arguments: object) -> object:
        from concurrent.futures import Future

        future: Future[object] = Future()
        future.set_result(function(*arguments))  # type: ignore[operator]
        return future
