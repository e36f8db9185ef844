"""Hosts made of namespaces of one machine, joined by networks of limited rate: for root, on Linux.

    with emulated_hosts(2, gbit_per_s=(1.0, 0.4)) as hosts:
        results = hosts.run("two_hosts:all_reduce", ranks_per_host=2, nbytes=1 << 24)

Each host has its own network, its own /dev/shm, name and boot id, as far as a program in it can see. Interface i of all
hosts, eth0, eth1 and so on, is in the network 10.77.i.0/24, whose addresses exist only in there. Each interface sends
and receives at its rate, both at once (a token bucket at either end of its cable); there is no other way out.

A host lasts as long as the process that holds its namespaces, which ends when this one does, by whatever cause: the
kernel takes away networks, mounts and limits with the last process in them. Nothing has a name outside.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BURST_BYTES, QUEUE_BYTES = 256 * 1024, 1024 * 1024  # a bucket holds a few of the 64 KiB packets that TCP hands down
SPACES = ("net", "mount", "ipc", "uts")


def why_not() -> str | None:
    """Why there can be no emulated hosts here; None when there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "emulated hosts need root on Linux"
    lacking = [tool for tool in ("ip", "tc", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if lacking:
        return f"emulated hosts need the commands {', '.join(lacking)}"
    try:
        with emulated_hosts(2, gbit_per_s=(1.0,)):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        told = getattr(error, "stderr", "") or str(error)
        return f"this kernel makes no emulated hosts: {str(told).strip().splitlines()[-1]}"


@dataclass(frozen=True)
class EmulatedHosts:
    count: int
    gbit_per_s: tuple[float, ...]  # of each interface of a host, in each direction
    holders: tuple[int, ...]  # process ids, whose namespaces are the hosts'
    popen: Callable[..., Any] = subprocess.Popen  # starts the process whose forks the ranks are

    def address(self, host: int, interface: int = 0) -> str:
        return f"10.77.{interface}.{host + 1}"

    def run(
        self,
        job: str,
        ranks: Sequence[int],
        *,
        env: dict[str, str] | None = None,
        timeout_s: float = 120.0,
        **arguments: Any,
    ) -> list[Any]:
        """Calls ``job`` ("module:function", found beside this file or in bench/) on every rank, as
        ``function(rank, world, address, **arguments)``, in a process on the host ``ranks[rank]``; what each returned.

        ``address`` is where rank 0 may listen. Raises RuntimeError with the first failure, after ending all."""
        order = {
            "job": job,
            "path": [str(HERE), str(HERE.parent / "bench")],
            "arguments": arguments,
            "ranks": [self.holders[host] for host in ranks],
            "address": f"tcp://{self.address(ranks[0])}:29500",
            "env": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"} | (env or {}),
        }
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # these hosts have no name service, and torch would say so
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        launcher = self.popen(
            [sys.executable, "-m", "emulated_ranks"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **quiet, "PYTHONPATH": paths},
        )  # fmt: skip
        limit = threading.Timer(timeout_s, launcher.kill)  # whose ranks die with it
        limit.start()
        try:
            launcher.stdin.write(json.dumps(order) + "\n")  # it stays open: its end would end the ranks
            launcher.stdin.flush()
            answer = launcher.stdout.read()
        finally:
            limit.cancel()
            launcher.kill()
            launcher.wait()
            for pipe in (launcher.stdin, launcher.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()
        if not answer.startswith("["):
            raise RuntimeError(f"{job}: {answer.strip() or 'the ranks ended without a word, perhaps out of time'}")
        return json.loads(answer)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _inside(holder: int, *command: str) -> None:
    _run("nsenter", "--target", str(holder), *(f"--{space}" for space in SPACES), *command)


@contextmanager
def emulated_hosts(
    count: int, gbit_per_s: Sequence[float], popen: Callable[..., Any] = subprocess.Popen
) -> Iterator[EmulatedHosts]:
    with ExitStack() as stack:
        switch = _holder(stack, "switch")
        holders = tuple(_holder(stack, f"h{host}") for host in range(count))
        for interface, rate in enumerate(gbit_per_s):
            _inside(switch, "ip", "link", "add", f"net{interface}", "type", "bridge")
            _inside(switch, "ip", "link", "set", f"net{interface}", "up")
            for host, holder in enumerate(holders):
                _plug(switch, holder, host, interface, rate)
        yield EmulatedHosts(count, tuple(gbit_per_s), holders, popen)


def _holder(stack: ExitStack, name: str) -> int:
    """A process with namespaces of its own, which ends when its standard input does. Its boot id lies in its own
    memory, and has no name once it stands in the kernel's place."""
    script = (
        "mount -t tmpfs none /dev/shm && echo $1 > /dev/shm/boot"
        " && mount --bind /dev/shm/boot /proc/sys/kernel/random/boot_id && rm /dev/shm/boot"
        " && hostname $2 && ip link set lo up && echo ready && exec cat"
    )
    command = ["unshare", *(f"--{space}" for space in SPACES), "sh", "-c", script, "sh", str(uuid.uuid4()), name]
    holder = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(holder.kill)
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        raise OSError("namespaces or mounts were refused")
    return holder.pid


def _plug(switch: int, holder: int, host: int, interface: int, rate: float) -> None:
    name, port = f"eth{interface}", f"p{interface}-{host}"
    _inside(switch, "ip", "link", "add", port, "type", "veth", "peer", "name", name, "netns", str(holder))
    _inside(switch, "ip", "link", "set", port, "master", f"net{interface}", "up")
    _inside(holder, "ip", "address", "add", f"10.77.{interface}.{host + 1}/24", "dev", name)
    _inside(holder, "ip", "link", "set", name, "up")
    bucket = ("tbf", "rate", f"{round(rate * 1e6)}kbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
    _inside(holder, "tc", "qdisc", "add", "dev", name, "root", *bucket)
    _inside(switch, "tc", "qdisc", "add", "dev", port, "root", *bucket)


def interface_bytes() -> dict[str, tuple[int, int]]:
    """(received, sent) bytes of each interface of the host that this process runs on, as the kernel counts them."""
    counted = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, _, rest = line.partition(":")
        numbers = rest.split()
        counted[name.strip()] = (int(numbers[0]), int(numbers[8]))
    return counted
