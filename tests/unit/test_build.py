"""How much memory the KV cache takes, and the engine that settings become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sortserve.build import available_memory_bytes, build, num_kv_pages
from sortserve.config import load_settings
from sortserve.errors import ConfigError
from support.tiny_models import NUM_LAYERS, make_tiny_checkpoint


def test_pages_fill_the_memory() -> None:
    num_pages = num_kv_pages(memory_bytes=1050, page_bytes=10, pages_per_seq=20, max_num_seqs=1000)

    assert num_pages == 105


def test_no_more_pages_are_made_than_could_ever_be_used() -> None:
    num_pages = num_kv_pages(memory_bytes=10**9, page_bytes=10, pages_per_seq=20, max_num_seqs=3)

    assert num_pages == 60


def test_memory_for_less_than_one_full_sequence_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(ConfigError, match="give --kv-cache-memory=20MiB or more") as caught:
        num_kv_pages(memory_bytes=19 << 20, page_bytes=1 << 20, pages_per_seq=20, max_num_seqs=3)

    assert caught.value.param == "kv-cache-memory"


def test_the_machine_has_some_memory_but_not_all_of_the_world() -> None:
    assert 2**20 < available_memory_bytes(torch.device("cpu")) < 2**50


def test_settings_reach_the_parts_they_are_for(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 4, 6))
    flags = {"block_size": 8, "max_model_len": 64, "max_num_seqs": 3, "calibrate": False}

    serving = build(load_settings({"model": str(checkpoint), "served_model_name": "tiny", **flags}))

    assert serving.worker.exits.layers == (2, 4, NUM_LAYERS)
    assert serving.worker.max_model_len == 64
    assert serving.cache.slab_size == 2
    assert serving.cache.num_pages == 3 * (64 // 8) * (NUM_LAYERS // 2)
    text = serving.metrics.render()[0].decode()
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    (info,) = (s for s in samples if s.name == "sortserve_cache_config_info")
    assert info.labels["model_name"] == "tiny"
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("8", "72")


def test_a_calibrated_server_can_estimate_and_the_next_start_takes_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))

    settings = load_settings({"model": str(checkpoint), "max_model_len": 64, "max_num_seqs": 4})
    for start in ("first", "second"):
        serving = build(settings)
        serving.worker.start(serving.prepare)
        estimate = serving.worker.estimate(2, 8, 8)
        serving.worker.stop()

        assert estimate is not None, start
        assert estimate.e2e_s > 0
        assert len(list((tmp_path / "cache" / "calibration").iterdir())) == 1


def test_a_context_longer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(6,))

    with pytest.raises(ConfigError, match=r"--max-model-len=257 is more than .*at most 256"):
        build(load_settings({"model": str(checkpoint), "max_model_len": 257}))
