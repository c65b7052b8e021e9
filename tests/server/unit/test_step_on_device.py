"""A step sends its inputs once, reads its tokens once, and never makes the host wait in between.

There is no GPU here: plain torch on the CPU runs the same operations, and those that would wait on
a GPU are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from support.batches import BLOCK_SIZE, Pages, random_ids
from support.host_reads import HostReadError, NoHostReads, refuse_host_reads
from support.serving import serve
from support.tiny_models import EXIT_KINDS, make_tiny_checkpoint

EXITS = (1, 2, 4, 5, 6)
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(temperature=1.2, logprobs=4, repetition_penalty=1.2, logit_bias={7: 2.0}),
    SamplingParams(temperature=0.7, top_k=20, min_p=0.05, min_tokens=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
    path = tmp_path_factory.mktemp("step") / "qwen3"
    return make_tiny_checkpoint(path, "qwen3-untied", exits=EXITS, exit_kinds=kinds)


def runner_of(folder: Path, *, batched: bool = True) -> ModelRunner:
    decoder = serve(folder, backend="reference").decoder
    return ModelRunner(
        decoder, num_pages=400, block_size=BLOCK_SIZE, sampler=Sampler(batched=batched)
    )


def plan_of(pages: Pages, rows: list[tuple[int, int, bool]], *, start: int) -> StepPlan:
    """Rows of (exit, new tokens, whether it samples), after ``start`` cached tokens each."""
    plans = []
    for r, (exit_layer, count, samples) in enumerate(rows):
        ids = random_ids(start + count, seed=r)
        params = PARAMS[r % len(PARAMS)]
        row = SamplingRow(params, r, tuple(ids), (5, 9, 5), frozenset({2}))
        plans.append(
            RowPlan(
                request_id=str(r),
                exit_layer=exit_layer,
                start=start,
                token_ids=ids[start:],
                block_table_SB=pages.table(exit_layer, start + count),
                sampling=row if samples else None,
            )
        )
    return StepPlan(rows=tuple(plans), depth_cap=rows[0][0])


PREFILL = [(6, 20, True), (5, 13, True), (5, 1, False), (2, 9, False), (1, 2, True)]
DECODE = [(6, 1, True), (6, 1, True), (5, 1, True), (4, 1, True), (2, 1, True), (1, 1, True)]
MIXED = [(6, 12, True), (6, 1, True), (5, 1, True), (4, 7, False), (2, 1, True), (1, 30, True)]


@pytest.mark.parametrize("start", [0, 21])
@pytest.mark.parametrize(
    "rows", [PREFILL, DECODE, MIXED], ids=["prompts", "one token a row", "both"]
)
def test_a_step_sends_twice_and_reads_once(
    folder: Path, rows: list[tuple[int, int, bool]], start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to run, what to sample, and the tokens; all else stays on the device."""
    runner, searching = runner_of(folder), runner_of(folder, batched=False)
    plan = plan_of(Pages(400), rows, start=start)
    with refuse_host_reads(monkeypatch) as transfers:
        results = runner.execute(plan)
    assert (transfers.uploads, transfers.downloads) == (2, 1)
    assert results == searching.execute(plan)


def test_a_step_of_unfinished_prompts_reads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(folder)
    plan = plan_of(Pages(400), [(6, 9, False), (2, 5, False)], start=0)
    with refuse_host_reads(monkeypatch) as transfers:
        assert runner.execute(plan) == []
    assert (transfers.uploads, transfers.downloads) == (1, 0)


X = torch.arange(4.0)


@pytest.mark.parametrize(
    "look",
    [
        lambda: X[0].item(),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: X.numpy(),
        lambda: np.asarray(X),
        lambda: bool(X[0] > 1),
        lambda: int(X[0]),
        lambda: [0, 1, 2][X[1].long()],
        lambda: X.view(int(X[2]), 2),
        lambda: X.nonzero(),
        lambda: torch.where(X > 1),
        lambda: X[X > 1],
        lambda: X.__setitem__(X > 1, 0.0),
        lambda: X.repeat_interleave(X.long()),
        lambda: X.long().bincount(),
        lambda: torch.equal(X, X),
        lambda: torch.tensor([1], device="cpu"),
        lambda: torch.from_numpy(np.zeros(2)),
    ],
)
def test_whatever_would_wait_for_a_device_is_refused(look: Callable[[], object]) -> None:
    """Or the tests above would prove nothing."""
    with pytest.raises(HostReadError), NoHostReads():
        look()


def test_what_a_device_does_alone_is_allowed() -> None:
    def compute() -> Tensor:
        mask = X > 1
        y = torch.where(mask, X, 0.0).masked_fill_(mask, 2.0)
        return y[torch.arange(2)].sum() + len(y) + y.shape[0]

    with NoHostReads():
        result = compute()
    assert result.item() == 8.0
