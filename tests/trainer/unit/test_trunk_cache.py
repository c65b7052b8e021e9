"""The states of a frozen trunk on disk: what is kept, what a kill leaves, what is refused."""

from __future__ import annotations

import errno
import fcntl
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import Example
from sortserve_trainer.model.trunk_cache import (
    INDEX,
    LOCK,
    Stream,
    TrunkCache,
    example_key,
    read_rows_of,
)
from sortserve_trainer.run.cached_trunk import check_room
from sortserve_trainer.run.save import disk_errors

STREAMS = (
    Stream("tokens", 3, torch.bfloat16, of_tokens=True),
    Stream("rows", 2, torch.float32),
    Stream("ids", 4, torch.int32),
)


def example(*token_ids: int, targets: int = 2, unwanted: int = 0) -> Example:
    """The last tokens are targets, those before them unwanted."""
    n = len(token_ids)
    place = np.arange(n)
    is_target = place >= n - targets
    is_unwanted = (place >= n - targets - unwanted) & ~is_target if unwanted else None
    return Example(np.array(token_ids, dtype=np.int32), is_target, is_unwanted)


def values(seed: int, num_tokens: int, num_rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(num_tokens, 3, generator=draw).bfloat16(),
        "rows": torch.randn(num_rows, 2, generator=draw),
        "ids": torch.randint(99, (num_rows, 4), generator=draw, dtype=torch.int32),
    }


def key(number: int) -> bytes:
    return number.to_bytes(16)


def fill(cache: TrunkCache, *numbers: int) -> None:
    with cache.writing() as writer:
        for number in numbers:
            writer.append(key(number), number + 2, number, values(number, number + 2, number))


def assert_holds(cache: TrunkCache, *numbers: int) -> None:
    cache.check_invariants()
    found = cache.read([key(number) for number in numbers])
    for name in ("tokens", "rows", "ids"):
        parts = [values(number, number + 2, number)[name] for number in numbers]
        assert torch.equal(found[name], torch.cat(parts)), name


def test_values_are_read_in_any_order_by_who_opens_it_later(tmp_path: Path) -> None:
    fill(TrunkCache(tmp_path / "c", STREAMS), 1, 2, 3)

    cache = TrunkCache(tmp_path / "c", STREAMS)

    assert_holds(cache, 3, 1)
    assert len(cache) == 3
    assert cache.num_bytes == sum(p.stat().st_size for p in (tmp_path / "c").glob("[rti]*s.bin"))


def test_more_is_added_to_what_is_there(tmp_path: Path) -> None:
    fill(TrunkCache(tmp_path / "c", STREAMS), 1, 2)
    cache = TrunkCache(tmp_path / "c", STREAMS)

    fill(cache, 5)

    assert key(5) in cache
    assert_holds(cache, 5, 2, 1)


def test_what_a_killed_writer_left_beyond_the_index_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fill(TrunkCache(folder, STREAMS), 1, 2)
    for name in ("tokens.bin", "rows.bin", INDEX):
        with (folder / name).open("ab") as file:
            file.write(b"half of it")

    cache = TrunkCache(folder, STREAMS)

    assert_holds(cache, 1, 2)
    fill(cache, 3)
    assert_holds(TrunkCache(folder, STREAMS), 1, 2, 3)


def test_what_was_written_before_a_failure_and_not_committed_is_not_there(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path / "c", STREAMS)

    with suppress(RuntimeError), cache.writing() as writer:
        writer.append(key(1), 3, 1, values(1, 3, 1))
        writer.commit()
        writer.append(key(2), 4, 2, values(2, 4, 2))
        raise RuntimeError

    found = TrunkCache(tmp_path / "c", STREAMS)
    assert_holds(found, 1)
    assert key(2) not in found


def test_values_that_are_missing_from_the_files_are_named(tmp_path: Path) -> None:
    fill(TrunkCache(tmp_path / "c", STREAMS), 1, 2)
    with (tmp_path / "c" / "rows.bin").open("ab") as file:
        file.truncate(5)

    with pytest.raises(ConfigError, match=r"rows\.bin is damaged .*: delete"):
        TrunkCache(tmp_path / "c", STREAMS)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path / "c", STREAMS)
    (tmp_path / "c").mkdir()
    with (tmp_path / "c" / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is writing"):
            fill(cache, 1)

    fill(cache, 1)

    assert_holds(cache, 1)


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TrunkCache(tmp_path / "c", STREAMS)
    fill(cache, 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ConfigError, match=r"--trunk-cache x .*No space left"):  # noqa: SIM117
            with disk_errors("--trunk-cache x"):
                fill(cache, 2)

    fill(TrunkCache(tmp_path / "c", STREAMS), 3)
    assert_holds(TrunkCache(tmp_path / "c", STREAMS), 1, 3)


def test_an_example_is_known_by_its_tokens_and_the_rows_that_are_read() -> None:
    assert example_key(example(1, 2, 3)) == example_key(example(1, 2, 3))
    assert example_key(example(1, 2, 3)) != example_key(example(1, 2, 4))
    assert example_key(example(1, 2, 3)) != example_key(example(1, 2, 3, targets=1))
    assert read_rows_of(example(1, 2, 3, 4, 5)).tolist() == [2, 3]
    assert read_rows_of(example(1, 2, 3, 4, 5, unwanted=1)).tolist() == [1, 2, 3]


def test_a_cache_larger_than_its_bound_or_than_the_disk_is_refused_with_its_size() -> None:
    room = {"held": 10**9, "max_bytes": 3 * 10**9, "free": 10**10, "root": "/caches"}

    check_room(2 * 10**9, 5, **room)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"--trunk-cache-gb 3: .* 5 tokens take 2\.10 GB, .*1\.00"
    ):
        check_room(21 * 10**8, 5, **room)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"/caches: .* take 2\.00 GB, .* has 1\.00 GB left"):
        check_room(2 * 10**9, 5, **{**room, "free": 10**9})  # type: ignore[arg-type]


def test_a_small_size_is_told_in_a_unit_that_shows_it() -> None:
    room = {"held": 34_560_000, "max_bytes": 40_000_000, "free": 7_800, "root": "/caches"}

    with pytest.raises(ConfigError, match=r"take 9\.00 MB, and /caches has 34\.56 MB:"):
        check_room(9_000_000, 5, **room)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"take 8\.00 kB, and the disk has 7\.80 kB left"):
        check_room(8_000, 5, **room)  # type: ignore[arg-type]
