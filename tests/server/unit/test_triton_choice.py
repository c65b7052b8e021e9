"""Where the Triton kernels are used, and how they cut their work: decided without Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Target, Unusable
from sortserve.model.backends import choose_backend
from sortserve.model.backends.triton import choice
from sortserve.model.backends.triton.choice import make_triton_backend
from sortserve.model.backends.triton.tiles import (
    INTERPRETED,
    MAX_SPLITS,
    SMALLEST_DOT,
    next_power_of_two,
    num_splits,
    tiles_for,
)
from support.attention_cases import make_config

CONFIG = make_config(num_heads=4, num_kv_heads=2, head_dim=64)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def why_not(
    device: torch.device, dtype: torch.dtype = torch.float32, *, head_dim: int = 64
) -> str | None:
    answer = make_triton_backend(Target(replace(CONFIG, head_dim=head_dim), dtype, device))
    return answer.reason if isinstance(answer, Unusable) else None


@pytest.fixture(name="interpreting")
def _interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_on_a_cpu_the_flag_says_how_to_have_the_kernels_there_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    with pytest.raises(ConfigError) as caught:
        choose_backend(CONFIG, torch.float32, CPU, "triton")

    assert str(caught.value).startswith(
        "--backend=triton cannot be used for float32 on cpu on this machine: its kernels are for "
        "CUDA devices; for tests, TRITON_INTERPRET=1 interprets them on a CPU. Use auto"
    )


@pytest.mark.usefixtures("interpreting")
def test_without_triton_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_triton_installed", lambda: False)

    assert why_not(CPU) == "Triton is not installed: pip install 'sortserve[triton]'"
    assert why_not(CUDA) == why_not(CPU)


@pytest.mark.usefixtures("interpreting")
def test_what_the_kernels_cannot_compute_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "is_triton_installed", lambda: True)

    assert why_not(CPU, torch.float64) == "its dtypes are float32, float16, bfloat16"
    assert why_not(CPU, torch.bfloat16) == "Triton's interpreter computes bfloat16 wrongly"
    assert why_not(CPU, head_dim=258) == "head_dim=258 is above 256"


@pytest.mark.usefixtures("interpreting")
def test_auto_on_a_cpu_does_not_interpret_where_it_can_compile() -> None:
    assert choose_backend(CONFIG, torch.float32, CPU).name in ("cpu", "reference")


@given(
    num_rows=st.integers(1, 600),
    num_kv_heads=st.integers(1, 64),
    programs=st.integers(1, 2000),
)
def test_contexts_are_split_as_long_as_programs_are_wanted(
    num_rows: int, num_kv_heads: int, programs: int
) -> None:
    splits = num_splits(num_rows, num_kv_heads, programs)

    assert splits in (1, 2, 4, 8, 16, 32)
    bucket = next_power_of_two(num_rows)
    assert splits == num_splits(bucket, num_kv_heads, programs)
    if splits > 1:
        assert bucket * num_kv_heads * splits <= programs
    if splits < MAX_SPLITS:
        assert bucket * num_kv_heads * splits * 2 > programs


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80, 128, 192, 256])
def test_tiles_are_powers_of_two_that_a_product_takes(head_dim: int, itemsize: int) -> None:
    tiles = tiles_for(head_dim, itemsize, multiprocessors=132)

    for size in (tiles.queries, tiles.keys, tiles.rows, tiles.heads):
        assert size == next_power_of_two(size)
    assert min(tiles.queries, tiles.keys) >= SMALLEST_DOT


def test_interpreted_contexts_are_split_too() -> None:
    assert num_splits(1, CONFIG.num_kv_heads, INTERPRETED.programs) == 2
