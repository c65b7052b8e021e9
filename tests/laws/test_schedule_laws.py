"""A depth schedule is exact: every token is the offline one at the exit that it names.

Law 7 with the server in charge: the prompt and the first tokens run deep, later ones shallower, on
the same keys and values. Whatever happens on the way (chunks, prefix hits, company, lost pages, a
policy that goes further down) token k is made at the exit of its place or shallower, never deeper.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.core.budget import Budget
from sortserve.core.schedule import DepthSchedule
from support.examples import examples
from support.model_laws import GREEDY, SEEDED, assert_offline
from support.scripted import Collected, add, collect, go_shallower, make_request, run
from support.serving import serve
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
FAMILIES = ("llama-tied", "qwen3-untied")
PROMPT = list(range(40, 75))
PARTS = ((0, 6), (3, 5), (5, 2))
DEPTHS = [6, 6, 6, 5, 5, 2, 2, 2, 2, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("schedules")
    return {
        family: make_tiny_checkpoint(
            root / family, family, exits=EXITS, exit_kinds=mixed_kinds(EXITS, family)
        )
        for family in FAMILIES
    }


def scheduled(
    request_id: str = "r", prompt: list[int] = PROMPT, *, parts: Any = PARTS, **fields: Any
) -> Any:
    budget = Budget(schedule=DepthSchedule(parts))
    return make_request(request_id, prompt, budget=budget, **{"max_tokens": 10, **fields})


@pytest.mark.parametrize("chunk", [10, 256])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_what_transformers_gives_at_the_exit_of_its_place(
    folders: dict[str, Path], family: str, sampling: dict[str, Any], chunk: int
) -> None:
    served = serve(folders[family])
    engine = served.engine(max_num_batched_tokens=chunk)
    add(engine, scheduled(**sampling))

    result = run(engine)["r"]

    assert_offline(served, PROMPT, DEPTHS, sampling, result.token_ids)
    assert result.exits == DEPTHS
    assert result.last is not None
    report = result.last.report
    assert report is not None
    assert report.tokens_by_exit == {6: 3, 5: 2, 2: 5}
    assert report.exit_layer == 2
    compute = [engine.exits[e].compute for e in DEPTHS]
    assert report.compute == pytest.approx(sum(compute) / len(compute))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("after", range(1, 9))
def test_whoever_loses_its_pages_in_the_middle_goes_on_as_if_nothing_had_been(
    folders: dict[str, Path], after: int, caching: bool
) -> None:
    """Prompt and early tokens are computed again at the present depth: those layers are the same.

    The third and the fifth token are followed by another exit: there the pages go first.
    """
    served = serve(folders["qwen3-untied"])
    engine = served.engine(enable_prefix_caching=caching, max_num_batched_tokens=16)
    add(engine, scheduled(**SEEDED))
    results: dict[str, Collected] = {}
    while len(results.get("r", Collected()).token_ids) < after:
        collect(engine.step(), results)

    engine.scheduler.preempt(next(engine.scheduler.sequences()))
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    assert_offline(served, PROMPT, DEPTHS, SEEDED, results["r"].token_ids)
    assert results["r"].exits == DEPTHS


@pytest.mark.parametrize("donor", [6, 4, 2])
def test_a_prefix_hit_changes_nothing(folders: dict[str, Path], donor: int) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine()
    add(engine, make_request("donor", PROMPT, max_tokens=3, **GREEDY), donor)
    run(engine)

    add(engine, scheduled(**GREEDY))
    result = run(engine)["r"]

    assert_offline(served, PROMPT, DEPTHS, GREEDY, result.token_ids)
    assert result.last is not None
    assert result.last.report is not None
    assert result.last.report.num_cached_tokens == (32 if donor == 6 else 0)


@pytest.mark.parametrize(
    ("lowered_to", "depths"),
    [
        (4, [6, 4, 4, 4, 4, 2, 2, 2, 2, 2]),  # the schedule's 5 comes too late, its 2 does not
        (1, [6, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_who_was_taken_further_down_is_never_taken_deeper_again(
    folders: dict[str, Path], lowered_to: int, depths: list[int]
) -> None:
    served = serve(folders["llama-tied"])
    engine = served.engine()
    add(engine, scheduled(**GREEDY))
    results: dict[str, Collected] = {}
    collect(engine.step(), results)

    go_shallower(engine, "r", lowered_to)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    assert results["r"].exits == depths
    assert_offline(served, PROMPT, depths, GREEDY, results["r"].token_ids)


@st.composite
def parts_of(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """A schedule of one to all exits whose tokens are near each other."""
    exits = sorted(draw(st.sets(st.sampled_from(EXITS), min_size=1)), reverse=True)
    gaps = draw(st.lists(st.integers(1, 4), min_size=len(exits) - 1, max_size=len(exits) - 1))
    return tuple(zip(accumulate([0, *gaps]), exits, strict=True))


@st.composite
def requests(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests with shared prefixes: under schedules of all kinds, and at one exit."""
    one_exit = st.sampled_from(EXITS).map(lambda exit_layer: ((0, exit_layer),))
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "prefix": st.integers(0, 24),
                    "suffix": st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=12),
                    "max_tokens": st.integers(1, 12),
                    "parts": st.one_of(parts_of(), parts_of(), one_exit),
                    "sampling": st.sampled_from([GREEDY, SEEDED]),
                }
            ),
            min_size=2,
            max_size=7,
        )
    )


@given(
    family=st.sampled_from(FAMILIES),
    workload=requests(),
    policy=st.sampled_from(["fair", "lockstep", "deadline"]),
    num_pages=st.sampled_from([104, 140, 600]),  # the longest request takes 104
    chunk=st.sampled_from([8, 13, 256]),
    caching=st.booleans(),
)
@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_in_any_company_chunks_cache_and_pressure_every_token_is_the_offline_one(
    folders: dict[str, Path],
    family: str,
    workload: list[dict[str, Any]],
    policy: str,
    num_pages: int,
    chunk: int,
    caching: bool,
) -> None:
    served = serve(folders[family])
    engine = served.engine(
        num_pages=num_pages,
        policy=policy,
        max_num_batched_tokens=chunk,
        max_num_seqs=6,
        enable_prefix_caching=caching,
    )
    prompts = [PROMPT[: w["prefix"]] + w["suffix"] for w in workload]
    for i, (w, prompt) in enumerate(zip(workload, prompts, strict=True)):
        fields = {"max_tokens": w["max_tokens"], **w["sampling"]}
        add(engine, scheduled(str(i), prompt, parts=w["parts"], **fields))

    results = run(engine)

    for i, (w, prompt) in enumerate(zip(workload, prompts, strict=True)):
        schedule = DepthSchedule(w["parts"])
        depths = [schedule.exit_at(k) for k in range(w["max_tokens"])]
        assert_offline(served, prompt, depths, w["sampling"], results[str(i)].token_ids)
        assert results[str(i)].exits == depths[: len(results[str(i)].exits)]
    assert engine.stats().kv_pages_used == 0
