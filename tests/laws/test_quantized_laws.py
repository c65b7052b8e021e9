"""Quantised weights are the matrices they stand for, at every exit and on every backend.

The engine computes with a format; the slow reference (fp32, no cache, no batch) with its
dequantised matrices. The format is one from outside the package: what holds for it holds for all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sortserve.checkpoint.load import load_checkpoint
from sortserve.checkpoint.quantize import QUANTIZERS
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.reference import reference_forward
from support.tiny_models import make_tiny_checkpoint, mixed_kinds
from support.toy_quantizer import TOY

EXITS = (1, 2, 4, 5, 6)
IDS = random_ids(40, seed=3)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("variant", ["llama-tied", "llama-bias", "qwen3-untied"])
def test_the_engine_computes_the_product_with_the_dequantised_matrices(
    variant: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    make_tiny_checkpoint(tmp_path, variant, exits=EXITS, exit_kinds=mixed_kinds(EXITS, variant))
    checkpoint = load_checkpoint(str(tmp_path), dtype="float32", device="cpu", quantize="toy")
    config, weights = checkpoint.config, checkpoint.weights
    expected = [reference_forward(config, weights, IDS, e)[-1] for e in EXITS[::-1]]
    decoder = Decoder(
        config,
        weights,
        exits=EXITS,
        max_model_len=64,
        backend=choose_backend(config, torch.float32, torch.device("cpu"), backend),
        release_weights=True,
    )
    pages = Pages(200)
    cache = decoder.allocate_kv_cache(200, BLOCK_SIZE)

    logits_RV = run_chunks(
        decoder,
        cache,
        [Chunk(IDS, 0, e, pages.table(decoder.slabs.count(e), len(IDS))) for e in EXITS[::-1]],
    )

    torch.testing.assert_close(logits_RV, torch.stack(expected), atol=2e-4, rtol=0)
