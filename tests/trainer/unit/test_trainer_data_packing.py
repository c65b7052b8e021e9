"""Packs hold every example once; a batch is one row whose labels are shifted already."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sortserve_trainer.data import Example, Pack, collate, pack_examples

LENGTHS = st.lists(st.integers(2, 32), max_size=300)


def make_example(length: int, first_id: int = 0) -> Example:
    is_target = np.ones(length, dtype=np.bool_)
    is_target[0] = False
    return Example(np.arange(first_id, first_id + length, dtype=np.int32), is_target)


@given(LENGTHS, st.integers(32, 100))
def test_every_example_is_in_exactly_one_pack_and_no_pack_is_too_long(
    lengths: list[int], pack_length: int
) -> None:
    examples = [make_example(length) for length in lengths]

    packs = pack_examples(examples, pack_length)

    packed = [example for pack in packs for example in pack.examples]
    assert sorted(map(id, packed)) == sorted(map(id, examples))
    assert all(0 < pack.num_tokens <= pack_length for pack in packs)


@given(LENGTHS)
def test_the_same_examples_make_the_same_packs(lengths: list[int]) -> None:
    examples = [make_example(length) for length in lengths]

    assert pack_examples(examples, 64) == pack_examples(examples, 64)


@given(LENGTHS)
def test_no_two_packs_that_were_open_together_would_fit_one(lengths: list[int]) -> None:
    """At most 16 wait at a time, so of up to 16 packs all of them did."""
    packs = pack_examples([make_example(length) for length in lengths], 64)

    sizes = sorted(pack.num_tokens for pack in packs)
    assert len(packs) > 16 or len(sizes) < 2 or sizes[0] + sizes[1] > 64


def test_packs_of_mixed_lengths_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=2000)
    packs = pack_examples([make_example(int(n)) for n in lengths], 1024)

    assert lengths.sum() / (len(packs) * 1024) > 0.98


def test_examples_stay_about_in_their_order() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=2000)
    examples = [make_example(int(n)) for n in lengths]
    place = {id(example): i for i, example in enumerate(examples)}

    packed = [e for pack in pack_examples(examples, 1024) for e in pack.examples]

    moved = [abs(place[id(example)] - i) for i, example in enumerate(packed)]
    assert np.mean(moved) < 100


def test_a_batch_is_one_row_with_shifted_labels_and_positions_that_start_anew() -> None:
    first = Example(
        np.array([10, 11, 12, 13], dtype=np.int32), np.array([False, False, True, True])
    )
    second = Example(
        np.array([20, 21, 22], dtype=np.int32),
        np.array([False, True, False]),
        np.array([False, False, True]),
    )
    third = Example(np.array([30, 31, 32], dtype=np.int32), np.array([False, True, False]))

    batch = collate([Pack((first, second)), Pack((third,))])

    expected = {
        "input_ids": [[10, 11, 12, 13, 20, 21, 22, 30, 31, 32]],
        "labels": [[-100, 12, 13, -100, 21, -100, -100, 31, -100, -100]],
        "unwanted": [[-100, -100, -100, -100, -100, 22, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]],
        "lengths": [4, 3, 3],
        "target_rows": [1, 2, 4, 7],
        "unwanted_rows": [5],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_label_is_the_next_token_of_the_same_example(lengths: list[list[int]]) -> None:
    packs = [
        Pack(tuple(make_example(n, first_id=100 * i) for i, n in enumerate(row))) for row in lengths
    ]

    batch = collate(packs)

    assert int(batch["lengths"].sum()) == batch["input_ids"].shape[1]
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == batch["input_ids"].shape
    ends = batch["lengths"].cumsum(0)[:-1].tolist()
    ids = np.split(batch["input_ids"][0].numpy(), ends)
    labels = np.split(batch["labels"][0].numpy(), ends)
    for example_ids, example_labels in zip(ids, labels, strict=True):
        assert example_labels.tolist() == [*example_ids[1:].tolist(), -100]


def test_no_token_is_both_a_target_and_unwanted() -> None:
    both = np.array([False, True])
    with pytest.raises(AssertionError):
        Example(np.array([1, 2], dtype=np.int32), both, both)


def test_no_example_begins_with_a_target() -> None:
    with pytest.raises(AssertionError):
        Example(np.array([1, 2], dtype=np.int32), np.array([True, True]))
