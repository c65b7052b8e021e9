"""Python's garbage collector, kept from stopping every thread for half a second."""

from __future__ import annotations

import atexit
import gc
import sys

__all__ = ["calm_garbage_collector", "freeze_what_exists"]

ALLOCATIONS_PER_COLLECTION = 2000
COLLECTIONS_PER_FULL_ONE = 1000


def calm_garbage_collector() -> None:
    """Look at nothing that exists by now, and seldom at everything else.

    A full collection walks every object while no thread can run: with torch and transformers loaded
    that is half a second, and one request that makes many objects brings it on. What is loaded is
    never garbage; and what a request leaves is nearly all freed by reference counting, or found by
    the young generations while it is young.
    """
    freeze_what_exists()
    _, young, _ = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS_PER_COLLECTION, young, COLLECTIONS_PER_FULL_ONE)


def freeze_what_exists() -> None:
    """Let no collection look at what exists by now."""
    gc.collect()
    gc.freeze()
    atexit.register(_let_triton_go)


def _let_triton_go() -> None:
    """Have Triton's objects freed at the end of the process, or it tells of each on stderr.

    It is bound by nanobind, which counts what is alive then; what is frozen is never freed. To walk
    all of it takes half a second, so it is done for Triton alone.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
