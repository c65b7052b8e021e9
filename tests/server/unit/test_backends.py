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
from sortserve.model import backends
from sortserve.model.attention import RopeTables
from sortserve.model.backend import LayerStack, LinearOp, Ops, PackedLayer, Provider, Target
from sortserve.model.backends import attention_names, choose_backend, linear_names
from sortserve.model.backends.reference.backend import ReferenceAttentionBackend
from sortserve.model.backends.reference.linear import ReferenceLinearBackend
from sortserve.model.config import ModelConfig
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


class CountingLinearBackend(ReferenceLinearBackend):
    name = "counting"

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        return CountingOp(super().linear(weight_OI, bias_O))


class CountingAttentionBackend(ReferenceAttentionBackend):
    name = "counting"

    def stack(self, layers: Sequence[PackedLayer], rope: RopeTables) -> LayerStack:
        return CountingStack(super().stack(layers, rope))


class CountingStack:
    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        CALLS["stack"] += 1
        return self._stack.run(*arguments)


def on_cpus(target: Target) -> CountingAttentionBackend | None:
    return CountingAttentionBackend(target) if target.device.type == "cpu" else None


def linear_on_cpus(target: Target, ops: Ops) -> CountingLinearBackend | None:
    return CountingLinearBackend(ops) if target.device.type == "cpu" else None


COUNTING = Provider(attention={"counting": on_cpus}, linear={"counting": linear_on_cpus})


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama-tied", exits=(2, 6))


async def answer(checkpoint: Path, backend: str) -> str:
    """What a server with this backend says to one request."""
    flags = {"attention_backend": backend, "linear_backend": backend, "calibrate": False}
    serving = build(load_settings({"model": str(checkpoint), "max_num_seqs": 2, **flags}))
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


def add_backend(monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [*backends.BACKENDS, provider])


async def test_a_backend_from_outside_the_package_serves_after_one_line_in_the_table(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(monkeypatch, COUNTING)
    CALLS.clear()

    text = await answer(checkpoint, "counting")

    # Five steps; each multiplies by four matrices of six layers and by the head.
    assert CALLS == {"stack": 5, "linear": 5 * (6 * 4 + 1)}
    assert text == await answer(checkpoint, "reference")


def test_the_names_are_those_that_the_flags_document() -> None:
    assert attention_names() == ["auto", "reference", "native"]
    assert linear_names() == ["auto", "reference", "onednn", "native"]


def test_auto_takes_the_last_backend_of_the_table_that_works_for_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_backend(monkeypatch, Provider({"auto": on_cpus}, {"auto": linear_on_cpus}))

    chosen = {}
    for device in (CPU, META):
        backend = choose_backend(CONFIG, torch.float32, device)
        chosen[device] = (backend.attention.name, backend.linear.name)

    assert chosen == {CPU: ("counting", "counting"), META: ("reference", "reference")}


def test_the_two_parts_may_come_from_two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, COUNTING)

    backend = choose_backend(CONFIG, torch.float32, CPU, attention="counting", linear="reference")

    assert (backend.attention.name, backend.linear.name) == ("counting", "reference")
    assert backend.ops is backend.attention.ops


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"attention": "triton"},
            "attention_backend 'triton' cannot be used for torch.float32 on meta on this machine; "
            "use 'auto' (backends: auto, reference, native, counting)",
        ),
        (
            {"linear": "counting"},
            "linear_backend 'counting' cannot be used for torch.float32 on meta on this machine; "
            "use 'auto' (backends: auto, reference, onednn, native, counting)",
        ),
    ],
)
def test_a_backend_that_does_not_exist_or_work_here_is_refused_with_the_names_of_all(
    flags: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(monkeypatch, COUNTING)

    with pytest.raises(ConfigError) as caught:
        choose_backend(CONFIG, torch.float32, META, **flags)

    assert str(caught.value) == message
    assert caught.value.param == f"{next(iter(flags))}_backend"
