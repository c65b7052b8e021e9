"""The border between scheduler and runner: what to run in one step (no torch, no logic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingRow
from sortserve.core.slabs import Slabs

__all__ = ["Launcher", "Pending", "RowPlan", "Runner", "RunnerLost", "StepPlan"]


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """One sequence's share of a step."""

    request_id: str
    exit_layer: int
    start: int
    """Position of the first token to run: the number of tokens whose KV exists."""
    token_ids: Sequence[int]
    """Tokens to run, at least one."""
    block_table_SB: NDArray[np.int32]
    """Page ids [slabs up to the exit, blocks of tokens], a view: read it before the next step."""
    sampling: SamplingRow | None
    """How to sample after the last token; None while a prompt is unfinished."""
    prompt_len: int | None = None
    """Tokens of the prompt, the first of the sequence. None: a single token was generated, several
    are of the prompt."""
    token_from: int | None = None
    """The last of ``token_ids`` is not known yet, and what stands there means nothing: it is what
    the plan launched before this one samples for its row of this number, counting only the rows
    that sample. None: all are known."""
    num_output_tokens: int | None = None
    """Generated before the token to sample: the position that its noise is drawn from.
    ``sampling.output_token_ids`` may hold one less, whose value is not known yet. None: as many as
    it holds."""
    prompt_logprobs: PromptLogprobs | None = None
    """Where to record what the model says of the prompt's tokens; None: nobody asks."""

    @property
    def num_tokens(self) -> int:
        """Tokens to run."""
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens to run are of the prompt."""
        if self.prompt_len is None:
            return self.num_tokens if self.num_tokens > 1 else 0
        return min(max(self.prompt_len - self.start, 0), self.num_tokens)

    @property
    def num_head_tokens(self) -> int:
        """How many of the tokens to run pass the head."""
        if self.prompt_logprobs is None:
            return int(self.sampling is not None)
        num_targets = len(self.prompt_logprobs.targets(self.start, self.num_tokens))
        return num_targets + int(self.sampling is not None)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Rows to run together, deepest exit first."""

    rows: tuple[RowPlan, ...]
    depth_cap: int
    """No row is deeper; rows of deeper exits sit this step out."""
    first_scheduled: tuple[str, ...] = ()
    """Requests that no step has worked on before."""
    num_preemptions: int = 0
    """Requests sent back to the queue since the plan before, to make room."""
    exit_changes: tuple[tuple[int, int, str], ...] = ()
    """(from, to, reason) of the requests that went shallower since the plan before."""
    policy_failed: bool = False
    """The policy raised, or chose what cannot be run, and a plain rule stood in for it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)


class RunnerLost(Exception):
    """A runner can execute nothing any more: no row is to blame, and the engine must end."""


class Runner(Protocol):
    """What executes a plan: weights and KV, no queues."""

    num_pages: int
    block_size: int
    slabs: Slabs

    def execute(self, plan: StepPlan) -> Sequence[SampledToken | RowFailure]:
        """Run the plan; one result for each row that samples, in the plan's order.

        Raises:
            RunnerLost: it will never run another one.
        """


class Pending(Protocol):
    """A plan that has been launched."""

    def result(self) -> Sequence[SampledToken | RowFailure]:
        """What ``Runner.execute`` gives, or raises, once it is there."""


class Launcher(Runner, Protocol):
    """A runner that runs a plan while its caller does something else."""

    def launch(self, plan: StepPlan) -> Pending:
        """Run the plan after all that were launched before it, and do not wait for it.

        Its rows may take tokens from the plan launched before (``token_from``); a row of that one
        that failed gives any token that the model can read. What the plan only shows
        (``block_table_SB``) has been read when this returns. ``execute`` is this and its result.
        """
