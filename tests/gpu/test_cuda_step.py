"""What a CUDA device alone can show of a step: real graphs, and that nothing waits for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import RowFailure, SamplingParams, SamplingRow
from sortserve.core.slabs import Slabs
from sortserve.engine.inputs import build_batch
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from sortserve.model.graphs import CudaGraphMaker
from support.batches import BLOCK_SIZE, Pages, random_ids
from support.sampling_rows import any_logits, any_row
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

EXITS = (1, 2, 4, 5, 6)
SLABS = Slabs.of(EXITS, [1])
GREEDY = SamplingParams(temperature=0.0)
BACKENDS = ("reference", "auto")


@pytest.fixture(name="path", scope="module")
def _path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda-step")
    return make_tiny_checkpoint(folder, "llama-tied", exits=EXITS, exit_kinds={1: "layer"})


@contextmanager
def no_waiting() -> Iterator[None]:
    """CUDA itself refuses what makes the host wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def decode_plan(rng: random.Random, lengths: list[int], pages: Pages) -> tuple[StepPlan, StepPlan]:
    """The prompts of some rows, and then one token each."""
    prompts, decodes = [], []
    depths = sorted((rng.choice(EXITS) for _ in lengths), reverse=True)
    for r, (exit_layer, length) in enumerate(zip(depths, lengths, strict=True)):
        ids = random_ids(length + 1, r)
        row = SamplingRow(GREEDY, r, tuple(ids), (), frozenset())
        table = pages.table(SLABS.count(exit_layer), length + 1)
        common = {"request_id": str(r), "exit_layer": exit_layer, "block_table_SB": table}
        prompts.append(RowPlan(start=0, token_ids=ids[:-1], sampling=None, **common))  # type: ignore[arg-type]
        decodes.append(RowPlan(start=length, token_ids=ids[-1:], sampling=row, **common))  # type: ignore[arg-type]
    return (
        StepPlan(rows=tuple(prompts), depth_cap=depths[0]),
        StepPlan(rows=tuple(decodes), depth_cap=depths[0]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_steps_sample_what_launched_ones_do(path: Path, backend: str) -> None:
    served = serve(path, backend=backend, device="cuda")
    plain = ModelRunner(served.decoder, num_pages=900, block_size=BLOCK_SIZE)
    recorded = ModelRunner(
        served.decoder,
        num_pages=900,
        block_size=BLOCK_SIZE,
        graph_maker=CudaGraphMaker(served.decoder.device),
        max_num_seqs=16,
    )
    recorded.record_graphs()
    for seed in range(8):
        rng = random.Random(seed)
        lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 13))]
        prompts, decode = decode_plan(rng, lengths, Pages(900, seed))
        results = []
        for runner in (plain, recorded):
            runner.execute(prompts)
            results.append(runner.execute(decode))
        assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_waits_for_nothing_but_the_tokens(path: Path, backend: str) -> None:
    served: Served = serve(path, backend=backend, device="cuda")
    decoder, sampler = served.decoder, Sampler()
    cache = decoder.allocate_kv_cache(900, BLOCK_SIZE)
    rng = random.Random(0)
    plans = decode_plan(rng, [5, 40, 17, 1, 33], Pages(900))
    rows = [any_row(rng, decoder.config.vocab_size) for _ in range(5)]
    for waits in (True, False):  # the first time things are compiled and allocated
        for plan in plans:
            with torch.inference_mode(), no_waiting() if not waits else torch.no_grad():
                batch = build_batch(
                    plan, block_size=BLOCK_SIZE, num_slabs=decoder.num_slabs, device="cuda"
                )
                h_RD = decoder.forward(batch, cache)
                if plan is plans[1]:
                    samples = sampler.start(decoder.logits(h_RD), rows)
    assert len(samples.results()) == 5


def test_a_device_samples_what_the_search_on_the_cpu_finds() -> None:
    """But where a sum that is rounded otherwise falls on the other side of a border."""
    rng = random.Random(0)
    num_different = 0
    for vocab_size in (97, 1000, 5003):
        for _ in range(10):
            logits_RV = any_logits(rng, 100, vocab_size)
            rows = [any_row(rng, vocab_size) for _ in range(100)]
            expected = Sampler().sample(logits_RV.clone(), rows)
            results = Sampler().sample(logits_RV.cuda(), rows)
            for a, b in zip(results, expected, strict=True):
                if isinstance(a, RowFailure) or isinstance(b, RowFailure):
                    assert a == b
                else:
                    num_different += a.token_id != b.token_id
    assert num_different <= 3
