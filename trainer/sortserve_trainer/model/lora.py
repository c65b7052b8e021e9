"""LoRA layers computed as one product with the merged weight, forward and backward.

peft computes ``x W^T + s (x A^T) B^T``: two thin products, a scale and a sum over [tokens, out] on
top of the wide one. With many more tokens than rank it is cheaper to merge first,
``W' = W + s B A``, and to use W' for x and for its gradient alike; only A's and B's own gradients
need the thin products. It is the same function and the same gradient, and what is trained is
exactly what will be served: the merged weight in the compute dtype.

A GPU computes a small model's layer faster than the host can ask for it. There the weights of all
layers are merged before a pass, those of one shape in one product (``MergedAtOnce``): 210 layers
take some 30 operations in place of 5,000, forward and backward.

Shape legend: L layers, T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["MergedAtOnce", "merge_in_forward"]

READY = "_ready_OI"
"""Where a layer finds its merged weight during a pass, if it was made before."""
MEMORY_SHARE = 1 / 16
"""Of a device's memory, at most, for the merged weights of all layers."""


class _MergedLinear(torch.autograd.Function):
    """``x (W + s B A)^T`` with W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = _compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            merged_OI = _merge(weight, a, b, scale, dtype)
            flat_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            ctx.save_for_backward(flat_TI, merged_OI, a, b)
            ctx.scale, ctx.in_shape, ctx.in_dtype = scale, x.shape, x.dtype
            out: Tensor = (flat_TI @ merged_OI.T).view(*x.shape[:-1], -1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, merged_OI, a, b = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, merged_OI.shape[0]).to(x_TI.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ merged_OI).view(ctx.in_shape).to(ctx.in_dtype)
        grad_TR = grad_TO @ b.to(grad_TO.dtype)
        hidden_TR = x_TI @ a.T.to(x_TI.dtype)
        grad_a = (grad_TR.T @ x_TI).to(a.dtype).mul_(ctx.scale)
        grad_b = (grad_TO.T @ hidden_TR).to(b.dtype).mul_(ctx.scale)
        return grad_x, None, grad_a, grad_b, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def merge_in_forward(model: nn.Module) -> int:
    """Let the plain LoRA layers of a peft model compute with the merged weight.

    Layers with anything more than plain LoRA (dropout, DoRA, a bias of its own, a quantised base,
    several adapters) stay peft's own.

    Returns:
        How many layers were changed.
    """
    from peft.tuners.lora import Linear

    changed = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = MethodType(_forward, module)
            changed += 1
    return changed


def _is_plain(layer: Any) -> bool:
    (*others, name) = layer.active_adapters
    return (
        not others
        and type(layer.base_layer) is nn.Linear
        and not layer.use_dora.get(name, False)
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
    )


def _forward(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    if layer.disable_adapters or layer.merged:
        base: Tensor = layer.base_layer(x)
        return base
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    ready: Tensor | None = layer.__dict__.get(READY)
    if ready is not None:
        return linear(x.to(ready.dtype), ready, None if bias is None else bias.to(ready.dtype))
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    scale = layer.scaling[name]
    out: Tensor
    if a.requires_grad or b.requires_grad:
        out = _MergedLinear.apply(x, weight, a, b, scale)  # type: ignore[no-untyped-call]
    else:
        dtype = _compute_dtype(x)
        out = linear(x.to(dtype), _frozen_weight(layer, weight, a, b, scale, dtype))
    return out if bias is None else out + bias.to(out.dtype)


class MergedAtOnce:
    """The merged weights of all plain LoRA layers that train, made before a pass.

    Args:
        model: with layers that ``merge_in_forward`` changed, or without any. Adapters that are
            shared out over processes stay with their layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._groups: tuple[list[Any], ...] | None = None

    @contextmanager
    def for_pass(self, device: torch.device, *, recomputes: bool = False) -> Iterator[None]:
        """Inside, layers compute with weights merged at its beginning, where that is the faster
        way and memory allows it: on a GPU.

        Args:
            device: of the model.
            recomputes: whether layers are computed again later, when these weights are gone.
        """
        groups = () if recomputes else self._chosen(weight_budget(device))
        for group in groups:
            for layer, merged_OI in zip(group, _merge_group(group, device), strict=True):
                layer.__dict__[READY] = merged_OI
        try:
            yield
        finally:
            for group in groups:
                for layer in group:
                    del layer.__dict__[READY]

    def _chosen(self, budget: int) -> Sequence[list[Any]]:
        """All layers if their merged weights take at most ``budget`` bytes, else none."""
        if not budget:
            return ()
        if self._groups is None:
            self._groups = _groups(self._model)
        layers = [layer for group in self._groups for layer in group]
        num_bytes = sum(2 * layer.base_layer.weight.numel() for layer in layers)
        return self._groups if num_bytes <= budget else ()


def weight_budget(device: torch.device) -> int:
    """Bytes that merged weights may take; none on a CPU, which waits for no host."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE)


def _groups(model: nn.Module) -> tuple[list[Any], ...]:
    """The layers of ``merge_in_forward`` that train, by shape, rank and scale."""
    if not hasattr(model, "peft_config"):
        return ()  # a machine without peft can train all weights
    from peft.tuners.lora import Linear

    found: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    layer: Any
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer) and _trains_here(layer):
            (name,) = layer.active_adapters
            found[layer.base_layer.weight.shape, layer.r[name], layer.scaling[name]].append(layer)
    return tuple(found.values())


def _trains_here(layer: Any) -> bool:
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return bool(a.requires_grad and b.requires_grad) and type(a.data) is Tensor


def _merge_group(layers: list[Any], device: torch.device) -> tuple[Tensor, ...]:
    """Of layers of one shape, rank and scale: [O, I] each, with a way back to their A and B."""
    (name,) = layers[0].active_adapters
    a_LRI = torch.stack([layer.lora_A[name].weight for layer in layers])
    b_LOR = torch.stack([layer.lora_B[name].weight for layer in layers])
    weight_LOI = torch.stack([layer.base_layer.weight for layer in layers])
    dtype = _compute_dtype(weight_LOI)
    with torch.autocast(device.type, enabled=False):
        merged_LOI = torch.baddbmm(
            weight_LOI.to(b_LOR.dtype), b_LOR, a_LRI, alpha=layers[0].scaling[name]
        )
        return merged_LOI.to(dtype).unbind()


def _frozen_weight(
    layer: Any, weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The merged weight of a layer that does not train, made once."""
    found: Tensor | None = getattr(layer, "_merged_OI", None)
    if found is None or found.dtype is not dtype or found.device != weight.device:
        # Not for inference alone: an evaluation may come before the first step.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(weight.device.type, enabled=False),
        ):
            found = _merge(weight, a, b, scale, dtype)
        layer._merged_OI = found
    return found


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.addmm(weight.to(b.dtype), b, a, alpha=scale).to(dtype)
