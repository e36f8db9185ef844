"""Which transports are to be had here, and why others are not."""

from dataclasses import replace

from shoal.comm.measuring.cases import ZERO_COPY_TRANSPORTS, Settings
from shoal.comm.native import build
from shoal.errors import UserError

_COMPILED = ZERO_COPY_TRANSPORTS  # those that need the compiled backend


def there(settings: Settings, asked_for: bool) -> Settings:
    """The settings with the transports that are to be had. Compiles shm's backend if need be, once.

    Raises UserError, with the reason, for one that was ``asked_for`` and is not to be had."""
    reasons = {name: missing(name) for name in settings.transports}
    for name, reason in reasons.items():
        if reason and (asked_for or settings.zero_copy):
            raise UserError(f"the transport {name!r} is not to be had: {reason}.")
    return replace(settings, transports=tuple(name for name, reason in reasons.items() if not reason))


def missing(transport: str) -> str:
    """Why a transport cannot be used here, in one line; "" when it can."""
    if transport in _COMPILED:
        return "" if build.backend() else build.why_not(("backend",))
    import torch
    import torch.distributed as dist

    if transport == "nccl":
        from shoal.cluster.detect import launched_workers

        if not dist.is_nccl_available():
            return "this torch has no NCCL"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return "" if launched_workers() else "start the ranks by torchrun, one a GPU"
    if transport == "mpi" and not dist.is_mpi_available():
        return "this torch has no MPI, which only builds from source on a host with MPI have"
    return "" if dist.is_gloo_available() else "this torch has no gloo"
