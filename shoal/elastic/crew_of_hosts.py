"""The agent of one host among several: it does what all of them have decided, with the workers that live here."""

import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shoal.comm.agent import Ended, Said
from shoal.comm.heap import heap_file
from shoal.comm.socket_pairs import SocketPairs
from shoal.elastic import fleet as f
from shoal.elastic import frames, roster
from shoal.elastic import membership as m
from shoal.elastic.consensus import Agent, Keep, Send
from shoal.elastic.council import Council, Do, Fence
from shoal.elastic.council import Output as Decided
from shoal.elastic.crew import END_S, ElasticCrew, ElasticJob
from shoal.elastic.epoch_links import EpochLinks, shut
from shoal.elastic.links import Differs, Heard, Linked, Links, NotLinked, Pair, Refused
from shoal.elastic.promises import Promises
from shoal.elastic.replan import named
from shoal.elastic.seat import ROWS
from shoal.errors import UserError
from shoal.run.events import read_events
from shoal.run.run import Run

LINGER_S = 1.0  # an agent that knows of the end stays so long, for those who are to hear of it
ALONE_S = 5.0  # an agent that has had no leader for so long says so: elections take well under one second
REMEMBERED = 200  # lines of the log that a new leader can still write


@dataclass(frozen=True, kw_only=True)
class HostsJob(ElasticJob):
    """``number`` of this agent among the ``addresses``; ``run_dir`` is the same folder on all hosts."""

    number: int
    addresses: tuple[tuple[str, int], ...]
    token: bytes = field(repr=False)
    run_dir: Path
    job: str  # a digest of what is trained, and how
    host: str = ""  # what it is called; "": as its machine

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> Ended:
        try:
            crew = CrewOfHosts(self, launcher, forward)
        except UserError as error:
            return Ended(str(error), user_error=True)
        return crew.run()


class CrewOfHosts(ElasticCrew):
    tick_s = 0.03
    shares = True
    job: HostsJob

    def __init__(self, job: HostsJob, launcher: Connection, forward: Callable[[Any], None]) -> None:
        place = job.run_dir / "agents" / f"{job.number}.log"
        self.heard_s = place.stat().st_mtime if place.exists() else time.time()  # by the clock of the file system
        self.promises = Promises(place, len(job.addresses))
        try:
            self.links = Links(job.number, job.addresses, job.token, job.job)
        except BaseException:
            self.promises.close(forget=False)
            raise
        super().__init__(job, launcher, forward)
        self.host = job.host or self.host
        self.record.run_dir = job.run_dir
        own = random.Random(os.urandom(16))
        numbers = tuple(range(len(job.addresses)))
        kept = self.promises
        raft = Agent(job.number, numbers, own, term=kept.term, voted=kept.voted, log=list(kept.log))
        asked = self.membership
        fleet = f.Fleet(len(numbers), asked.wanted, asked.least, asked.most, job.servers)
        self.council = Council(raft, fleet, own, self.host, wish=roster.wanted_of(job.run_dir).number)
        self.membership = fleet.membership
        self.epoch: EpochLinks | None = None
        self.early: dict[Pair, socket.socket] = {}  # of an epoch that is not known here yet
        self.again: list[Pair] = []  # to be dialled once more
        self.lines: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)  # of the log, written or not
        self.unwritten: list[dict[str, Any]] = []
        self.to_do: deque[Decided] = deque()
        self.gone: set[int] = set()  # agents at whose address nobody listens
        self.led = False
        self.alone_s = time.monotonic()  # since when there has been no leader; inf: that has been told
        self.failing: Ended | None = None
        self.over_s: float | None = None
        self.stop_asked = False

    # --- the loop ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.board.lease(1e-9)  # none yet
        self._holds(self.job.run_dir)

    def _agents(self) -> list[socket.socket]:
        return self.links.sources

    def _hear_agents(self) -> None:
        now = time.monotonic()
        for news in self.links.turn():
            match news:
                case Heard(agent, frames.Paced(step, seconds)):
                    self.gone.discard(agent)
                    self.watch.committed(seconds)
                    self.step = max(self.step, step)
                case Heard(agent, message):
                    self.gone.discard(agent)
                    self._carry_out(self.council.on(message, now))
                case Refused(agent):
                    self.gone.add(agent)
                    self.council.ended(agent, now)
                case Linked(pair, link):
                    self._linked(pair, link)
                case NotLinked(pair):
                    self.again.append(pair)
                case Differs(agent):
                    self._is_at_odds_with(agent)
        self._carry_out(self.council.tick(now))
        self.board.lease(self.council.raft.lease if self.council.holds(now) else 1e-9)
        if self.stop_asked:
            self.stop_asked = False
            self._carry_out(self.council.want(f.Wished(self.council.fleet.wish + 1, 0, "all", ""), now))
        if self.council.leads and not self.led:
            self.unwritten = self._what_nobody_told()
            self._write_roster()
        self._look_for_a_leader(now)
        self.led = self.council.leads
        if not self.led:
            self.unwritten.clear()
        elif self.council.holds(now):
            for line in self.unwritten:
                self.record.tell(line)
            self.unwritten.clear()

    def _look_for_a_leader(self, now: float) -> None:
        """Without one nothing is decided and nobody trains: whoever watches is told once what is waited for."""
        if self.council.raft.leader is not None or self._knows_the_end():
            self.alone_s = now
        elif now - self.alone_s > ALONE_S and self.council.fleet.begun:
            self.alone_s, voters = float("inf"), self.council.raft.voters
            why = (
                f"the agent of {self.host} hears of no leader: of the {len(voters)} agents that count, more than half "
                f"have to answer each other: start the same command again on hosts that are lost"
            )
            self._tell(m.Tell("paused", why, ALONE_S))

    def _is_at_odds_with(self, agent: int) -> None:
        """Who has not begun gives up; a run that trains goes on without."""
        if not self.council.fleet.begun:
            what = "with another recipe, plan, --workers, --min-workers or --agents than this one"
            self.fail(f"agent {agent} was started {what}: give all hosts the same.", user_error=True)

    def ask_stop(self) -> None:
        self.board.ask_stop()
        self.stop_asked = True

    def _over(self) -> bool:
        if not self._knows_the_end() and not self._missed_the_end():
            return False
        now = time.monotonic()
        self.over_s = self.over_s or now
        if self.processes and self.failing is None and now - self.over_s < END_S:
            return False
        if now - self.over_s < LINGER_S and len(self.gone) < len(self.job.addresses) - 1:
            return False
        if self.failing is not None:
            self.failure = self.failing
        elif self.ended_s is None:
            self._result_of_others()
        return True

    def _knows_the_end(self) -> bool:
        return self.failing is not None or self.membership.finished or self.ended_s is not None

    def _missed_the_end(self) -> bool:
        """All others have gone, and the run has got its result while this agent was away."""
        took_part = self.council.fleet.begun or self.promises.log
        if len(self.gone) < len(self.job.addresses) - 1 or self.council.leads or not took_part:
            return False
        with suppress(OSError):
            return (self.job.run_dir / "result.json").stat().st_mtime > self.heard_s
        return False

    def _result_of_others(self) -> None:
        """No worker that lives here was a member when the run ended: its result is in the run directory."""
        result = Run(self.job.run_dir).result
        if result is None:
            self.failure = Ended(
                "the run ended on other hosts, and its directory has no result: is it the same folder?"
            )
        else:
            self.forward(Said(0, "result", result))

    def _leave(self) -> None:
        if self.epoch:
            self.epoch.hang_up()
        for link in self.early.values():
            link.close()
        ended = self._knows_the_end() or self._missed_the_end()
        if ended:
            self.record.end()
        else:
            self.record.close_log()  # the others go on
        self.links.close()
        self.promises.close(forget=ended)

    # --- what is decided --------------------------------------------------------------------------------------

    def _decide(self, event: m.Event) -> None:
        assert not isinstance(event, m.Resize | m.Rebalance)
        self._say(event)

    def _say(self, event: f.Event) -> None:
        self._carry_out(self.council.say(event, time.monotonic()))

    def _carry_out(self, outputs: Sequence[Decided]) -> None:
        """One after the other, also where doing one leads to more."""
        busy = bool(self.to_do)
        self.to_do.extend(outputs)
        while self.to_do and not busy:
            match self.to_do[0]:
                case Keep() as keep:
                    try:
                        self.promises.keep(keep)
                    except OSError as error:
                        self.fail(f"the agent of {self.host} cannot keep its promises: {error}")
                        self.to_do.clear()
                        return
                case Send(to, message):
                    self.links.send(to, message)
                case Fence():
                    self._give_up_workers()
                case Do(index, instructions):
                    for place, instruction in enumerate(instructions):
                        self._do_one(index * 1000 + place, instruction)
                    if instructions:
                        self._write_roster()
            self.to_do.popleft()

    def _do_one(self, entry: int, instruction: f.Instruction) -> None:
        match instruction:
            case m.Fork(seat):
                if self.council.fleet.homes.get(seat) == self.council.me:
                    self._say(f.Forked(seat, self.processes.fork(seat)))
            case m.Kill(seat) | m.Release(seat):
                if seat in self.processes:
                    self._do([instruction])
            case m.Break():
                self._do([instruction])
                self.begun = max(self.begun, self.step + 1)
                if self.epoch:
                    self._order_all(self.epoch)
                    self.epoch.hang_up()
            case m.Tell():
                line = self._line(entry, instruction)
                self.lines.append(line)
                self.unwritten.append(line)
            case m.GiveUp(why):
                self._fail_all(Ended(why))
            case f.Fail(line, user_error, trace):
                self._fail_all(Ended(line, user_error, trace))
            case f.Stop():
                self.board.ask_stop()
            case _:
                self._do([instruction])

    def _fail_all(self, failure: Ended) -> None:
        self.failing = self.failing or failure
        if self.council.leads:
            self.record.tell({"event": "failed", "step": self.step, "why": failure.failure, "trace": failure.trace})

    def _give_up_workers(self) -> None:
        """The others have counted this host as lost, and go on without: nothing of its past may act any more."""
        self.board.lease(1e-9)
        self.processes.end_all()
        if self.epoch:
            self.epoch.hang_up()
            self.epoch = None

    # --- epochs over several hosts ----------------------------------------------------------------------------

    def _form(self, form: m.Form) -> None:
        self.board.call_broken(False)
        self.board.ask_change(False)
        self.pace.changed()
        self.servers = self.council.fleet.servers
        self.formation = self._formation(len(form.seats))
        if self.epoch:
            self.epoch.hang_up()
        own = {rank: seat for rank, seat in enumerate(form.seats) if seat in self.processes}
        lives = [self.council.fleet.homes.get(seat) for seat in form.seats]
        self.epoch = epoch = EpochLinks(form, own, set(), [life[0] if life else -1 for life in lives])
        for rank, seat in own.items():
            self.processes[seat].name = named(rank, self.formation.workers)
            epoch.missing.update(epoch.pairs(rank))
        self.again.clear()
        for pair in [pair for pair in self.early if pair.epoch <= form.epoch]:
            link = self.early.pop(pair)
            if pair in epoch.missing:
                self._linked(pair, link)
            else:
                link.close()
        for pair in [pair for pair in epoch.missing if pair.low in own]:
            self._dial(pair)
        if not epoch.missing:
            self._order_all(epoch)

    def _dial(self, pair: Pair) -> None:
        assert self.epoch is not None
        home = self.council.fleet.homes.get(self.epoch.form.seats[pair.high])
        if home is not None and home[0] != self.job.number:
            self.links.dial(home[0], pair)

    def _linked(self, pair: Pair, link: socket.socket) -> None:
        epoch = self.epoch
        if epoch is not None and pair in epoch.missing:
            epoch.missing.discard(pair)
            epoch.far[pair] = link
            if not epoch.missing:
                self._order_all(epoch)
        elif pair.epoch > self.membership.epoch and len(self.early) < 1 << 12:
            self.early[pair] = link
        else:
            link.close()

    def _order_all(self, epoch: EpochLinks) -> None:
        """Every worker of this host gets its place; where a socket is not there, one whose other end is closed."""
        if epoch.ordered:
            return
        epoch.ordered = True
        epoch.missing.clear()
        heap, own = heap_file(), sorted(epoch.own)
        wired = len(own) < len(epoch.form.seats) or self.formation.servers > 0
        made_arenas = [a for s in epoch.own.values() if s in self.processes for a in self.processes[s].arena[:1]]
        arenas = made_arenas if not wired and len(made_arenas) == len(own) else []
        dead, other_end = socket.socketpair()
        other_end.close()
        run = str(self.job.run_dir) if self.council.fleet.made else ""
        with SocketPairs(own) as near:
            for rank in own:
                others = [other for other in range(len(epoch.form.seats)) if other != rank]
                sockets = [
                    near.end(rank, other)
                    if other in epoch.own
                    else epoch.far.get(Pair(epoch.form.epoch, min(rank, other), max(rank, other)), dead)
                    for other in others
                ]
                terms = {"run": run, "arenas": bool(arenas), "wired": wired, "homes": epoch.homes}
                order = {**self._terms(epoch.form, rank), **terms}
                files = [heap, self.mirror, *arenas, *(each.fileno() for each in sockets)]
                self.processes.order(epoch.own[rank], order, files)
        dead.close()
        os.close(heap)

    def _ended(self, seat: int) -> None:
        """Those who waited for it are woken, before anybody decides anything."""
        if self.epoch:
            for rank, other in self.epoch.own.items():
                for pair in self.epoch.pairs(rank) if other == seat else []:
                    if pair in self.epoch.far:
                        shut(self.epoch.far.pop(pair))
        super()._ended(seat)

    # --- what workers say, and what is seen -------------------------------------------------------------------

    def _on_event(self, event: dict[str, Any]) -> None:
        super()._on_event(event)
        if event.get("event") == "committed":
            for other in range(len(self.job.addresses)):
                if other != self.job.number:
                    self.links.send(other, frames.Paced(event["step"], event["seconds"]))

    def _failed(self, seat: int, said: Said) -> None:
        where = f"{self._name(seat)} failed at {self.board.read(seat % ROWS)}"
        if self.membership.epoch and seat not in self.membership.members:
            self._decide(m.Dead(seat, f"{where}: {said.value}"))
            return
        user_error = said.kind == "user_error"
        self._say(f.Failed(seat, said.value if user_error else f"{where}: {said.value}", user_error, said.trace))

    def _know(self, seat: int, path: Path) -> None:
        self._say(f.Made(seat))

    def _look(self) -> None:
        super()._look()
        again, self.again = self.again, []
        for pair in again:
            if self.epoch is not None and pair in self.epoch.missing:
                self._dial(pair)

    def _listen_to_wishes(self) -> None:
        wanted = roster.wanted_of(self.job.run_dir)
        if self.council.leads and wanted.number > self.council.fleet.wish:
            wished = f.Wished(wanted.number, wanted.workers, wanted.drain, wanted.why, wanted.servers)
            self._carry_out(self.council.want(wished, time.monotonic()))

    # --- what is told: by the leader, for all -----------------------------------------------------------------

    def _line(self, entry: int, tell: m.Tell) -> dict[str, Any]:
        fleet = self.council.fleet
        who = [{"pid": fleet.pids.get(s), "rank": fleet.rank(s), "host": fleet.host(s)} for s in tell.seats]
        return {
            "event": tell.event,
            "step": max(self.step, self.membership.step, 0),
            "why": tell.why,
            "cost_s": round(tell.cost_s, 6),
            "membership": self.membership.epoch,
            "entry": entry,
            "host": fleet.host(tell.seats[0]) if tell.seats else self.host,
            "processes": who,
            **({"redone": max(0, self.begun - self.membership.step + 1)} if tell.event == "recovered" else {}),
            **dict(tell.more),
        }

    def _what_nobody_told(self) -> list[dict[str, Any]]:
        """The last leader may have ended between a decision and its line."""
        log = read_events(self.job.run_dir / "events.jsonl")
        told = {(event["entry"], event["why"]) for event in log if "entry" in event}
        return [line for line in self.lines if (line["entry"], line["why"]) not in told]

    def _tell(self, tell: m.Tell) -> None:
        """What an agent sees of its own workers, and nothing is decided about."""
        self.record.tell(self._line(0, tell))

    def _write_roster(self) -> None:
        if not self.council.leads:
            return
        fleet, shards = self.council.fleet, self.formation.owned
        if len(shards) != len(self.membership.members):
            return
        entries = [
            roster.Entry(fleet.pids[seat], rank, fleet.host(seat), list(shards[rank]), self.membership.epoch)
            for rank, seat in enumerate(self.membership.members)
            if seat in self.membership.seats and seat in fleet.pids
        ]
        self.record.write_roster(entries)

    def _close_own(self) -> None:
        super()._close_own()
        self.links.close()
        for link in (*self.early.values(), *(self.epoch.far.values() if self.epoch else ())):
            link.close()
        self.promises.close(forget=False)
