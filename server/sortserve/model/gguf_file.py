"""A GGUF file as a Hugging Face folder, converted once and kept in the user's cache.

Conversion goes through transformers, which parses the file's metadata several times and builds
the model: some 20 s for 100 MB. The converted folder loads in well under a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from sortserve.errors import CheckpointError
from sortserve.model.families import check_family, read_model_config
from sortserve.model.hf import quiet
from sortserve.model.user_cache import user_cache_dir

__all__ = ["converted_gguf"]

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Part of the cache key: raise it when the conversion changes."""
_MIB = 1 << 20
_MAGIC = b"GGUF"
_SCALING = (b"rope.scaling.type", b"rope.scaling.factor", b"rope_freqs.weight")


@contextmanager
def converted_gguf(path: Path, dtype: torch.dtype) -> Iterator[Path]:
    """A Hugging Face folder with the contents of ``path``, weights in ``dtype``.

    The folder is valid inside the ``with`` block: where the cache cannot be written, it is a
    temporary one.

    Raises:
        CheckpointError: the file is no GGUF, or holds a model that is not supported.
    """
    cached = user_cache_dir() / f"{path.stem}-{_key(path, dtype)}"
    if (cached / "config.json").is_file():
        yield cached
        return
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".converting-", dir=cached.parent))
    except OSError as error:
        logger.warning("%s is converted at every start: no cache (%s).", path.name, error)
        draft = Path(tempfile.mkdtemp(prefix="sortserve-"))
    try:
        logger.info("Converting %s, once.", path.name)
        _convert(path, draft, dtype)
        yield _move(draft, cached)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _key(path: Path, dtype: torch.dtype) -> str:
    """A digest of what the result depends on; of the bytes, the first and last MiB."""
    import transformers

    status = path.stat()
    facts = (_FORMAT, transformers.__version__, dtype, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256(repr(facts).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MIB))
        file.seek(max(0, status.st_size - _MIB))
        digest.update(file.read(_MIB))
    return digest.hexdigest()[:16]


def _move(draft: Path, cached: Path) -> Path:
    """Put the finished folder in its place in one step; another process may have been faster."""
    if draft.parent != cached.parent:
        return draft
    try:
        draft.rename(cached)
    except OSError:
        return cached if (cached / "config.json").is_file() else draft
    return cached


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _refuse_dropped_scaling(path)
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        # The progress bar of the conversion heeds no setting, but writes to sys.stderr.
        with quiet(), redirect_stderr(io.StringIO()):
            hf_config = AutoConfig.from_pretrained(path.parent, **where)
            check_family(hf_config.to_dict())
            read_model_config(hf_config)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, config=hf_config, dtype=dtype, **where
            )
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error.message}") from error
    except Exception as error:  # transformers and gguf raise many kinds
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {reason}") from error
    state_dict = model.state_dict()
    if hf_config.tie_word_embeddings:
        state_dict.pop("lm_head.weight", None)
    save_file(
        {name: tensor.contiguous() for name, tensor in state_dict.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    # The folder is renamed into the cache next: a power cut must not leave half a file there.
    with (folder / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    tokenizer.save_pretrained(folder)
    document: dict[str, Any] = {**hf_config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def _refuse_dropped_scaling(path: Path) -> None:
    """Refuse a file with RoPE scaling: transformers reads GGUF files without it, silently.

    The names are searched for in the bytes: parsing the metadata once more takes seconds.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            found = [name for name in _SCALING if contents.find(name) >= 0]
    if found:
        raise CheckpointError(
            f"{path.name}: RoPE scaling in a GGUF file ({found[0].decode()}) is not supported; "
            "serve the safetensors checkpoint instead."
        )
