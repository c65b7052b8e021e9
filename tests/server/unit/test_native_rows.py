"""Products of many rows in bf16, by every instance of the C++ kernels: how rows lie in memory and
how inputs are cut for the caches changes no bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from sortserve.checkpoint.load import load_checkpoint
from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.library import NativeLibrary
from sortserve.model.backends.cpu.linear import NativeLinear, Output
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from support.batches import Chunk, Pages, run_chunks
from support.native import INSTANCES, force_isa
from support.tiny_models import make_tiny_checkpoint

BF16 = torch.bfloat16
NUM_LAYERS = 6


@pytest.fixture(name="library", params=list(INSTANCES))
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    return force_isa(request.param, monkeypatch)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.mark.parametrize("num_inputs", [640, 768, 1100, 1536])
def test_a_row_of_many_inputs_gets_the_same_bits_alone_and_among_many(
    library: NativeLibrary, num_inputs: int
) -> None:
    x, weight_OI = random(230, num_inputs, seed=0), random(40, num_inputs, seed=1)
    layer = NativeLinear(library, Arena(), Weight.plain(weight_OI), None, Output.BF16, BF16)
    alone = torch.cat([layer(row[None]) for row in x])

    for count in (31, 97, 128, 230):
        assert torch.equal(layer(x[:count]), alone[:count])
    expected = linear(x.double(), weight_OI.double())
    torch.testing.assert_close(alone.double(), expected, rtol=1e-2, atol=1e-2 * num_inputs**0.5)


@pytest.mark.parametrize(("num_tokens", "size"), [(64, 32), (70, 35), (150, 50)])
def test_a_long_prompt_gets_the_same_bits_as_in_short_chunks(
    library: NativeLibrary, tmp_path: Path, num_tokens: int, size: int
) -> None:
    del library  # the kernels are there
    path = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(NUM_LAYERS,))
    checkpoint = load_checkpoint(str(path), dtype="bfloat16", device="cpu")
    exits = (NUM_LAYERS,)
    decoder = Decoder(checkpoint.config, checkpoint.weights, exits=exits, max_model_len=256)
    ids = [(7 * i) % 250 + 3 for i in range(num_tokens)]
    num_slabs = decoder.slabs.count(NUM_LAYERS)

    def last_logits(size: int) -> Tensor:
        table = Pages(400).table(num_slabs, num_tokens)
        cache = decoder.allocate_kv_cache(400, 8)
        for start in range(0, num_tokens, size):
            chunk = Chunk(ids[start : start + size], start, NUM_LAYERS, table)
            logits = run_chunks(decoder, cache, [chunk])
        return logits

    assert torch.equal(last_logits(num_tokens), last_logits(size))
