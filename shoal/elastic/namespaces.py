"""Hosts that this machine plays with a network namespace for each: real links, that the kernel delays, loses and cuts.

A bridge joins them. A way is cut where it begins: there the other host gets a hardware address that nobody has, so that
what is sent is lost without a word. What a host sends is slow or lossy (tc netem, where the kernel has it) at its own
end of its link, what it is sent at the other one. Only root can make namespaces. They go with `close`; those of a
process that was killed are taken away by the next one.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from shoal.elastic.network import Address, Trouble
from shoal.errors import UserError

PORT = 7700
_NET = "10.213.77"
_NOBODY = "02:00:00:00:00:01"  # no interface has this hardware address
_MADE = Path("/var/run/netns")


class Namespaces:
    """See `shoal.elastic.network.Network`. Raises UserError where they cannot be made."""

    def __init__(self, hosts: int, *, shapes: bool) -> None:
        """``shapes``: links are to be slow or lossy, not only cut."""
        self._hosts = hosts
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if os.geteuid() != 0 or missing:
            why = f"{' and '.join(missing)} of iproute2" if missing else "root"
            raise UserError(f"--network namespaces needs {why}: use --network relay, which needs nothing.")
        self._remove_left()
        self._bridge = f"shoal{os.getpid() % 10**8}"
        try:
            self._ip("link", "add", self._bridge, "type", "bridge")
            self._ip("link", "set", self._bridge, "up")
            for host in range(hosts):
                self._add(host)
            if shapes:
                self._shape(["tc"], self._out(0), Trouble(delay_s=0.001))
                self._shape(["tc"], self._out(0), Trouble())
        except UserError:
            self.close()
            raise

    def _add(self, host: int) -> None:
        name = self._name(host)
        self._ip("netns", "add", name)
        self._ip("link", "add", self._out(host), "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("link", "set", self._out(host), "master", self._bridge, "up")
        self._ip("-n", name, "addr", "add", f"{_NET}.{host + 1}/24", "dev", "eth0")
        self._ip("-n", name, "link", "set", "eth0", "up")
        self._ip("-n", name, "link", "set", "lo", "up")

    def _name(self, host: int) -> str:
        return f"shoal-{os.getpid()}-{host}"

    def _out(self, host: int) -> str:
        """The end of its link that is outside."""
        return f"sh{os.getpid() % 10**8}-{host}"

    def addresses(self, number: int) -> tuple[Address, ...]:
        return tuple((f"{_NET}.{host + 1}", PORT) for host in range(self._hosts))

    def within(self, number: int) -> Sequence[str]:
        return ("ip", "netns", "exec", self._name(number))

    def trouble(self, host: int, *, out: Trouble, into: Trouble) -> None:
        self._shape(["tc", "-n", self._name(host)], "eth0", out)
        self._shape(["tc"], self._out(host), into)
        for other in range(self._hosts):
            if other != host:
                self._cut(host, other, cut=out.cut)
                self._cut(other, host, cut=into.cut)

    def _cut(self, host: int, other: int, *, cut: bool) -> None:
        """The way from one to the other."""
        neighbour = ["ip", "-n", self._name(host), "neigh"]
        address = [f"{_NET}.{other + 1}", "dev", "eth0"]
        if cut:
            _run([*neighbour, "replace", *address, "lladdr", _NOBODY, "nud", "permanent"])
        else:  # asked for anew when something is sent
            subprocess.run([*neighbour, "del", *address], capture_output=True, check=False)

    def _shape(self, tc: list[str], device: str, trouble: Trouble) -> None:
        if not trouble.delay_s and not trouble.loss:
            subprocess.run([*tc, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            return
        how = ["delay", f"{trouble.delay_s * 1000:.3f}ms", "loss", f"{100 * trouble.loss:g}%", "limit", "100000"]
        _run([*tc, "qdisc", "replace", "dev", device, "root", "netem", *how])

    def close(self) -> None:
        for host in range(self._hosts):
            self._delete(self._name(host), self._out(host))
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    @staticmethod
    def _delete(namespace: str, link: str) -> None:
        subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def _remove_left(self) -> None:
        """What processes have left that were killed."""
        for place in _MADE.glob("shoal-*-*") if _MADE.is_dir() else ():
            _, pid, host = place.name.split("-")
            if pid.isdigit() and host.isdigit() and not Path(f"/proc/{pid}").exists():
                self._delete(place.name, f"sh{int(pid) % 10**8}-{host}")
                bridge = f"shoal{int(pid) % 10**8}"
                subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)

    def _ip(self, *words: str) -> None:
        _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[:200]
        raise UserError(f"--network namespaces: {' '.join(command)!r} failed: {said}. Use --network relay.")
