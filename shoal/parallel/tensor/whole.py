"""Named tensors of a split model put together, as checkpoints and hashes know them, and cut again."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.errors import UserError
from shoal.parallel.layout.split import Split


def join_tensors(
    tensors: Mapping[str, Tensor], splits: Mapping[str, Split], collectives: Collectives
) -> dict[str, Tensor]:
    """The whole tensors, on all workers of the axis. Called by all of them, with the same names in the same order.

    ``splits``: of the names that are cut. Works for an optimiser's moments too, under the split of their parameter."""
    return {name: _join(t, splits[name], collectives) if name in splits else t for name, t in tensors.items()}


def _join(t: Tensor, split: Split, collectives: Collectives) -> Tensor:
    return split.ungrouped(collectives.all_gather(t.detach(), split.dim, split.sizes))


def own_parts(tensors: Mapping[str, Tensor], splits: Mapping[str, Split], rank: int) -> dict[str, Tensor]:
    """The inverse, for one coordinate: what a worker takes of whole tensors. Raises UserError for another size."""
    found = {}
    for name, t in tensors.items():
        split = splits.get(name)
        if split is not None and t.shape[split.dim] != split.full:
            raise UserError(
                f"tensor {name!r} {list(t.shape)} must have {split.full} elements in dim {split.dim} to be split as "
                f"the plan says: it belongs to another model."
            )
        found[name] = t if split is None else split.take(t, rank).clone(memory_format=torch.contiguous_format)
    return found
