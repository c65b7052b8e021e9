"""The books of the API keys: who may ask, and what each has used (no torch, no HTTP).

The rules are pure functions of ``core.rate_limits``; here is the state. It belongs to one thread,
that of the event loop.
"""

from __future__ import annotations

import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sortserve.core import rate_limits
from sortserve.core.api_keys import UNNAMED_KEY, KeyObserver, KeyPolicy, key_digest
from sortserve.core.errors import RateLimitError
from sortserve.core.rate_limits import Bucket

__all__ = ["KeyLedger", "KeyUse"]

BUSY_RETRY_S = 1.0
"""When to come back while too many requests are under way: when one ends is not known."""
Usage = Callable[[], tuple[int, int]]
"""Prompt and output tokens so far."""


@dataclass
class _Account:
    """What one name has used."""

    policy: KeyPolicy
    requests: Bucket | None
    tokens: Bucket | None
    num_running: int = 0

    @property
    def name(self) -> str:
        return self.policy.name or UNNAMED_KEY


class KeyLedger:
    """All keys and their use.

    Args:
        policies: of all keys; none: no key opens anything.
        clock: seconds that never go back.
        observer: told of the use.
    """

    def __init__(
        self,
        policies: Iterable[KeyPolicy] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        observer: KeyObserver | None = None,
    ) -> None:
        self._clock = clock
        self._observer = observer or KeyObserver()
        self._secret = secrets.token_bytes(32)
        self._accounts: dict[str, _Account] = {}
        """By ``KeyPolicy.account``; those of keys that are gone stay while requests run."""
        self._by_key: dict[bytes, tuple[str, str]] = {}
        """Digest and account under a keyed hash: where a look-up stops tells no digest."""
        self._known: frozenset[str] = frozenset()
        """Accounts that a key opens now."""
        self._open: set[KeyUse] = set()
        self.replace(policies)

    # ---- keys ----

    def replace(self, policies: Iterable[KeyPolicy]) -> None:
        """Take other keys from now on. What a name has used stays used, and what runs goes on."""
        self.policies = policies = tuple(policies)
        now = self._clock()
        self._by_key = {
            self._place(digest): (digest, policy.account)
            for policy in policies
            for digest in policy.digests
        }
        self._known = frozenset(policy.account for policy in policies)
        old = self._accounts
        self._accounts = {p.account: _account(p, old.get(p.account), now) for p in policies}
        self._accounts |= {
            key: account
            for key, account in old.items()
            if key not in self._accounts and account.num_running
        }
        self._tell_names()

    def find(self, key: bytes) -> tuple[str, KeyPolicy] | None:
        """The digest of a key and what it may do; None: it is none of ours."""
        given = key_digest(key)
        known, account = self._by_key.get(self._place(given), (given[::-1], ""))
        if not hmac.compare_digest(known, given) or not account:
            return None
        return known, self._accounts[account].policy

    def _place(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")

    # ---- use ----

    def begin(self, policy: KeyPolicy) -> KeyUse:
        """Let one request in; the caller closes what it gets, whatever happens.

        Raises:
            RateLimitError: the key is over a limit of requests; nothing was taken.
        """
        account = self._accounts[policy.account]
        most = policy.max_concurrency
        if most is not None and account.num_running >= most:
            raise self._refusal(account, "max_concurrency", most, "", BUSY_RETRY_S)
        account.requests = self._taken(account, account.requests, "requests_per_minute", 1)
        account.num_running += 1
        use = KeyUse(self, account)
        self._open.add(use)
        self._observer.on_begun(account.name)
        return use

    def state(self, policy: KeyPolicy) -> Mapping[str, str]:
        """How a key stands, as headers in OpenAI's names."""
        account = self._accounts.get(policy.account)
        headers: dict[str, str] = {}
        for kind, bucket, limit in () if account is None else _limits(account):
            if bucket is not None and limit is not None:
                bucket = rate_limits.refilled(bucket, limit, self._clock())
                left, reset_s = max(0, math.floor(bucket.level)), rate_limits.reset_s(bucket, limit)
                headers[f"x-ratelimit-limit-{kind}"] = str(limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(left)
                headers[f"x-ratelimit-reset-{kind}"] = rate_limits.duration_text(reset_s)
        return headers

    def _taken(
        self, account: _Account, bucket: Bucket | None, name: str, amount: int
    ) -> Bucket | None:
        """The bucket after an amount was taken from it, if it is there."""
        limit: int | None = getattr(account.policy, name)
        if bucket is None or limit is None:
            return None
        bucket = rate_limits.refilled(bucket, limit, self._clock())
        wait_s = rate_limits.wait_s(bucket, limit, amount)
        if wait_s > 0:
            left = max(0, math.floor(bucket.level))
            raise self._refusal(account, name, limit, f", left {left}, needed {amount}", wait_s)
        return rate_limits.corrected(bucket, limit, amount)

    def _charge(self, account: _Account, amount: int) -> None:
        account.tokens = self._taken(account, account.tokens, "tokens_per_minute", amount)

    def _refusal(
        self, account: _Account, name: str, limit: int, more: str, wait_s: float
    ) -> RateLimitError:
        self._observer.on_limited(account.name, name)
        whose = f"API key {account.policy.name}" if account.policy.name else "API key"
        return RateLimitError(
            f"This {whose} is over its {name}: limit {limit}{more}. "
            f"Come back in {max(1, math.ceil(wait_s))} s.",
            retry_after_s=wait_s,
        )

    def refuse_exit(self, policy: KeyPolicy) -> None:
        """Count a request that was refused because it named an exit deeper than its key's."""
        self._observer.on_limited(policy.name or UNNAMED_KEY, "max_exit_layer")

    def _close(self, use: KeyUse, account: _Account, charged: int, used: tuple[int, int]) -> None:
        self._open.remove(use)
        account.num_running -= 1
        limit = account.policy.tokens_per_minute
        if account.tokens is not None and limit is not None:
            bucket = rate_limits.refilled(account.tokens, limit, self._clock())
            account.tokens = rate_limits.corrected(bucket, limit, sum(used) - charged)
        self._observer.on_ended(account.name, *used)
        key = account.policy.account
        if not account.num_running and key not in self._known:
            self._accounts.pop(key, None)
            self._tell_names()

    def _tell_names(self) -> None:
        names = {account.policy.name for account in self._accounts.values()}
        self._observer.on_names(sorted(names - {""}))

    # ---- checks ----

    def check_invariants(self) -> None:
        """What must hold between two calls.

        Raises:
            AssertionError: it does not.
        """
        running: dict[int, int] = {}
        for use in self._open:
            running[id(use.account)] = running.get(id(use.account), 0) + 1
        now = self._clock()
        accounts = {id(a): a for a in self._accounts.values()}
        assert running.keys() <= accounts.keys(), "a request runs on no account"
        for key, account in accounts.items():
            assert account.num_running == running.get(key, 0), "requests under way are miscounted"
            for kind, bucket, limit in _limits(account):
                assert (bucket is None) == (limit is None), f"a limit of {kind} without its bucket"
                if bucket is not None and limit is not None:
                    assert bucket.level <= limit, f"more {kind} left than the limit"
                    assert bucket.at_s <= now, "a bucket of the future"
        assert {account for _, account in self._by_key.values()} <= self._known
        assert self._known <= self._accounts.keys(), "a key without an account"
        for name, account in self._accounts.items():
            assert name in self._known or account.num_running, "an account that nobody needs"


class KeyUse:
    """One request of a key, from its arrival to its end."""

    def __init__(self, ledger: KeyLedger, account: _Account) -> None:
        self._ledger = ledger
        self.account = account
        self._charged = 0
        self._read_usage: Usage | None = None
        self._is_closed = False

    @property
    def policy(self) -> KeyPolicy:
        """What the key may do now."""
        return self.account.policy

    def charge(self, num_tokens: int) -> None:
        """Take the tokens that the request is expected to need.

        Raises:
            RateLimitError: they are more than the key has left; nothing was taken.
        """
        self._ledger._charge(self.account, num_tokens)
        if self.account.tokens is not None:
            self._charged += num_tokens

    def watch(self, read_usage: Usage) -> None:
        """Correct the charge at the end by what was used: the request runs now."""
        self._read_usage = read_usage

    def refuse_exit(self) -> None:
        """Count that it named a deeper exit than it may have."""
        self._ledger.refuse_exit(self.policy)

    def close(self) -> None:
        """End it: a request that never ran has used no tokens. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            used = (0, 0) if self._read_usage is None else self._read_usage()
            self._ledger._close(self, self.account, self._charged, used)


def _limits(account: _Account) -> tuple[tuple[str, Bucket | None, int | None], ...]:
    policy = account.policy
    return (
        ("requests", account.requests, policy.requests_per_minute),
        ("tokens", account.tokens, policy.tokens_per_minute),
    )


def _account(policy: KeyPolicy, old: _Account | None, now: float) -> _Account:
    """The account of a key; of one that is there already, its use goes on under the new limits."""
    if old is None:
        return _Account(
            policy,
            requests=_bucket(None, None, policy.requests_per_minute, now),
            tokens=_bucket(None, None, policy.tokens_per_minute, now),
        )
    before = old.policy
    old.requests = _bucket(
        old.requests, before.requests_per_minute, policy.requests_per_minute, now
    )
    old.tokens = _bucket(old.tokens, before.tokens_per_minute, policy.tokens_per_minute, now)
    old.policy = policy
    return old


def _bucket(bucket: Bucket | None, old: int | None, new: int | None, now: float) -> Bucket | None:
    if new is None:
        return None
    if bucket is None or old is None:
        return rate_limits.full(new, now)
    return rate_limits.resized(rate_limits.refilled(bucket, old, now), old, new)
