"""The benchmark of sampling runs from one end to the other: every kind of request, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.lib.floors import Machine

from benchmarks import sampling
from support.tiny_models import make_tiny_checkpoint


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_kind_has_its_share_of_the_step(
    backend: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def machine(device: torch.device, dtype: torch.dtype) -> Machine:
        return Machine(copy_bytes_per_s=1e9, read_bytes_per_s=1e9, gemm_flops_per_s=1e9)

    monkeypatch.setattr(sampling, "measure_machine", machine)
    folder = make_tiny_checkpoint(tmp_path / "tiny", vocab_size=320)  # the bias is of 300 tokens
    arguments = ["--rows", "1", "3", "--history", "20", "--context", "8"]
    arguments += ["--steps", "1", "--samples", "1", "--rounds", "1", "--backend", backend]
    assert sampling.main(["--model", str(folder), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_rows = json.loads(lines[-1])["results"]["rows"]
    assert list(by_rows) == ["1", "3"]
    for figures in by_rows.values():
        assert list(figures["kinds"]) == list(sampling.KINDS)
        assert figures["step_ms"] > 0.0
        for at in figures["kinds"].values():
            assert at["sampling_ms"] > 0.0
            assert at["percent_of_step"] > 0.0
    assert any("percent_of_step" in line for line in lines)


def test_a_model_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main(["--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
