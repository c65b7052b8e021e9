"""A backend that computes wrongly is found at start-up, said and passed over, or refused."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.backend_check import Difference, largest_difference
from sortserve.engine.backend_choice import BackendChoice, choose_checked_backend
from sortserve.llm.llm import LLM
from sortserve.model.backend import Target
from sortserve.model.backends import BACKENDS, choose_backend, usable_backends
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.weight import Weight
from sortserve.process.build import build
from sortserve.process.config import load_settings
from support.native import INSTANCES, force_isa
from support.tiny_models import make_tiny_checkpoint
from support.toy_quantizer import quantize_toy
from support.wrong_backends import WRONG

BLOCK_SIZE = 4
DTYPES = ("float32", "bfloat16", "float16")
COMPUTING_WRONGLY = tuple(name for name in WRONG if name not in ("nan", "raises"))


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    kinds = {2: "head", 4: "layer"}
    return make_tiny_checkpoint(folder, "llama-tied", exits=(2, 4, 6), exit_kinds=kinds)


def load(folder: Path, dtype: str = "float32") -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype=dtype, device="cpu")


def difference(name: str, checkpoint: LoadedCheckpoint, block_size: int = BLOCK_SIZE) -> Difference:
    config, weights = checkpoint.config, checkpoint.weights
    target = Target(config, weights.dtype, weights.device)
    backend = (
        WRONG[name](target)
        if name in WRONG
        else choose_backend(config, weights.dtype, weights.device, name)
    )
    return largest_difference(
        backend, ReferenceBackend(target), config, weights, block_size=block_size
    )


def choose(checkpoint: LoadedCheckpoint, **options: Any) -> BackendChoice:
    return choose_checked_backend(
        checkpoint.config, checkpoint.weights, block_size=BLOCK_SIZE, **options
    )


# ---- what is found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPUTING_WRONGLY)
def test_what_is_wrong_is_further_off_than_rounding_explains(
    folder: Path, name: str, dtype: str
) -> None:
    assert not difference(name, load(folder, dtype)).is_tolerable


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_a_wrong_length_is_found_whatever_the_size_of_a_block(
    folder: Path, block_size: int
) -> None:
    assert not difference("length", load(folder), block_size).is_tolerable


def test_a_number_that_is_none_is_the_largest_difference(folder: Path) -> None:
    found = difference("nan", load(folder))

    assert found.share == math.inf
    assert str(found).startswith("no finite numbers (tolerance 0.001) in the logits of row")


def test_the_place_is_a_row_of_a_step(folder: Path) -> None:
    found = difference("page", load(folder))

    assert found.where.startswith(("the logits of row", "the hidden state of row"))
    assert "tokens) of" in found.where


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_where_it_should_be(folder: Path, dtype: str) -> None:
    assert difference("reference", load(folder, dtype)).share == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", INSTANCES)
def test_our_kernels_are_within_the_tolerance(
    folder: Path, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_isa(isa, monkeypatch)

    assert difference("cpu", load(folder, dtype)).is_tolerable


@pytest.mark.parametrize("family", ["llama-bias", "llama-head-dim-10", "llama-mqa", "qwen3-untied"])
def test_no_family_gives_a_false_alarm(family: str, tmp_path: Path) -> None:
    """Whatever a family has (biases, norms of heads, scaled RoPE, odd heads), the check has too."""
    make_tiny_checkpoint(tmp_path, family, exits=(1, 6))

    assert difference("cpu", load(tmp_path, "bfloat16")).is_tolerable
    assert not difference("norm", load(tmp_path, "bfloat16")).is_tolerable


def test_quantised_weights_are_checked_as_they_are(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder), dtype="bfloat16", device="cpu", quantize="int8")

    assert difference("cpu", checkpoint).is_tolerable
    assert difference("norm", checkpoint).tolerance > difference("norm", load(folder)).tolerance


def test_weights_that_are_no_numbers_are_not_the_backends_fault(folder: Path) -> None:
    checkpoint = load(folder)
    checkpoint.weights.final_norm.fill_(torch.nan)

    assert difference("cpu", checkpoint).is_tolerable


def test_a_model_of_one_layer_is_checked_too(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "llama-tied", exits=(1,), num_hidden_layers=1)

    assert difference("cpu", load(tmp_path)).is_tolerable
    assert not difference("page", load(tmp_path)).is_tolerable


def test_the_loaded_weights_stay_what_they_are(folder: Path) -> None:
    checkpoint = load(folder)
    before = {
        name: value.values.clone()
        for layer in checkpoint.weights.layers
        for name, value in vars(layer).items()
        if isinstance(value, Weight)
    }

    difference("cpu", checkpoint)

    assert len(checkpoint.weights.layers) == 6
    last = checkpoint.weights.layers[-1]
    assert all(torch.equal(getattr(last, name).values, kept) for name, kept in before.items())


def test_of_a_large_plain_head_only_the_beginning_is_computed(tmp_path: Path) -> None:
    checkpoint = load(make_tiny_checkpoint(tmp_path))
    embed = torch.randn(10_007, 64, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []

    class Watching(ReferenceBackend):
        def head(self, weight: Weight) -> Any:
            seen.append(weight.shape)
            return super().head(weight)

    target = Target(checkpoint.config, torch.float32, torch.device("cpu"))
    for head in (Weight.plain(embed), quantize_toy(embed)):
        weights = replace(checkpoint.weights, lm_head=head)
        largest_difference(
            Watching(target), ReferenceBackend(target), checkpoint.config, weights, block_size=4
        )

    assert seen == [(4096 + 10_007 % 64, 64), (10_007, 64)]


# ---- what follows


@pytest.fixture(name="wrong")
def _wrong(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a wrong backend at the end of the table, where it is tried first."""

    def put(name: str) -> None:
        monkeypatch.setitem(BACKENDS, "wrong", WRONG[name])

    return put


@pytest.mark.parametrize("name", WRONG)
def test_the_next_backend_is_used_and_the_fault_is_said(
    folder: Path, name: str, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wrong(name)

    choice = choose(load(folder))

    following = choose_backend(load(folder).config, torch.float32, torch.device("cpu"), "auto")
    assert following.name == "wrong"  # without a check it would be used
    assert choice.backend.name in ("cpu", "reference")
    assert choice.failed == ("wrong",)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("the backend wrong is not used: ")
    if name == "raises":
        assert warning.endswith("it raises RuntimeError: no image for this device")
    else:
        assert "largest difference from the reference is" in warning


def test_a_backend_asked_for_by_name_is_passed_over_too(folder: Path, wrong: Any) -> None:
    wrong("norm")

    assert choose(load(folder), name="wrong").failed == ("wrong",)


def test_one_that_comes_earlier_in_the_order_is_not_tried(folder: Path, wrong: Any) -> None:
    wrong("raises")

    choice = choose(load(folder), name="reference")

    assert (choice.backend.name, choice.failed) == ("reference", ())


def test_the_order_goes_on_from_the_name_to_the_reference(wrong: Any, folder: Path) -> None:
    wrong("norm")
    checkpoint = load(folder)
    target = Target(checkpoint.config, torch.float32, torch.device("meta"))

    assert [b.name for b in usable_backends(target)] == ["wrong", "reference"]
    assert [b.name for b in usable_backends(target, "reference")] == ["reference"]
    with pytest.raises(ConfigError, match="--backend=cpu cannot be used for float32 on meta"):
        list(usable_backends(target, "cpu"))


def test_after_flashinfer_come_our_own_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the reference, which is many times slower: what is faster is later in the table."""
    for name in ("flashinfer", "triton"):
        monkeypatch.setitem(BACKENDS, name, type(name, (ReferenceBackend,), {"name": name}))
    target = Target(load(folder).config, torch.float32, torch.device("meta"))

    named = [b.name for b in usable_backends(target, "flashinfer")]
    assert named == ["flashinfer", "triton", "reference"]
    assert [b.name for b in usable_backends(target)] == ["triton", "reference"]


def test_a_required_backend_that_fails_its_check_ends_the_start(folder: Path, wrong: Any) -> None:
    wrong("page")

    with pytest.raises(ConfigError, match="--require-backend=wrong: it fails its check") as caught:
        choose(load(folder), required="wrong")

    assert caught.value.param == "require-backend"


def test_a_required_backend_that_cannot_be_had_is_refused_by_the_flag_that_was_given(
    folder: Path,
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(load(folder), required="flashinfer")

    message = str(caught.value)
    assert message.startswith("--require-backend=flashinfer cannot be used for float32 on cpu")
    assert "its kernels are for CUDA devices. Leave it out (there are: reference, " in message
    assert caught.value.param == "require-backend"


def test_a_required_backend_that_is_right_is_used(folder: Path, wrong: Any) -> None:
    wrong("page")

    assert choose(load(folder), required="reference").failed == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"require_backend": "cpu", "backend": "reference"},
            "--require-backend=cpu and --backend=reference name two different ones.",
        ),
        ({"require_backend": "auto"}, "--require-backend='auto' is not one of reference, "),
        ({"require_backend": "none"}, "--require-backend='none' is not one of reference, "),
    ],
)
def test_what_cannot_be_required_is_refused_before_anything_is_loaded(
    options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions(**options)  # type: ignore[arg-type]

    assert str(caught.value).startswith(message)
    assert caught.value.param == "require-backend"


def test_the_command_ends_with_code_2(
    folder: Path, wrong: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong("nan")

    code = main(["profile", str(folder), "--require-backend", "wrong"])

    assert code == 2
    assert "--require-backend=wrong: it fails its check" in capsys.readouterr().err


def test_metrics_say_what_runs_and_what_does_not(folder: Path, wrong: Any) -> None:
    wrong("slot")

    flags = {"model": str(folder), "max_num_seqs": 2, "calibrate": False}
    serving = build(load_settings(flags))

    families = text_string_to_metric_families(serving.metrics.render()[0].decode())
    (info,) = (s for f in families for s in f.samples if s.name == "sortserve_model_config_info")
    assert info.labels["failed_backends"] == "wrong"
    assert info.labels["backend"] == serving.computed_in["backend"] != "wrong"


def test_answers_are_the_next_backends(folder: Path, wrong: Any) -> None:
    answers = []
    for name in ("norm", None):
        if name is not None:
            wrong(name)
        with LLM(folder, dtype="float32", device="cpu", max_model_len=64) as llm:
            greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            answers.append(llm.generate([40, 41, 42], greedy)[0].outputs[0].token_ids)
        BACKENDS.pop("wrong", None)

    assert answers[0] == answers[1]


def test_an_engine_tells_what_it_passed_over(folder: Path, wrong: Any) -> None:
    wrong("gate")

    parts = assemble(load(folder), EngineOptions(max_model_len=32, max_num_seqs=2))

    assert parts.failed_backends == ("wrong",)
