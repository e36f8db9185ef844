"""Which places of a sequence each worker of a context group holds. Pure arithmetic."""

import torch
from torch import Tensor

from shoal.parallel.layout.split import Split, even_split

SEQUENCE = 1  # the dim of the sequence in [n, T, ...]
AXIS = "context"


def contiguous(length: int, ranks: int) -> Split:
    """One piece each, the first ones longer by one where it does not divide."""
    return even_split(SEQUENCE, AXIS, length, ranks)


def zigzag(length: int, ranks: int) -> Split:
    """Two pieces each, the r-th from the front and the r-th from the back: under a causal mask a late place looks at
    many and an early one at few, and so all ranks have as much to do (Brandon et al., 2023)."""
    pieces = even_split(SEQUENCE, AXIS, length, 2 * ranks).kept
    return Split(SEQUENCE, AXIS, tuple(pieces[rank] + pieces[-1 - rank] for rank in range(ranks)))


def places(slices: Split, rank: int) -> Tensor:
    """int [T of the rank], ascending"""
    return torch.cat([torch.arange(*run) for run in slices.kept[rank]])
