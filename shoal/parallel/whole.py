"""Whole tensors from what the workers hold, and back: what checkpoints and hashes know."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.comm.stages import StageMessages, make_messages
from shoal.parallel.held import Cut, Held
from shoal.parallel.layout.split import Split
from shoal.parallel.tensor.whole import join_tensors, own_parts

_WHOLE = 0  # the first of a message's key


class Whole:
    """Puts together named tensors of all workers on rank 0. Every worker makes one and calls it, in the same order."""

    def __init__(self, held: Held, device: torch.device) -> None:
        self.held = held
        self._messages: StageMessages | None = make_messages(held.stages, device) if held.stages else None
        self._calls = 0

    def gather(self, own: Mapping[str, Tensor], parameter_of: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """All workers' tensors, whole, on rank 0; {} elsewhere.

        ``parameter_of``: of names that are not tensors of the model, such as an optimiser's moments, the tensor as
        which they are cut; a tensor of another shape than that one's part is whole already."""
        held, found = self.held, dict(own)
        if any(held.coordinates.get(axis, 0) for axis in ("data", "context")):
            return {}
        for cut in reversed(held.cuts):
            found = join_tensors(found, _splits_of(found, cut, parameter_of, whole=False), cut.collectives)
            if cut.collectives.rank:
                return {}  # the others join with nobody: the axes before this one have seen this worker
        if self._messages is None:
            return found
        self._calls += 1
        assert held.stages is not None
        key = (_WHOLE, self._calls)
        if held.stages.rank:
            self._messages.send(0, key, {name: tensor.clone() for name, tensor in found.items()})
            self._messages.settle()
            return {}
        for origin in range(1, held.stages.world):
            found |= {n: t for n, t in self._messages.receive(origin, key).items() if n not in found}
        self._messages.settle()
        return found

    def own(self, whole: Mapping[str, Tensor], parameter_of: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """What this worker takes of whole tensors whose names it holds."""
        found = dict(whole)
        for cut in self.held.cuts:
            found = own_parts(found, _splits_of(found, cut, parameter_of, whole=True), cut.collectives.rank)
        return found


def _splits_of(
    tensors: Mapping[str, Tensor], cut: Cut, parameter_of: Mapping[str, str] | None, *, whole: bool
) -> dict[str, Split]:
    """How each tensor is cut that has the shape of a whole one, or of this worker's part; what has another is not."""
    found = {}
    for name, tensor in tensors.items():
        split = cut.splits.get((parameter_of or {}).get(name, name))
        if split is None or tensor.dim() <= split.dim:
            continue
        if tensor.shape[split.dim] == (split.full if whole else split.sizes[cut.collectives.rank]):
            found[name] = split
    return found
