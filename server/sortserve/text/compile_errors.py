"""The grammar library's reasons in words for clients."""

from __future__ import annotations

__all__ = ["sentence", "with_keyword"]

_KEYWORDS = (
    ("oneOf constraints", "oneOf is not supported where a document may match two of its schemas"),
    ("patternProperty regexes", "patternProperties may not overlap: {error}"),
    (
        "range: min=",
        "minimum, maximum, exclusiveMinimum or exclusiveMaximum cannot be kept: {error}",
    ),
    ("regex parse error", "pattern is none that can be kept: {error}"),
)
"""What the library says, and what to say of it so that the keyword is named."""


def sentence(error: str) -> str:
    """The library's words on one line, without the grammar that it quotes."""
    error = error.partition("; following special tokens are available")[0]  # by hidden names
    lines = [line.strip() for line in error.replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line)
    return text if text.endswith(".") else f"{text}."


def with_keyword(error: str) -> str:
    """What is wrong with a schema, naming the keyword that it is about."""
    for words, said in _KEYWORDS:
        if words in error:
            return said.format(error=sentence(error).rstrip(".")) + "."
    return sentence(error)
