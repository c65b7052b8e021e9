"""The tokens of a step, which a device may still be choosing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken

__all__ = ["KnownSamples", "Samples"]


class Samples(Protocol):
    """What the rows of one step sampled."""

    @property
    def token_ids_R(self) -> Tensor:
        """int64, on the device of the logits: what the next step may read before the host knows.

        A row that fails has some id of the vocabulary.
        """
        ...

    def results(self) -> list[SampledToken | RowFailure]:
        """One for each row. The host waits for the device here, and nowhere else."""
        ...


class KnownSamples:
    """Those that the host has chosen itself."""

    def __init__(self, results: Sequence[SampledToken | RowFailure]) -> None:
        self._results = list(results)

    @property
    def token_ids_R(self) -> Tensor:
        """See Samples."""
        tokens = [r.token_id if isinstance(r, SampledToken) else 0 for r in self._results]
        return torch.tensor(tokens, dtype=torch.int64)

    def results(self) -> list[SampledToken | RowFailure]:
        """See Samples."""
        return self._results
