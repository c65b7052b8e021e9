"""Every part made to raise, or to hang, under eight live requests.

The guilty request gets its error. All others get their tokens or, where the engine must end, an
error at once; health says which of the two it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, RowShape, StepShape
from sortserve.engine.worker import EngineWorker
from support.faults import Fault
from support.http_service import WAIT_S, HttpService
from support.watchdogs import HandWatchdog

NUM_LIVE = 8
STEP_TIMEOUT_S = 0.3
Make = Callable[..., HttpService]


def samples() -> list[tuple[StepShape, float]]:
    """A step takes a millisecond a layer."""
    shapes = [
        StepShape.of([RowShape(exit_layer, tokens, 100, samples=True)])
        for exit_layer in (2, 4, 6)
        for tokens in (1, 8, 64, 128)
    ]
    return [(shape, 1e-3 * shape.num_layers) for shape in shapes]


@dataclass
class Scene:
    """A service with a cost model that learns, and a learner to hand."""

    service: HttpService
    learner: CostLearner
    watchdog: HandWatchdog

    @property
    def worker(self) -> EngineWorker:
        return self.service.worker


@pytest.fixture
async def scene(make: Make, monkeypatch: pytest.MonkeyPatch) -> Scene:
    watchdog = HandWatchdog(monkeypatch)
    service = make(worker_options={"step_timeout_s": STEP_TIMEOUT_S}, start=False)
    learner = CostLearner(samples())
    service.engine.costs.learn_from(learner)
    service.worker.start()
    return Scene(service, learner, watchdog)


def body(i: int) -> dict[str, Any]:
    """Request number i: of every second one a time is promised."""
    budget = {"latency_ms": 60_000} if i % 2 else {}
    return {"prompt": "a", "max_tokens": 4, "budget": budget}


async def eight(
    scene: Scene, fault: Fault | None = None, *, hangs: bool = False
) -> list[httpx.Response]:
    """The replies to eight requests; the fault is armed when all of them live."""
    service = scene.service
    service.runner.gated = True
    async with asyncio.timeout(WAIT_S):
        posts = [service.post("/generate", body(i)) for i in range(NUM_LIVE)]
        replies = asyncio.gather(*posts)
        while service.worker._ledger.num_accepted < NUM_LIVE:
            await asyncio.sleep(0.001)
        if fault is not None:
            fault.arm(hangs=hangs)
        service.runner.open()
        if fault is not None and hangs:
            await scene.watchdog.time_out(fault)
        return await replies


async def health(service: HttpService) -> tuple[int, int]:
    ready, alive = await service.get("/health"), await service.get("/livez")
    return ready.status_code, alive.status_code


def patch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Fault:
    fault = Fault(getattr(owner, name))
    monkeypatch.setattr(owner, name, fault)
    return fault


# ---- parts that may fail and cost nobody anything ----

HARMLESS: dict[str, Callable[[Scene], tuple[Any, str]]] = {
    "the learner": lambda scene: (scene.learner, "observe"),
    "the engine's demands": lambda scene: (scene.service.engine, "demands"),
    "the engine's stats": lambda scene: (scene.service.engine, "stats"),
    "the observer's steps": lambda scene: (scene.service.ended, "on_step"),
    "the observer's reports": lambda scene: (scene.service.ended, "on_finished"),
    "the learned lengths": lambda scene: (scene.service.engine.lengths, "observe"),
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_a_part_that_only_helps_may_fail(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = patch(monkeypatch, *HARMLESS[name](scene))
    fault.arm()

    replies = await eight(scene)

    assert fault.struck.is_set()
    assert [reply.status_code for reply in replies] == [200] * NUM_LIVE
    assert {reply.json()["choices"][0]["text"] for reply in replies} == {"bcde"}
    assert await health(scene.service) == (200, 200)


# ---- parts without which the engine cannot go on ----

FATAL: dict[str, Callable[[Scene], tuple[Any, str]]] = {
    "the step": lambda scene: (scene.service.engine, "step"),
    "the scheduler": lambda scene: (scene.service.engine.scheduler, "schedule"),
    "the launch": lambda scene: (scene.service.engine.scheduler, "launch"),
    "the landing": lambda scene: (scene.service.engine.scheduler, "land"),
    "the pages": lambda scene: (scene.service.engine.kv_cache, "grow"),
}


@pytest.mark.parametrize("name", FATAL)
@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
async def test_an_engine_that_must_end_answers_everyone(
    name: str, hangs: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = patch(monkeypatch, *FATAL[name](scene))

    replies = await eight(scene, fault, hangs=hangs)

    assert [reply.status_code for reply in replies] == [500] * NUM_LIVE
    assert {reply.json()["error"]["code"] for reply in replies} == {"engine_failed"}
    assert await health(scene.service) == (503, 503)
    assert (await scene.service.post("/generate", body(0))).status_code == 503
    fault.disarm()


async def test_a_model_that_hangs_is_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = patch(monkeypatch, scene.service.runner, "execute")

    replies = await eight(scene, fault, hangs=True)

    assert [reply.status_code for reply in replies] == [500] * NUM_LIVE
    assert await health(scene.service) == (503, 503)
    fault.disarm()


async def test_a_model_that_always_raises_ends_the_engine_after_three_steps(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = patch(monkeypatch, scene.service.runner, "execute")
    fault.arm()

    replies = [await scene.service.post("/generate", body(0)) for _ in range(3)]
    async with asyncio.timeout(WAIT_S):
        while scene.worker.state != "failed":
            await asyncio.sleep(0.01)

    assert [reply.status_code for reply in replies] == [500] * 3
    assert await health(scene.service) == (503, 503)


# ---- parts that one request can make fail ----

GUILTY = "z"
"""What the guilty request's prompt holds, and no other."""


async def with_a_guilty_one(service: HttpService, guilty: dict[str, Any]) -> list[httpx.Response]:
    """Eight requests, the fourth a guilty one."""
    bodies = [guilty if i == 3 else body(i) for i in range(NUM_LIVE)]
    async with asyncio.timeout(WAIT_S):
        return await asyncio.gather(*(service.post("/generate", each) for each in bodies))


def only_the_guilty_one_failed(replies: list[httpx.Response]) -> bool:
    texts = [
        reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.status_code
        for reply in replies
    ]
    return texts == [500 if i == 3 else "bcde" for i in range(NUM_LIVE)]


async def test_a_tokenizer_that_raises_fails_the_request_it_raised_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = scene.service.tokenizer.encode

    def faulty(text: str, *args: Any, **kwargs: Any) -> list[int]:
        if GUILTY in text:
            raise RuntimeError("a scripted fault")
        return encode(text, *args, **kwargs)

    monkeypatch.setattr(scene.service.tokenizer, "encode", faulty)

    assert only_the_guilty_one_failed(await with_a_guilty_one(scene.service, {"prompt": GUILTY}))
    assert await health(scene.service) == (200, 200)


async def test_a_model_that_raises_on_one_row_fails_that_row(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = scene.service.runner.execute

    def faulty(plan: Any) -> list[Any]:
        if any(ord(GUILTY) in row.token_ids for row in plan.rows):
            raise RuntimeError("a scripted fault")
        return execute(plan)

    monkeypatch.setattr(scene.service.runner, "execute", faulty)

    assert only_the_guilty_one_failed(await with_a_guilty_one(scene.service, {"prompt": GUILTY}))
    assert await health(scene.service) == (200, 200)


@pytest.mark.parametrize("part", ["push", "finish"])
async def test_a_text_that_cannot_be_made_harms_no_other(
    part: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_text = scene.service.engine._make_text

    def faulty(request: Any) -> Any:
        text = make_text(request)
        if request.prompt_token_ids == (ord(GUILTY),):
            monkeypatch.setattr(text, part, lambda *args: 1 / 0)
        return text

    monkeypatch.setattr(scene.service.engine, "_make_text", faulty)

    replies = await with_a_guilty_one(scene.service, {"prompt": GUILTY, "max_tokens": 4})

    assert only_the_guilty_one_failed(replies)
    assert await health(scene.service) == (200, 200)


async def test_a_stream_of_text_that_cannot_be_made_at_all_fails_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_text = scene.service.engine._make_text

    def faulty(request: Any) -> Any:
        if request.prompt_token_ids == (ord(GUILTY),):
            raise RuntimeError("a scripted fault")
        return make_text(request)

    monkeypatch.setattr(scene.service.engine, "_make_text", faulty)

    assert only_the_guilty_one_failed(await with_a_guilty_one(scene.service, {"prompt": GUILTY}))
    assert await health(scene.service) == (200, 200)


# ---- what decides: admission and policy ----


@pytest.mark.parametrize("part", ["forecast", "choose_exit", "newcomer_demand"])
async def test_an_admission_that_raises_never_fails_a_request(
    part: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"sortserve.admission.desk.{part}", lambda *args, **kwargs: 1 / 0)

    replies = await eight(scene)

    assert [reply.status_code for reply in replies] == [200] * NUM_LIVE
    assert await health(scene.service) == (200, 200)


@pytest.mark.parametrize("part", ["cap", "choose", "lower", "entry_order", "victim"])
async def test_a_policy_that_raises_is_replaced_and_nobody_notices(
    part: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = scene.service.engine.scheduler._decisions
    faulty: dict[str, Any] = {part: lambda *args: 1 / 0}
    monkeypatch.setattr(decisions, "policy", replace(decisions.policy, **faulty))

    replies = await eight(scene)

    assert {reply.json()["choices"][0]["text"] for reply in replies} == {"bcde"}
    assert await health(scene.service) == (200, 200)


async def test_the_cost_model_of_a_broken_calibration_serves_everyone(scene: Scene) -> None:
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0)
    scene.service.engine.costs.use(CostModel(nothing, nothing))

    replies = await eight(scene)

    assert {reply.json()["choices"][0]["text"] for reply in replies} == {"bcde"}
    assert await health(scene.service) == (200, 200)
