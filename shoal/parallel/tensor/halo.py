"""Rows from the neighbours: each worker gets what its outputs are made of, and returns the gradients."""

from typing import Any

import torch
from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.parallel.layout.bands import ROWS
from shoal.parallel.layout.window import Window


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, window: Window, collectives: Collectives) -> Tensor:
        """x [n, channels, own rows, width] -> [n, channels, needed rows, width]."""
        context.way = window, collectives, x.shape
        me, everybody = collectives.rank, range(collectives.world)
        nothing = x[:, :, :0]
        parts = [_rows(x, window.shared(me, other)) if other != me else nothing for other in everybody]
        arrived = collectives.all_to_all(parts)
        arrived[me] = _rows(x, window.shared(me, me))
        return torch.cat(arrived, ROWS)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        window, collectives, shape = context.way
        me, everybody = collectives.rank, range(collectives.world)
        runs = [window.shared(owner, me) for owner in everybody]
        pieces = list(torch.split(gradients[0], [b - a for a, b in runs], ROWS))
        own, pieces[me] = pieces[me], pieces[me][:, :, :0]
        arrived = collectives.all_to_all(pieces)
        arrived[me] = own
        total = gradients[0].new_zeros(shape)
        for other, piece in enumerate(arrived):
            _rows(total, window.shared(me, other)).add_(piece)
        return total, None, None


def _rows(x: Tensor, run: tuple[int, int]) -> Tensor:
    return x.narrow(ROWS, run[0], run[1] - run[0])


def fetch_rows(x: Tensor, window: Window, collectives: Collectives) -> Tensor:
    rows: Tensor = _Fetch.apply(x, window, collectives)  # type: ignore[no-untyped-call]
    return rows
