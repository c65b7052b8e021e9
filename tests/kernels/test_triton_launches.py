"""What the host does for a step on the Triton backend: it makes tensors and views, and launches.

Kernels are replaced by a recorder, so what is seen is what the host does itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sortserve.model.backends.triton.tiles import Tiles
from support.attention_cases import Case, make_config, make_rope
from support.interpreter import interpreted, triton_attention, triton_ops

pytestmark = interpreted

CONFIG = make_config(num_heads=4, num_kv_heads=2, head_dim=16)
TILES = Tiles(queries=16, keys=16, rows=1, heads=8, programs=64)
PACKAGE = "sortserve.model.backends.triton"
KERNELS = {
    f"{PACKAGE}.attention": ("decode_kernel", "combine_kernel", "prefill_kernel"),
    f"{PACKAGE}.heads": ("rotate_and_write_kernel",),
    f"{PACKAGE}.ops": ("add_rms_norm_kernel", "silu_and_mul_kernel"),
}


class Recorder:
    """Stands for a kernel: remembers its launches."""

    def __init__(self, name: str, launches: list[tuple[Any, ...]]) -> None:
        self._name = name
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            values = [a.shape if isinstance(a, Tensor) else a for a in arguments]
            self._launches.append((self._name, grid, values, constants))

        return launch


@pytest.fixture(name="launches")
def _launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    launches: list[tuple[Any, ...]] = []
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", Recorder(name, launches))
    return launches


class OnlyNewTensorsAndViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on every operation of torch but the making of tensors and of views."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ in ("new_empty", "empty_like", "view", "slice")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host_or_copied_to_the_device(
    launches: list[tuple[Any, ...]],
) -> None:
    case = Case(CONFIG, [(30, 1), (0, 20), (12, 1)])
    attention, ops, h_TD = (
        triton_attention(CONFIG, make_rope(16), TILES),
        triton_ops(1),
        torch.ones(22, 32),
    )
    weight_D = torch.ones(32)

    with OnlyNewTensorsAndViews():  # type: ignore[no-untyped-call]
        (attend,) = attention.prepare(case.batch, range(1), 3)
        attend(case.qkv_TX, case.norms, case.pages)
        ops.silu_and_mul(ops.add_rms_norm(h_TD, h_TD, weight_D, 1e-5))

    assert [name for name, *_ in launches] == [
        "rotate_and_write_kernel",
        "decode_kernel",
        "combine_kernel",
        "prefill_kernel",
        "add_rms_norm_kernel",
        "silu_and_mul_kernel",
    ]


def test_a_step_of_as_many_rows_of_one_token_launches_the_same_whatever_their_lengths(
    launches: list[tuple[Any, ...]],
) -> None:
    """So a CUDA graph replays it, where block tables are as wide as they will ever be."""
    attention = triton_attention(CONFIG, make_rope(16), TILES)
    steps = []
    for cached in ([200, 3, 17], [199, 160, 1]):
        case = Case(CONFIG, [(start, 1) for start in cached])
        pages = torch.empty(2, 64, 2, 16, 16)
        (attend,) = attention.prepare(case.batch, range(1), 3)
        attend(case.qkv_TX, None, pages)
        steps.append(launches.copy())
        launches.clear()

    assert len(steps[0]) == 3
    assert steps[0] == steps[1]
