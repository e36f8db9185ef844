"""What compression has left unsent, in checkpoints: each worker's errors, for as many workers as there were.

With error feedback a step's gradient goes out with what earlier steps have kept of theirs. That is part of the run's
state, but it belongs to a worker, not to the model: other workers can do nothing with it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.tensors import Collectives, make_collectives
from shoal.recipe.plan import Plan
from shoal.train.gradients import Gradients
from shoal.train.reduction import Reduction

_PREFIX = "unsent/"  # then the worker's rank, what its exchange sums, and the name of what that keeps


class Unsent:
    """Called by all workers of a group together."""

    def __init__(self) -> None:
        self.lost = False  # of a resumed run: what had been kept back could not be taken over
        self._made: tuple[Group, Collectives] | None = None  # memory and sockets of their own: made once for a group

    def _collectives(self, group: Group) -> Collectives:
        if self._made is None or self._made[0] is not group:
            self._made = group, make_collectives(group)
        return self._made[1]

    def gather(self, group: Group, plan: Plan, reduction: Reduction | None) -> dict[str, Tensor]:
        """Everybody's on rank 0, {} elsewhere."""
        kept = _kept(plan, reduction)
        sizes = {name: list(tensor.shape) for name, tensor in kept.items()}
        of_all = [json.loads(row) for row in group.gather(json.dumps(sizes).encode())] if plan.compresses else []
        if not any(of_all):
            return {}
        collectives = self._collectives(group)
        found = {f"{_PREFIX}0/{name}": tensor for name, tensor in kept.items()} if not group.rank else {}
        for rank, its in enumerate(of_all[1:], 1):
            for name, shape in its.items():
                if group.rank == rank:
                    collectives.send(kept[name].cpu(), 0)
                elif group.rank == 0:
                    found[f"{_PREFIX}{rank}/{name}"] = collectives.recv((shape, torch.float32), rank)
        collectives.barrier()  # nobody leaves before all has been received
        return found

    def restore(self, group: Group, plan: Plan, reduction: Reduction | None, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `gather` gave, where just as many workers keep the same; else it is lost, on all of them."""
        kept = _kept(plan, reduction)
        saved = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        mine = f"{group.rank}/"
        own = {name.removeprefix(mine): t for name, t in saved.items() if name.startswith(mine)}
        fits = {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in kept.items()}
        fits = fits and all(int(name.partition("/")[0]) < group.world for name in saved)
        fits = group.gather(b"fits" if fits else b"") == [b"fits"] * group.world
        for name, tensor in kept.items() if fits else ():
            tensor.copy_(own[name])
        # what is sent to servers is kept elsewhere
        self.lost = not fits or (plan.compression != "none" and not plan.compresses)


def _kept(plan: Plan, reduction: Reduction | None) -> dict[str, Tensor]:
    """What this worker's exchanges carry from step to step, by name."""
    if not plan.compresses or reduction is None:
        return {}
    from shoal.comm.compression.exchange import kept_by

    held = reduction.held
    return {
        f"{_summed(held.ranks(share), each)}/{name}": tensor
        for share, each in zip(held.shares, reduction.sets, strict=True)
        for name, tensor in kept_by(each.exchange).items()
    }


def _summed(ranks: Sequence[int], gradients: Gradients) -> str:
    """A hash of which parameters are summed, and over whom: what is left of other ones has the same sizes at times."""
    said = [
        list(ranks),
        *([name, list(p.shape)] for name, p in zip(gradients.names, gradients.parameters, strict=True)),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
