"""What tokens of a vocabulary are in bytes: the tables of its decoders."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers.decoders import Decoder

__all__ = ["BYTE_OF", "decoder_kinds", "whole_text"]


def whole_text(data: bytes) -> str | None:
    """The text of bytes; None if they are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def decoder_kinds(decoder: Decoder | None) -> Iterator[str]:
    """Types of a decoder and its parts: from its JSON alone, which is short; the vocabulary's is
    not.
    """
    descriptions = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while descriptions:
        description = descriptions.pop()
        yield description["type"]
        descriptions += description.get("decoders", ())


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    GPT-2's table: printable bytes of Latin-1 stand for themselves, the other 68 for the characters
    from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_characters()
