"""The end of a step in which every row takes its likeliest token: head and choice as one graph.

With few rows a GPU is done with the head before the host has launched what comes after it, so that
is recorded, too. Rows that draw, or want log probabilities, go the way of ``BatchedSampler``.

Shape legend: R rows that sample, N rows that are run for them, D hidden, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.sampling.batched import choose_plainly
from sortserve.engine.sampling.row import NOT_FINITE
from sortserve.engine.transfers import Download
from sortserve.model.decoder import Decoder
from sortserve.model.graphs import Graph, GraphMaker

__all__ = ["GreedyTail"]


class GreedyTail:
    """Chooses the first of the largest logits of each row.

    Args:
        decoder: has the head.
        maker: records.
        buckets: numbers of rows to record, ascending.
    """

    def __init__(self, decoder: Decoder, maker: GraphMaker, buckets: Sequence[int]) -> None:
        self._decoder, self._maker, self._buckets = decoder, maker, tuple(buckets)
        num_rows, hidden = buckets[-1], decoder.config.hidden_size
        self._h_ND = torch.zeros(num_rows, hidden, dtype=decoder.dtype, device=decoder.device)
        self._token_N = torch.zeros(num_rows, dtype=torch.int64, device=decoder.device)
        self._told_N = torch.zeros_like(self._token_N)
        self._graphs: dict[tuple[int | None, int], Graph] = {}

    @property
    def num_graphs(self) -> int:
        """How many there are when all are recorded."""
        return len(self._decoder.heads) * len(self._buckets)

    @torch.inference_mode()
    def record(self) -> None:
        """Record all graphs, on the thread that will replay them.

        Raises:
            RuntimeError: something in them cannot be recorded, or memory is short.
        """
        for num_rows in reversed(self._buckets):
            for head in self._decoder.heads:
                self._graphs[head, num_rows] = self._maker.record(self._run(head, num_rows))

    def _run(self, head: int | None, num_rows: int) -> Callable[[], None]:
        h_ND, token_N, told_N = (
            tensor[:num_rows] for tensor in (self._h_ND, self._token_N, self._told_N)
        )

        def run() -> None:
            token, told = choose_plainly(self._decoder.apply_head(head, h_ND))
            token_N.copy_(token)
            told_N.copy_(told)

        return run

    @torch.inference_mode()
    def start(self, h_RD: Tensor, exit_layers: Sequence[int]) -> GreedySamples:
        """The tokens of rows with these hidden states, as many as a graph holds at the most, that
        have left at these exits.
        """
        runs = self._decoder.runs_of_heads(exit_layers)
        if len(runs) == 1:
            return GreedySamples(*self._choose(runs[0][0], h_RD))
        chosen = []
        for (head, _), part_RD in zip(runs, torch.split(h_RD, [n for _, n in runs]), strict=True):
            # Copied before the next head's graph writes to the same place.
            chosen.append([tensor.clone() for tensor in self._choose(head, part_RD)])
        token_R, told_R = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return GreedySamples(token_R, told_R)

    def _choose(self, head: int | None, h_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' tokens, and what is told of them; until the next call."""
        num_rows = len(h_RD)
        self._h_ND[:num_rows].copy_(h_RD)
        self._graphs[head, self._buckets[bisect_left(self._buckets, num_rows)]].replay()
        return self._token_N[:num_rows], self._told_N[:num_rows]


class GreedySamples:
    """See ``Samples``. Both tensors may be written again by the next step that is chosen so.

    Args:
        token_R: int64.
        told_R: int64, the same, or -1 where the row's logits are not finite.
    """

    def __init__(self, token_R: Tensor, told_R: Tensor) -> None:
        self.token_ids_R = token_R
        self._download = Download(told_R, is_reused=True)

    def results(self) -> list[SampledToken | RowFailure]:
        """See Samples."""
        told = self._download.array().tolist()
        return [SampledToken(token_id) if token_id >= 0 else NOT_FINITE for token_id in told]
