"""Files are written whole or not at all, for whom they are meant."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortserve.core.atomic_write import PRIVATE, write_atomically


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was_and_leaves_no_draft(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"after")

    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("usual_umask")
def test_all_may_read_a_file_that_is_not_private(tmp_path: Path) -> None:
    write_atomically(tmp_path / "shared", b"")
    write_atomically(tmp_path / "private", b"", mode=PRIVATE)

    assert mode(tmp_path / "shared") == 0o644
    assert mode(tmp_path / "private") == 0o600


def test_a_file_that_is_there_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a long content from before")
    before = path.open("rb")

    write_atomically(path, b"new")

    with before:
        assert before.read() == b"a long content from before"
    assert path.read_bytes() == b"new"
