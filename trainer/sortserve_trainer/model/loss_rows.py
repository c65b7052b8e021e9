"""Cross-entropy, KL and their gradient over rows of logits, in one kernel on a GPU.

Written in Triton, which torch brings along where it has CUDA. Chains of torch's operations read
and write [C, V] a dozen times in float32 for the same values; here the logits are read twice and
written once, in their own dtype, and everything between is float32.

Shape legend: C rows (tokens), K columns (the vocabulary, or a sample of it).
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

__all__ = ["row_losses", "row_losses_work", "row_lse"]

logger = logging.getLogger(__name__)

TILE = 4096
NUM_WARPS = 8


def row_lse(logits_CK: Tensor, bias_K: Tensor | None) -> Tensor:
    """``logsumexp(logits + bias)`` of each row, float32 [C]."""
    from sortserve_trainer.model.loss_kernel import lse_kernel

    num_rows, num_columns = logits_CK.shape
    lse_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CK.device)
    lse_kernel[(num_rows,)](
        logits_CK,
        bias_K,
        lse_C,
        num_columns,
        logits_CK.stride(0),
        HAS_BIAS=bias_K is not None,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    return lse_C


def row_losses(
    logits_CK: Tensor,
    targets_C: Tensor,
    *,
    teacher: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    bias: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    divisor: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and KL(teacher || row), both without their weights.

    Args:
        logits_CK: rows that are contiguous; overwritten where there is a ``divisor``, by the
            gradient of ``(ce_weight * sum(ce) + kl_weight * sum(kl)) / divisor``.
        targets_C: int64, a column of each row.
        teacher: [C, K], logits in rows that are contiguous; None is no KL.
        teacher_lse: float32 [C], their ``row_lse`` with the same bias.
        bias: float32 [K], added to the logits of both.
        ce_weight: in the gradient.
        kl_weight: in the gradient.
        divisor: of the gradient; None wants none.

    Returns:
        Two of float32 [C]; the second is zero without a teacher.
    """
    from sortserve_trainer.model.loss_kernel import losses_kernel

    num_rows, num_columns = logits_CK.shape
    device = logits_CK.device
    ce_C = torch.empty(num_rows, dtype=torch.float32, device=device)
    kl_C = torch.zeros(num_rows, dtype=torch.float32, device=device)
    by = None
    if divisor is not None:
        by = torch.zeros((), device=device) + divisor
    losses_kernel[(num_rows,)](
        logits_CK,
        teacher,
        teacher_lse,
        bias,
        targets_C,
        by,
        ce_C,
        kl_C,
        num_columns,
        logits_CK.stride(0),
        0 if teacher is None else teacher.stride(0),
        float(ce_weight),
        float(kl_weight),
        HAS_BIAS=bias is not None,
        DISTILS=teacher is not None,
        WANTS_GRAD=by is not None,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    return ce_C, kl_C


@functools.cache
def row_losses_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run here and say what torch says: tried once."""
    if importlib.util.find_spec("triton") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode(False), torch.no_grad():
            z, t = (torch.randn(3, 5000, generator=generator).to(device, dtype) for _ in range(2))
            targets = torch.tensor([0, 4999, 4096], device=device)
            q, p = (x.float().log_softmax(-1) for x in (z, t))
            ce, kl = row_losses(
                z, targets, teacher=t, teacher_lse=row_lse(t, None), kl_weight=2.0, divisor=4.0
            )
            wanted = (3.0 * q.exp() - 2.0 * p.exp()).scatter_add(
                1, targets[:, None], torch.full((3, 1), -1.0, device=device)
            )
            errors = (
                (ce + q.gather(1, targets[:, None])[:, 0]).abs().max(),
                (kl - (p.exp() * (p - q)).sum(-1)).abs().max(),
                (4.0 * z.float() - wanted).abs().max(),
            )
            worst = max(float(error) for error in errors)
    except Exception as error:  # Triton needs a compiler and a driver, and says so in many ways
        logger.warning("The loss is computed without its kernel: %s", str(error).partition("\n")[0])
        return False
    if not worst < 0.02:
        logger.warning("The loss is computed without its kernel, which is %.3g off.", worst)
    return worst < 0.02
