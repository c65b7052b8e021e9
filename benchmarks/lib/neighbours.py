"""Other programs on the same cores: what a machine that is not ours alone looks like.

    with Neighbours("spin", 1.5):
        ...  # one process that spins all the time, and one that does so half of it

They are plain processes with our own priority. ``spin`` computes in a core's registers; ``memory``
copies a buffer that no cache holds, so it takes memory bandwidth as well as a core.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

__all__ = ["KINDS", "Neighbours"]

KINDS = ("spin", "memory")

_PROGRAM = """
import sys, time
kind, share = sys.argv[1], float(sys.argv[2])
if kind == "memory":
    import numpy
    source = numpy.ones(4 << 20)
    target = numpy.empty_like(source)
    work = lambda: numpy.copyto(target, source)
else:
    work = lambda: sum(range(10_000))
work()
print("ready", flush=True)
PERIOD_S = 0.05
while True:
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < share * PERIOD_S:
        work()
    time.sleep((1 - share) * PERIOD_S)
"""


class Neighbours:
    """Processes that keep cores busy while the block runs.

    Args:
        kind: one of ``KINDS``.
        num_busy: how many cores' worth; a fraction is a process that sleeps for the rest of its
            time, in turns of 50 ms.
    """

    def __init__(self, kind: str, num_busy: float) -> None:
        assert kind in KINDS
        whole, part = int(num_busy), num_busy % 1
        self._kind = kind
        self.shares = [1.0] * whole + [part] * (part > 0)
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for share in self.shares:
            command = [sys.executable, "-c", _PROGRAM, self._kind, str(share)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.processes.append(process)
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has started to work
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
