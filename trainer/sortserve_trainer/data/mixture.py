"""Packs of weighted sources over all epochs, each a function of the seed and its index alone."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from sortserve.core.errors import ConfigError
from sortserve_trainer.data.examples import Example
from sortserve_trainer.data.packing import Pack, pack_examples
from sortserve_trainer.data.source import DataSource

__all__ = ["Mixture"]

_SHUFFLE, _SUBSET = 0, 1
"""Streams of random numbers."""


class Mixture(torch.utils.data.Dataset[Pack]):
    """All packs of a run, in order of training; read them in order, since epochs are made lazily.

    A run that is resumed at any index gets the packs that it would have got: nothing is replayed.

    Args:
        sources: the examples of each source.
        pack_length: most tokens of a pack; no example may be longer.
        seed: of the order, and of the rows that a weight with a fraction takes in an epoch.
        num_epochs: passes over the data, whole or not; by default 1 without ``max_tokens``, and
            else as many as that needs.
        max_tokens: most tokens of all packs together. One pack there is at least.

    Raises:
        ConfigError: the weights or ``num_epochs`` are so small that no row is left.
    """

    def __init__(
        self,
        sources: Sequence[tuple[DataSource, list[Example]]],
        *,
        pack_length: int,
        seed: int,
        num_epochs: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        assert any(examples for _, examples in sources)
        self._sources = tuple(sources)
        self._pack_length = pack_length
        self._seed = seed % 2**64
        self._subset_orders = [
            self._generator(_SUBSET, i).permutation(len(examples))
            for i, (_, examples) in enumerate(sources)
        ]
        self._cache: dict[int, list[Pack]] = {}
        if num_epochs is None:
            num_epochs = math.inf if max_tokens is not None else 1.0
        self._starts = [0]
        """Index of the first pack of each epoch; the last is the number of packs."""
        self.num_tokens = 0
        """Of all packs."""
        self._count_packs(num_epochs, math.inf if max_tokens is None else max_tokens)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        epoch = bisect_right(self._starts, index) - 1
        return self._packs(epoch)[index - self._starts[epoch]]

    def _count_packs(self, num_epochs: float, max_tokens: float) -> None:
        for epoch in itertools.count():
            share = min(1.0, num_epochs - epoch)
            if share <= 0:
                break
            packs = self._packs(epoch)
            num_taken = 0
            for pack in packs[: math.ceil(round(share * len(packs), 6))]:
                is_first = not num_taken and not self.num_tokens
                if self.num_tokens + pack.num_tokens > max_tokens and not is_first:
                    break
                self.num_tokens += pack.num_tokens
                num_taken += 1
            self._starts.append(self._starts[-1] + num_taken)
            if self.num_tokens >= max_tokens or (packs and num_taken < len(packs)):
                break
        if not len(self):
            raise ConfigError(
                "--data: the weights leave no row to train on: raise them, or --epochs.",
                param="data",
            )

    def _packs(self, epoch: int) -> list[Pack]:
        """The packs of one epoch. Two epochs are kept: a loader that reads ahead needs both."""
        if epoch not in self._cache:
            self._cache[epoch] = pack_examples(self._examples(epoch), self._pack_length)
            if len(self._cache) > 2:
                del self._cache[next(iter(self._cache))]
        return self._cache[epoch]

    def _examples(self, epoch: int) -> list[Example]:
        chosen: list[Example] = []
        for (source, examples), order in zip(self._sources, self._subset_orders, strict=True):
            # As typed: 0.1 is a tenth, so ten epochs see every row exactly once.
            num_copies, fraction = divmod(Fraction(str(source.weight)), 1)
            chosen += examples * int(num_copies)
            # Consecutive slices of one fixed order, around and around.
            num_rows = len(examples)
            start, end = int(fraction * num_rows * epoch), int(fraction * num_rows * (epoch + 1))
            chosen += [examples[order[i % num_rows]] for i in range(start, end)]
        return [chosen[i] for i in self._generator(_SHUFFLE, epoch).permutation(len(chosen))]

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])
