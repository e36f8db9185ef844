"""A simulated worker as it stands, and the words that workers say to each other."""

from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.comm.tree import Node
from shoal.elastic import membership as m
from shoal.elastic.simulated_sums import Part

Applied = tuple[int, tuple[int, ...]]  # a step, and the shards that it was made of


class Word(NamedTuple):
    epoch: int
    step: int
    rank: int
    what: str  # offer, post, done
    changes: bool
    nodes: tuple[Node, ...] = ()  # that are offered


@dataclass
class SimWorker:
    seat: int
    state: list[Applied] | None = None
    epoch: int = 0  # 0: in none
    joined: int = 0  # the newest epoch that it has been in
    form: m.Form | None = None
    rank: int = -1
    alive: bool = True
    died_s: float = float("inf")
    stopped: bool = False  # by a signal: it does nothing, and may be thawed
    posts: set[int] = field(default_factory=set)  # ranks whose share of the step under way has come
    dones: set[int] = field(default_factory=set)
    offers: dict[int, tuple[Node, ...]] = field(default_factory=dict)  # by rank, at the beginning of an epoch
    offering: bool = False
    part: Part | None = None  # in the step under way, or in one that was cut short
    early: list[Word] = field(default_factory=list)  # for a step or an epoch that it has not come to
    widowed: set[int] = field(default_factory=set)  # epochs that another member has left
    posted: bool = False
    reduced: bool = False
    changes: bool = False  # it saw, when it began the step, that others are to go on after it
    change_seen: bool = False  # some worker did: all go by that

    @property
    def step(self) -> int:
        return m.FRESH if self.state is None else len(self.state)
