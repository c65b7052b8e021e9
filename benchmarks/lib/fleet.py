"""Several simulated servers behind a router, each with its own admission.

Every replica is the server's own code under a clock of its own (``sortserve.simulation``). The
fleet goes from arrival to arrival: each replica is stepped until its clock is there, the router is
told what had ended and what had been reported by then, and says where the request goes. What is
refused there is tried once more elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.lib.routers import Router
from sortserve.admission.drain import Drains
from sortserve.core.errors import SortserveError
from sortserve.core.request import Request, RequestReport
from sortserve.cost.machine import Machine
from sortserve.engine.config import EngineConfig
from sortserve.engine.desk import load_report
from sortserve.engine.timed_runner import BlankRunner, Clock, TimedRunner
from sortserve.replicas.load import EngineLoad
from sortserve.simulation import MAX_MODEL_LEN, Simulation, make_engine

__all__ = ["Fleet", "Replica", "Served", "in_sessions"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What became of one request."""

    request: Request
    report: RequestReport | None
    error: SortserveError | None
    replica: int
    num_tries: int


class _NoDrains(Drains):
    """Does not ask when a refused request should come back, which would be half of all work."""

    def ask(self, *_: object) -> None:
        return None


class Replica:
    """One server: its simulation, and the reports it makes on the way."""

    def __init__(
        self,
        machine: Machine,
        *,
        report_every_s: float,
        prefixes: bool,
        seed: str,
        **options: object,
    ) -> None:
        rng, self.clock = random.Random(seed), Clock()
        runner = TimedRunner(
            BlankRunner(machine.exits, num_pages=machine.num_pages),
            self.clock,
            machine,
            noise=lambda: rng.lognormvariate(0.0, machine.noise),
        )
        config = EngineConfig(
            max_model_len=MAX_MODEL_LEN, enable_prefix_caching=prefixes, seed=0, min_quality=0.5
        )
        self.engine = make_engine(machine, runner, self.clock, config)
        self.simulation = Simulation(self.engine, self.clock)
        self.simulation.desk._drains = _NoDrains()  # nobody comes back
        self._every_s = report_every_s
        self._next_s = 0.0
        self.news: list[tuple[float, str | EngineLoad]] = []
        """What has ended, and what was reported, and when; whoever reads it empties it."""

    def run_until(self, until_s: float) -> None:
        """Step until the clock is there."""
        while self.clock.now < until_s:
            if self.engine.has_work:
                self.step()
            else:
                self.simulation.run_until(until_s)
                # It has been idle all along: this is what its last report said.
                self._next_s = min(self._next_s, until_s - self._every_s)
            self._report()

    def step(self) -> None:
        """One step."""
        for output in self.simulation.step():
            if output.report is not None or output.error is not None:
                self.news.append((self.clock.now, output.request_id))

    def _report(self) -> None:
        if self.clock.now < self._next_s:
            return
        self._next_s = max(self._next_s + self._every_s, self.clock.now)
        self.simulation.desk.see(self.engine.demands())
        load = load_report(self.engine, self.simulation.desk, self.engine.stats())
        self.news.append((load.time_s, load))


class Fleet:
    """Replicas behind a router."""

    def __init__(self, replicas: Sequence[Replica], router: Router, *, retries: int = 1) -> None:
        self.replicas, self.router, self._retries = replicas, router, retries
        self._news: list[tuple[float, int, int, str | EngineLoad]] = []
        self._count = itertools.count()
        self._last: dict[str, tuple[int, int]] = {}

    def run(self, requests: Sequence[Request]) -> list[Served]:
        """Serve all requests, in the order of their arrival."""
        for request in requests:
            self._wait_until(request.arrival_s)
            self._offer(request)
        for replica in self.replicas:
            while replica.engine.has_work:
                replica.step()
        return [self._served(request) for request in requests]

    def _wait_until(self, now: float) -> None:
        for i, replica in enumerate(self.replicas):
            replica.run_until(now)
            for time_s, news in replica.news:
                heapq.heappush(self._news, (time_s, next(self._count), i, news))
            replica.news.clear()
        while self._news and self._news[0][0] <= now:
            _, _, i, news = heapq.heappop(self._news)
            if isinstance(news, str):
                self.router.on_ended(i, news)
            else:
                self.router.on_report(i, news)

    def _offer(self, request: Request) -> None:
        open_to = list(range(len(self.replicas)))
        for num_tries in range(1, 2 + self._retries):
            i = self.router.choose(request, open_to, request.arrival_s)
            self._last[request.request_id] = i, num_tries
            simulation = self.replicas[i].simulation
            simulation.refusals.pop(request.request_id, None)
            simulation.arrive(request)
            if request.request_id not in simulation.refusals:
                return
            self.router.on_ended(i, request.request_id)
            open_to.remove(i)

    def _served(self, request: Request) -> Served:
        i, num_tries = self._last[request.request_id]
        simulation, request_id = self.replicas[i].simulation, request.request_id
        return Served(
            request=request,
            report=simulation.reports.get(request_id),
            error=simulation.refusals.get(request_id) or simulation.errors.get(request_id),
            replica=i,
            num_tries=num_tries,
        )


SESSION_TURNS = 5
"""Requests of a session, in the mean."""
NUM_OPEN = 400
"""Sessions that go on at once."""
SHARED = 0.7
"""Of a prompt is what its session began with."""


def in_sessions(requests: Sequence[Request], *, seed: int) -> list[Request]:
    """The same requests, with prompts that begin alike where they are of the same session."""
    rng = random.Random(f"{seed}/sessions")
    sessions: list[int] = []
    changed, num_sessions = [], 0
    for i, request in enumerate(requests):
        if not sessions or rng.random() < 1.0 / SESSION_TURNS:
            sessions = [*sessions[-NUM_OPEN + 1 :], num_sessions]
            num_sessions += 1
            session = sessions[-1]
        else:
            session = rng.choice(sessions)
        num_tokens = len(request.prompt_token_ids)
        num_shared = int(SHARED * num_tokens)
        prompt = (2 * session + 2,) * num_shared + (2 * i + 3,) * (num_tokens - num_shared)
        changed.append(replace(request, prompt_token_ids=prompt))
    return changed
