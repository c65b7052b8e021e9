"""``--quantize``: which matrices are made smaller, when, and how the choice is told and refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.checkpoint.quantize import QUANTIZERS, find_quantizer
from sortserve.core.errors import ConfigError
from sortserve.core.sampling_params import SamplingParams
from sortserve.llm.llm import LLM
from sortserve.model.weight import PLAIN, Weight
from sortserve.process.banner import banner
from sortserve.process.build import Serving, build
from sortserve.process.config import load_settings
from support.tiny_models import NUM_LAYERS, make_tiny_checkpoint
from support.toy_quantizer import TOY, quantize_toy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return make_tiny_checkpoint(folder, "llama-tied", exits=(2, 4, 6), exit_kinds={2: "mlp"})


def load(folder: Path, **options: Any) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype="float32", device="cpu", **options)


def matrices(checkpoint: LoadedCheckpoint) -> list[Weight]:
    weights = checkpoint.weights
    layers = [m for w in weights.layers for m in (w.qkv, w.o, w.gate_up, w.down)]
    return [*layers, weights.lm_head]


def with_recorder(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Quantise as ever, and keep weak references to all that was quantised."""
    seen: list[weakref.ref[Tensor]] = []

    def record(matrix_OI: Tensor) -> Weight:
        assert all(earlier() is None for earlier in seen), "an earlier matrix is still in memory"
        if matrix_OI.shape[0] != 288:  # the embedding, which stays, is the head, too
            seen.append(weakref.ref(matrix_OI))
        return quantize_toy(matrix_OI)

    monkeypatch.setitem(QUANTIZERS, "toy", replace(TOY, make=record))
    return seen


# What is quantised


@pytest.mark.parametrize("variant", ["llama-tied", "llama-untied", "llama-bias"])
def test_all_matrices_of_layers_and_head_are_quantised_and_nothing_else(
    variant: str, tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path, variant, exits=(2, 4, 6), exit_kinds={2: "mlp", 4: "affine"})

    plain, quantised = load(tmp_path), load(tmp_path, quantize="toy")

    for before, after in zip(matrices(plain), matrices(quantised), strict=True):
        assert before.format is PLAIN
        assert after.format.name == "toy"
        assert after.shape == before.shape
        torch.testing.assert_close(
            after.dequantize(torch.float32), quantize_toy(before.values).dequantize(torch.float32)
        )
    assert torch.equal(quantised.weights.embed, plain.weights.embed)
    assert torch.equal(quantised.weights.final_norm, plain.weights.final_norm)
    for exit_layer in (2, 4):
        tensors = quantised.weights.exit_modules[exit_layer].tensors
        for name, tensor in plain.weights.exit_modules[exit_layer].tensors.items():
            assert torch.equal(tensors[name], tensor)
    for layer, other in zip(quantised.weights.layers, plain.weights.layers, strict=True):
        assert torch.equal(layer.input_norm, other.input_norm)
        assert (layer.qkv_bias is None) is (other.qkv_bias is None)


def test_a_matrix_is_gone_before_the_next_is_read(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = with_recorder(monkeypatch)

    load(tied, quantize="toy")

    assert len(seen) == 4 * NUM_LAYERS


def test_weights_know_their_formats(tied: Path) -> None:
    assert load(tied).weights.formats == {"plain": 4 * NUM_LAYERS + 1}
    assert load(tied, quantize="toy").weights.formats == {"toy": 4 * NUM_LAYERS + 1}


# What is refused


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--quantize='int5' is not one of none, .*toy") as caught:
        find_quantizer("int5", CPU)

    assert caught.value.param == "quantize"


def test_a_device_it_does_not_work_on_is_named_with_those_it_does() -> None:
    with pytest.raises(ConfigError, match="'toy' does not work on cuda, only on cpu") as caught:
        find_quantizer("toy", torch.device("cuda"))

    assert caught.value.param == "quantize"


def test_a_missing_library_is_named_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needing = replace(TOY, library="no_such_library", extra="quant")
    monkeypatch.setitem(QUANTIZERS, "toy", needing)

    with pytest.raises(ConfigError, match=r"'toy' needs no_such_library.*sortserve\[quant\]"):
        find_quantizer("toy", CPU)


def test_a_refusal_comes_before_any_weights_are_read(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*arguments: object) -> object:
        raise AssertionError("weights are read")

    monkeypatch.setattr(checkpoint_module, "open_trunk", reads)

    with pytest.raises(ConfigError, match="--quantize='int5'"):
        load(tied, quantize="int5")


def test_an_offline_engine_names_its_argument(tied: Path) -> None:
    with pytest.raises(ConfigError, match=r"^quantize='int5' is not") as caught:
        LLM(tied, quantize="int5")

    assert caught.value.param == "quantize"


# How it is told


def serving_of(folder: Path, **flags: Any) -> Serving:
    settings = {"model": str(folder), "max_model_len": 64, "max_num_seqs": 2, "dtype": "float32"}
    return build(load_settings({**settings, "calibrate": False, **flags}))


@pytest.mark.parametrize(
    ("quantize", "line"), [("toy", "toy, all else in float32"), ("none", "float32")]
)
def test_a_server_tells_people_and_metrics(tied: Path, quantize: str, line: str) -> None:
    serving = serving_of(tied, quantize=quantize)

    text = banner(load_settings({"model": str(tied)}), serving, 8000)
    families = text_string_to_metric_families(serving.metrics.render()[0].decode())
    (info,) = (s for f in families for s in f.samples if s.name == "sortserve_model_config_info")

    assert f"  weights   {line}" in text.splitlines()
    assert info.labels["quantization"] == quantize
    assert info.labels["dtype"] == "float32"


def test_step_times_of_quantised_weights_are_kept_apart(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sortserve.engine.calibrator.CALIBRATION_ATTEMPTS", 1)
    monkeypatch.setattr("sortserve.engine.calibrator.fault_of", lambda *given, **more: None)

    for flags in ({}, {"quantize": "toy"}, {"quantize": "toy"}):
        serving_of(tied, **flags).measure()

    assert len(list((tmp_path / "calibration").iterdir())) == 2


def test_an_offline_engine_answers_with_quantised_weights(tied: Path) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    answers = []
    for quantize in ("none", "toy"):
        with LLM(tied, dtype="float32", device="cpu", quantize=quantize, max_model_len=64) as llm:
            (result,) = llm.generate([40, 41, 42], greedy)
            answers.append(result.outputs[0].token_ids)

    assert answers[0] != answers[1]
