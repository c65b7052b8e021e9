"""The cache is bounded: what was used longest ago goes, and nothing that is in use."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sortserve.core import cache_bound, file_digests
from sortserve.core.cache_bound import cache_size_bytes, held, hold, prune
from sortserve.core.errors import ConfigError
from sortserve.core.file_digests import remembered_digests
from sortserve.core.user_cache import file_digest

DAY_S = 24 * 3600.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", "2500B")
    (tmp_path / "calibration").mkdir()
    return tmp_path


def put(path: Path, *, age_s: float = 0.0, num_bytes: int = 1000) -> Path:
    """An entry of so many bytes, last used so long ago; a folder where the name says so."""
    file = path if path.suffix or path.name.startswith(".w") else path / "model.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(num_bytes))
    used_s = time.time() - age_s
    os.utime(path, (used_s, used_s))
    return path


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"calibration"}


KERNELS, WEIGHTS, CONVERTED = "kernels-avx2-a-b.so", "weights-a-b.safetensors", f"x-{'0' * 16}"


@pytest.mark.parametrize("oldest", [KERNELS, WEIGHTS, CONVERTED])
def test_what_was_used_longest_ago_makes_room(cache: Path, oldest: str) -> None:
    for name in (KERNELS, WEIGHTS, CONVERTED):
        put(cache / name, age_s=100 if name == oldest else 10)

    prune(cache)

    assert names(cache) == {KERNELS, WEIGHTS, CONVERTED} - {oldest}


@pytest.mark.parametrize("used", [KERNELS, WEIGHTS, CONVERTED])
def test_what_is_in_use_stays_and_another_goes(cache: Path, used: str) -> None:
    for name in (KERNELS, WEIGHTS, CONVERTED):
        put(cache / name, age_s=100)
    with held(cache / used) as is_held:
        assert is_held
        for name in (KERNELS, WEIGHTS, CONVERTED):
            os.utime(cache / name, (1, 1) if name == used else None)

        prune(cache)

        assert used in names(cache)
        assert len(names(cache)) == 2
    for name in names(cache):
        os.utime(cache / name, (1, 1) if name == used else None)
    put(cache / "kernels-avx2-a-c.so")
    prune(cache)
    assert used not in names(cache)


def test_use_makes_an_entry_the_last_to_go(cache: Path) -> None:
    put(cache / WEIGHTS, age_s=100)
    put(cache / KERNELS, age_s=10, num_bytes=2000)

    with held(cache / WEIGHTS):
        pass
    prune(cache)

    assert names(cache) == {WEIGHTS}


def test_what_this_process_holds_stays(cache: Path) -> None:
    path = put(cache / WEIGHTS, num_bytes=5000)
    assert hold(path)

    prune(cache)

    assert path.exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_what_is_loaded_again_and_again_is_open_once(cache: Path) -> None:
    path = put(cache / WEIGHTS)

    assert all(hold(path) for _ in range(3))

    assert open_files().count(str(path)) == 1


def open_files() -> list[str]:
    """The names of this process's files; what a thread closes meanwhile is not open."""
    names = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(os.readlink(handle))
    return names


def test_nothing_can_be_held_that_is_not_there_or_is_a_link_or_a_fifo(cache: Path) -> None:
    (cache / "link").symlink_to(put(cache / WEIGHTS))

    assert not hold(cache / "nothing")
    assert not hold(cache / "link")


def test_there_are_at_most_so_many_of_each(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_bound, "MAX_LARGE", 3)
    monkeypatch.setattr(cache_bound, "MAX_SMALL", 2)
    for i in range(5):
        put(cache / f"kernels-avx2-a-{i}.so", age_s=i, num_bytes=1)
        put(cache / "calibration" / f"{i}.json", age_s=i, num_bytes=1)

    prune(cache)

    assert names(cache) == {f"kernels-avx2-a-{i}.so" for i in range(3)}
    assert names(cache / "calibration") == {"0.json", "1.json"}


def test_what_is_no_entry_is_left_alone_however_large(cache: Path) -> None:
    foreign = {"thesis.safetensors", "photos", "kernels", "weights-of-mine.safetensors"}
    for name in foreign:
        put(cache / name, age_s=1000 * DAY_S, num_bytes=100_000)

    prune(cache)

    assert names(cache) == foreign


def test_drafts_of_killed_processes_go_after_a_day(cache: Path) -> None:
    for age_s in (2 * DAY_S, 0.0):
        put(cache / f".writing-{age_s}", age_s=age_s)
        put(cache / f".converting-{age_s:.0f}", age_s=age_s)
        put(cache / "calibration" / f".writing-{age_s}", age_s=age_s)

    prune(cache)

    assert names(cache) == {".writing-0.0", ".converting-0"}
    assert names(cache / "calibration") == {".writing-0.0"}


def test_a_cache_that_vanishes_is_no_failure(cache: Path) -> None:
    shutil.rmtree(cache)

    prune(cache)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("", 20 << 30),
        ("0", 0),
        ("1500", 1500),
        ("2KiB", 2048),
        ("1.5 MB", 1_500_000),
        ("1tib", 1 << 40),
    ],
)
def test_a_size_has_a_unit(text: str, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", text)

    assert cache_size_bytes() == num_bytes


@pytest.mark.parametrize("text", ["much", "-1", "1e9", "GiB", "1 XB", "nan"])
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", text)

    with pytest.raises(ConfigError, match="SORTSERVE_CACHE_SIZE"):
        cache_size_bytes()


# Digests.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their digest."""
    read: list[Path] = []
    digest = file_digest

    def counted(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(file_digests, "file_digest", counted)
    monkeypatch.setattr(file_digests, "SETTLED_S", -1.0)  # as if all had been written long ago
    return read


def test_a_file_is_read_once_as_long_as_it_is_unchanged(cache: Path, reads: list[Path]) -> None:
    file = put(cache / "a.bin")
    first = remembered_digests([file], cache)

    assert remembered_digests([file], cache) == first
    assert reads == [file]

    file.write_bytes(b"1" * 1000)
    assert remembered_digests([file], cache) != first
    assert len(reads) == 2


def test_a_file_in_the_place_of_another_is_read(cache: Path, reads: list[Path]) -> None:
    file, other = put(cache / "a.bin", age_s=100), put(cache / "b.bin", age_s=100)
    other.write_bytes(b"1" * 1000)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    first = remembered_digests([file], cache)

    os.replace(other, file)

    assert remembered_digests([file], cache) != first


def test_a_file_that_changed_just_now_is_read_each_time(
    cache: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_S", 3600.0)
    file = put(cache / "a.bin")

    remembered_digests([file], cache)
    remembered_digests([file], cache)

    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b"\xff"])
def test_a_memory_that_is_damaged_is_none(cache: Path, reads: list[Path], content: bytes) -> None:
    file = put(cache / "a.bin")
    digests = remembered_digests([file], cache)
    (cache / "digests.json").write_bytes(content)

    assert remembered_digests([file], cache) == digests
    assert len(reads) == 2


def test_without_a_cache_all_is_read(cache: Path, reads: list[Path]) -> None:
    file = put(cache / "a.bin")

    assert remembered_digests([file], None) == remembered_digests([file], None)
    assert len(reads) == 2
