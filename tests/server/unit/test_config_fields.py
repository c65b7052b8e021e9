"""A field of ``config.json`` that cannot be served is refused by name, before any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import CheckpointError
from support.tiny_models import make_tiny_checkpoint

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model", exits=None)


@pytest.fixture
def folder(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def reads(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint_module, "_load_weights", reads)
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refusal(folder: Path, **fields: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder), dtype="float32", device="cpu")
    assert "config.json" in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("sliding_window", "original_max_position_embeddings"),
)


NO_SIZES: tuple[Any, ...] = (0, -1, 10**9, 10**400, 6.0, True, "6", [6], {})


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, 10**12) for name in SIZES), *(("num_hidden_layers", value) for value in NO_SIZES)],
)
def test_a_size_must_be_an_integer_a_model_can_have(name: str, value: Any, folder: Path) -> None:
    assert f"{name}=" in refusal(folder, **{name: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": INFINITY}, "rms_norm_eps=inf"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x'"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"hidden_size": 7}, "hidden size (7)"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_labels": "x"}, "num_labels"),
        ({"per_layer_config": [{}]}, "per_layer_config=[{}]"),
        ({"layer_types": ["sliding_attention"] * 6}, "there is no sliding_window"),
        ({"is_causal": False}, "is_causal=False"),
        ({"is_causal": 1}, "is_causal=1"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 2}, "attention_bias"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"pad_token_id": 10**9}, "Padding_idx"),
        ({"hidden_act": None}, "hidden_act"),
        ({"rope_parameters": []}, "rope_parameters=[]"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
    ],
)
def test_a_field_that_would_compute_something_else_is_named(
    fields: dict[str, Any], words: str, folder: Path
) -> None:
    assert words in refusal(folder, **fields)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        *(
            ({"rope_type": "default", "rope_theta": theta}, f"rope_theta={theta!r}")
            for theta in (-1, 0, NAN, INFINITY, "x", [1e4], True)
        ),
        ({"rope_type": 3, "rope_theta": 1e4}, "RoPE scaling 3"),
        ({"rope_type": ["yarn"], "rope_theta": 1e4}, "RoPE scaling ['yarn']"),
        *(
            ({**YARN, "factor": factor}, f"factor={factor!r}")
            for factor in (0, 0.5, -4.0, NAN, INFINITY, "4", True, 1e30)
        ),
        *(
            ({**YARN, "original_max_position_embeddings": original}, f"embeddings={original!r}")
            for original in (0, -1, 64.0, "64", 10**12, True)
        ),
        ({**YARN, "beta_fast": "x"}, "beta_fast='x'"),
        ({**YARN, "beta_slow": NAN}, "beta_slow=nan"),
        ({**YARN, "attention_factor": INFINITY}, "attention_factor=inf"),
        ({**YARN, "mscale": [], "mscale_all_dim": 1.0}, "mscale=[]"),
        ({**YARN, "factor": 60_000.0, "original_max_position_embeddings": 10**6}, "a context of"),
        ({**YARN, "rope_theta": 1.0}, "bad parameter"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor=1.0"),
        ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor=0"),
        ({**LLAMA3, "low_freq_factor": None}, "has no low_freq_factor"),
        ({**LLAMA3, "high_freq_factor": "4"}, "high_freq_factor='4'"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": None}, "has no factor"),
    ],
)
def test_a_rope_parameter_out_of_range_is_named(
    parameters: dict[str, Any], words: str, folder: Path
) -> None:
    assert words in refusal(folder, rope_parameters=parameters)


def test_rope_parameters_by_layer_type_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen2-tied", exits=None)
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}

    assert "by layer type" in refusal(folder, rope_parameters=nested)


def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(folder: Path) -> None:
    """transformers would wait for an answer on the terminal."""
    (folder / "own.py").write_text("raise SystemExit('ran')")

    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    assert "rms_norm_eps" in refusal(folder, auto_map=code, rms_norm_eps=-1)
