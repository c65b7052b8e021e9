"""Decode steps that are recorded once and run again, against the same steps run as they are."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.engine.runner import ModelRunner
from sortserve.model.attention import KVCache
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from sortserve.model.graphs import Graph, SegmentGraphs, row_buckets
from support.batches import BLOCK_SIZE, Chunk, Pages, host_batch_of, make_batch, random_ids
from support.host_reads import HostReadError
from support.recorded_graphs import RecordingMaker, RerunMaker, StaleInputError
from support.serving import serve
from support.tiny_models import make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
NUM_PAGES = 1500
MAX_ROWS = 12


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tmp_path_factory.mktemp("graphs") / "qwen3"
    make_tiny_checkpoint(
        path, "qwen3-untied", exits=EXITS, exit_kinds=mixed_kinds(EXITS, "qwen3-untied")
    )
    return serve(path, backend="reference").decoder


class Prompts:
    """Sequences of random lengths and depths, whose prompts are in the caches."""

    def __init__(
        self, decoder: Decoder, caches: Sequence[KVCache], rng: random.Random, count: int
    ) -> None:
        self._decoder, self._rng = decoder, rng
        pages = Pages(NUM_PAGES, seed=rng.randrange(1000))
        self._rows = []
        for seed in range(count):
            exit_layer, length = rng.choice(EXITS), rng.randrange(1, 60)
            ids = random_ids(length + 6, seed)
            table = pages.table(decoder.slabs.count(exit_layer), length + 6)
            chunk = Chunk(ids[:length], 0, exit_layer, table, samples=False)
            for cache in caches:
                decoder.forward(make_batch([chunk], decoder.num_slabs), cache)
            self._rows.append((exit_layer, length, ids, table))

    def step(self, number: int, num_rows: int) -> Batch:
        """One token more for some of them, some at a shallower exit than before."""
        chunks = []
        for exit_layer, length, ids, table in self._rng.sample(self._rows, num_rows):
            depth = self._rng.choice([e for e in EXITS if e <= exit_layer])
            start = length  # the same place again: each step is on its own
            token = ids[start + number]
            chunks.append(Chunk([token], start, depth, table[: self._decoder.slabs.count(depth)]))
        chunks.sort(key=lambda chunk: -chunk.exit_layer)
        return make_batch(chunks, self._decoder.num_slabs)


def graphs_of(
    decoder: Decoder, maker: RecordingMaker | RerunMaker
) -> tuple[SegmentGraphs, KVCache]:
    cache = decoder.allocate_kv_cache(NUM_PAGES + 1, BLOCK_SIZE)
    return SegmentGraphs(decoder, cache, maker, scratch_page=NUM_PAGES, max_rows=MAX_ROWS), cache


def replay(graphs: SegmentGraphs, batch: Batch) -> Tensor:
    host = host_batch_of(batch)
    return graphs.forward(host, [torch.from_numpy(array) for array in graphs.inputs(host)])


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_depths_and_rows_is_replayed_to_what_it_is_without_graphs(
    decoder: Decoder, seed: int
) -> None:
    """To the last bit as the same padded steps, and the same tokens as the plain ones."""
    rng = random.Random(seed)
    plain_cache = decoder.allocate_kv_cache(NUM_PAGES, BLOCK_SIZE)
    recorded, cache = graphs_of(decoder, maker := RecordingMaker())
    rerun, rerun_cache = graphs_of(decoder, RerunMaker())
    recorded.record()
    rerun.record()
    num_graphs = maker.num_graphs
    prompts = Prompts(decoder, [plain_cache, cache, rerun_cache], rng, MAX_ROWS)
    for number in range(6):
        batch = prompts.step(number, rng.randrange(1, MAX_ROWS + 1))
        h_RD = replay(recorded, batch)
        plain_RD = decoder.forward(batch, plain_cache)
        assert torch.equal(h_RD, replay(rerun, batch))
        torch.testing.assert_close(h_RD, plain_RD, rtol=1e-5, atol=2e-5)
        exits = list(itertools.compress(batch.exit_layers, batch.samples))
        tokens, plain = (decoder.logits(h, exits).argmax(-1) for h in (h_RD, plain_RD))
        assert torch.equal(tokens, plain)
    assert torch.equal(cache.pages[:, :, :NUM_PAGES], rerun_cache.pages[:, :, :NUM_PAGES])
    torch.testing.assert_close(
        cache.pages[:, :, :NUM_PAGES], plain_cache.pages, rtol=1e-5, atol=2e-5
    )
    assert maker.num_graphs == num_graphs == len(EXITS) * len(recorded.buckets)


def test_a_segment_runs_in_the_smallest_bucket_that_holds_its_rows(decoder: Decoder) -> None:
    recorded, cache = graphs_of(decoder, RecordingMaker())
    recorded.record()
    replayed: Counter[tuple[int, int]] = Counter()
    for key, graph in recorded._graphs.items():
        recorded._graphs[key] = _Counted(graph, lambda key=key: replayed.update([key]))  # type: ignore[misc]
    prompts = Prompts(decoder, [cache], random.Random(0), 12)
    batch = prompts.step(0, 12)

    replay(recorded, batch)

    starts = (0, *EXITS[:-1])
    alive = [sum(e > start for e in batch.exit_layers) for start in starts]
    expected = {(i, min(b for b in recorded.buckets if b >= n)) for i, n in enumerate(alive) if n}
    assert set(replayed) == expected
    assert set(replayed.values()) == {1}
    assert len({bucket for _, bucket in expected}) > 2  # rows left on the way


class _Counted:
    def __init__(self, graph: Graph, count: Callable[[], None]) -> None:
        self._graph, self._count = graph, count

    def replay(self) -> None:
        self._count()
        self._graph.replay()


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 20, 256, 512])
def test_buckets_hold_any_number_of_rows_and_at_most_half_is_padding(max_rows: int) -> None:
    buckets = row_buckets(max_rows)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == max_rows
    for num_rows in range(1, max_rows + 1):
        bucket = next(b for b in buckets if b >= num_rows)
        assert bucket < 2 * num_rows or num_rows == bucket
    assert len(buckets) <= 16


def test_no_row_ever_reads_the_scratch_page_and_padding_writes_nowhere_else(
    decoder: Decoder,
) -> None:
    recorded, cache = graphs_of(decoder, RecordingMaker())
    recorded.record()
    prompts = Prompts(decoder, [cache], rng := random.Random(1), MAX_ROWS)
    for number in range(3):
        batch = prompts.step(number, rng.choice([1, 3, 5, 11]))
        cache.pages[:, :, NUM_PAGES] = 0.0
        expected = replay(recorded, batch)
        before = cache.pages.clone()
        cache.pages[:, :, NUM_PAGES] = torch.nan
        assert torch.equal(replay(recorded, batch), expected)
        assert torch.equal(cache.pages[:, :, :NUM_PAGES], before[:, :, :NUM_PAGES])


def test_prompts_and_large_steps_run_without_graphs(decoder: Decoder) -> None:
    recorded, _ = graphs_of(decoder, RecordingMaker())
    pages = Pages(NUM_PAGES)
    one = [Chunk([5], 0, 6, pages.table(decoder.num_slabs, 1))]
    assert recorded.can_run(host_batch_of(make_batch(one * MAX_ROWS, decoder.num_slabs)))
    assert not recorded.can_run(host_batch_of(make_batch(one * (MAX_ROWS + 1), decoder.num_slabs)))
    two = Chunk([5, 6], 0, 2, pages.table(decoder.slabs.count(2), 2))
    assert not recorded.can_run(host_batch_of(make_batch([*one, two], decoder.num_slabs)))


class CannotRecord:
    """Records a few, and then something waits for the device."""

    def __init__(self) -> None:
        self.num_calls = 0

    def record(self, run: Callable[[], object]) -> Graph:
        self.num_calls += 1
        if self.num_calls > 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return RerunMaker().record(run)


def test_what_cannot_be_recorded_runs_as_it_is(
    decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    maker = CannotRecord()
    plain = ModelRunner(decoder, num_pages=40, block_size=BLOCK_SIZE)
    runner = ModelRunner(decoder, num_pages=40, block_size=BLOCK_SIZE, graph_maker=maker)
    table = Pages(40).table(decoder.num_slabs, 3)
    row = RowPlan(
        request_id="r",
        exit_layer=6,
        start=0,
        token_ids=[7],
        block_table_SB=table,
        sampling=SamplingRow(SamplingParams(temperature=0.0), 0, (7,), (), frozenset()),
    )
    plan = StepPlan(rows=(row,), depth_cap=6)
    with caplog.at_level("WARNING"):
        assert runner.execute(plan) == plain.execute(plan) == runner.execute(plan)
    assert maker.num_calls == 4
    assert runner.num_graphs == 0
    recording = ModelRunner(
        decoder, num_pages=40, block_size=BLOCK_SIZE, graph_maker=RerunMaker(), max_num_seqs=4
    )
    assert recording.num_graphs == 0
    recording.record_graphs()
    assert recording.num_graphs == (len(EXITS) + 2) * len(row_buckets(4))  # two heads
    [message] = [record.getMessage() for record in caplog.records]
    assert message.endswith("without CUDA graphs: operation not permitted when stream is capturing")


# ---- the stand-in for CUDA graphs --------------------------------------------------------------


def test_a_replay_runs_on_what_its_inputs_hold_by_then() -> None:
    x, y = torch.arange(4.0), torch.zeros(4)
    graph = RecordingMaker().record(lambda: y.copy_((x.view(2, 2).T * 2 + 1).reshape(4)))
    x.fill_(3.0)
    graph.replay()
    assert y.tolist() == [7.0] * 4


def test_what_the_host_decided_stays_as_it_was() -> None:
    """As on a GPU: a launch that depends on a Python value is wrong, and is seen to be."""
    x, factor = torch.zeros(2), [2.0]
    graph = RecordingMaker().record(lambda: x.fill_(factor[0]))
    factor[0] = 5.0
    x.zero_()
    graph.replay()
    assert x.tolist() == [2.0, 2.0]


def test_a_host_that_looks_while_it_records_is_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(HostReadError):
        RecordingMaker().record(lambda: x.mul_(x.sum().item()))


def test_an_input_that_is_gone_or_has_moved_is_found() -> None:
    y = torch.zeros(2)
    inputs = [torch.ones(2)]
    graph = RecordingMaker().record(lambda: y.copy_(inputs[0] * 2))
    graph.replay()
    inputs[0] = torch.zeros(2)
    with pytest.raises(StaleInputError, match="gone"):
        graph.replay()


def test_what_a_graph_computed_is_gone_when_another_is_replayed() -> None:
    maker, kept = RecordingMaker(), list[Tensor]()
    x, y = torch.ones(2), torch.zeros(2)
    first = maker.record(lambda: kept.append(x * 2))
    second = maker.record(lambda: y.copy_(x + 1))
    first.replay()
    assert kept[-1].tolist() == [2.0, 2.0]
    second.replay()
    assert kept[-1].isnan().all()
    assert y.tolist() == [2.0, 2.0]
