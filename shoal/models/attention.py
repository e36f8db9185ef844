"""Scaled dot-product attention by the fastest kernels for the device and precision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.dropout import Dropout, Part
from shoal.models.dropout import dropout as drop

LONGEST_WITH_WEIGHTS = 512  # beyond it the attention weights, T x T a head, would crowd out everything else
HIDDEN = -1e30  # finite, so that a row without any visible place does not become NaN


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    part: Part | None = None,
) -> Tensor:
    """q, k, v [n, heads, T, d] -> [n, heads, T, d]; ``mask`` bool, broadcast to [n, heads, T, T], is True where
    a key can be seen.

    On a CPU the fused kernel's backward pass in bfloat16 takes longer than three matmuls on a processor with matrix
    units, and the fused kernel has no dropout: up to 512 tokens the weights are then computed and kept. Which way is
    taken depends on shapes, precision and device only, so it is the same on every worker.
    ``part`` says which of all heads these are, for the dropout. Raises UserError where the fused kernel draws it."""
    weights_are_faster = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or dropout > 0)
    if not weights_are_faster or q.shape[2] > LONGEST_WITH_WEIGHTS:
        if part is not None and dropout > 0:
            raise UserError(
                f"attention_dropout cannot be drawn for some of the heads on {q.device.type} with {q.shape[2]} tokens: "
                f"set model.attention_dropout = 0, or rules.heads = '' so that every worker has all heads."
            )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    n, heads, length, size = q.shape
    q, k, v = (part.reshape(n * heads, length, size) for part in (q, k, v))
    hidden = q.new_full((length, length), HIDDEN).triu(1) if causal else q.new_zeros(length, length)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=size**-0.5)
    if mask is not None:
        scores = scores.view(n, heads, length, length).masked_fill(~mask, HIDDEN).view(n * heads, length, length)
    weights = drop(scores.softmax(-1).view(n, heads, length, length), dropout, part)
    return torch.bmm(weights.view(n * heads, length, length), v).view(n, heads, length, size)


class Mixing(nn.Module):
    """`attention` as a layer: q, k, v [n, heads, T, d] -> [n, heads, T, d]."""

    def __init__(self, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.dropout = Dropout(dropout, ("samples", "heads", "queries", "keys"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        part = self.dropout.part(q) if self.dropout.part and p else None
        return attention(q, k, v, mask, self.causal, p, part)
