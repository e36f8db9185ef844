"""Cross-entropy over a vocabulary of which each worker has a part (Shoeybi et al., 2019, section 3)."""

from typing import Any

import torch
from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.models.tasks.cross_entropy import IGNORED, PartOfLogits
from shoal.parallel.layout.split import Split


class VocabularyPart(PartOfLogits):
    def __init__(self, local: Tensor, split: Split, collectives: Collectives) -> None:
        """``local`` [..., own classes] of the split."""
        self.local, self.split, self.collectives = local, split, collectives

    def cross_entropy(self, target: Tensor) -> Tensor:
        """Gathers three numbers a target, and sends nothing on the way back."""
        flat = self.local.reshape(-1, self.local.shape[-1])
        first = self.split.start(self.collectives.rank)
        loss: Tensor = _CrossEntropy.apply(flat, target.reshape(-1), first, self.collectives)  # type: ignore[no-untyped-call]
        return loss

    def whole(self) -> Tensor:
        return self.collectives.all_gather(self.local, -1, self.split.sizes)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """The first of equal ones, as torch chooses."""
        best, place = self.local.max(-1)
        facts = torch.stack([best.double(), (place + self.split.start(self.collectives.rank)).double()])
        gathered = self.collectives.all_gather(facts.unsqueeze(0))
        winner = gathered[:, 0].argmax(0, keepdim=True)
        return gathered[:, 1].gather(0, winner)[0].long()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor, first: int, collectives: Collectives) -> Tensor:
        """logits [N, own classes], target int [N] -> the scalar sum, in at least float32."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        best = wide.max(-1, keepdim=True).values
        shares = (wide - best).exp_()
        own = (target - first).unsqueeze(1)
        elsewhere = (own < 0) | (own >= wide.shape[1])
        own = own.masked_fill(elsewhere, 0)
        chosen = wide.gather(1, own).masked_fill_(elsewhere, 0.0)
        facts = torch.cat([best, shares.sum(-1, keepdim=True), chosen], 1)
        bests, sums, all_chosen = collectives.all_gather(facts.unsqueeze(0)).unbind(-1)  # [workers, N] each
        top = bests.max(0).values
        total = (sums * (bests - top).exp()).sum(0)
        counts = target != IGNORED
        losses = (top + total.log() - all_chosen.sum(0)).masked_fill(~counts, 0.0)
        shares.mul_((best.squeeze(1) - top).exp_().div_(total).unsqueeze(1))
        shares.scatter_add_(1, own, elsewhere.to(shares.dtype).sub_(1.0))  # takes 1 from the chosen class
        shares.masked_fill_(~counts.unsqueeze(1), 0.0)
        context.save_for_backward(shares)
        context.dtype = logits.dtype
        return losses.sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (shares,) = context.saved_tensors
        return (shares * gradients[0]).to(context.dtype), None, None, None
