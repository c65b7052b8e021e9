"""A training step sends its batch to the device, and then asks it for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sortserve_trainer.data.examples import Example
from sortserve_trainer.data.packing import Pack
from sortserve_trainer.model import device_attention, lora
from sortserve_trainer.model.load import LoadedModel, load_for_training
from sortserve_trainer.model.loss import VocabSample
from sortserve_trainer.run.settings import TrainSettings
from sortserve_trainer.run.trainer import host_batch
from support.host_reads import HostReadError, NoHostReads
from support.tiny_models import make_tiny_checkpoint

EXITS = (2, 4, 6)
OWN = {"teacher": "full", "vocab_sample": 12}
BASE = {"teacher": "base", "unlikelihood": 0.5, "vocab_sample": 0}


def example(length: int, seed: int) -> Example:
    draw = np.random.default_rng(seed)
    is_target, is_unwanted = np.ones((2, length), dtype=np.bool_)
    is_target[0], is_unwanted[:] = False, False
    is_unwanted[length // 2] = True
    is_target[length // 2] = False
    return Example(draw.integers(3, 260, length, dtype=np.int32), is_target, is_unwanted)


def load(tmp_path: Path, **flags: Any) -> tuple[LoadedModel, TrainSettings]:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    settings = TrainSettings(
        base=str(base),
        data=("none.jsonl",),
        output=tmp_path / "out",
        exits=EXITS[:-1],
        lora_rank=4,
        device="cpu",
        **flags,
    )
    return load_for_training(settings, settings.resolved), settings


def step(loaded: LoadedModel, settings: TrainSettings, batch: dict[str, Any]) -> None:
    """What the trainer does between two batches, but for torch's own cut of the gradients."""
    method = settings.resolved
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    loss, _ = loaded.model(
        **batch,
        terms=method.terms(EXITS, 0, 0),
        num_targets=batch["target_rows"].numel(),
        sample=VocabSample.of(method.vocab_sample, 5),
        teacher=method.teacher,
        unlikelihood=method.unlikelihood,
    )
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def batch_of(*lengths: int) -> dict[str, Any]:
    batch = host_batch([Pack(tuple(example(n, seed) for seed, n in enumerate(lengths)))])
    del batch["draw"]
    return batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [OWN, BASE], ids=["its own teacher", "taught by the base"])
def test_a_step_makes_the_host_wait_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], dtype: str
) -> None:
    monkeypatch.setattr(device_attention, "in_one_call", lambda _: True)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    loaded, settings = load(tmp_path, dtype=dtype, **flags)
    loaded.model.train()
    device_attention.flash_works(torch.device("cpu"), torch.bfloat16, 16)  # tried once, and no more
    batch = batch_of(7, 20, 3)
    mode = NoHostReads()
    rotary = loaded.model.base.model.rotary_emb
    angles = rotary.forward

    def on_its_own_device(*args: Any, **options: Any) -> Any:
        with mode.off():  # transformers sends its frequencies to where they are
            return angles(*args, **options)

    monkeypatch.setattr(rotary, "forward", on_its_own_device)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"), mode:
        step(loaded, settings, batch)


def test_looking_for_the_targets_in_the_step_is_what_is_refused(tmp_path: Path) -> None:
    loaded, settings = load(tmp_path, **OWN)
    batch = batch_of(7, 20, 3)
    count = batch.pop("target_rows")

    with pytest.raises(HostReadError, match=r"bool|nonzero"), NoHostReads():
        loaded.model(**batch, terms=settings.resolved.terms(EXITS, 0, 0), num_targets=len(count))
