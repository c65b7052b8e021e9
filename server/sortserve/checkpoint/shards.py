"""The share of a checkpoint's tensors that one of several ranks reads.

``model.local_shape`` says what is divided, and why. Tensors are cut as they are read, before they
are converted, quantised or placed: no device ever holds more than its own share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sortserve.checkpoint.tensors import WeightReader
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.local_shape import LocalShape
from sortserve.model.weight import PLAIN, Weight

__all__ = ["ShardReader", "shard"]


class ShardReader:
    """A rank's share of the tensors of another reader, under the same names.

    ``shapes`` are those of the whole tensors.
    """

    def __init__(self, reader: WeightReader, config: ModelConfig, shape: LocalShape) -> None:
        self._reader = reader
        self._config = config
        self._shape = shape
        self.origin = reader.origin
        self.shapes = reader.shapes

    def read(self, name: str) -> Tensor:
        """The rank's share of a tensor."""
        return shard(name, self._reader.read(name), self._config, self._shape)

    def read_weight(self, name: str) -> Weight:
        """The rank's share of a matrix.

        Raises:
            CheckpointError: the matrix is quantised: its blocks need not end where a share does.
        """
        whole = self._reader.read_weight(name)
        if whole.format is not PLAIN:
            raise CheckpointError(
                f"{self.origin}: {name} is stored as {whole.format.name}, which cannot be divided "
                f"among {self._shape.num_ranks} ranks: serve it with --tensor-parallel-size=1, or "
                "give the unquantised checkpoint and --quantize."
            )
        return Weight.plain(shard(name, whole.values, self._config, self._shape))


def shard(name: str, whole: Tensor, config: ModelConfig, shape: LocalShape) -> Tensor:
    """A rank's share of a tensor, a view where it is not all of it; by its full Hugging Face name.

    The biases of what is summed over ranks are on rank 0 alone; the others have zeros.
    """
    module, _, kind = name.rpartition(".")
    match module.rpartition(".")[2], kind:
        case "q_proj", _:
            return whole[_rows(shape.heads, config.head_dim)]
        case "k_proj" | "v_proj", _:
            return whole[_rows(shape.kv_heads, config.head_dim)]
        case "gate_proj" | "up_proj", _:
            return whole[shape.intermediate]
        case "o_proj", "weight":
            return whole[:, _rows(shape.heads, config.head_dim)]
        case "down_proj", "weight":
            return whole[:, shape.intermediate]
        case "o_proj" | "down_proj", "bias":
            return whole if shape.rank == 0 else torch.zeros_like(whole)
        case "lm_head", "weight":
            return whole[shape.vocabulary]
        case _:
            return whole


def _rows(heads: slice, head_dim: int) -> slice:
    """The rows of a matrix that belong to these heads."""
    return slice(heads.start * head_dim, heads.stop * head_dim)
