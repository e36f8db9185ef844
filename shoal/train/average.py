"""The mean of tensors over workers, for schemes in which each goes its own way for a while."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.comm.exchange import Exchange, Placement, Terms
from shoal.comm.group import Group
from shoal.comm.layout import flat_layout
from shoal.comm.transport import make_exchange
from shoal.recipe.plan import Plan


class Average:
    """The mean of tensors over the workers, added up in the tree over workers: an exact exchange of its own."""

    def __init__(self, group: Group, plan: Plan) -> None:
        self._group, self._bucket_bytes = group, plan.bucket_bytes
        self._exchange: Exchange | None = None
        self._sizes: list[int] = []

    @torch.no_grad()
    def __call__(self, buffers: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """In place. Whole numbers and truth values stay what they are on each worker."""
        tensors = [t for t in (*weights, *buffers) if t.is_floating_point() and t.numel()]
        if self._group.world == 1 or not tensors:
            return
        exchange = self._made(tensors)
        passes = (1,) * self._group.world
        exchange.begin(passes)
        exchange.claim()
        slots = exchange.layout.slots
        for tensor, slot in zip(tensors, slots, strict=True):
            exchange.partials[0][slot.offset : slot.offset + slot.size].view(tensor.shape).copy_(tensor)
        for _ in exchange.layout.buckets:
            exchange.post()
            exchange.advance()
        exchange.finish()
        for index, tensor in enumerate(tensors):
            tensor.copy_(exchange.result_of(index).view(tensor.shape))

    def _made(self, tensors: Sequence[Tensor]) -> Exchange:
        sizes = [t.numel() for t in tensors]
        if self._exchange is None or sizes != self._sizes:
            world = self._group.world
            dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
            layout = flat_layout(sizes, [], world, self._bucket_bytes // dtype.itemsize)
            placement = Placement([range(rank, rank + 1) for rank in range(world)], self._group.rank, fast=False)
            mean = (float(world), float(world))
            cpu = torch.device("cpu")
            terms = Terms(layout, placement, (1,) * world, 1, lambda facts: mean, dtype, cpu)
            self._exchange = make_exchange(self._group, terms)
            self._sizes = sizes
        return self._exchange
