"""Loss, agreement and KL of each exit against the plainest computation with transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sortserve.checkpoint.quantize import QUANTIZERS
from sortserve.core.schedule import DepthSchedule
from sortserve.model.weight import LinearOp, PlainFormat, Weight
from sortserve_trainer.evaluation.files import load_packs
from sortserve_trainer.evaluation.likelihood import Likelihood, Likelihoods, measure_likelihood
from sortserve_trainer.evaluation.settings import EvalSettings
from sortserve_trainer.model.load import load_for_evaluation
from support.tiny_models import (
    EXIT_KINDS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    read_exit_module,
    tiny_tokenizer,
)
from support.toy_quantizer import TOY, quantize_toy

EXITS = (1, 2, 4, 5, 6)
KINDS = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue is one."},
    {"instruction": "Count.", "input": "to three", "output": "one two three"},
    {"instruction": "Say something longer about the sea.", "output": "The sea is deep and wide."},
]
TEXT = "The other one then thought of the inner part.\n" * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("likelihood") / "sorted"
    return make_tiny_checkpoint(path, "llama-tied", exits=EXITS, exit_kinds=KINDS)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def measure(folder: Path, data: Path, **options: Any) -> dict[int, Likelihood]:
    return measure_all(folder, data, **options).exits


def measure_all(
    folder: Path,
    data: Path,
    *,
    dtype: str = "float32",
    quantize: str = "none",
    schedules: tuple[DepthSchedule, ...] = (),
    **limits: Any,
) -> Likelihoods:
    loaded = load_for_evaluation(str(folder), dtype=dtype, device="cpu", quantize=quantize)
    settings = EvalSettings(model="tiny", data=(str(data),), **limits)
    packs = load_packs(str(data), loaded.tokenizer, settings, max_length=128)
    return measure_likelihood(loaded.model, packs, quantize=loaded.quantize, schedules=schedules)


@dataclass
class Plain:
    """Sums over target tokens, as one would write them down."""

    ce: float = 0.0
    agreed: int = 0
    kl: float = 0.0
    count: int = 0

    def add(self, logits_TV: Tensor, full_TV: Tensor, ids: list[int], first_target: int) -> None:
        log_q = logits_TV[first_target - 1 : -1].double().log_softmax(-1)
        log_p = full_TV[first_target - 1 : -1].double().log_softmax(-1)
        targets = torch.tensor(ids[first_target:])
        self.ce -= float(log_q.gather(1, targets[:, None]).sum())
        self.agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.count += len(targets)


def plain(folder: Path, sequences: list[tuple[list[int], int]], exit_layer: int) -> Plain:
    """``sequences``: token ids, and where the first target is."""
    model, module = load_hf(folder), read_exit_module(folder, exit_layer)
    sums = Plain()
    for ids, first_target in sequences:
        sums.add(
            hf_logits(model, ids, exit_layer, module), hf_logits(model, ids), ids, first_target
        )
    return sums


def assert_equal(found: Likelihood, expected: Plain) -> None:
    assert found.num_tokens == expected.count
    assert found.loss == pytest.approx(expected.ce / expected.count, rel=1e-5)
    assert found.agreement == expected.agreed / expected.count
    assert found.kl == pytest.approx(expected.kl / expected.count, rel=1e-4, abs=1e-6)


def test_answers_alone_count_and_each_row_is_read_on_its_own(folder: Path, rows: Path) -> None:
    tokenizer = tiny_tokenizer()
    sequences = []
    for row in ROWS:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer.encode(prompt, add_special_tokens=False)
        answer = tokenizer.encode(f"{row['output']}<|im_end|>", add_special_tokens=False)
        sequences.append(([*before, *answer], len(before)))

    found = measure(folder, rows)

    assert tuple(found) == EXITS
    for exit_layer in EXITS:
        assert_equal(found[exit_layer], plain(folder, sequences, exit_layer))


def test_all_tokens_of_a_text_count_but_the_first_of_each_piece(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    pieces = [ids[start : start + 128] for start in range(0, len(ids), 128)]
    sequences = [(piece, 1) for piece in pieces if len(piece) > 1]
    assert len(sequences) > 1

    found = measure(folder, path)

    for exit_layer in EXITS:
        assert_equal(found[exit_layer], plain(folder, sequences, exit_layer))


def plain_schedule(
    folder: Path, answers: list[tuple[list[int], int, int]], schedule: DepthSchedule
) -> Plain:
    """``answers``: token ids, where the first target is, and where the last one ends."""
    sums = Plain()
    for ids, first, end in answers:
        full_TV = hf_logits(load_hf(folder), ids)
        for k, position in enumerate(range(first, end)):
            exit_layer = schedule.exit_at(k)
            module = read_exit_module(folder, exit_layer)
            logits_TV = hf_logits(load_hf(folder), ids, exit_layer, module)
            sums.add(
                logits_TV[: position + 1], full_TV[: position + 1], ids[: position + 1], position
            )
    return sums


SCHEDULES = (
    DepthSchedule(((0, 6), (2, 4), (5, 1))),
    DepthSchedule(((0, 5), (3, 2))),
    DepthSchedule(((0, 4),)),
)


def test_under_a_schedule_each_token_of_an_answer_is_that_of_the_exit_of_its_place(
    folder: Path, tmp_path: Path
) -> None:
    """Every answer of a conversation counts from its own first token."""
    turns = [("Name a colour.", "Blue is one."), ("And another?", "Green is one, too.")]
    tokenizer, ids, answers = tiny_tokenizer(), [], []
    for question, answer in turns:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += tokenizer.encode(asked, add_special_tokens=False)
        first = len(ids)
        ids += tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
        answers.append((first, len(ids)))
        ids += tokenizer.encode("\n", add_special_tokens=False)
    roles = ("user", "assistant")
    messages = [{"role": r, "content": c} for t in turns for r, c in zip(roles, t, strict=True)]
    path = tmp_path / "conversation.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")

    found = measure_all(folder, path, schedules=SCHEDULES).schedules

    assert tuple(found) == SCHEDULES
    for schedule, own in found.items():
        placed = [(ids, first, end) for first, end in answers]
        assert_equal(own, plain_schedule(folder, placed, schedule))
        counts = [schedule.tokens_by_exit(end - first) for first, end in answers]
        expected = {e: sum(c.get(e, 0) for c in counts) for e in schedule.exits}
        assert dict(own.tokens_by_exit) == {e: n for e, n in expected.items() if n}


def test_under_a_schedule_each_piece_of_a_text_counts_from_its_start(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    pieces = [ids[start : start + 128] for start in range(0, len(ids), 128)]
    schedule = DepthSchedule(((0, 6), (2, 4), (60, 1)))

    found = measure_all(folder, path, schedules=(schedule,)).schedules[schedule]

    sums, count = 0.0, 0
    for piece in (piece for piece in pieces if len(piece) > 1):
        losses = {}
        for e in schedule.exits:
            log_q = hf_logits(load_hf(folder), piece, e, read_exit_module(folder, e))
            log_q = log_q[:-1].double().log_softmax(-1)
            losses[e] = -log_q.gather(1, torch.tensor(piece[1:])[:, None]).squeeze(1)
        sums += sum(float(losses[schedule.exit_at(k)][k]) for k in range(len(piece) - 1))
        count += len(piece) - 1
    assert found.num_tokens == count
    assert found.loss == pytest.approx(sums / count, rel=1e-5)


def test_a_schedule_of_one_exit_is_that_exit(folder: Path, rows: Path) -> None:
    schedules = tuple(DepthSchedule(((0, exit_layer),)) for exit_layer in EXITS)

    found = measure_all(folder, rows, schedules=schedules)

    for exit_layer, schedule in zip(EXITS, schedules, strict=True):
        own, same = found.schedules[schedule], found.exits[exit_layer]
        assert (own.agreement, own.num_tokens) == (same.agreement, same.num_tokens)
        assert own.loss == pytest.approx(same.loss, rel=1e-9)
        assert own.kl == pytest.approx(same.kl, rel=1e-9, abs=1e-12)


def test_the_full_depth_agrees_with_itself(folder: Path, rows: Path) -> None:
    full = measure(folder, rows)[6]

    assert (full.agreement, full.kl) == (1.0, 0.0)


def test_chunks_do_not_change_the_result(
    folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(folder, rows)

    monkeypatch.setattr("sortserve_trainer.evaluation.likelihood.CHUNK_TOKENS", 3)

    for exit_layer, found in measure(folder, rows).items():
        assert found.loss == pytest.approx(whole[exit_layer].loss, rel=1e-6)
        assert found.kl == pytest.approx(whole[exit_layer].kl, rel=1e-5, abs=1e-7)
        assert found.agreement == whole[exit_layer].agreement


def test_logits_of_all_tokens_never_exist_at_once(
    folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sortserve_trainer.evaluation.likelihood.CHUNK_TOKENS", 4)
    largest = 0

    def head(self: PlainFormat, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        def linear(x_TI: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, x_TI.shape[0])
            return torch.nn.functional.linear(x_TI, weight.values)

        return linear

    monkeypatch.setattr(PlainFormat, "linear", head)

    measure(folder, rows)

    assert largest == 4


def test_bfloat16_is_near_float32(folder: Path, rows: Path) -> None:
    exact, rounded = measure(folder, rows), measure(folder, rows, dtype="bfloat16")

    for exit_layer in EXITS:
        assert rounded[exit_layer].loss == pytest.approx(exact[exit_layer].loss, rel=0.03)


def test_quantised_weights_are_measured_as_the_matrices_they_stand_for(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    copy = make_dequantised_copy(folder, tmp_path / "copy")

    found, expected = measure(folder, rows, quantize="toy"), measure(copy, rows)

    for exit_layer, plain_ in measure(folder, rows).items():
        assert found[exit_layer].loss == pytest.approx(expected[exit_layer].loss, rel=1e-5)
        assert found[exit_layer].kl == pytest.approx(expected[exit_layer].kl, rel=1e-3, abs=1e-6)
        assert abs(found[exit_layer].loss - plain_.loss) > 1e-4, "nothing was quantised"


def make_dequantised_copy(folder: Path, copy: Path) -> Path:
    """The checkpoint with the matrices of layers and head as the toy format keeps them."""
    shutil.copytree(folder, copy)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name, tensor in tensors.items():
        if "proj" in name or "lm_head" in name:
            tensors[name] = quantize_toy(tensor).dequantize(torch.float32)
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return copy


def test_a_limit_takes_random_rows_and_the_same_for_the_same_seed(folder: Path, rows: Path) -> None:
    few = measure(folder, rows, limit_rows=1)
    again = measure(folder, rows, limit_rows=1)
    others = {measure(folder, rows, limit_rows=1, seed=seed)[6].num_tokens for seed in range(8)}

    assert few == again
    assert len(others) > 1


def test_a_limit_of_tokens_keeps_whole_rows(folder: Path, rows: Path) -> None:
    whole = measure(folder, rows)[6].num_tokens

    assert measure(folder, rows, limit_tokens=whole)[6].num_tokens == whole
    assert 0 < measure(folder, rows, limit_tokens=whole - 1)[6].num_tokens < whole
    assert measure(folder, rows, limit_tokens=1)[6].num_tokens > 1  # one row at least
