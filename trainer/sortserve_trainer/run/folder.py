"""``OUTPUT.run``: what a run needs beside its result, and what lets it be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sortserve.core.atomic_write import write_atomically
from sortserve.core.errors import ConfigError
from sortserve_trainer.data import file_digest, parse_source
from sortserve_trainer.run.save import check_output, disk_errors, is_unfinished
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["Run", "plain_settings"]

OF_ONE_START = {"config", "max_time", "max_steps_per_run", "prepare_only", "dry_run"}
"""Settings that are not the run's, but of one start of it."""
_HUB = {"push_to_hub", "hub_model_id", "hub_private_repo"}
FREE = {"log_every", "save_every", "report_to", "trunk_cache_gb", *_HUB}
"""Settings that a run may be resumed with other values of: no weight hangs on them."""
RECORD, LOCK = "run.json", "lock"
BASE_DIGEST, WORLD_SIZE = "base_digest", "world_size"
VERSION = 2
"""Of the record. Before there were numbers it was the settings alone."""


class Run:
    """``OUTPUT.run``: everything of a run but its result.

    Attributes:
        folder: it.
        decays_all: whether the run was begun when weight decay was of all tensors, norms too.
    """

    def __init__(self, settings: TrainSettings, record: Mapping[str, Any] | None) -> None:
        self.folder = _folder(settings)
        self.decays_all = record is not None and "version" not in record
        self._settings, self._record = settings, record
        self._base_digest: str | None = None

    @classmethod
    @contextmanager
    def open(cls, settings: TrainSettings) -> Iterator[Run]:
        """Find the run that these settings began, or prepare one, for this process alone.

        A run that is not begun (``begin``) when the block ends has left nothing behind.

        Raises:
            ConfigError: there is another run, or another process is at this one.
        """
        folder = _folder(settings)
        if not ((folder / RECORD).is_file() and is_unfinished(settings.output)):
            check_output(settings.output)
        if int(os.environ.get("RANK", "0")) > 0:
            yield cls(settings, _read_record(folder))
            return
        with disk_errors(f"--output {settings.output}"):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            lock = _lock(folder)
        run = None
        try:
            record = _read_record(folder)
            if record is not None:
                _check_same(record, settings, folder)
                _check_world(record, folder)
            run = cls(settings, record)
            yield run
        finally:
            with lock:
                (folder / LOCK).unlink(missing_ok=True)
                if made and (run is None or run._record is None):
                    shutil.rmtree(folder, ignore_errors=True)
                    for parent in made[1:]:
                        with suppress(OSError):
                            parent.rmdir()

    @property
    def prepared(self) -> Path:
        """Folder of examples that ``--prepare-only`` has made."""
        return self.folder / "data"

    def check_data(
        self,
        described: Sequence[Mapping[str, Any]],
        evaluated: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Refuse data that are not those that the run began with.

        Args:
            described: ``RunData.described``.
            evaluated: ``RunData.evaluated``.

        Raises:
            ConfigError: a file has changed; the message names it.
        """
        record = self._record or {}
        if "version" not in record:
            return
        for flag, found in (("data", described), ("eval-data", evaluated)):
            for old, new in zip(record[flag], found, strict=True):
                if old["sha256"] != new["sha256"]:
                    raise ConfigError(
                        f"--{flag} {new['reference']} has changed since the unfinished run in "
                        f"{self.folder} began (sha256 {old['sha256'][:12]}, now "
                        f"{new['sha256'][:12]}): put the old one back, name another --output, or "
                        "delete that folder.",
                        param=flag,
                    )

    def check_base(self, digest: str) -> None:
        """Refuse a base that is not the one that the run began with, whatever it is called.

        Args:
            digest: ``LoadedModel.base_digest``.

        Raises:
            ConfigError: it is another one.
        """
        old = (self._record or {}).get(BASE_DIGEST, digest)
        if old != digest:
            raise ConfigError(
                f"--base {self._settings.base} has changed since the unfinished run in "
                f"{self.folder} began (digest {old[:12]}, now {digest[:12]}): put the old one "
                "back, name another --output, or delete that folder.",
                param="base",
            )
        self._base_digest = digest

    def begin(
        self,
        described: Sequence[Mapping[str, Any]],
        evaluated: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write down what the run is, so that it can be resumed.

        The second time does nothing, but for what a run whose data alone were prepared had not yet:
        the base, and how many processes share it.

        Args:
            described: ``RunData.described``.
            evaluated: ``RunData.evaluated``.
        """
        if int(os.environ.get("RANK", "0")) > 0:
            return
        record = self._record or {
            "version": VERSION,
            "settings": plain_settings(self._settings),
            "base": os.path.realpath(self._settings.base),
            "data": _digests(described),
            "eval-data": _digests(evaluated),
        }
        if self._base_digest is not None and "version" in record:
            record = {WORLD_SIZE: _world_size(), **record, BASE_DIGEST: self._base_digest}
        if record == self._record:
            return
        self._record = record
        with disk_errors(f"--output {self._settings.output}"):
            text = json.dumps(self._record, indent=2)
            write_atomically(self.folder / RECORD, text.encode())

    def finish(self) -> None:
        """The states have done their work; the logs stay."""
        for path in (self.folder / "states", self.folder / "heads", self.prepared):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / RECORD).unlink(missing_ok=True)


def plain_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that the recipe tells, as JSON values."""
    values: dict[str, Any] = settings.model_dump(
        mode="json", exclude={"output", "device", *OF_ONE_START}
    )
    return values


def _folder(settings: TrainSettings) -> Path:
    return settings.output.with_name(f"{settings.output.name}.run")


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    with suppress(ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    raise ConfigError(
        f"{path} is damaged: delete {folder} to begin anew, or name another --output.",
        param="output",
    )


def _lock(folder: Path) -> BinaryIO:
    """The open file whose lock says that this process is at the run; the system frees it.

    Raises:
        ConfigError: another process has it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("ab")
        except FileNotFoundError:
            continue  # who had it took the folder away
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(
                f"{folder}: another process is training this --output: wait for it, or name "
                "another one.",
                param="output",
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        file.close()


def _check_same(record: Mapping[str, Any], settings: TrainSettings, folder: Path) -> None:
    before: Mapping[str, Any] = record.get("settings", record)
    now, defaults = plain_settings(settings), _defaults()
    for name in sorted({*before, *now} - FREE):
        old = before.get(name, defaults.get(name))  # flags are added as versions go by
        new = now.get(name)
        if old == new or _is_same(name, record, old, new):
            continue
        flag = name.replace("_", "-")
        raise ConfigError(
            f"{folder} holds an unfinished run with --{flag} {old!r}, not {new!r}: give the same "
            "flags to resume it, name another --output, or delete that folder.",
            param=flag,
        )


def _check_world(record: Mapping[str, Any], folder: Path) -> None:
    """A step is of all processes: with another number of them the run would be another one."""
    now = _world_size()
    old = record.get(WORLD_SIZE, now)
    if old != now:
        raise ConfigError(
            f"{folder} holds an unfinished run of {old} processes, not {now}: launch as many to "
            "resume it, name another --output, or delete that folder.",
            param="output",
        )


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_same(name: str, record: Mapping[str, Any], old: Any, new: Any) -> bool:
    """Whether two values of a setting mean the same, though they are spelled differently."""
    if name == "base" and "base" in record and "version" in record:
        return bool(os.path.realpath(new) == record["base"])
    if name == "trunk_cache":
        return (old is None) == (new is None)
    if name in ("data", "eval_data") and "version" in record and len(old) == len(new):
        digests = [one["sha256"] for one in record[name.replace("_", "-")]]
        return all(map(_is_same_source, old, new, digests))
    return False


def _is_same_source(old: str, new: str, digest: str) -> bool:
    source = parse_source(new)
    path = Path(source.reference).expanduser()
    is_same_file = path.is_file() and bool(digest) and file_digest(path) == digest
    return old == new or (is_same_file and parse_source(old).weight == source.weight)


def _digests(described: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{key: one[key] for key in ("reference", "sha256")} for one in described]


def _defaults() -> dict[str, Any]:
    needed = {"data": ("data",), "output": Path("output"), "exits": (1,)}
    return plain_settings(TrainSettings.model_validate(needed))
