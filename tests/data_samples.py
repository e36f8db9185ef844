"""Samples that several tests of data sources share."""

import numpy as np
import torch


def idx_bytes(array: np.ndarray) -> bytes:
    """The array as an IDX file."""
    kinds = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
    head = bytes([0, 0, kinds[array.dtype.name], array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


class NoisyPairs:
    """(three numbers drawn from torch's global generator, class): what a random transform makes of a data set."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3) + i, i % 3


noisy_pairs = NoisyPairs
