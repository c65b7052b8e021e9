"""Memory in large pages, and the arena that packed weights share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.large_pages import LARGE_PAGE, large_pages


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, LARGE_PAGE, LARGE_PAGE + 1])
def test_memory_in_large_pages_is_zeroed_and_begins_with_one(num_bytes: int) -> None:
    memory = large_pages(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert not memory.any()
    if num_bytes:
        assert memory.data_ptr() % LARGE_PAGE == 0
        memory.fill_(7)  # all of it is ours to write


SHAPES = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=12)


@given(SHAPES, st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
def test_tensors_of_an_arena_do_not_share_memory(
    shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    arena = Arena()
    tensors = [arena.empty(shape, dtype).fill_(i) for i, shape in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == i).all()


def test_a_tensor_larger_than_a_piece_gets_one_of_its_own_and_outlives_the_arena() -> None:
    arena = Arena()
    small = arena.empty((3,), torch.float32).fill_(1)
    large = arena.empty(((64 << 20) + 8,), torch.uint8)
    large[-1] = 5
    del arena
    assert large[-1] == 5
    assert small.tolist() == [1, 1, 1]
