"""Compressors for DistributedDataParallel and FSDP2.

state = shoal.comm.Int8()
model.register_comm_hook(state, shoal.comm.hook)      # DDP; or, for DDP and FSDP2 alike:
shoal.comm.compress(model, state)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # torch exports it nowhere else
from torch.nn.parallel import DistributedDataParallel

from shoal.comm.compression.compressor import Compressor
from shoal.comm.compression.low_rank import LowRank
from shoal.comm.compression.reduction import drain
from shoal.errors import UserError


def hook(state: Compressor, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for ``DistributedDataParallel.register_comm_hook(compressor, hook)``: the mean gradient.

    The default group is taken for the model's; `compress` knows better. The first bucket measures link and compressor:
    where compressing would not pay, gradients go uncompressed, and a warning says why."""
    return state.buckets.take(bucket)


def compress(model: nn.Module, compressor: Compressor) -> Compressor:
    """Compress the gradients of a DistributedDataParallel or of a module given to ``fully_shard`` (FSDP2).

    Of FSDP2 the reduce-scatter is compressed; PowerSGD, whose factors belong to whole matrices, is refused there.
    Returns the compressor, for `state_dict`."""
    if isinstance(model, DistributedDataParallel):
        compressor.buckets.group = model.process_group
        compressor.buckets.name(model.module)
        model.register_comm_hook(compressor, hook)
        return compressor
    sharded = [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    if not sharded:
        raise UserError(
            f"compress: {type(model).__name__} is neither a DistributedDataParallel nor given to fully_shard: "
            f"wrap it first."
        )
    if isinstance(compressor.method, LowRank):
        raise UserError("compress: PowerSGD needs whole matrices, which FSDP2 cuts up: use Int8, TopK or OneBit.")
    for name, module in sharded:
        module.set_custom_reduce_scatter(_ReduceScatter(compressor, name))
    return compressor


class _ReduceScatter(ReduceScatter):
    """What FSDP2 calls in the place of its reduce-scatter (see ``FSDPModule.set_custom_reduce_scatter``)."""

    def __init__(self, compressor: Compressor, name: str) -> None:
        self._compressor, self._name = compressor, name

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Done when it returns; ``async_op`` only allows it to be later."""
        compressor, device = self._compressor, input_tensor.device
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise UserError(f"compressed FSDP2 sums or averages gradients; {op} it cannot do: leave the divide factor.")
        links = compressor.links(group, device)
        verdict = compressor.verdict_for(links, device)
        if not verdict or input_tensor.nbytes < compressor.min_bytes:
            dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group)
            return
        by = float(links.world) if op == dist.ReduceOp.AVG else 1.0
        flat = input_tensor.float()
        reduction = compressor.scatter(f"fsdp {self._name}", flat.numel(), links, device)
        drain(reduction.steps(flat, output_tensor, by))
