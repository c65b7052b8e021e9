"""A container without Docker, of an image of ``support.image_build``, as compose.yaml starts it.

with running(image, ["--num-threads", "1"], data) as container:
    container.run(container.image.config.health_command)

The root is bound read-only; only ``/data``, ``/tmp`` and ``/dev/shm`` can be written. The processes
have the image's user and no privileges, and namespaces of their own: no network but a loopback.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.image_build import Image, chroot_command

__all__ = ["Container", "running"]

_LOOPBACK_UP = (
    "import fcntl, socket, struct; "
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14x', b'lo', 1))"
)
"""SIOCSIFFLAGS with IFF_UP, for machines without iproute2."""

_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass
class Container:
    """One that runs."""

    image: Image
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of what is process 1 inside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])

    def has_begun(self) -> bool:
        """Whether process 1 is in its root: before that, what is run beside it would be outside."""
        try:
            return os.path.samestat(os.stat(f"/proc/{self.pid}/root"), self.image.root.stat())
        except (IndexError, FileNotFoundError, ProcessLookupError):
            return False

    def run(
        self, command: Sequence[str], timeout_s: float = 120, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``docker exec``: a command beside the first process, as the same user."""
        config = self.image.config.copy()
        config.user = user or config.user
        inner = chroot_command(Path("/"), config, config.env, command)
        spaces = ["--mount", "--net", "--pid", "--ipc", "--wd", f"--root=/proc/{self.pid}/root"]
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", *spaces, "/bin/sh", "-c", inner],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def stop(self, timeout_s: float) -> int:
        """``docker stop``: the image's signal to process 1; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        os.kill(self.pid, signal.Signals[self.image.config.stop_signal])
        return self.process.wait(timeout_s)


@contextmanager
def running(image: Image, arguments: Sequence[str], data: Path, log: Path) -> Iterator[Container]:
    """``docker run --read-only --cap-drop ALL --tmpfs /tmp --network none``.

    Args:
        image: whose entry point is started.
        arguments: for it.
        data: a folder for the image's one volume; a fresh volume has the content and the owner
            that the image gave its folder.
        log: where what it prints goes.
    """
    root, config = image.root, image.config
    (volume,) = config.volumes
    status = (root / volume.lstrip("/")).stat()
    data.mkdir()
    os.chown(data, status.st_uid, status.st_gid)
    script = [
        "set -e",
        "mount --make-rprivate /",
        f"mount --bind {root} {root}",
        f"mount -o remount,bind,ro {root}",
        f"mount -t proc -o nosuid,noexec,nodev proc {root}/proc",
        f"mount -t tmpfs -o nosuid,mode=755 tmpfs {root}/dev",
        *(f"touch {root}/dev/{name}" for name in _DEVICES),
        *(f"mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES),
        f"mkdir {root}/dev/shm",
        f"mount -t tmpfs -o nosuid,nodev,size=64m,mode=1777 tmpfs {root}/dev/shm",
        f"mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs {root}/tmp",
        f"mount --bind {data} {root}{volume}",
        shlex.join([sys.executable, "-c", _LOOPBACK_UP]),
        chroot_command(root, config, config.env, [*config.entrypoint, *arguments]),
    ]
    spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", "\n".join(script)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    container = Container(image, process, log)
    try:
        while not container.has_begun():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield container
    finally:
        process.kill()  # --kill-child: what is inside ends with it
        process.wait()
