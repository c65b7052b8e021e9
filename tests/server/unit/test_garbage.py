from __future__ import annotations

import gc
import subprocess
import sys
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


COUNTS_ITS_OBJECTS = """
import sys, types
from sortserve.process.garbage import calm_garbage_collector

class Bound:
    def __del__(self, tell=print):
        tell("freed", flush=True)

library = sys.modules["NAME"] = types.ModuleType("NAME")
library.bound = Bound()
library.bound.itself = library.bound
del library
calm_garbage_collector()
"""


@pytest.mark.parametrize(("name", "told"), [("triton", "freed\n"), ("another", "")])
def test_triton_which_tells_of_what_is_alive_at_the_end_has_its_objects_freed(
    name: str, told: str
) -> None:
    """All others spare the end of a server the half second that this takes."""
    program = COUNTS_ITS_OBJECTS.replace("NAME", name)

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == told
