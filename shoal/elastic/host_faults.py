"""Faults that a whole host has, or its links: what rehearsals on several hosts are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.elastic.faults import parts
from shoal.elastic.network import Trouble
from shoal.errors import UserError, unknown_name

DELAY_S, LOSS = 0.02, 0.05
OUT_OF_TOUCH = Trouble(cut=True)
LINKS: Mapping[str, tuple[Trouble, Trouble]] = {  # kind -> what is wrong on the ways from the host, and to it
    "cut": (OUT_OF_TOUCH, OUT_OF_TOUCH),
    "cut-out": (OUT_OF_TOUCH, Trouble()),
    "cut-in": (Trouble(), OUT_OF_TOUCH),
    "delay": (Trouble(delay_s=DELAY_S), Trouble(delay_s=DELAY_S)),
    "loss": (Trouble(loss=LOSS), Trouble(loss=LOSS)),
}
SLOW = ("delay", "loss")
HOST_KINDS = ("kill-host", "stop-host", *LINKS)
LEADER = -1  # whoever leads then


@dataclass(frozen=True)
class HostFault:
    """What happens to a host, or to its links, after a step. ``step`` 0: in its turn."""

    kind: str  # of HOST_KINDS
    host: int  # or LEADER
    step: int = 0

    def __str__(self) -> str:
        where = "the leader" if self.host == LEADER else f"host {self.host}"
        return f"{self.kind} {where}" + (f" after step {self.step}" if self.step else "")

    @staticmethod
    def parse(text: str) -> "HostFault":
        """From "cut-out:host=1,step=5", "kill-host:host=leader". Raises UserError."""
        kind, values = parts(text, HOST_KINDS, ("host", "step"))
        host, step = values.get("host", "0"), values.get("step", "0")
        if not (host.isdecimal() or host == "leader") or not step.isdecimal():
            raise UserError(f"fault {text!r}: write it as cut-out:host=1,step=5, or kill-host:host=leader.")
        return HostFault(kind, LEADER if host == "leader" else int(host), int(step))


def usual_host_faults(hosts: int, kinds: Sequence[str] = HOST_KINDS) -> list[HostFault]:
    """One of each kind, and of those that a leader is lost by one of it too. Raises UserError for unknown ones."""
    for kind in kinds:
        if kind not in HOST_KINDS:
            raise unknown_name("kind of fault", kind, HOST_KINDS, "--kinds")
    faults = [HostFault(kind, number % hosts) for number, kind in enumerate(kinds)]
    return faults + [HostFault(kind, LEADER) for kind in kinds if kind in ("kill-host", "cut")]
