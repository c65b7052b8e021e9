"""What goes into the engine and what comes out of it: plain frozen values (no torch).

Times are seconds on the engine's one monotonic clock unless a name says ``_ms``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from sortserve.core.budget import Budget
from sortserve.core.errors import SortserveError
from sortserve.core.grammar import Grammar
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.sampling_params import SampledToken, SamplingParams
from sortserve.core.tracing import TraceParent

__all__ = [
    "EXPECTED_TOKENS",
    "AdmissionStats",
    "EngineStats",
    "Estimate",
    "ExitChange",
    "FinishReason",
    "Observer",
    "Request",
    "RequestOutput",
    "RequestReport",
    "StepRecord",
]

EXPECTED_TOKENS = 256
"""Output tokens that a latency budget is planned for where the client sets no limit: the context's
end, thousands of tokens away, would push every such request to the shallowest exit."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    DEADLINE = "deadline"
    """``on_miss=truncate`` and the deadline came."""
    ABORT = "abort"
    """The client went away, or the server shut down."""
    ERROR = "error"


class ExitChange(NamedTuple):
    """A change of depth in flight."""

    from_layer: int
    to_layer: int
    reason: str
    """As in ``StepRecord.exit_changes``."""
    num_tokens: int
    """Output tokens before it."""
    since_s: float
    """When the last of them came; before the first, when the prompt was last worked on."""


@dataclass(frozen=True)
class Estimate:
    """Predicted times of a request at one exit, in seconds from its arrival."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate. ``n > 1`` is n requests that differ in ``sample_index``."""

    request_id: str
    """Unique among the live requests."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    budget: Budget = field(default_factory=Budget)
    arrival_s: float
    weight: float = 1.0
    """What its answer is worth beside that of another request; above 0."""
    is_one_of_several: bool = False
    """Others came with it in one request of a client, and all of them have one exit."""
    sample_index: int = 0
    """Which of the n samples this is: moves the seed, so that samples differ."""
    expected_tokens: int | None = None
    """Output tokens to predict times with where the client set no limit; None: ``max_tokens``."""
    length_class: tuple[str, ...] = ()
    """Whose answers are about as long: the route and the model as the client named it. Empty: one
    class for all."""
    cache_salt: str = ""
    """Prefixes are shared only between requests of equal salt."""
    grammar: Grammar | None = None
    """What the answer must look like, compiled; None: anything."""
    prompt_logprobs: PromptLogprobs | None = None
    """Filled before the first token is out; such a request keeps the exit that it starts at, and
    computes its whole prompt. None: nobody asks what the model says of the prompt."""
    trace: TraceParent | None = None
    """Of what its spans are a part; None: it is not traced."""
    block_digests: dict[int, list[bytes]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The names of its prompt's leading blocks, by the size of a block, as far as the prefix cache
    was asked for them: who asks again hashes nothing again. One thread at a time asks."""

    @property
    def num_scored_tokens(self) -> int:
        """Tokens of its prompt that pass the head, so that the next one can be judged."""
        return 0 if self.prompt_logprobs is None else len(self.prompt_token_ids) - 1

    @property
    def has_certain_length(self) -> bool:
        """Whether its answer has as many tokens as it may have, whatever they are."""
        sampling = self.sampling
        ends = not sampling.ignore_eos or sampling.stop or sampling.stop_token_ids
        return self.grammar is None and not ends


@dataclass(frozen=True, kw_only=True)
class RequestReport:
    """The whole story of one finished request."""

    request_id: str
    budget: Budget
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    num_output_tokens: int
    exit_layer: int
    """The exit in use at the end."""
    tokens_by_exit: Mapping[int, int]
    compute: float
    """Mean share of the full model's FLOPs per output token; in (0, 1]."""
    predicted: Estimate | None
    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    finished_s: float
    num_preemptions: int = 0
    expected_tokens: int | None = None
    """Output tokens that it was planned for when it came."""
    outcome: str | None = None
    """Of a latency budget: met, missed, degraded or truncated; None without one."""
    seed: int = 0
    degraded: bool = False
    """Whether a token was made shallower than the deepest exit that its budget allows."""
    score: float = 1.0
    """Mean score of its tokens (``ExitTable.scores``); 1 is as good as full depth."""
    weight: float = 1.0
    """As of the request."""
    exit_changes: tuple[ExitChange, ...] = ()
    """In their order."""
    trace: TraceParent | None = None
    """As of the request."""

    @property
    def e2e_s(self) -> float:
        """Arrival to the last token (to the end, if no token came)."""
        return (self.last_token_s or self.finished_s) - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def queue_s(self) -> float | None:
        """Arrival to the first step that worked on the request."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s

    @property
    def met(self) -> bool | None:
        """Whether every time of the budget was kept; None if it bounds no time."""
        budget = self.budget
        if not budget.has_latency:
            return None
        if self.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            return False
        return (
            _within(self.e2e_s, budget.latency_ms)
            and _within(self.ttft_s, budget.ttft_ms)
            and _within(self.tpot_s, budget.tpot_ms, missing=self.num_output_tokens == 1)
        )

    def budget_reply(self) -> dict[str, Any]:
        """The ``budget`` object of a reply."""
        predicted = self.predicted
        return {
            "exit_layer": self.exit_layer,
            "tokens_by_exit": {str(exit_): n for exit_, n in self.tokens_by_exit.items()},
            "compute": round(self.compute, 4),
            "degraded": self.degraded,
            "predicted_ms": None if predicted is None else _ms(predicted.e2e_s),
            "predicted_ttft_ms": None if predicted is None else _ms(predicted.ttft_s),
            "predicted_tpot_ms": None if predicted is None else _ms(predicted.tpot_s),
            "actual_ms": _ms(self.e2e_s),
            "ttft_ms": _ms(self.ttft_s),
            "tpot_ms": _ms(self.tpot_s),
            "met": self.met,
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _within(seconds: float | None, limit_ms: float | None, *, missing: bool = False) -> bool:
    if limit_ms is None:
        return True
    if seconds is None:
        return missing
    return seconds * 1e3 <= limit_ms


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """What one step added to one request. The last one has ``finish_reason`` and ``report``."""

    request_id: str
    text: str = ""
    """New text, never half a character; concatenated it is the whole answer."""
    tokens: tuple[SampledToken, ...] = ()
    """New tokens. The token that ended the request is among them, its text is not."""
    exit_layer: int = 0
    finish_reason: FinishReason | None = None
    report: RequestReport | None = None
    error: SortserveError | None = None
    """Set on the last output if the engine failed the request."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step did, for the metrics."""

    duration_s: float
    predicted_s: float | None
    depth_cap: int
    rows_by_exit: Mapping[int, int]
    tokens_by_exit: Mapping[int, int]
    """Output tokens that this step brought, forced ones included."""
    layers_run: int
    """Token-layers run; ``layers_full`` is what full depth would have run."""
    layers_full: int
    ttfts: tuple[tuple[int, float], ...] = ()
    """(exit, seconds) of the first tokens of this step."""
    itls: tuple[tuple[int, float], ...] = ()
    """(exit, seconds) of the gaps that this step's further tokens closed."""
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens of the requests first scheduled in this step, cached ones included."""
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache, and found."""
    prefix_cache_hits: int = 0
    exit_changes: tuple[tuple[int, int, str], ...] = ()
    """(from, to, reason)."""
    failed_rows: Mapping[str, int] = field(default_factory=dict)
    """Rows that gave no token, by reason. A step with no other row has failed as a whole."""
    was_retried: bool = False
    """It failed with all its rows and was run again."""
    policy_failed: bool = False
    """The policy failed, and a plain rule stood in for it."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine's state between two steps."""

    running_by_exit: Mapping[int, int] = field(default_factory=dict)
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_pages_used: int = 0
    """Pages held by live requests."""
    kv_pages_cached: int = 0
    """Unreferenced pages that the prefix cache still holds; free for the taking."""
    kv_pages_total: int = 0

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return sum(self.running_by_exit.values())


@dataclass(frozen=True, kw_only=True)
class AdmissionStats:
    """What the next newcomer would meet."""

    pressure: float = 0.0
    """Share of the machine that the live promises need (``scheduling.capacity``); 0 without a cost
    model."""
    overload_level: int = 0
    """Exits that overload takes off, for requests that it may make shallower."""
    min_quality: float = 0.0
    """The floor of requests that name none."""
    default_exit_layer: int = 0
    """Where a request without a budget of its own would start."""


class Observer(Protocol):
    """Who is told what the engine does. Called on the engine's thread; must be quick."""

    def on_step(self, record: StepRecord) -> None:
        """A step is over."""

    def on_finished(self, report: RequestReport) -> None:
        """A request is over."""

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """A request was refused before it entered the queue."""

    def on_forecast_failed(self) -> None:
        """No times could be predicted for a request; it was let in without a promise."""

    def on_probe_step(self) -> None:
        """An idle engine has run a step for no request, to see what steps cost."""
