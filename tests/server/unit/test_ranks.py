"""The other ranks as rank 0 sees them: what any of them does, nobody waits for it for ever."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sortserve.core.errors import ConfigError
from sortserve.core.plan import RowPlan, RunnerLost, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.engine.tensor_parallel import process as process_module
from sortserve.engine.tensor_parallel import ranks as module
from sortserve.engine.tensor_parallel import watch as watch_module
from sortserve.engine.tensor_parallel.messages import Done, without_words
from sortserve.engine.tensor_parallel.ranks import Ranks, other_ranks
from sortserve.engine.tensor_parallel.watch import GRACE_S, StepWatch
from support.processes import has_ended
from support.scripted_rank import NUM_CALLS

SAMPLING = SamplingRow(SamplingParams(), 1, (1, 2, 3), (4,), frozenset())
PLAN = StepPlan(
    rows=tuple(
        RowPlan(
            request_id="a",
            exit_layer=2,
            start=0,
            token_ids=[5, 6],
            block_table_SB=np.zeros((1, 1), np.int32),
            sampling=sampling,
        )
        for sampling in (SAMPLING, None)
    ),
    depth_cap=2,
)


class ScriptedGroup:
    """Collectives that need nobody."""

    num_calls = NUM_CALLS

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def meet(self, folder: Path) -> None:
        assert folder.is_dir()

    @contextmanager
    def step(self) -> Iterator[None]:
        yield

    def abort(self) -> None:
        self.aborted.set()

    def wait_for_a_rank_that_is_gone(self, plan: StepPlan) -> None:
        """As a collective does: it fails when the others have been ended."""
        self.aborted.wait(60)
        raise RuntimeError("connection reset")


def options(num_ranks: int) -> Any:
    """Plain values: to read an ``EngineOptions`` a rank would load torch."""
    return SimpleNamespace(tensor_parallel_size=num_ranks, step_timeout=0.0)


@pytest.fixture(autouse=True)
def scripted_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "MAIN", "support.scripted_rank")
    monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.fixture
def start() -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def make(script: str, *, timeout_s: float | None = None, num_ranks: int = 3) -> Ranks:
        ranks = Ranks(num_ranks, script, {}, options(num_ranks), num_threads=1, timeout_s=timeout_s)
        started.append(ranks)
        ranks._group = ScriptedGroup()  # type: ignore[assignment]
        return ranks

    yield make
    for ranks in started:
        ranks.close()
        assert all(map(has_ended, ranks.process_ids))
        assert not ranks._folder.exists()


def fails_at(num_calls: int, ranks: Ranks) -> Callable[[StepPlan], None]:
    def execute(plan: StepPlan) -> None:
        assert ranks._group is not None
        ranks._group.num_calls = num_calls
        raise ValueError("scripted")

    return execute


# ---- the start ----


def test_the_rank_with_least_room_decides_how_many_pages_each_has(start: Any) -> None:
    assert start("works").start(500) == 100
    assert start("works").start(50) == 50


def test_a_backend_that_fails_its_check_on_another_rank_is_told_as_here(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All ranks wait for the slowest: one that runs the reference must not go unnoticed."""
    ranks = start("slow-backend")

    assert ranks.failed_backends == ()
    assert ranks.start(500) == 100
    assert ranks.failed_backends == ("triton",)
    assert {f"rank {n}: the backend triton is not used" for n in (1, 2)} <= set(caplog.messages)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("no-room", "rank 1 could not start: there is no room"),
        ("dies-loading", "rank 1 has ended (exit code 7)"),
    ],
)
def test_a_rank_that_cannot_start_is_an_error_of_the_start(
    start: Any, script: str, why: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        start(script).start(500)

    assert str(refused.value) == f"--tensor-parallel-size=3: {why}"


def test_one_rank_starts_no_process_and_a_failed_start_ends_all() -> None:
    with other_ranks("works", {}, options(1), None) as none:
        assert none is None

    started: list[Ranks] = []

    def fail() -> None:
        with other_ranks("works", {}, options(2), 1) as ranks:
            assert ranks is not None
            started.append(ranks)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [has_ended(process_id) for process_id in started[0].process_ids] == [True]


# ---- steps ----


def test_a_plan_goes_out_without_prompts_and_parameters() -> None:
    sampled, silent = without_words(PLAN).rows

    assert sampled.token_ids == silent.token_ids == (5, 6)
    assert silent.sampling is None
    assert sampled.sampling is not None
    assert sampled.sampling is not SAMPLING
    assert not sampled.sampling.prompt_token_ids


def test_steps_run_and_what_ranks_log_is_in_the_log(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = start("logs")
    ranks.start(500)

    assert [ranks.run(PLAN, lambda plan: len(plan.rows)) for _ in range(3)] == [2, 2, 2]
    # A failure waits for all ranks, and what they have logged comes first.
    with pytest.raises(ValueError, match="scripted"):
        ranks.run(PLAN, fails_at(NUM_CALLS, ranks))
    assert "rank 1: something is odd" in caplog.messages


def test_a_plan_that_fails_on_all_ranks_alike_ends_nobody(start: Any) -> None:
    ranks = start("fails")
    ranks.start(500)

    with pytest.raises(ValueError, match="scripted"):
        ranks.run(PLAN, fails_at(0, ranks))
    assert ranks.run(PLAN, lambda plan: "runs") == "runs"
    assert ranks.failure is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("dies", "rank 1 has ended (exit code 7)"),
        ("hangs", "rank 1 has been at one step for 0.05 s"),
        ("fails-early", "rank 1 failed in a step that others have not left"),
    ],
)
def test_a_lost_rank_is_told_and_ends_the_step_under_way(
    start: Any,
    script: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if script == "fails-early":
        monkeypatch.setattr(watch_module, "GRACE_S", 0.01)
    ranks = start(script, num_ranks=2, timeout_s=0.05 if script == "hangs" else None)
    told: list[str] = []
    ranks.watch(told.append)
    ranks.start(500)
    group = ranks._group

    with pytest.raises(RunnerLost, match="rank 1"):
        ranks.run(PLAN, group.wait_for_a_rank_that_is_gone)
    with pytest.raises(RunnerLost):
        ranks.run(PLAN, lambda plan: None)

    assert [one.startswith(reason) for one in told] == [True]
    assert all(map(has_ended, ranks.process_ids))
    assert caplog.records[-1].levelno == logging.ERROR
    late: list[str] = []
    ranks.watch(late.append)
    assert late == told


def test_a_rank_that_dies_while_nothing_runs_is_told(start: Any) -> None:
    ranks = start("works", num_ranks=2)
    told: list[str] = []
    ranks.start(500)
    ranks.watch(told.append)

    os.kill(ranks.process_ids[0], signal.SIGKILL)
    ranks._listening.join()

    assert told == ["rank 1 has ended (exit code -9)"]


def test_a_closed_group_runs_nothing_and_has_told_nobody(start: Any) -> None:
    ranks = start("works")
    told: list[str] = []
    ranks.watch(told.append)
    ranks.start(500)

    ranks.close()

    with pytest.raises(RunnerLost, match="have been ended"):
        ranks.run(PLAN, lambda plan: None)
    assert told == []


def test_a_rank_that_hangs_is_ended_by_force(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_S", 0.0)
    ranks = start("hangs", num_ranks=2)
    ranks.start(500)
    ranks.run(PLAN, lambda plan: None)

    ranks.close()

    assert has_ended(ranks.process_ids[0])


# ---- who is lost ----


def watching(*, timeout_s: float | None = None) -> SimpleNamespace:
    watch = StepWatch((1, 2), timeout_s, 1.0)
    return SimpleNamespace(watch=watch, number=watch.begin())


def test_ranks_at_work_are_not_lost() -> None:
    case = watching()

    assert case.watch.fault(1e9) is None
    case.watch.note(1, Done(1, 5, None))
    case.watch.end(5, failed=False)
    assert case.watch.fault(2e9) is None
    assert not case.watch.is_together
    case.watch.note(2, Done(1, 5, None))
    assert case.watch.is_together


def test_a_rank_that_alone_fails_is_lost_once_the_others_had_time_to_fail() -> None:
    case = watching()
    case.watch.note(2, Done(1, 3, "ScriptedError"))

    assert case.watch.fault(100.0) is None
    assert case.watch.fault(100.0 + GRACE_S) is None
    fault = case.watch.fault(100.1 + GRACE_S)
    assert fault == "rank 2 failed in a step that others have not left, or not at the same place"


@pytest.mark.parametrize("has_begun_another", [False, True])
def test_a_rank_that_fails_where_rank_0_did_not_is_lost_at_once(has_begun_another: bool) -> None:
    case = watching()
    case.watch.end(5, failed=False)
    if has_begun_another:
        case.watch.begin()
    case.watch.note(2, Done(1, 5, "ScriptedError"))

    assert case.watch.fault(0.0) == "rank 2 failed in a step that rank 0 did not: ScriptedError"


def test_ranks_that_fail_at_one_place_are_together() -> None:
    case = watching()
    case.watch.end(3, failed=True)
    case.watch.note(1, Done(1, 3, "ScriptedError"))
    assert case.watch.fault(0.0) is None
    case.watch.note(2, Done(1, 3, "ScriptedError"))

    assert case.watch.is_together
    assert case.watch.fault(1e9) is None
    assert case.watch.begin() == 2
    assert case.watch.fault(2e9) is None


def test_a_rank_that_stays_behind_is_lost_after_the_timeout() -> None:
    case = watching(timeout_s=3.0)
    case.watch.note(1, Done(1, 5, None))
    faults = [case.watch.fault(float(now)) for now in range(6)]

    assert faults == [None] * 4 + ["rank 2 has been at one step for 3 s"] * 2


def test_ranks_that_wait_for_a_step_have_no_timeout() -> None:
    case = watching(timeout_s=3.0)
    for rank in (1, 2):
        case.watch.note(rank, Done(1, 5, None))

    assert [case.watch.fault(float(now)) for now in range(9)] == [None] * 9
