"""What is said of a prompt's own tokens is what transformers says with the first E layers.

Whatever the chunks, the company, what is cached, and how often the prompt is read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sortserve.admission.choose import ExitChoice
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import Request
from sortserve.core.sampling_params import SampledToken
from sortserve.cost.model import step_shape
from sortserve.engine import prompt_scores
from support.scripted import add, collect, make_request, run
from support.serving import Served, serve
from support.tiny_models import (
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    mixed_kinds,
    read_exit_module,
)

EXITS = (1, 2, 4, 5, 6)
FAMILIES = ("llama-tied", "qwen3-untied")
PROMPT = tuple(range(40, 85))
GREEDY: dict[str, Any] = {"temperature": 0.0}
whole_model = cache(load_hf)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompts")
    return {
        family: make_tiny_checkpoint(
            root / family, family, exits=EXITS, exit_kinds=mixed_kinds(EXITS, family)
        )
        for family in FAMILIES
    }


def asking(name: str, prompt: tuple[int, ...], *, num_top: int = 2, max_tokens: int = 1) -> Request:
    request = make_request(name, list(prompt), max_tokens=max_tokens, **GREEDY)
    return replace(request, prompt_logprobs=PromptLogprobs(prompt, num_top))


def check(served: Served, request: Request, exit_layer: int) -> None:
    """What was recorded is what transformers says."""
    asked = request.prompt_logprobs
    assert asked is not None
    assert asked.is_complete
    module = read_exit_module(served.path, exit_layer)
    ids = list(asked.token_ids)
    logprobs_TV = hf_logits(whole_model(served.path), ids, exit_layer, module).log_softmax(-1)
    first, *others = asked.tokens
    assert first == SampledToken(ids[0])
    assert len(others) == len(ids) - 1
    for logprobs_V, token_id, token in zip(logprobs_TV[:-1], ids[1:], others, strict=True):
        assert token.token_id == token_id
        assert token.logprob == pytest.approx(float(logprobs_V[token_id]), abs=1e-4)
        best = logprobs_V.topk(asked.num_top)
        assert [top.token_id for top in token.top_logprobs] == best.indices.tolist()
        said = torch.tensor([top.logprob for top in token.top_logprobs])
        torch.testing.assert_close(said, best.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_at_every_exit_and_in_any_chunks(
    folders: dict[str, Path], family: str, exit_layer: int, chunk: int
) -> None:
    served = serve(folders[family])
    engine = served.engine(max_num_batched_tokens=chunk)
    request = asking("r", PROMPT)

    add(engine, request, exit_layer)
    run(engine)

    check(served, request, exit_layer)


def test_in_a_batch_of_other_depths_and_of_requests_that_do_not_ask(
    folders: dict[str, Path],
) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine(max_num_batched_tokens=50)
    asked = [(asking(f"a{e}", PROMPT[e : 30 + e], max_tokens=3), e) for e in EXITS]
    others = [(make_request(f"o{e}", list(PROMPT), max_tokens=9, **GREEDY), e) for e in EXITS]
    alone = served.engine()
    add(alone, others[2][0], others[2][1])

    for pair in zip(asked, others, strict=True):
        for request, exit_layer in pair:
            add(engine, request, exit_layer)
    results = run(engine)

    for request, exit_layer in asked:
        check(served, request, exit_layer)
    assert results["o4"].token_ids == run(alone)["o4"].token_ids


def test_a_prompt_that_is_cached_is_read_again(folders: dict[str, Path]) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine()
    add(engine, make_request("donor", list(PROMPT), max_tokens=1, **GREEDY), 6)
    run(engine)
    request = asking("r", PROMPT)

    add(engine, request, 4)
    result = run(engine)["r"]

    assert result.last is not None
    assert result.last.report is not None
    assert result.last.report.num_cached_tokens == 0
    check(served, request, 4)
    add(engine, make_request("taker", list(PROMPT), max_tokens=1, **GREEDY), 4)
    taker = run(engine)["taker"].last
    assert taker is not None
    assert taker.report is not None
    assert taker.report.num_cached_tokens == 44  # what has been read again may be shared


def test_a_preempted_request_reads_on_and_is_told_once(folders: dict[str, Path]) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine(max_num_batched_tokens=20)
    request = asking("r", PROMPT, max_tokens=3)
    add(engine, request, 5)
    results: dict[str, Any] = {}
    collect(engine.step(), results)
    collect(engine.step(), results)

    engine.scheduler.preempt(next(engine.scheduler.sequences()))
    while engine.has_work:
        collect(engine.step(), results)

    check(served, request, 5)


def test_the_exit_of_a_request_that_asks_is_kept(folders: dict[str, Path]) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine(max_num_batched_tokens=20)
    budget = Budget(latency_ms=1.0, on_miss=OnMiss.DEGRADE)

    for request in (asking("r", PROMPT), make_request("o", list(PROMPT))):
        choice = ExitChoice(6, None, fits=True, floor_layer=1)
        engine.add_request(replace(request, budget=budget), choice)

    floors = {s.request_id: s.floor_layer for s in engine.scheduler.sequences()}
    assert floors == {"r": 6, "o": 1}


def test_a_prompt_of_one_token_has_nothing_to_tell(folders: dict[str, Path]) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine()
    request = asking("r", PROMPT[:1])

    add(engine, request, 6)
    run(engine)

    check(served, request, 6)


def test_the_logits_of_a_prompt_are_never_in_memory_at_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(folders["llama-tied"])
    sizes: list[int] = []
    head = served.decoder.logits

    def spy(hidden: torch.Tensor, exit_layers: list[int]) -> torch.Tensor:
        sizes.append(len(hidden))
        return head(hidden, exit_layers)

    monkeypatch.setattr(served.decoder, "logits", spy)
    engine = served.engine()
    request = asking("r", PROMPT)

    add(engine, request, 6)
    run(engine)

    assert sum(sizes) == len(PROMPT)  # the last of them gives the first new token
    assert max(sizes) == prompt_scores.BLOCK_TOKENS < len(PROMPT)


def test_a_prompt_that_cannot_be_judged_harms_nobody_else(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(folders["llama-tied"])
    head = served.decoder.logits

    def broken(hidden: torch.Tensor, exit_layers: list[int]) -> torch.Tensor:
        logits = head(hidden, exit_layers)
        return logits * float("nan") if len(logits) > 2 else logits

    monkeypatch.setattr(served.decoder, "logits", broken)
    engine = served.engine()
    add(engine, asking("bad", PROMPT), 6)
    add(engine, make_request("good", list(PROMPT), max_tokens=4, **GREEDY), 6)

    results = run(engine)

    assert results["bad"].last is not None
    assert results["bad"].last.error is not None
    assert len(results["good"].token_ids) == 4


def test_the_head_counts_for_the_cost_of_a_step() -> None:
    asked = asking("r", PROMPT).prompt_logprobs

    def row(start: int, end: int, *, asks: bool) -> RowPlan:
        return RowPlan(
            request_id="r",
            exit_layer=6,
            start=start,
            token_ids=PROMPT[start:end],
            block_table_SB=np.zeros((6, 12), dtype=np.int32),
            sampling=None,
            prompt_logprobs=asked if asks else None,
        )

    def num_sampled(*rows: RowPlan) -> int:
        return step_shape(StepPlan(rows=rows, depth_cap=6)).num_sampled

    assert num_sampled(row(0, 25, asks=True)) == 25
    assert num_sampled(row(25, 45, asks=True)) == 19  # nothing of the prompt follows its last token
    assert num_sampled(row(0, 25, asks=False)) == 0


@pytest.mark.parametrize("launcher", ["own", "late", "thread"])
def test_while_the_next_step_is_planned_ahead(folders: dict[str, Path], launcher: str) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine(max_num_batched_tokens=7, launcher=launcher)
    request = asking("r", PROMPT, max_tokens=4)
    beside = make_request("o", list(PROMPT), max_tokens=9, **GREEDY)

    add(engine, beside, 6)
    add(engine, request, 4)
    run(engine)

    check(served, request, 4)
