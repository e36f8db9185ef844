"""What users ask of a group that runs on these backends: memory that all ranks of the host see."""

from typing import TYPE_CHECKING, Any

from shoal.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def backend_of(group: "ProcessGroup | None") -> Any:
    """What carries out collectives on tensors on cpu: the compiled backend, or the group in Python; None where it is
    another one, as after a fall-back to gloo."""
    import torch
    import torch.distributed as dist

    from shoal.comm.backend.in_python.group import PythonGroup
    from shoal.comm.native import build

    if not dist.is_initialized():
        raise UserError("there is no process group: call torch.distributed.init_process_group first.")
    found: Any = (group or dist.distributed_c10d._get_default_group())._get_backend(torch.device("cpu"))
    found = getattr(found, "wrapped_pg", found)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    if isinstance(found, PythonGroup):
        return found
    module = build.backend()
    return found if module is not None and isinstance(found, module.ShoalBackend) else None


def symm_empty(n: int, dtype: "torch.dtype", group: "ProcessGroup | None" = None) -> "torch.Tensor":
    """An uninitialised tensor [n] in memory that all ranks of this host see: collectives on it move nothing twice.

    They do when all ranks' tensors were made so. The memory is free again when the tensor has gone. Where there is no
    such memory, an ordinary tensor: the results are the same."""
    import torch

    if n < 0:
        raise UserError(f"symm_empty: a tensor cannot have {n} elements.")
    backend = backend_of(group)
    if backend is None:
        return torch.empty(n, dtype=dtype)
    found: torch.Tensor = backend.allocate_tensor(n, dtype=dtype, device=torch.device("cpu"))
    return found
