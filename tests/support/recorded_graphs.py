"""CUDA graphs without CUDA: operations are recorded once and run again on the same memory.

graphs = SegmentGraphs(decoder, cache, RecordingMaker(), scratch_page=...)

As strict as a GPU, and less silent. While it records, the host may look at nothing and send none. A
replay runs the same operations with the same numbers, so whatever the host decided stays as it
was. What is computed lies in memory that all graphs share, and is spoiled before every replay. What
was there before must still be there, at the same address: a GPU would read whatever came after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sortserve.model.graphs import Graph
from support.host_reads import NoHostReads

__all__ = ["RecordingMaker", "RerunMaker", "StaleInputError"]


class StaleInputError(AssertionError):
    """A graph reads memory that has been freed, or has moved."""


@dataclass(frozen=True)
class _Outside:
    """A tensor over memory that was there before the recording and that the graph does not own."""

    storage: Any
    """A weak reference."""
    address: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> _Outside:
        storage = tensor.untyped_storage()
        return _Outside(
            storage._weak_ref(),
            storage.data_ptr(),
            tensor.dtype,
            tensor.size(),
            tensor.stride(),
            int(tensor.storage_offset()),
        )

    def tensor(self) -> Tensor:
        if torch.UntypedStorage._expired(self.storage):
            raise StaleInputError(f"a tensor {tuple(self.size)} that a graph reads is gone")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage)
        if storage.data_ptr() != self.address:
            raise StaleInputError(f"a tensor {tuple(self.size)} that a graph reads has moved")
        result = torch.empty(0, dtype=self.dtype)
        return result.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Call:
    """An operation; tensors of its arguments are the graph's own, or outside."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    """Its results that are memory of the graph's own."""

    def run(self) -> None:
        args, kwargs = tree_map(
            lambda value: value.tensor() if isinstance(value, _Outside) else value,
            (self.args, self.kwargs),
        )
        new, _ = tree_flatten(self.func(*args, **kwargs))
        if not self.results:
            return  # it wrote to its arguments
        tensors = [value for value in new if isinstance(value, Tensor)]
        assert len(tensors) == len(self.results)
        for place, tensor in zip(self.results, tensors, strict=True):
            assert place.shape == tensor.shape, f"{self.func}: sizes are fixed once recorded"
            place.copy_(tensor)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.memory: dict[int, Tensor] = {}
        """What was computed, by its storage: the graph's own."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported for that: seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values, shape = tree_flatten((args, kwargs))
        inputs = {_storage(value) for value in values if isinstance(value, Tensor)}
        kept_args, kept_kwargs = tree_unflatten([self._keep(value) for value in values], shape)
        result = func(*args, **kwargs)
        outputs, _ = tree_flatten(result)
        tensors = [value for value in outputs if isinstance(value, Tensor)]
        fresh = [tensor for tensor in tensors if _storage(tensor) not in inputs]
        assert len(fresh) in (0, len(tensors)), f"{func} gives views and new tensors"
        self.memory |= {_storage(tensor): tensor for tensor in fresh}
        if fresh or func._schema.is_mutable:
            self.calls.append(_Call(func, kept_args, kept_kwargs, fresh))
        return result

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Tensor) and _storage(value) not in self.memory:
            return _Outside.of(value)
        return value


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _RecordedGraph:
    def __init__(self, maker: RecordingMaker, recording: _Recording) -> None:
        self._maker = maker
        self._calls = recording.calls
        self.memory = list(recording.memory.values())

    def replay(self) -> None:
        self._maker.spoil()
        self._maker.last = self
        for call in self._calls:
            call.run()


class RecordingMaker:
    """Records operations on the CPU."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self.last: _RecordedGraph | None = None
        """The one that ran last: what it computed is still there."""

    def record(self, run: Callable[[], object]) -> Graph:
        run()
        recording = _Recording()
        with recording, NoHostReads():
            run()
        self.num_graphs += 1
        self.last = _RecordedGraph(self, recording)
        graph = self.last
        self.spoil()
        return graph

    def spoil(self) -> None:
        """The graphs' memory is shared: between two replays anything may be written there."""
        for tensor in self.last.memory if self.last is not None else ():
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            whole.fill_(torch.nan if tensor.is_floating_point() else 77)


class RerunMaker:
    """No graphs: what would be recorded is called each time."""

    def record(self, run: Callable[[], object]) -> Graph:
        return _Rerun(run)


@dataclass(frozen=True)
class _Rerun:
    run: Callable[[], object]

    def replay(self) -> None:
        self.run()
