"""One request's life in the engine (no torch).

         admit                finish
WAITING ───────▶ RUNNING ───────────▶ FINISHED
   ▲  ╲             │                    ▲
   │   ╲────────────┼── finish (abort) ──╯
   ╰────────────────╯
        preempt

There is no prefill phase and no decode phase, only counts: ``num_tokens - num_computed_tokens`` is
the work left, and a row samples when a step brings it to zero.

A step counts from the moment it is launched: what it computes counts as computed, and the token
that it samples as one of the sequence, though nobody here knows its value before the step is over
(``num_unknown_tokens``). So the next step can be planned meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sortserve.core.budget import Deadlines
from sortserve.core.grammar import Constraint
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import Estimate, ExitChange, Request
from sortserve.core.sampling_params import SamplingRow
from sortserve.core.schedule import DepthSchedule

__all__ = ["Promise", "Sequence", "Status"]

MAX_FORCED_IN_DECODE = 31
"""A longer run of forced tokens is read like a part of a prompt, when there is time for it."""


@dataclass(frozen=True)
class Promise:
    """The times that admission found can be kept, and how they are spread over the request."""

    targets: Deadlines
    """What it is paced to: the budget's deadlines, or a little earlier."""
    first_due_s: float
    """When the first token should be out; infinite if only later tokens were promised a time."""
    gap_s: float
    """The mean time between tokens that was planned for; infinite likewise."""


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_ALLOWED = {
    Status.WAITING: {Status.RUNNING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.FINISHED},
    Status.FINISHED: set[Status](),
}


class Sequence:
    """A request, the tokens it has so far, and how far its KV reaches.

    The scheduler owns ``status``, ``num_computed_tokens`` and the depth; the engine appends tokens
    and stamps times.
    """

    def __init__(
        self,
        request: Request,
        *,
        exit_layer: int,
        seed: int,
        stop_token_ids: frozenset[int],
        estimate: Estimate | None = None,
        floor_layer: int | None = None,
        promise: Promise | None = None,
        schedule: DepthSchedule | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.request = request
        # Asked for many times a step: as attributes they cost no calls.
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.exit_layer = exit_layer
        # What the model says of a prompt, it says at one exit.
        keeps_exit = floor_layer is None or request.prompt_logprobs is not None
        self.floor_layer = exit_layer if keeps_exit or floor_layer is None else floor_layer
        self.promise = promise
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.estimate = estimate
        self.schedule = schedule or request.budget.schedule
        self.deadlines: Deadlines = request.budget.deadlines(request.arrival_s)

        self.constraint = constraint

        self.output_token_ids: list[int] = []
        self._sampling_row = SamplingRow(
            params=request.sampling,
            seed=seed,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            stop_token_ids=stop_token_ids,
            constraint=constraint,
        )
        self.num_computed_tokens = 0
        self.num_forced_tokens = 0
        self._num_forced_last = 0  # of them, after the last sampled one
        # Tokens of steps under way: the latest, after those of ``output_token_ids``.
        self.num_unknown_tokens = 0
        # Where the plan launched last samples the latest of them: see ``RowPlan.token_from``.
        self.sampled_at = 0
        self.num_cached_tokens = 0
        # Leading tokens that the prefix cache held when it came: nobody keeps them for it.
        self.num_found_tokens = 0
        # The names of its leading blocks, as far as the prefix cache was asked for them.
        self.block_digests: list[bytes] = []
        self.num_preemptions = 0
        self.expected_tokens: int | None = None
        self.tokens_by_exit: dict[int, int] = {}
        self.exit_changes: list[ExitChange] = []

        self.last_scheduled_s = request.arrival_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._status = Status.WAITING

    @property
    def status(self) -> Status:
        """Where the sequence is; ``move_to`` is the one door."""
        return self._status

    def move_to(self, status: Status) -> None:
        """Follow an edge of the diagram; any other is our mistake."""
        assert status in _ALLOWED[self._status], (
            f"{self.request_id}: {self._status.value} -> {status.value} is not allowed"
        )
        self._status = status

    def go_shallower(self, exit_layer: int, reason: str) -> None:
        """Continue at a shallower exit, from the next token on."""
        since_s = self.last_scheduled_s if self.last_token_s is None else self.last_token_s
        change = ExitChange(self.exit_layer, exit_layer, reason, self.num_output_tokens, since_s)
        self.exit_changes.append(change)
        self.exit_layer = exit_layer
        self.floor_layer = min(self.floor_layer, exit_layer)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of steps under way included."""
        return len(self.output_token_ids) + self.num_unknown_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens so far: prompt and output."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_unknown_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens without KV: the work left before the next sample."""
        num_output = len(self.output_token_ids) + self.num_unknown_tokens
        return self.num_prompt_tokens + num_output - self.num_computed_tokens

    @property
    def reading(self) -> tuple[int, int]:
        """Tokens to read before its next one, and those before them, which need no reading.

        What the prefix cache held when it came counts as read while it waits: most of it will
        still be there.
        """
        num_read = self.num_computed_tokens
        if self._status is Status.WAITING:
            num_read = max(num_read, self.num_found_tokens)
        return self.num_tokens - num_read, num_read

    @property
    def is_complete(self) -> bool:
        """Whether it has all the tokens that it may have: no further step is for it."""
        return self.num_output_tokens >= self.request.sampling.max_tokens

    @property
    def must_be_known(self) -> bool:
        """Whether its next step can only be planned when all its tokens are known.

        Penalties count the tokens themselves. A scheduled change of depth gives pages back that a
        step under way would need again if it failed.
        """
        if self.num_unknown_tokens == 0 or self.is_complete:
            return False
        changes_depth = (
            self.schedule is not None
            and self.schedule.exit_at(self.num_output_tokens) < self.exit_layer
        )
        return changes_depth or self._sampling_row.needs_history

    @property
    def num_sampled_tokens(self) -> int:
        """Output tokens that took a step of their own: all that its grammar did not force."""
        return len(self.output_token_ids) - self.num_forced_tokens

    @property
    def num_ready_tokens(self) -> int:
        """Tokens of one decode step: the last sampled one, and those that were forced after it."""
        return 1 + min(self._num_forced_last, MAX_FORCED_IN_DECODE)

    @property
    def is_decoding(self) -> bool:
        """Whether what is pending is no prompt, but what the last step brought."""
        return self.num_pending_tokens <= self.num_ready_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens at positions ``start`` to ``stop``, as far as they are known."""
        prompt = self.request.prompt_token_ids
        num_prompt = len(prompt)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        head = list(prompt[start:stop])
        if stop > num_prompt:
            head += self.output_token_ids[: stop - num_prompt]
        return head

    def append_token(self, token_id: int, exit_layer: int, *, forced: bool = False) -> None:
        """The oldest token of a step under way is known; ``exit_layer`` is where it was made.

        A forced one is of no step yet: the next one reads it, so a schedule's depth for it counts.
        """
        if forced:
            self.num_forced_tokens += 1
            if self.schedule is not None:
                exit_layer = min(exit_layer, self.schedule.exit_at(self.num_output_tokens))
        else:
            assert self.num_unknown_tokens > 0, "no step under way has sampled for it"
            self.num_unknown_tokens -= 1
        self._num_forced_last = self._num_forced_last + 1 if forced else 0
        self.output_token_ids.append(token_id)
        self.tokens_by_exit[exit_layer] = self.tokens_by_exit.get(exit_layer, 0) + 1

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Where to record what the model says of the prompt, as long as something is missing."""
        wanted = self.request.prompt_logprobs
        return None if wanted is None or wanted.is_complete else wanted

    @property
    def num_scored_tokens(self) -> int:
        """Of what is pending, tokens that pass the head so that the next one can be judged."""
        return 0 if self.prompt_logprobs is None else self.num_pending_tokens - 1

    def sampling_row(self) -> SamplingRow:
        """What the sampler needs to choose the next token: always the same object."""
        return self._sampling_row

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}, {self._status.value}, exit {self.exit_layer}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens, "
            f"{self.num_unknown_tokens} of them unknown)"
        )
