"""``--exit-modules``: one kind for all exits, or kinds of some, the others staying as they are."""

from __future__ import annotations

import pytest

from sortserve.core.errors import ConfigError
from sortserve_trainer.run.module_kinds import kinds_text, parse_kinds


def test_a_kind_alone_is_of_every_exit() -> None:
    asked = parse_kinds("layer")

    assert [asked.at(e, "affine") for e in (18, 24)] == ["layer", "layer"]
    asked.check_exits((18, 24))


def test_exits_that_are_named_have_their_kinds_and_others_what_they_had() -> None:
    asked = parse_kinds("18=layer, 24=none")

    assert [asked.at(e, "affine") for e in (18, 21, 24)] == ["layer", "affine", "none"]


def test_nothing_is_asked_for_without_the_flag() -> None:
    assert parse_kinds(None).at(18, "affine") == "affine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora", "'affine'"),
        ("18=lora", "'affine'"),
        ("18=layer,21", "'21' should be EXIT=KIND"),
        ("18=layer,18=mlp", "each exit once"),
        ("-1=layer", "should be EXIT=KIND"),
        ("", "'affine'"),
    ],
)
def test_what_is_neither_is_refused_with_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kinds_text(text)


def test_an_exit_that_is_not_trained_cannot_have_a_kind() -> None:
    with pytest.raises(ConfigError, match="names exit 20, which is none below full depth"):
        parse_kinds("18=layer,20=mlp").check_exits((18, 24))
