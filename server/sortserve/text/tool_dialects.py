"""Which of the known forms a chat template teaches its model to call tools in."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["dialect_of"]

_MARKS = (
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    ("llama3", ("<|python_tag|>", '"parameters": dictionary of', "ipython")),
)


def dialect_of(templates: Iterable[str]) -> str | None:
    """``hermes`` (also Qwen's), ``mistral`` or ``llama3``; None: no template knows tools."""
    for template in templates:
        if "tools" in template:
            for dialect, marks in _MARKS:
                if any(mark in template for mark in marks):
                    return dialect
    return None
