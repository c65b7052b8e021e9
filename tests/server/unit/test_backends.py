"""A backend is chosen once, by name; one that is not of this package is added in one line."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.core.errors import ConfigError
from sortserve.engine.assemble import EngineOptions
from sortserve.model import backends
from sortserve.model.attention import RopeTables
from sortserve.model.backend import LayerStack, Target, Unusable
from sortserve.model.backends import backend_names, choose_backend
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.config import ModelConfig
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights
from sortserve.process.build import build
from sortserve.process.config import load_settings
from support.tiny_models import make_tiny_checkpoint

CALLS: Counter[str] = Counter()


class CountingOp:
    """A linear map that counts how often it is used."""

    def __init__(self, op: LinearOp) -> None:
        self._op = op

    def __call__(self, x_TI: Tensor) -> Tensor:
        CALLS["linear"] += 1
        return self._op(x_TI)


class CountingBackend(ReferenceBackend):
    name = "counting"

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> LinearOp:
        return CountingOp(super().linear(weight, bias_O))

    def gated(self, weight: Weight, bias_2F: Tensor | None = None) -> LinearOp:
        return CountingOp(super().gated(weight, bias_2F))

    def head(self, weight: Weight) -> LinearOp:
        return CountingOp(super().head(weight))

    def stack(
        self, layers: Sequence[LayerWeights], rope: RopeTables, *, release_weights: bool
    ) -> LayerStack:
        return CountingStack(super().stack(layers, rope, release_weights=release_weights))


class CountingStack:
    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        CALLS["stack"] += 1
        return self._stack.run(*arguments)


def on_cpus(target: Target) -> CountingBackend | Unusable:
    return CountingBackend(target) if target.device.type == "cpu" else Unusable("it counts on CPUs")


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama-tied", exits=(2, 6))


async def answer(checkpoint: Path, backend: str) -> str:
    """What a server with this backend says to one request."""
    flags = {"backend": backend, "calibrate": False}
    serving = build(load_settings({"model": str(checkpoint), "max_num_seqs": 2, **flags}))
    CALLS.clear()  # the check of the backend
    app = create_app(serving.worker, serving.tokenizer, ApiSettings(served_model_name="m"))
    serving.worker.start()
    try:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": "the", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
            reply = await client.post("/generate", json=body)
        return str(reply.json()["choices"][0]["text"])
    finally:
        await asyncio.to_thread(serving.worker.stop)


CONFIG = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=40,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(name="counting")
def _counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "counting", on_cpus)


@pytest.mark.usefixtures("counting")
async def test_a_backend_from_outside_the_package_serves_after_one_line_in_the_table(
    checkpoint: Path,
) -> None:
    text = await answer(checkpoint, "counting")

    # Five steps; each multiplies by four matrices of six layers and by the head.
    assert CALLS == {"stack": 5, "linear": 5 * (6 * 4 + 1)}
    assert text == await answer(checkpoint, "reference")


def test_the_names_are_those_that_the_flag_documents() -> None:
    assert backend_names() == ["auto", "reference", "triton", "flashinfer", "cpu"]


@pytest.mark.usefixtures("counting")
def test_auto_takes_the_last_backend_of_the_table_that_works_for_the_target() -> None:
    chosen = {device: choose_backend(CONFIG, torch.float32, device).name for device in (CPU, META)}
    assert chosen == {CPU: "counting", META: "reference"}


def test_auto_passes_over_what_is_only_to_be_had_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "flashinfer", CountingBackend)

    assert choose_backend(CONFIG, torch.float32, META).name == "reference"
    assert choose_backend(CONFIG, torch.float32, META, "flashinfer").name == "counting"


@pytest.mark.usefixtures("counting")
def test_a_backend_that_does_not_work_here_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_backend(CONFIG, torch.float32, META, "counting")

    assert str(caught.value) == (
        "--backend=counting cannot be used for float32 on meta on this machine: it counts on "
        "CPUs. Use auto (there are: auto, reference, triton, flashinfer, cpu, counting)."
    )
    assert caught.value.param == "backend"


@pytest.mark.parametrize("name", ["tritium", "", "CPU"])
def test_a_name_of_no_backend_is_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions(backend=name)

    assert (
        str(caught.value)
        == f"--backend={name!r} is not one of auto, reference, triton, flashinfer, cpu."
    )
    assert caught.value.param == "backend"
