"""The collectives of a torch backend itself, on flat tensors as for programs: where they were measured to be faster."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from shoal.comm.torch_all_gather import all_gather

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def run(
    collective: str, group: dist.ProcessGroup, operand: Tensor | None, result: Tensor | None, root: int, op: str
) -> None:
    """``operand`` and ``result`` as for ``carry_out``. There is no "avg": not every backend has it."""
    if collective == "barrier":
        dist.barrier(group)
    elif collective == "all_reduce":
        assert result is not None
        dist.all_reduce(result, _OPS[op], group)
    elif collective == "reduce":
        assert operand is not None
        # Backends may use the others' tensors as room for sums.
        dist.reduce(operand if result is not None else operand.clone(), op=_OPS[op], group=group, group_dst=root)
    elif collective == "broadcast":
        assert result is not None
        dist.broadcast(result, group=group, group_src=root)
    elif collective == "reduce_scatter":
        _reduce_scatter(result, operand, _OPS[op], group)
    elif collective == "all_gather":
        all_gather(result, operand, group)
    elif collective == "all_to_all":
        dist.all_to_all_single(result, operand, group=group)
    elif collective == "gather":
        assert operand is not None
        rows = None if result is None else list(result.chunk(dist.get_world_size(group)))
        dist.gather(operand, rows, group=group, group_dst=root)
    elif collective == "scatter":
        assert result is not None
        rows = None if operand is None else list(operand.chunk(dist.get_world_size(group)))
        dist.scatter(result, rows, group=group, group_src=root)
    else:
        raise NotImplementedError(f"torch has no {collective} of a group")
