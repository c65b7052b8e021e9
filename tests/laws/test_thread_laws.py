"""A result depends on neither the number of threads nor on whether any of them gets a core."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import ConfigError
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from support.batches import Chunk, Pages, random_ids, run_chunks
from support.tiny_models import make_tiny_checkpoint

ROWS = [(6, 0, 150), (6, 300, 1), (4, 40, 1), (4, 9, 5), (2, 0, 70), (2, 21, 1)]
"""(exit, tokens cached before the step, tokens in the step): long and short prompts, decode, and a
context of several partitions."""


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="decoder", params=["float32", "bfloat16"])
def _decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    path = make_tiny_checkpoint(tmp_path / "tiny", "qwen3-untied", exits=(2, 4, 6))
    checkpoint = load_checkpoint(str(path), dtype=request.param, device="cpu")
    dtype, device = checkpoint.weights.dtype, checkpoint.weights.device
    try:
        backend = choose_backend(checkpoint.config, dtype, device, "cpu")
    except ConfigError as error:
        pytest.skip(f"no C++ kernels for {request.param} here: {error}")
    return Decoder(
        checkpoint.config, checkpoint.weights, exits=(2, 4, 6), max_model_len=512, backend=backend
    )


def logits_of(decoder: Decoder, num_threads: int) -> Tensor:
    """Of one step over ``ROWS``, whose cached tokens ran in steps of their own."""
    torch.set_num_threads(num_threads)
    cache, pages = decoder.allocate_kv_cache(512, 8), Pages(512)
    chunks = []
    for seed, (exit_layer, start, count) in enumerate(ROWS):
        ids = [i % 200 for i in random_ids(start + count, seed)]
        table = pages.table(decoder.slabs.count(exit_layer), start + count)
        if start:
            run_chunks(decoder, cache, [Chunk(ids[:start], 0, exit_layer, table, samples=False)])
        chunks.append(Chunk(ids[start:], start, exit_layer, table))
    return run_chunks(decoder, cache, chunks)


def helpers() -> set[str]:
    """The kernels' threads that are there now, by their ids."""
    found = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while it was looked at
            if path.read_text().startswith("sortserve-cpu"):
                found.add(path.parent.name)
    return found


def test_the_bits_of_a_step_do_not_depend_on_the_number_of_threads(decoder: Decoder) -> None:
    expected = logits_of(decoder, 1)
    for num_threads in (2, 3, 5, 16, 2, 1):
        assert torch.equal(logits_of(decoder, num_threads), expected)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_helpers_are_started_once_for_each_leader_and_end_with_it(decoder: Decoder) -> None:
    started: list[set[str]] = []
    others = helpers()

    def lead() -> None:
        for num_threads in (4, 2, 4):
            logits_of(decoder, num_threads)
            started.append(helpers() - others)

    leader = threading.Thread(target=lead)
    leader.start()
    leader.join()

    assert len(started[0]) == 3
    assert started == [started[0]] * 3
    while helpers() & started[0]:  # each ends as soon as it has a core
        os.sched_yield()


def test_several_leaders_at_once_get_the_bits_that_each_gets_alone(decoder: Decoder) -> None:
    expected = logits_of(decoder, 1)
    with ThreadPoolExecutor(4) as threads:
        for got in threads.map(lambda num: logits_of(decoder, num), [2, 3, 2, 1] * 4):
            assert torch.equal(got, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_leader_whose_helpers_never_get_a_core_again_does_all_the_work(decoder: Decoder) -> None:
    """A forked process has the leader's memory and none of its helpers: none of them ever runs."""
    with torch.inference_mode():
        x = torch.randn(70, 64).to(decoder.dtype)
        op = decoder.backend.linear(Weight.plain(torch.randn(640, 64).to(decoder.dtype)))
        torch.set_num_threads(4)
        expected = op(x)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(op(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
