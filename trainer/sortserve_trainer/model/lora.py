"""LoRA layers computed as one product with the merged weight, forward and backward.

peft computes ``x W^T + s (x A^T) B^T``: two thin products, a scale and a sum over [tokens, out] on
top of the wide one. With many more tokens than rank it is cheaper to merge first,
``W' = W + s B A``, and to use W' for x and for its gradient alike; only A's and B's own gradients
need the thin products. It is the same function and the same gradient, and what is trained is
exactly what will be served: the merged weight in the compute dtype.

Shape legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["merge_in_forward"]


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
    (name,) = layer.active_adapters
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    scale = layer.scaling[name]
    out: Tensor
    if a.requires_grad or b.requires_grad:
        out = _MergedLinear.apply(x, weight, a, b, scale)  # type: ignore[no-untyped-call]
    else:
        dtype = _compute_dtype(x)
        out = linear(x.to(dtype), _frozen_weight(layer, weight, a, b, scale, dtype))
    return out if bias is None else out + bias.to(out.dtype)


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
