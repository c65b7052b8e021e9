"""Laws 1 to 8 on the Triton backend: tiny models in fp32, token for token, interpreted.

As ``tests/laws/test_model_laws.py``, with models and answers that an interpreter gets through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.core.sampling_params import SamplingParams
from support.interpreter import interpreted, patience
from support.scripted import Collected, add, collect, go_shallower, make_request, run
from support.serving import Served, offline_tokens, serve
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint

pytestmark = [interpreted, patience]

EXITS = (1, 2, 3)
KINDS = {1: "layer", 2: "mlp"}
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = ("llama-tied", "qwen3-untied")
PROMPT = list(range(40, 57))
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("laws")
    return {
        family: make_tiny_checkpoint(root / family, family, exits=EXITS, exit_kinds=KINDS, **SIZES)
        for family in FAMILIES
    }


def serve_on_triton(path: Path) -> Served:
    served = serve(path, backend="triton")
    assert served.decoder.backend.name == "triton"
    return served


def offline(
    served: Served, prompt: list[int], exits: list[int], sampling: dict[str, Any]
) -> list[int]:
    params = SamplingParams(max_tokens=len(exits), **sampling)
    return offline_tokens(
        served.path, prompt, params, exits, eos_token_ids=served.tokenizer.eos_token_ids
    )


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_served_at_an_exit_is_what_transformers_gives_with_its_first_layers(
    folders: dict[str, Path], family: str, exit_layer: int, sampling: dict[str, Any]
) -> None:
    served = serve_on_triton(folders[family])
    engine = served.engine()

    add(engine, make_request("r", PROMPT, max_tokens=4, **sampling), exit_layer)

    assert run(engine)["r"].token_ids == offline(served, PROMPT, [exit_layer] * 4, sampling)


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prefix": st.integers(0, 12),
            "suffix": st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=6),
            "max_tokens": st.integers(1, 3),
            "exit_layer": st.sampled_from(EXITS),
            "sampling": st.sampled_from([GREEDY, SEEDED]),
        }
    ),
    min_size=2,
    max_size=4,
)


@given(
    family=st.sampled_from(FAMILIES),
    workload=REQUESTS,
    num_pages=st.sampled_from([30, 200]),
    chunk=st.sampled_from([7, 64]),
    caching=st.booleans(),
    abort_after=st.integers(0, 4),
)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_laws_2_to_5_and_8_any_batch_chunk_cache_and_pressure_leaves_every_answer_as_it_is(
    folders: dict[str, Path],
    family: str,
    workload: list[dict[str, Any]],
    num_pages: int,
    chunk: int,
    caching: bool,
    abort_after: int,
) -> None:
    served = serve_on_triton(folders[family])
    engine = served.engine(
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        max_num_seqs=3,
        enable_prefix_caching=caching,
    )
    prompts = [PROMPT[: w["prefix"]] + w["suffix"] for w in workload]
    for i, (w, prompt) in enumerate(zip(workload, prompts, strict=True)):
        request = make_request(str(i), prompt, max_tokens=w["max_tokens"], **w["sampling"])
        add(engine, request, w["exit_layer"])
    add(engine, make_request("aborted", PROMPT, max_tokens=6), EXITS[0])

    results: dict[str, Collected] = {}
    for _ in range(abort_after):
        collect(engine.step(), results)
    engine.abort("aborted")
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    for i, (w, prompt) in enumerate(zip(workload, prompts, strict=True)):
        expected = offline(served, prompt, [w["exit_layer"]] * w["max_tokens"], w["sampling"])
        assert results[str(i)].token_ids == expected
    assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_a_prefix_hit_from_a_deeper_donor_changes_nothing(
    folders: dict[str, Path], family: str
) -> None:
    served = serve_on_triton(folders[family])
    engine = served.engine()
    add(engine, make_request("donor", PROMPT, max_tokens=1, **GREEDY), 3)
    run(engine)

    add(engine, make_request("taker", PROMPT, max_tokens=4, **GREEDY), 2)
    result = run(engine)["taker"]

    assert result.last is not None
    assert result.last.report is not None
    assert result.last.report.num_cached_tokens == 16  # 4 blocks of 4 of the 17 tokens
    assert result.token_ids == offline(served, PROMPT, [2] * 4, GREEDY)


def test_law_5_a_preempted_request_goes_on_as_if_nothing_had_been(
    folders: dict[str, Path],
) -> None:
    served = serve_on_triton(folders["llama-tied"])
    engine = served.engine(enable_prefix_caching=False)
    add(engine, make_request("r", PROMPT, max_tokens=5, **SEEDED), 3)
    results: dict[str, Collected] = {}
    for _ in range(3):
        collect(engine.step(), results)

    engine.scheduler.preempt(next(engine.scheduler.sequences()))
    while engine.has_work:
        collect(engine.step(), results)

    assert results["r"].token_ids == offline(served, PROMPT, [3] * 5, SEEDED)


def test_law_6_streamed_text_is_the_whole_text(folders: dict[str, Path]) -> None:
    served = serve_on_triton(folders["llama-tied"])
    ids = served.tokenizer.encode("naïve 日本語 🙂")
    engine = served.engine()
    add(engine, make_request("r", ids, max_tokens=12, ignore_eos=True, seed=3), 1)

    result = run(engine)["r"]

    assert result.text == served.tokenizer.decode(result.token_ids)


@pytest.mark.parametrize(("deep", "shallow"), [(3, 2), (2, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_law_7_going_shallower_continues_on_the_same_kv(
    folders: dict[str, Path], family: str, deep: int, shallow: int
) -> None:
    served = serve_on_triton(folders[family])
    engine = served.engine()
    add(engine, make_request("r", PROMPT, max_tokens=5, **GREEDY), deep)
    results: dict[str, Collected] = {}
    for _ in range(2):
        collect(engine.step(), results)

    go_shallower(engine, "r", shallow)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    assert results["r"].token_ids == offline(served, PROMPT, [deep] * 2 + [shallow] * 3, GREEDY)
