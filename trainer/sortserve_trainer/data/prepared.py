"""Examples on disk, as tokens: made on one machine, found by hash on another.

Tokenising takes a core's seconds for each ten megabytes, which a GPU that is lent by the minute
should not wait for. A file is found by what its examples follow from: the data, the vocabulary and
the chat template of the tokenizer, and how examples are cut.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sortserve.core.atomic_write import write_atomically
from sortserve_trainer.data.examples import Example
from sortserve_trainer.data.loading import load_examples
from sortserve_trainer.data.source import DataSource, bad_data, file_digest

__all__ = ["PreparedData", "read_examples", "write_examples"]

VERSION = 3
"""Of the files, and of what ``load_examples`` makes: another number finds none of before."""
DIGESTS = "digests.json"
_SMALL = 1 << 16


@dataclass(frozen=True)
class PreparedData:
    """A folder of examples, a file for each source.

    Args:
        folder: need not exist.
        tokenizer: transformers' fast tokenizer.
        max_length: see ``load_examples``.
        train_on_prompts: see ``load_examples``.
    """

    folder: Path
    tokenizer: Any
    max_length: int
    train_on_prompts: bool

    def load(self, source: DataSource) -> tuple[list[Example], str]:
        """The examples of a source, and the sha256 of its file ("" for one on the hub).

        The data file itself may be absent where its examples have been prepared.

        Raises:
            ConfigError: as ``load_examples`` does, or a prepared file is damaged.
        """
        digest = self._digest(source)
        path = self._path(source, digest)
        if path.is_file():
            return read_examples(path), digest
        examples = load_examples(
            source,
            self.tokenizer,
            max_length=self.max_length,
            train_on_prompts=self.train_on_prompts,
        )
        return examples, digest

    def prepare(self, source: DataSource) -> tuple[list[Example], str]:
        """As ``load``, and it is there for the next one."""
        examples, digest = self.load(source)
        path = self._path(source, digest)
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_examples(path, examples)
            text = json.dumps({**self._digests(), source.reference: digest}, indent=1)
            write_atomically(self.folder / DIGESTS, text.encode())
        return examples, digest

    def _digest(self, source: DataSource) -> str:
        path = Path(source.reference).expanduser()
        return file_digest(path) if path.is_file() else self._digests().get(source.reference, "")

    def _digests(self) -> dict[str, str]:
        """Those of data files that were prepared, by their names on the command line."""
        path = self.folder / DIGESTS
        found: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
        return found

    def _path(self, source: DataSource, digest: str) -> Path:
        key = {
            "version": VERSION,
            "data": digest or source.reference,
            "vocabulary": sorted(self.tokenizer.get_vocab().items()),
            "chat_template": self.tokenizer.chat_template,
            "max_length": self.max_length,
            "train_on_prompts": self.train_on_prompts,
        }
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return self.folder / f"{name}.npz"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write them, whole or not at all: two bytes a token where the vocabulary allows it."""
    token_ids = np.concatenate([example.token_ids for example in examples])
    is_small = int(token_ids.min()) >= 0 and int(token_ids.max()) < _SMALL
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        np.savez_compressed(
            file,
            token_ids=token_ids.astype(np.uint16) if is_small else token_ids,
            lengths=np.array([len(example) for example in examples], dtype=np.int64),
            is_target=np.packbits(np.concatenate([example.is_target for example in examples])),
            is_unwanted=np.packbits(np.concatenate([_unwanted(example) for example in examples])),
            is_generated=np.array([example.is_unwanted is not None for example in examples]),
        )
    draft.replace(path)


def read_examples(path: Path) -> list[Example]:
    """The same examples again, in their order.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            lengths, is_generated = arrays["lengths"], arrays["is_generated"]
            count = int(lengths.sum())
            token_ids = arrays["token_ids"].astype(np.int32)
            is_target, is_unwanted = (
                np.unpackbits(arrays[name], count=count).astype(np.bool_)
                for name in ("is_target", "is_unwanted")
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise bad_data(str(path), f"is damaged ({error}): delete it") from error
    ends = lengths.cumsum()
    return [
        Example(token_ids[start:end], is_target[start:end], is_unwanted[start:end] if own else None)
        for start, end, own in zip(
            (ends - lengths).tolist(), ends.tolist(), is_generated.tolist(), strict=True
        )
    ]


def _unwanted(example: Example) -> NDArray[np.bool_]:
    if example.is_unwanted is None:
        return np.zeros(len(example), dtype=np.bool_)
    return example.is_unwanted
