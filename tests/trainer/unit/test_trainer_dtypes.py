"""What ``--dtype auto`` is to the trainer on each kind of processor."""

from __future__ import annotations

import pytest
import torch

from sortserve.model.backends.kernels import ISAS, Isa
from sortserve_trainer.model.dtypes import resolve_trainer_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(ISAS))
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = list(ISAS)
    allowed = names[names.index(name) :]  # the fastest come first
    monkeypatch.setattr(Isa, "can_run", lambda self: self.name in allowed)

    expected = torch.bfloat16 if name in ("amx", "avx512_bf16") else torch.float32

    assert resolve_trainer_dtype("auto", CPU) is expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_who_names_a_dtype_gets_it(dtype: str) -> None:
    assert resolve_trainer_dtype(dtype, CPU) is getattr(torch, dtype)


def test_on_a_gpu_auto_is_bfloat16() -> None:
    assert resolve_trainer_dtype("auto", torch.device("cuda")) is torch.bfloat16
