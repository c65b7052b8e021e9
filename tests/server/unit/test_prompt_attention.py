"""Attention of a prompt in bf16 by AMX: what rounding leaves of the weights of its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sortserve.model.backends.cpu.attention import NativeAttention
from support.attention_cases import Case, make_config, make_rope
from support.native import instance

BF16 = torch.bfloat16
CONFIG = make_config(6, 2, 64)
NUM_TOKENS = 150


@pytest.fixture(name="attention", params=["amx", "amx_emulated"])
def _attention(request: pytest.FixtureRequest) -> NativeAttention:
    return NativeAttention(CONFIG, make_rope(64), instance(request.param), BF16)


def make_case() -> Case:
    return Case(CONFIG, [(0, NUM_TOKENS)], dtype=BF16)


def parts(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, H], keys and values [T, K, H] of a case."""
    heads_TNH = case.qkv_TX.view(NUM_TOKENS, -1, CONFIG.head_dim)
    sizes = [CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads]
    q, k, v = heads_TNH.split_with_sizes(sizes, dim=1)
    return q, k, v


def run(attention: NativeAttention, case: Case) -> Tensor:
    """[T, N, H]"""
    return case.run(attention)[0].view(NUM_TOKENS, CONFIG.num_heads, CONFIG.head_dim)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_the_weights_of_a_query_sum_to_one_exactly(attention: NativeAttention, size: float) -> None:
    case = make_case()
    queries, _, values = parts(case)
    queries *= size
    values.fill_(1)

    out_TNH = run(attention, case)
    assert torch.equal(out_TNH, torch.ones_like(out_TNH))


def test_a_query_that_is_no_number_spoils_itself_alone(attention: NativeAttention) -> None:
    case = make_case()
    expected_TNH = run(attention, case)
    parts(case)[0][70, 4] = torch.nan
    expected_TNH[70, 4] = torch.nan

    torch.testing.assert_close(run(attention, case), expected_TNH, rtol=0, atol=0, equal_nan=True)


def test_a_key_that_is_no_number_spoils_those_that_see_it(attention: NativeAttention) -> None:
    case = make_case()
    expected_TNH = run(attention, case)
    parts(case)[1][70, 1] = torch.nan
    expected_TNH[70:, CONFIG.num_heads // 2 :] = torch.nan

    torch.testing.assert_close(run(attention, case), expected_TNH, rtol=0, atol=0, equal_nan=True)


def test_a_score_without_bounds_makes_no_number(attention: NativeAttention) -> None:
    case = make_case()
    queries, keys, _ = parts(case)
    queries[70, 4] = keys[70, 1] = 1e30

    out_TNH = run(attention, case)
    assert out_TNH[70, 4].isnan().all()
    assert out_TNH[:70].isfinite().all()
