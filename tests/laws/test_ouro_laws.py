"""A looped model: each time through its layers is an exit, and its weights are there once.

transformers has no Ouro, and the code that comes with one is not run here, so the reference is
``support.ouro``, its mathematics in plain torch. Depth counts a layer once for each time.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.load import load_checkpoint, open_checkpoint
from sortserve.core.errors import CheckpointError
from sortserve.engine.assemble import make_engine
from sortserve.engine.backend_check import largest_difference
from sortserve.engine.engine import EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from sortserve.model.backend import Target
from sortserve.model.backends import choose_backend
from sortserve.model.backends.reference.backend import ReferenceBackend
from support.batches import Chunk, Pages, run_chunks
from support.model_laws import (
    GREEDY,
    SEEDED,
    assert_offline,
    check_a_changed_depth,
    check_a_lonely_request,
    check_a_preemption,
    check_a_prefix_hit,
    check_company,
)
from support.ouro import OuroReference, load_ouro, make_tiny_ouro
from support.recorded_graphs import RecordingMaker
from support.scripted import FakeClock, add, make_request, run
from support.serving import Served, serve
from support.tiny_models import hf_logits, write_sorted_json
from support.wrong_backends import WRONG

LOOPS = (3, 6, 9, 12)
"""Three layers, four times."""
PROMPT = list(range(40, 75))


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ouro")
    make_tiny_ouro(folder)
    return folder


@pytest.fixture(name="reference", scope="module")
def _reference(folder: Path) -> OuroReference:
    return load_ouro(folder)


@pytest.fixture(name="served", scope="module")
def _served(folder: Path) -> Served:
    return serve(folder)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_after_each_loop_the_logits_are_those_of_the_definition(
    folder: Path, reference: OuroReference, backend: str
) -> None:
    """All loops in one batch, a prompt in chunks of which the last is one token."""
    decoder = serve(folder, backend=backend).decoder
    cache, pages = decoder.allocate_kv_cache(50, 8), Pages(50)
    rows = [(e, pages.table(decoder.slabs.count(e), len(PROMPT))) for e in reversed(LOOPS)]
    for start, end in ((0, 20), (20, 34), (34, 35)):
        chunks = [Chunk(PROMPT[start:end], start, e, table) for e, table in rows]
        logits_RV = run_chunks(decoder, cache, chunks)

        for (exit_layer, _), logits_V in zip(rows, logits_RV, strict=True):
            expected_V = reference.logits(PROMPT[:end], num_times=exit_layer // 3)[-1]
            torch.testing.assert_close(logits_V, expected_V, rtol=1e-5, atol=3e-5)


def test_the_two_ways_to_count_depth_agree(reference: OuroReference) -> None:
    """The law tests ask the reference by depth, its definition counts times."""
    for exit_layer in LOOPS:
        by_depth_TV = hf_logits(reference, PROMPT, exit_layer)
        assert torch.equal(by_depth_TV, reference.logits(PROMPT, exit_layer // 3))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("exit_layer", LOOPS)
def test_law_1_alone(served: Served, exit_layer: int, sampling: dict[str, Any]) -> None:
    check_a_lonely_request(served, PROMPT, exit_layer, 6, sampling)


@pytest.mark.parametrize(("num_pages", "chunk"), [(600, 256), (60, 13)])
def test_laws_2_to_5_in_a_batch_of_all_loops(served: Served, num_pages: int, chunk: int) -> None:
    engine = served.engine(num_pages=num_pages, max_num_batched_tokens=chunk, policy="fair")
    company = [
        {
            "prefix": 8 + 2 * i,
            "suffix": [5 + i, 90 + i],
            "max_tokens": 6,
            "exit_layer": LOOPS[i % 4],
            "sampling": (GREEDY, SEEDED)[i % 2],
        }
        for i in range(6)
    ]

    check_company(served, engine, company, prompt=PROMPT, aborted=(3, 30), abort_after=4)


def test_law_4_a_prefix_of_more_loops_serves_one_of_fewer(served: Served) -> None:
    check_a_prefix_hit(served, PROMPT, donor=12, taker=6, max_tokens=5, num_cached_tokens=32)


def test_law_5_preempted_in_the_middle(served: Served) -> None:
    check_a_preemption(served, PROMPT, 9, after=3, max_tokens=6)


@pytest.mark.parametrize(("deep", "shallow"), [(12, 3), (9, 6)])
def test_law_7_fewer_loops_in_flight(served: Served, deep: int, shallow: int) -> None:
    check_a_changed_depth(
        served, PROMPT, deep=deep, shallow=shallow, after=3, max_tokens=7, sampling=GREEDY
    )


def test_exits_may_be_within_a_loop_and_segments_of_more_than_one(tmp_path: Path) -> None:
    """A checkpoint of ours over such a model: any exits, and modules without attention."""
    make_tiny_ouro(tmp_path)
    exits = (2, 5, 8, 12)
    write_sorted_json(tmp_path, exits, {2: "affine", 5: "head"})
    served = serve(tmp_path)
    engine = served.engine(max_num_batched_tokens=20)
    for i, exit_layer in enumerate(exits):
        add(engine, make_request(str(i), PROMPT, max_tokens=4, **GREEDY), exit_layer)

    results = run(engine)

    for i, exit_layer in enumerate(exits):
        assert_offline(served, PROMPT, [exit_layer] * 4, GREEDY, results[str(i)].token_ids)


def test_steps_are_recorded_as_those_of_other_models(folder: Path) -> None:
    served, maker = serve(folder, backend="reference"), RecordingMaker()
    runner = ModelRunner(
        served.decoder,
        num_pages=600,
        block_size=4,
        sampler=Sampler(batched=True),
        graph_maker=maker,
        max_num_seqs=4,
    )
    config = EngineConfig(max_model_len=256, max_num_seqs=4, seed=0, policy="fair")
    engine = make_engine(runner, served.checkpoint, served.tokenizer, config, clock=FakeClock())
    for exit_layer in LOOPS:
        prompt = PROMPT[: exit_layer + 5]
        add(engine, make_request(f"{exit_layer}", prompt, max_tokens=5, **GREEDY), exit_layer)

    results = run(engine)

    for exit_layer in LOOPS:
        prompt, answer = PROMPT[: exit_layer + 5], results[f"{exit_layer}"].token_ids
        assert_offline(served, prompt, [exit_layer] * 5, GREEDY, answer)
    assert maker.num_graphs == (len(LOOPS) + 1) * 3


# ---- weights ----


def test_weights_are_in_memory_once_however_often_they_are_run(
    tmp_path: Path, reference: OuroReference
) -> None:
    make_tiny_ouro(tmp_path)

    checkpoint = load_checkpoint(str(tmp_path), dtype="float32", device="cpu")

    unused = ("early_exit_gate",)
    stored = sum(t.nbytes for n, t in reference.tensors.items() if not any(u in n for u in unused))
    assert len(checkpoint.weights.layers) == 3
    assert checkpoint.weights.nbytes == stored + checkpoint.weights.inv_freq.nbytes
    shallow, *_, full = checkpoint.exits.exits
    assert shallow.num_parameters == full.num_parameters == stored // 4
    layer = 4 * 64 * 64 + 3 * 64 * 96
    assert shallow.compute == pytest.approx((3 * layer + 288 * 64) / (12 * layer + 288 * 64))


def test_quantised_weights_are_kept_between_starts_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path))

    def load() -> Any:
        return load_checkpoint(str(folder), dtype="float32", device="cpu", quantize="int8").weights

    made, kept = load(), load()

    assert list(tmp_path.glob("weights-*.safetensors"))
    assert len(made.layers) == len(kept.layers) == 3
    assert made.formats == kept.formats == {"int8": 13}
    for a, b in zip(made.layers, kept.layers, strict=True):
        assert torch.equal(a.qkv.values, b.qkv.values)
        assert torch.equal(a.attention_output_norm, b.attention_output_norm)
        assert torch.equal(a.mlp_output_norm, b.mlp_output_norm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_of_a_backend_runs_layers_twice(folder: Path, dtype: str) -> None:
    checkpoint = load_checkpoint(str(folder), dtype=dtype, device="cpu")
    config, weights = checkpoint.config, checkpoint.weights
    target = Target(config, weights.dtype, weights.device)
    backends = (
        choose_backend(config, weights.dtype, weights.device, "auto"),
        WRONG["norm"](target),
    )

    good, wrong = (
        largest_difference(b, ReferenceBackend(target), config, weights, block_size=4)
        for b in backends
    )

    assert good.is_tolerable
    assert not wrong.is_tolerable


# ---- what is refused ----


def test_the_exit_gate_is_not_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_checkpoint(str(folder), dtype="float32", device="cpu")

    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("loops", [0, 65, "4", 2.0])
def test_a_number_of_loops_that_cannot_be_is_refused(tmp_path: Path, loops: object) -> None:
    make_tiny_ouro(tmp_path, total_ut_steps=1)
    config = (tmp_path / "config.json").read_text()
    field = '"total_ut_steps": '
    written = f'"{loops}"' if isinstance(loops, str) else f"{loops}"
    (tmp_path / "config.json").write_text(config.replace(f"{field}1", f"{field}{written}"))

    with pytest.raises(CheckpointError, match=r"total_ut_steps=.* is not an integer from 1 to 64"):
        load_checkpoint(str(tmp_path), dtype="float32", device="cpu")


def test_a_model_that_transformers_has_not_is_served_and_that_is_all(folder: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="family 'ouro' are served, and that is all"),
        open_checkpoint(str(folder)),
    ):
        pass


def test_an_own_layer_at_an_exit_is_refused(tmp_path: Path) -> None:
    make_tiny_ouro(tmp_path)
    write_sorted_json(tmp_path, (6, 12), {6: "layer"})

    with pytest.raises(CheckpointError, match=r"kind 'layer' are not supported .* 'ouro'"):
        load_checkpoint(str(tmp_path), dtype="float32", device="cpu")
