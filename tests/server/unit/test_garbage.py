from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from sortserve.process.garbage import calm_garbage_collector


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.freeze()  # as the whole suite has it
    gc.set_threshold(*thresholds)


def test_what_exists_is_not_walked_again_and_full_collections_are_rare() -> None:
    gc.unfreeze()
    num_before = len(gc.get_objects())

    calm_garbage_collector()

    assert gc.get_freeze_count() >= num_before / 2
    assert len(gc.get_objects()) < 1000
    assert gc.isenabled()
    assert gc.get_threshold()[2] > 100


def test_cycles_are_still_found_while_they_are_young() -> None:
    calm_garbage_collector()

    for _ in range(gc.get_threshold()[0] * 2):
        cycle: list[object] = []
        cycle.append(cycle)

    assert len(gc.get_objects()) < 3 * gc.get_threshold()[0]
