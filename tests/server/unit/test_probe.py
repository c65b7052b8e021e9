"""A forecast that refuses everybody goes on learning: probe steps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import Request
from sortserve.core.sampling_params import SampledToken
from sortserve.cost.learner import CostLearner
from sortserve.cost.machine import Machine
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.probe import IDLE_S, MAX_SHARE, WANTED_S, Prober, prober_of
from sortserve.simulation import Arrival, BlankRunner, Clock, Simulation, TimedRunner, make_engine
from support.scripted import ScriptedRunner, make_request
from support.scripted import make_engine as make_scripted_engine

MACHINE = Machine(
    name="cpu2",
    source="SmolLM2-135M on two cores",
    exits=(9, 15, 30),
    small=(3.4e-3, 2.3e-4, 2.5e-5, 6e-8, 1e-4),
    large=(5e-3, 2.3e-4, 2.1e-5, 6e-8, 1e-4),
    compute={9: 0.447, 15: 0.605, 30: 1.0},
)
CHANGE_S = 60.0
FOLLOWED_S = 10.0
"""So long after a change its verdicts must be right."""

# ---- the lock-out, in simulation ----


def arrival(due_s: float, num_prompt: int, num_output: int, **budget: Any) -> Arrival:
    return Arrival(
        due_s=due_s,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        budget=Budget.from_mapping(budget),
    )


def asked(due_s: float, ttft_ms: float) -> Arrival:
    """Alone on the machine at its usual speed, its first token takes 126 ms at exit 9."""
    return arrival(due_s, 400, 2, ttft_ms=ttft_ms, exit_layer=9, on_miss="reject")


def usual_ttft_s() -> float:
    return MACHINE.model.prefill_s(9, 400)


def busy(rng: random.Random, until_s: float) -> Iterator[Arrival]:
    at = 0.0
    while (at := at + rng.expovariate(2.0)) < until_s:
        yield arrival(at, rng.randint(20, 200), rng.randint(5, 20), exit_layer=rng.choice((9, 30)))


def sparse(rng: random.Random, until_s: float) -> Iterator[Arrival]:
    at = 0.0
    while (at := at + rng.uniform(1.0, 3.0)) < until_s:
        yield arrival(at, rng.randint(20, 200), 10, exit_layer=9)


def refused(rng: random.Random, until_s: float) -> Iterator[Arrival]:
    """Nothing but requests that could be kept at no speed."""
    at = 0.0
    while (at := at + rng.uniform(0.2, 0.8)) < until_s:
        yield asked(at, ttft_ms=5)


class Server:
    """A simulated server on a machine whose speed changes."""

    def __init__(self, speed: Callable[[float], float], *, noise: float = 0.08) -> None:
        rng = random.Random(7)
        self.clock = Clock()
        blank = BlankRunner(MACHINE.exits, num_pages=4000)
        runner = TimedRunner(
            blank,
            self.clock,
            MACHINE.model,
            noise=lambda: speed(self.clock.now) * rng.lognormvariate(0.0, noise),
        )
        config = EngineConfig(max_model_len=1 << 20, enable_prefix_caching=False)
        self.engine: Engine = make_engine(MACHINE, runner, self.clock, config)
        self.simulation = Simulation(self.engine, self.clock)

    def run(self, arrivals: list[Arrival]) -> list[Request]:
        requests = [a.request(f"{i}@{a.due_s}") for i, a in enumerate(arrivals)]
        self.simulation.run(requests)
        return requests

    def refuses(self, request: Request) -> bool:
        return request.request_id in self.simulation.refusals


@pytest.mark.parametrize("traffic", [busy, sparse, refused])
@pytest.mark.parametrize(("before", "after"), [(1.0, 3.0), (3.0, 1.0)])
def test_ten_seconds_after_a_change_of_speed_the_verdicts_are_right(
    traffic: Callable[[random.Random, float], Iterator[Arrival]], before: float, after: float
) -> None:
    wrong = 0
    for seed in range(2):
        server = Server(lambda now: before if now < CHANGE_S else after)
        server.run([*traffic(random.Random(seed), CHANGE_S + FOLLOWED_S)])
        server.simulation.run()
        now, needed_s = server.clock.now, after * usual_ttft_s()
        possible, impossible = server.run(
            [asked(now + 1.0, 1.5e3 * needed_s), asked(now + 1.001, 0.75e3 * needed_s)]
        )
        wrong += server.refuses(possible) + (not server.refuses(impossible))

    assert wrong == 0


def test_after_a_slow_minute_an_idle_server_does_not_go_on_refusing_what_it_could_do() -> None:
    """What was seen: 90 of 90 refused, "needs 532 ms now"; the truth was 125 to 247."""
    server = Server(lambda now: 4.0 if now < CHANGE_S else 1.0)
    server.run(list(busy(random.Random(1), CHANGE_S)))
    idle_s = max(server.clock.now, CHANGE_S)
    asking = [asked(idle_s + 0.5 * i, 384) for i in range(90)]

    requests = server.run(asking)

    verdicts = [server.refuses(request) for request in requests]
    assert verdicts[0], "nothing has told the server yet"
    assert not any(verdicts[20:])
    reports = server.simulation.reports.values()
    assert all(report.met for report in reports if report.budget.has_latency)


@pytest.mark.parametrize("slowness", [16.0, 200.0])
def test_however_slow_the_machine_was_ten_seconds_later_it_is_known_to_be_fast(
    slowness: float,
) -> None:
    """Long probes must not rest for long, and a long prompt that was predicted must be tried."""
    server = Server(lambda now: slowness if CHANGE_S <= now < CHANGE_S + 20.0 else 1.0)
    server.run(list(busy(random.Random(1), CHANGE_S - 5.0)))
    fast_s = CHANGE_S + 20.0
    asking = [asked(CHANGE_S - 2.0 + 0.5 * i, 384) for i in range(80)]

    requests = server.run(asking)

    assert any(map(server.refuses, requests))
    late = [r for r in requests if r.arrival_s >= fast_s + FOLLOWED_S]
    assert late
    assert not any(map(server.refuses, late))


def test_without_probes_it_would_refuse_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prober, "want", lambda self: None)
    server = Server(lambda now: 4.0 if now < CHANGE_S else 1.0)
    server.run(list(busy(random.Random(1), CHANGE_S)))
    idle_s = max(server.clock.now, CHANGE_S)

    requests = server.run([asked(idle_s + 0.5 * i, 384) for i in range(90)])

    assert all(map(server.refuses, requests))


def test_probes_take_a_tenth_of_the_time_of_an_idle_server_and_none_once_nobody_asks() -> None:
    spent: list[tuple[float, float]] = []
    server = Server(lambda now: 1.0)
    runner = server.engine.runner
    execute = runner.execute

    def timed(plan: Any) -> Any:
        before = server.clock.now
        result = execute(plan)
        spent.append((before, server.clock.now - before))
        return result

    runner.execute = timed  # type: ignore[method-assign]
    server.run([asked(0.1 * i, 1) for i in range(300)])
    asked_until_s = 0.1 * 299
    server.run([asked(100.0, 1e6)])

    assert len(spent) > 10
    assert sum(seconds for at, seconds in spent if at < 30.0) <= 30.0 * MAX_SHARE * 1.1
    assert not [at for at, _ in spent if asked_until_s + WANTED_S < at < 100.0]


# ---- one prober ----


class ClockedRunner(ScriptedRunner):
    """Each step takes ten milliseconds."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self.clock = clock
        self.prompt_s = 0.01

    def execute(self, plan: Any) -> list[SampledToken]:
        self.clock.now += self.prompt_s if plan.num_tokens > 1 else 0.01
        return super().execute(plan)


class Idle:
    """An engine that has nothing to do, and its prober."""

    def __init__(self, *, calibrated: bool = True, **options: Any) -> None:
        self.clock = Clock(1000.0)
        self.runner = ClockedRunner(self.clock, **options)
        self.engine = make_scripted_engine(runner=self.runner, clock=self.clock)
        if calibrated:
            self.engine.costs.learn_from(CostLearner(MACHINE.calibration()))
        self.prober = prober_of(self.engine)

    def probe(self) -> int:
        """How many steps it runs now."""
        before = len(self.runner.plans)
        self.prober.run()
        return len(self.runner.plans) - before


def test_nobody_is_refused_nothing_is_probed() -> None:
    assert Idle().probe() == 0


def test_where_nothing_learns_there_is_nothing_to_probe_for() -> None:
    idle = Idle(calibrated=False)
    idle.prober.want()

    assert idle.probe() == 0


def test_a_probe_is_a_large_step_and_small_ones_at_the_shallowest_exit() -> None:
    idle = Idle()
    idle.prober.want()

    assert idle.probe() == 3

    rows = [row for plan in idle.runner.plans for row in plan.rows]
    assert [row.num_tokens for row in rows] == [64, 1, 1]
    assert [row.start for row in rows] == [0, 64, 65]
    assert {row.exit_layer for row in rows} == {idle.engine.exits.layers[0]}


def test_probes_rest_nine_times_as_long_as_they_take_and_wait_for_a_quarter_of_a_second() -> None:
    idle = Idle()
    idle.prober.want()
    idle.probe()

    assert idle.prober.due_s() == pytest.approx(idle.clock.now + 0.27)
    idle.clock.now += 0.2
    assert idle.probe() == 0
    idle.clock.now += 0.08
    assert idle.probe() == 3

    idle.clock.now += 1.0
    idle.prober.note_work()
    assert idle.prober.due_s() == idle.clock.now + IDLE_S


@pytest.mark.parametrize(("prompt_s", "rest_s"), [(1.0, 4.0), (6.0, 6.02)])
def test_a_long_probe_rests_four_seconds_or_as_long_as_it_took(
    prompt_s: float, rest_s: float
) -> None:
    idle = Idle()
    idle.runner.prompt_s = prompt_s
    idle.prober.want()
    idle.probe()
    ended_s = idle.clock.now
    idle.clock.now = ended_s + rest_s - 0.01
    idle.prober.want()

    assert idle.prober.due_s() == pytest.approx(ended_s + rest_s)


def test_real_work_goes_first() -> None:
    idle = Idle()
    idle.prober.want()
    answers = itertools.chain([False, False], itertools.repeat(True))

    idle.prober.run(lambda: next(answers))

    assert len(idle.runner.plans) == 2
    assert idle.engine.kv_cache.pool.num_used == 0


def test_a_prompt_that_takes_long_is_left_out_for_a_while() -> None:
    idle = Idle()
    slow = [(shape, 50.0 * seconds) for shape, seconds in MACHINE.calibration()]
    idle.engine.costs.learn_from(CostLearner(slow))
    idle.runner.prompt_s = 1.5

    probes = []
    for _ in range(3):
        idle.prober.want()
        idle.clock.now += 4.1
        began = len(idle.runner.plans)
        idle.probe()
        probes.append([plan.num_tokens for plan in idle.runner.plans[began:]])

    assert probes == [[64, 1, 1], [1, 1, 1], [64, 1, 1]]


def test_a_prompt_that_only_the_forecast_calls_long_is_not_left_out() -> None:
    idle = Idle()
    slow = [(shape, 50.0 * seconds) for shape, seconds in MACHINE.calibration()]
    idle.engine.costs.learn_from(CostLearner(slow))
    idle.prober.want()

    assert [idle.probe(), [plan.num_tokens for plan in idle.runner.plans]] == [3, [64, 1, 1]]


def test_pages_come_from_the_free_ones_and_go_back_and_a_cached_prefix_stays_true() -> None:
    idle = Idle(num_pages=60)
    for round_ in range(6):
        prompt = "abcdefghijklmnopqrstuvwx"[round_:]
        request = make_request(f"r{round_}", prompt, arrival_s=idle.clock.now)
        idle.engine.validate(request)
        choice = Simulation(idle.engine, idle.clock).desk.choose(request, (6,))
        idle.engine.add_request(request, choice)
        while idle.engine.has_work:
            idle.engine.step()  # the runner asserts that what it reads is what was written
        idle.clock.now += 1.0
        idle.prober.want()
        assert idle.probe() == 3
        idle.engine.check_invariants()
    assert idle.engine.kv_cache.pool.num_used == 0


def test_where_the_pages_are_taken_nothing_is_probed() -> None:
    idle = Idle(num_pages=18)
    with idle.engine.kv_cache.borrowed(10):
        idle.prober.want()
        assert idle.probe() == 0


def test_a_newcomer_is_told_that_a_probe_is_under_way() -> None:
    idle = Idle()
    seen: list[float] = []
    execute = idle.runner.execute

    def looking(plan: Any) -> Any:
        seen.append(idle.prober.busy_until_s() - idle.clock.now)
        return execute(plan)

    idle.runner.execute = looking  # type: ignore[method-assign]
    idle.prober.want()
    idle.probe()

    assert all(0.0 < seconds < 0.1 for seconds in seen)
    assert idle.prober.busy_until_s() < idle.clock.now


def test_a_probe_that_fails_harms_nobody_and_is_not_tried_again_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    idle = Idle()
    idle.runner.fail_next = True
    idle.prober.want()

    idle.probe()
    idle.prober.want()

    assert "a probe step failed" in caplog.text
    assert idle.engine.kv_cache.pool.num_used == 0
    idle.clock.now += 10.0
    idle.prober.want()
    assert idle.probe() == 0


def test_a_refusal_for_want_of_time_is_what_asks_for_probes() -> None:
    server = Server(lambda now: 1.0)
    server.run([asked(0.0, 1)])

    assert isinstance(next(iter(server.simulation.refusals.values())), BudgetUnattainableError)
    assert server.simulation.prober.due_s() < float("inf")
