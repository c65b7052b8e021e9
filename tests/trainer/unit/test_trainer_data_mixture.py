"""A mixture is a function of its sources, its seed and an index: weights, epochs, resuming."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import DataSource, Example, Mixture, Pack, collate, pack_examples

PACK_LENGTH = 32


def make_examples(count: int, source: int = 0) -> list[Example]:
    """Examples of 3 to 12 tokens that all begin with another token."""
    lengths = np.random.default_rng(source).integers(3, 13, size=count)
    return [_make_example(int(length), 1000 * source + i) for i, length in enumerate(lengths)]


def _make_example(length: int, name: int) -> Example:
    is_target = np.ones(length, dtype=np.bool_)
    is_target[0] = False
    return Example(np.full(length, name, dtype=np.int32), is_target)


def make_mixture(*sources: tuple[int, float], seed: int = 0, **options: Any) -> Mixture:
    """A mixture of sources of so many examples and such a weight."""
    chosen = [
        (DataSource(f"source-{i}", weight), make_examples(count, i))
        for i, (count, weight) in enumerate(sources)
    ]
    return Mixture(chosen, pack_length=PACK_LENGTH, seed=seed, **options)


def names(packs: list[Pack]) -> list[list[int]]:
    """The name of each example of each pack, which is its first token."""
    return [[int(example.token_ids[0]) for example in pack.examples] for pack in packs]


def all_packs(mixture: Mixture) -> list[list[int]]:
    return names([mixture[i] for i in range(len(mixture))])


def counts(mixture: Mixture) -> Counter[int]:
    """How often each example is seen."""
    return Counter(name for pack in all_packs(mixture) for name in pack)


# ---- what an epoch has ----


def test_an_epoch_has_every_row_once_and_in_another_order_than_the_next() -> None:
    mixture = make_mixture((50, 1.0), num_epochs=2)

    packs = all_packs(mixture)

    one = all_packs(make_mixture((50, 1.0), num_epochs=1))
    first, second = packs[: len(one)], packs[len(one) :]
    assert first == one
    for epoch in (first, second):
        assert sorted(name for pack in epoch for name in pack) == list(range(50))
    assert first != second


def test_sources_are_shuffled_together() -> None:
    packs = all_packs(make_mixture((50, 1.0), (50, 1.0)))

    assert sum(len({name // 1000 for name in pack}) == 2 for pack in packs) > len(packs) / 2


def test_a_whole_weight_shows_each_row_that_often() -> None:
    seen = counts(make_mixture((20, 3.0), (20, 1.0)))

    assert {seen[name] for name in range(20)} == {3}
    assert {seen[name] for name in range(1000, 1020)} == {1}


@pytest.mark.parametrize(
    ("weight", "num_epochs", "times"), [(0.1, 10, 1), (0.25, 4, 1), (0.5, 2, 1), (0.3, 10, 3)]
)
def test_a_fraction_shows_other_rows_each_epoch_until_all_were_seen(
    weight: float, num_epochs: int, times: int
) -> None:
    seen = counts(make_mixture((30, weight), num_epochs=num_epochs))

    assert seen == Counter({name: times for name in range(30)})


def test_a_weight_of_one_and_a_half_shows_half_of_the_rows_twice() -> None:
    one_epoch = counts(make_mixture((20, 1.5)))
    two_epochs = counts(make_mixture((20, 1.5), num_epochs=2))

    assert Counter(one_epoch.values()) == {1: 10, 2: 10}
    assert set(two_epochs.values()) == {3}


@given(st.floats(0.05, 3), st.integers(1, 20), st.integers(1, 6))
def test_over_any_run_each_row_is_seen_by_its_weight_to_within_one(
    weight: float, count: int, num_epochs: int
) -> None:
    examples = make_examples(count)
    always = (DataSource("always"), make_examples(1, source=1))

    mixture = Mixture(
        [(DataSource("it", weight), examples), always],
        pack_length=PACK_LENGTH,
        seed=0,
        num_epochs=num_epochs,
    )

    seen = counts(mixture)
    assert all(abs(seen[name] - weight * num_epochs) < 1 + 1e-9 for name in range(count))


def test_no_pack_is_too_long_and_the_tokens_are_counted() -> None:
    mixture = make_mixture((50, 1.0), (20, 2.0), num_epochs=2)

    sizes = [mixture[i].num_tokens for i in range(len(mixture))]

    assert max(sizes) <= PACK_LENGTH
    assert mixture.num_tokens == sum(sizes)
    assert mixture.num_tokens == 2 * make_mixture((50, 1.0), (20, 2.0)).num_tokens


# ---- how long it is ----


def test_without_a_length_it_is_one_epoch() -> None:
    assert all_packs(make_mixture((50, 1.0))) == all_packs(make_mixture((50, 1.0), num_epochs=1))


@pytest.mark.parametrize("num_epochs", [0.5, 1.1, 2.5])
def test_a_part_of_an_epoch_is_that_part_of_its_packs(num_epochs: float) -> None:
    whole = all_packs(make_mixture((200, 1.0), num_epochs=3))

    part = all_packs(make_mixture((200, 1.0), num_epochs=num_epochs))

    assert part == whole[: len(part)]
    assert len(part) / len(whole) == pytest.approx(num_epochs / 3, abs=0.02)


def test_an_epoch_and_a_tenth_of_ten_packs_is_eleven() -> None:
    """1.1 - 1 is a little more than a tenth."""
    examples = [_make_example(PACK_LENGTH, name) for name in range(10)]

    mixture = Mixture(
        [(DataSource("it"), examples)], pack_length=PACK_LENGTH, seed=0, num_epochs=1.1
    )

    assert len(mixture) == 11


@pytest.mark.parametrize("max_tokens", [100, 1000, 5000])
def test_it_ends_with_the_last_pack_within_max_tokens(max_tokens: int) -> None:
    mixture = make_mixture((50, 1.0), max_tokens=max_tokens)

    assert max_tokens - PACK_LENGTH < mixture.num_tokens <= max_tokens
    endless = all_packs(make_mixture((50, 1.0), num_epochs=40))
    assert all_packs(mixture) == endless[: len(mixture)]


def test_one_pack_there_is_at_least() -> None:
    assert len(make_mixture((50, 1.0), max_tokens=1)) == 1
    assert len(make_mixture((50, 1.0), num_epochs=1e-4)) == 1


def test_of_two_lengths_the_shorter_counts() -> None:
    by_tokens = make_mixture((50, 1.0), num_epochs=5, max_tokens=100)
    by_epochs = make_mixture((50, 1.0), num_epochs=1, max_tokens=10_000)

    assert by_tokens.num_tokens <= 100
    assert by_epochs.num_tokens == make_mixture((50, 1.0)).num_tokens


def test_a_weight_that_leaves_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="--data: the weights leave no row"):
        make_mixture((5, 0.01))


# ---- the same again ----


@given(st.integers(-5, 5), st.integers(0, 10_000))
def test_any_pack_is_the_same_whatever_was_read_before(seed: int, where: int) -> None:
    options: dict[str, Any] = {"seed": seed, "num_epochs": 4}
    packs = all_packs(make_mixture((30, 1.0), (20, 0.5), **options))
    index = where % len(packs)

    resumed = make_mixture((30, 1.0), (20, 0.5), **options)

    assert names([resumed[index]]) == [packs[index]]


def test_another_seed_is_another_order() -> None:
    assert all_packs(make_mixture((50, 1.0), seed=0)) != all_packs(make_mixture((50, 1.0), seed=1))


def test_reading_in_order_packs_each_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = make_mixture((50, 1.0), num_epochs=4)
    packed = []

    def counting(examples: list[Example], pack_length: int) -> list[Pack]:
        packed.append(len(examples))
        return pack_examples(examples, pack_length)

    monkeypatch.setattr("sortserve_trainer.data.mixture.pack_examples", counting)
    all_packs(mixture)

    assert len(packed) <= 4


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_index_outside_is_an_error(index: int) -> None:
    mixture = make_mixture((50, 1.0))

    with pytest.raises(IndexError):
        mixture[index]


def test_a_data_loader_makes_batches_of_it() -> None:
    mixture = make_mixture((50, 1.0))

    batches = list(DataLoader(mixture, batch_size=2, collate_fn=collate))

    assert sum(batch["input_ids"].shape[1] for batch in batches) == mixture.num_tokens
