"""bitsandbytes on a CUDA device: the same formats, the same products, the same answers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from support.batches import BLOCK_SIZE, Chunk, Pages, make_batch, random_ids
from support.bnb_checkpoints import BNB_CONFIGS, make_quantised_checkpoint, needs_bitsandbytes
from support.tiny_models import EXIT_KINDS, make_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    needs_bitsandbytes,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

EXITS = (1, 2, 4, 5, 6)
KINDS = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
IDS = random_ids(40, seed=3)


def logits(checkpoint: LoadedCheckpoint) -> torch.Tensor:
    """Of the last token of IDS at each exit, deepest first, on the CPU."""
    decoder = Decoder(checkpoint.config, checkpoint.weights, exits=EXITS, max_model_len=64)
    pages, cache = Pages(200), decoder.allocate_kv_cache(200, BLOCK_SIZE)
    chunks = [Chunk(IDS, 0, e, pages.table(e, len(IDS))) for e in EXITS[::-1]]
    batch = make_batch(chunks, decoder.num_slabs)
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.to(decoder.device)
    batch = replace(batch, **values)
    return decoder.logits(decoder.forward(batch, cache)).cpu()


@pytest.mark.parametrize("kind", BNB_CONFIGS)
def test_a_quantised_checkpoint_gives_what_it_gives_on_a_cpu(kind: str, tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(
        tmp_path / "own", "llama-bias", EXITS, KINDS, **BNB_CONFIGS[kind]
    )

    cpu, cuda = (load_checkpoint(str(folder), dtype="float32", device=d) for d in ("cpu", "cuda"))

    torch.testing.assert_close(logits(cuda), logits(cpu), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["nf4", "int8-bnb"])
def test_weights_quantised_on_the_device_are_those_quantised_on_a_cpu(
    quantize: str, dtype: str, tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path, "llama-tied", exits=EXITS)

    cpu, cuda = (
        load_checkpoint(str(tmp_path), dtype=dtype, device=device, quantize=quantize).weights
        for device in ("cpu", "cuda")
    )

    for own, other in zip(cuda.layers, cpu.layers, strict=True):
        assert_near(own.down, other.down)
    assert_near(cuda.lm_head, cpu.lm_head)


def assert_near(own: Weight, other: Weight) -> None:
    """The same but where an element lies between two values of the format."""
    difference = (own.dequantize(torch.float32).cpu() - other.dequantize(torch.float32)).abs()
    assert (difference > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("quantize", ["nf4", "int8-bnb"])
def test_in_bf16_the_answer_is_near_that_of_fp32(quantize: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "llama-tied", exits=EXITS)

    exact, rounded = (
        logits(load_checkpoint(str(tmp_path), dtype=dtype, device="cuda", quantize=quantize))
        for dtype in ("float32", "bfloat16")
    )

    assert (rounded - exact).norm() < 0.1 * exact.norm()
