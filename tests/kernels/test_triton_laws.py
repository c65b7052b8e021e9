"""Laws 1 to 8 on the Triton backend: tiny models in fp32, token for token, interpreted.

As ``tests/laws/test_model_laws.py``, with models and answers that an interpreter gets through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.interpreter import interpreted, patience
from support.model_laws import (
    GREEDY,
    SEEDED,
    check_a_changed_depth,
    check_a_lonely_request,
    check_a_preemption,
    check_a_prefix_hit,
    check_company,
    companies,
)
from support.scripted import add, make_request, run
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint

pytestmark = [interpreted, patience]

EXITS = (1, 2, 3)
KINDS = {1: "layer", 2: "mlp"}
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = ("llama-tied", "qwen3-untied")
PROMPT = list(range(40, 57))


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


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_1_served_at_an_exit_is_what_transformers_gives_with_its_first_layers(
    folders: dict[str, Path], family: str, exit_layer: int, sampling: dict[str, Any]
) -> None:
    check_a_lonely_request(serve_on_triton(folders[family]), PROMPT, exit_layer, 4, sampling)


@given(
    family=st.sampled_from(FAMILIES),
    company=companies(
        EXITS, [GREEDY, SEEDED], max_prefix=12, max_suffix=6, max_tokens=3, max_size=4
    ),
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
    company: list[dict[str, Any]],
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
    check_company(
        served, engine, company, prompt=PROMPT, aborted=(EXITS[0], 6), abort_after=abort_after
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_a_prefix_hit_from_a_deeper_donor_changes_nothing(
    folders: dict[str, Path], family: str
) -> None:
    check_a_prefix_hit(
        serve_on_triton(folders[family]),
        PROMPT,
        donor=3,
        taker=2,
        max_tokens=4,
        num_cached_tokens=16,  # 4 blocks of 4 of the 17 tokens
    )


def test_law_5_a_preempted_request_goes_on_as_if_nothing_had_been(
    folders: dict[str, Path],
) -> None:
    served = serve_on_triton(folders["llama-tied"])
    check_a_preemption(served, PROMPT, 3, after=3, max_tokens=5)


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
    check_a_changed_depth(
        serve_on_triton(folders[family]),
        PROMPT,
        deep=deep,
        shallow=shallow,
        after=2,
        max_tokens=5,
        sampling=GREEDY,
    )
