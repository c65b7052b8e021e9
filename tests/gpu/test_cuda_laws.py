"""The laws on a CUDA device: tiny random models in fp32, token for token.

Products on a GPU round otherwise than on a CPU, and otherwise with other numbers of rows, so these
tests are greedy: a token differs only where two scores are equal to the last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.engine.inputs import build_batch
from sortserve.model.decoder import Decoder
from support.scripted import Collected, add, collect, go_shallower, make_request, run
from support.serving import offline_tokens, serve
from support.tiny_models import VARIANTS, make_tiny_checkpoint, mixed_kinds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

EXITS = (1, 2, 4, 5, 6)
PROMPT = list(range(40, 75))
NUM_TOKENS = 10
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def folder_of(root: Path, family: str) -> Path:
    path = root / family
    if not path.exists():
        make_tiny_checkpoint(path, family, exits=EXITS, exit_kinds=mixed_kinds(EXITS, family))
    return path


def offline(path: Path, prompt: list[int], exits: list[int]) -> list[int]:
    eos = serve(path, device="cuda").tokenizer.eos_token_ids
    return offline_tokens(path, prompt, SamplingParams(**GREEDY), exits, eos_token_ids=eos)


@pytest.mark.parametrize("family", VARIANTS)
def test_law_1_served_at_an_exit_is_what_transformers_gives_with_its_first_layers(
    root: Path, family: str
) -> None:
    path = folder_of(root, family)
    engine = serve(path, device="cuda").engine()
    for exit_layer in EXITS:
        add(engine, make_request(str(exit_layer), PROMPT, **GREEDY), exit_layer)

    results = run(engine)

    assert {e: results[str(e)].token_ids for e in EXITS} == {
        e: offline(path, PROMPT, [e] * NUM_TOKENS) for e in EXITS
    }


def test_laws_3_to_5_chunks_prefix_hits_and_preemptions_change_nothing(root: Path) -> None:
    path = folder_of(root, "llama-tied")
    prompts = [PROMPT[: 12 + 3 * i] for i in range(6)]
    engine = serve(path, device="cuda").engine(
        num_pages=90, max_num_batched_tokens=16, policy="fair"
    )
    for i, prompt in enumerate(prompts * 2):
        add(engine, make_request(str(i), prompt, **GREEDY), EXITS[i % len(EXITS)])

    results = run(engine)

    for i, prompt in enumerate(prompts * 2):
        expected = offline(path, prompt, [EXITS[i % len(EXITS)]] * NUM_TOKENS)
        assert results[str(i)].token_ids == expected


def test_law_15_with_a_step_under_way_every_token_is_the_offline_one(root: Path) -> None:
    """The sampled token feeds the next step on the device."""
    path = folder_of(root, "llama-tied")
    engine = serve(path, device="cuda").engine(
        num_pages=90, max_num_batched_tokens=16, policy="fair", launcher="own"
    )
    for i in range(6):
        add(engine, make_request(str(i), PROMPT[: 12 + 3 * i], **GREEDY), EXITS[i % len(EXITS)])

    results = run(engine)

    for i in range(6):
        expected = offline(path, PROMPT[: 12 + 3 * i], [EXITS[i % len(EXITS)]] * NUM_TOKENS)
        assert results[str(i)].token_ids == expected


def test_law_7_going_shallower_is_the_shallower_exit_on_the_same_kv(root: Path) -> None:
    path = folder_of(root, "llama-tied")
    engine = serve(path, device="cuda").engine()
    add(engine, make_request("r", PROMPT, **GREEDY), 6)
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)
    go_shallower(engine, "r", 2, "behind")
    while engine.has_work:
        collect(engine.step(), results)

    assert results["r"].exits == [6] * 4 + [2] * (len(results["r"].exits) - 4)
    assert results["r"].token_ids == offline(path, PROMPT, results["r"].exits)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.4), ("float16", 0.05)])
def test_half_precision_is_near_fp32(root: Path, dtype: str, tolerance: float) -> None:
    """The largest difference of a score at full depth, relative to the scores' spread."""
    path = folder_of(root, "llama-tied")
    greedy = SamplingRow(SamplingParams(temperature=0.0), 0, tuple(PROMPT), (), frozenset())
    logits = {}
    for name in ("float32", dtype):
        checkpoint = load_checkpoint(str(path), dtype=name, device="cuda")
        decoder = Decoder(
            checkpoint.config, checkpoint.weights, exits=checkpoint.exits.layers, max_model_len=64
        )
        cache = decoder.allocate_kv_cache(64, 16)
        pages = torch.arange(3 * decoder.num_slabs, dtype=torch.int32)
        row = RowPlan(
            request_id="r",
            exit_layer=6,
            start=0,
            token_ids=PROMPT,
            block_table_SB=pages.reshape(decoder.num_slabs, 3).numpy(),
            sampling=greedy,
        )
        plan = StepPlan(rows=(row,), depth_cap=6)
        batch = build_batch(plan, block_size=16, num_slabs=decoder.num_slabs, device=decoder.device)
        with torch.inference_mode():
            logits[name] = decoder.logits(decoder.forward(batch, cache)).float()

    exact, half = logits.values()
    assert float((half - exact).abs().max() / exact.std()) < tolerance
