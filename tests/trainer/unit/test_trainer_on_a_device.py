"""What a GPU computes in place of a CPU's loops: the same attention, and the same loss.

Attention over padded examples runs on any device. FlashAttention and the kernel run on a GPU; the
kernel is interpreted here where Triton is installed.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sortserve_trainer.model.attention import packed_attention
from sortserve_trainer.model.device_attention import PackedLengths, flash_works, padded
from sortserve_trainer.model.loss import Likely, Teacher, VocabSample, exit_losses
from sortserve_trainer.model.loss_rows import row_losses, row_losses_work, row_lse
from sortserve_trainer.run.terms import ExitTerm
from support.interpreter import interpreted

CPU = torch.device("cpu")


Heads = tuple[Tensor, Tensor, Tensor]


def heads(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> Heads:
    """Query, key and value of a packed row: six heads in two groups, each [1, heads, T, 16]."""
    generator = torch.Generator().manual_seed(1)

    def make(count: int) -> Tensor:
        x = torch.randn(1, count, sum(lengths), 16, generator=generator)
        return x.to(dtype).requires_grad_()

    return make(6), make(2), make(2)


def attend(inputs: Heads, lengths: tuple[int, ...]) -> Tensor:
    query, key, value = inputs
    return packed_attention(None, query, key, value, None, lengths=lengths)[0]


def attend_padded(inputs: Heads, packed: PackedLengths) -> Tensor:
    q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in inputs)
    return padded(q_TNH, k_TKH, v_TKH, packed, 16**-0.5, 0.0)


@pytest.mark.parametrize("lengths", [(5, 1, 9), (12,), (1, 1, 1), (2, 30, 3, 3)])
def test_examples_padded_to_the_longest_attend_as_each_does_alone(lengths: tuple[int, ...]) -> None:
    inputs = heads(lengths)

    alone = attend(inputs, lengths)
    together = attend_padded(inputs, PackedLengths.of(lengths, CPU))

    torch.testing.assert_close(together, alone[0], rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(alone.square().sum(), inputs)
    for ours, theirs in zip(
        torch.autograd.grad(together.square().sum(), inputs), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_offsets_are_read_off_the_positions_as_off_the_lengths() -> None:
    lengths = (3, 1, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    found = PackedLengths.at(lengths, positions)

    assert tuple(found) == lengths
    assert found.offsets.tolist() == [0, 3, 4, 8]
    assert torch.equal(found.offsets, PackedLengths.of(lengths, CPU).offsets)
    assert PackedLengths.of(found, CPU) is found


def test_where_torch_has_no_flash_attention_it_is_said_and_not_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flash_works.cache_clear()

    assert not flash_works(CPU, torch.bfloat16, 64)
    assert not flash_works(CPU, torch.bfloat16, 64)

    assert len(caplog.records) == 1


@interpreted
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_kernel_says_what_torch_says(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    z, t = (torch.randn(5, 4099, generator=generator) * 4 for _ in range(2))
    bias = torch.randn(4099, generator=generator) if with_bias else None
    targets = torch.tensor([0, 4098, 4096, 17, 17])
    shift = 0.0 if bias is None else bias
    zs, ts = ((x + shift).requires_grad_() for x in (z, t))
    log_q, log_p = zs.log_softmax(-1), ts.log_softmax(-1).detach()
    ce = -log_q.gather(1, targets[:, None])[:, 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (grad,) = torch.autograd.grad((0.3 * ce.sum() + 0.7 * kl.sum()) / 9, zs)

    own_ce, own_kl = row_losses(
        own := z.clone(),
        targets,
        teacher=t,
        teacher_lse=row_lse(t, bias),
        bias=bias,
        ce_weight=0.3,
        kl_weight=0.7,
        divisor=9.0,
    )

    torch.testing.assert_close(own_ce, ce.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_kl, kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, grad, rtol=1e-4, atol=1e-6)


@interpreted
def test_the_kernel_is_tried_before_it_is_trusted() -> None:
    assert row_losses_work(CPU, torch.float32)


@interpreted
@pytest.mark.parametrize("taught_by_the_base", [False, True])
@pytest.mark.parametrize("sample", [None, VocabSample(20, 10, seed=3)])
@pytest.mark.parametrize("knows_likely", [False, True])
def test_the_loss_by_the_kernel_is_the_loss(
    monkeypatch: pytest.MonkeyPatch,
    taught_by_the_base: bool,
    sample: VocabSample | None,
    knows_likely: bool,
) -> None:
    from sortserve_trainer.model import loss, loss_chunk

    generator = torch.Generator().manual_seed(4)
    states = {e: torch.randn(11, 8, generator=generator, requires_grad=True) for e in (2, 4, 6)}
    head = torch.randn(97, 8, generator=generator, requires_grad=True)
    targets = torch.randint(97, (11,), generator=generator)
    teacher = Teacher(torch.randn(11, 8, generator=generator), head.detach() * 0.5)
    terms = {2: ExitTerm(ce=0.1, kl=0.2), 4: ExitTerm(kl=0.3), 6: ExitTerm(ce=0.4, kl=0.1)}
    best = (states[6] @ head.T).detach().log_softmax(-1).topk(9)
    found = []
    for chunk in (loss_chunk.Chunk, loss_chunk.FusedChunk):
        monkeypatch.setattr(loss, "chunk_class", lambda *_, c=chunk: c)
        value, means = exit_losses(
            states,
            dict.fromkeys(states, head),
            targets,
            terms,
            num_targets=torch.tensor(40),
            sample=sample,
            teacher=teacher if taught_by_the_base else None,
            chunk_tokens=8,
            likely=Likely(best.indices, best.values) if knows_likely else None,
        )
        grads = torch.autograd.grad(value, [*states.values(), head])
        found.append([value.detach(), *means.values(), *grads])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_attends_as_a_cpu_does(dtype: torch.dtype) -> None:
    lengths = (5, 1, 130, 64)
    inputs = heads(lengths, dtype)
    query, key, value = (x.detach().cuda().requires_grad_() for x in inputs)
    there = query, key, value

    alone = attend(inputs, lengths)
    together = attend(there, lengths)

    allowed = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(together.cpu(), alone, rtol=allowed, atol=allowed)
    wanted = torch.autograd.grad(alone.float().sum(), inputs)
    for ours, theirs in zip(
        torch.autograd.grad(together.float().sum(), there), wanted, strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=10 * allowed, atol=10 * allowed)


@pytest.mark.gpu
def test_a_gpu_has_what_its_speed_is_made_of() -> None:
    device = torch.device("cuda", 0)

    assert flash_works(device, torch.bfloat16, 64)
    assert row_losses_work(device, torch.bfloat16)
