"""How many cores a process may use: affinity, hardware threads, quotas of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from sortserve.engine import cores
from sortserve.engine.cores import allowed_cpus, cpu_quota, num_physical_cores, num_usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_topology(root: Path, siblings: list[str]) -> None:
    for cpu, listed in enumerate(siblings):
        write(
            root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{listed}\n"
        )


def test_two_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    make_topology(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert num_physical_cores(frozenset({0, 1, 2, 3}), tmp_path) == 2
    assert num_physical_cores(frozenset({0, 2}), tmp_path) == 1
    assert num_physical_cores(frozenset({2, 3}), tmp_path) == 2


def test_where_the_topology_is_unknown_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert num_physical_cores(frozenset({0, 5}), tmp_path) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"proc/self/cgroup": "0::/\n"}, None, id="no-file"),
        pytest.param(
            {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"},
            None,
            id="no-limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"},
            1.5,
            id="a-limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2.0,
            id="the-group-above-has-less",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/host/only\n",
                "sys/fs/cgroup/cpu.max": "300000 100000\n",
            },
            3.0,
            id="a-path-of-the-host-is-not-visible-in-the-container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
            },
            2.5,
            id="version-1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            id="version-1-without-a-limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"},
            None,
            id="nonsense",
        ),
        pytest.param({}, None, id="no-control-groups"),
    ],
)
def test_the_quota_is_the_least_of_all_groups(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [(50_000, 1), (250_000, 2), (900_000, 4)])
def test_a_quota_takes_threads_away_but_never_the_last_and_adds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, expected: int
) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: frozenset(range(4)))
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", f"{quota} 100000\n")
    assert num_usable_cores(tmp_path) == expected


def test_this_machine_has_at_least_one_core() -> None:
    assert 1 <= num_usable_cores() <= len(allowed_cpus())
