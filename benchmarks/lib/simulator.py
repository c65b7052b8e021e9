"""The engine's own scheduler, admission and cost model under a fake clock.

Everything that decides is the server's code: `Engine`, `Scheduler`, `AdmissionDesk`,
`CostLearner`. Only the network is replaced: a step takes the time that a cost model says, times
some noise, and its tokens are blank. So thousands of requests take seconds, on machines that are
not here.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.lib.workload import RequestSpec
from sortserve.admission.desk import AdmissionDesk
from sortserve.core.budget import Budget, ExitInfo, ExitTable
from sortserve.core.errors import SortserveError
from sortserve.core.plan import Runner, StepPlan
from sortserve.core.request import (
    GenerationRequest,
    Observer,
    RequestReport,
    StepRecord,
)
from sortserve.core.sampling_params import SampledToken, SamplingParams
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, Line, RowShape, StepShape, step_shape
from sortserve.engine.engine import Engine, EngineConfig

__all__ = [
    "MACHINES",
    "Arrival",
    "Machine",
    "Outcome",
    "Simulation",
    "make_desk",
    "make_engine",
    "measured_machine",
    "request_of",
    "simulate",
]

BLANK = 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is simulated: a model's exits on a machine."""

    name: str
    source: str
    """Where the figures come from."""
    exits: tuple[int, ...]
    small: Line
    large: Line
    compute: Mapping[int, float]
    """Share of the full model's FLOPs per token, by exit."""
    score: Mapping[int, float] | None = None
    noise: float = 0.08
    """Standard deviation of the logarithm of a step's time."""

    @property
    def model(self) -> CostModel:
        """The true times of steps, without the noise."""
        return CostModel(self.small, self.large)

    @property
    def table(self) -> ExitTable:
        """The exits as the server knows them."""
        return ExitTable(
            tuple(
                ExitInfo(
                    exit_layer=e,
                    num_parameters=e,
                    compute=self.compute[e],
                    score=None if self.score is None else self.score[e],
                )
                for e in self.exits
            )
        )


def _machine_8b(name: str, source: str, *, bytes_per_s: float, flop_per_s: float) -> Machine:
    """Llama-3.1-8B in bf16, 32 layers, from a card's memory and arithmetic rates.

    218 M parameters a layer and 525 M in the head; 8 KV heads of 128. Rates reached are taken as
    80 % of the memory's and 50 % of the arithmetic's; 1 ms a step for launches and the host.
    """
    layer_bytes, head_bytes, kv_bytes = 2 * 218e6, 2 * 525e6, 2 * 2 * 8 * 128
    memory, arithmetic = 0.8 * bytes_per_s, 0.5 * flop_per_s
    c0, a = 1e-3 + head_bytes / memory, layer_bytes / memory
    b, d, h = 2 * 218e6 / arithmetic, kv_bytes / memory, 2 * 525e6 / arithmetic
    exits = (8, 16, 24, 32)
    compute = {e: (218 * e + 525) / (218 * 32 + 525) for e in exits}
    line = (c0, a, b, d, h)
    return Machine(
        name=name, source=source, exits=exits, small=line, large=line, compute=compute, noise=0.03
    )


MACHINES = {
    "cpu2": Machine(
        name="cpu2",
        source="SmolLM2-135M bf16 on 2 cores of a server CPU: benchmarks/results, 2026-11-24",
        exits=(9, 15, 21, 30),
        small=(3.4e-3, 2.3e-4, 2.5e-5, 6e-8, 1e-4),
        large=(5e-3, 2.3e-4, 2.1e-5, 6e-8, 1e-4),
        compute={9: 0.447, 15: 0.605, 21: 0.763, 30: 1.0},
    ),
    "h100": _machine_8b(
        "h100",
        "computed, not measured: Llama-3.1-8B on H100 SXM data-sheet rates, 3.35 TB/s, 989 TFLOP/s",
        bytes_per_s=3.35e12,
        flop_per_s=989e12,
    ),
    "a100": _machine_8b(
        "a100",
        "computed, not measured: Llama-3.1-8B on A100 80 GB data-sheet rates, 2.04 TB/s, "
        "312 TFLOP/s",
        bytes_per_s=2.039e12,
        flop_per_s=312e12,
    ),
}


def measured_machine(model_name: str | None, exits: str | None) -> Machine:
    """The machine it runs on, as a server with these flags would time it at its start.

    Raises:
        SortserveError: an exit is wrong, or the model cannot be served.
    """
    from sortserve.process.build import build
    from sortserve.process.config import load_settings

    given = {"model": model_name, "exits": exits}
    serving = build(load_settings({k: v for k, v in given.items() if v is not None}))
    model = CostModel.fit(serving.measure())
    table = serving.checkpoint.exits
    scores = {e: table[e].score for e in table.layers}
    return Machine(
        name="this",
        source="measured by this run",
        exits=tuple(table.layers),
        small=model.small,
        large=model.large,
        compute={e: table[e].compute for e in table.layers},
        score=None if None in scores.values() else {e: s or 0.0 for e, s in scores.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    due_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    budget: Budget = field(default_factory=Budget)
    label: str = ""
    """The class it is counted in."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    arrival: Arrival
    report: RequestReport | None
    """None: it was refused on arrival."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A finished run."""

    outcomes: Sequence[Outcome]
    wall_s: float
    """Simulated seconds."""
    num_steps: int
    num_lowered: int
    """Changes of depth in flight."""
    num_preemptions: int
    step_errors: Sequence[float]
    """Predicted over actual of every step."""


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Runner:
    """Lets the time of a step pass."""

    def __init__(self, machine: Machine, clock: _Clock, rng: random.Random, num_pages: int) -> None:
        self.num_pages = num_pages
        self.block_size = 16
        self.slab_size = math.gcd(*machine.exits)
        self._machine = machine
        self._truth = machine.model
        self._clock = clock
        self._rng = rng

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        noise = self._rng.lognormvariate(0.0, self._machine.noise)
        self._clock.now += self._truth.step_s(step_shape(plan)) * noise
        return [SampledToken(BLANK) for row in plan.rows if row.sampling is not None]


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


def calibration_samples(machine: Machine) -> list[tuple[StepShape, float]]:
    """What the server would have measured at start-up."""
    truth, samples = machine.model, []
    for exit_layer in machine.exits:
        for num_rows in (1, 4, 16, 32):
            for context_len in (16, 256):
                row = RowShape(exit_layer, 1, context_len, samples=True)
                samples.append(StepShape.of([row] * num_rows))
        for num_tokens in (64, 128, 256, 512):
            row = RowShape(exit_layer, num_tokens, num_tokens, samples=True)
            samples.append(StepShape.of([row]))
    return [(shape, truth.step_s(shape)) for shape in samples]


def simulate(
    machine: Machine,
    arrivals: Iterable[Arrival],
    *,
    policy: str = "deadline",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 1024,
    num_pages: int = 200_000,
    overload_delay_s: float = 2.0,
    until_s: float = math.inf,
    seed: int = 0,
) -> Simulation:
    """Run arrivals through the server's own scheduling.

    Args:
        machine: how long steps take.
        arrivals: in any order.
        policy: of the scheduler.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of a step.
        num_pages: of the KV cache.
        overload_delay_s: see ``--overload-delay``.
        until_s: simulated time after which nothing arrives or runs.
        seed: of the noise.
    """
    clock, counts = _Clock(), _Counts()
    engine = make_engine(
        machine,
        _Runner(machine, clock, random.Random(seed), num_pages),
        clock,
        policy=policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        overload_delay_s=overload_delay_s,
        observer=counts,
    )
    desk = make_desk(engine)
    queue = [(a.due_s, i, a) for i, a in enumerate(arrivals)]
    heapq.heapify(queue)
    live: dict[str, Arrival] = {}
    outcomes: list[Outcome] = []
    while (queue or engine.has_work) and clock.now < until_s:
        if not engine.has_work:
            clock.now = max(clock.now, queue[0][0])
        desk.see(engine.demands())
        while queue and queue[0][0] <= clock.now:
            _, serial, arrival = heapq.heappop(queue)
            outcome = _arrive(engine, desk, arrival, str(serial))
            if outcome is None:
                live[str(serial)] = arrival
            else:
                outcomes.append(outcome)
        for output in engine.step():
            if output.report is not None:
                error = None if output.error is None else output.error.message
                arrival = live.pop(output.request_id)
                outcomes.append(Outcome(arrival=arrival, report=output.report, error=error))
    return Simulation(
        outcomes=outcomes,
        wall_s=clock.now,
        num_steps=counts.num_steps,
        num_lowered=counts.num_lowered,
        num_preemptions=counts.num_preemptions,
        step_errors=counts.errors,
    )


def make_engine(
    machine: Machine,
    runner: Runner,
    clock: Callable[[], float],
    *,
    policy: str,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 1024,
    overload_delay_s: float = 2.0,
    observer: Observer | None = None,
) -> Engine:
    """The server's engine over a runner that has no model."""
    engine = Engine(
        runner,
        machine.table,
        eos_token_ids=frozenset(),
        make_text=lambda request: _NoText(),
        config=EngineConfig(
            max_model_len=1 << 20,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            overload_delay_s=overload_delay_s,
            enable_prefix_caching=False,
            seed=0,
        ),
        clock=clock,
        observer=observer,
    )
    engine.costs.learn_from(CostLearner(calibration_samples(machine)))
    return engine


def make_desk(engine: Engine) -> AdmissionDesk:
    """The desk that judges newcomers of an engine."""
    return AdmissionDesk(
        exits=engine.exits,
        policy=engine.policy,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        overload_delay_s=engine.config.overload_delay_s,
        clock=engine.clock,
        expect=engine.expect,
        costs=engine.costs,
    )


def _arrive(
    engine: Engine, desk: AdmissionDesk, arrival: Arrival, request_id: str
) -> Outcome | None:
    spec = RequestSpec(
        num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens
    )
    request = request_of(spec, arrival.budget, request_id, arrival_s=arrival.due_s)
    try:
        choice = desk.choose(request, engine.validate(request))
    except SortserveError as error:
        return Outcome(arrival=arrival, report=None, error=error.message)
    desk.enter(request, choice)
    engine.add_request(request, choice)
    desk.see(engine.demands(), [request_id])
    return None


def request_of(
    spec: RequestSpec, budget: Budget, request_id: str, *, arrival_s: float
) -> GenerationRequest:
    """A request of exact lengths."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=(BLANK,) * spec.num_prompt_tokens,
        sampling=SamplingParams(max_tokens=spec.num_output_tokens, ignore_eos=True),
        budget=budget,
        arrival_s=arrival_s,
    )
