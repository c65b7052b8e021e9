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

from sortserve.core.sampling_params import SamplingParams
from support.scripted import Collected, add, collect, go_shallower, make_request, run
from support.serving import Served, offline_tokens, serve
from support.tiny_models import EXIT_KINDS, VOCAB_SIZE, make_tiny_checkpoint

EXITS = (1, 2, 4, 5, 6)
KINDS = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
MODELS = {
    "llama": ("llama-tied", KINDS),
    "qwen3": ("qwen3-untied", KINDS),
    "layers": ("qwen3-bias", {1: "affine", 2: "layer", 5: "layer"}),
}
FAMILIES = tuple(MODELS)
PROMPT = list(range(40, 75))

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}
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


def offline(
    served: Served, prompt: list[int], exits: list[int], sampling: dict[str, Any]
) -> list[int]:
    params = SamplingParams(max_tokens=len(exits), **sampling)
    return offline_tokens(
        served.path, prompt, params, exits, eos_token_ids=served.tokenizer.eos_token_ids
    )


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "pen"])
@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_served_at_an_exit_is_what_transformers_gives_with_its_first_layers(
    folders: dict[str, Path], family: str, exit_layer: int, sampling: dict[str, Any]
) -> None:
    served = serve(folders[family])
    engine = served.engine()

    add(engine, make_request("r", PROMPT, max_tokens=10, **sampling), exit_layer)

    assert run(engine)["r"].token_ids == offline(served, PROMPT, [exit_layer] * 10, sampling)


@st.composite
def requests(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests with shared prefixes, of all depths and kinds of sampling."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "prefix": st.integers(0, 24),
                    "suffix": st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=12),
                    "max_tokens": st.integers(1, 8),
                    "exit_layer": st.sampled_from(EXITS),
                    "sampling": st.sampled_from([GREEDY, SEEDED, PENALISED]),
                }
            ),
            min_size=2,
            max_size=7,
        )
    )


@given(
    family=st.sampled_from(FAMILIES),
    workload=requests(),
    policy=st.sampled_from(["fair", "lockstep"]),
    num_pages=st.sampled_from([70, 120, 600]),
    chunk=st.sampled_from([8, 13, 256]),
    caching=st.booleans(),
    warm=st.booleans(),
    abort_after=st.integers(0, 6),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_laws_2_to_5_any_batch_chunk_cache_and_pressure_leaves_every_answer_as_it_is(
    folders: dict[str, Path],
    family: str,
    workload: list[dict[str, Any]],
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
    prompts = [PROMPT[: w["prefix"]] + w["suffix"] for w in workload]
    for i, (w, prompt) in enumerate(zip(workload, prompts, strict=True)):
        request = make_request(str(i), prompt, max_tokens=w["max_tokens"], **w["sampling"])
        add(engine, request, w["exit_layer"])
    add(engine, make_request("aborted", PROMPT, max_tokens=50), EXITS[0])

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
    served = serve(folders[family])
    engine = served.engine()
    add(engine, make_request("donor", PROMPT, max_tokens=3, **GREEDY), 6)
    run(engine)

    for exit_layer in (4, 2):
        add(engine, make_request("taker", PROMPT, max_tokens=8, **GREEDY), exit_layer)
        result = run(engine)["taker"]

        assert result.last is not None
        assert result.last.report is not None
        assert result.last.report.num_cached_tokens == 32  # 8 blocks of 4 of the 35 tokens
        assert result.token_ids == offline(served, PROMPT, [exit_layer] * 8, GREEDY)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_blocks_that_were_shallow_first_serve_all_depths(
    folders: dict[str, Path], family: str
) -> None:
    served = serve(folders[family])
    engine = served.engine()
    for request_id, exit_layer in enumerate((1, 2, 5, 6, 2, 5, 1)):
        add(engine, make_request(str(request_id), PROMPT, max_tokens=4, **GREEDY), exit_layer)

        result = run(engine)[str(request_id)]

        assert result.token_ids == offline(served, PROMPT, [exit_layer] * 4, GREEDY)
        engine.check_invariants()


@pytest.mark.parametrize("family", FAMILIES)
def test_law_5_a_preempted_request_goes_on_as_if_nothing_had_been(
    folders: dict[str, Path], family: str
) -> None:
    served = serve(folders[family])
    engine = served.engine(enable_prefix_caching=False)
    add(engine, make_request("r", PROMPT, max_tokens=10, **SEEDED), 5)
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)

    engine.scheduler.preempt(next(engine.scheduler.sequences()))
    while engine.has_work:
        collect(engine.step(), results)

    assert results["r"].token_ids == offline(served, PROMPT, [5] * 10, SEEDED)


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
    served = serve(folders[family])
    engine = served.engine()
    add(engine, make_request("r", PROMPT, max_tokens=9, **sampling), deep)
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)

    go_shallower(engine, "r", shallow)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    assert results["r"].token_ids == offline(served, PROMPT, [deep] * 4 + [shallow] * 5, sampling)


def test_law_7_holds_in_the_middle_of_a_chunked_prompt(folders: dict[str, Path]) -> None:
    served = serve(folders["layers"])
    engine = served.engine(max_num_batched_tokens=10)
    add(engine, make_request("r", PROMPT, max_tokens=5, **GREEDY), 6)
    engine.step()

    go_shallower(engine, "r", 2)

    assert run(engine)["r"].token_ids == offline(served, PROMPT, [2] * 5, GREEDY)
