"""One log on the agents of several hosts: what one has applied, none ever contradicts. Events in, messages out.

Raft (Ongaro and Ousterhout, 2014), with what a run of workers needs of it. An agent that ends never comes back under
its number, so nothing is kept on disk. Entries are opaque; `Voters` among them change who is asked, one agent at a time
(Ongaro, 2014, section 4.1), which is how a lost host stops counting. An agent that would lead first asks whether it
could (section 9.6), and one that has heard of its leader lately says no: who comes back from behind a cut cable does
not unseat the leader of all others.

Time is each agent's own: only differences of one clock are used, so that clocks may be set to anything.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

HEARTBEAT_S = 0.1
ELECTION_S = (0.3, 0.6)  # without a word from a leader, drawn anew each time; a new one is there within two of them
SILENT_S = 2.0  # a leader takes an agent out of the voters when it has said nothing for so long; it may come back
MOST_ENTRIES = 64  # of one message


@dataclass(frozen=True)
class Voters:
    """An entry: from here on these agents decide."""

    agents: tuple[int, ...]


@dataclass(frozen=True)
class Started:
    """An entry: the first one of every leader; what came before is committed with it."""

    leader: int


@dataclass(frozen=True)
class Entry:
    term: int
    value: Any


# --- messages: (term, sender) and what is asked ---------------------------------------------------------------------


@dataclass(frozen=True)
class AskVote:
    term: int
    sender: int
    last_index: int
    last_term: int
    trial: bool  # it only wants to know whether it would get the vote


@dataclass(frozen=True)
class Vote:
    term: int
    sender: int
    granted: bool
    trial: bool


@dataclass(frozen=True)
class Append:
    term: int
    sender: int
    before_index: int  # of the entry that comes before the first one here; 0: none
    before_term: int
    entries: tuple[Entry, ...]
    committed: int


@dataclass(frozen=True)
class Appended:
    term: int
    sender: int
    ok: bool
    index: int  # ok: the last one that matches; not ok: where the sender's log may match


Message = AskVote | Vote | Append | Appended


@dataclass(frozen=True)
class Send:
    to: int
    message: Message


@dataclass(frozen=True)
class Apply:
    """An entry is committed: every agent applies the same ones, in this order."""

    index: int
    value: Any


Output = Send | Apply


class Role(Enum):
    follower = "follower"
    candidate = "candidate"
    leader = "leader"


@dataclass
class Agent:
    """One agent's part. ``agents`` are all that the run begins with; the caller hands on messages and ticks."""

    number: int
    agents: tuple[int, ...]
    random: random.Random
    role: Role = Role.follower
    term: int = 0
    leader: int | None = None
    log: list[Entry] = field(default_factory=list)  # index 1 is log[0]
    committed: int = 0
    applied: int = 0
    _voted: int | None = None  # in this term
    _votes: set[int] = field(default_factory=set)
    _trial: bool = False  # they say what would be
    _deadline: float | None = None  # of the next election
    _beat: float = 0.0  # when a leader speaks next
    _heard_leader: float = float("-inf")
    _next: dict[int, int] = field(default_factory=dict)
    _match: dict[int, int] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)  # leader: when each other one last said something

    # --- what the log says ------------------------------------------------------------------------------------

    @property
    def voters(self) -> tuple[int, ...]:
        """By the newest entry about it, committed or not."""
        return self._voters_at(len(self.log))[1]

    def _voters_at(self, index: int) -> tuple[int, tuple[int, ...]]:
        for place in range(index, 0, -1):
            value = self.log[place - 1].value
            if isinstance(value, Voters):
                return place, value.agents
        return 0, self.agents

    def _term_at(self, index: int) -> int:
        return self.log[index - 1].term if index else 0

    def _most(self, agents: set[int]) -> bool:
        voters = self.voters
        return 2 * len(agents & set(voters)) > len(voters)

    # --- events -----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Output]:
        """To be called every few hundredths of a second."""
        if self._deadline is None:
            self._deadline = self._wait(now)
        if self.role is Role.leader:
            return self._lead(now)
        if now >= self._deadline and self.number in self.voters:
            return self._ask(now, trial=True)
        return []

    def propose(self, value: Any, now: float) -> tuple[bool, list[Output]]:
        """Whether this agent leads and has taken the value into its log: committed, or lost with its leadership."""
        if self.role is not Role.leader:
            return False, []
        if isinstance(value, Voters) and not self._may_change(value):
            return False, []
        self.log.append(Entry(self.term, value))
        return True, [*self._replicate(now), *self._advance()]

    def _may_change(self, value: Voters) -> bool:
        """One agent at a time, the last change committed, and an entry of this leader's own too."""
        place, voters = self._voters_at(len(self.log))
        own = any(entry.term == self.term for entry in self.log[: self.committed])
        return own and place <= self.committed and len(set(voters) ^ set(value.agents)) == 1

    def on(self, message: Message, now: float) -> list[Output]:
        if isinstance(message, AskVote) and (self.role is Role.leader or now - self._heard_leader < ELECTION_S[0]):
            return []  # there is a leader: whoever asks has been away
        trial = isinstance(message, AskVote | Vote) and message.trial
        if message.term > self.term and not trial:
            self._follow(message.term, now)
        match message:
            case AskVote():
                return self._on_ask(message, now)
            case Vote():
                return self._on_vote(message, now)
            case Append():
                return self._on_append(message, now)
            case Appended():
                return self._on_appended(message, now)

    # --- elections --------------------------------------------------------------------------------------------

    def _wait(self, now: float) -> float:
        return now + self.random.uniform(*ELECTION_S)

    def _follow(self, term: int, now: float) -> None:
        if term > self.term:
            self.term, self._voted = term, None
        self.role, self._deadline = Role.follower, self._wait(now)

    def _ask(self, now: float, *, trial: bool) -> list[Output]:
        """For votes, for the next term: first whether there would be enough, then for good."""
        self.role, self.leader = Role.candidate, None
        self._votes, self._deadline, self._trial = {self.number}, self._wait(now), trial
        if not trial:
            self.term, self._voted = self.term + 1, self.number
        if self._most(self._votes):
            return self._ask(now, trial=False) if trial else self._win(now)
        last = len(self.log)
        ask = AskVote(self.term + trial, self.number, last, self._term_at(last), trial)
        return [Send(other, ask) for other in self.voters if other != self.number]

    def _on_ask(self, ask: AskVote, now: float) -> list[Output]:
        last = len(self.log)
        newer = (ask.last_term, ask.last_index) >= (self._term_at(last), last)
        if ask.trial:
            return [Send(ask.sender, Vote(ask.term, self.number, newer and ask.term > self.term, True))]
        granted = ask.term == self.term and self._voted in (None, ask.sender) and newer
        if granted:
            self._voted, self._deadline = ask.sender, self._wait(now)
        return [Send(ask.sender, Vote(self.term, self.number, granted, False))]

    def _on_vote(self, vote: Vote, now: float) -> list[Output]:
        wanted = self.role is Role.candidate and vote.trial == self._trial and vote.term == self.term + vote.trial
        if not (wanted and vote.granted):
            return []
        self._votes.add(vote.sender)
        if not self._most(self._votes):
            return []
        return self._ask(now, trial=False) if vote.trial else self._win(now)

    def _win(self, now: float) -> list[Output]:
        self.role, self.leader = Role.leader, self.number
        others = [agent for agent in self.agents if agent != self.number]
        self._next = dict.fromkeys(others, len(self.log) + 1)
        self._match = dict.fromkeys(others, 0)
        self._heard = dict.fromkeys(others, now)
        self.log.append(Entry(self.term, Started(self.number)))
        return [*self._replicate(now), *self._advance()]

    # --- the log ----------------------------------------------------------------------------------------------

    def _lead(self, now: float) -> list[Output]:
        if not self._most({self.number, *(a for a, at in self._heard.items() if now - at < SILENT_S)}):
            self._follow(self.term, now)  # cut off from most: whoever asks this one should ask others
            self.leader = None
            return []
        out: list[Output] = []
        voters = set(self.voters)
        here = {self.number, *(a for a, at in self._heard.items() if now - at < (SILENT_S if a in voters else 0.5))}
        changed = next(iter(sorted(voters ^ here)), None)
        if changed is not None:
            _, out = self.propose(Voters(tuple(sorted(voters ^ {changed}))), now)
        return out + (self._replicate(now) if now >= self._beat else [])

    def _replicate(self, now: float) -> list[Output]:
        self._beat = now + HEARTBEAT_S
        return [Send(other, self._append_for(other)) for other in self.agents if other != self.number]

    def _append_for(self, other: int) -> Append:
        before = self._next[other] - 1
        entries = tuple(self.log[before : before + MOST_ENTRIES])
        return Append(self.term, self.number, before, self._term_at(before), entries, self.committed)

    def _on_append(self, append: Append, now: float) -> list[Output]:
        if append.term < self.term:
            return [Send(append.sender, Appended(self.term, self.number, False, 0))]
        self._follow(append.term, now)
        self.leader, self._heard_leader = append.sender, now
        before = append.before_index
        if before > len(self.log) or self._term_at(before) != append.before_term:
            return [Send(append.sender, Appended(self.term, self.number, False, min(before - 1, len(self.log))))]
        for place, entry in enumerate(append.entries, start=before + 1):
            if place <= len(self.log) and self._term_at(place) != entry.term:
                del self.log[place - 1 :]
            if place > len(self.log):
                self.log.append(entry)
        last = before + len(append.entries)
        out: list[Output] = [Send(append.sender, Appended(self.term, self.number, True, last))]
        self.committed = max(self.committed, min(append.committed, last))
        return out + self._apply()

    def _on_appended(self, told: Appended, now: float) -> list[Output]:
        if self.role is not Role.leader or told.term != self.term:
            return []
        self._heard[told.sender] = now
        if not told.ok:
            self._next[told.sender] = max(1, told.index + 1)
            return [Send(told.sender, self._append_for(told.sender))]
        self._match[told.sender] = max(self._match[told.sender], told.index)
        self._next[told.sender] = self._match[told.sender] + 1
        out = self._advance()
        behind = self._next[told.sender] <= len(self.log)
        return [*out, Send(told.sender, self._append_for(told.sender))] if behind else out

    def _advance(self) -> list[Output]:
        """Commit what most hold: only entries of this term by counting, older ones with them (section 5.4.2)."""
        for index in range(len(self.log), self.committed, -1):
            holders = {self.number, *(agent for agent, match in self._match.items() if match >= index)}
            if self._term_at(index) == self.term and self._most(holders):
                self.committed = index
                break
        return self._apply()

    def _apply(self) -> list[Output]:
        found: Sequence[Entry] = self.log[self.applied : self.committed]
        first, self.applied = self.applied + 1, self.committed
        return [Apply(index, entry.value) for index, entry in enumerate(found, start=first)]
