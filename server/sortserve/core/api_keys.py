"""What an API key may do: its name, its limits, its depth and what its requests are worth (no I/O).

A key is known by its SHA-256. Nothing slower is needed: slow hashes make guessing dear where
secrets are few enough to be guessed, as passwords are; a key is 256 random bits, of which nobody
tries a noticeable share at any speed, and a slow hash on every request would be a way to keep the
server busy.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from sortserve.core.ranges import Range, integers
from sortserve.core.weights import PRIORITY, KeyWeights

__all__ = [
    "LIMIT",
    "MAX_KEYS",
    "NAME_PATTERN",
    "UNNAMED_KEY",
    "KeyObserver",
    "KeyPolicy",
    "key_digest",
    "new_key",
    "weights_for",
]

LIMIT: Range = integers(1, 2**31 - 1)
"""What a limit of a key may be."""
MAX_KEYS = 1000
"""Names that a file may have: each is a label of several metrics."""
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}"
"""What a key's name may look like: it is a label of metrics, and stands in replies."""
UNNAMED_KEY = "other"
"""How metrics call all keys that have no name."""
PREFIX = "sk-"


@dataclass(frozen=True, kw_only=True)
class KeyPolicy:
    """Who a key belongs to, and what its requests may take. None: no limit of its own."""

    name: str = ""
    """In metrics and messages; empty for keys that were given without one."""
    digests: tuple[str, ...] = ()
    """SHA-256 of each of its keys, in hexadecimal: two while one takes over from another."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output tokens together, cached ones included."""
    max_concurrency: int | None = None
    """Requests under way at once."""
    max_exit_layer: int | None = None
    """The deepest exit; an exit of the checkpoint."""
    default_priority: int = 0
    """Of requests that name none; lower is earlier."""
    weights: KeyWeights = field(default_factory=KeyWeights)
    """What its requests are worth beside others."""

    def __post_init__(self) -> None:
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrency)
        assert all(limit is None or limit in LIMIT for limit in limits)
        assert self.default_priority in PRIORITY

    @property
    def account(self) -> str:
        """What its use is counted under: its name, or the key's own digest."""
        return f"name {self.name}" if self.name else f"key {self.digests[0]}"


class KeyObserver:
    """Who is told of the use of keys; this one does nothing about it.

    ``name`` is one of the last ``on_names``, or ``UNNAMED_KEY``.
    """

    def on_names(self, names: Iterable[str]) -> None:
        """These are the names from now on."""

    def on_begun(self, name: str) -> None:
        """A request was let in."""

    def on_limited(self, name: str, limit: str) -> None:
        """A request was refused for a limit of its key."""

    def on_ended(self, name: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request that was let in is over."""

    def on_reloaded(self, outcome: str) -> None:
        """The file of keys was read anew: ``ok``, or ``failed`` and the old keys stay."""


def key_digest(key: str | bytes) -> str:
    """What stands for a key wherever the key itself is not needed: its SHA-256, hexadecimal."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def new_key() -> str:
    """A key of 256 random bits, in letters, digits, dashes and underscores."""
    return PREFIX + secrets.token_urlsafe(32)


def weights_for(max_priority: int | None, *, base: float) -> KeyWeights:
    """The most that a key's requests weigh, where none may go before a given priority.

    A service tier is another way to weigh more, so it is the weight that is bounded: by that of a
    request of the tier ``default`` at this priority.

    Args:
        max_priority: in ``PRIORITY``; None: no bound.
        base: a priority of one less weighs so many times as much.
    """
    if max_priority is None:
        return KeyWeights()
    return KeyWeights(most=min(1e3, max(1e-3, base**-max_priority)))
