"""What a GPU samples is what the search on a CPU finds, and it never waits for a number."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.engine import transfers
from sortserve.engine.sampling import orders
from sortserve.engine.sampling.batched import BatchedSampler
from sortserve.engine.sampling.bitmask import make_masks
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.sampling.vocab_ops import draw_in_order, never_falling
from support.host_reads import refuse_host_reads
from support.sampling_rows import any_constrained_row, any_logits, any_row


def batched(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | RowFailure]:
    masks = make_masks(rows, logits_RV.shape[1])
    return BatchedSampler().start(logits_RV.clone(), rows, masks).results()


@pytest.mark.parametrize(
    ("vocab_size", "num_rows"),
    [(1, 500), (2, 500), (7, 1500), (64, 2500), (97, 2500), (300, 1500), (1000, 800), (5003, 200)],
)
def test_all_of_10_000_random_rows_sample_what_the_search_finds(
    vocab_size: int, num_rows: int
) -> None:
    rng = random.Random(vocab_size)
    for _ in range(num_rows // 100):
        logits_RV = any_logits(rng, 100, vocab_size)
        rows = [any_constrained_row(rng, vocab_size) for _ in range(100)]
        expected = Sampler().sample(logits_RV.clone(), rows)
        tokens = batched(logits_RV, rows)
        wrong = [r for r in range(100) if tokens[r] != expected[r]]
        assert not wrong, [(rows[r].params, tokens[r], expected[r]) for r in wrong[:3]]


def test_random_rows_are_of_all_kinds() -> None:
    """Or the test above would show less than it says."""
    rng = random.Random(0)
    rows = [any_constrained_row(rng, 97) for _ in range(1000)]
    results = batched(any_logits(rng, 1000, 97), rows)

    failures = [result.detail for result in results if isinstance(result, RowFailure)]
    assert len(set(failures)) == 4
    assert len(failures) < 150
    assert sum(row.params.greedy for row in rows) > 100
    assert sum(row.params == SamplingParams(max_tokens=100) for row in rows) > 50


def test_a_row_samples_the_same_alone_and_in_any_batch() -> None:
    rng = random.Random(1)
    logits_RV, rows = any_logits(rng, 100, 300), [any_row(rng, 300) for _ in range(100)]
    together = batched(logits_RV, rows)
    alone = [batched(logits_RV[r : r + 1], [row])[0] for r, row in enumerate(rows)]
    assert together == alone


def test_how_many_rows_are_filtered_together_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(2)
    logits_RV, rows = any_logits(rng, 50, 300), [any_row(rng, 300) for _ in range(50)]
    expected = batched(logits_RV, rows)
    monkeypatch.setattr(orders, "_ROWS_AT_ONCE", 3)
    assert batched(logits_RV, rows) == expected


def test_the_ids_are_on_the_device_before_the_host_has_them() -> None:
    rng = random.Random(3)
    logits_RV, rows = any_logits(rng, 60, 97), [any_row(rng, 97) for _ in range(60)]
    samples = BatchedSampler().start(logits_RV, rows)
    for token_id, result in zip(samples.token_ids_R.tolist(), samples.results(), strict=True):
        assert 0 <= token_id < 97
        assert isinstance(result, RowFailure) or result.token_id == token_id


@pytest.mark.parametrize("kinds", ["plain", "all"])
def test_the_host_sends_once_and_reads_once(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    greedy = SamplingRow(SamplingParams(temperature=0.0), 0, (1,), (), frozenset())
    rows = [greedy] * 80 if kinds == "plain" else [any_row(rng, 300) for _ in range(80)]
    logits_RV = any_logits(rng, 80, 300)
    expected = Sampler().sample(logits_RV.clone(), rows)
    sampler = BatchedSampler()
    with refuse_host_reads(monkeypatch) as count:
        samples = sampler.start(logits_RV, rows)
        assert count.downloads == 0
        results = samples.results()
    assert results == expected
    assert (count.uploads, count.downloads) == (0 if kinds == "plain" else 1, 1)


def test_arrays_that_are_sent_in_one_copy_arrive_as_they_are() -> None:
    rng = torch.Generator().manual_seed(0)
    arrays = [
        torch.randint(2**40, (3, 5), generator=rng).numpy(),
        torch.rand(7, generator=rng).numpy(),
        torch.empty(0, 4, dtype=torch.int32).numpy(),
        (torch.rand(3, 1, generator=rng) > 0.5).numpy(),
        torch.rand(2, 2, generator=rng).double().numpy().T,
        torch.randint(2**30, (5, 1, 2), generator=rng).int().numpy(),
    ]
    tensors = transfers.upload_in_one_copy(arrays, torch.device("cpu"))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_sums_that_a_device_rounds_up_and_down_draw_no_token_of_weight_zero() -> None:
    """A tree of additions may give the sum up to a zero another last bit than the sum before it."""
    weights_1C = torch.tensor([[0.25, 0.0, 0.25, 0.0, 0.5, 0.0]], dtype=torch.float64)
    ulp = 2.0**-52
    rounded = [[0.25, 0.25 + ulp, 0.5 - ulp, 0.5 + ulp, 1.0, 1.0 + 2 * ulp]]
    sums_1C = never_falling(torch.tensor(rounded, dtype=torch.float64), weights_1C)
    assert sums_1C.tolist() == [[0.25, 0.25, 0.5 - ulp, 0.5 - ulp, 1.0, 1.0]]
    exact_1C = weights_1C.cumsum(-1)
    assert torch.equal(never_falling(exact_1C, weights_1C), exact_1C)
    assert draw_in_order(weights_1C, torch.tensor([0.25], dtype=torch.float64)).tolist() == [2]
