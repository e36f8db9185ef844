"""Scaled dot-product attention by the fastest kernels for the device and precision."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.dropout import dropout as drop

LONGEST_WITH_WEIGHTS = 512  # beyond it the attention weights, T x T a head, would crowd out everything else
HIDDEN = -1e30  # finite, so that a row without any visible place does not become NaN


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """q, k, v [n, heads, T, d] -> [n, heads, T, d]; ``mask`` bool, broadcast to [n, heads, T, T], is True where
    a key can be seen.

    On a CPU the fused kernel's backward pass in bfloat16 takes longer than three matmuls on a processor with matrix
    units, and the fused kernel has no dropout: up to 512 tokens the weights are then computed and kept. Which way is
    taken depends on shapes, precision and device only, so it is the same on every worker."""
    weights_are_faster = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or dropout > 0)
    if not weights_are_faster or q.shape[2] > LONGEST_WITH_WEIGHTS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    n, heads, length, size = q.shape
    q, k, v = (part.reshape(n * heads, length, size) for part in (q, k, v))
    hidden = q.new_full((length, length), HIDDEN).triu(1) if causal else q.new_zeros(length, length)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=size**-0.5)
    if mask is not None:
        scores = scores.view(n, heads, length, length).masked_fill(~mask, HIDDEN).view(n * heads, length, length)
    weights = drop(scores.softmax(-1), dropout)
    return torch.bmm(weights, v).view(n, heads, length, size)
