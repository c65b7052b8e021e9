"""Limits per minute as token buckets: pure functions on plain values, ``now`` passed in.

A bucket holds at most what a minute allows and fills steadily, so that many a second as a minute
has, divided by sixty. Of the usual two, a sliding window and this, it is this one because

* its state is two numbers, where an exact window keeps every request of the last minute;
* it has no edge of a minute at which a client may ask twice as much at once, as a fixed window has;
* what was charged on trust can be corrected when the use is known: a level is simply moved, and it
  may go below zero, a debt that is paid by waiting;
* it says exactly when to come back.

What it bounds: in any ``s`` seconds no more than ``limit + limit * s / 60`` is let in, beside the
debt of what turned out larger than it was taken for.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "Bucket",
    "corrected",
    "duration_text",
    "full",
    "refilled",
    "reset_s",
    "resized",
    "wait_s",
]

MINUTE_S = 60.0


class Bucket(NamedTuple):
    """What is left of a limit, at a time."""

    level: float
    """At most the limit; below zero it is a debt."""
    at_s: float
    """Seconds on a clock that never goes back."""


def full(limit: int, now: float) -> Bucket:
    """The bucket of somebody who has used nothing yet."""
    return Bucket(float(limit), now)


def refilled(bucket: Bucket, limit: int, now: float) -> Bucket:
    """The bucket as it is now. A clock that goes back fills nothing, and takes nothing away."""
    passed_s = max(0.0, now - bucket.at_s)
    level = min(float(limit), bucket.level + passed_s * limit / MINUTE_S)
    return Bucket(level, max(now, bucket.at_s))


def wait_s(bucket: Bucket, limit: int, amount: float) -> float:
    """Seconds until ``amount`` may be taken; 0: now.

    More than the whole limit may be taken from a full bucket: the debt keeps the rate, and no
    request is one that could never be let in.
    """
    missing = min(amount, limit) - bucket.level
    return max(0.0, missing) * MINUTE_S / limit


def reset_s(bucket: Bucket, limit: int) -> float:
    """Seconds until it is full."""
    return (limit - bucket.level) * MINUTE_S / limit


def corrected(bucket: Bucket, limit: int, more: float) -> Bucket:
    """The bucket after ``more`` was used; what is negative is given back, up to the limit."""
    return Bucket(min(float(limit), bucket.level - more), bucket.at_s)


def resized(bucket: Bucket, old: int, new: int) -> Bucket:
    """The bucket under another limit: what was used stays used."""
    return Bucket(min(float(new), new - (old - bucket.level)), bucket.at_s)


def duration_text(seconds: float) -> str:
    """A time as OpenAI writes it in headers: ``20ms``, ``8.64s``, ``6m0s``, ``1h2m3s``."""
    if (milliseconds := round(seconds * 1e3)) < 1000:
        return f"{milliseconds}ms"
    if (hundredths := round(seconds, 2)) < 60:
        return f"{hundredths:g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
