"""The Triton kernels on a CUDA device, in all dtypes, against the definition in torch on a CPU.

What the interpreter cannot show: compiled code, bfloat16, tiles and parts as a device has them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sortserve.model.attention import Attention, RopeTables
from sortserve.model.backend import Backend, Target, Unusable
from sortserve.model.backends.reference.attention import ReferenceAttention
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.backends.triton.choice import make_triton_backend
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from support.attention_cases import MIXED_ROWS, Case, make_config, make_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton"),
]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest element that is expected, computed in fp32 from the same inputs."""
CUDA = torch.device("cuda")
LONG_ROWS = [(1300, 1), (700, 1), (63, 1), (64, 1), (1000, 130), (0, 257), (511, 2)]

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def backend_of(config: ModelConfig, dtype: torch.dtype) -> Backend:
    backend = make_triton_backend(Target(config, dtype, CUDA))
    assert not isinstance(backend, Unusable), backend.reason
    return backend


def on_cuda(thing: Any) -> Any:
    """A batch, or the like, with its tensors on the device."""
    values = {f.name: getattr(thing, f.name) for f in fields(thing)}
    moved = {name: v.to(CUDA) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(thing, **moved)


def run_on_cuda(case: Case, attention: Attention, *, norms: bool) -> tuple[Tensor, Tensor]:
    batch: Batch = on_cuda(case.batch)
    pages = case.pages.to(CUDA)
    (attend,) = attention.prepare(batch, range(1), batch.num_rows)
    out_TX = attend(case.qkv_TX.to(CUDA), on_cuda(case.norms) if norms else None, pages)
    return out_TX.cpu(), pages.cpu()


def in_fp32(case: Case) -> Case:
    """The same inputs, exactly."""
    exact = Case(case.config, [(0, 1)])
    exact.batch = case.batch
    exact.pages, exact.qkv_TX = case.pages.float(), case.qkv_TX.float()
    exact.norms = replace(case.norms, query=case.norms.query.float(), key=case.norms.key.float())
    return exact


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    difference = (actual.double() - expected.double()).abs().max()
    assert float(difference / expected.double().abs().max()) <= TOLERANCES[dtype]


def check_attention(
    config: ModelConfig,
    rows: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    norms: bool = False,
) -> None:
    case, rope = Case(config, rows, dtype=dtype, block_size=block_size), make_rope(config.head_dim)
    expected, expected_pages = in_fp32(case).run(ReferenceAttention(config, rope), norms=norms)
    rope_there = RopeTables(rope.cos.to(CUDA), rope.sin.to(CUDA))
    attention = backend_of(config, dtype).attention(rope_there)

    actual, pages = run_on_cuda(case, attention, norms=norms)

    assert_near(pages, expected_pages, dtype)
    assert_near(actual, expected, dtype)


@each_dtype
@pytest.mark.parametrize("head_dim", [10, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (14, 2), (32, 8), (20, 1)])
def test_attention_of_any_heads(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_attention(make_config(num_heads, num_kv_heads, head_dim), MIXED_ROWS, dtype)


@each_dtype
@pytest.mark.parametrize("block_size", [8, 24, 32, 64])
def test_pages_of_any_size_and_norms(block_size: int, dtype: torch.dtype) -> None:
    config = make_config(6, 2, 64)
    check_attention(config, MIXED_ROWS, dtype, block_size=block_size, norms=True)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("copies", [1, 12])
def test_long_contexts_and_many_rows(copies: int, head_dim: int, dtype: torch.dtype) -> None:
    check_attention(make_config(8, 2, head_dim), LONG_ROWS * copies, dtype)


@each_dtype
@pytest.mark.parametrize("width", [1, 576, 2048, 8192])
@pytest.mark.parametrize("num_rows", [1, 33])
def test_small_operations(num_rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    h_TD, delta_TD = torch.randn(2, num_rows, width, generator=generator).to(dtype)
    weight_D = torch.randn(width, generator=generator).to(dtype)
    gate_up_TF = torch.randn(num_rows, 2 * width, generator=generator).to(dtype)
    summed = h_TD + delta_TD
    ops, there = backend_of(make_config(2, 2, 64), dtype).ops, h_TD.to(CUDA)

    normed = ops.add_rms_norm(there, delta_TD.to(CUDA), weight_D.to(CUDA), 1e-5)
    gated = ops.silu_and_mul(gate_up_TF.to(CUDA))

    assert torch.equal(there.cpu(), summed)
    plain = ReferenceOps()
    assert_near(normed.cpu(), plain.rms_norm(summed.float(), weight_D.float(), 1e-5), dtype)
    assert_near(gated.cpu(), plain.silu_and_mul(gate_up_TF.float()), dtype)


def test_a_step_of_rows_of_one_token_replays_in_a_cuda_graph() -> None:
    """With other pages, lengths and queries than it was captured with."""
    config, dtype = make_config(8, 2, 64), torch.bfloat16
    rope = make_rope(64)
    attention = backend_of(config, dtype).attention(
        RopeTables(rope.cos.to(CUDA), rope.sin.to(CUDA))
    )
    first, second = (
        Case(config, rows, dtype=dtype, seed=seed)
        for seed, rows in enumerate(([(900, 1), (5, 1)], [(899, 1), (300, 1)]))
    )
    batch: Batch = on_cuda(first.batch)
    qkv_TX, pages = first.qkv_TX.to(CUDA), second.pages.to(CUDA)
    (attend,) = attention.prepare(batch, range(1), 2)
    attend(qkv_TX.clone(), None, pages.clone())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TX = attend(qkv_TX, None, pages)

    for name in ("positions_T", "context_lens_R", "block_tables_SRB", "slots_ST"):
        getattr(batch, name).copy_(getattr(second.batch, name))
    qkv_TX.copy_(second.qkv_TX)
    pages.copy_(second.pages)
    graph.replay()

    expected, expected_pages = in_fp32(second).run(ReferenceAttention(config, rope))
    assert_near(out_TX.cpu(), expected, dtype)
    assert_near(pages.cpu(), expected_pages, dtype)
