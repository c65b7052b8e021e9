"""The formats of bitsandbytes: what they stand for, what a product is, how parts are joined."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sortserve.model.bnb import (
    EightBitFormat,
    FourBitFormat,
    quantize_eight_bit,
    quantize_four_bit,
)
from sortserve.model.weight import StackedFormat, Weight
from support.bnb_checkpoints import needs_bitsandbytes

pytestmark = needs_bitsandbytes

OUTPUTS, INPUTS = 192, 128
KINDS: dict[str, Callable[[Tensor], Weight]] = {
    "nf4": quantize_four_bit,
    "fp4": lambda matrix_OI: quantize_four_bit(matrix_OI, "fp4"),
    "int8-bnb": quantize_eight_bit,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_in_fp32_is_that_with_the_dequantised_matrix(kind: str) -> None:
    weight = KINDS[kind](random(OUTPUTS, INPUTS))
    x_TI, bias_O = random(7, INPUTS, seed=1), random(OUTPUTS, seed=2)

    y_TO = weight.format.linear(weight, bias_O)(x_TI)

    assert weight.format.name == kind
    expected_TO = functional.linear(x_TI, weight.dequantize(torch.float32), bias_O)
    torch.testing.assert_close(y_TO, expected_TO, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 0.01), ("fp4", 0.01), ("int8-bnb", 0.02)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_16_bits_is_near_it(kind: str, tolerance: float, dtype: torch.dtype) -> None:
    weight = KINDS[kind](random(OUTPUTS, INPUTS, dtype=dtype))
    x_TI, bias_O = random(7, INPUTS, seed=1, dtype=dtype), random(OUTPUTS, seed=2, dtype=dtype)

    y_TO = weight.format.linear(weight, bias_O)(x_TI)

    exact_TO = functional.linear(x_TI.float(), weight.dequantize(torch.float32), bias_O.float())
    assert y_TO.dtype == dtype
    assert (y_TO.float() - exact_TO).norm() < tolerance * exact_TO.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [2, 8, 33])
def test_in_bf16_a_token_does_not_depend_on_those_beside_it(kind: str, num_tokens: int) -> None:
    weight = KINDS[kind](random(OUTPUTS, INPUTS, dtype=torch.bfloat16))
    linear = weight.format.linear(weight, random(OUTPUTS, seed=2, dtype=torch.bfloat16))
    x_TI = random(num_tokens, INPUTS, seed=1, dtype=torch.bfloat16)
    x_TI[0, 5] = 40.0  # an outlier, in one token

    together_TO = linear(x_TI)
    alone_TO = torch.cat([linear(x_I[None]) for x_I in x_TI])

    # Sums may be taken in another order: a unit in the last place of bf16.
    torch.testing.assert_close(together_TO, alone_TO, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outlier", [0.5, 40.0])
def test_8_bits_are_what_bitsandbytes_makes_of_a_token_alone(
    dtype: torch.dtype, outlier: float
) -> None:
    import bitsandbytes as bnb

    weight = quantize_eight_bit(random(OUTPUTS, INPUTS))
    x_1I, bias_O = random(1, INPUTS, seed=1, dtype=dtype), random(OUTPUTS, seed=2, dtype=dtype)
    x_1I[0, 5] = outlier
    state = bnb.MatmulLtState()
    state.CB, state.SCB = weight.values, weight.scales
    state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False

    y_1O = weight.format.linear(weight, bias_O)(x_1I)

    with torch.inference_mode():
        theirs_1O = bnb.matmul(x_1I, weight.values, bias=bias_O, state=state)
    torch.testing.assert_close(y_1O, theirs_1O, atol=0, rtol=0)


def test_an_outlier_is_not_rounded_to_8_bits() -> None:
    weight = quantize_eight_bit(random(OUTPUTS, INPUTS))
    x_TI = random(3, INPUTS, seed=1, dtype=torch.bfloat16)
    x_TI[1, 5] = 500.0
    exact_TO = functional.linear(x_TI.float(), weight.dequantize(torch.float32))

    errors = []
    for threshold in (6.0, 0.0):
        own = Weight(weight.values, weight.scales, EightBitFormat(threshold))
        y_TO = own.format.linear(own, None)(x_TI)
        errors.append(float((y_TO[1].float() - exact_TO[1]).norm()))

    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_one_format_are_joined(kind: str) -> None:
    whole = KINDS[kind](random(OUTPUTS, INPUTS))
    parts = [KINDS[kind](part) for part in torch.split(random(OUTPUTS, INPUTS), [128, 32, 32])]

    joined = Weight.concat(parts)

    assert joined.format == whole.format
    assert joined.shape == (OUTPUTS, INPUTS)
    assert torch.equal(joined.values, whole.values)
    assert torch.equal(
        joined.dequantize(torch.float32), torch.cat([p.dequantize(torch.float32) for p in parts])
    )


def test_parts_that_cannot_be_joined_are_kept_side_by_side() -> None:
    odd = random(3, 50)  # not a whole number of blocks
    parts = [
        quantize_four_bit(odd),
        quantize_four_bit(odd, "fp4"),
        quantize_eight_bit(odd),
        Weight.plain(odd),
    ]
    x_TI, bias_O = random(5, 50, seed=1), random(12, seed=2)

    stacked = Weight.concat(parts)

    assert isinstance(stacked.format, StackedFormat)
    assert stacked.format.name == "fp4+int8-bnb+nf4+plain"
    assert (stacked.shape, stacked.nbytes) == ((12, 50), sum(part.nbytes for part in parts))
    matrix_OI = stacked.dequantize(torch.float32)
    assert torch.equal(matrix_OI, torch.cat([part.dequantize(torch.float32) for part in parts]))
    torch.testing.assert_close(
        stacked.format.linear(stacked, bias_O)(x_TI),
        functional.linear(x_TI, matrix_OI, bias_O),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_block_lies_in_one_part_or_the_parts_are_not_joined() -> None:
    half_a_block, whole_block = quantize_four_bit(random(1, 32)), quantize_four_bit(random(2, 32))

    assert isinstance(Weight.concat([half_a_block, whole_block]).format, StackedFormat)
    assert isinstance(Weight.concat([whole_block, half_a_block]).format, FourBitFormat)


def test_on_a_cpu_with_avx512_bf16_their_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes has no kernel for this CPU: no AVX-512 BF16")
    calls = []
    gemv_4bit = bnb.functional.gemv_4bit

    def count(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return gemv_4bit(*arguments, **options)

    monkeypatch.setattr(bnb.functional, "gemv_4bit", count)
    weight = quantize_four_bit(random(OUTPUTS, INPUTS, dtype=torch.bfloat16))

    weight.format.linear(weight, None)(random(2, INPUTS, dtype=torch.bfloat16))

    assert len(calls) == 1


def test_the_library_is_imported_where_it_is_needed_and_nowhere_else() -> None:
    code = (
        "import sys, sortserve.checkpoint.load, sortserve.engine.assemble\n"
        "assert 'bitsandbytes' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
