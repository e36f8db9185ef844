"""Which exchange carries a group's gradients."""

from shoal.comm.exchange import Exchange, HeapExchange, Terms
from shoal.comm.group import Group, HostGroup
from shoal.errors import UserError


def make_exchange(group: Group, terms: Terms) -> Exchange:
    """Shared memory for workers of one host; sockets for elastic ones of several; torch.distributed for all others."""
    if isinstance(group, HostGroup):
        if terms.device.type != "cpu" and group.world > 1:
            raise UserError(
                "several workers with GPUs are started by torchrun: torchrun --nproc-per-node N -m shoal train"
            )
        return HeapExchange(group, terms)
    from shoal.comm.distributed import DistributedExchange, DistributedGroup, ReducingExchange
    from shoal.comm.wired import WiredGroup

    if isinstance(group, WiredGroup):
        check_wired(terms)
        return DistributedExchange(group, terms)
    if not isinstance(group, DistributedGroup):
        raise UserError(f"no exchange carries a {type(group).__name__}.")
    return (ReducingExchange if terms.placement.fast else DistributedExchange)(group, terms)


def check_wired(terms: Terms) -> None:
    """Raises UserError for what sockets between hosts do not carry."""
    if terms.device.type != "cpu" or terms.placement.fast:
        raise UserError("elastic workers of several hosts train on processors, with sync = 'exact'.")
