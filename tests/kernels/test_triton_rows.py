"""The row kernels against the definition in plain torch, over random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sortserve.model.backends.reference.ops import ReferenceOps
from support.interpreter import RELATIVE_ERRORS, interpreted, patience, relative_error, triton_ops

pytestmark = [interpreted, patience]

SHAPES = {
    "num_rows": st.integers(1, 12),
    "width": st.one_of(st.integers(1, 130), st.sampled_from([576, 1024, 2048])),
    "rows": st.sampled_from([1, 2, 4, 16]),
    "seed": st.integers(0, 10_000),
}
DTYPES = st.sampled_from(list(RELATIVE_ERRORS))


def draw(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def check_add_rms_norm(dtype: torch.dtype, num_rows: int, width: int, rows: int, seed: int) -> None:
    shape = (num_rows, width)
    h_TD, delta_TD, weight_D = draw(seed, dtype, shape, shape, (width,))
    expected_h_TD = h_TD.clone()
    expected = ReferenceOps().add_rms_norm(expected_h_TD, delta_TD, weight_D, 1e-5)

    actual = triton_ops(rows).add_rms_norm(h_TD, delta_TD, weight_D, 1e-5)

    assert torch.equal(h_TD, expected_h_TD)
    assert relative_error(actual, expected) <= RELATIVE_ERRORS[dtype]


def check_silu_and_mul(dtype: torch.dtype, num_rows: int, width: int, rows: int, seed: int) -> None:
    (gate_up_TF,) = draw(seed, dtype, (num_rows, 2 * width))

    actual = triton_ops(rows).silu_and_mul(gate_up_TF)

    expected = ReferenceOps().silu_and_mul(gate_up_TF)
    assert relative_error(actual, expected) <= RELATIVE_ERRORS[dtype]


@given(**SHAPES)
@settings(max_examples=200)
def test_a_norm_after_an_addition(num_rows: int, width: int, rows: int, seed: int) -> None:
    check_add_rms_norm(torch.float32, num_rows, width, rows, seed)


@given(**SHAPES)
@settings(max_examples=40)
def test_a_norm_after_an_addition_in_fp16(num_rows: int, width: int, rows: int, seed: int) -> None:
    check_add_rms_norm(torch.float16, num_rows, width, rows, seed)


@given(**SHAPES)
@settings(max_examples=200)
def test_silu_of_one_half_times_the_other(num_rows: int, width: int, rows: int, seed: int) -> None:
    check_silu_and_mul(torch.float32, num_rows, width, rows, seed)


@given(**SHAPES)
@settings(max_examples=40)
def test_silu_of_one_half_times_the_other_in_fp16(
    num_rows: int, width: int, rows: int, seed: int
) -> None:
    check_silu_and_mul(torch.float16, num_rows, width, rows, seed)


@given(dtype=DTYPES, **SHAPES)
@settings(max_examples=400)
def test_a_norm_alone_leaves_its_input_as_it_is(
    dtype: torch.dtype, num_rows: int, width: int, rows: int, seed: int
) -> None:
    x_TD, weight_D = draw(seed, dtype, (num_rows, width), (width,))
    before = x_TD.clone()

    actual = triton_ops(rows).rms_norm(x_TD, weight_D, 1e-6)

    assert torch.equal(x_TD, before)
    expected = ReferenceOps().rms_norm(x_TD, weight_D, 1e-6)
    assert relative_error(actual, expected) <= RELATIVE_ERRORS[dtype]


def test_gates_far_from_zero_are_open_or_shut() -> None:
    gate_up_TF = torch.tensor([[200.0, -200.0, 0.0, 5.0, 5.0, 5.0]])

    assert triton_ops(1).silu_and_mul(gate_up_TF).tolist() == [[1000.0, -0.0, 0.0]]


@pytest.mark.parametrize("width", [1, 64])
def test_no_rows_are_no_launch(width: int) -> None:
    ops, none = triton_ops(1), torch.empty(0, width)

    assert ops.rms_norm(none, torch.ones(width), 1e-5).shape == (0, width)
    assert ops.silu_and_mul(torch.empty(0, 2 * width)).shape == (0, width)
