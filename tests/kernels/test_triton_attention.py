"""The attention kernels against the definition in plain torch, over random shapes and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.model.backends.reference.attention import ReferenceAttention
from sortserve.model.backends.reference.heads import ReferenceHeads
from sortserve.model.backends.triton.tiles import Tiles
from support.attention_cases import MIXED_ROWS, Case, make_config, make_rope
from support.interpreter import (
    RELATIVE_ERRORS,
    interpreted,
    patience,
    relative_error,
    triton_attention,
    triton_heads,
)

if TYPE_CHECKING:
    from sortserve.model.backends.triton.attention import TritonAttention

pytestmark = [interpreted, patience]

MORE = st.one_of(st.integers(0, 20), st.integers(21, 70))
"""Tokens that are cached already."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: heads, pages, and how the kernels cut their work."""

    group: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    norms: bool
    tiles: Tiles
    seed: int

    def case(self, rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> Case:
        config = make_config(self.group * self.num_kv_heads, self.num_kv_heads, self.head_dim)
        return Case(config, rows, block_size=self.block_size, dtype=dtype, seed=self.seed)


@st.composite
def shapes(draw: st.DrawFn, max_group: int = 9, programs: Sequence[int] = (1,)) -> Shape:
    return Shape(
        group=draw(st.integers(1, max_group)),
        num_kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([2, 10, 24, 64, 80, 96, 128, 192, 256])),
        block_size=draw(st.sampled_from([8, 16, 24, 32, 64])),
        norms=draw(st.booleans()),
        tiles=Tiles(
            queries=draw(st.sampled_from([16, 32])),
            keys=draw(st.sampled_from([16, 32, 64])),
            rows=1,
            heads=draw(st.sampled_from([32, 256])),
            programs=draw(st.sampled_from(programs)),
        ),
        seed=draw(st.integers(0, 10_000)),
    )


def check_attention(shape: Shape, rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    case = shape.case(rows, dtype)
    rope = make_rope(shape.head_dim)
    expected, expected_pages = case.run(ReferenceAttention(case.config, rope), norms=shape.norms)
    attention = triton_attention(case.config, rope, shape.tiles)
    actual, pages = case.run(attention, norms=shape.norms)
    assert relative_error(pages, expected_pages) <= RELATIVE_ERRORS[dtype]
    assert relative_error(actual, expected) <= RELATIVE_ERRORS[dtype]
    apart, apart_pages = case.run_apart(attention, norms=shape.norms)
    assert torch.equal(apart_pages, pages)
    assert torch.equal(apart, actual)


DECODE = {
    "shape": shapes(programs=[1, 4, 8]),
    "cached": st.lists(MORE, min_size=1, max_size=2),
}
CHUNKS = {
    "shape": shapes(max_group=2),
    "rows": st.lists(st.tuples(MORE, st.integers(2, 34)), min_size=1, max_size=2),
}


@given(**DECODE)
@settings(max_examples=200)
def test_rows_of_one_token_in_any_number_of_parts(shape: Shape, cached: list[int]) -> None:
    check_attention(shape, [(start, 1) for start in cached], torch.float32)


@given(**DECODE)
@settings(max_examples=30)
def test_rows_of_one_token_in_fp16(shape: Shape, cached: list[int]) -> None:
    check_attention(shape, [(start, 1) for start in cached], torch.float16)


@given(**CHUNKS)
@settings(max_examples=200)
def test_chunks_see_what_is_cached_and_themselves_up_to_each_token(
    shape: Shape, rows: list[tuple[int, int]]
) -> None:
    check_attention(shape, rows, torch.float32)


@given(**CHUNKS)
@settings(max_examples=30)
def test_chunks_in_fp16(shape: Shape, rows: list[tuple[int, int]]) -> None:
    check_attention(shape, rows, torch.float16)


@given(shape=shapes(max_group=3, programs=[1, 16]))
@settings(max_examples=5)
def test_rows_of_one_token_and_chunks_stand_together_in_any_order(shape: Shape) -> None:
    check_attention(shape, MIXED_ROWS, torch.float32)


HEAD_ROWS = st.lists(st.tuples(MORE, st.integers(1, 9)), min_size=1, max_size=4)


def check_heads(shape: Shape, dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    case, rope = shape.case(rows, dtype), make_rope(shape.head_dim)
    norms = case.norms if shape.norms else None
    expected_pages, pages = case.pages.clone(), case.pages.clone()
    reference = ReferenceHeads(case.config, rope, case.batch, 0, len(rows))
    expected = reference(case.qkv_TX.clone(), norms, expected_pages)

    heads = triton_heads(case.config, rope, shape.tiles, case.batch)
    actual = heads(case.qkv_TX.clone(), norms, pages)

    assert relative_error(actual, expected) <= RELATIVE_ERRORS[dtype]
    assert relative_error(pages, expected_pages) <= RELATIVE_ERRORS[dtype]


@given(shape=shapes(), rows=HEAD_ROWS)
@settings(max_examples=200)
def test_queries_and_keys_are_normed_and_rotated_and_keys_and_values_written(
    shape: Shape, rows: list[tuple[int, int]]
) -> None:
    check_heads(shape, torch.float32, rows)


@given(shape=shapes(), rows=HEAD_ROWS)
@settings(max_examples=30)
def test_queries_keys_and_values_in_fp16(shape: Shape, rows: list[tuple[int, int]]) -> None:
    check_heads(shape, torch.float16, rows)


def small_case(rows: Sequence[tuple[int, int]]) -> tuple[Case, TritonAttention]:
    """Of two tiles and two parts or more for a row of more than 16 tokens."""
    config = make_config(num_heads=2, num_kv_heads=1, head_dim=16)
    tiles = Tiles(queries=16, keys=16, rows=1, heads=64, programs=8)
    return Case(config, rows), triton_attention(config, make_rope(16), tiles)


def test_a_token_without_a_slot_is_not_written() -> None:
    case, attention = small_case([(3, 1), (5, 4)])
    _, expected = case.run(attention)
    slot = int(case.batch.slots_ST[0, 2])
    case.batch.slots_ST[0, 2] = -1

    _, pages = case.run(attention)

    page, offset = divmod(slot, 16)
    assert not torch.equal(expected[:, page, :, offset], case.pages[:, page, :, offset])
    expected[:, page, :, offset] = case.pages[:, page, :, offset]
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("rows", [[(30, 1), (3, 1)], [(20, 12), (0, 20)]])
def test_stale_contents_of_pages_do_not_matter(rows: list[tuple[int, int]]) -> None:
    case, attention = small_case(rows)
    expected, _ = case.run(attention)
    seen = torch.zeros(case.pages.shape[1] * 16, dtype=torch.bool)
    for table, length in zip(case.batch.block_tables_SRB[0], case.batch.context_lens, strict=True):
        positions = torch.arange(length)
        seen[table[positions // 16].long() * 16 + positions % 16] = True
    case.pages[(~seen).view(1, -1, 1, 16, 1).expand_as(case.pages)] = float("nan")

    assert torch.equal(case.run(attention)[0], expected)


def test_rows_beyond_those_that_are_alive_are_neither_read_nor_written() -> None:
    case, attention = small_case([(30, 1), (0, 20), (12, 1)])
    expected, _ = case.run(attention)
    case.batch.block_tables_SRB[0, 1:] = -1
    case.batch.slots_ST[0, 1:] = -1
    pages = case.pages.clone()
    (attend,) = attention.prepare(case.batch, range(1), 1)

    out_TX = attend(case.qkv_TX[:1].clone(), None, pages)

    assert torch.equal(out_TX, expected[:1])
    assert (pages != case.pages).any(dim=-1).sum() == 2  # one key and one value


def test_a_padded_row_of_a_bucket_without_any_context_gives_zeros() -> None:
    case, attention = small_case([(3, 1), (0, 1)])
    case.batch.block_tables_SRB[0, 1] = -1
    case.batch.context_lens_R[1] = 0
    case.batch.slots_ST[0, 1] = -1

    out_TX, _ = case.run(attention)

    assert out_TX[0].all()
    assert not out_TX[1].any()
