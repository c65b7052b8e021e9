"""What would my traffic do? The server's own scheduling under a clock that no machine moves.

Everything that decides is the server's code: ``Engine``, ``Scheduler``, ``AdmissionDesk``,
``CostLearner``. Only the network is replaced: a step takes the time that a cost model says, times
some noise, and its tokens are blank. So thousands of requests take seconds, for machines that are
not here. For example, whether this machine keeps half a second for a hundred requests that come
three a second, and at which depth:

    from sortserve.core.budget import Budget
    from sortserve.process.profiling import measured_machine
    from sortserve.simulation import Arrival, simulate

    machine = measured_machine("sorted-smollm2-135m")
    budget = Budget(latency_ms=500)
    arrivals = [
        Arrival(due_s=i / 3, num_prompt_tokens=200, num_output_tokens=40, budget=budget)
        for i in range(100)
    ]
    run = simulate(machine, arrivals, policy="deadline")

    served = [o.report for o in run.outcomes if o.report is not None]
    print(f"{len(served)} of {len(arrivals)} were promised an answer in time,")
    print(f"{sum(bool(report.met) for report in served)} had one,")
    print(f"made with {sum(report.compute for report in served) / len(served):.0%} of the FLOPs")

``measured_machine`` times a model here; a ``Machine`` can as well be written down from the data
sheet of a card. What is not simulated: HTTP, tokenising, answers that end before their time.

Below ``simulate`` is ``Simulation``, which takes any engine whose runner moves the clock.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sortserve.admission.choose import ExitChoice
from sortserve.core.budget import DEFAULT_MIN_QUALITY, Budget
from sortserve.core.errors import SortserveError
from sortserve.core.plan import Runner
from sortserve.core.request import (
    Observer,
    Request,
    RequestOutput,
    RequestReport,
    StepRecord,
)
from sortserve.core.sampling_params import SamplingParams
from sortserve.cost.learner import CostLearner
from sortserve.cost.machine import Machine
from sortserve.engine.desk import desk_of, room_of
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.probe import prober_of
from sortserve.engine.timed_runner import BLANK, BlankRunner, Clock, TimedRunner
from sortserve.scheduling.objective import DEFAULT_OBJECTIVE

__all__ = [
    "Arrival",
    "BlankRunner",
    "Clock",
    "Outcome",
    "Simulated",
    "Simulation",
    "TimedRunner",
    "make_engine",
    "simulate",
]

MAX_MODEL_LEN = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    due_s: float
    """Seconds from the start of the run."""
    num_prompt_tokens: int
    num_output_tokens: int
    budget: Budget = field(default_factory=Budget)
    label: str = ""
    """The class it is counted in."""

    def request(self, request_id: str) -> Request:
        """What the engine gets: a request of exactly these lengths."""
        return Request(
            request_id=request_id,
            prompt_token_ids=(BLANK,) * self.num_prompt_tokens,
            sampling=SamplingParams(max_tokens=self.num_output_tokens, ignore_eos=True),
            budget=self.budget,
            arrival_s=self.due_s,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    arrival: Arrival
    report: RequestReport | None
    """None: it was refused on arrival."""
    error: SortserveError | None = None
    """Why it was refused, on arrival or later."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A finished run."""

    outcomes: Sequence[Outcome]
    """In the order of the arrivals given."""
    wall_s: float
    """Simulated seconds."""
    num_steps: int
    num_lowered: int
    """Changes of depth in flight."""
    num_preemptions: int
    step_errors: Sequence[float]
    """Predicted over actual of every step."""


def simulate(
    machine: Machine,
    arrivals: Iterable[Arrival],
    *,
    policy: str = "deadline",
    objective: str = DEFAULT_OBJECTIVE,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 1024,
    num_pages: int | None = None,
    min_quality: float = DEFAULT_MIN_QUALITY,
    overload_delay_s: float = 2.0,
    overload_degrade: bool = False,
    seed: int = 0,
) -> Simulated:
    """Run arrivals through the server's own scheduling until the last is answered.

    Args:
        machine: how long steps take.
        arrivals: in any order.
        policy: of the scheduler.
        objective: of the choice of exits.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of a step.
        num_pages: of the KV cache; None: the machine's.
        min_quality: see ``--min-quality``.
        overload_delay_s: see ``--overload-delay``.
        overload_degrade: see ``--overload-degrade``.
        seed: of the noise.
    """
    clock, counts, rng = Clock(), _Counts(), random.Random(seed)
    runner = TimedRunner(
        BlankRunner(machine.exits, num_pages=num_pages or machine.num_pages),
        clock,
        machine,
        noise=lambda: rng.lognormvariate(0.0, machine.noise),
    )
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        policy=policy,
        objective=objective,
        min_quality=min_quality,
        overload_delay_s=overload_delay_s,
        overload_degrade=overload_degrade,
        enable_prefix_caching=False,  # blank prompts would share all their pages
        seed=0,
    )
    engine = make_engine(machine, runner, clock, config, counts)
    simulation, known = Simulation(engine, clock), list(arrivals)
    simulation.run(arrival.request(str(i)) for i, arrival in enumerate(known))
    return Simulated(
        outcomes=[
            Outcome(
                arrival=arrival,
                report=simulation.reports.get(str(i)),
                error=simulation.refusals.get(str(i)) or simulation.errors.get(str(i)),
            )
            for i, arrival in enumerate(known)
        ],
        wall_s=clock.now,
        num_steps=counts.num_steps,
        num_lowered=counts.num_lowered,
        num_preemptions=counts.num_preemptions,
        step_errors=counts.errors,
    )


# ---- below: any engine, any runner ----


class Simulation:
    """A server without threads: requests arrive at their times, one step follows the other.

    Args:
        engine: its runner must move the clock.
        clock: the engine's.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self.clock = engine, clock
        self.prober = prober_of(engine)
        self.desk = desk_of(engine, busy_until_s=self.prober.busy_until_s)
        self.choices: dict[str, ExitChoice] = {}
        """The exits that requests were let in at."""
        self.refusals: dict[str, SortserveError] = {}
        """Why requests were refused on arrival."""
        self.reports: dict[str, RequestReport] = {}
        self.errors: dict[str, SortserveError] = {}
        """What ended requests that had been let in."""

    def arrive(self, request: Request) -> None:
        """A request is let in, or refused, now, between two steps."""
        self._see()
        if (choice := self._judge(request)) is not None:
            self.engine.add_request(request, choice)

    def arrive_during(self, requests: Sequence[Request]) -> None:
        """Requests that came while the last step ran: each was judged then, as servers do.

        Nothing was known of that step, so the desk must have seen the engine before it.
        """
        end_s = self.clock.now
        let_in = list[tuple[Request, ExitChoice]]()
        for request in requests:
            self.clock.now = request.arrival_s
            if (choice := self._judge(request)) is not None:
                self.desk.enter(request, choice)
                let_in.append((request, choice))
        self.clock.now = end_s
        for request, choice in let_in:
            self.engine.add_request(request, choice)
        self._see(taken=[request.request_id for request, _ in let_in])

    def _see(self, taken: Iterable[str] = ()) -> None:
        self.desk.see(self.engine.demands(), taken, room_of(self.engine))

    def _judge(self, request: Request) -> ExitChoice | None:
        """The choice for a request; None: it is refused."""
        try:
            choice = self.desk.choose(request, self.engine.validate(request))
        except SortserveError as error:
            self.refusals[request.request_id] = error
            self.prober.want()
            return None
        self.choices[request.request_id] = choice
        return choice

    def step(self) -> list[RequestOutput]:
        """One step of the engine."""
        outputs = self.engine.step()
        self.prober.note_work()
        for output in outputs:
            if output.report is not None:
                self.reports[output.request_id] = output.report
            if output.error is not None:
                self.errors[output.request_id] = output.error
        return outputs

    def run(self, requests: Iterable[Request] = ()) -> None:
        """Let requests arrive when they are due, and step until nothing is left."""
        queue = deque(sorted(requests, key=lambda request: request.arrival_s))

        def due() -> Iterator[Request]:
            while queue and queue[0].arrival_s <= self.clock.now:
                yield queue.popleft()

        while queue or self.engine.has_work:
            if not self.engine.has_work:
                self._idle(until_s=queue[0].arrival_s)
                for request in due():
                    self.arrive(request)
            self._see()
            self.step()
            self.arrive_during(list(due()))

    def run_until(self, until_s: float) -> None:
        """Step until the clock is there; the step that passes it is the last."""
        while self.clock.now < until_s:
            if self.engine.has_work:
                self.step()
            else:
                self._idle(until_s=until_s)

    def _idle(self, *, until_s: float) -> None:
        while (due_s := self.prober.due_s()) < until_s and self.clock.now < until_s:
            self.clock.now = max(self.clock.now, due_s)
            self.prober.run(lambda: self.clock.now >= until_s)
        self.clock.now = max(self.clock.now, until_s)


def make_engine(
    machine: Machine,
    runner: Runner,
    clock: Callable[[], float],
    config: EngineConfig,
    observer: Observer | None = None,
) -> Engine:
    """The server's engine over a runner without a model, calibrated for a machine."""
    engine = Engine(
        runner,
        machine.table,
        eos_token_ids=frozenset(),
        make_text=lambda request: _NoText(),
        config=config,
        clock=clock,
        observer=observer,
    )
    engine.costs.learn_from(CostLearner(machine.calibration()))
    return engine


class _NoText:
    def push(self, token_id: int) -> tuple[str, bool]:
        return "", False

    def finish(self) -> str:
        return ""


class _Counts:
    """Counts what the engine tells."""

    def __init__(self) -> None:
        self.num_steps = self.num_lowered = self.num_preemptions = 0
        self.errors: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        self.num_steps += 1
        self.num_lowered += len(record.exit_changes)
        self.num_preemptions += record.num_preemptions
        if record.predicted_s:
            self.errors.append(record.predicted_s / record.duration_s)

    def on_finished(self, report: RequestReport) -> None:
        """The simulation sees them itself."""

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Nor these."""

    def on_forecast_failed(self) -> None:
        """Nor these."""

    on_probe_step = on_forecast_failed
