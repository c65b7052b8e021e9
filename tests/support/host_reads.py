"""Fails where a step makes the host wait for the device.

with refuse_host_reads(monkeypatch) as transfers:
    runner.execute(plan)
assert transfers.downloads == 1

On a GPU these operations wait for everything that was launched before them; on a CPU they only look
like what they would be there, which is what lets a machine without a GPU prove their absence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sortserve.engine import inputs, runner, transfers
from sortserve.engine.sampling import orders

__all__ = ["HostReadError", "NoHostReads", "Transfers", "refuse_host_reads"]


class HostReadError(AssertionError):
    """The host looked at a tensor, or made one, in the middle of a step."""


_READS = (
    frozenset(
        getattr(Tensor, name)
        for name in (
            *("item", "tolist", "cpu", "numpy", "__array__"),
            *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__"),
            *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
            *("equal", "allclose"),
        )
    )
    | {torch.nonzero, torch.argwhere, torch.masked_select, torch.unique, torch.bincount}
    | {
        torch.equal,
        torch.allclose,
    }
)
_MAKERS = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_FROM_NUMPY = torch.from_numpy
_READING_OPS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::repeat_interleave",
)
_INDEXING_OPS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class _NoReadingFunctions(TorchFunctionMode):
    """Refuses what on a CPU never becomes an operation: ``.cpu()``, ``.tolist()``, ``bool()``."""

    is_off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_off:
            return func(*args, **kwargs)
        if func in _READS:
            raise HostReadError(f"{func.__name__} waits for the device")
        if func in _MAKERS:
            raise HostReadError(f"{func.__name__} sends values from the host")
        if func is torch.where and len(args) == 1:
            raise HostReadError("torch.where(condition) is a nonzero")
        if func is Tensor.to and any(_is_cpu(a) for a in (*args[1:], *kwargs.values())):
            raise HostReadError("to(cpu) waits for the device")
        return func(*args, **kwargs)


def _is_cpu(value: object) -> bool:
    return str(value) == "cpu" if isinstance(value, str | torch.device) else False


class NoHostReads(TorchDispatchMode):
    """Refuses operations whose result depends in size or control on what a tensor holds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported for that: seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if self._functions.is_off:
            return func(*args, **(kwargs or {}))
        if name in _READING_OPS:
            raise HostReadError(f"{name} waits for the device")
        if name in _INDEXING_OPS and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostReadError("an index by a mask is a nonzero")
        return func(*args, **(kwargs or {}))

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._functions = _NoReadingFunctions()

    def __enter__(self) -> Any:
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        torch.from_numpy = self._from_numpy  # type: ignore[assignment]  # no mode sees it
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*details)  # type: ignore[no-untyped-call]
        torch.from_numpy = _FROM_NUMPY

    def _from_numpy(self, array: Any) -> Tensor:
        if not self._functions.is_off:
            raise HostReadError("torch.from_numpy sends values from the host")
        return _FROM_NUMPY(array)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Everything is allowed meanwhile."""
        self._functions.is_off = True
        yield
        self._functions.is_off = False


@dataclass
class Transfers:
    """How often a step used the two ways that it may."""

    uploads: int = 0
    downloads: int = 0


@contextmanager
def refuse_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """Refuse all but what goes through ``engine.transfers``, and count that."""
    count, mode = Transfers(), NoHostReads()

    def send(arrays: Any, device: torch.device) -> list[Tensor]:
        count.uploads += 1
        with mode.off():
            return transfers.upload_in_one_copy(arrays, device)

    receive = transfers.Download.array

    def fetch(self: transfers.Download) -> Any:
        count.downloads += 1
        with mode.off():
            return receive(self)

    with monkeypatch.context() as patch, mode:
        for module in (inputs, orders, runner):
            patch.setattr(module, "upload", send)
        patch.setattr(transfers.Download, "array", fetch)
        yield count
