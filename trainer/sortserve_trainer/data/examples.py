"""One example: tokens, and which of them are to be learned."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Example", "split_held_out"]


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """Tokens that attend to one another and to nothing else. Two are equal only if the same."""

    token_ids: NDArray[np.int32]
    """[n], n >= 2."""
    is_target: NDArray[np.bool_]
    """[n]; where a token is to be predicted from those before it. The first one never is."""
    is_unwanted: NDArray[np.bool_] | None = None
    """[n]; where a token is one to unlearn, and no target; None is nowhere."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.is_target) >= 2
        assert not self.is_target[0]
        if self.is_unwanted is not None:
            assert len(self.is_unwanted) == len(self)
            assert not self.is_unwanted[0]
            assert not (self.is_unwanted & self.is_target).any()

    def __len__(self) -> int:
        return len(self.token_ids)


def split_held_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those to evaluate on, both in their order.

    An example is chosen by its tokens and the seed alone, whatever its place: of two copies of a
    row, neither is trained on while the other is held out (but for the last one chosen), and a file
    that grows keeps most of what was held out.

    Args:
        examples: of one source.
        share: part to hold out, 0 <= share < 1; at least one example where it is above 0 and there
            are two, and never all.
        seed: chooses the examples.
    """
    num_held_out = round(share * len(examples))
    if share > 0:
        num_held_out = max(1, num_held_out)
    num_held_out = max(0, min(num_held_out, len(examples) - 1))
    by_digest = sorted(range(len(examples)), key=lambda i: (_digest(examples[i], seed), i))
    held_out = frozenset(by_digest[:num_held_out])
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [example for i, example in enumerate(examples) if i in held_out],
    )


def _digest(example: Example, seed: int) -> bytes:
    key = str(seed).encode()
    return hashlib.blake2b(example.token_ids.tobytes(), digest_size=16, key=key).digest()
