"""Steps that nobody asked for, so that the forecast cannot lock itself out (no torch).

The cost model learns from the steps that run. A machine that was slow for a minute is predicted to
be slow; if every request is refused for that, none runs, and nothing would ever say otherwise. So
while requests are refused and the engine is idle, it reads a short prompt of its own now and then,
and generates a few tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import SampledToken, SamplingParams, SamplingRow
from sortserve.cost.costs import Costs
from sortserve.cost.model import REGIME_TOKENS, CostModel, StepShape, step_shape
from sortserve.engine.engine import Engine
from sortserve.scheduling.kv_cache import KVCacheManager

__all__ = ["Prober", "prober_of"]

logger = logging.getLogger(__name__)

IDLE_S = 0.25
"""Nothing is probed sooner after the last step of a request, or after the last probe."""
MAX_SHARE = 0.1
"""Of the time of an idle engine ..."""
MAX_REST_S = 4.0
"""... but no rest is longer, unless the probe was: the machine may be faster by now."""
WANTED_S = 5.0
"""A refusal is worth probes for so long."""
PROMPT_TOKENS = 64
"""A large step, as small as one may be (see ``REGIME_TOKENS``)."""
NUM_DECODES = 2
MAX_PROMPT_S = 0.25
"""A prompt that is predicted to take longer is left out if the last one did: a newcomer might have
to wait for it. What its steps cost follows from the small ones ..."""
PROMPT_REST = 4.0
"""... for so many times as long as it took, and for so many seconds at least. Then it is tried: the
prediction may be what is wrong."""
REST_S = 60.0
"""After a probe that failed."""


class Prober:
    """Runs probes on the engine's thread; any thread may say that they are wanted.

    The prompt and its tokens are a sequence like any other, at the shallowest exit and on free
    pages, which go back empty: no request's keys and values are touched and no prefix is kept.

    Args:
        runner: executes plans.
        kv_cache: lends the pages.
        costs: learn from the steps.
        exit_layer: where they exit.
        max_num_tokens: most tokens of one step, and of the sequence.
        clock: the engine's.
        on_start: called before each step.
        on_step: called after each step.
    """

    def __init__(
        self,
        runner: Runner,
        kv_cache: KVCacheManager,
        costs: Costs,
        *,
        exit_layer: int,
        max_num_tokens: int,
        clock: Callable[[], float],
        on_start: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner, self._kv_cache, self._costs = runner, kv_cache, costs
        self._exit_layer = exit_layer
        self._num_prompt = max(1, min(PROMPT_TOKENS, max_num_tokens - NUM_DECODES))
        self._clock = clock
        self._on_start, self._on_step = on_start, on_step
        # Each is written by one thread alone, and read by any:
        self._wanted_until_s = -math.inf
        self._next_s = -math.inf
        self._prompt_rests_until_s = -math.inf
        self._ends_s = -math.inf

    def want(self) -> None:
        """Somebody has been refused for what the forecast says. Any thread."""
        self._wanted_until_s = self._clock() + WANTED_S

    def due_s(self) -> float:
        """When to call ``run`` if the engine stays idle; infinite if nothing is wanted."""
        is_wanted = self._wanted_until_s > max(self._clock(), self._next_s)
        return self._next_s if is_wanted and self._costs.is_learning else math.inf

    def busy_until_s(self) -> float:
        """When the probe step under way should be over; past if there is none. Any thread."""
        return self._ends_s

    def note_work(self) -> None:
        """The engine has worked on a request just now."""
        self._next_s = max(self._next_s, self._clock() + IDLE_S)

    def run(self, is_interrupted: Callable[[], bool] = lambda: False) -> None:
        """Probe, if it is time to; the engine has nothing else to do.

        Args:
            is_interrupted: asked before each step; there is real work, which goes first.
        """
        started_s = self._clock()
        if started_s < self.due_s():
            return
        try:
            self._run(is_interrupted)
            took_s = self._clock() - started_s
            rest_s = min((1.0 / MAX_SHARE - 1.0) * took_s, max(MAX_REST_S, took_s))
        except Exception:
            logger.exception("a probe step failed: the next one is in %g s", REST_S)
            rest_s = REST_S
        finally:
            self._ends_s = -math.inf
        self._next_s = self._clock() + max(rest_s, IDLE_S)

    def _run(self, is_interrupted: Callable[[], bool]) -> None:
        model = self._costs.model
        assert model is not None
        prompt = (0,) * self._num_tokens(model)
        num_pages = self._kv_cache.num_pages_needed(len(prompt) + NUM_DECODES, self._exit_layer)
        if num_pages > self._kv_cache.pool.num_free:
            return
        with self._kv_cache.borrowed(num_pages) as pages:
            table = np.array(pages, dtype=np.int32).reshape(
                self._kv_cache.slabs.count(self._exit_layer), -1
            )
            outputs: list[int] = []
            pending: tuple[int, ...] = prompt
            while len(outputs) <= NUM_DECODES and not is_interrupted():
                sampling = SamplingRow(
                    params=SamplingParams(temperature=0.0),
                    seed=0,
                    prompt_token_ids=prompt,
                    output_token_ids=tuple(outputs),
                    stop_token_ids=frozenset(),
                )
                row = RowPlan(
                    request_id="probe",
                    exit_layer=self._exit_layer,
                    start=len(prompt) + len(outputs) - len(pending),
                    token_ids=pending,
                    block_table_SB=table,
                    sampling=sampling,
                    prompt_len=len(prompt),
                )
                pending = (self._step(row),)
                outputs.extend(pending)

    def _num_tokens(self, model: CostModel) -> int:
        """Of the prompt: enough for a large step, or one."""
        num_tokens, exit_layer = self._num_prompt, self._exit_layer
        is_long = model.prefill_s(exit_layer, num_tokens) > MAX_PROMPT_S
        rests = self._clock() < self._prompt_rests_until_s
        return 1 if num_tokens > REGIME_TOKENS and is_long and rests else num_tokens

    def _step(self, row: RowPlan) -> int:
        """Run a step, learn from it, and give its token."""
        plan = StepPlan(rows=(row,), depth_cap=row.exit_layer)
        shape: StepShape = step_shape(plan)
        started_s, model = self._clock(), self._costs.model
        self._ends_s = started_s + (0.0 if model is None else model.step_s(shape))
        self._on_start()
        [result] = self._runner.execute(plan)
        now = self._clock()
        self._costs.observe(shape, now - started_s, now)
        if len(row.token_ids) > 1 and now - started_s > MAX_PROMPT_S:
            self._prompt_rests_until_s = now + PROMPT_REST * max(1.0, now - started_s)
        self._on_step()
        return result.token_id if isinstance(result, SampledToken) else 0


def prober_of(engine: Engine) -> Prober:
    """The prober of an engine."""
    config = engine.config
    return Prober(
        engine.runner,
        engine.kv_cache,
        engine.costs,
        exit_layer=engine.exits.layers[0],
        max_num_tokens=min(config.max_num_batched_tokens, config.max_model_len),
        clock=engine.clock,
        on_start=engine.count_call,
        on_step=lambda: engine.tell(lambda observer: observer.on_probe_step()),
    )
