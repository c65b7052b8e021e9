"""A GGUF file as a Hugging Face folder, converted once and kept in the user's cache.

Conversion goes through transformers, which builds the model: some 4 s for 100 MB. The converted
folder loads in well under a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sortserve.checkpoint.families import check_family, read_model_config
from sortserve.checkpoint.hf import quiet
from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.cache_bound import held, prune
from sortserve.core.errors import CheckpointError
from sortserve.core.user_cache import file_digest, is_private, open_user_cache
from sortserve.model.config_fields import check_fields
from sortserve.telemetry.status_line import phase, phase_over

__all__ = ["Conversion", "convert_gguf", "converted_gguf"]

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Part of the cache key: raise it when the conversion changes."""
_DIGESTS = "digests.json"
"""In a converted folder: the sha256 of every other file."""
_WEIGHTS = "model.safetensors"
_MIB = 1 << 20
_MAGIC = b"GGUF"
_SCALING = (b"rope.scaling.type", b"rope.scaling.factor", b"rope_freqs.weight")


@dataclass(frozen=True)
class Conversion:
    """A Hugging Face folder with the contents of a GGUF file."""

    folder: Path
    has_whole_weights: bool
    """False: nobody has looked whether the weights are what was written."""


@contextmanager
def converted_gguf(path: Path, dtype: torch.dtype) -> Iterator[Path]:
    """The folder of ``convert_gguf``, inside the ``with`` block."""
    with ExitStack() as stack:
        yield convert_gguf(path, dtype, stack).folder


def convert_gguf(
    path: Path, dtype: torch.dtype, stack: ExitStack, *, with_weights: bool = True
) -> Conversion:
    """A Hugging Face folder with the contents of ``path``, weights in ``dtype``.

    The folder is valid until ``stack`` is closed: where the cache cannot be used, it is a
    temporary one. A conversion that was kept is used if it is what was written.

    Args:
        path: of the GGUF file.
        dtype: of the weights.
        stack: holds the folder.
        with_weights: False: the weights may turn out not to be needed: they are not read.

    Raises:
        CheckpointError: the file is no GGUF, or holds a model that is not supported.
    """
    cache = open_user_cache()
    cached = None if cache is None else cache / f"{path.stem[:100]}-{_key(path, dtype)}"
    if cached is not None and _is_held(cached, stack, with_weights=with_weights):
        return Conversion(cached, has_whole_weights=with_weights)
    converting = f"converting {path.name}, once, some 20 s"
    logger.info("%s", converting, extra=phase(converting))
    folder = None if cached is None else _convert_into_cache(path, cached, dtype, stack)
    folder = folder or _convert_for_now(path, dtype, stack)
    logger.info("converted %s", path.name, extra=phase_over(converting))
    return Conversion(folder, has_whole_weights=True)


def _is_held(folder: Path, stack: ExitStack, *, with_weights: bool) -> bool:
    """Whether a folder of the cache is whole; then it stays until the stack is closed."""
    stack.enter_context(held(folder))
    return _is_whole(folder, with_weights=with_weights)


def _convert_into_cache(
    path: Path, cached: Path, dtype: torch.dtype, drafts: ExitStack
) -> Path | None:
    """The conversion in its place in the cache; None, and a warning, where there is no room."""
    try:
        draft = _make_draft(cached.parent, drafts)
        _convert(path, draft, dtype)
        _seal(draft)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk in their own types
        logger.warning("%s is converted at every start: no cache (%s).", path.name, error)
        return None
    folder = _move(draft, cached)
    drafts.enter_context(held(folder))
    prune(cached.parent)
    return folder


def _convert_for_now(path: Path, dtype: torch.dtype, drafts: ExitStack) -> Path:
    """The conversion in a temporary folder, until ``drafts`` closes."""
    try:
        draft = _make_draft(None, drafts)
        _convert(path, draft, dtype)
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path.name} cannot be converted, there is nowhere to write to: {reason}. Make room, "
            "or name a folder in SORTSERVE_CACHE_DIR."
        ) from error
    return draft


def _make_draft(parent: Path | None, drafts: ExitStack) -> Path:
    draft = Path(tempfile.mkdtemp(prefix=".converting-", dir=parent))
    drafts.callback(shutil.rmtree, draft, ignore_errors=True)
    return draft


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


def _seal(folder: Path) -> None:
    """Give every file to its owner alone, and write down what it holds."""
    digests = {}
    for path in folder.iterdir():
        path.chmod(0o600)
        digests[path.name] = file_digest(path)
    write_atomically(folder / _DIGESTS, json.dumps(digests, indent=2).encode(), mode=PRIVATE)


def _is_whole(folder: Path, *, with_weights: bool = True) -> bool:
    """Whether a folder of the cache holds what was written, to the last bit, and nothing else.

    All that is going to be used is read: 540 MB of weights take 0.3 s, which is little beside the
    rest of such a start. A bit that flipped would be a model that errs without a sign.
    """
    unread = {_DIGESTS} if with_weights else {_DIGESTS, _WEIGHTS}
    try:
        if not is_private(folder, stat.S_IFDIR):
            return False
        names = {path.name for path in folder.iterdir()}
        if not all(is_private(folder / name) for name in names):
            return False
        digests = json.loads((folder / _DIGESTS).read_bytes())
        found = {name: file_digest(folder / name) for name in names - unread}
        if digests.keys() != names - {_DIGESTS}:
            return False
    except (OSError, ValueError, AttributeError):
        return False
    return bool(found) and all(digests[name] == digest for name, digest in found.items())


def _move(draft: Path, cached: Path) -> Path:
    """Put the finished folder in its place in one step; another process may have been faster."""
    for _ in range(2):
        try:
            draft.rename(cached)
        except OSError:
            if _is_whole(cached):
                return cached
            logger.warning("%s is damaged or not ours: it is made again.", cached)
            _remove(cached)
        else:
            return cached
    return draft


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sortserve.checkpoint.gguf_reading import parsed_once

    _refuse_dropped_scaling(path)
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        # The progress bar of the conversion heeds no setting, but writes to sys.stderr.
        with quiet(), redirect_stderr(io.StringIO()), parsed_once():
            hf_config = AutoConfig.from_pretrained(path.parent, **where)
            check_family(hf_config.to_dict())
            check_fields(hf_config.to_dict())
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
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    # The folder is renamed into the cache next: a power cut must not leave half a file there.
    with (folder / _WEIGHTS).open("rb") as file:
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
