"""Sums and gatherings over a group of ranks: gloo between CPUs, NCCL between CUDA devices.

The group is made directly, not as the process's default group of ``torch.distributed``, which
belongs to whoever uses this library. Ranks find each other through a file in a private folder, and
both listen on the loopback interface: nothing of it can be reached from another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Group"]

_torch: Any = torch.distributed

MEETING = timedelta(seconds=60)
"""Time for all ranks to meet: they have all loaded by then."""
FOREVER = timedelta(days=1)
STORE_FILE = "ranks"


class Group:
    """``Collectives`` that work once the ranks have met, and only within a step.

    Out of a step the other ranks wait for a plan and no rank would answer: that is a mistake of
    ours, and it is better to say so than to wait.
    """

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self.num_calls = 0
        """Collectives since the step began."""
        self._rank = rank
        self._num_ranks = num_ranks
        self._device = device
        self._is_in_step = False
        self._is_alone = False
        self._backend: Any = None  # torch's stubs know neither gloo's options nor its methods

    def meet(self, folder: Path) -> None:
        """Wait until all ranks have come to ``folder``.

        Raises:
            RuntimeError: one has not come in time.
        """
        store = _torch.FileStore(str(folder / STORE_FILE), self._num_ranks)
        make = _nccl if self._device.type == "cuda" else _gloo
        self._backend = make(store, self._rank, self._num_ranks)
        with self.step():
            # NCCL connects on first use; whoever cannot should find out now.
            total = self.sum(torch.ones(1, device=self._device))
        assert int(total) == self._num_ranks

    @contextmanager
    def step(self) -> Iterator[None]:
        """All ranks do what is inside."""
        self.num_calls = 0
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is inside runs on this rank alone: it takes the time and the memory of a step, and
        what it computes means nothing.
        """
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def sum(self, x: Tensor) -> Tensor:
        """See Collectives."""
        x = x.contiguous()
        if self._is_alone:
            return x
        self._entered().allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Sequence[Tensor] | None:
        """See Collectives."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._num_ranks)] if self._rank == 0 else None
        if self._is_alone:
            return parts
        options = _torch.GatherOptions()
        options.rootRank = 0
        self._entered().gather([] if parts is None else [parts], [x], options).wait()
        return parts

    def abort(self) -> None:
        """Let nobody wait any more for a rank that is gone. Any thread.

        Gloo sees by itself that a socket has closed.
        """
        if self._backend is not None and self._device.type == "cuda":
            self._backend.abort()

    def _entered(self) -> Any:
        assert self._backend is not None, "the ranks have not met"
        assert self._is_in_step, "the model ran on one rank alone: run a plan with the runner"
        self.num_calls += 1
        return self._backend


def _gloo(store: Any, rank: int, num_ranks: int) -> Any:
    options = _torch.ProcessGroupGloo._Options()
    options._devices = [_torch.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = MEETING
    backend = _torch.ProcessGroupGloo(store, rank, num_ranks, options)
    # Who is late in a step is noticed by ``watch``, which knows more than one socket does.
    backend._set_default_timeout(FOREVER)
    return backend


def _nccl(store: Any, rank: int, num_ranks: int) -> Any:
    options = _torch.ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    # Else its watchdog would end the process before anybody is answered: ``watch`` does it all.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    return _torch.ProcessGroupNCCL(store, rank, num_ranks, options)
