"""The trainable exit module ``layer``: one more decoder layer of the model, then a norm of its own.

Shape legend: T tokens of a packed row, R rows that the head reads, D hidden, F intermediate,
N query heads, K key/value heads, H head_dim, A = N * H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve_trainer.model.attention import packed_attention
from sortserve_trainer.model.exit_module import (
    NORM_NAMES,
    OwnNorm,
    PackedRow,
    SeenStates,
    take_rows,
)
from sortserve_trainer.model.moments import Moments
from sortserve_trainer.model.quantized import QuantizedLinear

__all__ = ["LAYER_NAMES", "WholeLayer"]

_MODULES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_LINEARS = tuple(name for name in _MODULES if name.endswith("_proj"))
LAYER_NAMES = {
    f"{own}.{part}": f"{plain}.{part}"
    for own, plain in _MODULES.items()
    for part in ("weight", "bias")
}
"""Names in the module to names in a decoder layer of transformers; no model has all of them."""


class WholeLayer(OwnNorm):
    """What the model's own decoder layers compute, then its own norm.

    Its keys and values are of all tokens of an example, its queries of all, and only the rows that
    the head reads pass the projection behind the attention and the MLP.
    """

    attn_norm_weight: nn.Parameter
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter
    o_proj_weight: nn.Parameter
    mlp_norm_weight: nn.Parameter
    gate_proj_weight: nn.Parameter
    up_proj_weight: nn.Parameter
    down_proj_weight: nn.Parameter

    reads_states = True
    attends = True
    plain_names: ClassVar[Mapping[str, str] | None] = {
        **NORM_NAMES,
        **{own: f"model.layers.{{E}}.{plain}" for own, plain in LAYER_NAMES.items()},
    }
    export_note = "The last layer is the exit's own."

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        self.head_shape = (config.head_dim,)
        self._quantized: dict[str, QuantizedLinear] = {}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in (
                    "attn_norm_weight",
                    "mlp_norm_weight",
                    "q_norm_weight",
                    "k_norm_weight",
                ):
                    parameter.fill_(1.0)

    def forward(self, x_TD: Tensor, row: PackedRow, rows: Tensor | None = None) -> Tensor:
        """See ExitModule."""
        z_RA = take_rows(self.attend(x_TD, row), rows)
        return self.read(take_rows(x_TD, rows) + self._linear("o_proj", z_RA))

    def attend(self, x_TD: Tensor, row: PackedRow) -> Tensor:
        """What the attention's output projection reads, [T, A]."""
        n_TD = self._norm("attn_norm", x_TD, self.shape)
        q_TNH, k_TKH, v_TKH = (
            self._linear(name, n_TD).view(len(n_TD), -1, *self.head_shape)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos_1TH, sin_1TH = row.position_embeddings
        q_NTH, k_KTH = (
            _rotate(self._head_norm(name, x), cos_1TH, sin_1TH).to(v_TKH.dtype)
            for name, x in (("q_norm", q_TNH), ("k_norm", k_TKH))
        )
        v_KTH = v_TKH.transpose(0, 1)
        z_1TNH, _ = packed_attention(
            self, q_NTH[None], k_KTH[None], v_KTH[None], None, lengths=row.lengths
        )
        return z_1TNH[0].flatten(1)

    def mlp_hidden(self, x_RD: Tensor) -> Tensor:
        """What the MLP's last projection reads, [R, F]; ``x_RD`` is behind the attention."""
        n_RD = self._norm("mlp_norm", x_RD, self.shape)
        return silu(self._linear("gate_proj", n_RD)) * self._linear("up_proj", n_RD)

    def read(self, x_RD: Tensor) -> Tensor:
        """The rest of the layer, behind its attention, and the norm."""
        return super().read(x_RD + self._linear("down_proj", self.mlp_hidden(x_RD)))

    def warm_start(
        self, seen: Sequence[SeenStates], last_layer: Mapping[str, Tensor], *, is_new: bool
    ) -> None:
        """See ExitModule."""
        if not is_new:
            return
        self.load(last_layer)
        aims = [self._behind_attention(s.before_last_TD, s) for s in seen]
        pairs = [(s.x_TD[s.is_typical_T], s.before_last_TD[s.is_typical_T]) for s in seen]
        self._read_through("attn_norm", ("q_proj", "k_proj", "v_proj"), pairs)
        behind = [self._behind_attention(s.x_TD, s) for s in seen]
        self._read_through("mlp_norm", ("gate_proj", "up_proj"), zip(behind, aims, strict=True))
        moments = Moments()
        for x_RD, states in zip(behind, seen, strict=True):
            full_RD = states.full_TD[states.is_typical_T]
            missing_RD = full_RD - x_RD
            if "down_proj.bias" in last_layer:
                missing_RD = missing_RD - last_layer["down_proj.bias"]
            # The norm that follows reads directions, so errors count by the length of the aim.
            scale_R1 = full_RD.double().square().mean(-1, keepdim=True).rsqrt()
            moments.add(self.mlp_hidden(x_RD) * scale_R1, missing_RD * scale_R1)
        with torch.no_grad():
            self.down_proj_weight.copy_(moments.fit())
        self.forget_casts()

    def _behind_attention(self, x_TD: Tensor, states: SeenStates) -> Tensor:
        """The residual stream between attention and MLP, at the typical tokens."""
        out_TD = x_TD + self._linear("o_proj", self.attend(x_TD, states.row))
        return out_TD[states.is_typical_T]

    def _read_through(
        self, norm: str, names: Iterable[str], pairs: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        """Let linear layers find in one state what they were made to find in another.

        A linear map from the one, normed, to the other by ridge regression goes into their
        weights, and the sizes of its dimensions into the norm before them: then Adam's equal steps
        are steps of equal size in all dimensions.

        Args:
            norm: the name of the norm before them.
            names: of the linear layers.
            pairs: states [R, D] that they are to read, and those that they were made for.
        """
        moments = Moments()
        for x_RD, aim_RD in pairs:
            moments.add(_normed(x_RD), _normed(aim_RD))
        size_D = moments.sizes()
        norm_D = getattr(self, f"{norm}_weight")
        map_DD = norm_D[:, None] * moments.fit() * size_D
        with torch.no_grad():
            norm_D.copy_(1.0 / size_D)
            for name in names:
                weight = getattr(self, f"{name}_weight")
                weight.copy_(weight.double() @ map_DD)
        self.forget_casts()

    def quantize(self, quantize: Callable[[Tensor], Weight]) -> None:
        """See ExitModule."""
        for name in _LINEARS:
            bias = getattr(self, f"{name}_bias", None)
            weight = quantize(getattr(self, f"{name}_weight").detach())
            self._quantized[name] = QuantizedLinear(weight, None if bias is None else bias.detach())

    def _linear(self, name: str, x: Tensor) -> Tensor:
        if name in self._quantized:
            out: Tensor = self._quantized[name](x)
            return out
        return linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias", None))

    def _norm(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rms_norm(x, shape, getattr(self, f"{name}_weight").to(x.dtype), self.eps)

    def _head_norm(self, name: str, x_TNH: Tensor) -> Tensor:
        """Where the family has none, ``x_TNH`` itself."""
        has_norm = hasattr(self, f"{name}_weight")
        return self._norm(name, x_TNH, self.head_shape) if has_norm else x_TNH


def _normed(x_TD: Tensor) -> Tensor:
    x_TD = x_TD.double()
    return x_TD * x_TD.square().mean(-1, keepdim=True).rsqrt()


def _rotate(x_TNH: Tensor, cos_1TH: Tensor, sin_1TH: Tensor) -> Tensor:
    """RoPE as transformers has it (first half with second half); [N, T, H]."""
    x_NTH = x_TNH.transpose(0, 1)
    first, second = x_NTH.chunk(2, dim=-1)
    return x_NTH * cos_1TH + torch.cat((-second, first), dim=-1) * sin_1TH
