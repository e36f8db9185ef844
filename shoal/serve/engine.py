"""The seam between the HTTP side and a model process: the messages that travel, and what an engine must offer.

A model process holds one end of a socket pair that its parent made (no path leads to it) and runs one engine. Both
sides send frames: an unsigned 32-bit little-endian length, then a msgpack array of the messages below (never pickle).
One frame holds whatever is ready at that moment, so that a batch of answers costs one write. All times are seconds of
CLOCK_MONOTONIC, which every process of a host shares.

    HTTP side -> engine     Request, Cancel
    engine -> HTTP side     Begun, Item, Result, Failed, Figures

A request is answered by exactly one Result or Failed, after any number of Items (the pieces of a stream). Nothing is
told about a request after its Cancel has been read. When a model process dies, its open requests are sent to another
one: those that it was working on (named by its last Begun) with ``attempt`` one higher, and with the items that their
client has already seen as ``reached``; the new engine goes on after the last of these and does not tell them again.
"""

from collections.abc import Mapping, Sequence
from socket import socket
from typing import Any, Literal, Protocol

import msgspec

Kind = Literal["predict", "embed", "generate"]
FIGURES_EVERY_S = 1.0  # between two Figures of an engine, at least


class Request(msgspec.Struct, tag="request", array_like=True, frozen=True):
    id: int  # unique among the requests of the HTTP side
    kind: Kind
    payload: msgspec.Raw  # msgpack of the kind's own struct: shoal.serve.payloads, shoal.serve.generation
    cost: int  # work it makes, in tokens (text) or samples (the rest), as far as the HTTP side can tell
    arrived: float
    deadline: float  # nobody waits for it any more after this time: drop it with Failed 504
    priority: int = 0  # higher goes first
    client: str = ""  # who shares a prefix cache with whom: derived from the API key, never from the request's text
    attempt: int = 0  # how many model processes have died while they worked on it
    reached: tuple[msgspec.Raw, ...] = ()  # payloads of the items told so far


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    id: int


class Begun(msgspec.Struct, tag="begun", array_like=True, frozen=True):
    """The requests that are being worked on from now on, instead of those before. Told before the work, so that the
    HTTP side knows whom to suspect if the process dies, and since when it has been busy with one thing.

    An engine that works in batches tells at the end of each, too, and ``at`` which times: the HTTP side may hear of
    both late, and foretells from them how long the next ones will take."""

    ids: tuple[int, ...]
    at: float = 0.0


class Item(msgspec.Struct, tag="item", array_like=True, frozen=True):
    id: int
    payload: msgspec.Raw


class Result(msgspec.Struct, tag="result", array_like=True, frozen=True):
    id: int
    payload: msgspec.Raw


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    id: int
    status: int  # as in HTTP: 4xx: the request cannot be served; 5xx: the model could not
    why: str  # one line, without the request's text


class Figures(msgspec.Struct, tag="figures", array_like=True, frozen=True):
    """What /metrics shows of this process: name -> value now (a gauge) or since its start (a name in _total).

    Told at most every FIGURES_EVERY_S, and only after work: an idle engine has no timer."""

    values: Mapping[str, float]


ToEngine = Request | Cancel
FromEngine = Begun | Item | Result | Failed | Figures


class Tell(Protocol):
    def __call__(self, messages: Sequence[FromEngine]) -> None:
        """Sends them at once, as one frame, in order."""


class Engine(Protocol):
    """Runs in the model process's only thread, which does nothing else than read messages and call it.

    It is made after the fork, with the model, the description of what is served, its options and ``tell``."""

    def add(self, request: Request) -> None:
        """A request has come. What it cannot take is told as Failed, not raised."""

    def cancel(self, id: int) -> None:
        """The client has left. Unknown ids are ignored: the answer was under way."""

    def next_at(self, now: float) -> float | None:
        """When ``work`` has something to do: at or before ``now``: at once; None: not before another message comes."""

    def work(self, now: float) -> None:
        """One turn: one batch, or one step of all running generations. Tells what came of it."""


class GroupEngine(Engine, Protocol):
    """The engine of a leader: it computes a part, and others of its group the rest."""

    sockets: Sequence[socket | int]  # files, readable when somebody of the group has said something

    def hear(self) -> None:
        """Takes in what the others have done, without waiting. Raises PeerLost. Called ahead of every wait."""


class EngineModule(Protocol):
    """``shoal.serve.single_pass`` and ``shoal.serve.generation.engine``."""

    def prepare(self, model: Any, options: Mapping[str, Any]) -> None:
        """Once, in the parent of the model processes: what is made of the weights here, all of them share."""

    def open_engine(self, model: Any, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell) -> Engine:
        """In a model process."""


class Split(Protocol):
    """A model that was made ready for groups, in the parent of the model processes."""

    bytes: int  # of the weights of all places, once


class GroupModule(Protocol):
    """``shoal.serve.groups.single_pass`` and ``shoal.serve.groups.generation``."""

    def split(self, model: Any, plan: Any, facts: Mapping[str, Any], options: Mapping[str, Any]) -> Split:
        """Once, in the parent. Raises UserError for what cannot be split as the plan says."""

    def open_leader(
        self, split: Any, seat: Any, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell
    ) -> GroupEngine:
        """In the process of a group that has the link to the HTTP side."""

    def follow(self, split: Any, seat: Any, facts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """The whole life of each of the others. Raises PeerLost at its end."""
