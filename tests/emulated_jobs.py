"""What ranks on emulated hosts do for tests; see `emulated_hosts`."""

import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist


def surroundings(rank: int, world: int, address: str) -> dict:
    """What a program sees of its host; it leaves a file in its shared memory."""
    Path(f"/dev/shm/left-by-{rank}").write_text("x")
    return {
        "name": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "process": os.getpid(),
    }


def one_fails(rank: int, world: int, address: str) -> None:
    if rank == 1:
        raise ValueError("planted")
    time.sleep(600)


def one_dies(rank: int, world: int, address: str) -> None:
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)


def probed(rank: int, world: int, address: str, nbytes: int) -> dict:
    """What a probe finds there, and what is chosen by it."""
    import shoal.comm as comm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    found = comm.probe(curves=(), seconds=0.5)
    choice = comm.plan("all_reduce", nbytes, found, itemsize=4)
    tensor = torch.full((nbytes // 4,), float(rank))
    comm.all_reduce(tensor, topology=found)
    dist.destroy_process_group()
    return {
        "topology": found.topology.to_json(),
        "chosen": choice.algorithm,
        "right": bool((tensor == sum(range(world))).all()),
    }
