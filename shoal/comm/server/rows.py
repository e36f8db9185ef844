"""Gradients of embeddings: most rows are zero. Only runs of 64 bytes that hold a bit travel.

What comes out is what went in, to the bit, so that every optimiser gives the result that it gives on dense gradients.
"""

import torch
from torch import Tensor

RUN_BYTES = 64
WORTH = 0.5  # rows travel when they are less than this share of the whole


def packed(flat: Tensor) -> Tensor | None:
    """uint8: a bit map of the runs, then the runs that are not all zero bits; None when that would not pay.

    ``flat``: contiguous, of whole runs."""
    runs = flat.view(torch.uint8).view(-1, RUN_BYTES)
    touched = (runs.view(torch.int64) != 0).any(dim=1)
    if int(touched.sum()) > WORTH * len(runs):
        return None
    return torch.cat([touched.view(torch.uint8), runs[touched].view(-1)])


@torch.no_grad()
def unpack(data: Tensor, into: Tensor) -> None:
    """The inverse, over ``into`` (contiguous, of the packed tensor's size). Raises ValueError for a wrong size."""
    runs = into.view(torch.uint8).view(-1, RUN_BYTES)
    if len(data) < len(runs):
        raise ValueError("rows shorter than their bit map")
    touched = data[: len(runs)] == 1
    if len(data) != len(runs) + RUN_BYTES * int(touched.sum()):
        raise ValueError("rows of another size than their bit map says")
    runs.zero_()
    runs[touched] = data[len(runs) :].view(-1, RUN_BYTES)
