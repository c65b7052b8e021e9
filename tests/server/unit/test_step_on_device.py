"""A step sends its inputs once, reads its tokens once, and never makes the host wait in between.

There is no GPU here: plain torch on the CPU runs the same operations, and those that would wait on
a GPU are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.core.grammar import Constraint
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.step_thread import with_tokens
from sortserve.model.graphs import row_buckets
from support.batches import BLOCK_SIZE, Pages, random_ids
from support.host_reads import HostReadError, NoHostReads, refuse_host_reads
from support.recorded_graphs import RerunMaker
from support.scripted_grammar import Form
from support.serving import serve
from support.tiny_models import make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(temperature=1.2, logprobs=4, repetition_penalty=1.2, logit_bias={7: 2.0}),
    SamplingParams(temperature=0.7, top_k=20, min_p=0.05, min_tokens=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "qwen3"
    return make_tiny_checkpoint(
        path, "qwen3-untied", exits=EXITS, exit_kinds=mixed_kinds(EXITS, "qwen3-untied")
    )


def runner_of(folder: Path, *, batched: bool = True, graphs: bool = False) -> ModelRunner:
    decoder = serve(folder, backend="reference").decoder
    runner = ModelRunner(
        decoder,
        num_pages=400,
        block_size=BLOCK_SIZE,
        sampler=Sampler(batched=batched),
        graph_maker=RerunMaker() if graphs else None,
        max_num_seqs=len(DECODE),
    )
    runner.record_graphs()
    return runner


def plan_of(
    folder: Path, pages: Pages, rows: list[tuple[int, int, bool]], *, start: int
) -> StepPlan:
    """Rows of (exit, new tokens, whether it samples), after ``start`` cached tokens each."""
    plans, slabs = [], serve(folder, backend="reference").decoder.slabs
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
                block_table_SB=pages.table(slabs.count(exit_layer), start + count),
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
    plan = plan_of(folder, Pages(400), rows, start=start)
    with refuse_host_reads(monkeypatch) as transfers:
        results = runner.execute(plan)
    assert (transfers.uploads, transfers.downloads) == (2, 1)
    assert results == searching.execute(plan)


def test_a_step_of_unfinished_prompts_reads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(folder)
    plan = plan_of(folder, Pages(400), [(6, 9, False), (2, 5, False)], start=0)
    with refuse_host_reads(monkeypatch) as transfers:
        assert runner.execute(plan) == []
    assert (transfers.uploads, transfers.downloads) == (1, 0)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
def test_two_steps_under_way_with_grammars_among_them_read_nothing_but_their_tokens(
    folder: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second takes its tokens from the first, whose tokens nobody has looked at by then."""
    runner, searching = runner_of(folder, graphs=graphs), runner_of(folder, batched=False)
    pages = Pages(400)
    first = constrained(plan_of(folder, pages, DECODE, start=21))
    num_heads = len(serve(folder, backend="reference").decoder.heads)
    recorded = (len(EXITS) + num_heads) * len(row_buckets(len(DECODE)))
    assert runner.num_graphs == (recorded if graphs else 0)
    rows = tuple(
        replace(row, start=22, token_ids=[0], token_from=n) for n, row in enumerate(first.rows)
    )
    second = replace(first, rows=rows)
    with refuse_host_reads(monkeypatch) as transfers:
        pending = [runner.launch(first), runner.launch(second)]
        assert (transfers.uploads, transfers.downloads) == (4, 0)
        results = [each.result() for each in pending]
    assert (transfers.uploads, transfers.downloads) == (4, 2)

    expected = searching.execute(first)
    expected = [*expected, *searching.execute(with_tokens(second, expected))]
    for result, wanted in zip((*results[0], *results[1]), expected, strict=True):
        assert isinstance(result, SampledToken)
        assert isinstance(wanted, SampledToken)
        assert result.token_id == wanted.token_id  # rows of padding may round a score otherwise


def test_of_greedy_rows_only_the_plan_is_sent_and_two_steps_under_way_keep_their_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head and choice are replayed into the same memory: each step tells its own all the same."""
    runner, searching = runner_of(folder, graphs=True), runner_of(folder, batched=False)
    plan = plan_of(folder, Pages(400), DECODE, start=21)
    plain = SamplingRow(SamplingParams(temperature=0.0), 0, (7,), (5,), frozenset({2}))
    first = replace(plan, rows=tuple(replace(row, sampling=plain) for row in plan.rows))
    rows = tuple(
        replace(row, start=22, token_ids=[0], token_from=n) for n, row in enumerate(first.rows)
    )
    second = replace(first, rows=rows[:4])  # a smaller one, in another bucket
    with refuse_host_reads(monkeypatch) as transfers:
        pending = [runner.launch(first), runner.launch(second)]
        assert (transfers.uploads, transfers.downloads) == (2, 0)
        results = [each.result() for each in pending]
    assert transfers.downloads == 2

    expected = searching.execute(first)
    assert results == [expected, searching.execute(with_tokens(second, expected))]


def test_a_replayed_step_takes_tokens_from_one_that_was_too_large_for_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sortserve.model.graphs.MAX_ROWS", 2)
    runner, searching = runner_of(folder, graphs=True), runner_of(folder, batched=False)
    first = plan_of(folder, Pages(400), DECODE, start=21)
    rows = tuple(
        replace(row, start=22, token_ids=[0], token_from=n) for n, row in enumerate(first.rows)
    )
    second = replace(first, rows=rows[4:], depth_cap=rows[4].exit_layer)
    pending = [runner.launch(first), runner.launch(second)]
    results = [token_ids(each.result()) for each in pending]

    expected = searching.execute(first)
    assert results[0] == token_ids(expected)
    assert results[1] == token_ids(searching.execute(with_tokens(second, expected)))


def token_ids(results: list[SampledToken | RowFailure]) -> list[int]:
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def test_a_greedy_row_whose_logits_are_not_finite_fails_alone_in_a_replayed_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(folder, graphs=True)
    plan = plan_of(folder, Pages(400), DECODE, start=21)
    plain = SamplingRow(SamplingParams(temperature=0.0), 0, (7,), (5,), frozenset({2}))
    plan = replace(plan, rows=tuple(replace(row, sampling=plain) for row in plan.rows))
    healthy = runner.execute(plan)
    bias_RV = torch.zeros(len(DECODE), runner._decoder.config.vocab_size)
    bias_RV[2, 5], bias_RV[4] = torch.nan, -torch.inf
    apply_head = runner._decoder.apply_head

    def biased(head: int | None, h_RD: torch.Tensor) -> torch.Tensor:
        """But for the last row, which has a head of its own."""
        logits = apply_head(head, h_RD)
        return logits if head is not None else logits + bias_RV[: len(h_RD)]

    monkeypatch.setattr(runner._decoder, "apply_head", biased)

    results = runner.execute(plan)

    assert [r for r, each in enumerate(results) if isinstance(each, RowFailure)] == [2, 4]
    assert [results[r] for r in (0, 1, 3, 5)] == [healthy[r] for r in (0, 1, 3, 5)]


def constrained(plan: StepPlan) -> StepPlan:
    """The plan, half of whose rows have a grammar that allows letters."""
    rows = list(plan.rows)
    for r in range(0, len(rows), 2):
        sampling = rows[r].sampling
        assert sampling is not None
        constraint = Constraint(Form("?").start())
        rows[r] = replace(rows[r], sampling=replace(sampling, constraint=constraint))
    return replace(plan, rows=tuple(rows))


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
