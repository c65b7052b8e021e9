"""transformers' Trainer, with a loss per exit.

What is ours: the loss and its weights per step, the log and the evaluation per exit, and states to
resume from that hold only what is trained and count only when they are whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from sortserve_trainer.data import Mixture, Pack, collate
from sortserve_trainer.model.loss import VocabSample
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.cached_trunk import CachedTrunk
from sortserve_trainer.run.methods import Method
from sortserve_trainer.run.terms import ExitTerm

__all__ = ["COMPLETE", "SortedTrainer", "newest_state"]

COMPLETE = "complete"
"""A state folder without this file was cut short, and is not resumed from."""
WEIGHTS = "trained.safetensors"


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
    ) -> None:
        self._decays_all = decays_all
        self._make_batch = partial(host_batch, cache=cache)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._make_batch,
            train_dataset=mixture,
            eval_dataset=mixture,  # never read: ``evaluate`` is ours, and asks for one
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # what a run shows is our own ``ProgressDisplay``
        self.model_accepts_loss_kwargs = True
        self.sorted_model = model
        self.method = method
        self.held_out = held_out
        self._seed = seed
        self._meter = _Meter()

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
        """With each exit's mean cross-entropy since the last line, and tokens a second."""
        if "loss" in logs:
            logs = {**logs, **self._meter.read()}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean cross-entropy per exit over all held-out targets, the whole vocabulary counted."""
        self.sorted_model.eval()
        exits = self.sorted_model.exits
        terms = dict.fromkeys(exits, ExitTerm(ce=1.0 / len(exits)))
        totals = torch.zeros(len(exits) + 1, dtype=torch.float64)
        packs = [pack for packs in self.held_out.values() for pack in packs]
        for pack in packs[self.args.process_index :: self.args.world_size]:
            batch = self._make_batch([pack])
            del batch["draw"]
            with torch.inference_mode(), self.accelerator.autocast():
                _, means = self.model(**self._prepare_inputs(batch), terms=terms)
            count = batch["target_rows"].numel()
            found = count * torch.stack([means[e] for e in exits]).double().cpu()
            totals += torch.cat([found, torch.tensor([count], dtype=torch.float64)])
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None].to(self.args.device)).sum(0).cpu()
        self.sorted_model.train()
        losses = (totals[:-1] / totals[-1].clamp(min=1)).tolist()
        metrics = {
            f"{metric_key_prefix}_loss_exit_{e}": v for e, v in zip(exits, losses, strict=True)
        }
        metrics[f"{metric_key_prefix}_loss"] = losses[-1]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args,
            self.state,
            self.control,  # type: ignore[has-type]
            metrics,
        )
        return metrics

    def last_evaluation(self) -> dict[str, float]:
        """That of the present step, made now if there is none; empty without held-out data."""
        if not any(self.held_out.values()):
            return {}
        for logs in reversed(self.state.log_history):
            if "eval_loss" in logs and logs["step"] == self.state.global_step:
                return dict(logs)
        return self.evaluate()

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _sync_folder(folder)
            (folder / COMPLETE).touch()


def trained_tensors(
    model: SortedModel, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The parameters that are trained, by name; from ``state_dict`` where they are sharded."""
    return {
        name: (tensor.data if state_dict is None else state_dict[name]).contiguous()
        for name, tensor in _state(model).items()
    }


def load_trained_tensors(model: SortedModel, tensors: Mapping[str, Tensor]) -> None:
    """The reverse; every trained parameter must be there, and nothing else."""
    state = _state(model)
    assert state.keys() == tensors.keys(), "a state of another run"
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def _state(model: SortedModel) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scales = {f"exit_modules.{n}": b for n, b in model.exit_modules.named_buffers()}
    return {**trained, **scales}


def newest_state(folder: Path) -> Path | None:
    """The newest whole state in ``folder``; None where there is none."""
    states = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(states, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _sync_folder(folder: Path) -> None:
    """Everything on disk before the mark that says so."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def host_batch(packs: Sequence[Pack], cache: CachedTrunk | None = None) -> dict[str, Any]:
    """``collate``, with what the host must know kept on it: no step then waits for a device.

    Returns:
        Its tensors, but ``lengths`` as a tuple; ``draw``, a number made of the tokens; and with a
        ``cache`` what it has of them as ``cached``.
    """
    batch = collate(packs)
    lengths, draw = tuple(batch["lengths"].tolist()), int(batch["input_ids"].sum())
    if cache is not None:
        batch = {**batch, "cached": cache.batch(packs)}
    return {**batch, "lengths": lengths, "draw": draw}


class _Meter:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._num_tokens = 0
        self._started_s = time.monotonic()

    def add(self, means: Mapping[int, Tensor], inputs: Mapping[str, Tensor]) -> None:
        count = inputs["target_rows"].numel()
        self._num_tokens += inputs["input_ids"].numel()
        for exit_layer, mean in means.items():
            previous = self._sums.get(exit_layer, torch.zeros_like(mean))
            self._sums[exit_layer] = previous + mean * count
            self._counts[exit_layer] = self._counts.get(exit_layer, 0) + count

    def read(self) -> dict[str, float]:
        """``loss_exit_E`` and ``tokens_per_s``, and start anew."""
        exits = sorted(self._sums)
        # One copy for all exits, and the only time that the host waits for them.
        sums = torch.stack([self._sums[e] for e in exits]).tolist() if exits else []
        values = {
            f"loss_exit_{e}": total / max(1, self._counts[e])
            for e, total in zip(exits, sums, strict=True)
        }
        values["tokens_per_s"] = self._num_tokens / max(1e-9, time.monotonic() - self._started_s)
        self._reset()
        return values
