"""The exit module ``layer`` in the trainer: transformers' own layer, packed, warm, recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sortserve.checkpoint.families import read_model_config
from sortserve_trainer.model.exit_modules import ExitModules
from sortserve_trainer.model.load import load_for_evaluation
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.terms import ExitTerm
from support.layer_modules import hf_layer_logits
from support.tiny_models import (
    VARIANTS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    random_exit_module,
    read_exit_module,
    tiny_hf_model,
)

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
    arguments = (batch[name] for name in ("input_ids", "position_ids", "lengths"))
    return model.exit_states(*arguments, [4], rows)[4]


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
        logits_of = hf_layer_logits if KINDS.get(exit_layer) == "layer" else hf_logits
        expected = logits_of(reference, ids, exit_layer, module)
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

    (exit_states(model, batch) * weight_RD).sum().backward()

    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        direction, step = torch.randn_like(parameter), 1e-6
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * step * direction
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
