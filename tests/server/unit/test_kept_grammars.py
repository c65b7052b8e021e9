"""Compiled grammars are kept in a bounded number and a bounded size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sortserve.text.kept_grammars import MAX_KEPT, MAX_KEPT_BYTES, KeptGrammars, reckoned_bytes


def test_the_one_that_nobody_has_asked_for_the_longest_goes_first() -> None:
    kept: KeptGrammars[int] = KeptGrammars()
    for i in range(MAX_KEPT):
        kept.keep(str(i), i, 10)
    assert kept.get("0") == 0

    kept.keep("new", -1, 10)

    assert kept.get("1") is None
    assert (kept.get("0"), kept.get("2"), kept.get("new")) == (0, 2, -1)


def test_one_that_is_too_large_is_not_kept_and_drives_nobody_out() -> None:
    kept: KeptGrammars[int] = KeptGrammars()
    kept.keep("small", 1, 10)

    kept.keep("huge", 2, MAX_KEPT_BYTES)

    assert (kept.get("small"), kept.get("huge")) == (1, None)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 600_000)), max_size=80))
def test_all_together_are_never_more_than_the_bound(asked: list[tuple[int, int]]) -> None:
    kept: KeptGrammars[int] = KeptGrammars()
    sizes: dict[int, int] = {}

    for key, num_chars in asked:
        kept.keep(str(key), key, num_chars)
        sizes[key] = reckoned_bytes(num_chars)
        assert kept.get(str(key)) == key

    assert sum(sizes[key] for key in sizes if kept.get(str(key)) == key) <= MAX_KEPT_BYTES
