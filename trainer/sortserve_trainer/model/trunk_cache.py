"""The states of a trunk that does not train, on disk: what modules learn from, computed once.

A cache is a folder of flat files, one for each *stream* (the states at an exit, those at full
depth, ...), and an index of examples. Examples are found by their tokens, so runs with another
seed, order, length or mixture share them, and what is missing is added at the end.

``index.bin`` decides what is there: an example counts once its record is in it, and a record is
written after the values of all streams are on the disk. What a killed writer left beyond the index
is cut off by the next one. One process writes at a time (``flock``); readers map the files.

    cache = TrunkCache(folder, streams)
    with cache.writing() as writer:
        writer.append(key, num_tokens, num_rows, {"full": states_SD, ...})
    values = cache.read([key])      # name to [rows, width], the examples end to end

Shape legend: S rows that the head reads of an example, D hidden.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import Example

__all__ = ["FORMAT_VERSION", "Stream", "TrunkCache", "example_key", "read_rows_of"]

FORMAT_VERSION = 1
"""Of the files and of what is computed into them: another number finds none of before."""
INDEX = "index.bin"
LOCK = "lock"
COMMIT_BYTES = 256 << 20
"""Values written between two commits: what is computed again after a kill, at most."""
_RECORD = np.dtype([("key", np.uint8, (16,)), ("num_tokens", "<i4"), ("num_rows", "<i4")])


@dataclass(frozen=True)
class Stream:
    """One kind of values, an array of them for each token or row."""

    name: str
    width: int
    dtype: torch.dtype
    of_tokens: bool = False
    """Whether every token has one, not only the rows that the head reads."""

    @property
    def num_bytes(self) -> int:
        """Of one token or row."""
        return self.width * self.dtype.itemsize


def read_rows_of(example: Example) -> NDArray[np.int64]:
    """int64 [S]: the positions of an example after which something is learned or unlearned."""
    is_read = example.is_target[1:]
    if example.is_unwanted is not None:
        is_read = is_read | example.is_unwanted[1:]
    rows: NDArray[np.int64] = is_read.nonzero()[0]
    return rows


def example_key(example: Example) -> bytes:
    """16 bytes that follow from its tokens and the rows that are read."""
    digest = hashlib.blake2b(example.token_ids.tobytes(), digest_size=16)
    digest.update(read_rows_of(example).tobytes())
    return digest.digest()


class TrunkCache:
    """Values by example, on disk.

    Args:
        folder: need not exist; everything that the values follow from is in its name.
        streams: of each example.

    Raises:
        ConfigError: the files are shorter than their index says, or the disk cannot be read.
    """

    def __init__(self, folder: Path, streams: Sequence[Stream]) -> None:
        self.folder = folder
        self.streams = tuple(streams)
        self._places: dict[bytes, tuple[int, int, int, int]] = {}
        self._num_tokens = self._num_rows = 0
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._load_index()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Of all examples."""
        return self.bytes_of(self._num_tokens, self._num_rows)

    def bytes_of(self, num_tokens: int, num_rows: int) -> int:
        """Of examples with so many tokens and rows."""
        return sum(s.num_bytes * (num_tokens if s.of_tokens else num_rows) for s in self.streams)

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The values of some examples end to end: name of the stream to [tokens or rows, width]."""
        places = [self._places[key] for key in keys]
        found = {}
        for stream in self.streams:
            spans = [(t, n) if stream.of_tokens else (r, m) for t, n, r, m in places]
            values = self._map(stream)
            parts = [values[start : start + count] for start, count in spans]
            flat = torch.from_numpy(np.concatenate(parts))
            found[stream.name] = flat.view(stream.dtype)
        return found

    @contextmanager
    def writing(self) -> Iterator[_Writer]:
        """Add examples; those of before a failure or a kill stay.

        Raises:
            ConfigError: another process is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            lock = stack.enter_context((self.folder / LOCK).open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"--trunk-cache: another run is writing {self.folder}: wait for it, or name "
                    "another folder.",
                    param="trunk-cache",
                ) from error
            self._load_index()
            files = {s.name: stack.enter_context(self._path(s).open("ab")) for s in self.streams}
            index = stack.enter_context((self.folder / INDEX).open("ab"))
            for stream in self.streams:
                files[stream.name].truncate(self._size(stream))
            index.truncate(len(self) * _RECORD.itemsize)
            writer = _Writer(self, files, index)
            yield writer
            writer.commit()

    def check_invariants(self) -> None:
        """Places follow one another without gaps, and the files hold them all."""
        places = sorted(self._places.values())
        assert [t for t, *_ in places] == np.cumsum([0, *(n for _, n, *_ in places)])[:-1].tolist()
        assert sum(m for *_, m in places) == self._num_rows
        for stream in self.streams:
            assert not places or self._path(stream).stat().st_size >= self._size(stream)

    def _load_index(self) -> None:
        self._places.clear()
        self._maps.clear()
        self._num_tokens = self._num_rows = 0
        path = self.folder / INDEX
        data = path.read_bytes() if path.is_file() else b""
        whole = len(data) // _RECORD.itemsize * _RECORD.itemsize
        for record in np.frombuffer(data[:whole], dtype=_RECORD):
            self._add(record["key"].tobytes(), int(record["num_tokens"]), int(record["num_rows"]))
        for stream in self.streams:
            size = self._path(stream).stat().st_size if self._path(stream).is_file() else 0
            if size < self._size(stream):
                raise ConfigError(
                    f"--trunk-cache: {self._path(stream)} is damaged (it has {size} bytes, and "
                    f"{self._size(stream)} are in the index): delete {self.folder}.",
                    param="trunk-cache",
                )

    def _add(self, key: bytes, num_tokens: int, num_rows: int) -> None:
        self._places[key] = (self._num_tokens, num_tokens, self._num_rows, num_rows)
        self._num_tokens += num_tokens
        self._num_rows += num_rows

    def _path(self, stream: Stream) -> Path:
        return self.folder / f"{stream.name}.bin"

    def _size(self, stream: Stream) -> int:
        return stream.num_bytes * (self._num_tokens if stream.of_tokens else self._num_rows)

    def _map(self, stream: Stream) -> NDArray[np.uint8]:
        if stream.name not in self._maps:
            count = self._size(stream) // stream.num_bytes
            self._maps[stream.name] = np.memmap(
                self._path(stream), dtype=np.uint8, mode="r", shape=(count, stream.num_bytes)
            )
        return self._maps[stream.name]


class _Writer:
    """What ``TrunkCache.writing`` gives: one commit for many examples."""

    def __init__(self, cache: TrunkCache, files: Mapping[str, BinaryIO], index: BinaryIO) -> None:
        self._cache, self._files, self._index = cache, files, index
        self._waiting: dict[bytes, tuple[int, int]] = {}
        self._num_bytes = 0

    def append(
        self, key: bytes, num_tokens: int, num_rows: int, values: Mapping[str, Tensor]
    ) -> None:
        """Write the values of an example that is not there yet; see ``Stream`` for their shapes."""
        assert key not in self._cache
        assert key not in self._waiting
        for stream in self._cache.streams:
            value = values[stream.name].detach().to("cpu", stream.dtype).contiguous()
            assert value.shape == (num_tokens if stream.of_tokens else num_rows, stream.width)
            data = value.view(torch.uint8).numpy().tobytes()
            self._files[stream.name].write(data)
            self._num_bytes += len(data)
        self._waiting[key] = (num_tokens, num_rows)
        if self._num_bytes >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Values first, then the index: a record never speaks of what is not on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        records = np.zeros(len(self._waiting), dtype=_RECORD)
        for record, (key, counts) in zip(records, self._waiting.items(), strict=True):
            record["key"] = np.frombuffer(key, dtype=np.uint8)
            record["num_tokens"], record["num_rows"] = counts
        self._index.write(records.tobytes())
        self._index.flush()
        os.fsync(self._index.fileno())
        for key, counts in self._waiting.items():
            self._cache._add(key, *counts)
        self._cache._maps.clear()
        self._waiting.clear()
        self._num_bytes = 0
