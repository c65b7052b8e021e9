"""Law 11: adapter merged == adapter applied == exported; and an exit exported == that exit served.

Tiny random models, fp32, greedy: what transformers makes of the exported folder must equal, token
for token, what the engine serves at that exit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.hf import quiet
from sortserve.core.sampling_params import SamplingParams
from sortserve_trainer.run.export import export_submodel
from support.scripted import add, make_request, run
from support.serving import offline_tokens, serve
from support.tiny_models import (
    NUM_LAYERS,
    VARIANTS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    read_exit_module,
    write_sorted_json,
)

EXITS = (2, 3, 4, 5, 6)
KINDS = {2: "norm", 3: "mlp", 4: "head", 5: "layer"}
PROMPT = list(range(40, 75))
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints with exits of five kinds, by variant, each made once."""

    @cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("export") / variant
        return make_tiny_checkpoint(folder, variant, exits=EXITS, exit_kinds=KINDS)

    return make


def served_tokens(folder: Path, exit_layer: int) -> list[int]:
    engine = serve(folder).engine()
    request = make_request("r", PROMPT, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    add(engine, request, exit_layer)
    return run(engine)["r"].token_ids


load_whole = cache(load_hf)
"""transformers' model of a folder that no test changes."""


def transformers_tokens(model: Any) -> list[int]:
    """Greedy, by transformers' own ``generate`` on the model of a plain folder."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("variant", "exit_layer"),
    [
        pytest.param(v, e, marks=[] if v == VARIANTS[0] or e == often else pytest.mark.slow)
        for (v, often), e in itertools.product(zip(VARIANTS, itertools.cycle(KINDS)), EXITS)
    ],
)
def test_an_exported_exit_in_transformers_is_that_exit_served(
    folders: Callable[[str], Path], tmp_path: Path, variant: str, exit_layer: int
) -> None:
    folder = folders(variant)

    exported = export_submodel(str(folder), exit_layer, tmp_path / "exported")

    model = load_hf(exported)
    assert transformers_tokens(model) == served_tokens(folder, exit_layer)
    module = read_exit_module(folder, exit_layer)
    expected = hf_logits(load_whole(folder), PROMPT, exit_layer, module)
    torch.testing.assert_close(hf_logits(model, PROMPT), expected)


@pytest.mark.parametrize("exit_layer", [2, 3, 4, 5])
def test_an_exported_exit_served_again_is_the_exit_it_came_from(
    folders: Callable[[str], Path], tmp_path: Path, exit_layer: int
) -> None:
    folder = folders("llama-tied")

    exported = export_submodel(str(folder), exit_layer, tmp_path / "exported")

    depth = serve(exported).checkpoint.exits.full
    assert depth == exit_layer + (KINDS.get(exit_layer) in ("mlp", "layer"))
    assert served_tokens(exported, depth) == served_tokens(folder, exit_layer)


def make_adapter(folder: Path, base: Path) -> Any:
    """A random LoRA adapter over ``base``; returns transformers' model with it applied, live."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    with quiet():
        adapted = peft.get_peft_model(load_hf(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    document = {**json.loads(path.read_text()), "base_model_name_or_path": f"../{base.name}"}
    path.write_text(json.dumps(document))
    return adapted.eval().get_base_model()


def applied_tokens(adapted: Any, folder: Path, exit_layer: int, guess: list[int]) -> list[int]:
    """Greedy through peft's live layers; as far as the guess is right, it is what comes out.

    No token sees those after it: one pass over all tells what follows each.
    """
    module = read_exit_module(folder, exit_layer)
    logits_TV = hf_logits(adapted, [*PROMPT, *guess], exit_layer, module)
    tokens: list[int] = logits_TV.argmax(-1)[len(PROMPT) - 1 : -1].tolist()
    return tokens


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3-untied"])
def test_an_adapter_merged_is_the_adapter_applied_and_the_adapter_exported(
    folders: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", variant, exits=None)
    whole = folders(variant)
    folder = tmp_path / "adapter"
    adapted = make_adapter(folder, base)
    write_sorted_json(folder, EXITS, KINDS)
    (folder / "exit_modules.safetensors").write_bytes(
        (whole / "exit_modules.safetensors").read_bytes()
    )

    for exit_layer in EXITS:
        merged = served_tokens(folder, exit_layer)  # at load
        applied = applied_tokens(adapted, folder, exit_layer, merged)

        assert merged == applied
        exported = export_submodel(str(folder), exit_layer, tmp_path / f"exported-{exit_layer}")
        assert transformers_tokens(load_hf(exported)) == applied
        assert applied != served_tokens(whole, exit_layer), "the adapter is idle"


def test_the_exported_full_depth_is_the_model_itself(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "sorted", "qwen2-untied", exits=EXITS)

    exported = export_submodel(str(folder), NUM_LAYERS, tmp_path / "exported")

    own, copy = load_hf(folder).state_dict(), load_hf(exported).state_dict()
    assert own.keys() == copy.keys()
    assert all(torch.equal(own[name], copy[name]) for name in own)


def test_an_exported_folder_ends_its_texts_where_the_server_does(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "sorted", exits=EXITS)
    served = serve(folder)

    exported = export_submodel(str(folder), 5, tmp_path / "exported")

    again = serve(exported)
    assert again.tokenizer.eos_token_ids == served.tokenizer.eos_token_ids
    params = SamplingParams(max_tokens=60, temperature=0.0)
    eos = served.tokenizer.eos_token_ids
    own = offline_tokens(folder, PROMPT, params, [5] * 60, eos_token_ids=eos)
    assert own == offline_tokens(exported, PROMPT, params, [5] * 60, eos_token_ids=eos, guess=own)
