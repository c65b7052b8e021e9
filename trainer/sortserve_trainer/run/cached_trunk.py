"""Training modules alone without their trunk: its states come from a ``TrunkCache``.

What is kept of an example is what the loss reads: the residual stream at every exit (of all tokens
where the exit's module attends, else of the rows that the head reads), the normed state at full
depth, from which the teacher's distribution follows exactly, and the columns of the head that the
full depth finds likeliest, so that a vocabulary sample can be chosen before any logits are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import linear

from sortserve.core.errors import ConfigError
from sortserve_trainer.commands.console import Console
from sortserve_trainer.data import Pack, collate
from sortserve_trainer.model.load import LoadedModel
from sortserve_trainer.model.sorted_model import FULL, SortedModel, stream_name
from sortserve_trainer.model.trunk_cache import (
    FORMAT_VERSION,
    Stream,
    TrunkCache,
    example_key,
    read_rows_of,
)
from sortserve_trainer.run.save import disk_errors

__all__ = ["NUM_LIKELY", "CachedTrunk", "check_room", "trunk_digest"]

NUM_LIKELY = 16
"""Columns kept for each row. A sample takes 3 columns for each token of a chunk, of those that any
token finds likely, so 16 of each hold what it looks for."""
CHUNK_ROWS = 128
"""Whose logits exist at once: few, so that a CPU finds them in its cache."""
LOOK_S = 1.0
"""Between two looks of the processes that wait for the one that writes."""


class CachedTrunk:
    """What a frozen trunk says of every pack of a run.

    Args:
        root: folder of caches; this trunk's is a folder in it, named by a hash of the weights,
            exits, dtypes and the version of the format.
        loaded: with the trunk in memory.
        dtype: of the states on disk.
        keeps_likely: whether the loss samples the vocabulary.
    """

    def __init__(
        self, root: Path, loaded: LoadedModel, *, dtype: torch.dtype, keeps_likely: bool
    ) -> None:
        model = loaded.model
        self._model = model
        self._device, self._compute_dtype = loaded.device, loaded.dtype
        self.root = root
        streams = _streams(model, dtype, keeps_likely=keeps_likely)
        self.described = {
            "format": FORMAT_VERSION,
            "trunk": trunk_digest(loaded),
            "computed_in": str(loaded.dtype),
            "streams": [
                [s.name, s.width, str(s.dtype), "tokens" if s.of_tokens else "rows"]
                for s in streams
            ],
        }
        name = hashlib.sha256(json.dumps(self.described).encode()).hexdigest()[:32]
        self.cache = TrunkCache(root / name, streams)

    def batch(self, packs: Sequence[Pack]) -> dict[str, Tensor]:
        """``cached`` of ``SortedModel.forward`` for some packs as one row; see ``collate``."""
        examples = [example for pack in packs for example in pack.examples]
        found = self.cache.read([example_key(example) for example in examples])
        starts = np.cumsum([0, *map(len, examples)])
        kept = np.concatenate(
            [start + read_rows_of(e) for start, e in zip(starts[:-1], examples, strict=True)]
        )
        batch = collate(packs)
        for name in ("target", "unwanted"):
            at = np.searchsorted(kept, batch[f"{name}_rows"].numpy())
            found[f"{name}_at"] = torch.from_numpy(at)
        return found

    def fill(self, packs: Iterable[Pack], *, max_bytes: int, writes: bool = True) -> int:
        """Let the trunk say what is missing; returns the tokens it was asked.

        It may be killed at any moment, and goes on where it was.

        Args:
            packs: of the run, in its order: what is computed in the same packs as it would be
                without a cache is the same to the bit.
            max_bytes: most that the folder of caches may take.
            writes: False waits for another process of this run.

        Raises:
            ConfigError: it would take more than ``max_bytes``, or more than the disk has.
        """
        missing = list(_missing(self.cache, packs))
        num_tokens = sum(pack.num_tokens for pack in missing)
        if not writes:
            while any(_missing(self.cache, missing)):
                time.sleep(LOOK_S)
                self.cache = TrunkCache(self.cache.folder, self.cache.streams)
            return 0
        if not missing:
            return 0
        num_rows = sum(len(read_rows_of(e)) for pack in missing for e in pack.examples)
        self._check_room(self.cache.bytes_of(num_tokens, num_rows), num_tokens, max_bytes)
        with disk_errors(f"--trunk-cache {self.root}"), self.cache.writing() as writer:
            about = json.dumps(self.described, indent=1)
            (self.cache.folder / "about.json").write_text(about, encoding="utf-8")
            for pack in _shown(missing, num_tokens):
                for example, values in self._states(pack):
                    key = example_key(example)
                    num_rows = len(read_rows_of(example))
                    writer.append(key, len(example), num_rows, values)
        return num_tokens

    def _check_room(self, num_bytes: int, num_tokens: int, max_bytes: int) -> None:
        held = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        beside = _existing(self.root)
        check_room(
            num_bytes,
            num_tokens,
            held=held,
            max_bytes=max_bytes,
            free=shutil.disk_usage(beside).free,
            root=str(self.root),
        )

    @torch.inference_mode()
    def _states(self, pack: Pack) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """Each example of a pack with the values of its streams."""
        model = self._model
        full = model.exits[-1]
        batch = collate([pack])
        position_ids = batch["position_ids"].to(self._device)
        uses_autocast = self._compute_dtype is not torch.float32
        was_training = model.training
        model.eval()
        with torch.autocast(self._device.type, dtype=self._compute_dtype, enabled=uses_autocast):
            states = model.trunk_states(
                batch["input_ids"].to(self._device), position_ids, batch["lengths"], model.exits
            )
            full_TD = model.base.model.norm(states[full])
        model.train(was_training)
        lengths = [len(example) for example in pack.examples]
        starts = np.cumsum([0, *lengths[:-1]])
        rows = [start + read_rows_of(e) for start, e in zip(starts, pack.examples, strict=True)]
        kept = torch.from_numpy(np.concatenate(rows)).to(self._device)
        values = {FULL: full_TD, **{stream_name(e): states[e] for e in model.exits[:-1]}}
        for stream in self.cache.streams:
            if stream.name in values and not stream.of_tokens:
                values[stream.name] = values[stream.name].index_select(0, kept)
        if any(stream.name == "likely_ids" for stream in self.cache.streams):
            values |= self._likely(values[FULL])
        parts = {
            stream.name: values[stream.name].split(
                lengths if stream.of_tokens else [len(own) for own in rows]
            )
            for stream in self.cache.streams
        }
        for i, example in enumerate(pack.examples):
            yield example, {name: part[i] for name, part in parts.items()}

    def _likely(self, full_SD: Tensor) -> dict[str, Tensor]:
        """The columns that the full depth finds likeliest at each row, as the loss has them."""
        head = self._model.head(self._model.exits[-1]).to(self._compute_dtype)
        parts = []
        for start in range(0, len(full_SD), CHUNK_ROWS):
            x_CD = full_SD[start : start + CHUNK_ROWS].to(self._compute_dtype)
            log_p = linear(x_CD, head).log_softmax(-1, dtype=torch.float32)
            parts.append(log_p.topk(min(NUM_LIKELY, log_p.shape[1])))
        return {
            "likely_ids": torch.cat([part.indices for part in parts]).int(),
            "likely_log_probs": torch.cat([part.values for part in parts]),
        }


def check_room(
    num_bytes: int, num_tokens: int, *, held: int, max_bytes: int, free: int, root: str
) -> None:
    """Refuse what is to be added to a folder of caches where there is no room for it.

    Args:
        num_bytes: to be added, for ``num_tokens`` tokens.
        num_tokens: as above.
        held: bytes that the folder has.
        max_bytes: most that it may have.
        free: bytes of the disk that are free.
        root: the folder, for the message.

    Raises:
        ConfigError: more than ``max_bytes``, or than is free.
    """
    what = f"the trunk's states of {num_tokens:,} tokens take {_size(num_bytes)}"
    if held + num_bytes > max_bytes:
        raise ConfigError(
            f"--trunk-cache-gb {max_bytes / 1e9:g}: {what}, and {root} has {_size(held)}: "
            "give more, train on fewer tokens (--max-tokens), or delete caches of other trunks "
            "in that folder.",
            param="trunk-cache-gb",
        )
    if num_bytes > free:
        raise ConfigError(
            f"--trunk-cache {root}: {what}, and the disk has {_size(free)} left.",
            param="trunk-cache",
        )


def _size(num_bytes: int) -> str:
    """In the unit that suits it: ``2.10 GB``, ``34.56 MB``, ``7.80 kB``."""
    return decimal(num_bytes, precision=2)


def trunk_digest(loaded: LoadedModel) -> str:
    """A hash of everything that the trunk's states follow from beside the tokens."""
    digest = hashlib.blake2b(repr(loaded.config).encode(), digest_size=16)
    trunk = loaded.model.trunk
    for name, parameter in sorted(trunk.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_bytes_of(parameter))
        absmax = getattr(getattr(parameter, "quant_state", None), "absmax", None)
        if absmax is not None:  # 4-bit codes alone say nothing of sizes
            digest.update(_bytes_of(absmax))
    for name, module in sorted(trunk.named_modules()):
        if hasattr(module, "lora_A"):
            digest.update(f"{name} {sorted(module.scaling.items())}".encode())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _streams(model: SortedModel, dtype: torch.dtype, *, keeps_likely: bool) -> tuple[Stream, ...]:
    hidden = model.config.hidden_size
    streams = [
        Stream(stream_name(e), hidden, dtype, of_tokens=model.exit_modules.attends(e))
        for e in model.exits[:-1]
    ]
    streams.append(Stream(FULL, hidden, dtype))
    if keeps_likely:
        width = min(NUM_LIKELY, model.config.vocab_size)
        streams.append(Stream("likely_ids", width, torch.int32))
        streams.append(Stream("likely_log_probs", width, torch.float32))
    return tuple(streams)


def _missing(cache: TrunkCache, packs: Iterable[Pack]) -> Iterator[Pack]:
    """Packs of the examples that are not there yet, each example once."""
    seen: set[bytes] = set()
    for pack in packs:
        new = []
        for example in pack.examples:
            key = example_key(example)
            if key not in cache and key not in seen:
                seen.add(key)
                new.append(example)
        if new:
            yield Pack(tuple(new))


def _shown(packs: Sequence[Pack], num_tokens: int) -> Iterator[Pack]:
    """The packs, with a bar in a terminal and a line anywhere else."""
    console = Console(file=sys.stderr)
    started_s = time.monotonic()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("trunk's states", total=num_tokens)
        for pack in packs:
            yield pack
            bar.update(task, advance=pack.num_tokens)
    rate = num_tokens / max(1e-9, time.monotonic() - started_s)
    text = f"kept the trunk's states of {num_tokens:,} tokens, {rate:,.0f} tokens/s"
    console.print(text, soft_wrap=True, highlight=False)


def _existing(folder: Path) -> Path:
    """The folder, or the one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
