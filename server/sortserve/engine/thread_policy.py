"""How many threads a step uses, found by trying (no torch).

On a machine that other programs use, too, more threads can be slower than fewer: each of them waits
for a core, and the step waits for each of them. Neither the load average nor a thread's own
waiting tells beforehand which number is best. So now and then a few steps run with the next lower
or higher number, and their times, each divided by what the cost model expects of the step, are
compared with those of the steps before. A trial that turns out slow ends early, and what trials
lose is at most ``TRIAL_SHARE`` of the time.

    policy = ThreadPolicy(most=8)
    ...  # a step with policy.num_threads threads
    policy.observe(seconds / predicted_s, seconds, now)
"""

from __future__ import annotations

from collections import deque

__all__ = ["ThreadPolicy"]

WINDOW_STEPS = 12
"""Steps whose mean counts, in a trial as before it: one step says nothing on a busy machine."""
MIN_TRIAL_STEPS = 3
HOPELESS = 1.25
"""A trial whose mean is so many times that of the steps before ends after ``MIN_TRIAL_STEPS``."""
MIN_GAIN = 0.07
"""The share of time that another number of threads must save to be taken: hysteresis."""
MIN_REST_S = 0.5
MAX_REST_S = 10.0
"""Between two trials; every failed one doubles the rest, every change begins anew."""
WORSE = 1.2
"""Steps that take so many times what they took at the last decision end the rest: the machine has
changed."""
TRIAL_SHARE = 0.02


class ThreadPolicy:
    """Owns the number of threads of an engine.

    Args:
        most: threads that may be used, 1 or more; it begins with all of them.
    """

    def __init__(self, most: int) -> None:
        assert most >= 1
        self._levels = _halves(most)
        self._level = 0
        self._trial: int | None = None
        self._is_upwards = False
        """Which way the next trial goes, where there are two."""
        self._steady: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._tried: list[float] = []
        self._lost_s = 0.0
        self._decided: float | None = None
        self._rest_s = MIN_REST_S
        self._next_trial_s: float | None = None
        self._forbidden_until_s = float("-inf")

    @property
    def num_threads(self) -> int:
        """What the next step should use."""
        return self._levels[self._level if self._trial is None else self._trial]

    @property
    def settled(self) -> int:
        """What it uses when it tries nothing."""
        return self._levels[self._level]

    def observe(self, ratio: float, seconds: float, now: float) -> None:
        """A step has run with ``num_threads``.

        Args:
            ratio: its time as a multiple of what was expected.
            seconds: its time.
            now: when it ended, on a monotonic clock.
        """
        if len(self._levels) == 1:
            return
        if self._trial is None:
            self._observe_steady(ratio, now)
        else:
            self._observe_trial(ratio, seconds, now)

    def _observe_steady(self, ratio: float, now: float) -> None:
        self._steady.append(ratio)
        if self._next_trial_s is None:
            self._next_trial_s = now + self._rest_s
        if len(self._steady) < WINDOW_STEPS:
            return
        mean = _mean(self._steady)
        if self._decided is None:
            self._decided = mean
        is_due = now >= self._next_trial_s or mean > WORSE * self._decided
        if is_due and now >= self._forbidden_until_s:
            self._begin_trial()

    def _begin_trial(self) -> None:
        lowest = len(self._levels) - 1
        if self._level == 0:
            self._trial = 1
        elif self._level == lowest:
            self._trial = lowest - 1
        else:
            self._trial = self._level + (-1 if self._is_upwards else 1)
        self._tried = []
        self._lost_s = 0.0

    def _observe_trial(self, ratio: float, seconds: float, now: float) -> None:
        self._tried.append(ratio)
        before, tried = _mean(self._steady), _mean(self._tried)
        self._lost_s += seconds * (1 - before / ratio)
        num_steps = len(self._tried)
        is_hopeless = num_steps >= MIN_TRIAL_STEPS and tried > HOPELESS * before
        if num_steps < WINDOW_STEPS and not is_hopeless:
            return
        assert self._trial is not None
        if not is_hopeless and tried < (1 - MIN_GAIN) * before:
            self._level = self._trial
            self._steady = deque(self._tried, maxlen=WINDOW_STEPS)
            self._rest_s = MIN_REST_S
            self._decided = tried
        else:
            self._is_upwards = not self._is_upwards
            self._rest_s = min(2 * self._rest_s, MAX_REST_S)
            self._decided = before
        self._trial = None
        self._next_trial_s = now + self._rest_s
        self._forbidden_until_s = now + max(self._lost_s, 0.0) / TRIAL_SHARE


def _halves(most: int) -> list[int]:
    """From most to 1, each about half of the one before."""
    levels = [most]
    while levels[-1] > 1:
        levels.append((levels[-1] + 1) // 2 if levels[-1] > 2 else 1)
    return levels


def _mean(values: deque[float] | list[float]) -> float:
    return sum(values) / len(values)
