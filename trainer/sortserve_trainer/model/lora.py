"""LoRA layers computed as one product with the merged weight, forward and backward.

peft computes ``x W^T + s (x A^T) B^T``: two thin products, a scale and a sum over [tokens, out] on
top of the wide one. With many more tokens than rank it is cheaper to merge first,
``W' = W + s B A``, and to use W' for x and for its gradient alike; only A's and B's own gradients
need the thin products. It is the same function and the same gradient, and what is trained is
exactly what will be served: the merged weight in the compute dtype.

A GPU computes a small model's layer faster than the host can ask for it. There the weights of all
layers are merged before a pass, those of one shape in one product (``MergedAtOnce``): 210 layers
take some 30 operations in place of 5,000, forward and backward. The price is a whole gradient
[O, I] of each, so that layers which keep the GPU busy are merged one after the other.

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
"""Of a device's memory, at most, for what merging at once takes."""
MOST_PRODUCTS = 2**35
"""Multiplications and additions, [T, O] by [T, I], of the mean layer. The gradient of a merged
weight takes so many, and one layer after the other takes thin products in their place: so many
keep a GPU busy for some 0.2 ms, in which the host could have asked for those."""


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
        decoder: without the head, which is read as a matrix. ``merge_in_forward`` may have changed
            some of its layers. Adapters that are shared out over processes stay with them.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._merging: list[Any] | None = None

    @contextmanager
    def for_pass(
        self, device: torch.device, num_tokens: int, *, recomputes: bool = False
    ) -> Iterator[None]:
        """Inside, layers compute with weights merged at its beginning, where that is the faster
        way and memory allows it: a small model on a GPU.

        Args:
            device: of the model.
            num_tokens: that pass through every layer.
            recomputes: whether layers are computed again later, when these weights are gone.
        """
        groups = () if recomputes else self._chosen(device, num_tokens)
        try:
            for group in groups:
                for layer, merged_OI in zip(group, _merge_group(group, device), strict=True):
                    layer.__dict__[READY] = merged_OI
            yield
        finally:
            for group in groups:
                for layer in group:
                    layer.__dict__.pop(READY, None)

    def _chosen(self, device: torch.device, num_tokens: int) -> Sequence[list[Any]]:
        """All layers that train now, by shape, rank and scale; none where it does not pay."""
        budget = weight_budget(device)
        if not budget or any(map(_is_shared_out, self._decoder.layers)):
            return ()
        if self._merging is None:
            self._merging = [layer for layer in self._decoder.modules() if _is_merging(layer)]
        # Asked anew: they may be frozen between two passes.
        layers = [layer for layer in self._merging if _trains(layer)]
        num_elements = sum(layer.base_layer.weight.numel() for layer in layers)
        if num_tokens * num_elements > MOST_PRODUCTS * len(layers):
            return ()
        groups = _groups(layers)
        return groups if _peak_bytes(groups) <= budget else ()


def weight_budget(device: torch.device) -> int:
    """Bytes that merging at once may take; none on a CPU, which waits for no host."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE)


def _is_merging(module: nn.Module) -> bool:
    """Whether ``merge_in_forward`` has changed it."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def _is_shared_out(layer: nn.Module) -> bool:
    """Whether FSDP gathers its weights when it is called, and cuts their gradients up after it."""
    names = {base.__name__ for base in type(layer).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def _trains(layer: Any) -> bool:
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return bool(a.requires_grad and b.requires_grad)


def _groups(layers: Sequence[Any]) -> tuple[list[Any], ...]:
    """By shape, rank and scale."""
    found: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for layer in layers:
        (name,) = layer.active_adapters
        found[layer.base_layer.weight.shape, layer.r[name], layer.scaling[name]].append(layer)
    return tuple(found.values())


def _peak_bytes(groups: Sequence[list[Any]]) -> int:
    """What a pass holds at once: all merged weights, in backward the gradient of each, and of one
    group at a time the weights side by side, and twice their like in float32.
    """
    if not groups:
        return 0
    sizes: list[int] = [sum(layer.base_layer.weight.numel() for layer in group) for group in groups]
    weight: Tensor = groups[0][0].base_layer.weight
    kept = 2 * _compute_dtype(weight).itemsize * sum(sizes)
    return kept + (weight.dtype.itemsize + 2 * torch.float32.itemsize) * max(sizes)


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
