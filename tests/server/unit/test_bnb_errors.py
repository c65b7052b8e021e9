"""What a quantised checkpoint says wrongly is refused by name, before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint import quantization as quantization_module
from sortserve.checkpoint.load import load_checkpoint
from sortserve.cli import main
from sortserve.core.errors import CheckpointError
from support.bnb_checkpoints import (
    BNB_CONFIGS,
    make_quantised_checkpoint,
    needs_bitsandbytes,
)

pytestmark = needs_bitsandbytes

Q = "model.layers.3.self_attn.q_proj"
W = f"{Q}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    return {
        kind: make_quantised_checkpoint(root / kind, **BNB_CONFIGS[kind])
        for kind in ("nf4-nested", "int8")
    }


@pytest.fixture
def four(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["nf4-nested"], tmp_path / "four"))


@pytest.fixture
def eight(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["int8"], tmp_path / "eight"))


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*arguments: object) -> object:
        raise AssertionError("weights are read")

    monkeypatch.setattr(checkpoint_module, "_load_weights", reads)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder), dtype="float32", device="cpu")
    assert "\n" not in caught.value.message
    return caught.value.message


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"] |= fields
    path.write_text(json.dumps(document))


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(edit({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def state(**fields: Any) -> Callable[[Tensors], Tensors]:
    """The JSON of W with other fields."""

    def change(tensor: Tensor) -> Tensor:
        document = {**json.loads(bytes(tensor.tolist())), **fields}
        return torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)

    return changed(STATE, change)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quant_method": "gptq"}, ["quant_method='gptq'", "supported: bitsandbytes", "GGUF"]),
        ({"quant_method": "awq"}, ["quant_method='awq'", "supported: bitsandbytes"]),
        ({"quant_method": "fp8"}, ["quant_method='fp8'", "supported: bitsandbytes"]),
        ({"load_in_4bit": False}, ["load_in_4bit=False and load_in_8bit=False"]),
        ({"load_in_8bit": True}, ["load_in_4bit=True and load_in_8bit=True"]),
        ({"load_in_4bit": "yes"}, ["load_in_4bit='yes' is not true or false"]),
        ({"bnb_4bit_quant_type": "nf3"}, ["bnb_4bit_quant_type='nf3'", "supported: nf4, fp4"]),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ["quant_storage='bfloat16'", "supported: uint8"]),
        ({"llm_int8_has_fp16_weight": True}, ["llm_int8_has_fp16_weight=true is not supported"]),
        ({"llm_int8_threshold": -1}, ["llm_int8_threshold=-1 is not a number from 0 to"]),
        ({"llm_int8_threshold": float("nan")}, ["llm_int8_threshold=nan is not a number from 0"]),
        ({"llm_int8_threshold": 10**400}, ["is not a number from 0 to 65504"]),
        ({"llm_int8_threshold": True}, ["llm_int8_threshold=True is not a number from 0 to"]),
    ],
)
def test_a_field_of_the_config_is_named(
    four: Path, fields: dict[str, Any], said: list[str]
) -> None:
    edit_config(four, **fields)

    message = refused(four)

    assert message.startswith(f"{four / 'config.json'}: ")
    for words in said:
        assert words in message


@pytest.mark.parametrize("value", ["nf4", 4, []])
def test_a_config_that_is_no_object_is_refused(four: Path, value: object) -> None:
    path = four / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))

    assert f"quantization_config={value!r} is not an object" in refused(four)


def test_a_missing_library_is_named_with_the_extra_that_has_it(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_module, "find_spec", lambda name: None)

    assert "bitsandbytes, which is not installed: pip install 'sortserve[quant]'" in refused(four)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without(STATE), f"tensor {W}.quant_state.bitsandbytes__nf4 (or fp4) is missing"),
        (without(f"{W}.absmax"), f"tensor {W}.absmax is missing"),
        (without(f"{W}.quant_map"), f"tensor {W}.quant_map is missing"),
        (without(f"{W}.nested_absmax"), f"tensor {W}.nested_absmax is missing"),
        (without(f"{W}.nested_quant_map"), f"tensor {W}.nested_quant_map is missing"),
        (without(W), f"tensor {W} is missing, but {W}."),
        (changed(W, lambda t: t[:-1]), f"tensor {W} has shape [2047, 1], where [2048, 1]"),
        (changed(W, lambda t: t.float()), f"tensor {W} is F32, where U8 is wanted"),
        (changed(f"{W}.absmax", lambda t: t.float()), f"tensor {W}.absmax is F32, where U8"),
        (changed(f"{W}.absmax", lambda t: t[1:]), f"tensor {W}.absmax has shape [63], where [64]"),
        (changed(f"{W}.quant_map", lambda t: t[1:]), f"tensor {W}.quant_map has shape [15]"),
        (changed(STATE, lambda t: t[:-1]), f"tensor {STATE} is not JSON in bytes"),
        (changed(STATE, lambda t: t + 128), f"tensor {STATE} is not JSON in bytes"),
        (changed(STATE, lambda t: t[:0]), f"tensor {STATE} is not JSON in bytes"),
        (
            changed(STATE, lambda t: torch.tensor([49], dtype=torch.uint8)),
            f"tensor {STATE} is not a JSON object",
        ),
        (state(quant_type="fp4"), f"tensor {STATE}: quant_type='fp4' is not supported"),
        (state(blocksize=48), f"tensor {STATE}: blocksize=48 is not supported"),
        (state(blocksize="64"), f"tensor {STATE}: blocksize='64' is not supported"),
        (state(blocksize=64.0), f"tensor {STATE}: blocksize=64.0 is not supported"),
        (changed(STATE, lambda t: t.repeat(99)), f"tensor {STATE} has more than 4096 bytes"),
        (
            changed(STATE, lambda t: torch.full((4096,), 91, dtype=torch.uint8)),
            f"tensor {STATE} is not JSON in bytes",
        ),
        (state(shape=[64]), f"tensor {STATE}: shape=[64] is not supported"),
        (state(shape=[64, -64]), f"tensor {STATE}: shape=[64, -64] is not supported"),
        (state(shape=[32, 128]), f"tensor {W} has shape [32, 128], but the configuration asks"),
        (state(nested_blocksize=128), f"tensor {STATE}: nested_blocksize=128 is not supported"),
        (state(nested_offset=None), f"tensor {STATE}: nested_offset=None is not supported"),
    ],
)
def test_a_tensor_of_4_bits_is_named(
    four: Path, edit: Callable[[Tensors], Tensors], said: str
) -> None:
    edit_tensors(four, edit)

    message = refused(four)

    assert message.startswith(f"{four}: ")
    assert said in message


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without(f"{Q}.SCB"), f"tensor {Q}.SCB is missing"),
        (changed(f"{Q}.SCB", lambda t: t[1:]), f"tensor {Q}.SCB has shape [63], where [64]"),
        (changed(f"{Q}.SCB", lambda t: t.half()), f"tensor {Q}.SCB is F16, where F32 is wanted"),
        (changed(W, lambda t: t.to(torch.uint8)), f"tensor {W} is U8, where I8 is wanted"),
        (changed(W, lambda t: t.flatten()), f"tensor {W} has shape [4096], which is no matrix's"),
        (changed(W, lambda t: t[1:]), f"tensor {Q}.SCB has shape [64], where [63] is wanted"),
        (
            changed(f"{Q}.weight_format", lambda t: t + 2),
            f"tensor {Q}.weight_format is 2; supported: 0 (by rows)",
        ),
    ],
)
def test_a_tensor_of_8_bits_is_named(
    eight: Path, edit: Callable[[Tensors], Tensors], said: str
) -> None:
    edit_tensors(eight, edit)

    assert said in refused(eight)


def test_what_is_quantised_in_another_way_than_the_config_says_is_refused(eight: Path) -> None:
    edit_config(eight, load_in_8bit=False, load_in_4bit=True)

    assert "is I8, where F32, F16, BF16, F64 is wanted" in refused(eight)


def test_a_plain_checkpoint_with_integers_is_still_refused(eight: Path) -> None:
    path = eight / "config.json"
    document = json.loads(path.read_text())
    del document["quantization_config"]
    path.write_text(json.dumps(document))

    assert "is I8; supported: F32, F16, BF16, F64" in refused(eight)


def test_the_server_ends_with_2_and_one_line(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(four), "--port=0", "--log-level=error", "--quantize=nf4"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "--quantize='nf4': four is quantised already: use --quantize=none." in line
