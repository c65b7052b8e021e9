"""Laws 1 to 7 on tiny random models, fp32, all kinds of exit modules.

``offline_tokens`` runs transformers on the first E layers, one whole forward pass per token, with
transformers' own logits processors: no cache, no batch, no chunk. What the engine serves must equal
it token for token, whatever else is going on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.examples import examples
from support.model_laws import (
    GREEDY,
    SEEDED,
    assert_offline,
    check_a_changed_depth,
    check_a_lonely_request,
    check_a_preemption,
    check_a_prefix_hit,
    check_company,
    companies,
)
from support.scripted import add, go_shallower, make_request, run
from support.serving import serve
from support.tiny_models import EXIT_KINDS, make_tiny_checkpoint

EXITS = (1, 2, 4, 5, 6)
KINDS = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
MODELS = {
    "llama": ("llama-tied", KINDS),
    "qwen3": ("qwen3-untied", KINDS),
    "layers": ("qwen3-bias", {1: "affine", 2: "layer", 5: "layer"}),
}
FAMILIES = tuple(MODELS)
PROMPT = list(range(40, 75))

PENALISED: dict[str, Any] = {
    "temperature": 0.7,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.3,
    "seed": 5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("laws")
    return {
        name: make_tiny_checkpoint(root / name, variant, exits=EXITS, exit_kinds=kinds)
        for name, (variant, kinds) in MODELS.items()
    }


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "pen"])
@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_served_at_an_exit_is_what_transformers_gives_with_its_first_layers(
    folders: dict[str, Path], family: str, exit_layer: int, sampling: dict[str, Any]
) -> None:
    check_a_lonely_request(serve(folders[family]), PROMPT, exit_layer, 10, sampling)


@given(
    family=st.sampled_from(FAMILIES),
    company=companies(
        EXITS,
        [GREEDY, SEEDED, PENALISED],
        max_prefix=24,
        max_suffix=12,
        max_tokens=8,
        max_size=7,
    ),
    policy=st.sampled_from(["fair", "lockstep"]),
    # The longest request takes 88 pages where exits have layers of their own.
    num_pages=st.sampled_from([90, 120, 600]),
    chunk=st.sampled_from([8, 13, 256]),
    caching=st.booleans(),
    warm=st.booleans(),
    abort_after=st.integers(0, 6),
)
@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_laws_2_to_5_any_batch_chunk_cache_and_pressure_leaves_every_answer_as_it_is(
    folders: dict[str, Path],
    family: str,
    company: list[dict[str, Any]],
    policy: str,
    num_pages: int,
    chunk: int,
    caching: bool,
    warm: bool,
    abort_after: int,
) -> None:
    served = serve(folders[family])
    engine = served.engine(
        num_pages=num_pages,
        policy=policy,
        max_num_batched_tokens=chunk,
        max_num_seqs=6,
        enable_prefix_caching=caching,
    )
    if warm:  # a donor whose prefix is there in full depth, and gone by then
        add(engine, make_request("warm", PROMPT[:24], max_tokens=1), EXITS[-1])
        run(engine)

    check_company(
        served, engine, company, prompt=PROMPT, aborted=(EXITS[0], 50), abort_after=abort_after
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_a_prefix_hit_from_a_deeper_donor_changes_nothing(
    folders: dict[str, Path], family: str
) -> None:
    served = serve(folders[family])
    for taker in (4, 2):
        check_a_prefix_hit(
            served,
            PROMPT,
            donor=6,
            taker=taker,
            max_tokens=8,
            num_cached_tokens=32,  # 8 blocks of 4 of the 35 tokens
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_blocks_that_were_shallow_first_serve_all_depths(
    folders: dict[str, Path], family: str
) -> None:
    served = serve(folders[family])
    engine = served.engine()
    for request_id, exit_layer in enumerate((1, 2, 5, 6, 2, 5, 1)):
        add(engine, make_request(str(request_id), PROMPT, max_tokens=4, **GREEDY), exit_layer)

        result = run(engine)[str(request_id)]

        assert_offline(served, PROMPT, [exit_layer] * 4, GREEDY, result.token_ids)
        engine.check_invariants()


@pytest.mark.parametrize("family", FAMILIES)
def test_law_5_a_preempted_request_goes_on_as_if_nothing_had_been(
    folders: dict[str, Path], family: str
) -> None:
    check_a_preemption(serve(folders[family]), PROMPT, 5, after=4, max_tokens=10)


@pytest.mark.parametrize("prompt", ["the tin", "naïve 日本語 🙂", "on and on"])
def test_law_6_streamed_text_is_the_whole_text(folders: dict[str, Path], prompt: str) -> None:
    served = serve(folders["layers"])
    ids = served.tokenizer.encode(prompt)
    engine = served.engine()
    add(engine, make_request("r", ids, max_tokens=40, ignore_eos=True, seed=3), 6)

    result = run(engine)["r"]

    assert result.text == served.tokenizer.decode(result.token_ids)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(("deep", "shallow"), [(6, 4), (5, 1), (4, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_law_7_going_shallower_continues_on_the_same_kv(
    folders: dict[str, Path], family: str, deep: int, shallow: int, sampling: dict[str, Any]
) -> None:
    check_a_changed_depth(
        serve(folders[family]),
        PROMPT,
        deep=deep,
        shallow=shallow,
        after=4,
        max_tokens=9,
        sampling=sampling,
    )


def test_law_7_holds_in_the_middle_of_a_chunked_prompt(folders: dict[str, Path]) -> None:
    served = serve(folders["layers"])
    engine = served.engine(max_num_batched_tokens=10)
    add(engine, make_request("r", PROMPT, max_tokens=5, **GREEDY), 6)
    engine.step()

    go_shallower(engine, "r", 2)

    assert_offline(served, PROMPT, [2] * 5, GREEDY, run(engine)["r"].token_ids)
