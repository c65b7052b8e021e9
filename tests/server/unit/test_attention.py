"""The C++ attention against the plain torch one, over random pages, shapes and batches."""

from __future__ import annotations

import pytest
import torch

from sortserve.model.backends.cpu.attention import NativeAttention
from sortserve.model.backends.cpu.library import NativeLibrary
from sortserve.model.backends.reference.attention import ReferenceAttention
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from support.attention_cases import MIXED_ROWS, Case, make_config, make_rope
from support.native import INSTANCES, instance

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(name="library", params=list(INSTANCES))
def _library(request: pytest.FixtureRequest) -> NativeLibrary:
    return instance(request.param)


def assert_native_equals_reference(
    library: NativeLibrary, config: ModelConfig, case: Case, *, norms: bool = False
) -> None:
    rope = make_rope(config.head_dim)
    expected, expected_pages = case.run(ReferenceAttention(config, rope), norms=norms)
    native = NativeAttention(config, rope, library, case.pages.dtype)
    got, pages = case.run(native, norms=norms)
    tolerance = TOLERANCES[case.pages.dtype]
    torch.testing.assert_close(pages, expected_pages, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    apart, apart_pages = case.run_apart(native, norms=norms)
    assert torch.equal(apart_pages, pages)
    assert torch.equal(apart, got)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [10, 16, 24, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1), (14, 2)])
def test_native_attention_equals_the_reference(
    library: NativeLibrary, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    config = make_config(num_heads, num_kv_heads, head_dim)
    assert_native_equals_reference(library, config, Case(config, MIXED_ROWS, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 32])
def test_pages_may_have_any_size(
    library: NativeLibrary, block_size: int, dtype: torch.dtype
) -> None:
    config = make_config(6, 2, 64)
    case = Case(config, MIXED_ROWS, block_size=block_size, dtype=dtype)
    assert_native_equals_reference(library, config, case)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_query_and_key_norms_come_before_the_rotation(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    config = make_config(6, 2, 24)
    case = Case(config, MIXED_ROWS, dtype=dtype)
    case.qkv_TX *= 3
    assert_native_equals_reference(library, config, case, norms=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_long_contexts_are_split_and_merged(library: NativeLibrary, dtype: torch.dtype) -> None:
    config, partition = make_config(6, 2, 64), library.attention_partition
    rows = [(2 * partition, 1), (partition - 1, 1), (partition, 1), (7, 1), (1300, 2), (600, 40)]
    case = Case(config, rows, block_size=24, dtype=dtype)
    # A page with far larger scores than the others must win in the merge.
    page = int(case.batch.block_tables_SRB[0, 0, 30])
    case.pages[0, page] *= 4
    assert_native_equals_reference(library, config, case)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_row_gets_the_same_bits_whatever_rows_are_beside_it(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    config, rope = make_config(6, 2, 64), make_rope(64)
    together = Case(config, MIXED_ROWS, dtype=dtype)
    native = NativeAttention(config, rope, library, dtype)
    out_TX, _ = together.run(native)
    batch = together.batch
    for row, rows in enumerate(MIXED_ROWS):
        tokens = slice(batch.query_starts[row], batch.query_starts[row + 1])
        alone = Case(config, [rows], dtype=dtype)
        alone.qkv_TX, alone.pages = together.qkv_TX[tokens], together.pages
        alone.batch = Batch(
            **{
                **vars(alone.batch),
                "block_tables_SRB": batch.block_tables_SRB[:, row : row + 1].contiguous(),
                "slots_ST": batch.slots_ST[:, tokens].contiguous(),
            }
        )
        assert torch.equal(alone.run(native)[0], out_TX[tokens])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stale_contents_of_pages_do_not_matter(library: NativeLibrary, dtype: torch.dtype) -> None:
    config, rope = make_config(6, 2, 64), make_rope(64)
    case = Case(config, [(3, 1), (20, 1), (5, 20)], dtype=dtype)
    native = NativeAttention(config, rope, library, dtype)
    expected, _ = case.run(native)
    seen = torch.zeros(case.pages.shape[1] * 16, dtype=torch.bool)
    for table, length in zip(case.batch.block_tables_SRB[0], case.batch.context_lens, strict=True):
        positions = torch.arange(length)
        seen[table[positions // 16].long() * 16 + positions % 16] = True
    stale = (~seen).view(1, -1, 1, 16, 1).expand_as(case.pages)
    case.pages[stale] = float("nan")
    assert torch.equal(case.run(native)[0], expected)


def test_a_prompt_attends_to_far_larger_scores_that_come_late(library: NativeLibrary) -> None:
    config = make_config(6, 2, 64)
    case = Case(config, [(200, 150)], dtype=torch.bfloat16)
    for page in case.batch.block_tables_SRB[0, 0, [9, 11]]:
        case.pages[0, int(page)] *= 8
    assert_native_equals_reference(library, config, case)


def test_a_prompts_tokens_get_the_same_bits_in_any_chunks(library: NativeLibrary) -> None:
    config, rope = make_config(6, 2, 64), make_rope(64)
    whole = Case(config, [(0, 300)], dtype=torch.bfloat16)
    whole.pages[0, int(whole.batch.block_tables_SRB[0, 0, 5])] *= 8
    native = NativeAttention(config, rope, library, torch.bfloat16)
    expected_TX, whole.pages = whole.run(native)
    for start in (33, 64, 250):
        rest = Case(config, [(start, 300 - start)], dtype=torch.bfloat16)
        rest.qkv_TX, rest.pages = whole.qkv_TX[start:], whole.pages
        tables_SRB, slots_ST = whole.batch.block_tables_SRB, whole.batch.slots_ST[:, start:]
        rest.batch = Batch(
            **{
                **vars(rest.batch),
                "block_tables_SRB": tables_SRB,
                "slots_ST": slots_ST.contiguous(),
            }
        )
        assert torch.equal(rest.run(native)[0], expected_TX[start:])


def test_the_reference_writes_keys_and_values_apart_from_queries() -> None:
    config = make_config(6, 2, 16)
    case, reference = Case(config, MIXED_ROWS), ReferenceAttention(config, make_rope(16))
    expected, pages = case.run(reference, norms=True)

    apart, apart_pages = case.run_apart(reference, norms=True)

    assert torch.equal(apart_pages, pages)
    assert torch.equal(apart, expected)


def test_rows_run_through_the_kernel(library: NativeLibrary) -> None:
    config, rope = make_config(6, 2, 16), make_rope(16)
    before = library.calls["attention"]
    Case(config, MIXED_ROWS).run(NativeAttention(config, rope, library, torch.float32))
    assert library.calls["attention"] == before + 1
