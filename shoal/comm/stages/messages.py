"""What a stage says to another, whatever carries it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from shoal.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

    from shoal.comm.group import Group

Key = tuple[int, ...]  # which message of a step it is, as sender and receiver know it
Following = Callable[[int], tuple[Key, dict[str, Any]]]
SEND, RECEIVE = "stage send", "stage receive"  # operations in the counters


class StageMessages(Protocol):
    """Messages between the workers of a group. Those from one worker arrive in the order in which it sent them."""

    waited_s: float  # how long this worker has stood still for messages, in all

    def send(self, to: int, key: Key, values: Mapping[str, Any]) -> None:
        """Hand over values: tensors, numbers, text, None, and tuples, lists and dicts of them.

        Does not wait for the receiver to ask for them. The memory of the tensors must not be written to afterwards."""

    def receive(self, origin: int, key: Key) -> dict[str, Any]:
        """The values of a message; waits for it, and says so. Tensors have no history, and require a gradient where the
        sender's did. Their memory must not be written to."""

    def settle(self) -> None:
        """At the end of a step. Raises RunFailed when there are messages that nobody asked for."""


class Unasked:
    """Messages that came before the one that was asked for."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Key], dict[str, Any]] = {}

    def until(self, origin: int, key: Key, following: Following) -> dict[str, Any]:
        """The values of the message that is asked for: kept from before, or brought by ``following``, which gives
        what rank ``origin`` sent next. What comes before it is kept."""
        found = self.kept(origin, key)
        while found is None:
            got, values = following(origin)
            if got == key:
                found = values
            else:
                self.keep(origin, got, values)
        return found

    def kept(self, origin: int, key: Key) -> dict[str, Any] | None:
        """The values of a message that came before it was asked for, once."""
        return self._kept.pop((origin, key), None)

    def keep(self, origin: int, key: Key, values: dict[str, Any]) -> None:
        self._kept[origin, key] = values

    def check_none(self) -> None:
        if self._kept:
            origin, key = next(iter(self._kept))
            raise RunFailed(
                f"{len(self._kept)} messages between stages were not asked for, the first one {key} from stage "
                f"{origin}: the workers do not run the same schedule"
            )


def make_messages(group: "Group", device: "torch.device", *, ahead: int = 0) -> StageMessages:
    """Called by all workers of the group, as often as each other: every call makes a lane of its own.

    ``ahead``: of messages to one worker over torch.distributed, how many may be under way; a send waits for older ones,
    which is safe where messages are known not to deadlock with unbuffered sends. 0: any number."""
    from shoal.comm.group import HostGroup

    if isinstance(group, HostGroup):
        from shoal.comm.stages.host import HostMessages

        return HostMessages(group)
    from shoal.comm.distributed import DistributedGroup
    from shoal.comm.stages.distributed import DistributedMessages
    from shoal.comm.stages.sockets import SocketMessages
    from shoal.comm.wired import WiredGroup

    if isinstance(group, WiredGroup):
        return SocketMessages(group)

    if not isinstance(group, DistributedGroup):
        raise UserError(f"no messages between stages go over a {type(group).__name__}.")
    return DistributedMessages(group, device, ahead)
