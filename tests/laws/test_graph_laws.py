"""Laws 1, 2, 7, 14 and 15 by recorded graphs, and with the sampler of a GPU, in fp32 on the CPU.

Decode steps are replayed by the stand-in of ``support.recorded_graphs``: what the engine serves
must still be what transformers gives for each request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sortserve.engine.assemble import make_engine
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.sampler import Sampler
from support.model_laws import assert_offline
from support.recorded_graphs import RecordingMaker
from support.scripted import Collected, FakeClock, add, collect, go_shallower, make_request, run
from support.scripted_grammar import Form
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
PROMPT = list(range(40, 75))
NUM_TOKENS = 6
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11},
    {"temperature": 0.7, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5},
)


@pytest.fixture(name="served", scope="module", params=["llama-tied", "qwen3-untied"])
def _served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    path: Path = tmp_path_factory.mktemp("graph-laws") / request.param
    make_tiny_checkpoint(
        path,
        request.param,
        exits=EXITS,
        exit_kinds=mixed_kinds(EXITS, request.param),
        max_position_embeddings=64,
    )
    return serve(path, backend="reference")


@pytest.fixture(name="recorded", scope="module")
def _recorded(served: Served) -> tuple[Engine, RecordingMaker]:
    """One engine for several laws: to record takes longer than to serve."""
    return engine_of(served)


def num_graphs(served: Served) -> int:
    """Of the segments and of each head, for 1, 2, 4 and 8 rows."""
    return (len(EXITS) + len(served.decoder.heads)) * 4


def engine_of(served: Served, *, overlap: bool = False) -> tuple[Engine, RecordingMaker]:
    maker = RecordingMaker()
    runner = ModelRunner(
        served.decoder,
        num_pages=600,
        block_size=4,
        sampler=Sampler(batched=True),
        graph_maker=maker,
        max_num_seqs=8,
    )
    config = EngineConfig(
        max_model_len=64, max_num_seqs=8, seed=0, policy="fair", async_scheduling=overlap
    )
    engine = make_engine(runner, served.checkpoint, served.tokenizer, config, clock=FakeClock())
    return engine, maker


def assert_every_row_is_what_it_is_alone(
    served: Served, engine: Engine, samplings: Sequence[dict[str, Any]] = SAMPLING
) -> None:
    requests = [
        (PROMPT[: 5 + 4 * i], EXITS[i % len(EXITS)], samplings[i % len(samplings)])
        for i in range(8)
    ]
    for i, (prompt, exit_layer, sampling) in enumerate(requests):
        add(engine, make_request(str(i), prompt, max_tokens=NUM_TOKENS, **sampling), exit_layer)

    results = run(engine)

    for i, (prompt, exit_layer, sampling) in enumerate(requests):
        exits = [exit_layer] * NUM_TOKENS
        assert_offline(served, prompt, exits, sampling, results[str(i)].token_ids)


def test_laws_1_and_2_every_row_of_a_batch_of_all_depths_is_what_it_is_alone(
    served: Served, recorded: tuple[Engine, RecordingMaker]
) -> None:
    engine, maker = recorded
    assert_every_row_is_what_it_is_alone(served, engine)
    assert maker.num_graphs == num_graphs(served)


def test_law_15_so_it_is_where_a_step_reads_the_tokens_that_the_last_one_has_left_on_the_device(
    served: Served,
) -> None:
    engine, maker = engine_of(served, overlap=True)
    assert_every_row_is_what_it_is_alone(served, engine)
    assert maker.num_graphs == num_graphs(served)


def test_law_15_so_it_is_where_head_and_choice_are_replayed(served: Served) -> None:
    """As they are where all rows take their likeliest token."""
    engine, _ = engine_of(served, overlap=True)
    assert_every_row_is_what_it_is_alone(served, engine, SAMPLING[:1])


def test_law_14_masks_forced_tokens_and_a_step_of_overlap_meet_in_replayed_steps(
    served: Served,
) -> None:
    """Rows with a grammar and without, of all depths: each is what it is alone, on a CPU's way."""
    end = min(served.tokenizer.eos_token_ids)
    forms = (Form("??:?", end), None, Form("ab??cd?", end), Form("?*", end), None)
    requests = [
        (
            make_request(str(i), PROMPT[: 5 + 4 * i], max_tokens=9, grammar=form, **sampling),
            EXITS[i],
        )
        for i, (form, sampling) in enumerate(zip(forms, (*SAMPLING, *SAMPLING), strict=False))
    ]
    engine, maker = engine_of(served, overlap=True)
    for request, exit_layer in requests:
        add(engine, request, exit_layer)

    results = run(engine)

    assert maker.num_graphs == num_graphs(served)
    for request, exit_layer in requests:
        plain = served.engine(policy="fair")
        add(plain, request, exit_layer)
        expected = run(plain)[request.request_id]
        assert results[request.request_id].token_ids == expected.token_ids
    filled = [results[str(i)].token_ids for i in (0, 2)]
    assert [tokens[2] for tokens in filled[:1]] == [ord(":")]
    assert [filled[1][i] for i in (0, 1, 4, 5)] == list(map(ord, "abcd"))


@pytest.mark.parametrize("sampling", SAMPLING[:2], ids=["greedy", "seeded"])
def test_law_7_going_shallower_continues_on_the_same_kv(
    served: Served, recorded: tuple[Engine, RecordingMaker], sampling: dict[str, Any]
) -> None:
    engine, _ = recorded
    add(engine, make_request("deep", PROMPT[:20], max_tokens=9, **sampling), 6)
    add(engine, make_request("r", PROMPT, max_tokens=9, **sampling), 5)
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)
    done = len(results["r"].token_ids)

    go_shallower(engine, "r", 1)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    exits = [5] * done + [1] * (9 - done)
    assert_offline(served, PROMPT, exits, sampling, results["r"].token_ids)
    assert_offline(served, PROMPT[:20], [6] * 9, sampling, results["deep"].token_ids)
