"""int8 in blocks of 32: what quantising costs, and that every kernel computes the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.library import NativeLibrary
from sortserve.model.backends.cpu.linear import Output
from sortserve.model.backends.cpu.linear_int8 import NativeInt8Linear
from sortserve.model.quantization import (
    BLOCK_SIZE,
    INT8,
    multiply_weight_only,
    quantize_activations,
    quantize_int8,
)
from sortserve.model.weight import Weight
from support.native import INSTANCES, force_isa, instance

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(32, 64), (70, 36), (8, 2), (18, 7), (576, 576), (40, 1536)]
"""(outputs, inputs)"""


@pytest.fixture(name="library", params=list(INSTANCES))
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    return force_isa(request.param, monkeypatch)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(num_tokens: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Inputs of sizes from 1e-3 to 1e3, as a residual stream has them."""
    return (random(num_tokens, num_inputs) * 10 ** random(num_inputs, seed=9)).to(dtype)


# ---- the definition


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_no_weight_is_further_off_than_its_scale_allows(num_outputs: int, num_inputs: int) -> None:
    matrix = random(num_outputs, num_inputs) * 10 ** random(num_outputs, 1, seed=1)
    weight = quantize_int8(matrix)
    assert weight.shape == matrix.shape
    assert weight.scales is not None
    error = (weight.dequantize(torch.float32) - matrix).abs()
    scales = weight.scales.float().repeat_interleave(BLOCK_SIZE, dim=1)[:, :num_inputs]
    # Half a step; the largest of a block half a step more, as its scale is rounded to bf16.
    assert (error <= scales * 1.001).all()
    assert error.mean() < 0.3 * scales.mean()


def test_a_weight_that_int8_can_express_stays_as_it_is() -> None:
    steps = torch.arange(-127, 128, 2).repeat(3, 1).float()
    steps[:, ::BLOCK_SIZE] = 127  # the largest of each block
    scale = torch.tensor([[0.25], [1.0], [2.0**-20]])
    assert torch.equal(quantize_int8(steps * scale).dequantize(torch.float32), steps * scale)


def test_an_output_is_quantised_on_its_own() -> None:
    matrix = random(6, 70)
    alone, together = quantize_int8(matrix[2:3]), quantize_int8(matrix)
    assert alone.scales is not None
    assert together.scales is not None
    assert torch.equal(alone.values, together.values[2:3])
    assert torch.equal(alone.scales, together.scales[2:3])


def test_zero_stays_zero() -> None:
    weight = quantize_int8(torch.zeros(2, 40))
    assert torch.equal(weight.dequantize(torch.float32), torch.zeros(2, 40))
    assert torch.equal(INT8.linear(weight, None)(random(3, 40)), torch.zeros(3, 2))
    values, scales = quantize_activations(torch.tensor([[0.0, 1e-38, -1e-38]]))
    assert torch.equal(values, torch.zeros(1, 3, dtype=torch.int8))
    assert torch.equal(scales, torch.zeros(1, 1))


def test_the_largest_activation_of_a_block_is_exact_and_ties_go_to_even() -> None:
    values, scales = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5]]))
    assert values.tolist() == [[127, 0, 2, -2, 0]]
    assert scales.tolist() == [[1.0]]


# ---- the kernels


def native(
    library: NativeLibrary,
    weight: Weight,
    bias: Tensor | None = None,
    output: Output = Output.FP32,
    dtype: torch.dtype = torch.float32,
) -> NativeInt8Linear:
    return NativeInt8Linear(library, Arena(), weight, bias, output, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 12, 13, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_int8_kernels_equal_the_definition(
    library: NativeLibrary,
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
) -> None:
    weight = quantize_int8(random(num_outputs, num_inputs, seed=1) / num_inputs**0.5)
    x, bias = random(num_tokens, num_inputs, dtype=dtype), random(num_outputs, seed=2)
    exact = INT8.linear(weight, None)(x.float())
    gate, up = (exact + bias).chunk(2, dim=-1)
    calls = library.calls["linear_int8"]

    for output, with_bias, expected in [
        (Output.FP32, None, exact),
        (Output.FP32, bias, exact + bias),
        (Output.of(dtype), bias, exact + bias),
        (Output.SILU_MUL, bias, silu(gate) * up),
    ]:
        got = native(library, weight, with_bias, output, dtype)(x)
        rounding = 1e-5 if got.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(got.float(), expected, rtol=rounding, atol=1e-5)
    assert library.calls["linear_int8"] == calls + 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_quantise_activations_to_the_bits_of_the_definition(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    x = uneven(200, 100, dtype)
    x[0, :40] = 0
    x[1, :40] = 1e-38
    one_each = Weight(torch.eye(100, dtype=torch.int8), torch.ones(100, 4).bfloat16(), INT8)
    values, scales = quantize_activations(x)
    expected = values * scales.repeat_interleave(BLOCK_SIZE, dim=1)[:, :100]
    assert torch.equal(native(library, one_each, dtype=dtype)(x), expected)


def test_the_largest_integers_do_not_overflow(library: NativeLibrary) -> None:
    signs = torch.tensor([1, -1, -1, 1]).repeat(24)
    weight = Weight((signs * 127).to(torch.int8).repeat(33, 1), torch.ones(33, 3).bfloat16(), INT8)
    for x in (signs.float(), -signs.float()):
        expected = torch.full((1, 33), float((x * signs).sum()) * 127)
        torch.testing.assert_close(native(library, weight)(x[None] * 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_token_gets_the_same_int8_bits_at_any_place_among_any_number_of_tokens(
    library: NativeLibrary, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    x = uneven(100, num_inputs, dtype)
    linear = native(library, quantize_int8(random(num_outputs, num_inputs, seed=1)), dtype=dtype)
    expected = torch.cat([linear(x[i : i + 1]) for i in range(len(x))])
    for num_tokens in range(1, len(x) + 1):
        assert torch.equal(linear(x[-num_tokens:]), expected[-num_tokens:])


@pytest.mark.parametrize(
    ("tiled", "by_vectors"), [("amx", "avx512_bf16"), ("amx_emulated", "avx2")]
)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_tiles_of_amx_give_the_bits_that_vectors_give(
    tiled: str, by_vectors: str, num_outputs: int, num_inputs: int
) -> None:
    """Whatever their number: few rows are multiplied by vectors in every instance."""
    weight = quantize_int8(random(num_outputs, num_inputs, seed=1))
    ours, theirs = (native(instance(isa), weight) for isa in (tiled, by_vectors))
    for num_tokens in (1, 6, 7, 9, 16, 17, 40):
        x = uneven(num_tokens, num_inputs, torch.float32)
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_no_number_shows_in_its_own_row_alone(
    library: NativeLibrary, bad: float
) -> None:
    linear = native(library, quantize_int8(random(40, 64, seed=1)))
    x = random(3, 64)
    expected = linear(x)
    x[1, 33] = bad
    got = linear(x)
    assert not got[1].isfinite().any()
    assert torch.equal(got[::2], expected[::2])


# ---- where only the weights are int8


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_matrix_made_whole_in_bf16_is_that_of_fp32_rounded(
    num_outputs: int, num_inputs: int
) -> None:
    weight = quantize_int8(random(num_outputs, num_inputs) * 10 ** random(num_outputs, 1, seed=1))

    assert torch.equal(
        weight.dequantize(torch.bfloat16), weight.dequantize(torch.float32).bfloat16()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_stay_as_they_are_where_only_weights_are_int8(dtype: torch.dtype) -> None:
    """Outliers beside small inputs, which blocks of int8 would lose, keep all their digits."""
    weight, bias = quantize_int8(random(40, 96)), random(40, seed=3).to(dtype)
    x = random(5, 96, seed=2).to(dtype)
    x[:, ::BLOCK_SIZE] = 300.0

    out = multiply_weight_only(x, weight, bias)

    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double())
    assert out.dtype == dtype
    error = (out.double() - exact - bias.double()).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert not torch.equal(out, INT8.linear(weight, bias)(x))
