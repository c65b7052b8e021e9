"""Requests that come together: one exit for all of them, and all of them or none (no torch)."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from sortserve.admission.queue_limits import Reservation
from sortserve.core.errors import SortserveError
from sortserve.core.request import Request
from sortserve.engine.stream import RequestStream

__all__ = ["Crowds"]


class Crowds(ABC):
    """What lets requests in one by one lets in the sequences of a client's request, too."""

    replica_states = None
    """Of engines elsewhere: there are none."""

    def __init__(self) -> None:
        self._turns = asyncio.Lock()

    @abstractmethod
    def exit_for(self, request: Request, num_sequences: int) -> int:
        """The exit at which so many like this one could start together now."""

    @abstractmethod
    def submit(
        self,
        request: Request,
        reservation: Reservation | None = None,
        *,
        exit_layer: int | None = None,
        num_sequences: int = 1,
    ) -> RequestStream:
        """Validate, choose the exit, queue."""

    async def submit_all(
        self,
        requests: Sequence[Request],
        reservation: Reservation,
        *,
        is_streamed: bool = True,
        num_samples: int = 1,
    ) -> list[RequestStream]:
        """Submit the sequences of one request of a client.

        Crowds are judged one by one: those that come at once must not hold up the loop.

        Args:
            requests: the samples of each prompt after one another.
            reservation: places for all of them.
            is_streamed: whether each output is read as it comes; makes no difference here.
            num_samples: of each prompt.

        Raises:
            SortserveError: one of them was refused, and none runs. ``param`` names the prompt, as
                ``prompt.1``, where there are several.
        """
        streams: list[RequestStream] = []
        index = 0
        try:
            async with self._turns:
                exit_layer = None
                if len(requests) > 1:
                    firsts = range(0, len(requests), num_samples)
                    index = max(firsts, key=lambda i: len(requests[i].prompt_token_ids))
                    await asyncio.sleep(0)
                    exit_layer = self.exit_for(requests[index], len(requests))
                for i, request in enumerate(requests):
                    index = i
                    await asyncio.sleep(0)  # choosing an exit takes a while: others first
                    stream = self.submit(
                        request, reservation, exit_layer=exit_layer, num_sequences=len(requests)
                    )
                    streams.append(stream)
        except BaseException as error:
            for stream in streams:
                stream.abort()
            if isinstance(error, SortserveError) and len(requests) > num_samples:
                raise error.of_prompt(index // num_samples) from error.__cause__
            raise
        return streams
