"""Whole examples end to end, so that no computation goes into padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve_trainer.data.examples import Example

__all__ = ["IGNORED", "Pack", "collate", "pack_examples"]

IGNORED = -100
"""Label of a position after which nothing is to be predicted; PyTorch's cross-entropy skips it."""
_NUM_OPEN = 16
"""Packs that wait for one more example: these fill to 99 %, and more would only move examples
further."""


@dataclass(frozen=True)
class Pack:
    """One row of a batch: examples end to end that do not attend to one another."""

    examples: tuple[Example, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.examples))


def pack_examples(examples: Sequence[Example], pack_length: int) -> list[Pack]:
    """Every example in exactly one pack, none cut; about in their order.

    Best fit over a window: an example goes where it leaves the least room among the packs that are
    still open. The same examples in the same order always make the same packs.

    Args:
        examples: each of at most ``pack_length`` tokens.
        pack_length: most tokens of a pack.
    """
    closed: list[list[Example]] = []
    # Room left, when it was opened, and what is in it: tuples that sort by room, and never tie
    # beyond the second item.
    opened: list[tuple[int, int, list[Example]]] = []
    for number, example in enumerate(examples):
        assert len(example) <= pack_length, "load_examples cuts at max_length <= pack_length"
        fit = bisect_left(opened, (len(example),))
        room, since, pack = opened.pop(fit) if fit < len(opened) else (pack_length, number, [])
        pack.append(example)
        insort(opened, (room - len(example), since, pack))
        if len(opened) > _NUM_OPEN:
            closed.append(opened.pop(0)[2])
    closed += [pack for _, _, pack in sorted(opened, key=lambda item: item[1])]
    return [Pack(tuple(pack)) for pack in closed]


def collate(packs: Sequence[Pack]) -> dict[str, Tensor]:
    """One row of all examples of all packs, without padding.

    Returns:
        input_ids: int64 [1, T].
        labels: int64 [1, T], shifted: the token to predict after each position, which is the next
            one of the same example, or ``IGNORED``.
        unwanted: int64 [1, T], in the same way: the token to unlearn after each position, or
            ``IGNORED``.
        position_ids: int64 [1, T], from 0 in every example.
        lengths: int64 [num_examples], tokens of each example in order; they sum to T.
        target_rows: int64 [num_targets], where ``labels`` has one, ascending.
        unwanted_rows: int64 [num_unwanted], the same of ``unwanted``.
    """
    examples = [example for pack in packs for example in pack.examples]
    input_ids = np.concatenate([example.token_ids for example in examples]).astype(np.int64)
    is_target = np.concatenate([example.is_target for example in examples])
    is_unwanted = np.concatenate([_unwanted(example) for example in examples])
    # The first token of an example is no target, so nothing is predicted across two of them.
    labels, unwanted = np.full((2, len(input_ids)), IGNORED, dtype=np.int64)
    labels[:-1] = np.where(is_target[1:], input_ids[1:], IGNORED)
    unwanted[:-1] = np.where(is_unwanted[1:], input_ids[1:], IGNORED)
    position_ids = np.concatenate([np.arange(len(example)) for example in examples])
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "unwanted": torch.from_numpy(unwanted)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "lengths": torch.tensor([len(example) for example in examples]),
        "target_rows": torch.from_numpy((labels != IGNORED).nonzero()[0]),
        "unwanted_rows": torch.from_numpy((unwanted != IGNORED).nonzero()[0]),
    }


def _unwanted(example: Example) -> NDArray[np.bool_]:
    if example.is_unwanted is None:
        return np.zeros(len(example), dtype=np.bool_)
    return example.is_unwanted
