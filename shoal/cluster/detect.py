"""What this machine lets this process use, affinity, quotas, memory and accelerators; and who started the process."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from shoal.cluster.cluster import Device, Host
from shoal.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # control groups of the first version say "no limit" with a number near 2**63


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may really use: the smaller of its affinity and its control-group quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cores_of_quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def launched_workers(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many workers torchrun (or who sets its variables) started, this one among them; None when it did not.

    Raises UserError when the number is none."""
    if not all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    try:
        return int(environment["WORLD_SIZE"])
    except ValueError:
        raise UserError(f"WORLD_SIZE={environment['WORLD_SIZE']!r} in the environment is not a number.") from None


def _cores_of_quota(cgroup: Path) -> float | None:
    words = _words(cgroup / "cpu.max")  # version 2: "quota period", or "max period"
    if len(words) != 2:  # version 1 has a file for each; a quota of -1 is none
        words = _words(cgroup / "cpu" / "cpu.cfs_quota_us") + _words(cgroup / "cpu" / "cpu.cfs_period_us")
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit() or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes of main memory: the smaller of the machine's and the control group's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        words = _words(file)
        if words and words[0].isdigit() and int(words[0]) < UNLIMITED_BYTES:
            return min(physical, int(words[0]))
    return physical


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def this_host(accelerators: bool | None = None) -> Host:
    """This machine. ``accelerators=None`` looks for them only where torch, slow to import, is there already."""
    look = "torch" in sys.modules if accelerators is None else accelerators
    return Host(
        name=socket.gethostname(),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        devices=_accelerators() if look else (),
    )


def _accelerators() -> tuple[Device, ...]:
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ()
    module = torch.get_device_module(kind)
    found = []
    for index in range(torch.accelerator.device_count()):
        if hasattr(module, "get_device_properties"):
            properties = module.get_device_properties(index)
            found.append(Device(kind=kind.type, memory_bytes=int(properties.total_memory), name=properties.name))
        else:  # such as mps, which shares the main memory and has no name
            found.append(Device(kind=kind.type, memory_bytes=memory_bytes()))
    return tuple(found)
