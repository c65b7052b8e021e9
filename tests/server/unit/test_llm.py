"""``sortserve.LLM``: the engine in this process, answering as a server would."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import sortserve
from sortserve import LLM, Budget, DepthSchedule, SamplingParams
from sortserve.admission.choose import ExitChoice
from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import (
    BudgetUnattainableError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    SortserveError,
    UnavailableError,
)
from sortserve.core.request import FinishReason, Request
from sortserve.engine.worker import EngineWorker
from sortserve.llm import Result
from support.bare_machine import MISSING, bare_environment
from support.serving import serve
from support.tiny_models import make_tiny_checkpoint

PROMPTS = ["the", "in the rain", "er", "ou than"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
CHAT = [{"role": "user", "content": "the rain"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llm"), "llama-tied", exits=(2, 4, 6))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, dtype="float32", max_num_seqs=4, block_size=4) as llm:
        yield llm


def texts(results: Sequence[Result]) -> list[list[str]]:
    return [[output.text for output in result.outputs] for result in results]


# The law: LLM == engine == HTTP


@pytest.mark.parametrize("exit_layer", [2, 4, 6])
def test_it_answers_what_the_engine_alone_answers(path: Path, llm: LLM, exit_layer: int) -> None:
    params = SamplingParams(temperature=0.9, max_tokens=12, seed=5, ignore_eos=True)
    served = serve(path)

    results = llm.generate(PROMPTS, params, budget=Budget(exit_layer=exit_layer))

    for prompt, result in zip(PROMPTS, results, strict=True):
        engine = served.engine()
        request = Request(
            request_id="alone",
            prompt_token_ids=tuple(served.tokenizer.encode(prompt)),
            sampling=params,
            arrival_s=engine.clock(),
        )
        engine.add_request(request, ExitChoice(exit_layer, estimate=None, fits=True))
        token_ids: list[int] = []
        while engine.has_work:
            token_ids += [token.token_id for out in engine.step() for token in out.tokens]
        assert result.outputs[0].token_ids == tuple(token_ids)


async def test_it_answers_what_the_server_answers_with_the_same_seeds(path: Path) -> None:
    """Also where requests have no seed of their own, and their order counts."""
    served = serve(path)
    worker = EngineWorker(served.engine())
    worker.start()
    settings = ApiSettings(
        served_model_name="m", generation_defaults=served.checkpoint.generation_defaults
    )
    transport = httpx.ASGITransport(app=create_app(worker, served.tokenizer, settings))
    fields: dict[str, Any] = {"max_tokens": 8, "n": 2}
    bodies: list[dict[str, Any]] = [
        {"prompt": PROMPTS, "temperature": 0.0},
        {"prompt": PROMPTS, "seed": 7},
        {"prompt": PROMPTS, "temperature": 1.2},
    ]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        replies = [(await client.post("/v1/completions", json={**fields, **b})) for b in bodies]
        chat = {"messages": CHAT, "seed": 3, "temperature": 0.8, "max_tokens": 8}
        chat_reply = (await client.post("/generate", json=chat)).json()
    await asyncio.to_thread(worker.stop)
    with LLM(path, dtype="float32", seed=0) as llm:
        own = []
        for body in bodies:
            given = {name: value for name, value in body.items() if name != "prompt"}
            own.append(llm.generate(PROMPTS, SamplingParams(max_tokens=8, **given), n=2))
        params = SamplingParams(seed=3, temperature=0.8, max_tokens=8)
        chat_results = llm.chat(CHAT, params)

    for reply, results in zip(replies, own, strict=True):
        choices = [choice["text"] for choice in reply.json()["choices"]]
        assert choices == [text for group in texts(results) for text in group]
    assert texts(chat_results) == [[chat_reply["choices"][0]["text"]]]


# Prompts in, results in order


def test_results_come_in_the_order_of_the_prompts_however_long_they_take(llm: LLM) -> None:
    lengths = [30, 1, 17, 4, 9, 2, 25, 3, 8, 5, 11, 6]  # more than run or wait at once
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in lengths]
    finished: list[Result] = []

    results = llm.generate(["the"] * 12, params, progress=finished.append)

    assert [len(result.outputs[0].token_ids) for result in results] == lengths
    assert [result.index for result in results] == list(range(12))
    assert sorted(finished, key=lambda result: result.index) == results
    assert finished != results


def test_prompts_have_one_priority_or_each_its_own(llm: LLM) -> None:
    results = llm.generate(PROMPTS[:3], GREEDY, priority=[0, -10, 10])
    (alone,) = llm.chat(CHAT, GREEDY, priority=2)

    weights = [result.outputs[0].report.weight for result in results]
    assert weights == pytest.approx([1.0, 1.1**10, 1.1**-10])
    assert alone.outputs[0].report.weight == pytest.approx(1.1**-2)
    (*_, last) = llm.stream("the", GREEDY, priority=1)
    assert last.report is not None
    assert last.report.weight == pytest.approx(1 / 1.1)


@pytest.mark.parametrize("priority", [101, -101, 1.5, [1], "high"])
def test_a_priority_is_an_integer_within_bounds_for_all_prompts_or_for_each(
    llm: LLM, priority: Any
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        llm.generate(PROMPTS, GREEDY, priority=priority)

    assert error.value.param == "priority"


def test_exits_below_the_floor_are_for_who_names_them(path: Path) -> None:
    with LLM(path, dtype="float32", min_quality=0.5) as floored:
        assert floored.exits.served_unasked == (4, 6)
        with pytest.raises(InvalidRequestError, match="--min-quality"):
            floored.generate("the", GREEDY, budget=Budget(compute=floored.exits[2].compute))
        (named,) = floored.generate("the", GREEDY, budget=Budget(exit_layer=2))

    assert named.outputs[0].tokens_by_exit == {2: named.outputs[0].report.num_output_tokens}


def test_a_prompt_is_a_text_or_token_ids_alone_or_among_others(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the")

    mixed: list[str | Sequence[int]] = ["the", ids, tuple(ids)]
    together = llm.generate(mixed, GREEDY)

    assert len({tuple(text) for text in texts(together)}) == 1
    assert llm.generate("the", GREEDY)[0].text == together[0].text
    assert llm.generate(ids, GREEDY)[0].text == together[0].text
    assert [result.prompt for result in together] == ["the", None, None]
    assert together[0].prompt_token_ids == tuple(ids)
    assert llm.generate([], GREEDY) == []


def test_without_sampling_parameters_an_answer_may_fill_the_context(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=llm.default_sampling.max_tokens, ignore_eos=True
    )

    (result,) = llm.generate("the", params)
    (by_default,) = llm.generate("the")

    length = len(result.prompt_token_ids) + len(result.outputs[0].token_ids)
    assert length == llm.max_model_len
    assert result.outputs[0].finish_reason is FinishReason.LENGTH
    assert by_default.outputs[0].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_samples_of_one_prompt_have_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(seed=4, max_tokens=8)

    (result,) = llm.generate("the", params, n=3)

    apart = [
        llm.generate("the", SamplingParams(seed=seed, max_tokens=8))[0].text for seed in (4, 5, 6)
    ]
    assert [output.index for output in result.outputs] == [0, 1, 2]
    assert texts([result]) == [apart]


def test_log_probabilities_come_where_they_are_asked_for(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2)

    asked, unasked = llm.generate(["the", "the"], [params, GREEDY])

    logprobs = asked.outputs[0].logprobs
    assert logprobs is not None
    assert tuple(token.token_id for token in logprobs) == asked.outputs[0].token_ids
    assert all(t.top_logprobs[0].logprob == t.logprob for t in logprobs)  # greedy
    assert unasked.outputs[0].logprobs is None


def test_a_conversation_goes_through_the_chat_template(llm: LLM) -> None:
    (alone,) = llm.chat(CHAT, GREEDY)
    many = llm.chat([CHAT, [{"role": "user", "content": "er"}]], GREEDY)
    ids = llm.tokenizer.apply_chat_template(CHAT)

    assert alone.prompt_token_ids == tuple(ids) == tuple(llm.chat_prompt(CHAT))
    assert many[0].text == alone.text == llm.generate(ids, GREEDY)[0].text
    assert len(many) == 2
    unopened = llm.chat_prompt(CHAT, add_generation_prompt=False)
    assert ids[: len(unopened)] == unopened != ids


# Budgets


def test_each_prompt_may_have_a_budget_of_its_own(llm: LLM) -> None:
    budgets = [Budget(exit_layer=2), Budget(compute=0.9), Budget()]

    results = llm.generate(["the"] * 3, GREEDY, budget=budgets)

    outputs = [result.outputs[0] for result in results]
    assert [list(output.tokens_by_exit) for output in outputs] == [[2], [4], [6]]
    assert all(sum(o.tokens_by_exit.values()) == len(o.token_ids) for o in outputs)
    assert outputs[0].report.compute < outputs[1].report.compute < outputs[2].report.compute == 1


def test_a_calibrated_one_predicts_times_and_refuses_what_cannot_be_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path))
    impossible = Budget(latency_ms=0.001, on_miss="reject")  # type: ignore[arg-type]
    with LLM(path, dtype="float32", calibrate=True, max_model_len=32, max_num_seqs=2) as llm:
        (result,) = llm.generate("the", GREEDY, budget=Budget(latency_ms=1e6))
        with pytest.raises(BudgetUnattainableError, match=r"^prompts\.1: "):
            llm.generate(["the", "in"], GREEDY, budget=[Budget(), impossible])
        assert llm.generate("the", GREEDY)[0].text  # nothing of it is left behind

    report = result.outputs[0].report
    assert report.met
    assert report.predicted is not None


@pytest.mark.parametrize("given", [[[0, 6], [2, 4], [5, 2]], DepthSchedule.parse("0:6,2:4,5:2")])
def test_a_schedule_gives_each_part_of_the_answer_its_exit(llm: LLM, given: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)

    (result,) = llm.generate("the", params, budget=Budget(schedule=given))

    report = result.outputs[0].report
    assert report is not None
    assert dict(report.tokens_by_exit) == {6: 2, 4: 3, 2: 4}
    assert report.exit_layer == 2


# Answers as they come


def test_streamed_text_is_the_whole_text(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)

    outputs = list(llm.stream("the", params, budget=Budget(exit_layer=4)))

    (whole,) = llm.generate("the", params, budget=Budget(exit_layer=4))
    assert "".join(output.text for output in outputs) == whole.text
    assert len(outputs) == 40
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].report is not None


def test_to_stop_reading_ends_the_answer_and_frees_its_pages(path: Path) -> None:
    with LLM(path, dtype="float32", max_num_seqs=1) as llm:
        outputs = llm.stream("the", SamplingParams(max_tokens=200, ignore_eos=True))
        next(outputs)
        outputs.close()  # type: ignore[attr-defined]

        (after,) = llm.generate("the", GREEDY)  # which waits for the only place

        assert after.text


async def test_the_async_forms_give_what_the_others_give(llm: LLM) -> None:
    whole = llm.generate(PROMPTS, GREEDY)  # inside a running event loop, as in a notebook

    together = await asyncio.gather(
        llm.agenerate(PROMPTS, GREEDY), llm.achat(CHAT, GREEDY), llm.agenerate("the", GREEDY, n=2)
    )
    streamed = [output.text async for output in llm.astream("the", GREEDY)]

    assert texts(together[0]) == texts(whole)
    assert texts(together[1]) == texts(llm.chat(CHAT, GREEDY))
    assert texts(together[2]) == [[whole[0].text] * 2]
    assert "".join(streamed) == whole[0].text


async def test_to_cancel_an_async_form_ends_its_answers(path: Path) -> None:
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    with LLM(path, dtype="float32", max_num_seqs=1) as llm:
        task = asyncio.create_task(llm.agenerate(["the"] * 8, long))
        async for _ in llm.astream("the", SamplingParams(max_tokens=1)):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (await llm.agenerate("the", GREEDY))[0].text


def test_many_threads_may_ask_at_once(llm: LLM) -> None:
    expected = texts(llm.generate(PROMPTS, GREEDY))
    found: list[list[list[str]]] = []

    def ask() -> None:
        found.append(texts(llm.generate(PROMPTS, GREEDY)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [expected] * 6


# Mistakes


@pytest.mark.parametrize(
    ("ask", "param", "said"),
    [
        (lambda m: m.generate(["a", "b", "c", ""]), "prompts.3", "prompts.3 is empty"),
        (lambda m: m.generate(""), "prompts", "prompts is empty"),
        (lambda m: m.generate(["a", [1, 999]]), "prompts.1.1", "prompts.1.1=999"),
        (lambda m: m.generate(["a", 7]), "prompts.1", "prompts.1=7"),
        (lambda m: m.generate(["a", "the " * 300]), "prompts.1", "maximum context length is 256"),
        (lambda m: m.generate(["a", "\ud800"]), "prompts.1", "prompts.1 is not valid Unicode"),
        (
            lambda m: m.generate(["a", "b"], [GREEDY, SamplingParams(max_tokens=300)]),
            "max_tokens",
            "prompts.1: max_tokens=300",
        ),
        (
            lambda m: m.generate(["a"], budget=[Budget(exit_layer=3)]),
            "budget.exit_layer",
            "prompts.0: budget.exit_layer=3",
        ),
        (lambda m: m.generate(["a", "b"], [GREEDY]), "sampling", "1 entries for 2 prompts"),
        (lambda m: m.generate("a", {"max_tokens": 1}), "sampling", "SamplingParams"),
        (lambda m: m.generate("a", budget=0.5), "budget", "Budget"),
        (lambda m: m.generate("a", n=0), "n", "n=0"),
        (lambda m: m.chat([]), "messages", "at least one message"),
        (lambda m: m.chat([CHAT, [{"role": 3}]]), "messages.1.0.role", "messages.1.0.role=3"),
        (lambda m: m.stream(""), "prompt", "prompt is empty"),
    ],
)
def test_a_mistake_is_named_as_over_http(llm: LLM, ask: Any, param: str, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask(llm)

    assert caught.value.param == param
    assert said in caught.value.message


def test_one_bad_prompt_keeps_all_others_from_running(llm: LLM) -> None:
    finished: list[Result] = []

    with pytest.raises(InvalidRequestError, match=r"^prompts\.3 is empty"):
        llm.generate(["a", "b", "c", "", "d"], GREEDY, progress=finished.append)

    assert finished == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"block_size": 0}, "block_size=0 is not allowed"),
        ({"max_num_seqs": True}, "max_num_seqs=True"),
        ({"max_model_len": 257}, "max_model_len=257 is more than"),
        ({"kv_cache_memory": 1}, "give kv_cache_memory="),
        ({"num_threads": 0}, "num_threads=0"),
        ({"policy": "none"}, "policy='none'"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"exits": [9]}, "must lie in 1..6"),
    ],
)
def test_an_argument_that_is_not_possible_is_named(
    path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(path, **{"dtype": "float32", **arguments})

    assert said in caught.value.message
    assert "--" not in caught.value.message


def test_a_model_that_is_not_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "nothing")
    with pytest.raises(TypeError, match="max_num_sequences"):
        LLM(tmp_path / "nothing", max_num_sequences=3)


# Life


def test_a_closed_one_answers_nobody_and_closes_again(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "m", max_position_embeddings=8192)
    llm = LLM(path, dtype="float32", kv_cache_memory=64 << 20)
    outputs = llm.stream("the", SamplingParams(max_tokens=8000, ignore_eos=True))
    next(outputs)

    llm.close()
    llm.close()

    *_, last = outputs
    assert last.finish_reason is FinishReason.ABORT
    for ask in (llm.generate, llm.stream):
        with pytest.raises(UnavailableError, match="closed"):
            ask("the")


def test_one_that_is_forgotten_ends_its_threads(path: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(path, dtype="float32")
    llm.generate("the", GREEDY)
    own = set(threading.enumerate()) - before
    assert len(own) == 2

    del llm

    assert not any(thread.is_alive() for thread in own)


def test_two_live_in_one_process_over_one_loaded_checkpoint(path: Path) -> None:
    checkpoint = load_checkpoint(str(path), dtype="float32")

    with LLM(checkpoint) as one, LLM(checkpoint, max_model_len=64, policy="fair") as other:
        answers = [llm.generate(PROMPTS, GREEDY) for llm in (one, other)]

    assert texts(answers[0]) == texts(answers[1])
    assert other.max_model_len == 64
    assert other.exits.layers == (2, 4, 6)


# What is imported


def test_it_needs_none_of_the_servers_libraries(path: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util
assert not any(map(importlib.util.find_spec, {sorted(MISSING)!r}))
import support.tiny_models  # nor do the tests and benchmarks of a GPU
from sortserve import LLM, Budget, DepthSchedule, SamplingParams
with LLM({str(path)!r}, dtype="float32") as llm:
    (one,) = llm.generate("the", SamplingParams(temperature=0.0), budget=Budget(exit_layer=2))
    (two,) = llm.chat([{{"role": "user", "content": "hi"}}], SamplingParams(max_tokens=2))
    print(len(one.outputs[0].token_ids), len(two.outputs[0].token_ids))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=bare_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout == "16 2\n"


def test_parameters_load_no_torch_and_a_missing_library_is_named() -> None:
    code = """
import sys
from sortserve import Budget, SamplingParams
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    from sortserve import LLM
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == (
        "sortserve.LLM needs torch, which is not installed: pip install 'sortserve[server]'\n"
    )


def test_the_package_exports_what_it_says() -> None:
    assert all(getattr(sortserve, name) for name in sortserve.__all__)
    with pytest.raises(AttributeError):
        sortserve.Nothing  # noqa: B018
    assert issubclass(InvalidRequestError, SortserveError)


# Structured outputs


def test_an_answer_keeps_its_format(llm: LLM) -> None:
    sampling = SamplingParams(format={"regex": "[a-f]{2}-[0-9]{3}"}, max_tokens=20, seed=1)

    [result] = llm.generate("the", sampling, n=3)[:1]

    assert all(re.fullmatch("[a-f]{2}-[0-9]{3}", output.text) for output in result.outputs)
    assert all(output.finish_reason is FinishReason.STOP for output in result.outputs)


def test_a_format_that_cannot_be_kept_is_refused_before_anything_runs(llm: LLM) -> None:
    sampling = SamplingParams(format={"json": {"type": "array", "uniqueItems": True}})

    with pytest.raises(InvalidRequestError, match="uniqueItems") as refused:
        llm.generate("the", sampling)

    assert refused.value.param == "format.json"


def test_without_its_library_a_format_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with (
        LLM(path, dtype="float32", block_size=4) as llm,
        pytest.raises(InvalidRequestError, match=r"pip install 'sortserve\[server\]'"),
    ):
        llm.generate("the", SamplingParams(format={"regex": "a"}))
