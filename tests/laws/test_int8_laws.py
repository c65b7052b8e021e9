"""What is promised in int8 (weights and activations in blocks of 32) of every instance of the
kernels: the distributions of the definition in torch within a stated tolerance, and bits of a row
that depend neither on its batch nor on how deep others go.

Integers are exact and scales are the definition's to the bit, so what differs is the order in which
blocks are summed, and what bf16 and int8 then round otherwise: at most TOLERANCE nats on average
over rows, the bound that bf16 is held to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sortserve.checkpoint.load import load_checkpoint
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.native import each_isa, force_isa
from support.tiny_models import make_tiny_checkpoint

TOLERANCE = 5e-3
EXITS = (2, 4, 6)
NUM_PAGES = 800
PROMPTS = [random_ids(5 + i % 9, seed=i) for i in range(20)]
DEPTHS = sorted((EXITS[i % 3] for i in range(20)), reverse=True)
"""Of the prompts; in a batch the deepest rows come first."""


def make_decoder(path: Path, backend: str = "auto") -> Decoder:
    checkpoint = load_checkpoint(str(path), dtype="bfloat16", device="cpu", quantize="int8")
    config = checkpoint.config
    return Decoder(
        config,
        checkpoint.weights,
        exits=EXITS,
        max_model_len=128,
        backend=choose_backend(config, torch.bfloat16, torch.device("cpu"), backend),
    )


def logits(decoder: Decoder, prompts: list[list[int]], depths: list[int]) -> torch.Tensor:
    """[R, V]: the whole prompts in one step."""
    pages, cache = Pages(NUM_PAGES), decoder.allocate_kv_cache(NUM_PAGES, BLOCK_SIZE)
    return run_chunks(decoder, cache, make_chunks(decoder, pages, prompts, depths))


def make_chunks(
    decoder: Decoder, pages: Pages, prompts: list[list[int]], depths: list[int]
) -> list[Chunk]:
    return [
        Chunk(ids, 0, depth, pages.table(decoder.slabs.count(depth), len(ids) + BLOCK_SIZE))
        for ids, depth in zip(prompts, depths, strict=True)
    ]


@each_isa
@pytest.mark.parametrize("family", ["llama-tied", "llama-bias", "qwen3-untied"])
def test_every_exit_in_int8_is_within_tolerance_of_the_definition(
    family: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = force_isa(isa, monkeypatch)
    path = make_tiny_checkpoint(tmp_path, family, exits=EXITS)
    before = library.calls["layers"]

    actual = logits(make_decoder(path), PROMPTS, DEPTHS).log_softmax(-1)
    expected = logits(make_decoder(path, "reference"), PROMPTS, DEPTHS).log_softmax(-1)

    divergence = (expected.exp() * (expected - actual)).sum(-1)
    assert divergence.mean() < TOLERANCE
    assert library.calls["layers"] > before


@each_isa
def test_a_row_in_int8_gets_the_same_bits_alone_and_in_a_batch_of_any_size_and_depths(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_isa(isa, monkeypatch)
    decoder = make_decoder(make_tiny_checkpoint(tmp_path, "llama-tied", exits=EXITS))
    alone = [logits(decoder, [ids], [e])[0] for ids, e in zip(PROMPTS, DEPTHS, strict=True)]

    for count in (2, 3, 5, 8, 13, 20):
        together = logits(decoder, PROMPTS[:count], DEPTHS[:count])
        assert torch.equal(together, torch.stack(alone[:count]))


@each_isa
def test_decode_steps_in_int8_give_the_same_bits_while_rows_come_and_go_and_leave_early(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_isa(isa, monkeypatch)
    decoder = make_decoder(make_tiny_checkpoint(tmp_path, "llama-tied", exits=EXITS))

    def run(chosen: list[int]) -> list[torch.Tensor]:
        """Prefill at full depth, then steps at the row's own (shallower) exit."""
        prompts = [PROMPTS[i] for i in chosen]
        pages, cache = Pages(NUM_PAGES), decoder.allocate_kv_cache(NUM_PAGES, BLOCK_SIZE)
        chunks = make_chunks(decoder, pages, prompts, [EXITS[-1]] * len(prompts))
        results = [run_chunks(decoder, cache, chunks)]
        for step in range(3):
            following = [
                Chunk([7 + step], len(chunk.ids) + step, DEPTHS[i], chunk.table_SB)
                for chunk, i in zip(chunks, chosen, strict=True)
            ]
            results.append(run_chunks(decoder, cache, following))
        return results

    together = run(list(range(12)))
    for i in (0, 7, 11):
        for mine, alone in zip(together, run([i]), strict=True):
            assert torch.equal(mine[i], alone[0])
