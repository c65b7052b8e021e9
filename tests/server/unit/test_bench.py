"""A load's figures are those that its clients saw, counted from when requests were due."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sortserve.cli import main
from sortserve.commands.bench_curve import curve_text, point_of
from sortserve.commands.bench_figures import Bounds, Seen, figures, figures_text, percentiles
from sortserve.commands.bench_load import arrivals, prompts
from support.http_service import listening, make_service


def seen(*token_times_s: float, due_s: float = 0.0, **more: Any) -> Seen:
    return Seen(due_s=due_s, token_times_s=list(token_times_s), **more)


def summed(*records: Seen, wall_s: float = 2.0, bounds: Bounds | None = None) -> Any:
    return figures(list(records), wall_s=wall_s, cpu_s=0.5, bounds=bounds or Bounds())


def test_the_times_of_one_answer() -> None:
    one = seen(1.5, 1.75, 2.5, due_s=1.0)

    assert (one.ttft_s, one.tpot_s, one.e2e_s, one.itls_s) == (0.5, 0.5, 1.5, [0.25, 0.75])


def test_the_times_of_a_token_in_the_two_ways_that_load_tools_count_them() -> None:
    """TPOT is (E2E - TTFT) / (n - 1), NTPOT is E2E / n."""
    one = seen(1.5, 1.75, 2.5, due_s=1.0)

    assert one.tpot_s == (one.e2e_s - one.ttft_s) / 2
    assert one.ntpot_s == one.e2e_s / 3
    assert summed(one)["ntpot_ms"]["p50"] == pytest.approx(500.0)


def test_a_load_that_was_refused_whole_met_nothing() -> None:
    values = summed(seen(error="E: no"), bounds=Bounds(latency_ms=600))

    assert (values["met_of_arrivals"], values["met_of_answers"]) == (0.0, None)
    assert "0.0% of all requests, - of those answered" in figures_text(values)


def test_a_single_token_has_no_time_per_further_token() -> None:
    values = summed(seen(0.5))

    assert seen(0.5).tpot_s is None
    assert values["tpot_ms"] is None
    assert values["itl_ms"] is None
    assert values["ttft_ms"]["p99"] == 500.0


def test_percentiles_are_interpolated_linearly() -> None:
    assert percentiles([float(value) for value in range(101)]) == {
        "mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0,
    }  # fmt: skip
    assert percentiles([4.0]) == {"mean": 4.0, "p50": 4.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert percentiles([]) is None


def test_throughput_counts_whole_answers_alone() -> None:
    values = summed(seen(0.5, 1.0), seen(0.5, 0.6, 0.7, error="StreamError: it broke"))

    assert values["num_failed"] == 1
    assert values["requests_per_s"] == 0.5
    assert values["output_tokens_per_s"] == 1.0
    assert values["errors"] == {"StreamError: it broke": 1}
    assert values["generator_cpu_share"] == 0.25


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        (Bounds(latency_ms=1000), 2),
        (Bounds(latency_ms=999), 1),
        (Bounds(ttft_ms=300), 1),
        (Bounds(tpot_ms=400), 1),
        (Bounds(latency_ms=1000, ttft_ms=300), 1),
        (Bounds(latency_ms=1000, ttft_ms=100), 0),
    ],
)
def test_goodput_is_what_met_every_bound_on_the_clients_clock(bounds: Bounds, met: int) -> None:
    quick, slow = seen(0.25, 0.5), seen(0.5, 1.0, met=True)
    failed = seen(0.1, error="no", met=True)

    values = summed(quick, slow, failed, bounds=bounds)

    assert (values["met"], values["goodput_per_s"]) == (met, met / 2.0)
    assert values["met_of_arrivals"] == pytest.approx(met / 3)
    assert values["met_of_answers"] == pytest.approx(met / 2)
    assert values["met_says_server"] == 1


def test_an_answer_that_was_cut_at_its_deadline_is_in_time_but_is_no_answer() -> None:
    values = summed(seen(0.25, 0.5, is_cut=True, met=True), bounds=Bounds(latency_ms=600))

    assert (values["met"], values["num_cut"], values["met_says_server"]) == (0, 1, 1)
    assert "1 answers ended at their deadline" in figures_text(values)


def test_without_a_bound_there_is_no_goodput() -> None:
    values = summed(seen(0.25, 0.5))

    assert values["goodput_per_s"] is None
    assert "goodput" not in figures_text(values)


def test_the_text_tells_what_there_is() -> None:
    text = figures_text(
        summed(
            seen(0.25, 0.5, tokens_by_exit={24: 1, 30: 1}, met=True),
            *(seen(error=f"E{kind}: no") for kind in range(5)),
            bounds=Bounds(latency_ms=600),
        )
    )

    assert "6 requests in 2.0 s, 5 failed" in text
    assert "0.50 requests/s met the budget (1 of 6; the server says 1)" in text
    assert "exits       24 (1 tokens), 30 (1 tokens)" in text
    assert "  TTFT         250.0     250.0" in text
    assert "1 x E0: no" in text
    assert "and 2 other kinds of failures" in text


def test_a_load_that_failed_whole_is_told_without_times() -> None:
    text = figures_text(summed(seen(error="E: no")))

    assert "TTFT" not in text
    assert "1 x E: no" in text


def test_arrivals_are_repeatable_ascend_and_come_at_the_rate() -> None:
    times = arrivals(4.0, 4000, random.Random(0))

    assert times == arrivals(4.0, 4000, random.Random(0))
    assert times[0] == 0.0
    assert all(early < late for early, late in itertools.pairwise(times))
    assert 4000 / times[-1] == pytest.approx(4.0, rel=0.1)


def test_prompts_have_their_length_differ_and_are_of_known_tokens() -> None:
    some = list(itertools.islice(prompts(range(50), 16, random.Random(0)), 20))

    assert {len(prompt) for prompt in some} == {16}
    assert len({tuple(prompt) for prompt in some}) == 20
    assert set().union(*some) <= set(range(50))


# against the real HTTP service


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = make_service()
    with listening(service.app) as url:
        yield url
    service.worker.stop()


def test_a_load_of_waiting_clients_is_answered_and_told(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--clients=3", "--num-requests=7", "--warmup=1", "--prompt-tokens=5"]
    flags += ["--max-tokens=4", "--exit=4", "--temperature=0", "--json"]

    assert main(["bench", "--url", url, *flags]) == 0

    values = json.loads(capsys.readouterr().out)
    assert (values["num_requests"], values["num_failed"]) == (7, 0)
    assert values["num_prompt_tokens"] == 7 * 5
    assert values["num_output_tokens"] == 7 * 4
    assert values["tokens_by_exit"] == {"4": 28}
    assert values["goodput_per_s"] is None


def test_a_load_that_comes_at_its_own_rate_is_answered_and_told(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rate=500", "--num-requests=6", "--warmup=0", "--prompt-tokens=3"]

    assert main(["bench", "--url", url, *flags, "--max-tokens=2", "--budget-ms=60000"]) == 0

    shown = capsys.readouterr().out
    assert shown.startswith("6 requests in ")
    assert "(6 of 6; the server says 6)" in shown


def test_requests_that_the_server_refuses_are_failures_and_a_load_of_them_is_exit_code_1(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num-requests=3", "--warmup=0", "--prompt-tokens=3", "--exit=5"]

    assert main(["bench", "--url", url, *flags]) == 1

    shown = capsys.readouterr().out
    assert "3 requests in " in shown
    assert "3 x BadRequestError: budget.exit_layer=5" in shown


def test_a_curve_has_a_line_for_each_exit_and_a_point_for_each_crowd(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--curve=2,1", "--num-requests=3", "--warmup=0", "--prompt-tokens=4"]
    flags += ["--max-tokens=4", "--json", f"--plot={tmp_path / 'curve.svg'}"]

    assert main(["bench", "--url", url, *flags]) == 0

    points = json.loads(capsys.readouterr().out)["points"]
    assert [(p["exit_layer"], p["num_clients"]) for p in points] == [
        *((2, 1), (2, 2)),
        *((4, 1), (4, 2)),
        *((6, 1), (6, 2)),
    ]
    assert [p["num_requests"] for p in points] == [3, 4] * 3
    assert all(p["num_failed"] == 0 for p in points)
    assert all(p["tokens_per_s"] > 0 for p in points)
    drawn = (tmp_path / "curve.svg").read_text()
    assert [name for name in ("exit 2", "exit 4", "exit 6") if name not in drawn] == []


def test_a_point_of_a_curve_is_what_one_sees_and_what_all_get() -> None:
    values = summed(seen(0.5, 0.75, 1.0), seen(0.5, 0.75, 1.0))

    point = point_of(24, 2, values)

    assert (point["user_tokens_per_s"], point["tokens_per_s"]) == (4.0, 3.0)
    lines = curve_text([point, point_of(30, 1, summed(seen(error="no")))]).splitlines()
    assert lines[1].split() == ["24", "2", "4.0", "3.0", "500", "0"]
    assert lines[2].split() == ["30", "1", "-", "0.0", "-", "1"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--curve=1,2", "--rate=1"], "--rate and --curve exclude each other"),
        (["--curve=1,0"], "each number must be above 0"),
        (["--curve=1,x"], "'x' is not an integer"),
        (["--plot=x.svg"], "--plot draws a curve"),
        (["--clients=2", "--rate=1"], "--clients and --rate exclude each other"),
        (["--clients=0"], "--clients 0 is not allowed: it must be above 0"),
        (["--rate=-1"], "--rate -1 is not allowed"),
        (["--num-requests=0"], "--num-requests 0 is not allowed"),
        (["--warmup=-1"], "--warmup -1 is not allowed"),
        (["--budget-ms=-1"], "budget.latency_ms=-1.0 is not allowed"),
    ],
)
def test_what_is_no_load_is_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:1", *flags]) == 2

    assert said in capsys.readouterr().err
