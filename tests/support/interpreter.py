"""Triton's kernels in tests on a CPU: interpreted, which takes a process that asks for it.

The interpreter computes with numpy, which has no bfloat16: it takes the bits of one for an integer,
and products come out wrong. So nothing is tested in bfloat16 here; ``tests/gpu`` does that.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest
import torch

from sortserve.model.attention import RopeTables
from sortserve.model.backend import Ops
from sortserve.model.backends.triton.tiles import Tiles
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

if TYPE_CHECKING:
    from sortserve.model.backends.triton.attention import TritonAttention
    from sortserve.model.backends.triton.heads import TritonHeads

__all__ = [
    "RELATIVE_ERRORS",
    "interpreted",
    "relative_error",
    "triton_attention",
    "triton_heads",
    "triton_ops",
]

_installed = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not _installed or os.environ.get("TRITON_INTERPRET") != "1",
    reason="interprets Triton: `make test-triton`, or pip install 'sortserve[triton]' and set "
    "TRITON_INTERPRET=1",
)
"""Marks a test that is skipped, by this name, where Triton's interpreter is not at hand."""

patience = pytest.mark.timeout(900)
"""Marks a test of hundreds of shapes: half a minute, or many on a machine that is busy."""

RELATIVE_ERRORS = {torch.float32: 1e-5, torch.float16: 4e-3}
"""Of the largest element. In fp16 both round their results, to 2^-11 at most, and softmax weights
before the second product."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest element that is expected."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def triton_attention(config: ModelConfig, rope: RopeTables, tiles: Tiles) -> TritonAttention:
    """The kernels; not to be called but in an ``interpreted`` test."""
    from sortserve.model.backends.triton.attention import TritonAttention

    return TritonAttention(config, rope, tiles)


def triton_heads(config: ModelConfig, rope: RopeTables, tiles: Tiles, batch: Batch) -> TritonHeads:
    """What comes before attention in slab 0; not to be called but in an ``interpreted`` test."""
    from sortserve.model.backends.triton.heads import TritonHeads

    return TritonHeads(config, rope, tiles, batch, 0)


def triton_ops(rows: int) -> Ops:
    """The small operations; not to be called but in an ``interpreted`` test."""
    from sortserve.model.backends.triton.ops import TritonOps

    return TritonOps(rows)
