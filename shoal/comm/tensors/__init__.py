"""Collectives on tensors among the workers of a group: what tensor, pipeline and state parallelism are built on.

collectives = make_collectives(group.split(partition))     # called by all of the group's workers
whole = collectives.all_gather(mine, dim=1)
"""

from shoal.comm.group import Group, HostGroup
from shoal.comm.tensors.carrier import Carrier
from shoal.comm.tensors.collectives import Collectives

__all__ = ["Collectives", "make_collectives"]


def make_collectives(group: Group) -> Collectives:
    """Collectives of a group, over messages and memory of their own. Called by all of its workers, in the same order.

    On one host over shared memory, in C++ where the library is there; under torch.distributed over a process group,
    which all workers of the run help to make: a part of one does so for the others."""
    if isinstance(group, HostGroup):
        return Collectives(group, _of_host(group))
    from shoal.comm.distributed import DistributedGroup
    from shoal.comm.tensors.process_group import ProcessGroup

    if not isinstance(group, DistributedGroup) or (group.world == 1 and group.pg is None):
        assert group.world == 1
        return Collectives(group, None)
    carrier = ProcessGroup(group)
    return Collectives(group, None if group.world == 1 else carrier)


def _of_host(group: HostGroup) -> Carrier | None:
    """In C++ where all of its workers have the library; None for one worker."""
    from shoal.comm.native import build

    # all workers of the run count the same splits, whatever their own part needs: parts may have one worker, or several
    own, pairs = (group.split([range(group.world)]) for _ in range(2))
    if group.world == 1:
        return None
    if group.gather(b"" if build.ranks() is None else b"native") == [b"native"] * group.world:
        from shoal.comm.tensors.native import Native

        return Native(own)
    from shoal.comm.tensors.messages import Messages

    return Messages(own, pairs)
