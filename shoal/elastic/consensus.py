"""One log on the agents of several hosts: what one has applied, none ever contradicts. Events in, messages out.

Raft (Ongaro and Ousterhout, 2014), with what a run of workers needs of it. An agent that ends may come back under its
number: what it promised and holds is kept (`Keep`) before anybody hears of it. Entries are opaque; `Voters` among them
change who is asked, one agent at a time (Ongaro, 2014, section 4.1), which is how a lost host stops counting. An agent
that would lead first asks whether it could (section 9.6), and one that has heard of its leader lately says no: who
comes back from behind a cut cable does not unseat the leader of all others. Of two voters the one that leads may take
the other one out alone: whoever of them would lead needs its vote.

Time is each agent's own: only differences of one clock are used, so that clocks may be set to anything. An agent has a
*lease* (Gray and Cheriton, 1989) while it knows that a leader, itself led by most, heard it less than LEASE_S ago. A
leader counts an agent as lost after SILENT_S, which is longer: then its lease has run out, whatever it believes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

HEARTBEAT_S = 0.1
ELECTION_S = (0.3, 0.6)  # without a word from a leader, drawn anew each time; a new one is there within two of them
SILENT_S = 2.0  # a leader takes an agent out of the voters when it has said nothing for so long; it may come back
LEASE_S = 1.5  # shorter by more than clocks differ in their rate
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
    sent: float = 0.0  # by the leader's clock
    echo: float | None = None  # the newest `stamp` that the leader has had from this agent
    age: float = 0.0  # seconds for which the leader has not known for sure that most follow it


@dataclass(frozen=True)
class Appended:
    term: int
    sender: int
    ok: bool
    index: int  # ok: the last one that matches; not ok: where the sender's log may match
    stamp: float = 0.0  # by the sender's clock
    echo: float = 0.0  # `sent` of what is answered


Message = AskVote | Vote | Append | Appended


@dataclass(frozen=True)
class Send:
    to: int
    message: Any  # a `Message`; the caller may send others to other agents beside


@dataclass(frozen=True)
class Apply:
    """An entry is committed: every agent applies the same ones, in this order."""

    index: int
    value: Any


@dataclass(frozen=True)
class Keep:
    """To be on disk before what follows is done: the log is now its first ``before`` entries and then ``entries``."""

    term: int
    voted: int | None
    before: int
    entries: tuple[Entry, ...]


Output = Keep | Send | Apply


class Role(Enum):
    follower = "follower"
    candidate = "candidate"
    leader = "leader"


@dataclass
class Agent:
    """One agent's part. ``agents`` are all that the run begins with; the caller hands on messages and ticks.

    One that comes back is made with the ``term``, ``voted`` and ``log`` that it has kept."""

    number: int
    agents: tuple[int, ...]
    random: random.Random
    role: Role = Role.follower
    term: int = 0
    leader: int | None = None
    log: list[Entry] = field(default_factory=list)  # index 1 is log[0]
    committed: int = 0
    applied: int = 0
    voted: int | None = None  # in this term
    lease: float = float("-inf")  # until when this agent surely has not been counted as lost
    _votes: set[int] = field(default_factory=set)
    _trial: bool = False  # they say what would be
    _deadline: float | None = None  # of the next election
    _beat: float = 0.0  # when a leader speaks next
    _heard_leader: float = float("-inf")
    _next: dict[int, int] = field(default_factory=dict)
    _match: dict[int, int] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)  # leader: when each other one last said something
    _stamps: dict[int, float] = field(default_factory=dict)  # leader: the newest of each other one
    _known: dict[int, float] = field(default_factory=dict)  # leader: when it sent what each other one last answered
    _born: float | None = None  # when this process first looked at its clock
    _kept: tuple[int, int | None] = (0, None)
    _same: int = 0  # entries that are on disk as they are here

    _changes: list[int] = field(default_factory=list)  # where the log has `Voters`

    def __post_init__(self) -> None:
        self._kept, self._same = (self.term, self.voted), len(self.log)
        self._changes = [at for at, entry in enumerate(self.log, start=1) if isinstance(entry.value, Voters)]

    # --- what the log says ------------------------------------------------------------------------------------

    @property
    def voters(self) -> tuple[int, ...]:
        """By the newest entry about it, committed or not."""
        if not self._changes:
            return self.agents
        newest: Voters = self.log[self._changes[-1] - 1].value
        return newest.agents

    def _append(self, entry: Entry) -> None:
        self.log.append(entry)
        if isinstance(entry.value, Voters):
            self._changes.append(len(self.log))

    def _cut(self, length: int) -> None:
        """Entries after so many were another leader's, and come to nothing."""
        del self.log[length:]
        self._same = min(self._same, length)
        self._changes = [place for place in self._changes if place <= length]

    def _term_at(self, index: int) -> int:
        return self.log[index - 1].term if index else 0

    def _most(self, agents: set[int]) -> bool:
        voters = self.voters
        return 2 * len(agents & set(voters)) > len(voters)

    # --- events -----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Output]:
        """To be called every few hundredths of a second."""
        return self._keep(self._tick(now))

    def _keep(self, out: list[Output]) -> list[Output]:
        if (self.term, self.voted) == self._kept and self._same == len(self.log):
            return out
        keep = Keep(self.term, self.voted, self._same, tuple(self.log[self._same :]))
        self._kept, self._same = (self.term, self.voted), len(self.log)
        return [keep, *out]

    def _tick(self, now: float) -> list[Output]:
        if self._deadline is None:
            self._deadline, self._born = self._wait(now), now
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
        return True, self._keep(self._add(value, now))

    def _add(self, value: Any, now: float) -> list[Output]:
        self._append(Entry(self.term, value))
        return [*self._replicate(now), *self._advance()]

    def silent(self, now: float) -> tuple[int, ...]:
        """Leader: who has said nothing for so long that its lease has run out."""
        return tuple(a for a, at in self._heard.items() if now - at >= SILENT_S) if self.role is Role.leader else ()

    def known_to_have_ended(self, agent: int) -> bool:
        return self._heard.get(agent) == float("-inf")

    def ended(self, agent: int, now: float) -> None:
        """It is known that the agent's process has ended: nothing is to be waited for."""
        if self.role is Role.leader and agent in self._heard:
            self._heard[agent] = float("-inf")
        elif agent == self.leader:
            self.leader, self._heard_leader = None, float("-inf")
            self._deadline = now + self.random.uniform(0.0, ELECTION_S[0] / 2)

    def _may_change(self, value: Voters) -> bool:
        """One agent at a time, the last change committed, and an entry of this leader's own too."""
        place = self._changes[-1] if self._changes else 0
        own = any(entry.term == self.term for entry in self.log[: self.committed])
        return own and place <= self.committed and len(set(self.voters) ^ set(value.agents)) == 1

    def on(self, message: Message, now: float) -> list[Output]:
        return self._keep(self._on(message, now))

    def _on(self, message: Message, now: float) -> list[Output]:
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
            self.term, self.voted = term, None
        self.role, self._deadline = Role.follower, self._wait(now)

    def _ask(self, now: float, *, trial: bool) -> list[Output]:
        """For votes, for the next term: first whether there would be enough, then for good."""
        self.role, self.leader = Role.candidate, None
        self._votes, self._deadline, self._trial = {self.number}, self._wait(now), trial
        if not trial:
            self.term, self.voted = self.term + 1, self.number
        if self._most(self._votes):
            return self._ask(now, trial=False) if trial else self._win(now)
        last = len(self.log)
        ask = AskVote(self.term + trial, self.number, last, self._term_at(last), trial)
        return [Send(other, ask) for other in self.voters if other != self.number]

    def _on_ask(self, ask: AskVote, now: float) -> list[Output]:
        last = len(self.log)
        newer = (ask.last_term, ask.last_index) >= (self._term_at(last), last)
        if ask.trial and ask.term > self.term:
            return [Send(ask.sender, Vote(ask.term, self.number, newer, True))]
        granted = not ask.trial and ask.term == self.term and self.voted in (None, ask.sender) and newer
        if granted:
            self.voted, self._deadline = ask.sender, self._wait(now)
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
        self._stamps, self._known = {}, {}
        self._append(Entry(self.term, Started(self.number)))
        return [*self._replicate(now), *self._advance()]

    # --- the log ----------------------------------------------------------------------------------------------

    def _lead(self, now: float) -> list[Output]:
        if not self._most({self.number, *(a for a, at in self._heard.items() if now - at < SILENT_S)}):
            alone = Voters((self.number,))
            if len(self.voters) == 2 and self._may_change(alone):
                return self._add(alone, now)  # nobody leads without this one's vote: the other one cannot go on
            self._follow(self.term, now)  # cut off from most: whoever asks this one should ask others
            self.leader = None
            return []
        out: list[Output] = []
        voters = set(self.voters)
        self.lease = max(self.lease, now - self._age(now) + LEASE_S)
        here = {self.number, *(a for a, at in self._heard.items() if now - at < (SILENT_S if a in voters else 0.5))}
        changed = next(iter(sorted(voters ^ here)), None)
        if changed is not None:
            value = Voters(tuple(sorted(voters ^ {changed})))
            out = self._add(value, now) if self._may_change(value) else []
        return out + (self._replicate(now) if now >= self._beat else [])

    def _age(self, now: float) -> float:
        """For how long it has not been known that most follow: since what they have answered was sent."""
        known = {**self._known, self.number: now}
        since = sorted((known.get(voter, float("-inf")) for voter in self.voters), reverse=True)
        return now - since[len(since) // 2]

    def _replicate(self, now: float) -> list[Output]:
        self._beat = now + HEARTBEAT_S
        return [Send(other, self._append_for(other, now)) for other in self.agents if other != self.number]

    def _append_for(self, other: int, now: float) -> Append:
        before = self._next[other] - 1
        entries = tuple(self.log[before : before + MOST_ENTRIES])
        age, echo = self._age(now), self._stamps.get(other)
        if age > LEASE_S:
            age, echo = 0.0, None
        return Append(self.term, self.number, before, self._term_at(before), entries, self.committed, now, echo, age)

    def _on_append(self, append: Append, now: float) -> list[Output]:
        if append.term < self.term:
            return [Send(append.sender, Appended(self.term, self.number, False, 0))]
        self._follow(append.term, now)
        self.leader, self._heard_leader = append.sender, now
        if append.echo is not None and self._born is not None and self._born <= append.echo <= now:
            self.lease = max(self.lease, append.echo - append.age + LEASE_S)
        before = append.before_index
        if before > len(self.log) or self._term_at(before) != append.before_term:
            matches = min(before - 1, len(self.log))
            return [Send(append.sender, Appended(self.term, self.number, False, matches, now, append.sent))]
        for place, entry in enumerate(append.entries, start=before + 1):
            if place <= len(self.log) and self._term_at(place) != entry.term:
                self._cut(place - 1)
            if place > len(self.log):
                self._append(entry)
        last = before + len(append.entries)
        out: list[Output] = [Send(append.sender, Appended(self.term, self.number, True, last, now, append.sent))]
        self.committed = max(self.committed, min(append.committed, last))
        return out + self._apply()

    def _on_appended(self, told: Appended, now: float) -> list[Output]:
        if self.role is not Role.leader or told.term != self.term:
            return []
        self._heard[told.sender] = now
        self._stamps[told.sender] = told.stamp
        self._known[told.sender] = max(self._known.get(told.sender, told.echo), told.echo)
        if not told.ok:
            self._next[told.sender] = max(1, told.index + 1)
            return [Send(told.sender, self._append_for(told.sender, now))]
        self._match[told.sender] = max(self._match[told.sender], told.index)
        self._next[told.sender] = self._match[told.sender] + 1
        out = self._advance()
        if out:  # the others apply at once, too
            return [*out, *self._replicate(now)]
        behind = self._next[told.sender] <= len(self.log)
        return [*out, Send(told.sender, self._append_for(told.sender, now))] if behind else out

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
