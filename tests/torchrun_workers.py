"""Workers that an agent forked, joined as torchrun would have started them."""

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.comm.distributed import DistributedGroup
from shoal.comm.group import HostGroup


def as_torchrun(group: HostGroup, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the function in the same workers, as torchrun would have started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = group.gather(str(free.getsockname()[1]).encode())[0].decode()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(group.rank), WORLD_SIZE=str(group.world))
    joined = DistributedGroup(20.0, accelerator=False)
    try:
        result = function(joined, *arguments)
    finally:
        joined.close()
    gc.collect()  # an error that a test keeps is in a circle with the frames that it has come through
    assert not gloo_threads(), "somebody holds a process group: its threads end an interpreter by SIGABRT at times"
    return result


def gloo_threads() -> list[str]:
    """Of process groups: they run Python's destructors. The loops of sockets do not."""
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return [name for name in names if name.startswith("pt_gloo")]
