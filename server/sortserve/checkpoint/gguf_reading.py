"""The package gguf, made quick enough for a start: a file's metadata is parsed once.

transformers parses it for the configuration, the tokenizer and the weights, each anew, and makes
the map of tensor names for each module of the model. Of 20 s for a vocabulary of 49,152 most is
that, and much of the rest is numpy's: every slice of a ``memmap`` is a ``memmap`` again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["parsed_once"]


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
    """A reader over plain arrays, which keep the mapped file alive all the same."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """The file."""
        return self._data

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let who reads GGUF files inside share readers and maps of names.

    Not for several threads at once: like all loading, conversion is done by one.
    """
    with (
        patch.object(gguf, "GGUFReader", cache(_Reader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield
