"""Named tensors: where they are kept, and what is known of them before they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sortserve.checkpoint.files import check_regular, read_json
from sortserve.core.errors import CheckpointError
from sortserve.model.weight import Weight

__all__ = [
    "FLOATS",
    "SafetensorsReader",
    "StateDictReader",
    "TensorReader",
    "WeightReader",
    "safetensors_files",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")
"""safetensors' names of the dtypes of plain weights."""


class TensorReader(Protocol):
    """Named tensors whose shapes are known before they are read."""

    @property
    def origin(self) -> str:
        """Where the tensors come from, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in; a quantised matrix in fp32."""
        ...


class WeightReader(TensorReader, Protocol):
    """Named tensors whose matrices may be quantised."""

    def read_weight(self, name: str) -> Weight:
        """One matrix, on the CPU, as it is stored."""
        ...


class StateDictReader:
    """Tensors that are in memory already (a merged adapter)."""

    def __init__(self, state_dict: Mapping[str, Tensor], origin: str) -> None:
        self._state_dict = state_dict
        self.origin = origin
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, as it is."""
        return self._state_dict[name]

    def read_weight(self, name: str) -> Weight:
        """One matrix, as it is."""
        return Weight.plain(self.read(name))


class SafetensorsReader:
    """The tensors of one or several safetensors files, mapped into memory, read one by one.

    A context manager; opening checks that every file is whole.

    Args:
        files: to be opened.
        origin: where they come from, for messages.
        dtypes: that tensors may have, by safetensors' names.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or holds a tensor of
            another dtype.
    """

    def __init__(
        self, files: Iterable[Path], origin: str, dtypes: tuple[str, ...] = FLOATS
    ) -> None:
        self.origin = origin
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._allowed = dtypes
        self._holders: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file: Path) -> None:
        if not os.path.lexists(file):
            raise CheckpointError(f"{self.origin}: the weights file {file.name} is missing.")
        check_regular(file)
        try:
            holder = self._stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.origin}: {file.name} is truncated or not a safetensors file ({error})."
            ) from error
        for name in holder.keys():  # noqa: SIM118 (not a mapping)
            entry = holder.get_slice(name)
            if entry.get_dtype() not in self._allowed:
                raise CheckpointError(
                    f"{self.origin}: tensor {name} in {file.name} is {entry.get_dtype()}; "
                    f"supported: {', '.join(self._allowed)}."
                )
            self.shapes[name] = tuple(entry.get_shape())
            self.dtypes[name] = entry.get_dtype()
            self._holders[name] = holder

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        tensor: Tensor = self._holders[name].get_tensor(name)
        return tensor

    def read_weight(self, name: str) -> Weight:
        """One matrix, on the CPU, in the dtype it is stored in."""
        return Weight.plain(self.read(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: one, or those its index names.

    As in transformers, the one file goes before an index, which must be sound all the same.

    Raises:
        CheckpointError: there are none, or the index is corrupted.
    """
    has_index = os.path.lexists(folder / _INDEX)
    shards = _indexed_files(folder / _INDEX) if has_index else []
    if os.path.lexists(folder / _WEIGHTS):
        return [folder / _WEIGHTS]
    if has_index:
        return [folder / name for name in shards]
    hint = ""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        hint = " Pickled weights (.bin, .pth) are not read: convert them to safetensors."
    raise CheckpointError(f"{folder}: no weights: neither {_WEIGHTS} nor {_INDEX} is there.{hint}")


def _indexed_files(index: Path) -> list[str]:
    """The shards an index names; transformers, too, looks for every tensor in all of them."""
    document = read_json(index)
    for name in ("metadata", "weight_map"):
        if not isinstance(document.get(name), dict):
            raise CheckpointError(
                f"{index} is corrupted: {name}={document.get(name)!r} is not an object."
            )
    weight_map = document["weight_map"]
    if not weight_map:
        raise CheckpointError(f"{index} is corrupted: weight_map names no tensor.")
    for tensor, name in weight_map.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or PurePosixPath(name).suffix != ".safetensors":
            raise CheckpointError(
                f"{index} is corrupted: weight_map.{tensor}={name!r} is no .safetensors file "
                "of the folder."
            )
        if PurePosixPath(name).is_absolute():
            raise CheckpointError(f"{index}: weight_map.{tensor}={name!r} leaves the folder.")
    return sorted(set(weight_map.values()))
