"""A container of a manifest, run as its pod would run it, on this machine and without a cluster.

bubblewrap gives it the same view: a root file system that nobody can write to, the pod's volumes at
their places, its environment, its user and group, no capabilities and no way to more rights, and
itself as process 1. What is not there: the image (this machine's own files stand in for it),
cgroups, and a network of its own, so the port is one that is free.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Manifest = dict[str, Any]
TESTS = Path(__file__).parents[1]
PARTS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "opt")
ETC = (
    "passwd",
    "group",
    "hosts",
    "nsswitch.conf",
    "ld.so.cache",
    "ssl",
    "localtime",
    "alternatives",
)

needs_a_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None or shutil.which("setpriv") is None or os.geteuid() != 0,
    reason="needs bubblewrap and setpriv, and root to become the pod's user",
)


@dataclass
class Container:
    """A container that runs."""

    process: subprocess.Popen[str]
    pid: int
    log: Path

    def terminate(self, grace_s: float) -> int:
        """SIGTERM, as the kubelet sends it; returns the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(grace_s)


def secret_folder(folder: Path, files: Mapping[str, str], user: int) -> None:
    """A folder as the kubelet writes Secrets: links to a hidden folder that is swapped whole."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..v{len(list(folder.iterdir()))}"
    version.mkdir()
    for name, text in files.items():
        path = version / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o440)
        os.chown(path, 0, user)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")


def sandbox(
    template: Manifest, volumes: Mapping[str, Path], environment: Mapping[str, str]
) -> list[str]:
    """The command that gives the first container of a pod its view, up to its own command.

    Args:
        template: the pod, with ``spec``.
        volumes: a folder of this machine for each volume that is mounted.
        environment: beside the container's own, which it wins over.
    """
    spec = template["spec"]
    container = spec["containers"][0]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    command = ["bwrap", "--die-with-parent", *_image()]
    for mount in container.get("volumeMounts", []):
        kind = "--ro-bind" if mount.get("readOnly") else "--bind"
        command += [
            *_parents(Path(mount["mountPath"])),
            kind,
            str(volumes[mount["name"]]),
            mount["mountPath"],
        ]
    command += ["--dev", "/dev", "--proc", "/proc", "--remount-ro", "/"]
    command += ["--unshare-pid", "--unshare-ipc", "--as-pid-1", "--clearenv"]
    variables = {v["name"]: v.get("value", "") for v in container["env"]} | dict(environment)
    for name, value in variables.items():
        command += ["--setenv", name, value]
    user, group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
    command += ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    return [*command, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def _image() -> list[str]:
    """This machine's programs and libraries, and Python's, read-only: what an image has."""
    names = [*(f"/{name}" for name in PARTS), *(f"/etc/{name}" for name in ETC)]
    arguments = _parents(Path("/etc/passwd"))
    for path in map(Path, names):
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            arguments += ["--ro-bind", str(path), str(path)]
    for needed in sorted({sys.prefix, sys.base_prefix, str(TESTS.parent)}):
        arguments += [*_parents(Path(needed)), "--ro-bind", needed, needed]
    return arguments


def _parents(path: Path) -> list[str]:
    """Makes the folders above a place, which bubblewrap would make for root alone."""
    above = list(path.parents)[-2::-1]  # but the root
    return [word for folder in above for word in ("--perms", "0755", "--dir", str(folder))]


@contextmanager
def running(command: list[str], arguments: list[str], log: Path) -> Iterator[Container]:
    """A container until the end of the block; its output goes to ``log``.

    Args:
        command: of ``sandbox``.
        arguments: the image's entry point, and the container's arguments.
        log: gets what it writes.
    """
    read, write = os.pipe()
    with open(read, encoding="utf-8") as info, log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [command[0], "--info-fd", str(write), *command[1:], *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[write],
        )
        os.close(write)
        told = info.read()
        assert told, log.read_text(encoding="utf-8")
        try:
            yield Container(process, json.loads(told)["child-pid"], log)
        finally:
            process.kill()
            process.wait()
