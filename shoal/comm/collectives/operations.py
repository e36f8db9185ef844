"""The collectives, as one calls them: on tensors, over a process group of any backend, by a named algorithm or "auto".

    import shoal.comm as comm
    comm.all_reduce(gradient)                              # over the default group; the cost model picks
    comm.all_reduce(gradient, "avg", algorithm="ring")
    parts = comm.all_gather(mine, algorithm="two_level", topology=topology)

Every rank of the group makes the same call, in the same order. ``group`` is a torch process group, None for the default
one, several groups of the same ranks (one a lane), or a Transport. ``topology`` says which ranks share a host and how
fast links are; left out, it is measured once for each group, when an algorithm asks for it. All return when the tensors
may be read and written again. Half precision: see `shoal.comm.collectives.execute`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.pick import Call, device_of
from shoal.comm.transports.contract import Transport, drive
from shoal.comm.transports.torch_group import TorchGroup
from shoal.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shoal.comm.collectives.pick import Links

    Group = ProcessGroup | Sequence[ProcessGroup] | Transport | None


def all_reduce(
    tensor: Tensor,
    op: str = "sum",
    group: "Group" = None,
    *,
    algorithm: str = "auto",
    segments: int | None = None,
    topology: "Links" = None,
    rounding: str = "once",
) -> Tensor:
    """The sum (avg, max, min, prod) over all ranks, in place on each. Returns ``tensor``.

    Raises UserError for an unknown name and for an operation that the type has not, RunFailed naming a lost peer."""
    transport = _transport(group)
    flat = _flat(tensor)
    call = Call("all_reduce", transport, flat, flat, _bytes(flat))
    call.run(algorithm, segments, topology, op=op, rounding=rounding)
    return _back(tensor, flat)


def reduce(
    tensor: Tensor,
    root: int = 0,
    op: str = "sum",
    group: "Group" = None,
    *,
    algorithm: str = "auto",
    segments: int | None = None,
    topology: "Links" = None,
    rounding: str = "once",
) -> Tensor:
    """As ``all_reduce``, in place on ``root`` alone; the others' tensors stay as they are."""
    transport = _transport(group)
    flat = _flat(tensor)
    result = flat if transport.rank == root else None
    call = Call("reduce", transport, flat, result, _bytes(flat), root)
    call.run(algorithm, segments, topology, op=op, rounding=rounding)
    return _back(tensor, flat) if transport.rank == root else tensor


def broadcast(
    tensor: Tensor,
    root: int = 0,
    group: "Group" = None,
    *,
    algorithm: str = "auto",
    segments: int | None = None,
    topology: "Links" = None,
) -> Tensor:
    """``root``'s values, in place on all ranks. Returns ``tensor``."""
    transport = _transport(group)
    flat = _flat(tensor)
    operand = flat if transport.rank == root else None
    Call("broadcast", transport, operand, flat, _bytes(flat), root).run(algorithm, segments, topology)
    return _back(tensor, flat)


def reduce_scatter(
    tensor: Tensor,
    op: str = "sum",
    group: "Group" = None,
    *,
    out: Tensor | None = None,
    algorithm: str = "auto",
    segments: int | None = None,
    topology: "Links" = None,
    rounding: str = "once",
) -> Tensor:
    """[n*k, ...] on each of n ranks -> [k, ...]: rank r gets the sum of block r of dim 0. Leaves ``tensor`` as it is.

    Raises UserError if n does not divide dim 0."""
    transport = _transport(group)
    shape = _split(tensor, transport.size, "reduce_scatter")
    out = _result(out, shape, tensor, "reduce_scatter")
    flat, result = _flat(tensor), _flat(out)
    call = Call("reduce_scatter", transport, flat, result, _bytes(flat))
    call.run(algorithm, segments, topology, op=op, rounding=rounding)
    return _back(out, result)


def all_gather(
    tensor: Tensor,
    group: "Group" = None,
    *,
    out: Tensor | None = None,
    algorithm: str = "auto",
    segments: int | None = None,
    topology: "Links" = None,
) -> Tensor:
    """[...] on each of n ranks -> [n, ...] on all of them, in the order of the ranks."""
    transport = _transport(group)
    out = _result(out, (transport.size, *tensor.shape), tensor, "all_gather")
    flat, result = _flat(tensor), _flat(out)
    Call("all_gather", transport, flat, result, _bytes(result)).run(algorithm, segments, topology)
    return _back(out, result)


def gather(
    tensor: Tensor,
    root: int = 0,
    group: "Group" = None,
    *,
    algorithm: str = "auto",
    topology: "Links" = None,
) -> Tensor | None:
    """[...] on each of n ranks -> [n, ...] on ``root``, None on the others."""
    transport = _transport(group)
    flat = _flat(tensor)
    out = tensor.new_empty((transport.size, *tensor.shape)) if transport.rank == root else None
    result = None if out is None else out.view(-1)
    Call("gather", transport, flat, result, _bytes(flat) * transport.size, root).run(algorithm, None, topology)
    return out


def scatter(
    out: Tensor,
    tensor: Tensor | None = None,
    root: int = 0,
    group: "Group" = None,
    *,
    algorithm: str = "auto",
    topology: "Links" = None,
) -> Tensor:
    """[n, ...] on ``root`` -> row r in ``out``, [...], on rank r. ``tensor`` is None on all others. Returns ``out``."""
    transport = _transport(group)
    if (tensor is not None) != (transport.rank == root):
        raise UserError(f"scatter: rank {root} alone gives a tensor to scatter; this is rank {transport.rank}.")
    if tensor is not None and (tensor.numel() != out.numel() * transport.size or tensor.dtype != out.dtype):
        raise UserError(f"scatter: {transport.size} times {_told(out)} must be scattered, got {_told(tensor)}.")
    result = _flat(out)
    operand = None if tensor is None else _flat(tensor)
    Call("scatter", transport, operand, result, _bytes(result) * transport.size, root).run(algorithm, None, topology)
    return _back(out, result)


def all_to_all(
    tensor: Tensor,
    group: "Group" = None,
    *,
    out: Tensor | None = None,
    algorithm: str = "auto",
    topology: "Links" = None,
) -> Tensor:
    """[n*k, ...] on each of n ranks -> the same shape: block j of dim 0 goes to rank j, block i comes from rank i.

    Raises UserError if n does not divide dim 0."""
    transport = _transport(group)
    _split(tensor, transport.size, "all_to_all")
    out = _result(out, tuple(tensor.shape), tensor, "all_to_all")
    if out.data_ptr() == tensor.data_ptr() and tensor.numel():
        raise UserError("all_to_all: out must not be the tensor that is sent.")
    flat, result = _flat(tensor), _flat(out)
    Call("all_to_all", transport, flat, result, _bytes(flat)).run(algorithm, None, topology)
    return _back(out, result)


def send(tensor: Tensor, to: int, group: "Group" = None) -> None:
    """To rank ``to``, which calls ``receive``; nobody else takes part."""
    transport = _transport(group)
    flat = _flat(tensor)
    call = Call("send_recv", transport, flat, None, _bytes(flat), transport.rank, to)
    call.run("direct", None, None)


def receive(tensor: Tensor, origin: int, group: "Group" = None) -> Tensor:
    """What rank ``origin`` sends, in place. Returns ``tensor``."""
    transport = _transport(group)
    flat = _flat(tensor)
    Call("send_recv", transport, None, flat, _bytes(flat), origin, transport.rank).run("direct", None, None)
    return _back(tensor, flat)


def barrier(group: "Group" = None, *, algorithm: str = "auto", topology: "Links" = None) -> None:
    """Returns when all ranks have come to it."""
    transport = _transport(group)
    token = torch.zeros(1, dtype=torch.uint8, device=device_of(transport))
    Call("barrier", transport, token, token, 1).run(algorithm, None, topology, op="max")


def run_program(
    program: Program, operand: Tensor | None, result: Tensor | None, group: "Group" = None, *, op: str = "sum"
) -> None:
    """Carry out a program of one's own on flat tensors: see ``execute.carry_out``."""
    with torch.no_grad():
        drive(carry_out(_transport(group), program, operand, result, op=op))


def _transport(group: "Group") -> Transport:
    if hasattr(group, "post"):
        found: Transport = group  # type: ignore[assignment]
        return found
    return TorchGroup(group if isinstance(group, list | tuple) else (group,))


def _flat(tensor: Tensor) -> Tensor:
    """The elements in a row; a copy where they do not lie so."""
    return tensor.detach().contiguous().view(-1)


def _back(tensor: Tensor, flat: Tensor) -> Tensor:
    """Into ``tensor`` again, where ``flat`` was a copy of it."""
    if not tensor.is_contiguous():
        with torch.no_grad():
            tensor.copy_(flat.view(tensor.shape))
    return tensor


def _bytes(flat: Tensor) -> int:
    return flat.numel() * flat.element_size()


def _split(tensor: Tensor, ranks: int, what: str) -> tuple[int, ...]:
    if not tensor.dim() or tensor.shape[0] % ranks:
        raise UserError(f"{what}: dim 0 of {_told(tensor)} must be a multiple of the {ranks} ranks.")
    return (tensor.shape[0] // ranks, *tensor.shape[1:])


def _result(out: Tensor | None, shape: tuple[int, ...], like: Tensor, what: str) -> Tensor:
    if out is None:
        return like.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise UserError(f"{what}: out must be {list(shape)} of {_name(like)}, got {_told(out)}.")
    return out


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {_name(tensor)}"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
