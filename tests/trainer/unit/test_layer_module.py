"""The exit module ``layer`` in the trainer: transformers' own layer, packed, warm, recomputed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.quantize import QUANTIZERS
from sortserve_trainer.model.exit_modules import ExitModules
from sortserve_trainer.model.last_layer import last_layer_tensors
from sortserve_trainer.model.load import load_for_evaluation
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.terms import ExitTerm
from sortserve_trainer.run.warm_start import warm_start
from support.tiny_models import (
    VARIANTS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    random_exit_module,
    read_exit_module,
    tiny_hf_model,
)
from support.toy_quantizer import TOY, quantize_toy

EXITS = (2, 3, 4, 6)
KINDS = {2: "layer", 3: "affine", 4: "layer"}
TERMS = dict.fromkeys(EXITS, ExitTerm(ce=1 / 4))


def packed(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """A packed row of random examples; every token but an example's last has a target."""
    generator = torch.Generator().manual_seed(seed)
    examples = [torch.randint(3, 260, (n,), generator=generator) for n in lengths]
    labels = [torch.cat([ids[1:], torch.tensor([-100])]) for ids in examples]
    return {
        "input_ids": torch.cat(examples)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "lengths": torch.tensor(lengths),
    }


def make_model(variant: str = "llama-tied", *, random: bool = True) -> SortedModel:
    """A tiny trunk with modules of two kinds; new ones, or random ones."""
    trunk = tiny_hf_model(variant)
    config = read_model_config(trunk.config)
    modules = ExitModules(KINDS, config, trunk.model.norm.weight.detach())
    if random:
        for exit_layer, module in modules.by_exit.items():
            module.load(random_exit_module(module.kind, config, seed=exit_layer))
    return SortedModel(trunk, EXITS, modules)


def exit_states(model: SortedModel, batch: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """Of exit 4."""
    return model.exit_states(
        batch["input_ids"], batch["position_ids"], batch["lengths"], [4], rows
    )[4]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_exit_of_each_family_reads_what_transformers_computes(
    tmp_path: Path, variant: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", variant, EXITS, KINDS)
    reference, batch = load_hf(folder), packed([21])
    model = load_for_evaluation(str(folder), dtype="float32", device="cpu").model

    states = model.exit_states(batch["input_ids"], batch["position_ids"], batch["lengths"], EXITS)

    ids = batch["input_ids"][0].tolist()
    for exit_layer in EXITS:
        module = read_exit_module(folder, exit_layer)
        expected = hf_logits(reference, ids, exit_layer, module)
        logits = states[exit_layer] @ model.head(exit_layer).T
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_examples_of_a_packed_row_do_not_see_each_other() -> None:
    model, both = make_model(), packed([7, 15])
    second = {
        "input_ids": both["input_ids"][:, 7:],
        "position_ids": both["position_ids"][:, 7:],
        "lengths": torch.tensor([15]),
    }

    torch.testing.assert_close(exit_states(model, both)[7:], exit_states(model, second))


@torch.no_grad()
@pytest.mark.parametrize("as_bools", [False, True])
def test_rows_that_are_not_read_are_attended_to_all_the_same(as_bools: bool) -> None:
    model, batch = make_model(), packed([9, 12])
    rows = torch.tensor([3, 8, 17])
    if as_bools:
        rows = torch.zeros(21, dtype=torch.bool).index_fill(0, rows, True)

    some = exit_states(model, batch, rows)

    torch.testing.assert_close(some, exit_states(model, batch)[rows])


@torch.no_grad()
def test_a_new_module_that_has_seen_nothing_changes_nothing() -> None:
    model, batch = make_model(random=False), packed([9, 12])
    h_TD = model.trunk_states(batch["input_ids"], batch["position_ids"], batch["lengths"], [4])[4]

    torch.testing.assert_close(exit_states(model, batch), model.base.model.norm(h_TD))


def test_a_quantised_module_computes_with_the_matrices_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    folder = make_tiny_checkpoint(tmp_path / "plain", "qwen3-bias", EXITS, KINDS)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("model.safetensors", "exit_modules.safetensors"):
        tensors = {
            key: quantize_toy(tensor).dequantize(torch.float32) if "proj.weight" in key else tensor
            for key, tensor in load_file(folder / name).items()
        }
        save_file(tensors, copy / name, metadata={"format": "pt"})

    def states(path: Path, quantize: str) -> Tensor:
        loaded = load_for_evaluation(str(path), dtype="float32", device="cpu", quantize=quantize)
        return exit_states(loaded.model, packed([9, 12]))

    found = states(folder, "toy")

    torch.testing.assert_close(found, states(copy, "none"))
    assert (found - states(folder, "none")).norm() > 0.01 * found.norm()


def gradients(model: SortedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the loss of all exits, in the modules alone."""
    model.zero_grad()
    loss, _ = model(**batch, terms=TERMS)
    loss.backward()
    return {n: p.grad for n, p in model.exit_modules.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["llama-bias", "qwen3-tied"])
def test_every_tensor_of_a_module_has_a_gradient_and_it_is_the_slope(variant: str) -> None:
    model, batch = make_model(variant).double(), packed([9, 12])
    module = model.exit_modules.by_exit[4]
    weight_RD = torch.randn(21, 64, dtype=torch.float64)

    torch.autograd.backward((exit_states(model, batch) * weight_RD).sum())

    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        direction, step = torch.randn_like(parameter), 1e-6
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                ends.append(float((exit_states(model, batch) * weight_RD).sum()))
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = float((parameter.grad * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-4), name
        parameter.data += step * direction  # back where it was


@pytest.mark.parametrize("freezes", [False, True])
def test_recomputed_modules_have_the_same_gradients(freezes: bool) -> None:
    model, batch = make_model().train(), packed([9, 12])
    model.trunk.requires_grad_(not freezes)
    kept = {name: grad.clone() for name, grad in gradients(model, batch).items()}

    model.gradient_checkpointing_enable()

    torch.testing.assert_close(gradients(model, batch), kept)


def test_a_module_under_autocast_is_near_to_the_exact_one() -> None:
    model, batch = make_model(), packed([9, 30])
    with torch.no_grad():
        exact = exit_states(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close = exit_states(model, batch)

    assert (close.float() - exact).norm() / exact.norm() < 0.05


def distance_to_full(model: SortedModel, exit_layer: int) -> float:
    """Of what the head reads there from what it reads at full depth, on tokens of their own."""
    batch = packed([60] * 10, seed=1)
    with torch.no_grad():
        states = model.exit_states(
            batch["input_ids"], batch["position_ids"], batch["lengths"], [exit_layer, 6]
        )
    return float((states[exit_layer] - states[6]).norm() / states[6].norm())


@pytest.mark.parametrize("variant", ["llama-tied", "llama-bias", "qwen3-tied"])
def test_a_module_that_has_seen_states_starts_near_the_full_depth(variant: str) -> None:
    model, blind = make_model(variant, random=False), make_model(variant, random=False)

    warm_start(model, [2, 3, 4], [packed([60] * 20, seed=seed) for seed in (2, 3)])

    last = last_layer_tensors(model.base.model.layers[-1])
    for exit_layer in (2, 4):
        blind.exit_modules.by_exit[exit_layer].load(last)
        distance = distance_to_full(model, exit_layer)
        assert distance < 0.95 * distance_to_full(blind, exit_layer)
    assert distance_to_full(model, 4) < distance_to_full(model, 2)


def test_where_bfloat16_is_computed_in_a_module_starts_as_near_as_in_float32() -> None:
    packs = [packed([60] * 20, seed=seed) for seed in (2, 3)]
    exact, rounded = make_model(random=False), make_model(random=False)

    warm_start(exact, [2, 4], packs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for exit_layer in (2, 4):  # what it casts of the first weights is kept
            distance_to_full(rounded, exit_layer)
        warm_start(rounded, [2, 4], packs)

    for exit_layer in (2, 4):
        assert distance_to_full(rounded, exit_layer) < 1.05 * distance_to_full(exact, exit_layer)


def test_one_layer_below_full_depth_a_new_module_is_the_layer_that_is_missing() -> None:
    trunk = tiny_hf_model()
    config = read_model_config(trunk.config)
    modules = ExitModules({5: "layer"}, config, trunk.model.norm.weight.detach())
    model = SortedModel(trunk, (5, 6), modules)

    warm_start(model, [5], [packed([60] * 20, seed=seed) for seed in (2, 3)])

    assert distance_to_full(model, 5) < 0.03


def test_a_module_that_was_trained_is_left_alone() -> None:
    model = make_model()
    before = {n: p.clone() for n, p in model.exit_modules.by_exit[2].named_parameters()}

    warm_start(model, [4], [packed([40, 40])])

    for name, parameter in model.exit_modules.by_exit[2].named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_last_layer_is_taken_with_its_adapter() -> None:
    targets = ["q_proj", "down_proj"]
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_hf_model("qwen3-bias"),
        LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False),
    )
    found = last_layer_tensors(adapted.get_base_model().model.layers[-1])

    layer = adapted.merge_and_unload().model.layers[-1]
    assert len(found) == len(layer.state_dict())
    torch.testing.assert_close(found["q_proj.weight"], layer.self_attn.q_proj.weight)
    torch.testing.assert_close(found["down_proj.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(found["k_norm.weight"], layer.self_attn.k_norm.weight)
    assert torch.equal(found["o_proj.bias"], layer.self_attn.o_proj.bias)
