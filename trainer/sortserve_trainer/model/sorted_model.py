"""A transformers model read at several depths, for training and evaluation.

``SortedModel`` runs the decoder layers of a Hugging Face causal model (plain or with peft's LoRA
layers in it) one by one and takes the residual stream after each exit layer; an exit's module, or
the model's own final norm, makes of it what the shared head reads.

Shape legend: T tokens of a packed row (several examples end to end), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sortserve_trainer.data import IGNORED
from sortserve_trainer.model import device_attention
from sortserve_trainer.model.attention import PACKED_ATTENTION
from sortserve_trainer.model.device_attention import PackedLengths
from sortserve_trainer.model.exit_module import PackedRow, take_rows
from sortserve_trainer.model.exit_modules import ExitModules
from sortserve_trainer.model.lora import MergedAtOnce
from sortserve_trainer.model.loss import (
    Likely,
    Teacher,
    VocabSample,
    exit_losses,
    unlikelihood_loss,
)
from sortserve_trainer.model.norms import fuse_norms
from sortserve_trainer.run.terms import ExitTerm

__all__ = ["FULL", "SortedModel", "TrunkStates", "stream_name"]

FULL = "full"
"""The cached states at full depth, [S, D], as the head reads them: behind the final norm."""


def stream_name(exit_layer: int) -> str:
    """The cached residual stream at an exit below full depth.

    [T, D] where its module attends, else [S, D] of the rows that are kept.
    """
    return f"exit_{exit_layer}"


class TrunkStates(dict[int, Tensor]):
    """Exit layer to the residual stream after that many layers, [T, D] each, before any norm.

    Attributes:
        row: what they are the states of.
    """

    def __init__(self, row: PackedRow) -> None:
        super().__init__()
        self.row = row


class SortedModel(nn.Module):
    """The trunk and the exits' modules.

    Args:
        trunk: a transformers causal model of a supported family, or a peft model over one.
        exits: ascending; the last is the number of layers.
        exit_modules: of exits below full depth; an exit without one reads the final norm.
    """

    def __init__(self, trunk: nn.Module, exits: Sequence[int], exit_modules: ExitModules) -> None:
        super().__init__()
        self.trunk = trunk
        self.exits = tuple(exits)
        self.exit_modules = exit_modules
        self.base.config._attn_implementation = PACKED_ATTENTION
        self.base.config.use_cache = False
        fuse_norms(self.base)
        self._merged = MergedAtOnce(self.base.model)

    @property
    def base(self) -> Any:
        """The transformers causal model itself, under peft or not."""
        get_base = getattr(self.trunk, "get_base_model", None)
        return get_base() if get_base is not None else self.trunk

    @property
    def config(self) -> Any:
        """Transformers' config of the trunk (its Trainer asks for it)."""
        return self.base.config

    def train(self, mode: bool = True) -> SortedModel:
        """As on any module, but 4-bit layers always stay in training mode.

        On a CPU bitsandbytes repacks their weights for inference at the first call in eval mode.
        """
        super().train(mode)
        for module in self.trunk.modules():
            if type(module).__name__ == "Linear4bit":
                module.train()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As on transformers' models; the Trainer calls it."""
        self.base.gradient_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        lengths: Tensor | Sequence[int],
        terms: Mapping[int, ExitTerm],
        num_targets: float | Tensor | None = None,
        sample: VocabSample | None = None,
        teacher: Literal["full", "base"] = "full",
        unwanted: Tensor | None = None,
        unlikelihood: float = 0.0,
        target_rows: Tensor | None = None,
        unwanted_rows: Tensor | None = None,
        cached: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The weighted loss over the target tokens, and each exit's mean cross-entropy.

        Args:
            input_ids: int64 [1, T].
            labels: int64 [1, T]; the token after each position, or -100 where there is no target.
            position_ids: int64 [1, T], from 0 in every example.
            lengths: int64 [examples]; as a sequence of the host's it is not read from a device.
            terms: exits to read, and the weights of their losses.
            num_targets: of the whole global batch; None counts those of this row.
            sample: see ``exit_losses``.
            teacher: whose distribution KL terms learn from: the full depth's, or the base's
                without its adapter.
            unwanted: int64 [1, T]; the token to unlearn after each position, or -100; where it is
                one, ``labels`` is not.
            unlikelihood: weight of the loss on them beside that on targets.
            target_rows: int64 [targets]; where ``labels`` has one. None looks for them, for which
                the host waits for a device.
            unwanted_rows: the same of ``unwanted``.
            cached: what the trunk says of this row, as ``CachedTrunk`` reads it; the trunk is then
                not asked, and need not be there.
        """
        rows = _rows_of(labels) if target_rows is None else target_rows
        targets = labels[0].index_select(0, rows)
        count = targets.numel() if num_targets is None else num_targets
        # Distillation and vocabulary samples read the full depth, whatever its own weight.
        exits = sorted({*terms, self.exits[-1]}) if _needs_full(terms, sample) else sorted(terms)
        recomputes = _is_checkpointing(self.base.model)
        with self._merged.for_pass(input_ids.device, input_ids.numel(), recomputes=recomputes):
            read = self._reader(input_ids, position_ids, lengths, exits, cached)
        heads = {e: self.head(e) for e in exits}
        loss, means = exit_losses(
            read(rows, "target_at"),
            heads,
            targets,
            terms,
            num_targets=count,
            sample=sample,
            teacher=(
                self._base_teacher(input_ids, position_ids, lengths, rows)
                if teacher == "base" and any(term.kl for term in terms.values())
                else None
            ),
            likely=Likely.of(cached),
        )
        if unwanted is None or not unlikelihood:
            return loss, means
        rows = _rows_of(unwanted) if unwanted_rows is None else unwanted_rows
        if not rows.numel():
            return loss, means
        own = unlikelihood_loss(
            read(rows, "unwanted_at"),
            heads,
            unwanted[0].index_select(0, rows),
            terms,
            num_targets=count,
        )
        return loss + unlikelihood * own, means

    def forget_layers(self) -> None:
        """Free the trunk's layers: what is left reads ``cached`` states."""
        decoder = self.base.model
        decoder.layers = nn.ModuleList()
        if decoder.embed_tokens.weight is not self.base.get_output_embeddings().weight:
            decoder.embed_tokens = nn.Module()

    def _reader(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor | Sequence[int],
        exits: Sequence[int],
        cached: Mapping[str, Tensor] | None,
    ) -> Callable[[Tensor, str], dict[int, Tensor]]:
        """What gives the states at rows of this pack, [R, D] of each exit.

        It takes the rows, and the name in ``cached`` of their places among the rows that are kept.
        """
        if cached is None:
            trunk_states = self.trunk_states(input_ids, position_ids, lengths, exits)
            return lambda rows, _: self._read_rows(trunk_states, rows)
        decoder = self.base.model
        dtype, full = decoder.norm.weight.dtype, self.exits[-1]
        states = {e: cached[FULL if e == full else stream_name(e)].to(dtype) for e in exits}
        any_state = next(iter(states.values()))
        row = PackedRow(
            decoder.rotary_emb(any_state, position_ids=position_ids),
            _packed(lengths, position_ids),
        )

        def read(rows: Tensor, places: str) -> dict[int, Tensor]:
            at = cached[places]
            found = {}
            for exit_layer, x in states.items():
                if exit_layer == full:
                    found[exit_layer] = take_rows(x, at)
                elif self.exit_modules.attends(exit_layer):
                    found[exit_layer] = self._read_out(exit_layer, x, row, rows)
                else:
                    found[exit_layer] = self._read_out(exit_layer, take_rows(x, at), row, None)
            return found

        return read

    @torch.no_grad()
    def _base_teacher(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor | Sequence[int],
        rows: Tensor,
    ) -> Teacher:
        """The trunk as it was before its adapter."""
        full = self.exits[-1]
        with self.trunk.disable_adapter():  # type: ignore[operator]
            states = self.exit_states(input_ids, position_ids, lengths, (full,), rows)
        return Teacher(states[full], self.base.get_output_embeddings().weight)

    def exit_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor | Sequence[int],
        exits: Iterable[int],
        rows: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """What the head reads at each of ``exits``: exit layer to [T, D] (or [rows, D]).

        ``rows``: int64 [rows]; only these positions are kept.
        """
        return self._read_rows(self.trunk_states(input_ids, position_ids, lengths, exits), rows)

    def trunk_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor | Sequence[int],
        exits: Iterable[int],
    ) -> TrunkStates:
        """The residual stream after each of ``exits`` layers, of every token."""
        wanted = set(exits)
        decoder = self.base.model
        hidden = decoder.embed_tokens(input_ids)
        if self.training and not hidden.requires_grad and _is_checkpointing(decoder):
            hidden.requires_grad_()  # else checkpointed layers would see nothing to train
        position_embeddings = decoder.rotary_emb(hidden, position_ids=position_ids)
        spans = _packed(lengths, position_ids)
        states = TrunkStates(PackedRow(position_embeddings, spans))
        for depth, layer in enumerate(decoder.layers[: max(wanted)], start=1):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                lengths=spans,
            )
            if depth in wanted:
                states[depth] = hidden[0]
        return states

    def head(self, exit_layer: int) -> Tensor:
        """The head of an exit, [V, D]: the shared one, but where its module has its own."""
        module = self.exit_modules.by_exit.get(exit_layer)
        if module is not None and module.head is not None:
            return module.head
        return _effective_weight(self.base.get_output_embeddings())

    def _read_rows(self, trunk_states: TrunkStates, rows: Tensor | None) -> dict[int, Tensor]:
        return {
            exit_layer: self._read_out(exit_layer, h_TD, trunk_states.row, rows)
            for exit_layer, h_TD in trunk_states.items()
        }

    def _read_out(
        self, exit_layer: int, h_TD: Tensor, row: PackedRow, rows: Tensor | None
    ) -> Tensor:
        name = str(exit_layer)
        if name not in self.exit_modules:
            out: Tensor = self.base.model.norm(take_rows(h_TD, rows))
        elif self.training and torch.is_grad_enabled() and _is_checkpointing(self.base.model):
            out = checkpoint(
                self.exit_modules[name],
                h_TD,
                row,
                rows,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a module is drawn
            )
        else:
            out = self.exit_modules[name](h_TD, row, rows)
        return out


def _needs_full(terms: Mapping[int, ExitTerm], sample: VocabSample | None) -> bool:
    return sample is not None or any(term.kl for term in terms.values())


def _rows_of(labels: Tensor) -> Tensor:
    return (labels[0] != IGNORED).nonzero().squeeze(1)


def _packed(lengths: Tensor | Sequence[int], position_ids: Tensor) -> Sequence[int]:
    """One value for the attention of all layers."""
    on_host = tuple(lengths.tolist()) if isinstance(lengths, Tensor) else tuple(lengths)
    if not device_attention.in_one_call(position_ids.device):
        return on_host
    return PackedLengths.at(on_host, position_ids)


def _is_checkpointing(decoder: Any) -> bool:
    return bool(getattr(decoder, "gradient_checkpointing", False)) or any(
        getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers
    )


def _effective_weight(head: Any) -> Tensor:
    """The head's weight, with its LoRA product where peft has put one."""
    weight: Tensor = head.weight
    for name in getattr(head, "active_adapters", ()):
        if name in getattr(head, "lora_A", ()):
            delta = head.lora_B[name].weight @ head.lora_A[name].weight
            weight = weight + head.scaling[name] * delta
    return weight
