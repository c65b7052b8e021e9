"""What is kept between starts: private, whole, and never in the way of a start."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sortserve.checkpoint import gguf as gguf_file
from sortserve.checkpoint.load import load_checkpoint
from sortserve.cli import main
from sortserve.core import user_cache
from sortserve.core.atomic_write import write_atomically
from sortserve.core.errors import CheckpointError
from sortserve.core.user_cache import open_user_cache, user_cache_dir
from sortserve.cost.cache import cache_path, read_samples, write_samples
from sortserve.cost.model import StepShape
from sortserve.model.backends.cpu import build as native
from sortserve.model.backends.cpu.build import build_library
from sortserve.model.backends.cpu.isa import ISAS
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import make_tiny_checkpoint, tiny_hf_model

STRANGER = 12_345
PORTABLE = ISAS["portable"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which does not exist yet."""
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(user_cache, "_said", set())
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that writes down each run, and a library that changes with nothing."""
    path = tmp_path / "compiler"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\nfor out; do :; done\n'
        'echo run >> "$0.log"; echo "a whole library" > "$out"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that GGUF files were converted into, in order."""
    converted: list[Path] = []
    convert = gguf_file._convert

    def counted(path: Path, folder: Path, dtype: torch.dtype) -> None:
        converted.append(folder)
        convert(path, folder, dtype)

    monkeypatch.setattr(gguf_file, "_convert", counted)
    return converted


def num_compilations(compiler: str) -> int:
    log = Path(f"{compiler}.log")
    return log.read_text().count("run") if log.exists() else 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def load_gguf(path: Path) -> torch.Tensor:
    return load_checkpoint(str(path), dtype="float32", device="cpu").weights.embed


# The folder.


def test_a_new_cache_folder_is_its_owners_alone(cache: Path) -> None:
    assert open_user_cache() == cache
    assert mode(cache) == 0o700


def make_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def make_group_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def make_sticky(path: Path) -> None:
    path.mkdir()
    path.chmod(0o1777)


def make_foreign(path: Path) -> None:
    path.mkdir(0o700)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(path, STRANGER, STRANGER)


def make_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir(0o700)
    path.symlink_to(elsewhere)


def make_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


UNSAFE: list[Callable[[Path], None]] = [
    *(make_writable, make_group_writable, make_sticky, make_foreign, make_link, make_dangling),
    *(Path.touch, os.mkfifo),
]


@pytest.mark.parametrize("make", UNSAFE)
def test_a_folder_that_others_may_have_written_to_is_not_used_and_that_is_said_once(
    cache: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(cache)

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        assert [open_user_cache() for _ in range(3)] == [None] * 3

    assert len(caplog.records) == 1
    assert str(cache) in caplog.text


@pytest.mark.parametrize("make", UNSAFE)
def test_a_library_in_such_a_folder_is_never_loaded(
    cache: Path, make: Callable[[Path], None], compiler: str, tmp_path: Path
) -> None:
    planted = build_library(PORTABLE, tmp_path / "other", compiler)
    make(cache)
    if cache.is_dir():
        shutil.copy(planted, cache / planted.name)

    library = build_library(PORTABLE, None, compiler)

    assert library.parent != cache
    assert mode(library.parent) == 0o700
    assert library.read_text() == "a whole library\n"
    assert num_compilations(compiler) == 2


def test_a_folder_that_root_made_for_all_to_read_is_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o755)

    assert open_user_cache() == cache


def test_a_folder_that_cannot_be_made_is_no_failure(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)

    assert open_user_cache() is None
    assert "Read-only file system" in caplog.text


@pytest.mark.parametrize("name", ["x" * 300, "\udcff", "x" * 5000])
def test_a_name_that_no_folder_has_is_no_failure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / name))

    assert open_user_cache() in (None, tmp_path / name)


# Users without a home.


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that /etc/passwd does not know, and nothing in the environment that names it."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("HOME", "XDG_CACHE_HOME", "SORTSERVE_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "")  # so that it is restored


@pytest.mark.usefixtures("nobody")
def test_without_a_home_there_is_no_cache_and_one_warning(
    caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    assert user_cache_dir() is None
    assert open_user_cache() is None
    assert build_library(PORTABLE, None, compiler).read_text() == "a whole library\n"
    assert len(caplog.records) == 1
    assert "no home folder" in caplog.text


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_name_gets_one_that_libraries_can_use() -> None:
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()

    assert main(["version"]) == 0
    assert getpass.getuser() == f"uid-{os.getuid()}"


@pytest.mark.slow
def test_a_server_is_built_for_a_user_without_a_home_and_a_name(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))
    code = (
        "import pwd, sys\n"
        "def unknown(*_): raise KeyError\n"
        "pwd.getpwuid = unknown\n"
        "from sortserve.cli import main\n"
        f"sys.exit(main(['profile', {str(checkpoint)!r}]))"
    )
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept)

    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert ended.stderr.count("no cache") == 1


def test_a_home_that_cannot_be_written_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SORTSERVE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/self")

    assert open_user_cache() is None
    assert len(caplog.records) == 1


# Kernels.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def plant(path: Path) -> None:
    path.write_bytes(b"planted")


def link_elsewhere(path: Path) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


def let_others_write(path: Path) -> None:
    path.chmod(0o666)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, STRANGER, STRANGER)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [cut, empty, flip_a_bit, plant, link_elsewhere, let_others_write, give_away, fifo]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_what_was_compiled_is_built_again(
    cache: Path, compiler: str, damage: Callable[[Path], None]
) -> None:
    library = build_library(PORTABLE, None, compiler)
    damage(library)

    again = build_library(PORTABLE, None, compiler)

    assert again.read_text() == "a whole library\n"
    assert (mode(again), again.lstat().st_uid) == (0o600, os.geteuid())
    assert num_compilations(compiler) == 2
    assert build_library(PORTABLE, None, compiler) == again
    assert num_compilations(compiler) == 2


def test_a_library_under_a_name_that_is_not_its_own_is_never_loaded(
    cache: Path, compiler: str
) -> None:
    library = build_library(PORTABLE, None, compiler)
    content, key = library.read_bytes(), library.name.rpartition("-")[0]
    library.unlink()
    for name in (f"{key}.so", f"{key}-.so", f"{key}-{'0' * 32}.so", f"{key}-x.so"):
        (cache / name).write_bytes(b"planted")
    (cache / f"kernels-portable-{'0' * 20}-{library.name.rpartition('-')[2]}").write_bytes(content)

    assert build_library(PORTABLE, None, compiler) == library
    assert num_compilations(compiler) == 2
    assert library.read_text() == "a whole library\n"


def test_a_full_disk_costs_the_kernels_their_place_and_nothing_else(
    cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes, *, mode: int) -> None:
        if path.parent == cache:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content, mode=mode)

    monkeypatch.setattr(native, "write_atomically", full)

    library = build_library(PORTABLE, None, compiler)

    assert library.parent != cache
    assert library.read_text() == "a whole library\n"
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


# Converted weights.


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())


def test_a_conversion_belongs_to_its_owner_alone(cache: Path, gguf: Path) -> None:
    load_gguf(gguf)

    (folder,) = cache.iterdir()
    assert mode(folder) == 0o700
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    names = {path.name for path in folder.iterdir()}
    assert json.loads((folder / "digests.json").read_text()).keys() == names - {"digests.json"}


def add_a_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")


def lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_the_digests(folder: Path) -> None:
    (folder / "digests.json").unlink()


def spoil_the_digests(folder: Path) -> None:
    (folder / "digests.json").write_text("[1]")


def become_a_link(folder: Path) -> None:
    link_elsewhere(folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("planted")


def damage_of(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        damage(folder / name)

    return act


@pytest.mark.parametrize(
    "damage",
    [
        damage_of("model.safetensors", cut),
        damage_of("model.safetensors", flip_a_bit),
        damage_of("model.safetensors", let_others_write),
        damage_of("config.json", plant),
        damage_of("config.json", fifo),
        *(add_a_file, lose_a_file, lose_the_digests, spoil_the_digests),
        *(become_a_link, become_a_file, let_others_write),
    ],
)
def test_a_conversion_that_is_not_what_was_written_is_found_out(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "converted"
    folder.mkdir(mode=0o700)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(os.urandom(1000))
    gguf_file._seal(folder)
    assert gguf_file._is_whole(folder)

    damage(folder)

    assert not gguf_file._is_whole(folder)


@pytest.mark.parametrize(
    "damage", [damage_of("model.safetensors", cut), become_a_link, become_a_file]
)
def test_it_is_then_made_again(
    cache: Path, gguf: Path, conversions: list[Path], damage: Callable[[Path], None]
) -> None:
    before = load_gguf(gguf)
    (folder,) = cache.iterdir()
    damage(folder)

    assert torch.equal(load_gguf(gguf), before)
    assert len(conversions) == 2
    assert gguf_file._is_whole(folder)


def test_two_that_convert_at_once_both_load_and_leave_one_folder(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = gguf_file._convert
    others: list[torch.Tensor] = []

    def overtaken(path: Path, folder: Path, dtype: torch.dtype) -> None:
        if not others:
            others.append(torch.empty(0))
            others[0] = load_gguf(path)  # somebody else converts it meanwhile
        convert(path, folder, dtype)

    monkeypatch.setattr(gguf_file, "_convert", overtaken)

    assert torch.equal(load_gguf(gguf), others[0])
    assert len(list(cache.iterdir())) == 1


def test_a_full_disk_is_no_failure_while_there_is_room_elsewhere(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    convert = gguf_file._convert

    def full(path: Path, folder: Path, dtype: torch.dtype) -> None:
        if folder.parent == cache:
            raise OSError(errno.ENOSPC, "No space left on device")
        convert(path, folder, dtype)

    monkeypatch.setattr(gguf_file, "_convert", full)

    assert load_gguf(gguf).numel()
    assert list(cache.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_no_room_anywhere_is_one_line_that_says_what_to_do(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, folder: Path, dtype: torch.dtype) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_file, "_convert", full)

    with pytest.raises(CheckpointError, match="SORTSERVE_CACHE_DIR") as caught:
        load_gguf(gguf)

    assert "\n" not in caught.value.message


# Calibrations.


def test_a_calibration_that_is_not_what_was_written_counts_as_none(cache: Path) -> None:
    key = {"machine": "one"}
    folder = open_user_cache()
    assert folder is not None
    path = cache_path(folder, key)
    samples = [(StepShape(2, 1, 1, 10, 1), 0.001)]
    write_samples(path, samples, key)
    assert read_samples(path) == samples
    assert (mode(path.parent), mode(path)) == (0o700, 0o600)

    path.write_text(path.read_text().replace("0.001", "0.002"))

    assert read_samples(path) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_calibration_counts_as_none(cache: Path, damage: Callable[[Path], None]) -> None:
    key = {"machine": "one"}
    path = cache_path(cache, key)
    cache.mkdir(mode=0o700)
    write_samples(path, [(StepShape(2, 1, 1, 10, 1), 0.001)], key)

    damage(path)

    assert read_samples(path) is None
