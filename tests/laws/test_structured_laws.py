"""A grammar with a real model: law 14, and the laws of batches and depths with it.

Tiny random checkpoints in fp32: tokens are compared exactly.
"""

from __future__ import annotations

from typing import Any

import pytest

from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.engine import Engine
from support.schemas import FIVE_FIELDS, check_document
from support.scripted import Collected, add, collect, go_shallower, run
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint

EXITS = (2, 4, 6)
SCHEMA = {"json": FIVE_FIELDS}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(make_tiny_checkpoint(tmp_path_factory.mktemp("structured"), exits=EXITS))


def request_of(served: Served, request_id: str, format_: Any = SCHEMA, **sampling: Any) -> Request:
    params = SamplingParams(format=format_, **{"max_tokens": 120, "seed": 3, **sampling})
    grammar = None
    if params.output_format is not None:
        grammar = served.tokenizer.grammars.compile(params.output_format)
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(served.tokenizer.encode("in the rain")),
        sampling=params,
        arrival_s=1000.0,
        grammar=grammar,
    )


def alone(served: Served, exit_layer: int, **sampling: Any) -> Collected:
    engine = served.engine()
    add(engine, request_of(served, "r", **sampling), exit_layer)
    return run(engine, check=False)["r"]


@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_in_a_chunk_equal_one_by_one(
    served: Served, exit_layer: int, temperature: float
) -> None:
    in_chunks = alone(served, exit_layer, temperature=temperature)
    one_by_one = alone(served, exit_layer, temperature=temperature, logprobs=0)

    assert in_chunks.token_ids == one_by_one.token_ids
    assert in_chunks.text == one_by_one.text
    if in_chunks.last is not None and in_chunks.last.finish_reason == "stop":
        check_document(in_chunks.text, FIVE_FIELDS)


def num_steps(served: Served, **sampling: Any) -> tuple[int, int]:
    """Steps that an answer takes, and its tokens."""
    engine = served.engine()
    add(engine, request_of(served, "r", **sampling))
    steps = 0
    results: dict[str, Collected] = {}
    while engine.has_work:
        collect(engine.step(), results)
        steps += 1
    return steps, len(results["r"].token_ids)


@pytest.mark.parametrize("seed", [1, 2])
def test_five_fields_take_three_tenths_fewer_steps(served: Served, seed: int) -> None:
    slow, num_tokens = num_steps(served, seed=seed, logprobs=0)
    fast, same = num_steps(served, seed=seed)

    assert same == num_tokens == slow
    assert fast <= 0.7 * slow


def test_any_mix_of_depths_and_formats_equals_each_alone(served: Served) -> None:
    formats = [SCHEMA, {"regex": "[a-z]{3,9}"}, {"choice": ["yes", "no"]}, None]
    cases = [
        (f"{e}-{i}", e, {"format_": format_, "seed": e + i, "max_tokens": 30, "top_p": 0.9})
        for e in EXITS
        for i, format_ in enumerate(formats)
    ]
    engine = served.engine(max_num_batched_tokens=7)
    for name, exit_layer, fields in cases:
        add(engine, request_of(served, name, **fields), exit_layer)

    results = run(engine)

    for name, exit_layer, fields in cases:
        assert results[name].token_ids == alone(served, exit_layer, **fields).token_ids, name


def disturbed(served: Served, disturb: Any, at_step: int) -> Collected:
    engine = served.engine()
    add(engine, request_of(served, "r"), 6)
    results: dict[str, Collected] = {}
    for _ in range(at_step):
        collect(engine.step(), results)
    disturb(engine)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()
    return results["r"]


@pytest.mark.parametrize("at_step", [2, 9])
def test_preempted_and_resumed_equals_undisturbed(served: Served, at_step: int) -> None:
    def preempt(engine: Engine) -> None:
        [sequence] = engine.scheduler.sequences()
        engine.scheduler.preempt(sequence)

    assert disturbed(served, preempt, at_step).token_ids == alone(served, 6).token_ids


def test_a_document_that_goes_shallower_is_still_valid(served: Served) -> None:
    result = disturbed(served, lambda engine: go_shallower(engine, "r", 2), 5)

    assert set(result.exits) == {6, 2}
    check_document(result.text, FIVE_FIELDS)
