"""transformers' Trainer, with a loss per exit.

What is ours: the loss and its weights per step, the log and the evaluation per exit, and states to
resume from that hold only what is trained and count only when they are whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from sortserve_trainer.data import Mixture, Pack, collate
from sortserve_trainer.model.loss import VocabSample
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.averaging import TailAverage
from sortserve_trainer.run.cached_trunk import CachedTrunk
from sortserve_trainer.run.choice import Choice
from sortserve_trainer.run.meter import Meter
from sortserve_trainer.run.methods import Method
from sortserve_trainer.run.terms import ExitTerm
from sortserve_trainer.run.trained import load_trained_tensors, trained_tensors

__all__ = ["COMPLETE", "SortedTrainer", "newest_state"]

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""A state folder without this file was cut short, and is not resumed from."""
WEIGHTS = "trained.safetensors"
LOG = "trainer_state.json"
"""Transformers' name of it."""


class SortedTrainer(Trainer):  # type: ignore[misc] # transformers has no types here
    """Trains a ``SortedModel`` by a ``Method``.

    Args:
        model: what is trained: parameters that require a gradient.
        method: the weights of the losses.
        seed: of the exits and the columns that a step samples.
        mixture: packs of all epochs, in order.
        held_out: packs that are evaluated, by the name of their source.
        args: transformers' settings.
        callbacks: transformers' callbacks.
        cache: what the trunk says of all packs; None asks the trunk itself.
        decays_all: let weight decay be of every tensor that transformers does not know as a norm,
            as in runs that were begun so: their optimiser's states are grouped by it.
        average: share of the steps, at the end, over which the weights are averaged.
        choice: how evaluations end the run, and which weights it keeps.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: SortedModel,
        method: Method,
        *,
        seed: int,
        mixture: Mixture,
        held_out: Mapping[str, Sequence[Pack]],
        args: TrainingArguments,
        callbacks: Sequence[Any] = (),
        cache: CachedTrunk | None = None,
        decays_all: bool = False,
        average: float = 0.0,
        choice: Choice | None = None,
    ) -> None:
        self._average = TailAverage(model, average)
        self._choice = choice
        self._decays_all = decays_all
        self._make_batch = partial(host_batch, cache=cache)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._make_batch,
            train_dataset=mixture,
            eval_dataset=mixture,  # never read: ``evaluate`` is ours, and asks for one
            callbacks=[self._average, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # what a run shows is our own ``ProgressDisplay``
        self.model_accepts_loss_kwargs = True
        self.sorted_model = model
        self.method = method
        self.held_out = held_out
        self._seed = seed
        self._meter = Meter()

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices: the norms of exit modules have names that transformers does not look for."""
        names: list[str] = super().get_decay_parameter_names(model)
        if self._decays_all:
            return names
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in names if name in matrices]

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int]:
        """The micro-batches of one step, and the target tokens in them over all processes.

        The host knows those of its own by their shape, and waits for no device.
        """
        batches = [b for _, b in zip(range(num_batches), epoch_iterator, strict=False)]
        count = sum(batch["target_rows"].numel() for batch in batches)
        if self.args.world_size == 1:
            return batches, count
        return batches, self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of one micro-batch, a share of the whole step's mean."""
        step = self.state.global_step
        inputs, draw = dict(inputs), int(inputs["draw"])
        del inputs["draw"]
        terms = self.method.terms(self.sorted_model.exits, step, self._seed)
        loss, means = model(
            **inputs,
            terms=terms,
            num_targets=num_items_in_batch,
            sample=self._vocab_sample(step, draw),
            teacher=self.method.teacher,
            unlikelihood=self.method.unlikelihood,
        )
        self._meter.add(means, inputs)
        # DDP and FSDP average over processes what we have divided by the targets of them all.
        loss = loss * self.args.world_size
        return (loss, means) if return_outputs else loss

    def _vocab_sample(self, step: int, draw: int) -> VocabSample | None:
        """Drawn from the seed, the step and the batch alone, so that a resumed run draws alike."""
        seed = (self._seed * 1_000_003 + step * 8_191 + draw) % 2**31
        return VocabSample.of(self.method.vocab_sample, seed)

    # ---- what is told ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each exit's mean cross-entropy since the last line, and tokens a second, of all
        processes together.
        """
        if "loss" in logs:
            logs = {**logs, **self._meter.read(self._over_processes)}
        super().log(logs, start_time)

    def _over_processes(self, own: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return own
        total: Tensor = self.accelerator.reduce(own.to(self.args.device), reduction="sum")
        return total

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean cross-entropy per exit over all held-out targets, the whole vocabulary counted."""
        with self._average.applied():
            metrics = self._evaluate_now(metric_key_prefix)
            self.log(metrics)
            self._keep_if_best()
        self.control = self.callback_handler.on_evaluate(
            self.args,
            self.state,
            self.control,  # type: ignore[has-type]
            metrics,
        )
        if self._is_over():
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _evaluate_now(self, prefix: str) -> dict[str, float]:
        self.sorted_model.eval()
        exits = self.sorted_model.exits
        terms = dict.fromkeys(exits, ExitTerm(ce=1.0 / len(exits)))
        totals = torch.zeros(len(exits) + 1, dtype=torch.float64)
        for pack, counts in self._own_held_out():
            batch = self._make_batch([pack])
            del batch["draw"]
            with torch.inference_mode(), self.accelerator.autocast():
                _, means = self.model(**self._prepare_inputs(batch), terms=terms)
            count = batch["target_rows"].numel() if counts else 0
            found = count * torch.stack([means[e] for e in exits]).double().cpu()
            totals += torch.cat([found, torch.tensor([count], dtype=torch.float64)])
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None].to(self.args.device)).sum(0).cpu()
        self.sorted_model.train()
        losses = (totals[:-1] / totals[-1].clamp(min=1)).tolist()
        metrics = {f"{prefix}_loss_exit_{e}": v for e, v in zip(exits, losses, strict=True)}
        metrics[f"{prefix}_loss"] = losses[-1]
        metrics[f"{prefix}_loss_mean"] = sum(losses) / len(losses)
        return metrics

    def _own_held_out(self) -> Iterator[tuple[Pack, bool]]:
        """The packs that this process evaluates, and whether each counts.

        All processes evaluate as many: under FSDP they gather the weights of every pass together,
        and one that had a pass less would leave the others waiting for it.
        """
        packs = [pack for packs in self.held_out.values() for pack in packs]
        for first in range(0, len(packs), self.args.world_size):
            place = first + self.args.process_index
            yield packs[place % len(packs)], place < len(packs)

    def last_evaluation(self) -> dict[str, float]:
        """That of the weights there are, made now if there is none; empty without held-out data."""
        if not any(self.held_out.values()):
            return {}
        best = self.best_step
        step = self.state.global_step if best is None else best
        for logs in reversed(self.state.log_history):
            if "eval_loss" in logs and logs["step"] == step:
                return dict(logs)
        return self.evaluate()

    # ---- which weights are kept ----

    def go_on(self, state: Path | None) -> None:
        """Train from a state, or from the start, to the end; then have the weights that are kept.

        Args:
            state: a folder that ``newest_state`` found.
        """
        log = [] if state is None else TrainerState.load_from_json(str(state / LOG)).log_history
        if state is not None and self._choice is not None and self._choice.is_over(log):
            # It was killed between its end and its checkpoint.
            self.state = TrainerState.load_from_json(str(state / LOG))
            self._load_from_checkpoint(str(state))
        else:
            self.train(resume_from_checkpoint=None if state is None else str(state))
        if self._choice is None or not self._choice.keeps_best:
            if self._average.misses_all and self._is_over():
                logger.warning(
                    "--average: the run ended early, after step %d of %d and before the first step "
                    "of the mean, so its weights are those of the last step.",
                    self.state.global_step,
                    self.state.max_steps,
                )
            self._average.take()
            return
        self.evaluate_last_step()
        self.accelerator.wait_for_everyone()
        load_trained_tensors(self.sorted_model, load_file(self._best_path(self.best_step)))

    def _is_over(self) -> bool:
        """Whether evaluations have ended the run."""
        return self._choice is not None and self._choice.is_over(self.state.log_history)

    @property
    def best_step(self) -> int | None:
        """Whose weights are kept; None where those of the last step are."""
        return None if self._choice is None else self._choice.best(self.state.log_history)

    def evaluate_last_step(self) -> None:
        """Evaluate the last step, if it was not: it may be the best."""
        step = self.state.global_step
        if not any("eval_loss" in log and log["step"] == step for log in self.state.log_history):
            self.evaluate()

    def _keep_if_best(self) -> None:
        step = self.state.global_step
        if self._choice is None or not self.args.should_save or not step:
            return
        if self._choice.best(self.state.log_history) == step:
            path = self._best_path(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            save_file(trained_tensors(self.sorted_model, None), draft)
            draft.replace(path)

    def _best_path(self, step: int | None) -> Path:
        return Path(self.args.output_dir) / f"best-{step}.safetensors"

    # ---- states to resume from ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        save_file(trained_tensors(self.sorted_model, state_dict), Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_trained_tensors(self.sorted_model, load_file(Path(resume_from_checkpoint) / WEIGHTS))
        self._average.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._average.save(folder)
            _sync_folder(folder)
            (folder / COMPLETE).touch()
            if self._choice is not None:
                # An older best is needed no more: whoever resumes finds this state.
                kept = self._best_path(self._choice.best(self.state.log_history))
                for path in kept.parent.glob("best-*.safetensors"):
                    if path != kept:
                        path.unlink()


def newest_state(folder: Path) -> Path | None:
    """The newest whole state in ``folder``; None where there is none."""
    states = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(states, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _sync_folder(folder: Path) -> None:
    """Everything on disk before the mark that says so; sharded states are folders in it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def host_batch(packs: Sequence[Pack], cache: CachedTrunk | None = None) -> dict[str, Any]:
    """``collate``, with what the host must know kept on it: no step then waits for a device.

    Returns:
        Its tensors, but ``lengths`` as a tuple; ``draw``, a number made of the tokens; and with a
        ``cache`` what it has of them as ``cached``.
    """
    batch: dict[str, Any] = dict(collate(packs))
    lengths, draw = tuple(batch["lengths"].tolist()), int(batch["input_ids"].sum())
    if cache is not None:
        batch["cached"] = cache.batch(packs)
    return {**batch, "lengths": lengths, "draw": draw}
