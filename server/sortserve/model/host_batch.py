"""One step's rows as arrays on the host: what is uploaded to make a ``Batch`` (no torch).

Shape legend: T tokens of all rows (no padding), R rows, S slabs, B blocks of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["HostBatch"]


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """The rows of one step, deepest first; see ``Batch`` for what the fields mean."""

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    exit_layers: tuple[int, ...]
    samples: tuple[bool, ...]
    block_tables_SRB: NDArray[np.int32]
    slots_ST: NDArray[np.int64]
    num_prompt_tokens: tuple[int, ...] | None = None
    taken: tuple[tuple[int, int], ...] = ()
    """(r, n): the last token of row r is not known here: it is the n-th of those that the step
    before has sampled."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.query_starts[-1]

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token and samples the next one."""
        return self.num_tokens == self.num_rows and all(self.samples)
