"""What a soak calls flat."""

from __future__ import annotations

import pytest
from benchmarks.lib.process_samples import ProcessSample
from benchmarks.lib.soak_probe import Probe
from benchmarks.lib.soak_verdict import drift_of, growth_of
from benchmarks.soak import Tally, problems_of

IDLE = ProcessSample(rss_mib=100.0, pss_mib=90.0, num_threads=9, num_files=20, num_children=2)
DRAINED = {"answers": {"whole": 12, "error": 0, "cut": 0, "none": 0}, "exit_code": 0}


def sample(rss_mib: float, **fields: int) -> ProcessSample:
    counts = {"num_threads": 9, "num_files": 20, "num_children": 2, **fields}
    return ProcessSample(rss_mib=rss_mib, pss_mib=rss_mib, **counts)


def tally(**changes: object) -> Tally:
    """Thirty quiet moments, with some changes."""
    quiet = Tally(
        probes=[Probe(at_s=2.0 * i, ttft_ms=50.0, tpot_ms=5.0, spin_ms=8.0) for i in range(30)],
        samples=[(2.0 * i, sample(100.0)) for i in range(30)],
        idle=[IDLE, IDLE],
        drained=DRAINED,
    )
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet


def test_growth_compares_the_medians_of_the_outer_thirds() -> None:
    assert growth_of([100, 100, 999, 50, 50, 50, 103, 103, 103]) == pytest.approx(0.03)


def test_one_slow_moment_is_no_drift() -> None:
    times = [float(i) for i in range(30)]
    values = [10.0] * 30
    values[25] = 1000.0

    drift = drift_of(times, values)

    assert (drift.ratio, drift.slope_per_hour) == (1.0, 0.0)


def test_a_steady_rise_has_its_slope() -> None:
    times = [60.0 * i for i in range(30)]
    values = [100.0 + i for i in range(30)]

    drift = drift_of(times, values)

    assert drift.ratio > 1.15
    assert drift.slope_per_hour == pytest.approx(60 / 114.5)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        growth_of([1.0, 2.0])


def test_a_quiet_run_has_no_problems() -> None:
    assert problems_of(tally(), is_long=True)[0] == []


def test_memory_that_grows_is_a_problem() -> None:
    samples = [(2.0 * i, sample(100.0 + i)) for i in range(30)]

    [problem] = problems_of(tally(samples=samples), is_long=True)[0]

    assert "resident memory grew" in problem


def test_a_server_that_slows_down_is_a_problem_and_a_machine_is_none() -> None:
    slower = [Probe(2.0 * i, 50.0, 5.0 + i, 8.0) for i in range(30)]
    machine = [Probe(2.0 * i, 50.0, 5.0 + i, 5.0 + i) for i in range(30)]
    neighbours = [Probe(2.0 * i, 50.0, 5.0 + i, 8.0, slowdown=5.0 + i) for i in range(30)]

    assert len(problems_of(tally(probes=slower), is_long=True)[0]) == 1
    assert problems_of(tally(probes=machine), is_long=True)[0] == []
    assert problems_of(tally(probes=neighbours), is_long=True)[0] == []


def test_what_is_slower_on_another_machine_is_told_and_not_judged() -> None:
    """Waits in queues grow faster than what they wait for."""
    queueing = tally(probes=[Probe(2.0 * i, 50.0 * (1 + i) ** 2, 5.0, 8.0 + i) for i in range(30)])

    problems, figures = problems_of(queueing, is_long=True)

    assert problems == []
    assert figures["machine_ratio"] > 2
    [told] = queueing.not_judged
    assert "ttft_ms went from" in told


@pytest.mark.parametrize("name", ["num_files", "num_threads", "num_children"])
def test_what_is_left_at_the_end_is_a_problem(name: str) -> None:
    end = sample(100.0, **{name: 30})

    [problem] = problems_of(tally(idle=[IDLE, end]), is_long=True)[0]

    assert name in problem


@pytest.mark.parametrize(
    "drained",
    [
        {"answers": {"whole": 11, "error": 1}, "exit_code": 0},
        {"answers": {"whole": 11, "cut": 1}, "exit_code": 0},
        {"answers": {"whole": 12}, "exit_code": 1},
        {"answers": {"whole": 12}, "exit_code": None},
    ],
)
def test_a_request_that_sigterm_cost_is_a_problem(drained: dict[str, object]) -> None:
    [problem] = problems_of(tally(drained=drained), is_long=True)[0]

    assert "SIGTERM" in problem
