"""What compression has left unsent, in checkpoints: each worker's errors, for as many workers as there were.

With error feedback a step's gradient goes out with what earlier steps have kept of theirs. That is part of the run's
state, but it belongs to a worker, not to the model: other workers can do nothing with it.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.comm.exchange import Exchange
from shoal.comm.group import Group
from shoal.comm.tensors import Collectives, make_collectives

_PREFIX = "unsent/"  # then the worker's rank, then the name of what it keeps


class Unsent:
    """``kept``: what this worker's exchange carries from step to step, by name."""

    def __init__(self, group: Group, kept: Mapping[str, Tensor]) -> None:
        self._group, self._kept = group, kept
        self._collectives: Collectives | None = None

    @staticmethod
    def of(group: Group, exchanges: Sequence[Exchange]) -> "Unsent":
        if not exchanges:
            return Unsent(group, {})
        from shoal.comm.compression.exchange import kept_by

        kept = [kept_by(exchange) for exchange in exchanges]
        return Unsent(group, {f"{place}/{name}": t for place, its in enumerate(kept) for name, t in its.items()})

    def gather(self) -> dict[str, Tensor]:
        """Everybody's on rank 0, {} elsewhere. Called by all workers."""
        sizes = {name: list(tensor.shape) for name, tensor in self._kept.items()}
        of_all = [json.loads(row) for row in self._group.gather(json.dumps(sizes).encode())]
        if not any(of_all):
            return {}
        if self._collectives is None:
            self._collectives = make_collectives(self._group)
        found = {f"{_PREFIX}0/{name}": tensor for name, tensor in self._kept.items()} if not self._group.rank else {}
        for rank, its in enumerate(of_all[1:], 1):
            for name, shape in its.items():
                if self._group.rank == rank:
                    self._collectives.send(self._kept[name].cpu(), 0)
                elif self._group.rank == 0:
                    found[f"{_PREFIX}{rank}/{name}"] = self._collectives.recv((shape, torch.float32), rank)
        self._collectives.barrier()  # nobody leaves before all has been received
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> bool:
        """Take over what `gather` gave, where just as many workers kept the same. False: it is lost, on all workers.

        Called by all of them."""
        saved = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        mine = f"{self._group.rank}/"
        own = {name.removeprefix(mine): t for name, t in saved.items() if name.startswith(mine)}
        fits = {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in self._kept.items()}
        beyond = any(int(name.partition("/")[0]) >= self._group.world for name in saved)
        if beyond or self._group.gather(b"fits" if fits else b"") != [b"fits"] * self._group.world:
            return False
        for name, tensor in self._kept.items():
            tensor.copy_(own[name])
        return True
