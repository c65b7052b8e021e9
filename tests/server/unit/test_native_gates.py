"""The gate of an MLP in bf16, by every instance of the C++ kernels: one function wherever it is
asked, as near to the exact one as a result in bf16 can say.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.library import NativeLibrary
from sortserve.model.backends.cpu.linear import NativeLinear, Output
from sortserve.model.backends.cpu.ops import NativeOps
from sortserve.model.weight import Weight
from support.native import INSTANCES, force_isa

BF16 = torch.bfloat16
TINY = 2.0**-125
"""What is smaller may be zero: it is not always a normal number before it is rounded."""


@pytest.fixture(name="library", params=list(INSTANCES))
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    return force_isa(request.param, monkeypatch)


def gate(library: NativeLibrary, x: Tensor) -> Tensor:
    """silu(x) of single numbers."""
    return NativeOps(library).silu_and_mul(torch.stack((x, torch.ones_like(x)), dim=1))[:, 0]


def every_number() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(BF16)


def rank(x: Tensor) -> Tensor:
    """Which of all bf16 numbers it is, from below; both zeros are the same."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def test_every_result_is_within_a_step_of_the_exact_one(library: NativeLibrary) -> None:
    x = every_number()
    x = x[x.isfinite() & (x > -80)]
    exact, got = silu(x.double()), gate(library, x)
    is_tiny = exact.abs() < TINY

    assert (rank(got) - rank(exact.bfloat16()))[~is_tiny].abs().max() <= 1
    assert got[is_tiny].abs().max() <= TINY


def test_large_and_infinite_numbers_and_what_is_none(library: NativeLibrary) -> None:
    x = every_number()
    got = gate(library, x)

    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got[x > 20], x[x > 20])
    assert torch.equal(got[x == -torch.inf], x[x == -torch.inf])  # torch makes a NaN of it
    is_far_below = x.isfinite() & (x <= -80)
    assert (got <= 0)[is_far_below].all()
    # 2^-125 of it at most, where the exact result is zero.
    assert (got.double() >= x.double() * 2.0**-110)[is_far_below].all()


def test_a_gated_layer_has_the_same_gate_as_single_operations(library: NativeLibrary) -> None:
    x = every_number()
    x = x[x.isfinite() & (x.abs() < 100)]
    as_it_is, one = torch.tensor([[1.0], [0.0]], dtype=BF16), torch.tensor([0.0, 1.0], dtype=BF16)
    layer = NativeLinear(library, Arena(), Weight.plain(as_it_is), one, Output.SILU_MUL, BF16)

    assert torch.equal(layer(x[:, None])[:, 0], gate(library, x))
