"""A seed is a promise: in fp32 a request gives the same tokens alone and in any company.

All of them, not most. Two things make it so. The logits of a row are the same bits whatever rows
are beside it, however its prompt is cut, and whether its KV was computed, found or computed again;
the first test shows that on the decoder. And the sampler sees one row at a time, as
``tests/server/unit/test_sampler.py`` shows. The other tests show both together on hundreds of
requests.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.engine.engine import Engine
from sortserve.model.backends.cpu.library import load_native
from sortserve.model.decoder import Decoder
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.scripted import Collected, add, collect, make_request
from support.serving import Served, serve
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
VARIANTS = (
    *("llama-tied", "llama-bias", "llama-mqa", "llama-head-dim-10", "llama-head-dim-24"),
    *("qwen2-untied", "qwen3-untied"),
)
CONTEXT = 90

pytestmark = pytest.mark.skipif(
    load_native() is None, reason="without a C++ compiler last bits depend on the batch"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seeds")
    return {
        variant: make_tiny_checkpoint(
            root / variant, variant, exits=EXITS, exit_kinds=mixed_kinds(EXITS, variant)
        )
        for variant in VARIANTS
    }


# ---- bits


def run_row(
    decoder: Decoder, ids: list[int], exit_layer: int, sizes: list[int], beside: list[Chunk]
) -> torch.Tensor:
    """The row's last logits, run in chunks of ``sizes``; its last step has company."""
    cache, pages = decoder.allocate_kv_cache(2600, BLOCK_SIZE), Pages(2600)
    num_slabs = decoder.slabs.count(exit_layer)
    table = pages.table(num_slabs, len(ids))
    start = 0
    for size in sizes[:-1]:
        row = Chunk(ids[start : start + size], start, exit_layer, table, samples=False)
        run_chunks(decoder, cache, [row])
        start += size
    company = [
        Chunk(c.ids, c.start, c.exit_layer, pages.table(decoder.slabs.count(c.exit_layer), CONTEXT))
        for c in beside
    ]
    chunks = sorted(
        [*company, Chunk(ids[start:], start, exit_layer, table)], key=lambda c: -c.exit_layer
    )
    [index] = [i for i, chunk in enumerate(chunks) if chunk.table_SB is table]
    return run_chunks(decoder, cache, chunks)[index]


def random_company(rng: random.Random) -> list[Chunk]:
    """Rows of any depth, decoding (over a cache of zeros) or in any part of their prompt."""
    company = []
    for _ in range(rng.choice([0, 1, 2, 5, 11, 12, 30])):
        start, size = rng.randrange(50), rng.choice([1, 1, 1, 2, 8, 9, 33])
        ids = [rng.randrange(VOCAB_SIZE) for _ in range(size)]
        company.append(Chunk(ids, start, rng.choice(EXITS), Pages(1).table(0, 0)))
    return company


def random_sizes(rng: random.Random, total: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(rng.choice([1, 2, 7, 8, 9, 16, 40, 90]), total - sum(sizes)))
    return sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_of_a_row_are_the_same_bits_in_any_company_and_any_chunks(
    folders: dict[str, Path], variant: str
) -> None:
    decoder, rng = serve(folders[variant]).decoder, random.Random(variant)
    for case in range(4):
        ids = [i % VOCAB_SIZE for i in random_ids(rng.randrange(1, CONTEXT), seed=case)]
        exit_layer = rng.choice(EXITS)
        alone = run_row(decoder, ids, exit_layer, [len(ids)], [])
        for _ in range(4):
            sizes, beside = random_sizes(rng, len(ids)), random_company(rng)
            assert torch.equal(run_row(decoder, ids, exit_layer, sizes, beside), alone)


# ---- tokens


def random_spec(rng: random.Random) -> dict[str, Any]:
    """Any prompt, depth and way to sample, each with a seed."""
    sampling: dict[str, Any] = {"temperature": rng.choice([0.6, 0.9, 1.0, 1.3, 2.0])}
    choices: dict[str, list[float]] = {
        "top_k": [2, 40, 100],
        "top_p": [0.5, 0.9, 0.99],
        "min_p": [0.02, 0.2],
        "repetition_penalty": [0.8, 1.2],
        "presence_penalty": [0.5],
        "frequency_penalty": [0.5],
    }
    for name, values in choices.items():
        if rng.random() < 0.25:
            sampling[name] = rng.choice(values)
    shared = list(range(40, 40 + rng.choice([0, 0, 4, 17, 30])))
    own = [rng.randrange(3, VOCAB_SIZE - 30) for _ in range(rng.randrange(1, 30))]
    return {
        "prompt": shared + own,
        "exit_layer": rng.choice(EXITS),
        "sampling": {**sampling, "seed": rng.randrange(-(2**63), 2**63), "ignore_eos": True},
    }


def run_all(
    engine: Engine, specs: list[dict[str, Any]], max_tokens: int, rng: random.Random | None = None
) -> list[list[int]]:
    """Everybody's tokens; with ``rng`` they arrive at any time, and some are preempted."""
    results: dict[str, Collected] = {}
    waiting = list(enumerate(specs))
    while waiting or engine.has_work:
        num_new = len(waiting) if rng is None else rng.choice([0, 1, 7])
        for i, spec in waiting[:num_new]:
            request = make_request(
                str(i), spec["prompt"], max_tokens=max_tokens, **spec["sampling"]
            )
            add(engine, request, spec["exit_layer"])
        del waiting[:num_new]
        if rng is not None and rng.random() < 0.1:
            running = [s for s in engine.scheduler.sequences() if s.num_computed_tokens]
            if running:
                engine.scheduler.preempt(rng.choice(running))
        collect(engine.step(), results)
    return [results[str(i)].token_ids for i in range(len(specs))]


def check_all(served: Served, num_specs: int, max_tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    specs = [random_spec(rng) for _ in range(num_specs)]
    lonely = served.engine(enable_prefix_caching=False)
    alone = [run_all(lonely, [spec], max_tokens)[0] for spec in specs]
    busy = served.engine(
        num_pages=900,
        policy=rng.choice(["fair", "lockstep"]),
        max_num_batched_tokens=rng.choice([13, 40, 256]),
        max_num_seqs=rng.choice([5, 17, 40]),
    )

    together = run_all(busy, specs, max_tokens, rng)

    wrong = [i for i in range(num_specs) if together[i] != alone[i]]
    assert wrong == []


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3-untied"])
def test_every_one_of_hundreds_of_seeded_requests_gives_the_same_tokens_alone_and_batched(
    folders: dict[str, Path], variant: str
) -> None:
    check_all(serve(folders[variant]), num_specs=150, max_tokens=6, seed=1)


def test_in_bf16_it_holds_where_the_kernels_do_all_products(folders: dict[str, Path]) -> None:
    """But not for a prompt that goes on from an answer whose KV is still cached: there, generated
    tokens have become a prompt's, which are rounded otherwise."""
    served = serve(folders["llama-tied"], dtype="bfloat16")
    if served.decoder.backend.name != "cpu":
        pytest.skip("there are no bf16 kernels here")
    check_all(served, num_specs=50, max_tokens=8, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_one_of_thousands_of_seeded_requests_gives_the_same_tokens_alone_and_batched(
    folders: dict[str, Path], variant: str, seed: int
) -> None:
    check_all(serve(folders[variant]), num_specs=300, max_tokens=16, seed=seed)
