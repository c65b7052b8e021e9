"""A trunk whose linear layers compute with quantised weights, as they are served.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sortserve.model.weight import Weight

__all__ = ["QuantizedLinear", "quantize_layers"]


class QuantizedLinear(nn.Module):
    """A linear layer by its format's own definition; for inference only.

    Args:
        weight: [O, I].
        bias_O: or None.
    """

    def __init__(self, weight: Weight, bias_O: Tensor | None) -> None:
        super().__init__()
        self._linear = weight.format.linear(weight, bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self._linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def quantize_layers(layers: nn.Module, quantize: Callable[[Tensor], Weight]) -> None:
    """Put a ``QuantizedLinear`` in the place of every linear layer, one after another."""
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            bias = module.bias
            quantized = QuantizedLinear(
                quantize(module.weight.detach()), None if bias is None else bias.detach()
            )
            layers.set_submodule(name, quantized)
