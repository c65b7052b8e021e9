"""A trained model as a checkpoint folder, all of it or none.

Everything is written to a folder beside the target first, and one rename makes it the checkpoint:
a run that is killed, or a disk that is full, leaves nothing that could be taken for one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sortserve.checkpoint.exit_modules import EXIT_MODULES
from sortserve.checkpoint.hf import quiet
from sortserve.checkpoint.sorted_json import SORTED_JSON, SortedInfo
from sortserve.core.errors import ConfigError
from sortserve_trainer.model.load import LoadedModel

__all__ = [
    "STOPPED_BY",
    "atomic_folder",
    "check_output",
    "disk_errors",
    "is_unfinished",
    "save_checkpoint",
]

STOPPED_BY = "stopped_by"
"""Key of a recipe: the limit that stopped the run before its last step."""
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What torch.save's messages have in common where its file cannot be written."""
_READERS = ("PytorchStreamReader", "Error while deserializing")
"""What torch.load's and safetensors' messages begin with where a file is damaged."""


def check_output(folder: Path) -> None:
    """Refuse a target that holds anything.

    Raises:
        ConfigError: it is a file, or a folder that is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        kind = "a file" if folder.is_file() else "a folder that is not empty"
        raise ConfigError(
            f"--output {folder} is {kind}: name one that does not exist yet.", param="output"
        )


def is_unfinished(folder: Path) -> bool:
    """Whether it is the checkpoint of a run that a limit stopped, which may take its place."""
    try:
        recipe = json.loads((folder / SORTED_JSON).read_bytes())["recipe"]
        return STOPPED_BY in recipe
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def atomic_folder(folder: Path, *, replaces_unfinished: bool = False) -> Iterator[Path]:
    """A draft folder that becomes ``folder`` if the block ends well, and vanishes if not.

    Args:
        folder: must not exist, or be empty.
        replaces_unfinished: it may also be what a limit stopped (``is_unfinished``).

    Raises:
        ConfigError: the disk is full or cannot be written; one line says which.
    """
    replaces = replaces_unfinished and is_unfinished(folder)
    if not replaces:
        check_output(folder)
    draft = folder.parent / f".{folder.name}.draft"
    previous = folder.parent / f".{folder.name}.previous"
    try:
        with disk_errors(f"--output {folder}"):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            mode = draft.stat().st_mode & 0o666
            for path in draft.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors writes files that only their owner can read
                    _sync(path)
            if replaces:
                shutil.rmtree(previous, ignore_errors=True)
                folder.rename(previous)
            elif folder.is_dir():
                folder.rmdir()
            draft.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Turn a disk that is full or cannot be written into one line, which begins with ``place``.

    Raises:
        ConfigError: what is done in the block could not be written, or a state to resume from is
            damaged.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(place, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors and torch.save report a full disk in types of their own.
        reason = " ".join(str(error).split())[:200]
        if any(mark in reason for mark in _READERS):
            raise ConfigError(
                f"{place} is damaged ({reason}): delete what is newest there, and the same command "
                "goes on from before it.",
                param="output",
            ) from error
        if type(error).__name__ == "SafetensorError":
            raise _cannot_write(place, reason) from error
        if any(mark in reason for mark in _TORCH_WRITER):
            raise _cannot_write(place, f"the disk is full, or refuses it ({reason})") from error
        raise


def save_checkpoint(
    loaded: LoadedModel,
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    card: str,
    dtype: torch.dtype,
) -> None:
    """Write what the engine serves: adapter or weights, exit modules, ``sorted.json``, the card.

    Args:
        loaded: the model, as it was loaded for training.
        folder: must not exist, be empty, or be what a limit stopped.
        recipe: goes into ``sorted.json``.
        card: text of ``README.md``.
        dtype: of the tensors on disk.

    Raises:
        ConfigError: it cannot be written.
    """
    model = loaded.model
    with atomic_folder(folder, replaces_unfinished=True) as draft, quiet():
        is_self_contained = _save_trunk(loaded, draft, dtype, folder)
        modules = {n: t.to(dtype).contiguous() for n, t in model.exit_modules.tensors().items()}
        if modules:
            save_file(modules, draft / EXIT_MODULES, metadata={"format": "pt"})
        SortedInfo(
            format_version=1,
            base=None if is_self_contained else portable_base(loaded.base, folder),
            num_layers=model.exits[-1],
            exits=model.exits,
            recipe=dict(recipe),
            exit_modules=model.exit_modules.kinds(model.exits),
        ).write(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")


def _save_trunk(loaded: LoadedModel, draft: Path, dtype: torch.dtype, folder: Path) -> bool:
    """Adapter, weights, or nothing for a frozen base; returns whether no base is needed."""
    trunk: Any = loaded.model.trunk
    if hasattr(trunk, "peft_config"):
        for config in trunk.peft_config.values():
            config.base_model_name_or_path = portable_base(loaded.base, folder)
            config.inference_mode = True
        state = {n: p.data for n, p in trunk.named_parameters() if "lora_" in n}
        trunk.save_pretrained(draft, state_dict={n: t.to(dtype) for n, t in state.items()})
        (draft / "README.md").unlink(missing_ok=True)
        return False
    if not loaded.trains_weights:
        return False
    base = loaded.model.base
    base.config._attn_implementation = None
    base.to(dtype).save_pretrained(draft)
    loaded.tokenizer.save_pretrained(draft)
    return True


def portable_base(base: str, folder: Path) -> str:
    """A base on this disk as a path from the checkpoint, so that both can move together."""
    return os.path.relpath(base, folder.resolve()) if Path(base).is_absolute() else base


def _cannot_write(place: str, reason: str) -> ConfigError:
    return ConfigError(f"{place} cannot be written: {reason}.", param="output")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
