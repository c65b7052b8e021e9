"""Ranks in processes of their own: their tokens are those of one process, and no rank that dies or
hangs leaves a request without an answer.

Logits are sums in another order, so they agree to ``TOLERANCE`` and not to the bit; tokens are the
same, greedy and drawn, as long as no two candidates are that close.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import ConfigError, EngineError, InvalidRequestError, UnavailableError
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.llm.results import Result
from support.processes import has_ended
from support.tiny_models import make_tiny_checkpoint

EXITS = (2, 4, 5, 6)
KINDS = {2: "layer", 4: "head", 5: "mlp"}
TOLERANCE = 1e-4
"""Largest difference of two log-probabilities, in nats."""
PROMPTS = ["The sea is", "Rain, rain and more rain in the hills", "xyz", "In the other theatre"]
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "kv_cache_memory": 8 << 20,
    "max_num_batched_tokens": 16,  # so that prompts come in chunks
    "seed": 0,
}
FAMILIES = ["llama-untied"] + [
    pytest.param(variant, marks=pytest.mark.slow)
    for variant in ("llama-bias", "llama-mqa", "qwen2-tied", "qwen3-tied")
]
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def start(model: Path, num_ranks: int = 2, **settings: Any) -> LLM:
    return LLM(str(model), tensor_parallel_size=num_ranks, **{**SETTINGS, **settings})


def process_ids(llm: LLM) -> list[int]:
    ranks = llm._running().parts.ranks
    assert ranks is not None
    return ranks.process_ids


def answers(llm: LLM) -> list[Result]:
    """Every prompt at every exit, greedy and drawn, with log-probabilities."""
    sampling: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "logprobs": 5}
    results = []
    for params in (
        SamplingParams(temperature=0.0, **sampling),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, **sampling),
    ):
        prompts = [prompt for prompt in PROMPTS for _ in EXITS]
        budgets = [Budget(exit_layer=exit_layer) for _ in PROMPTS for exit_layer in EXITS]
        results += llm.generate(prompts, params, budget=budgets)
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("m"), "llama-untied", EXITS, KINDS)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with start(model) as running:
        yield running


@pytest.mark.parametrize("variant", FAMILIES)
def test_two_ranks_answer_as_one_process(
    variant: str, model: Path, llm: LLM, tmp_path: Path
) -> None:
    own = variant != "llama-untied"
    folder = make_tiny_checkpoint(tmp_path / "m", variant, EXITS, KINDS) if own else model
    with start(folder, num_ranks=1) as one:
        expected = answers(one)
    if own:
        with start(folder) as two:
            got = answers(two)
    else:
        got = answers(llm)

    assert len(got) == 2 * len(PROMPTS) * len(EXITS)
    for ours, theirs in zip(got, expected, strict=True):
        [mine], [other] = ours.outputs, theirs.outputs
        assert mine.token_ids == other.token_ids
        assert mine.report.tokens_by_exit == other.report.tokens_by_exit
        assert mine.logprobs is not None
        assert other.logprobs is not None
        for a, b in zip(mine.logprobs, other.logprobs, strict=True):
            assert a.logprob is not None
            assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
            top = {t.token_id: t.logprob for t in b.top_logprobs}
            assert {t.token_id: t.logprob for t in a.top_logprobs} == pytest.approx(
                top, abs=TOLERANCE
            )


def test_a_plan_that_no_rank_can_run_leaves_the_ranks_together(llm: LLM) -> None:
    """A token that no embedding has: the step fails on all ranks before their first sum."""
    runner = llm._running().parts.runner
    page = 0  # nobody's: the engine has no request
    row = RowPlan(
        request_id="bad",
        exit_layer=2,
        start=0,
        token_ids=(10_000,),
        block_table_SB=np.full((2, 1), page, dtype=np.int32),
        sampling=None,
    )

    with pytest.raises(IndexError):
        runner.execute(StepPlan(rows=(row,), depth_cap=2))
    with pytest.raises(InvalidRequestError):
        llm.generate([[10_000]], LONG)

    [result] = llm.generate("The sea is", LONG)
    assert len(result.outputs[0].token_ids) == 200


def test_a_rank_that_is_killed_ends_every_request_with_an_error(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "m", "llama-untied", max_position_embeddings=8192)
    endless = SamplingParams(temperature=0.0, max_tokens=8000, ignore_eos=True)
    with start(model, kv_cache_memory=64 << 20) as running:
        streams = [running.stream(prompt, endless) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
        [rank] = process_ids(running)

        os.kill(rank, signal.SIGKILL)

        for stream in streams:
            with pytest.raises(EngineError, match="engine has failed"):
                list(stream)
        with pytest.raises(UnavailableError):
            running.generate("The sea is", LONG)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_every_request_with_an_error(model: Path) -> None:
    with start(model, step_timeout=2.0) as running:
        stream = running.stream("The sea is", LONG)
        next(stream)
        [rank] = process_ids(running)

        os.kill(rank, signal.SIGSTOP)

        with pytest.raises(EngineError, match="engine has failed"):
            list(stream)
        assert has_ended(rank)


@pytest.mark.slow
def test_ranks_end_with_rank_0_however_it_ends(model: Path) -> None:
    program = f"""
import signal
from sortserve import LLM
llm = LLM({str(model)!r}, tensor_parallel_size=2, **{SETTINGS!r})
print(*llm._running().parts.ranks.process_ids, llm._running().parts.ranks._folder, flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        rank, folder = parent.stdout.readline().split()
        parent.kill()

    assert has_ended(int(rank))
    assert not Path(folder).exists()


def test_a_model_that_cannot_be_divided_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        start(model, num_ranks=3)

    assert "tensor_parallel_size=3: 4 query heads, 2 key/value heads" in str(refused.value)
    assert "Allowed for this model: 1, 2, 4." in str(refused.value)


def test_a_checkpoint_that_is_loaded_already_is_not_divided(model: Path) -> None:
    checkpoint = load_checkpoint(str(model), device="cpu", dtype="float32")

    with pytest.raises(ConfigError, match="is served by this process alone"):
        LLM(checkpoint, tensor_parallel_size=2)
