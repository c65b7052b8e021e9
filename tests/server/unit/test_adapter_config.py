"""An adapter that cannot be merged, or never stops matching, is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint import patterns
from sortserve.checkpoint.load import load_checkpoint
from sortserve.checkpoint.patterns import Pattern, check_patterns
from sortserve.core.errors import CheckpointError
from support.tiny_models import make_tiny_checkpoint

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    return make_tiny_checkpoint(folder / "base", num_hidden_layers=1, exits=None)


def make_adapter(base: Path, folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    document = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 4,
        "target_modules": ["q_proj"],
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    tensors = {
        f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64),
        f"{Q_PROJ}.lora_B.weight": torch.zeros(64, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def load(folder: Path) -> object:
    return load_checkpoint(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint_module, "_load_weights", reads)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.message.isprintable()
    return caught.value.message


def test_the_adapter_loads_where_nothing_is_wrong(base: Path, tmp_path: Path) -> None:
    assert load(make_adapter(base, tmp_path / "own"))


ENDLESS = r"(.*)*(.*)*(.*)*(.*)*(.*)*X"


@pytest.mark.usefixtures("no_weights")
def test_an_expression_that_backtracks_for_ever_is_stopped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "CPU_SECONDS", 1)

    message = refusal(make_adapter(base, tmp_path / "own", target_modules=ENDLESS))

    assert "adapter_config.json: target_modules='(.*)*" in message
    assert "cannot be matched in 1 s" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "field",
    ["exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"],
)
def test_so_it_is_in_every_field_that_takes_one(
    field: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "CPU_SECONDS", 1)
    monkeypatch.setattr(checkpoint_module, "_load_weights", None)

    message = refusal(make_adapter(base, tmp_path / "own", **in_field(field, ENDLESS)))

    assert f"adapter_config.json: {field}='(.*)*" in message
    assert "cannot be matched in 1 s" in message


def in_field(field: str, expression: str) -> dict[str, Any]:
    if field in ("rank_pattern", "alpha_pattern"):
        return {field: {expression: 4}}
    if field == "modules_to_save":
        return {field: [expression]}
    return {field: expression}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_modules", "(q_proj", "unterminated subpattern"),
        ("exclude_modules", "[", "unterminated character set"),
        ("rank_pattern", {"*": 4}, "nothing to repeat"),
        ("alpha_pattern", {"(": 4}, "unterminated subpattern"),
        ("layers_pattern", ["layers", "(?P<idx>x)"], "redefinition of group name 'idx'"),
        ("modules_to_save", ["[z-a]"], "bad character range"),
        ("target_modules", "(?P<a>q)(?P<a>p)", "redefinition of group"),
        ("target_modules", "(" * 50_000 + ")" * 50_000, "target_modules="),
        ("target_modules", "a{1,99999999999999999999}", "too large"),
    ],
)
def test_an_expression_that_is_none_is_refused(
    field: str, value: Any, words: str, base: Path, tmp_path: Path
) -> None:
    message = refusal(make_adapter(base, tmp_path / "own", **{field: value}))

    assert f"adapter_config.json: {field}=" in message
    assert words in message


def test_plain_names_need_no_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)

    check_patterns(
        [Pattern("rank_pattern", "layers.0.q_proj", r"(.*\.)?(layers.0.q_proj)$")], ["x"]
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "PEFT type 'IA3'"),
        ({"peft_type": None}, "PEFT type None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]] is not supported"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5] is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=[5] is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters=['x'] is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"some_future_kind": {"a": 1}}, "some_future_kind={'a': 1} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"r": 0}, "r=0"),
        ({"r": "4"}, "r='4'"),
        ({"r": True}, "r=True"),
        ({"r": 10**9}, "r=1000000000"),
        ({"r": None}, "r=None"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_dropout": 7}, "dropout"),
        ({"rank_pattern": []}, "rank_pattern=[]"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern.q_proj=1000000000"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj=None"),
        ({"use_dora": "yes"}, "use_dora='yes'"),
        ({"bias": "some"}, "bias='some'"),
        ({"target_modules": 5}, "target_modules=5"),
        ({"target_modules": [5]}, "target_modules=[5]"),
        ({"target_modules": []}, "cannot be merged"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
        ({"layers_to_transform": "x"}, "layers_to_transform='x'"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform=[0.5]"),
        ({"r": 8}, "lora_A.weight has shape [4, 64]"),
        ({"base_model_name_or_path": 5}, "no base_model_name_or_path"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_before_any_weights_are_read(
    fields: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    assert words in refusal(make_adapter(base, tmp_path / "own", **fields))
