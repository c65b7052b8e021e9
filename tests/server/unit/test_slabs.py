"""Where the keys and values of layers stand, by every layer of models of all shapes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.slabs import MAX_PADDING, Slabs


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple[int, ...], set[int]]:
    """Exits, and those of them with a layer of their own."""
    exits = tuple(sorted(draw(st.sets(st.integers(1, 48), min_size=1, max_size=8))))
    return exits, draw(st.sets(st.sampled_from(exits)))


def places(slabs: Slabs, depth: int, own_layers: set[int]) -> list[tuple[int, int]]:
    """Of all layers whose keys and values a token has that runs to a depth."""
    return [
        *(slabs.place(layer) for layer in range(depth)),
        *(slabs.own_place(e) for e in own_layers if e <= depth),
    ]


@given(models())
def test_each_exit_has_a_place_for_all_it_needs_and_no_page_for_more(
    model: tuple[tuple[int, ...], set[int]],
) -> None:
    exits, own_layers = model
    slabs = Slabs.of(exits, own_layers)

    for exit_layer in exits:
        taken = places(slabs, exit_layer, own_layers)
        assert len(taken) == len(set(taken))
        assert {slab for slab, _ in taken} == set(range(slabs.count(exit_layer)))
        assert all(0 <= plane < slabs.size for _, plane in taken)
        num_planes = slabs.count(exit_layer) * slabs.size
        assert num_planes - len(taken) <= MAX_PADDING * num_planes


@given(models())
def test_the_layers_between_two_exits_follow_each_other_from_the_first_plane_of_a_slab(
    model: tuple[tuple[int, ...], set[int]],
) -> None:
    exits, own_layers = model
    slabs = Slabs.of(exits, own_layers)

    for start, end in itertools.pairwise((0, *exits)):
        first = slabs.count(start) if start else 0
        expected = [(first + i // slabs.size, i % slabs.size) for i in range(end - start)]
        assert [slabs.place(layer) for layer in range(start, end)] == expected


@given(models())
def test_without_own_layers_slabs_are_as_large_as_they_can_be_and_full(
    model: tuple[tuple[int, ...], set[int]],
) -> None:
    exits, _ = model
    slabs = Slabs.of(exits)

    assert slabs == Slabs(math.gcd(*exits))
    assert [slabs.count(e) * slabs.size for e in exits] == list(exits)


@pytest.mark.parametrize(
    ("exits", "own_layers", "size", "pages"),
    [
        ((21, 24, 27, 30), {21, 24, 27}, 2, [11, 13, 15, 17]),  # 33 layers on 34 planes
        ((15, 20, 24, 27, 30), {15, 20, 24, 27}, 2, [8, 11, 14, 16, 18]),  # 34 layers on 36
        ((10, 20, 30), {10, 20}, 11, [1, 2, 3]),  # 32 layers on 33
        ((12, 16, 20, 40), {12}, 1, [13, 17, 21, 41]),  # larger ones would waste too much
    ],
)
def test_the_size_is_the_largest_that_wastes_little(
    exits: tuple[int, ...], own_layers: set[int], size: int, pages: list[int]
) -> None:
    slabs = Slabs.of(exits, own_layers)

    assert slabs.size == size
    assert [slabs.count(exit_layer) for exit_layer in exits] == pages
