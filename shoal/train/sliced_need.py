"""What slices leave of the memory that a worker needs: counted from cuts of the flat buffer, before there are any."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.comm.group import HostGroup
from shoal.comm.slices import pieces_of
from shoal.parallel.held import Held
from shoal.train.gather_order import Order
from shoal.train.gradients import Gradients
from shoal.train.sharded_states import sharing_of


@dataclass(frozen=True)
class Sliced:
    """Of one worker, beside one that holds the states of all that it trains."""

    weights: int  # bytes of parameters at the most in a step, frozen ones among them; of shared memory its part
    part: float  # of the optimiser's states that it holds


def sliced(held: Held, sets: Sequence[Gradients]) -> Sliced:
    """``sets``: of ``held.shares``."""
    weights = mine = every = 0
    for share, gradients in zip(held.shares, sets, strict=True):
        whole = sum(parameter.nbytes for parameter in gradients.parameters)
        sharing = sharing_of(held.plan, share.group)
        slices = sharing.slices(share.group.rank)
        for piece in pieces_of(gradients.layout, slices):
            mine += piece.length
        every += sum(parameter.numel() for parameter in gradients.parameters)
        if isinstance(share.group, HostGroup):
            weights += -(-whole // sharing.members)
        elif held.plan.states == "zero3" and held.pipeline is None:
            from shoal.comm.gathered_weights import foreign_bytes
            from shoal.train.gathering import order_in

            foreign = foreign_bytes(gradients.layout, gradients.parameters, slices)
            order, _ = order_in(held.module, gradients.parameters, gradients.layout)
            weights += whole - sum(foreign) + most_foreign(order, foreign)
        else:
            weights += whole
    return Sliced(weights + _frozen_bytes(held), mine / max(1, every))


def most_foreign(order: Order, foreign: Sequence[int]) -> int:
    """Of what others own, by bucket: the most that is here at once, the ends of the model and two blocks."""
    needs = [*order.needs, frozenset[int]()]
    pairs = [first | second for first, second in pairwise(needs)]
    most = max((sum(foreign[bucket] for bucket in pair) for pair in pairs), default=0)
    return most + sum(foreign[bucket] for bucket in order.always)


def _frozen_bytes(held: Held) -> int:
    """Of what is not trained: ZeRO-3 holds it once a host."""
    frozen = sum(parameter.nbytes for parameter in held.module.parameters() if not parameter.requires_grad)
    fewest = min(held.shares, key=lambda share: len(share.axes))
    once = held.plan.states == "zero3" and isinstance(fewest.group, HostGroup)
    return -(-frozen // sharing_of(held.plan, fewest.group).members) if once else frozen
