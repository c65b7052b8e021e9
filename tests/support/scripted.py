"""A scripted model: the engine's own code runs, only the network is replaced by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from sortserve.admission.choose import ExitChoice
from sortserve.core.budget import Budget, ExitInfo, ExitTable
from sortserve.core.grammar import Grammar
from sortserve.core.plan import Runner, StepPlan
from sortserve.core.request import Observer, Request, RequestOutput
from sortserve.core.sampling_params import (
    RowFailure,
    SampledToken,
    SamplingParams,
    SamplingRow,
    TokenLogprob,
)
from sortserve.core.schedule import DepthSchedule, ScheduleInfo
from sortserve.core.slabs import Slabs
from sortserve.engine.engine import Engine, EngineConfig, TextStream
from sortserve.engine.sampling.bitmask import make_masks

EOS = 0
VOCAB_SIZE = 128

Rule = Callable[[Sequence[int], int], int]


def next_letter(tokens: Sequence[int], exit_layer: int) -> int:
    """After a letter the next one of the alphabet, whatever the depth."""
    return ord("a") + (tokens[-1] - ord("a") + 1) % 26


def depth_letter(tokens: Sequence[int], exit_layer: int) -> int:
    """A letter that tells the depth it was made at and the number of tokens before it."""
    return ord("a") + (7 * exit_layer + len(tokens)) % 26


def make_exits(
    *layers: int,
    scores: Sequence[float] | None = None,
    schedules: Mapping[str, float | None] = MappingProxyType({}),
) -> ExitTable:
    """Exits of growing cost; scores are the share of layers unless given.

    ``schedules`` are the measured ones, as a command line has them, with their scores.
    """
    full = layers[-1]
    scores = [layer / full for layer in layers] if scores is None else scores
    measured = [
        ScheduleInfo(schedule=DepthSchedule.parse(text), num_tokens=128, compute=1.0, score=score)
        for text, score in schedules.items()
    ]
    return ExitTable(
        tuple(
            ExitInfo(
                exit_layer=layer,
                num_parameters=1000 * layer,
                compute=(layer + 2) / (full + 2),
                score=score,
            )
            for layer, score in zip(layers, scores, strict=True)
        ),
        schedules=tuple(measured),
    )


class ScriptedRunner:
    """Executes plans by a rule, and checks that every position it reads was written before.

    The cache is modelled honestly: each page remembers the token written at each offset, so a wrong
    page table, a lost page or a page shared too far shows as an assertion.
    """

    def __init__(
        self,
        *,
        num_pages: int = 512,
        block_size: int = 4,
        slab_size: int = 2,
        rule: Rule = next_letter,
    ) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self.slabs = Slabs(slab_size)
        self.rule = rule
        self.plans: list[StepPlan] = []
        self.fail_next = False
        self._pages = np.full((num_pages, block_size), -1)

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        self.plans.append(plan)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("scripted failure")
        assert all(row.exit_layer <= plan.depth_cap for row in plan.rows)
        assert all(row.token_from is None for row in plan.rows)
        for row in plan.rows:  # all rows write before any reads, as in a layer
            positions = np.arange(row.start, row.start + len(row.token_ids))
            self._pages[self._places(row.block_table_SB, positions)] = row.token_ids
        sampled: list[Any] = []  # a row whose grammar fails has a failure
        for row in plan.rows:
            if row.prompt_logprobs is not None:
                k = row.prompt_logprobs.num_top
                targets = row.prompt_logprobs.targets(row.start, row.num_tokens)
                said = [SampledToken(token, -1.0, _others(token, k)) for token in targets]
                row.prompt_logprobs.record(row.start, said)
            if row.sampling is None:
                continue
            known = [*row.sampling.prompt_token_ids, *row.sampling.output_token_ids]
            if len(known) == row.context_len - 1:  # the host does not know it yet
                known.append(row.token_ids[-1])
            assert len(known) == row.context_len
            assert row.block_table_SB.shape[0] == self.slabs.count(row.exit_layer)
            known_T = np.asarray(known)
            held_ST = self._pages[self._places(row.block_table_SB, np.arange(len(known)))]
            if (held_ST != known_T).any():
                slab, position = np.argwhere(held_ST != known_T)[0]
                held = held_ST[slab, position]
                raise AssertionError(f"{row.request_id} position {position}, slab {slab}: {held}")
            sampled.append(self._sample(row.sampling, known, row.exit_layer))
        return sampled

    def _places(self, block_table_SB: Any, positions_T: Any) -> tuple[Any, Any]:
        """The pages [slab, position] of positions of a row, and the offsets in them."""
        blocks_T, offsets_T = np.divmod(positions_T, self.block_size)
        return block_table_SB[:, blocks_T], offsets_T

    def _sample(
        self, row: SamplingRow, known: Sequence[int], exit_layer: int
    ) -> SampledToken | RowFailure:
        params = row.params
        token_id = self.rule(known, exit_layer)
        if row.constraint is not None:
            [mask_W] = make_masks([row], VOCAB_SIZE).values()
            if isinstance(mask_W, RowFailure):
                return mask_W
            # The rule's token where the mask allows it, else the next that is allowed.
            allowed = [t for t in range(VOCAB_SIZE) if mask_W[t // 32] >> (t % 32) & 1]
            token_id = min(allowed, key=lambda t: (t - token_id) % VOCAB_SIZE)
        if params.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, -1.0, _others(token_id, params.logprobs))


def _others(token_id: int, count: int) -> tuple[TokenLogprob, ...]:
    """The token first, then those that follow it in the alphabet."""
    return tuple(TokenLogprob((token_id + k) % VOCAB_SIZE, -1.0 - k) for k in range(count))


@dataclass
class AsciiText:
    """Each token is the character of its number; stop strings are cut as the real stream does."""

    params: SamplingParams
    _held: str = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        self._held += chr(token_id)
        for stop in self.params.stop:
            at = self._held.find(stop)
            if at >= 0:
                text, self._held = self._held[:at], ""
                return text, True
        keep = max((len(stop) - 1 for stop in self.params.stop), default=0)
        cut = max(0, len(self._held) - keep)
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


@dataclass
class FakeClock:
    """A clock that moves only when told, or by a fixed tick a reading."""

    now: float = 1000.0
    tick: float = 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def make_request(
    request_id: str = "r",
    prompt: str | Sequence[int] = "a",
    *,
    max_tokens: int = 4,
    budget: Budget | None = None,
    arrival_s: float = 1000.0,
    cache_salt: str = "",
    sample_index: int = 0,
    grammar: Grammar | None = None,
    **sampling: object,
) -> Request:
    tokens = tuple(map(ord, prompt)) if isinstance(prompt, str) else tuple(prompt)
    return Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        budget=budget or Budget(),
        arrival_s=arrival_s,
        cache_salt=cache_salt,
        sample_index=sample_index,
        grammar=grammar,
    )


def make_engine(
    *,
    exits: tuple[int, ...] = (2, 4, 6),
    scores: Sequence[float] | None = None,
    schedules: Mapping[str, float | None] = MappingProxyType({}),
    runner: Runner | None = None,
    clock: Callable[[], float] | None = None,
    observer: Observer | None = None,
    make_text: Callable[[Request], TextStream] = lambda request: AsciiText(request.sampling),
    **config: object,
) -> Engine:
    settings: dict[str, object] = {"max_model_len": 256, "max_num_seqs": 64, "seed": 0, **config}
    return Engine(
        runner or ScriptedRunner(),
        make_exits(*exits, scores=scores, schedules=schedules),
        eos_token_ids=frozenset({EOS}),
        make_text=make_text,
        config=EngineConfig(**settings),  # type: ignore[arg-type]
        clock=clock or FakeClock(),
        observer=observer,
    )


def add(engine: Engine, request: Request, exit_layer: int | None = None) -> None:
    """Add a request at an exit (default: its budget's deepest)."""
    allowed = engine.validate(request)
    engine.add_request(request, ExitChoice(exit_layer or allowed[-1], None, fits=True))


def go_shallower(engine: Engine, request_id: str, exit_layer: int, reason: str = "test") -> None:
    """Change the depth of a live request, as a policy would."""
    [sequence] = (s for s in engine.scheduler.sequences() if s.request_id == request_id)
    engine.scheduler.go_shallower(sequence, exit_layer, reason)


@dataclass
class Collected:
    """What a request has produced."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    last: RequestOutput | None = None


def run(engine: Engine, *, max_steps: int = 2000, check: bool = True) -> dict[str, Collected]:
    """Step until nothing is left; all outputs by request."""
    results: dict[str, Collected] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return results
        collect(engine.step(), results)
        if check:
            engine.check_invariants()
    raise AssertionError(f"work is left after {max_steps} steps")


def collect(outputs: list[RequestOutput], results: dict[str, Collected]) -> None:
    for output in outputs:
        result = results.setdefault(output.request_id, Collected())
        result.text += output.text
        result.tokens += output.tokens
        result.token_ids += [token.token_id for token in output.tokens]
        result.exits += [output.exit_layer] * len(output.tokens)
        result.last = output
