"""What a transport promises, and how the steps of a rank are driven over it.

A rank's work is a generator: it posts the messages of a round, yields what is pending, and goes on when it is done.
Over a real transport `drive` waits for each; the loopback has the generators of all ranks take turns in virtual time.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Message(NamedTuple):
    peer: int  # rank
    data: "Tensor"  # contiguous; both ends give as many bytes
    lane: int = 0


class Pending(Protocol):
    def wait(self) -> None:
        """Returns when all messages of the round are done: what was sent may be overwritten, what was received read.

        Raises RunFailed naming the peer when one could not be carried out."""


class Transport(Protocol):
    """One rank's end. Messages from a rank to another on one lane arrive in the order in which they were posted.

    Any number may be posted before they are waited for. A send need not be done before the peer receives it."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def lanes(self) -> int:
        """Lanes 0 to lanes - 1 may be named in messages."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Begin a round; returns at once. No message may be sent to oneself."""

    def worked(self, reduced: int, copied: int) -> None:
        """The rank has added and copied so many bytes: where time is virtual, it passes."""


Steps = Generator[Pending, None, T]


def drive(steps: Steps[T]) -> T:
    """Carry out the steps of one rank over a transport that really waits; what they return."""
    try:
        while True:
            next(steps).wait()
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        steps.close()
