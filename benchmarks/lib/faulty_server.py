"""``sortserve`` with faults that can be switched on from outside: the product itself has no hook.

    python -m benchmarks.lib.faulty_server SOCKET JSON serve MODEL [FLAG ...]

Functions of the product are wrapped before its command line runs. A wrapper passes calls on until
its point is armed; then it raises, hangs or is slow. Orders come over the Unix socket SOCKET, one
JSON object a line, each answered by one; JSON is a list of orders for the start. Only
``benchmarks.chaos`` starts this.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["POINTS", "Board", "Order"]

POINTS: dict[str, tuple[str, str]] = {
    # one step, in its order
    "schedule": ("sortserve.scheduling.scheduler", "Scheduler.schedule"),
    "policy": ("sortserve.scheduling.decisions", "Decisions._policys_choice"),
    "pages": ("sortserve.scheduling.block_pool", "BlockPool.allocate"),
    "prefix look-up": ("sortserve.scheduling.kv_cache", "KVCacheManager.match_prefix"),
    "prefix publishing": ("sortserve.scheduling.kv_cache", "KVCacheManager.publish"),
    "host batch": ("sortserve.engine.runner", "host_batch"),
    "forward": ("sortserve.model.decoder", "Decoder.forward"),
    "head": ("sortserve.model.decoder", "Decoder.logits"),
    "sampling": ("sortserve.engine.sampling.sampler", "Sampler.start"),
    "grammar mask": ("sortserve.text.grammars", "_Matcher.fill_mask"),
    "grammar advance": ("sortserve.text.grammars", "_Matcher.accept"),
    "commit": ("sortserve.engine.engine", "Engine._commit"),
    "token append": ("sortserve.core.sequence", "Sequence.append_token"),
    "detokenise": ("sortserve.text.tokenizer", "TextStream.push"),
    "stop strings": ("sortserve.text.stop_strings", "StopMatcher.push"),
    "finish": ("sortserve.engine.engine", "Engine._finish"),
    "report": ("sortserve.engine.live", "make_report"),
    "learned lengths": ("sortserve.admission.lengths", "LengthEstimator.observe"),
    "cost update": ("sortserve.cost.learner", "CostLearner.observe"),
    "step record": ("sortserve.engine.engine", "step_record"),
    "metrics of steps": ("sortserve.telemetry.metrics", "Metrics.on_step"),
    "metrics of requests": ("sortserve.telemetry.metrics", "Metrics.on_finished"),
    "metrics of HTTP": ("sortserve.telemetry.metrics", "Metrics.http_request"),
    "metrics page": ("sortserve.telemetry.metrics", "Metrics.render"),
    "request log": ("sortserve.telemetry.logs", "RequestLogger.on_finished"),
    "log line": ("sortserve.telemetry.logs", "JsonFormatter.format"),
    "engine's view": ("sortserve.engine.engine", "Engine.demands"),
    # the way of a request
    "admission search": ("sortserve.admission.desk", "AdmissionDesk._judge"),
    "admission entry": ("sortserve.admission.desk", "AdmissionDesk.enter"),
    "queue": ("sortserve.admission.queue_limits", "QueueLimits.reserve"),
    "tokenise": ("sortserve.text.tokenizer", "Tokenizer._encode"),
    "grammar compiler": ("sortserve.text.grammars", "Grammars.compile"),
    "request taken": ("sortserve.engine.engine", "Engine.add_request"),
    "abort": ("sortserve.engine.engine", "Engine.abort"),
    "delivery": ("sortserve.engine.stream", "RequestStream.deliver"),
    "chunk": ("sortserve.api.replies.formats", "GenerateFormat.chunk"),
    "body": ("sortserve.api.replies.formats", "GenerateFormat.body"),
    "span begin": ("sortserve.telemetry.traces", "Tracing.begin"),
    "span end": ("sortserve.telemetry.traces", "RequestSpan.end"),
    "key account": ("sortserve.admission.key_ledger", "KeyLedger.begin"),
    # start-up and files
    "atomic write": ("sortserve.cost.cache", "write_atomically"),
    "weights write": ("sortserve.checkpoint.weight_cache", "save_file"),
    "keys file": ("sortserve.process.config", "ServeSettings.key_policies"),
    # threads
    "new thread": ("threading", "Thread.start"),
}
"""Where faults can be: a name, and what is wrapped there."""
HANG_S = 600.0
ERRORS: dict[str, Callable[[], BaseException]] = {
    "raise": lambda: RuntimeError("an injected fault"),
    "memory": lambda: MemoryError("an injected fault"),
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "thread": lambda: RuntimeError("can't start new thread"),
    "exit": lambda: SystemExit(3),
}


@dataclass
class Order:
    """What a point does when it is passed."""

    kind: str
    """A name of ERRORS, ``hang``, or ``slow``."""
    times: int | None = None
    """How often; None: until it is disarmed."""
    seconds: float = 0.0
    """How long it is slow."""


@dataclass
class Board:
    """Which points are armed, and how often each has struck; any thread may call."""

    armed: dict[str, Order] = field(default_factory=dict)
    struck: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    let_go: threading.Event = field(default_factory=threading.Event)
    wall_s: float = 0.0
    """What the wall clock is ahead."""
    monotonic_s: float = 0.0
    """What the monotonic clock is ahead."""

    def arm(self, point: str, order: Order) -> None:
        """Let a point fail from now on."""
        assert point in POINTS, point
        with self.lock:
            self.armed[point] = order

    def disarm(self) -> None:
        """Let all points work again, and what hangs go on."""
        with self.lock:
            self.armed.clear()
            self.let_go.set()
            self.let_go = threading.Event()

    def pass_by(self, point: str) -> None:
        """Called at each point; raises or waits where it is armed."""
        if point not in self.armed:
            return
        with self.lock:
            order = self.armed.get(point)
            if order is None:
                return
            if order.times is not None:
                order.times -= 1
                if order.times <= 0:
                    del self.armed[point]
            self.struck[point] = self.struck.get(point, 0) + 1
            let_go = self.let_go
        if order.kind == "hang":
            let_go.wait(HANG_S)
        elif order.kind == "slow":
            time.sleep(order.seconds)
        else:
            raise ERRORS[order.kind]()

    def wrap(self, point: str) -> None:
        """Put the fault before a function of the product.

        Raises:
            ImportError: of a part whose packages are not installed.
        """
        module, path = POINTS[point]
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(point)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    def move_clocks(self) -> None:
        """Let the clocks that Python code reads go by our offsets."""
        wall, wall_ns, monotonic = time.time, time.time_ns, time.monotonic
        time.time = lambda: wall() + self.wall_s
        time.time_ns = lambda: wall_ns() + int(self.wall_s * 1e9)
        time.monotonic = lambda: monotonic() + self.monotonic_s

    # ---- orders ----

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; returns the answer."""
        name = order.pop("do")
        if name == "arm":
            self.arm(order.pop("point"), Order(**order))
        elif name == "disarm":
            self.disarm()
        elif name == "clocks":
            self.wall_s, self.monotonic_s = order.get("wall", 0.0), order.get("monotonic", 0.0)
        elif name == "limit":
            limit(**order)
        else:
            assert name == "look", name
        with self.lock:
            return {"struck": dict(self.struck)}

    def listen(self, path: str) -> None:
        """Take orders until the process ends."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # no file is left, as was ordered
                    time.sleep(0.05)
                    continue
                with connection, connection.makefile("rw") as stream:
                    for line in stream:
                        print(json.dumps(self.obey(json.loads(line))), file=stream, flush=True)


def limit(resource_name: str, seconds: float) -> None:
    """Let this process have no more of a resource than it has now, for some seconds.

    It is lifted by itself: with no file left no further order could be taken.

    Args:
        resource_name: ``NOFILE``, or ``AS`` for memory.
        seconds: how long.
    """
    kind = getattr(resource, f"RLIMIT_{resource_name}")
    _, hard = resource.getrlimit(kind)
    lifted = threading.Timer(seconds, resource.setrlimit, (kind, (hard, hard)))
    lifted.start()  # before: a thread needs memory, too
    resource.setrlimit(kind, (_used(resource_name), hard))


def _used(resource_name: str) -> int:
    if resource_name == "AS":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return pages * resource.getpagesize()
    assert resource_name == "NOFILE", resource_name
    return 3  # numbers of files are below it, and these three are never free


def main() -> int:
    """Wrap, obey the first orders, and run the command line."""
    path, orders, *arguments = sys.argv[1:]
    board = Board()
    board.move_clocks()
    threading.Thread(target=board.listen, args=(path,), name="faults", daemon=True).start()
    importlib.import_module("sortserve.process.build")
    for point in POINTS:
        try:
            board.wrap(point)
        except ImportError as error:
            if (error.name or "").startswith("sortserve"):
                raise
    for order in json.loads(orders):
        board.obey(order)
    from sortserve import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
