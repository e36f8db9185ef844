"""Which exchange carries a group's gradients."""

from typing import TYPE_CHECKING

import torch

from shoal.comm.exchange import Denominators, Exchange, HeapExchange, Placement
from shoal.comm.group import Group, HostGroup
from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.comm.layout import Layout


def make_exchange(
    group: Group,
    placement: Placement,
    most_passes: tuple[int, ...],
    device: torch.device,
    layout: "Layout",
    facts: int,
    denominators: Denominators,
    dtype: torch.dtype,
) -> Exchange:
    """Shared memory for workers of one host, torch.distributed for all others.

    ``most_passes`` are the passes of a full step: what memory is reserved for."""
    if isinstance(group, HostGroup):
        if device.type != "cpu" and group.world > 1:
            raise UserError(
                "several workers with GPUs are started by torchrun: torchrun --nproc-per-node N -m shoal train"
            )
        return HeapExchange(group, layout, placement, most_passes, facts, denominators, dtype, device)
    from shoal.comm.distributed import DistributedExchange, DistributedGroup, ReducingExchange

    if not isinstance(group, DistributedGroup):
        raise UserError(f"no exchange carries a {type(group).__name__}.")
    kind = ReducingExchange if placement.fast else DistributedExchange
    return kind(group, layout, placement, most_passes, facts, denominators, dtype, device)
