"""Whatever a checkpoint folder holds: it loads and equals transformers, or one line refuses it.

Each example damages one file of a good folder, and the outcome is one of two: the logits and tokens
of transformers, or a ``CheckpointError`` of one printable line before any weight is read.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.hf import quiet
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.checkpoint.tensors import SafetensorsReader
from sortserve.core.errors import CheckpointError
from sortserve.text.tokenizer import Tokenizer
from support.reference import reference_forward
from support.tiny_models import hf_logits, load_hf, make_tiny_checkpoint

DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sorted.json",
    "model.safetensors.index.json",
    "adapter_config.json",
)
NEW_FIELDS = {
    "config.json": (
        *("rope_scaling", "rope_theta", "partial_rotary_factor", "head_dim", "layer_types"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "quantization_config"),
        *("original_max_position_embeddings", "per_layer_config", "num_labels", "id2label"),
        *("is_causal", "auto_map", "transformers_weights", "attention_bias", "text_config"),
        *("torch_dtype", "problem_type", "to_dict", "tokenizer_class", "_attn_implementation"),
    ),
    "generation_config.json": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    "tokenizer_config.json": (
        *("chat_template", "added_tokens_decoder", "auto_map", "model_max_length", "unk_token"),
        *("padding_side", "add_prefix_space", "add_bos_token", "extra_special_tokens"),
        *("from_slow", "tokenizer_file", "name_or_path", "legacy", "split_special_tokens"),
    ),
    "tokenizer.json": ("normalizer", "post_processor", "truncation", "padding", "decoder"),
    "sorted.json": ("base", "recipe"),
    "model.safetensors.index.json": ("metadata",),
    "adapter_config.json": (
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "bias"),
        *("use_dora", "use_rslora", "modules_to_save", "exclude_modules", "init_lora_weights"),
        *("layer_replication", "trainable_token_indices", "fan_in_fan_out", "lora_bias"),
    ),
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 7, -1, 10**9, 10**12, 10**30, 2**32 - 1, 0.5, -0.5, 6.0),
    *(1e30, -1e30, float("nan"), float("inf"), "", "x", "6", "é\ud800\x1b[31m", "../..", "\0"),
    *([], {}, [None], [1, "a"], {"a": 1}, [[[[]]]], {"rope_type": "yarn", "factor": 2.0}),
    *({"type": "linear", "factor": 2}, {"rope_type": "dynamic", "factor": 2.0}, [0, 2], [2, 300]),
    *("llama", "float16", "default", "silu", ["q_proj"], "(a+)+$", "all-linear"),
    *(["full_attention"] * 6, ["sliding_attention"] * 6, ["x"] * 6),
)
CONTENTS = {
    "empty": b"",
    "no-json": b"nonsense",
    "a-list": b"[]",
    "null": b"null",
    "an-empty-object": b"{}",
    "latin-1": b'{"a": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep": b'{"a": ' + b"[" * 100_000,
    "deep-and-closed": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "zeros": b"\0" * 1000,
}
NODES = ("fifo", "folder", "dangling", "device", "missing")
IDS = [(11 * position) % 250 + 3 for position in range(24)]


@dataclass(frozen=True)
class Mutation:
    """One change of one file; ``place`` walks into the document."""

    file: str
    kind: str
    place: tuple[int, ...] = ()
    value: Any = None
    field: str = ""


@st.composite
def mutations(draw: st.DrawFn, files: tuple[str, ...]) -> Mutation:
    file = draw(st.sampled_from(files))
    kind = draw(
        st.sampled_from(["replace"] * 6 + ["delete"] * 2 + ["add"] * 3 + ["cut", "content", "node"])
    )
    place = tuple(draw(st.lists(st.integers(0, 1 << 12), min_size=1, max_size=5)))
    value = draw(st.sampled_from(VALUES))
    if kind == "content":
        value = draw(st.sampled_from(sorted(CONTENTS)))
    elif kind == "node":
        value = draw(st.sampled_from(NODES))
    return Mutation(file, kind, place, value, draw(st.sampled_from(NEW_FIELDS[file])))


def apply(mutation: Mutation, folder: Path) -> None:
    path = folder / mutation.file
    match mutation.kind:
        case "cut":
            data = path.read_bytes()
            path.write_bytes(data[: mutation.place[0] % len(data)])
        case "content":
            path.write_bytes(CONTENTS[mutation.value])
        case "node":
            path.unlink()
            make_node(path, mutation.value)
        case _:
            document = json.loads(path.read_text())
            change(document, mutation)
            path.write_text(json.dumps(document))


def make_node(path: Path, kind: str) -> None:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(path.parent / "nowhere")
        case "device":
            path.symlink_to("/dev/zero")


def change(document: Any, mutation: Mutation) -> None:
    """Walk into ``document`` as far as it goes, and replace or delete what is there."""
    if mutation.kind == "add":
        document[mutation.field] = copy.deepcopy(mutation.value)
        return
    node: Any = document
    key: Any = None
    inner: Any = document
    for step in mutation.place:
        if not isinstance(inner, dict | list) or not inner:
            break
        node, key = inner, step % len(inner)
        if isinstance(inner, dict):
            key = sorted(inner)[key]
        inner = node[key]
    if mutation.kind == "delete":
        del node[key]
    else:
        node[key] = copy.deepcopy(mutation.value)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in several shards with ``sorted.json``, and an adapter over it."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("originals")
    base = make_tiny_checkpoint(
        root / "model", "qwen2-rope-yarn", exit_kinds={2: "norm"}, max_shard_size="150KB"
    )
    with quiet():
        adapted = get_peft_model(
            load_hf(base),
            LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        )
        adapted.save_pretrained(root / "adapter")
    path = root / "adapter" / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "base_model_name_or_path": "../model"}))
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that were read."""
    names: list[str] = []
    read = SafetensorsReader.read

    def counted(self: SafetensorsReader, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return names


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No example takes a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def check(mutation: Mutation, originals: Path, work: Path, reads: list[str]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(originals, work)
    in_adapter = mutation.file == "adapter_config.json"
    apply(mutation, work / ("adapter" if in_adapter else "model"))
    folder = work / ("adapter" if in_adapter else "model")
    reads.clear()
    checkpoint, error = attempt(folder)
    if checkpoint is None:
        assert error.isprintable()
        assert len(error) < 1_200
        assert not reads, "refused only after weights were read"
        return
    assert ApiSettings(served_model_name="m", generation_defaults=checkpoint.generation_defaults)
    assert all(0 <= token_id < 288 for token_id in checkpoint.eos_token_ids)
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.eos_token_ids)
    tokenizer.decode(tokenizer.encode("The end of the other."))
    ids = IDS[: checkpoint.max_model_len]
    layers = checkpoint.config.num_layers
    ours_TV = reference_forward(checkpoint.config, checkpoint.weights, ids, layers)
    with quiet():
        theirs_TV = hf_logits(applied(folder) if in_adapter else load_hf(folder), ids)
    torch.testing.assert_close(ours_TV, theirs_TV, atol=2e-4, rtol=1e-3, equal_nan=True)


def attempt(folder: Path) -> tuple[LoadedCheckpoint | None, str]:
    """The checkpoint, or the message it is refused with."""
    try:
        return load_checkpoint(str(folder), dtype="float32", device="cpu"), ""
    except CheckpointError as error:
        return None, error.message


def applied(folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_hf(folder.parent / "model"), folder).get_base_model()


SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=30, suppress_health_check=SHARED, derandomize=True)
@given(mutation=mutations(DOCUMENTS))
def test_a_damaged_document_is_refused_or_read_as_transformers_reads_it(
    mutation: Mutation, originals: Path, tmp_path: Path, reads: list[str]
) -> None:
    check(mutation, originals, tmp_path / "work", reads)


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("file", DOCUMENTS)
@settings(max_examples=400, suppress_health_check=SHARED)
@given(data=st.data())
def test_so_it_is_with_every_document(
    file: str, data: st.DataObject, originals: Path, tmp_path: Path, reads: list[str]
) -> None:
    check(data.draw(mutations((file,))), originals, tmp_path / "work", reads)


@pytest.mark.parametrize("node", ["fifo", "folder", "dangling", "device"])
@pytest.mark.parametrize("file", DOCUMENTS)
def test_a_document_that_is_no_regular_file_is_refused_by_name(
    file: str, node: str, originals: Path, tmp_path: Path, reads: list[str]
) -> None:
    work = tmp_path / "work"
    shutil.copytree(originals, work)
    folder = work / ("adapter" if file == "adapter_config.json" else "model")
    apply(Mutation(file, "node", value=node), folder)

    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        load_checkpoint(str(folder), dtype="float32", device="cpu")

    assert not reads
