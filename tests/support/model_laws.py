"""Bodies of laws 1 to 5 and 7 on a real engine, whatever its backend and however large its model.

Every answer is compared with ``offline_tokens``: no cache, no batch, no chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.engine import Engine
from support.scripted import Collected, add, collect, go_shallower, make_request, run
from support.serving import Served, offline_tokens
from support.tiny_models import VOCAB_SIZE

__all__ = [
    "GREEDY",
    "SEEDED",
    "assert_offline",
    "check_a_changed_depth",
    "check_a_lonely_request",
    "check_a_preemption",
    "check_a_prefix_hit",
    "check_company",
    "companies",
]

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}


def assert_offline(
    served: Served,
    prompt: list[int],
    exits: Sequence[int],
    sampling: dict[str, Any],
    answer: list[int],
) -> None:
    """``answer`` is what transformers gives, token i with the first ``exits[i]`` layers."""
    expected = offline_tokens(
        served.path,
        prompt,
        SamplingParams(max_tokens=len(exits), **sampling),
        exits,
        eos_token_ids=served.tokenizer.eos_token_ids,
        guess=answer,
    )
    assert answer == expected, f"{answer} is served, and {expected} is right"


def check_a_lonely_request(
    served: Served, prompt: list[int], exit_layer: int, max_tokens: int, sampling: dict[str, Any]
) -> None:
    """Law 1: served at an exit is what transformers gives with its first layers."""
    engine = served.engine()

    add(engine, make_request("r", prompt, max_tokens=max_tokens, **sampling), exit_layer)

    answer = run(engine)["r"].token_ids
    assert_offline(served, prompt, [exit_layer] * max_tokens, sampling, answer)


def companies(
    exits: Sequence[int],
    samplings: Sequence[dict[str, Any]],
    *,
    max_prefix: int,
    max_suffix: int,
    max_tokens: int,
    max_size: int,
) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Requests with shared prefixes, of all depths and kinds of sampling."""
    one = {
        "prefix": st.integers(0, max_prefix),
        "suffix": st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=max_suffix),
        "max_tokens": st.integers(1, max_tokens),
        "exit_layer": st.sampled_from(exits),
        "sampling": st.sampled_from(samplings),
    }
    return st.lists(st.fixed_dictionaries(one), min_size=2, max_size=max_size)


def check_company(
    served: Served,
    engine: Engine,
    company: list[dict[str, Any]],
    *,
    prompt: list[int],
    aborted: tuple[int, int],
    abort_after: int,
) -> None:
    """Laws 2 to 5: no batch, chunk, cache and pressure changes an answer.

    Args:
        company: of ``companies``; each begins with a part of ``prompt``.
        aborted: exit and number of tokens of one more request, which is aborted.
        abort_after: so many steps after the start.
    """
    prompts = [prompt[: one["prefix"]] + one["suffix"] for one in company]
    for i, (one, own) in enumerate(zip(company, prompts, strict=True)):
        request = make_request(str(i), own, max_tokens=one["max_tokens"], **one["sampling"])
        add(engine, request, one["exit_layer"])
    exit_layer, max_tokens = aborted
    add(engine, make_request("aborted", prompt, max_tokens=max_tokens), exit_layer)

    results = _steps(engine, abort_after)
    engine.abort("aborted")
    _go_on(engine, results)

    for i, (one, own) in enumerate(zip(company, prompts, strict=True)):
        exits = [one["exit_layer"]] * one["max_tokens"]
        assert_offline(served, own, exits, one["sampling"], results[str(i)].token_ids)
    assert engine.stats().kv_pages_used == 0


def check_a_prefix_hit(
    served: Served,
    prompt: list[int],
    *,
    donor: int,
    taker: int,
    max_tokens: int,
    num_cached_tokens: int,
) -> None:
    """Law 4: a prefix hit from a donor at a deeper exit changes nothing."""
    engine = served.engine()
    add(engine, make_request("donor", prompt, max_tokens=1, **GREEDY), donor)
    run(engine)

    add(engine, make_request("taker", prompt, max_tokens=max_tokens, **GREEDY), taker)
    result = run(engine)["taker"]

    assert result.last is not None
    assert result.last.report is not None
    assert result.last.report.num_cached_tokens == num_cached_tokens
    assert_offline(served, prompt, [taker] * max_tokens, GREEDY, result.token_ids)


def check_a_preemption(
    served: Served, prompt: list[int], exit_layer: int, *, after: int, max_tokens: int
) -> None:
    """Law 5: a request that is preempted after some steps goes on as if nothing had been."""
    engine = served.engine(enable_prefix_caching=False)
    add(engine, make_request("r", prompt, max_tokens=max_tokens, **SEEDED), exit_layer)
    results = _steps(engine, after)

    engine.scheduler.preempt(next(engine.scheduler.sequences()))
    _go_on(engine, results)

    exits = [exit_layer] * max_tokens
    assert_offline(served, prompt, exits, SEEDED, results["r"].token_ids)


def check_a_changed_depth(
    served: Served,
    prompt: list[int],
    *,
    deep: int,
    shallow: int,
    after: int,
    max_tokens: int,
    sampling: dict[str, Any],
) -> None:
    """Law 7: going shallower after some tokens continues on the same KV."""
    engine = served.engine()
    add(engine, make_request("r", prompt, max_tokens=max_tokens, **sampling), deep)
    results = _steps(engine, after)

    go_shallower(engine, "r", shallow)
    _go_on(engine, results)

    exits = [deep] * after + [shallow] * (max_tokens - after)
    assert_offline(served, prompt, exits, sampling, results["r"].token_ids)


def _steps(engine: Engine, count: int) -> dict[str, Collected]:
    results: dict[str, Collected] = {}
    for _ in range(count):
        collect(engine.step(), results)
    return results


def _go_on(engine: Engine, results: dict[str, Collected]) -> None:
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()
