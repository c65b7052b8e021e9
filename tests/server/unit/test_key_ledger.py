"""The books of API keys: limits, corrections, other keys while requests run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sortserve.admission.key_ledger import KeyLedger, KeyUse
from sortserve.core.api_keys import KeyObserver, KeyPolicy, key_digest, new_key, weights_for
from sortserve.core.errors import RateLimitError
from sortserve.core.weights import WeightRules

ALICE = KeyPolicy(name="alice", digests=(key_digest("a-key"),))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Told(KeyObserver):
    """What an observer was told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.limited: list[tuple[str, str]] = []
        self.used: list[tuple[str, int, int]] = []

    def on_names(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def on_limited(self, name: str, limit: str) -> None:
        self.limited.append((name, limit))

    def on_ended(self, name: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.used.append((name, num_prompt_tokens, num_output_tokens))


def ledger_of(*policies: KeyPolicy) -> tuple[KeyLedger, Clock, Told]:
    clock, told = Clock(), Told()
    return KeyLedger(policies, clock=clock, observer=told), clock, told


def test_a_key_is_found_by_its_bytes_and_by_nothing_else() -> None:
    ledger, _, _ = ledger_of(ALICE)

    assert ledger.find(b"a-key") == (key_digest("a-key"), ALICE)
    for other in (b"", b"a-ke", b"a-key ", b"A-key", key_digest("a-key").encode()):
        assert ledger.find(other) is None


def test_two_keys_of_one_name_share_its_limits() -> None:
    policy = replace(ALICE, digests=(key_digest("old"), key_digest("new")), requests_per_minute=2)
    ledger, _, _ = ledger_of(policy)
    for key in (b"old", b"new"):
        found = ledger.find(key)
        assert found is not None
        ledger.begin(found[1]).close()

    with pytest.raises(RateLimitError):
        ledger.begin(policy)


def test_requests_a_minute_are_refused_with_the_time_to_come_back() -> None:
    policy = replace(ALICE, requests_per_minute=30)
    ledger, clock, told = ledger_of(policy)
    for _ in range(30):
        ledger.begin(policy).close()

    with pytest.raises(RateLimitError) as refused:
        ledger.begin(policy)
    assert refused.value.retry_after_s == pytest.approx(2.0)
    assert "alice" in refused.value.message
    assert "requests_per_minute: limit 30" in refused.value.message
    assert told.limited == [("alice", "requests_per_minute")]

    clock.now += 2.0
    ledger.begin(policy).close()
    ledger.check_invariants()


def test_a_refused_request_takes_nothing() -> None:
    policy = replace(ALICE, requests_per_minute=1, max_concurrency=1)
    ledger, clock, _ = ledger_of(policy)
    first = ledger.begin(policy)
    clock.now += 60
    with pytest.raises(RateLimitError, match="max_concurrency: limit 1"):
        ledger.begin(policy)

    first.close()

    ledger.begin(policy)
    ledger.check_invariants()


def test_a_place_is_given_back_once_however_often_a_use_is_closed() -> None:
    policy = replace(ALICE, max_concurrency=2)
    ledger, _, _ = ledger_of(policy)
    first, _second = ledger.begin(policy), ledger.begin(policy)
    first.close()
    first.close()
    ledger.begin(policy)

    with pytest.raises(RateLimitError):
        ledger.begin(policy)
    ledger.check_invariants()


def left(ledger: KeyLedger, policy: KeyPolicy, kind: str = "tokens") -> int:
    return int(ledger.state(policy)[f"x-ratelimit-remaining-{kind}"])


def test_tokens_are_charged_on_trust_and_corrected_by_what_was_used() -> None:
    policy = replace(ALICE, tokens_per_minute=1000)
    ledger, _, told = ledger_of(policy)
    use = ledger.begin(policy)
    use.charge(700)
    assert left(ledger, policy) == 300

    use.watch(lambda: (40, 60))
    use.close()

    assert left(ledger, policy) == 900
    assert told.used == [("alice", 40, 60)]


def test_tokens_that_were_never_used_come_back_whole() -> None:
    policy = replace(ALICE, tokens_per_minute=1000)
    ledger, _, told = ledger_of(policy)
    use = ledger.begin(policy)
    use.charge(700)

    use.close()

    assert left(ledger, policy) == 1000
    assert told.used == [("alice", 0, 0)]


def test_what_turned_out_longer_than_charged_is_a_debt() -> None:
    policy = replace(ALICE, tokens_per_minute=600)
    ledger, _, _ = ledger_of(policy)
    use = ledger.begin(policy)
    use.charge(100)
    use.watch(lambda: (0, 660))
    use.close()

    with pytest.raises(RateLimitError, match=r"left 0, needed 10") as refused:
        ledger.begin(policy).charge(10)

    assert refused.value.retry_after_s == pytest.approx(7.0)  # 60 of debt and 10, at 10 a second


def test_the_state_is_told_in_openais_headers() -> None:
    policy = replace(ALICE, requests_per_minute=60, tokens_per_minute=6000)
    ledger, clock, _ = ledger_of(policy)
    ledger.begin(policy).charge(1500)
    clock.now += 0.5

    assert ledger.state(policy) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "500ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "4550",
        "x-ratelimit-reset-tokens": "14.5s",
    }
    assert ledger.state(ALICE) != {}, "a policy from before a reload means the account of now"


def test_a_key_without_limits_has_no_such_headers() -> None:
    ledger, _, _ = ledger_of(ALICE)

    assert ledger.state(ALICE) == {}


# Other keys while requests run.


def test_a_new_limit_counts_at_once_and_forgets_nothing() -> None:
    policy = replace(ALICE, tokens_per_minute=1000)
    ledger, _, _ = ledger_of(policy)
    ledger.begin(policy).charge(400)

    wider = replace(policy, tokens_per_minute=2000)
    ledger.replace([wider])
    assert left(ledger, wider) == 1600

    ledger.replace([ALICE])
    assert ledger.state(ALICE) == {}
    ledger.check_invariants()


def test_a_key_that_is_gone_opens_nothing_and_its_request_still_ends() -> None:
    policy = replace(ALICE, max_concurrency=1)
    ledger, _, told = ledger_of(policy)
    use = ledger.begin(policy)

    ledger.replace([])
    assert ledger.find(b"a-key") is None
    assert told.names == ["alice"], "it is told of until its last request is over"
    ledger.check_invariants()

    use.watch(lambda: (1, 2))
    use.close()
    assert told.used == [("alice", 1, 2)]
    assert told.names == []
    ledger.check_invariants()


def test_a_key_that_comes_back_has_not_lost_its_requests_under_way() -> None:
    policy = replace(ALICE, max_concurrency=1)
    ledger, _, _ = ledger_of(policy)
    ledger.begin(policy)
    ledger.replace([])

    ledger.replace([policy])

    with pytest.raises(RateLimitError):
        ledger.begin(policy)


def test_a_limit_that_comes_in_mid_request_pays_for_what_was_used() -> None:
    ledger, _, _ = ledger_of(ALICE)
    use = ledger.begin(ALICE)
    use.charge(50)
    limited = replace(ALICE, tokens_per_minute=1000)
    ledger.replace([limited])
    use.watch(lambda: (30, 70))

    use.close()

    assert left(ledger, limited) == 900


class Storm(RuleBasedStateMachine):
    """Any order of arrivals, ends, waits and reloads leaves the books in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.clock, _ = ledger_of(*self.policies(20, 1000, 3))
        self.open: list[KeyUse] = []

    @staticmethod
    def policies(requests: int | None, tokens: int | None, places: int | None) -> list[KeyPolicy]:
        names = ("a", "b", "")
        return [
            KeyPolicy(
                name=name,
                digests=(key_digest(f"key {name}"),),
                requests_per_minute=requests,
                tokens_per_minute=tokens,
                max_concurrency=places,
            )
            for name in names
        ]

    @rule(name=st.sampled_from(["a", "b", ""]), tokens=st.integers(0, 3000))
    def arrive(self, name: str, tokens: int) -> None:
        found = self.ledger.find(f"key {name}".encode())
        if found is None:
            return
        try:
            use = self.ledger.begin(found[1])
        except RateLimitError:
            return
        self.open.append(use)
        try:
            use.charge(tokens)
        except RateLimitError:
            self.open.pop().close()

    @precondition(lambda self: self.open)
    @rule(prompt=st.integers(0, 500), output=st.integers(0, 500), ran=st.booleans())
    def end(self, prompt: int, output: int, ran: bool) -> None:
        use = self.open.pop(0)
        if ran:
            use.watch(lambda: (prompt, output))
        use.close()

    @rule(seconds=st.floats(0, 90))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(
        limits=st.tuples(*[st.none() | st.integers(1, 2000)] * 3),
        count=st.integers(0, 3),
    )
    def reload(self, limits: tuple[int | None, int | None, int | None], count: int) -> None:
        self.ledger.replace(self.policies(*limits)[:count])

    @invariant()
    def books_are_in_order(self) -> None:
        self.ledger.check_invariants()


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# Keys and what they weigh.


def test_a_new_key_is_of_256_bits_and_no_two_are_alike() -> None:
    keys = {new_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(key.startswith("sk-") and len(key) == 46 and key.isascii() for key in keys)


@pytest.mark.parametrize("tier", [None, "default", "priority"])
def test_no_tier_lifts_a_request_above_its_keys_priority(tier: str | None) -> None:
    rules = WeightRules(priority_base=2.0)
    key = weights_for(1, base=2.0)

    assert rules.weigh(tier, -50, key).weight == 0.5
    assert rules.weigh(tier, 5, key).weight < 0.5
    assert rules.weigh(tier, -1, weights_for(None, base=2.0)).weight >= 2.0
