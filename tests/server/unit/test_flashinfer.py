"""FlashInfer by its documented interface, against a package of that interface in plain torch.

FlashInfer itself needs a CUDA device: what is proved here is that it is asked the right things.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.model import backends
from sortserve.model.backend import Target, Unusable
from sortserve.model.backends.flashinfer.backend import FlashInferBackend, make_flashinfer_backend
from sortserve.model.backends.reference.attention import ReferenceAttention
from support import fake_flashinfer
from support.attention_cases import MIXED_ROWS, Case, make_config, make_rope
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.model_laws import assert_offline
from support.scripted import add, make_request, run
from support.serving import serve
from support.tiny_models import make_tiny_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXITS = (2, 4, 6)


def check_attention(
    heads: tuple[int, int, int], rows: list[tuple[int, int]], block_size: int, *, norms: bool
) -> None:
    config = make_config(*heads)
    case, rope = Case(config, rows, block_size=block_size), make_rope(config.head_dim)
    expected, expected_pages = case.run(ReferenceAttention(config, rope), norms=norms)
    backend = FlashInferBackend(Target(config, torch.float32, CPU), fake_flashinfer)

    actual, pages = case.run(backend.attention(rope), norms=norms)

    assert torch.equal(pages, expected_pages)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@given(
    heads=st.sampled_from([(2, 2, 8), (6, 2, 16), (8, 1, 10)]),
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=5),
    block_size=st.sampled_from([8, 16, 24]),
    norms=st.booleans(),
)
@settings(max_examples=40)
def test_chunks_and_rows_of_one_token_together(
    heads: tuple[int, int, int], rows: list[tuple[int, int]], block_size: int, norms: bool
) -> None:
    check_attention(heads, rows, block_size, norms=norms)


@pytest.mark.parametrize("lengths", [[1], [16, 17, 15], [31, 32, 33, 1]])
def test_rows_of_one_token_at_the_edges_of_pages(lengths: list[int]) -> None:
    fake_flashinfer.PLANS.clear()

    check_attention((4, 2, 16), [(length - 1, 1) for length in lengths], 16, norms=True)

    assert fake_flashinfer.PLANS == ["decode"]


def test_keys_and_values_are_written_apart_from_queries() -> None:
    config = make_config(6, 2, 16)
    case, target = Case(config, MIXED_ROWS), Target(config, torch.float32, CPU)
    attention = FlashInferBackend(target, fake_flashinfer).attention(make_rope(16))
    expected, expected_pages = case.run(attention, norms=True)

    actual, pages = case.run_apart(attention, norms=True)

    assert torch.equal(pages, expected_pages)
    assert torch.equal(actual, expected)


def test_any_chunk_in_a_step_makes_all_its_rows_chunks() -> None:
    fake_flashinfer.PLANS.clear()

    check_attention((4, 2, 16), MIXED_ROWS, 16, norms=False)

    assert fake_flashinfer.PLANS == ["prefill"]


def test_a_model_of_many_depths_plans_once_a_slab_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        backends.BACKENDS, "flashinfer", lambda target: FlashInferBackend(target, fake_flashinfer)
    )
    path = make_tiny_checkpoint(tmp_path, "qwen3-untied", exits=EXITS)
    logits = {}
    for name in ("reference", "flashinfer"):
        fake_flashinfer.PLANS.clear()
        decoder = serve(path, backend=name).decoder
        pages, cache = Pages(100), decoder.allocate_kv_cache(100, BLOCK_SIZE)
        chunks = [
            Chunk(random_ids(9 + i, seed=i), 0, depth, pages.table(depth // 2, 16))
            for i, depth in enumerate((6, 4, 2))
        ]
        following = [Chunk([7], len(c.ids), c.exit_layer, c.table_SB) for c in chunks]
        logits[name] = [run_chunks(decoder, cache, step) for step in (chunks, following)]

    # Three slabs, of which the deepest row alone reaches the last.
    assert fake_flashinfer.PLANS == ["prefill"] * 3 + ["decode"] * 3
    for expected, actual in zip(logits["reference"], logits["flashinfer"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_an_exits_own_has_a_plan_where_rows_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        backends.BACKENDS, "flashinfer", lambda target: FlashInferBackend(target, fake_flashinfer)
    )
    kinds = {2: "layer", 4: "layer"}
    path = make_tiny_checkpoint(tmp_path, "qwen3-bias", exits=EXITS, exit_kinds=kinds)
    logits = {}
    for name in ("reference", "flashinfer"):
        decoder = serve(path, backend=name).decoder
        pages, cache = Pages(100), decoder.allocate_kv_cache(100, BLOCK_SIZE)
        chunks = [
            Chunk(random_ids(9 + i, seed=i), 0, depth, pages.table(decoder.slabs.count(depth), 16))
            for i, depth in enumerate((6, 4))
        ]
        fake_flashinfer.PLANS.clear()
        logits[name] = run_chunks(decoder, cache, chunks)

    # All slabs but that of no more than the first exit's layer, in which nobody attends.
    num_trunk = len({decoder.slabs.place(layer)[0] for layer in range(6)})
    assert sorted(fake_flashinfer.PLANS) == ["decode"] + ["prefill"] * num_trunk
    torch.testing.assert_close(logits["flashinfer"], logits["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 256], ids=["in chunks", "whole"])
def test_laws_1_to_3_through_an_engine(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a batch of all depths, in chunks or whole, is what transformers gives alone."""
    monkeypatch.setitem(
        backends.BACKENDS, "flashinfer", lambda target: FlashInferBackend(target, fake_flashinfer)
    )
    kinds = {2: "layer", 4: "affine"}
    path = make_tiny_checkpoint(tmp_path, "qwen3-untied", exits=EXITS, exit_kinds=kinds)
    served = serve(path, backend="flashinfer")
    assert served.decoder.backend.name == "flashinfer"
    engine = served.engine(max_num_batched_tokens=chunk, policy="fair")
    sampling: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}]
    requests = [(random_ids(4 + 5 * i, seed=i), EXITS[i % 3], sampling[i % 2]) for i in range(5)]
    for i, (prompt, exit_layer, params) in enumerate(requests):
        add(engine, make_request(str(i), prompt, max_tokens=5, **params), exit_layer)

    results = run(engine)

    for i, (prompt, exit_layer, params) in enumerate(requests):
        assert_offline(served, prompt, [exit_layer] * 5, params, results[str(i)].token_ids)


def test_a_plan_is_not_overwritten_while_the_copies_of_the_last_may_be_on_their_way() -> None:
    config = make_config(2, 1, 16)
    attention = FlashInferBackend(Target(config, torch.float32, CPU), fake_flashinfer).attention(
        make_rope(16)
    )
    wrappers = [attention.next_wrapper(slab, decodes=True) for slab in (0, 0, 1, 0)]  # type: ignore[attr-defined]

    assert len({id(wrapper) for wrapper in wrappers[:3]}) == 3
    assert wrappers[3] is wrappers[0]


def reason(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    answer = make_flashinfer_backend(Target(make_config(4, 2, head_dim), dtype, device))
    assert isinstance(answer, Unusable)
    return answer.reason


def test_what_it_cannot_compute_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert reason(CPU, torch.float16) == "its kernels are for CUDA devices"
    assert reason(CUDA, torch.float32) == "its dtypes are float16 and bfloat16"
    assert reason(CUDA, torch.float16, head_dim=80) == "head_dim=80 is none of 64, 128, 256"
    assert reason(CUDA, torch.bfloat16) == (
        "FlashInfer is not installed: pip install 'sortserve[flashinfer]'"
    )
