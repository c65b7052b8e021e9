"""Python's garbage collector, kept from stopping every thread for half a second."""

from __future__ import annotations

import gc

__all__ = ["calm_garbage_collector"]

ALLOCATIONS_PER_COLLECTION = 2000
COLLECTIONS_PER_FULL_ONE = 1000


def calm_garbage_collector() -> None:
    """Look at nothing that exists by now, and seldom at everything else.

    A full collection walks every object while no thread can run: with torch and transformers loaded
    that is half a second, and one request that makes many objects brings it on. What is loaded is
    never garbage; and what a request leaves is nearly all freed by reference counting, or found by
    the young generations while it is young.
    """
    gc.collect()
    gc.freeze()
    _, young, _ = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS_PER_COLLECTION, young, COLLECTIONS_PER_FULL_ONE)
