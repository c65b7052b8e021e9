"""The trainer's view of a model: exits as transformers has them, packed rows, merged LoRA."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sortserve.checkpoint.families import read_model_config
from sortserve_trainer.model import lora
from sortserve_trainer.model.exit_modules import Affine, ExitModules
from sortserve_trainer.model.load import load_for_evaluation
from sortserve_trainer.model.lora import merge_in_forward
from sortserve_trainer.model.norms import fuse_norms, fused_norm
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.terms import ExitTerm
from sortserve_trainer.run.warm_start import warm_start
from support.tiny_models import (
    VARIANTS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    read_exit_module,
    tiny_hf_model,
)

EXITS = (2, 4, 6)
KINDS = {2: "affine", 4: "mlp"}


def packed(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
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


def plain_model(variant: str = "llama-tied") -> SortedModel:
    trunk = tiny_hf_model(variant)
    config = read_model_config(trunk.config)
    modules = ExitModules({}, config, trunk.model.norm.weight.detach())
    return SortedModel(trunk, EXITS, modules)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_exit_of_each_family_reads_what_transformers_computes(
    tmp_path: Path, variant: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", variant, EXITS, KINDS)
    reference = load_hf(folder)
    loaded = load_for_evaluation(str(folder), dtype="float32", device="cpu")
    batch = packed([11])

    states = loaded.model.exit_states(
        batch["input_ids"], batch["position_ids"], batch["lengths"], EXITS
    )

    for exit_layer in EXITS:
        logits = states[exit_layer] @ loaded.model.head(exit_layer).T
        expected = hf_logits(
            reference,
            batch["input_ids"][0].tolist(),
            exit_layer,
            read_exit_module(folder, exit_layer),
        )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_examples_of_a_packed_row_do_not_see_each_other() -> None:
    model = plain_model()
    together, alone = packed([7, 5]), packed([7, 5])

    with torch.no_grad():
        both = model.exit_states(
            together["input_ids"], together["position_ids"], together["lengths"], EXITS
        )
        second = model.exit_states(
            alone["input_ids"][:, 7:], alone["position_ids"][:, 7:], torch.tensor([5]), EXITS
        )

    for exit_layer in EXITS:
        torch.testing.assert_close(both[exit_layer][7:], second[exit_layer])


def test_bf16_products_attend_like_sdpa() -> None:
    model = plain_model()
    batch = packed([9, 30])
    with torch.no_grad():
        exact = model.exit_states(batch["input_ids"], batch["position_ids"], batch["lengths"], [6])[
            6
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close = model.exit_states(
                batch["input_ids"], batch["position_ids"], batch["lengths"], [6]
            )[6]

    error = (close.float() - exact).norm() / exact.norm()
    assert error < 0.05


def lora_model(variant: str = "llama-tied", *, untrained: bool = False) -> SortedModel:
    trunk = tiny_hf_model(variant)
    config = read_model_config(trunk.config)
    norm = trunk.model.norm.weight.detach().clone()
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    peft_model = get_peft_model(
        trunk, LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=untrained)
    )
    return SortedModel(peft_model, EXITS, ExitModules({}, config, norm))


def adapted_weights(model: SortedModel) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]


def loss_and_gradients(
    model: SortedModel, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one pass over all exits; by parameter what has a gradient."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        loss, _ = model(**batch, terms=dict.fromkeys(EXITS, ExitTerm(ce=1 / 3)))
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_merged_lora_is_the_same_function_with_the_same_gradients() -> None:
    model, batch = lora_model(), packed([8, 13])

    peft_loss, peft_grads = loss_and_gradients(model, batch)
    changed = merge_in_forward(model.trunk)
    merged_loss, merged_grads = loss_and_gradients(model, batch)

    assert changed == 4 * 6
    torch.testing.assert_close(merged_loss, peft_loss)
    assert merged_grads.keys() == peft_grads.keys()
    for name, grad in peft_grads.items():
        torch.testing.assert_close(merged_grads[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("llama-tied", torch.float32),
        ("llama-tied", torch.bfloat16),
        ("llama-bias", torch.float32),
    ],
)
def test_layers_merged_at_once_are_the_same_function_with_the_same_gradients(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = lora_model(variant), packed([8, 13])
    merge_in_forward(model.trunk)

    loss, grads = loss_and_gradients(model, batch, dtype)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    monkeypatch.delattr(torch, "addmm")  # one layer after the other is not merged any more
    loss_at_once, grads_at_once = loss_and_gradients(model, batch, dtype)

    rtol = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(loss_at_once, loss, rtol=rtol, atol=1e-5)
    assert grads_at_once.keys() == grads.keys()
    for name, grad in grads.items():
        error = (grads_at_once[name] - grad).norm() / grad.norm().clamp(min=1e-3)
        assert error < rtol, name


def test_layers_are_merged_one_after_the_other_where_all_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = lora_model(), packed([8, 13])
    merge_in_forward(model.trunk)
    weights = adapted_weights(model)
    merged_and_their_gradients = 2 * 4 * sum(w.numel() for w in weights)
    monkeypatch.setattr(lora, "weight_budget", lambda _: merged_and_their_gradients)
    monkeypatch.delattr(torch, "baddbmm")

    loss, _ = model(**batch, terms=dict.fromkeys(EXITS, ExitTerm(ce=1 / 3)))

    assert loss.isfinite()


def test_layers_that_keep_the_device_busy_are_merged_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, each costs a whole gradient of its weight."""
    model, batch = lora_model(), packed([8, 13])
    merge_in_forward(model.trunk)
    weights = adapted_weights(model)
    mean = sum(w.numel() for w in weights) / len(weights)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    monkeypatch.setattr(lora, "MOST_PRODUCTS", 20 * mean)  # of 21 tokens
    monkeypatch.delattr(torch, "baddbmm")

    loss, _ = model(**batch, terms=dict.fromkeys(EXITS, ExitTerm(ce=1 / 3)))

    assert loss.isfinite()


def test_an_adapter_that_is_frozen_between_two_passes_is_not_merged_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by the second phase of sft+ict."""
    model, batch = lora_model(), packed([8, 13])
    merge_in_forward(model.trunk)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    terms = dict.fromkeys(EXITS, ExitTerm(ce=1 / 3))
    with torch.inference_mode():
        expected, _ = model(**batch, terms=terms)
    model.requires_grad_(False)
    monkeypatch.delattr(torch, "baddbmm")

    loss, _ = model(**batch, terms=terms)

    torch.testing.assert_close(loss, expected.clone())


def test_a_merge_that_fails_half_way_leaves_no_weights_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of an earlier step would be computed with ever after."""
    model, batch = lora_model(), packed([8, 13])
    merge_in_forward(model.trunk)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    merge_group = lora._merge_group
    merged: list[Any] = []

    def run_out_of_memory(layers: list[Any], device: torch.device) -> Any:
        if merged:
            raise torch.OutOfMemoryError("no")
        merged.extend(layers)
        return merge_group(layers, device)

    monkeypatch.setattr(lora, "_merge_group", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch, terms={6: ExitTerm(ce=1.0)})

    assert merged
    assert not any(lora.READY in vars(layer) for layer in model.modules())


def test_the_adapter_of_a_head_is_left_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is read as a matrix; merged beside the layers it would be there for nothing."""
    trunk = tiny_hf_model("llama-tied")
    config = read_model_config(trunk.config)
    norm = trunk.model.norm.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of heads that are embeddings, too
        wrapped = get_peft_model(trunk, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    model = SortedModel(wrapped, EXITS, ExitModules({}, config, norm))
    merge_in_forward(model.trunk)
    monkeypatch.setattr(lora, "weight_budget", lambda _: 1 << 30)
    merge_group = lora._merge_group
    merged: list[Any] = []

    def merge_and_tell(layers: list[Any], device: torch.device) -> Any:
        merged.extend(layers)
        return merge_group(layers, device)

    monkeypatch.setattr(lora, "_merge_group", merge_and_tell)

    loss, _ = model(**packed([8, 13]), terms={6: ExitTerm(ce=1.0)})
    loss.backward()

    assert len(merged) == 6
    assert model.base.lm_head.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norms_of_all_families_are_known_and_fused_are_the_same(variant: str) -> None:
    trunk = tiny_hf_model(variant)
    norms = {n: m for n, m in trunk.named_modules() if "norm" in n}

    assert fuse_norms(trunk) == len(norms)
    for name, norm in norms.items():
        x = torch.randn(1, 7, 2, norm.weight.numel())
        fused = fused_norm(x, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(fused, norm(x), msg=name)


def test_an_adapter_that_does_not_train_is_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = lora_model(), packed([8, 13])
    merge_in_forward(model.trunk)

    def states() -> dict[int, torch.Tensor]:
        return model.exit_states(batch["input_ids"], batch["position_ids"], batch["lengths"], EXITS)

    trained = states()
    model.requires_grad_(False)
    with torch.inference_mode():  # an evaluation before the first step
        states()
    monkeypatch.delattr(torch, "addmm")
    frozen = states()

    for exit_layer, state in trained.items():
        torch.testing.assert_close(frozen[exit_layer], state.detach())


def test_the_base_teaches_what_it_said_before_it_had_an_adapter() -> None:
    batch, terms = packed([8, 13]), {EXITS[-1]: ExitTerm(kl=1.0)}
    fresh = lora_model(untrained=True)
    merge_in_forward(fresh.trunk)
    trained = lora_model()
    merge_in_forward(trained.trunk)

    own, _ = fresh(**batch, terms=terms, teacher="base")
    moved, _ = trained(**batch, terms=terms, teacher="base")
    own.backward()

    assert float(own.detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(moved.detach()) > 0.1
    assert any(p.requires_grad for p in trained.parameters())


def test_an_unwanted_token_that_was_known_is_unlearned_and_the_others_are_kept() -> None:
    model = plain_model()
    batch = packed([9, 7])
    terms = dict.fromkeys(EXITS, ExitTerm(ce=1 / 3))
    optimizer = torch.optim.Adam(model.trunk.parameters(), lr=3e-3)
    token = int(batch["labels"][0, 5])

    def train(batch: dict[str, torch.Tensor]) -> tuple[dict[int, float], float]:
        """The probability of the token at each exit, and the worst exit's loss on the targets."""
        for _ in range(60):
            loss, means = model(**batch, terms=terms, unlikelihood=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            states = model.exit_states(
                batch["input_ids"], batch["position_ids"], batch["lengths"], EXITS
            )
            probs = {e: (states[e][5] @ model.head(e).T).softmax(-1) for e in EXITS}
        return {e: float(p[token]) for e, p in probs.items()}, max(map(float, means.values()))

    known, _ = train(batch)
    batch["unwanted"] = torch.full_like(batch["labels"], -100)
    batch["unwanted"][0, 5], batch["labels"][0, 5] = token, -100
    unlearned, loss = train(batch)

    assert min(known.values()) > 0.5
    assert max(unlearned.values()) < 0.05
    assert loss < 0.5


def test_lora_with_dropout_stays_with_peft() -> None:
    trunk = tiny_hf_model()
    model = get_peft_model(trunk, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))

    assert merge_in_forward(model) == 0


def affine_model() -> SortedModel:
    trunk = tiny_hf_model()
    config = read_model_config(trunk.config)
    kinds = {2: "affine", 4: "affine"}
    return SortedModel(trunk, EXITS, ExitModules(kinds, config, trunk.model.norm.weight.detach()))


def loss_per_exit(model: SortedModel, batch: dict[str, torch.Tensor]) -> dict[int, float]:
    with torch.no_grad():
        _, means = model(**batch, terms=dict.fromkeys(EXITS, ExitTerm(ce=1 / 3)))
    return {e: float(mean) for e, mean in means.items()}


def test_a_fitted_affine_module_brings_an_exit_closer_to_the_full_depth() -> None:
    model = affine_model()
    batch = packed([60] * 20, seed=1)
    states = model.trunk_states(batch["input_ids"], batch["position_ids"], batch["lengths"], EXITS)
    full = model._read_rows(states, None)[6]
    before = (model._read_rows(states, None)[4] - full).norm()

    warm_start(model, [2, 4], [packed([60] * 20, seed=2)])

    assert (model._read_rows(states, None)[4] - full).norm() < 0.95 * before


def test_rescaling_an_affine_module_leaves_its_function_alone() -> None:
    model = affine_model()
    module = model.exit_modules.by_exit[2]
    assert isinstance(module, Affine)
    torch.nn.init.normal_(module.affine_weight, std=0.1)
    batch = packed([20, 9])
    before, tensors = loss_per_exit(model, batch), model.exit_modules.tensors()

    warm_start(model, [], [packed([40, 40], seed=3)])

    assert not torch.equal(module.input_scale, torch.ones(64))
    assert loss_per_exit(model, batch) == pytest.approx(before, rel=1e-4)
    for name, tensor in model.exit_modules.tensors().items():
        torch.testing.assert_close(tensor, tensors[name])
