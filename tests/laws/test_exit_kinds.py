"""A kind of exit module is two classes, each in one table: here one more, from outside.

``scale`` is a norm of its own and a learned factor on what the head reads. Nothing in the product
knows its name, and yet it is loaded, served, counted, trained, saved and loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Backend
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, OwnNorm
from sortserve_trainer.model import exit_modules as trained
from sortserve_trainer.model.exit_modules import TRAINED_EXIT_MODULES
from sortserve_trainer.model.load import load_for_evaluation
from sortserve_trainer.run.export import export_submodel
from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train
from support.batches import Chunk, Pages, run_chunks
from support.scripted import add, make_request, run
from support.serving import serve
from support.tiny_models import hf_logits, load_hf, make_tiny_checkpoint, read_exit_module

EXITS = (2, 4, 6)
KINDS = tuple(EXIT_MODULE_KINDS)
PROMPT = list(range(40, 61))


class Scale(OwnNorm):
    """As it is served."""

    def __init__(
        self, tensors: Mapping[str, Tensor], final_norm: Tensor, backend: Backend, eps: float
    ) -> None:
        super().__init__(tensors, final_norm, backend, eps)
        self._scale = tensors["scale.weight"]

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(config), "scale.weight": (1,)}

    def __call__(self, h_RD: Tensor) -> Tensor:
        return super().__call__(h_RD) * self._scale


class TrainedScale(trained.OwnNorm):
    """As it is trained."""

    scale_weight: nn.Parameter
    plain_names = None

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        nn.init.ones_(self.scale_weight)

    def read(self, x_RD: Tensor) -> Tensor:
        return super().read(x_RD) * self.scale_weight


@pytest.fixture
def scale_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXIT_MODULE_KINDS, "scale", Scale)
    monkeypatch.setitem(TRAINED_EXIT_MODULES, "scale", TrainedScale)


@pytest.fixture
def folder(tmp_path: Path, scale_kind: None) -> Path:
    return make_tiny_checkpoint(tmp_path / "tiny", exits=EXITS, exit_kinds={2: "scale"})


def served_logits(folder: Path, backend: str = "auto") -> Tensor:
    """[V], the last token's at exit 2."""
    decoder = serve(folder, backend=backend).decoder
    cache, pages = decoder.allocate_kv_cache(16, 8), Pages(16)
    chunk = Chunk(PROMPT, 0, 2, pages.table(decoder.slabs.count(2), len(PROMPT)))
    return run_chunks(decoder, cache, [chunk])[0]


def trained_logits(folder: Path) -> Tensor:
    """[T, V] at exit 2."""
    model = load_for_evaluation(str(folder), dtype="float32", device="cpu").model
    positions = torch.arange(len(PROMPT))
    states = model.exit_states(
        torch.tensor([PROMPT]), positions[None], torch.tensor([len(PROMPT)]), [2]
    )
    return states[2] @ model.head(2).T


def reference_logits(trunk: Path, tensors: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """[T, V] at exit 2: the head is linear, so the factor may stand behind it."""
    norm = {"norm.weight": tensors["norm.weight"]}
    return tensors["scale.weight"] * hf_logits(load_hf(trunk), ids, 2, norm)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_kind_from_outside_is_served_as_it_is_defined(folder: Path, backend: str) -> None:
    tensors = read_exit_module(folder, 2)
    expected_TV = reference_logits(folder, tensors, PROMPT)
    logits_V = served_logits(folder, backend)
    torch.testing.assert_close(logits_V, expected_TV[-1], rtol=1e-5, atol=2e-5)

    engine = serve(folder, backend=backend).engine()
    request = make_request("r", PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True)
    add(engine, request, 2)
    tokens = list(run(engine)["r"].token_ids)

    expected = reference_logits(folder, tensors, [*PROMPT, *tokens[:-1]]).argmax(-1)
    assert tokens == expected[len(PROMPT) - 1 :].tolist()


def test_a_kind_from_outside_counts_in_the_table_of_exits(tmp_path: Path, folder: Path) -> None:
    plain = serve(make_tiny_checkpoint(tmp_path / "plain", exits=EXITS, exit_kinds={2: "norm"}))
    own, norm = serve(folder).checkpoint.exits[2], plain.checkpoint.exits[2]

    assert own.num_parameters == norm.num_parameters + 1
    assert own.compute == norm.compute  # it has no matrix


@pytest.mark.usefixtures("scale_kind")
def test_a_kind_from_outside_is_trained_saved_loaded_and_served(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} " * 4} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "base": str(base),
        "data": str(data),
        "output": str(tmp_path / "out"),
        "exits": "2,4",
        "exit_modules": "scale",
        "freeze_trunk": True,
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "pack_length": 128,
        "max_tokens": 600,
        "held_out": 0,
        "report_to": "none",
    }

    out = train(load_train_settings(flags))

    tensors = read_exit_module(out, 2)
    assert tensors.keys() == {"norm.weight", "scale.weight"}
    assert tensors["scale.weight"] != 1.0
    expected_TV = reference_logits(base, tensors, PROMPT)
    torch.testing.assert_close(trained_logits(out), expected_TV, rtol=1e-4, atol=1e-4)
    engine = serve(out).engine()
    add(engine, make_request("r", PROMPT, max_tokens=1, temperature=0.0, ignore_eos=True), 2)
    assert run(engine)["r"].token_ids == [int(expected_TV[-1].argmax())]


def test_a_kind_that_no_plain_model_has_a_place_for_is_not_exported(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"exit module that has no place in a plain llama model"):
        export_submodel(str(folder), 2, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_served_and_trained_as_it_is_defined(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_checkpoint(tmp_path, exits=EXITS, exit_kinds={2: kind})
    expected_TV = hf_logits(load_hf(folder), PROMPT, 2, read_exit_module(folder, 2))

    torch.testing.assert_close(served_logits(folder), expected_TV[-1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(trained_logits(folder), expected_TV, rtol=1e-4, atol=1e-4)
