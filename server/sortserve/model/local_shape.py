"""What one of several ranks has of a decoder: tensor parallelism in numbers (no torch).

Every rank has all layers, and of each layer some of the heads and a part of the MLP:

* QKV, gate and up are split by their outputs (column parallel): a rank computes the queries, keys
  and values of its heads, and its part of the MLP's activations, from the whole hidden state.
* The output projection and down are split by their inputs (row parallel): a rank's result is one
  term of a sum over all ranks, two sums a layer.
* The heads, the model's and exits' own, are split by the vocabulary: each rank scores its tokens,
  and rank 0, which samples, gathers the scores.
* Embedding, norms and exit modules are on every rank. A row of the embedding is read for each
  token, never all of it, and a split one would cost a third sum. Exit modules see only the rows
  that sample. Only a module that is a layer of its own is divided as the others are.

So a rank's layers are those of a narrower decoder, which is what ``config`` gives: backends and
caches compute with that and know nothing of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sortserve.core.errors import ConfigError
from sortserve.model.config import ModelConfig

__all__ = ["LocalShape", "allowed_numbers_of_ranks"]


@dataclass(frozen=True, kw_only=True)
class LocalShape:
    """The share of one rank. All ranks together have each query head, each activation of the MLP
    and each token of the vocabulary once; a key/value head may be on several.
    """

    rank: int
    num_ranks: int
    heads: slice
    """Query heads."""
    kv_heads: slice
    """Key/value heads: all that the query heads read."""
    intermediate: slice
    """Activations between gate-up and down."""
    vocabulary: slice
    """Token ids whose logits it computes; a rank may have one more than the next."""

    @staticmethod
    def of(config: ModelConfig, rank: int = 0, num_ranks: int = 1) -> LocalShape:
        """The share of ``rank``, from 0 to ``num_ranks`` - 1.

        Where there are more ranks than key/value heads, each has one, and ranks whose query heads
        read the same one have copies of it.

        Raises:
            ConfigError: the decoder cannot be divided among so many.
        """
        assert 0 <= rank < num_ranks
        if not _divides(config, num_ranks):
            allowed = ", ".join(map(str, allowed_numbers_of_ranks(config)))
            raise ConfigError(
                f"--tensor-parallel-size={num_ranks}: {config.num_heads} query heads, "
                f"{config.num_kv_heads} key/value heads and an MLP of {config.intermediate_size} "
                f"cannot be divided among {num_ranks} ranks. Allowed for this model: {allowed}.",
                param="tensor-parallel-size",
            )

        def share(size: int) -> slice:
            return slice(rank * size // num_ranks, (rank + 1) * size // num_ranks)

        first_kv_head = rank * config.num_kv_heads // num_ranks
        num_kv_heads = max(1, config.num_kv_heads // num_ranks)
        return LocalShape(
            rank=rank,
            num_ranks=num_ranks,
            heads=share(config.num_heads),
            kv_heads=slice(first_kv_head, first_kv_head + num_kv_heads),
            intermediate=share(config.intermediate_size),
            vocabulary=share(config.vocab_size),
        )

    @property
    def is_whole(self) -> bool:
        """Whether there is one rank only, which has everything."""
        return self.num_ranks == 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The narrower decoder that this rank's layers are; the vocabulary stays whole."""
        return replace(
            whole,
            num_heads=self.heads.stop - self.heads.start,
            num_kv_heads=self.kv_heads.stop - self.kv_heads.start,
            intermediate_size=self.intermediate.stop - self.intermediate.start,
        )


def allowed_numbers_of_ranks(config: ModelConfig) -> list[int]:
    """Among how many ranks a decoder can be divided, ascending."""
    return [n for n in range(1, config.num_heads + 1) if _divides(config, n)]


def _divides(config: ModelConfig, num_ranks: int) -> bool:
    """Whether each rank gets as many whole heads as any other, and as much of the MLP."""
    num_kv_heads = config.num_kv_heads
    return (
        config.num_heads % num_ranks == 0
        and config.intermediate_size % num_ranks == 0
        and (num_kv_heads % num_ranks == 0 or num_ranks % num_kv_heads == 0)
        and config.vocab_size >= num_ranks
    )
