"""The agent's side of an elastic run: forks workers, tells them their places, and does what the decider says."""

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from shoal.comm.agent import STOP, Ended, Said, killer_of
from shoal.comm.heap import anonymous_file, heap_file
from shoal.comm.socket_pairs import SocketPairs
from shoal.comm.status import StatusBoard
from shoal.elastic import membership as m
from shoal.elastic import roster
from shoal.elastic.faults import Noticed
from shoal.elastic.forks import Forks
from shoal.elastic.kernel import look
from shoal.elastic.pace import Pace
from shoal.elastic.process import Program
from shoal.elastic.record import Record
from shoal.elastic.replan import MOST_SERVERS, MOST_WORKERS, Formation, formation_for, named
from shoal.elastic.seat import DRAINS, ROWS
from shoal.elastic.waste import Waste
from shoal.elastic.watch import Watch
from shoal.errors import UserError
from shoal.run.hold import Hold

POLL_S = 0.1  # between two looks at positions and at wanted.json
MOST_ACCUSED = 8  # workers that a run parts from because they were wrong: more of them are no chance
END_S = 10.0  # how long workers may take to leave once the run has its result


@dataclass(frozen=True, kw_only=True)
class ElasticJob(Program):
    """What the launcher sends to the agent: see `shoal.comm.agent.Job`."""

    workers: int
    least: int
    shards: int
    hang_after_s: float
    rebalance: bool = False  # move shards away from slow workers
    depth: int = 1  # stages that the plan cuts the model into
    servers: int = 0  # parameter servers beside the workers
    outlives: bool = True  # a launcher that was killed: a rehearsal ends with it
    run_dir: Path | None = None  # None: the first worker makes one

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> Ended:
        return ElasticCrew(self, launcher, forward).run()


class ElasticCrew:
    tick_s = POLL_S  # the longest that it may look at nothing
    shares = False  # the run directory, with the agents of other hosts

    def __init__(self, job: ElasticJob, launcher: Connection, forward: Callable[[Any], None]) -> None:
        self.job, self.launcher, self._forward = job, launcher, forward
        self.orphaned = False  # the launcher was killed
        self.hold = Hold(shared=self.shares)  # this process's, since the launcher may end before the run
        self.host = socket.gethostname()
        self.board_file = anonymous_file(StatusBoard.SIZE)
        self.mirror = heap_file()  # what workers hold alone lies here too: see `shoal.elastic.mirror`
        self.board = StatusBoard(self.board_file, ROWS)
        self.servers = job.servers  # that are wanted: they sit on seats like workers
        most = min(job.shards * job.depth, MOST_WORKERS) + (MOST_SERVERS if job.servers else 0)
        self.membership = m.Membership(job.workers + job.servers, job.least + min(job.servers, 1), most)
        self.processes = Forks(job, self.board, self._close_own)
        self.record = Record(lambda event: self.forward(Said(0, "event", event)))
        self.watch = Watch(job.hang_after_s)
        self.pace, self.waste = Pace(), Waste((), 0, 0.0)
        self.formation = Formation(())
        self.failure: Ended | None = None
        self.ended_s: float | None = None  # when the run got its result
        self.noticed = Noticed(job.faults, self.board)  # faults of a rehearsal
        self.accused = 0  # workers that computed or held something wrong
        self.wish = 0  # the number of the last wish that was heard
        self.begun = 0  # the step that was under way when the last epoch broke
        self.shards: dict[str, int] = {}  # of the step that the last epoch began with: kept, done again
        self.step = 0  # the last that was told as committed
        self.awake_s = self.looked_s = time.monotonic()  # since when this process has been looking without a gap

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        asked_before = signal.signal(signal.SIGTERM, lambda *_: self.ask_stop())
        gc.freeze()  # keep the collector from copying this process's pages into every worker
        try:
            self._begin()
            while self.failure is None and not self._over():
                self._turn()
        finally:
            self.processes.end_all()
            self._leave()
            self.hold.close()
            signal.signal(signal.SIGTERM, asked_before)
            self.board.close()
            os.close(self.board_file)
            os.close(self.mirror)
        return self.failure or Ended("")

    def _begin(self) -> None:
        if self.job.run_dir is None or self._holds(self.job.run_dir):
            self._do(self.membership.begin(time.monotonic()))

    def _holds(self, run_dir: Path) -> bool:
        """Whether nobody else trains the run; else this agent gives up."""
        try:
            self.hold.take(run_dir, make=True)
        except UserError as error:
            self.fail(str(error), user_error=True)
        return self.failure is None

    def _leave(self) -> None:
        """The workers have ended."""
        self.record.end()

    def ask_stop(self) -> None:
        """The run is to end after the step in flight; called from a signal handler, too."""
        self.board.ask_stop()

    def _over(self) -> bool:
        return self.ended_s is not None and (not self.processes or time.monotonic() - self.ended_s > END_S)

    def _turn(self) -> None:
        pipes = {process.pipe: seat for seat, process in self.processes.items()}
        orders = {process.orders: seat for seat, process in self.processes.items()}
        until_look = max(0.0, self.looked_s + POLL_S - time.monotonic())
        launcher = [] if self.orphaned else [self.launcher]
        sources: list[Connection | socket.socket] = [*pipes, *orders, *launcher, *self._agents()]
        for source in wait(sources, timeout=min(until_look, self.tick_s)):
            if source is self.launcher:
                self._hear_launcher()
            elif isinstance(source, Connection):
                self._hear(pipes[source])
            elif isinstance(source, socket.socket) and orders.get(source) in self.processes:
                self._asked_to_leave(orders[source])
        self._hear_agents()
        now = time.monotonic()
        if now - self.looked_s < POLL_S:
            return
        if now - self.looked_s > 10 * POLL_S:
            self.awake_s = now  # this process was stopped too: what the clock says of others counts from here
        self.looked_s = now
        self._look()
        self._listen_to_wishes()

    def _agents(self) -> list[socket.socket]:
        """Sockets to agents of other hosts."""
        return []

    def _hear_agents(self) -> None:
        """What they have said, and what is to be said to them."""

    def _hear_launcher(self) -> None:
        """A launcher that leaves says so. One that was killed is only missed: a run goes on to its end without."""
        try:
            if self.launcher.recv_bytes() == STOP:
                self.ask_stop()
            else:
                self.fail("the launcher ended the run")
        except (EOFError, ConnectionResetError):
            self._orphan()

    def _orphan(self) -> None:
        self.orphaned = True
        if not self.job.outlives:
            self.fail("the launcher was killed")

    def forward(self, message: Said) -> None:
        """A launcher that does not read, because it is stopped, misses events: they are in the log."""
        asked = select.poll()
        asked.register(self.launcher, select.POLLOUT)
        reads = bool(asked.poll(0))
        if not self.orphaned and (reads or message.kind != "event"):
            try:
                self._forward(message)
            except (BrokenPipeError, ConnectionResetError):
                self._orphan()

    def _decide(self, event: m.Event) -> None:
        self._do(self.membership.on(event, time.monotonic()))

    def fail(self, line: str, *, user_error: bool = False, trace: str = "") -> None:
        if self.failure is None:
            self.failure = Ended(line, user_error, trace)

    # --- what workers say -------------------------------------------------------------------------------------

    def _hear(self, seat: int) -> None:
        import cloudpickle

        process = self.processes.get(seat)
        if process is None:
            return
        try:
            said: Said = cloudpickle.loads(process.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._ended(seat)
            return
        match said.kind:
            case "opened":
                self._decide(m.Opened(seat))
            case "ready":
                self._decide(m.Ready(seat, said.value))
            case "left":
                self._decide(m.Left(seat, *said.value))
            case "went":
                epoch, step, self.shards = said.value
                self._decide(m.Went(seat, epoch, step))
                self._write_roster()
            case "run":
                self._know(seat, Path(said.value))
            case "event":
                self._on_event(said.value)
            case "accused":
                self.accused += 1
                if self.accused > MOST_ACCUSED:
                    self.fail(f"{self.accused} workers have been wrong, the last one: {said.value}")
                else:
                    self._decide(m.Suspect(seat, f"{self._name(seat)}: {said.value}"))
            case "released":
                process.finished = True
            case "result":
                process.finished = True
                if self.ended_s is None:
                    self.ended_s = time.monotonic()
                    self.forward(Said(0, "result", said.value))
                self._decide(m.Done(seat))
            case "user_error" | "failed":
                process.finished = True
                self._failed(seat, said)

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == "committed":
            self.watch.committed(event["seconds"])
            self.step = event["step"]
            self.waste.committed(self.step, time.monotonic())
            self._compare(event.get("comm"))
        self.forward(Said(0, "event", event))

    def _compare(self, told: dict[str, Any] | None) -> None:
        """Workers that are slow: always said, and relieved where that is wanted."""
        members = self.membership.members
        if (
            told is None
            or len(shares := self.formation.shares) != len(members)
            or any(len(p) != len(members) for p in told["phases"].values())
        ):
            return
        for seat, evidence in self.pace.told(members, shares, told["phases"], told["steps"]).items():
            if seat in self.processes:
                why = f"{self._name(seat)} is slow: {evidence}"
                self._tell(m.Tell("slow", why, 0.0, (seat,)))
                if self.job.rebalance and self.pace.deal(members, self.job.shards) != shares:
                    self._decide(m.Rebalance(seat, why))

    def _failed(self, seat: int, said: Said) -> None:
        """A member that raises fails the run: it would raise again. A new one only fails to join."""
        where = f"{self._name(seat)} failed at {self.board.read(seat % ROWS)}"
        if self.membership.epoch and seat not in self.membership.members:
            self._decide(m.Dead(seat, f"{where}: {said.value}"))
            return
        user_error = said.kind == "user_error"
        self.fail(said.value if user_error else f"{where}: {said.value}", user_error=user_error, trace=said.trace)

    def _asked_to_leave(self, seat: int) -> None:
        try:
            told = self.processes[seat].orders.recv(16)
        except OSError:
            return
        if told:
            names = {raw: number.name for number, raw in DRAINS.items()}
            self._decide(m.Drain(seat, f"{self._name(seat)} was asked to leave ({names.get(told[:1], 'a signal')})"))

    def _ended(self, seat: int) -> None:
        process, why = self.processes[seat], ""
        _, status = os.waitpid(process.pid, 0)
        name, at = self._name(seat), self.board.read(seat % ROWS)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            by = "its agent, so that it cannot go on" if process.fenced else killer_of(code)
            why = f"{name} was killed by {by} at {at}"
        elif not process.finished:
            why = f"{name} ended with exit code {code} at {at}"
        self.processes.forget(seat)
        self._decide(m.Dead(seat, why))
        self._write_roster()

    # --- what is seen -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Members without progress; and what was done to some on purpose."""
        for fault, ago in self.noticed.lived_through():
            why = f"on purpose, {ago:.3f} s ago"
            self._tell(m.Tell("rehearsed", why, 0.0, more=(("fault", str(fault)), ("ago_s", ago))))
        active = [s for s, seat in self.membership.seats.items() if seat.at in m.MOVING and s in self.processes]
        rows, found = {seat % ROWS: seat for seat in active}, []
        for seat in active:
            position = self.board.read(seat % ROWS)
            position = replace(position, since_s=max(position.since_s, self.awake_s))
            found.append((position, look(self.processes[seat].pid)))
        whole = all(s in active for s, seat in self.membership.seats.items() if seat.at is m.At.active)
        for row, evidence in self.watch.late(found, time.monotonic(), whole=whole):
            self._decide(m.Suspect(rows[row], f"{self._name(rows[row])}: {evidence}"))

    def _listen_to_wishes(self) -> None:
        if self.record.run_dir is None:
            return
        wanted = roster.wanted_of(self.record.run_dir)
        if wanted.number <= self.wish:
            return
        self.wish = wanted.number
        if wanted.drain == "all":
            self.ask_stop()
        elif wanted.drain.isdecimal() and int(wanted.drain) < len(self.membership.members):
            seat = self.membership.members[int(wanted.drain)]
            self._decide(m.Drain(seat, wanted.why or f"{self._name(seat)} was asked to leave"))
        elif wanted.servers > 0 and self.servers:
            workers, self.servers = self.membership.wanted - self.servers, min(wanted.servers, MOST_SERVERS)
            asked = wanted.why or f"{wanted.servers} servers were asked for"
            self._decide(m.Resize(workers + self.servers, asked))
        elif wanted.workers > 0:
            asked = wanted.why or f"{wanted.workers} workers were asked for"
            self._decide(m.Resize(wanted.workers + self.servers, asked))

    # --- what is told -----------------------------------------------------------------------------------------

    def _name(self, seat: int) -> str:
        process = self.processes[seat]
        return f"{process.name} on {self.host} (pid {process.pid})"

    def _know(self, seat: int, path: Path) -> None:
        """The run directory has a name."""
        if not self._holds(path):
            return
        if self.record.run_dir is None:
            self.wish = roster.wanted_of(path).number  # older wishes are not for this process
        self.record.run_dir = path
        self._write_roster()

    def _write_roster(self) -> None:
        pids = [self.processes[s].pid if s in self.processes else None for s in self.membership.members]
        self.record.write_roster(roster.entries(pids, self.formation.owned, self.host, self.membership.epoch))

    def _tell(self, tell: m.Tell) -> None:
        who = [{"pid": self.processes[s].pid, "rank": self._rank(s)} for s in tell.seats if s in self.processes]
        lost = tell.event == "lost" and tell.seats[0] in self.waste.seats
        redone = {"redone": max(0, self.begun - self.membership.step + 1), **self.shards}
        self.record.tell(
            {
                "event": tell.event,
                "step": max(self.step, self.membership.step, 0),
                "why": tell.why,
                "cost_s": round(tell.cost_s, 6),
                "membership": self.membership.epoch,
                "host": self.host,
                "processes": who,
                **self.noticed.behind(tell.event),
                **(redone if tell.event == "recovered" else {}),
                **dict(tell.more),
                **(self.waste.told(self._newest_begun, time.monotonic()) if lost else {}),
            }
        )

    def _newest_begun(self) -> int:
        return max((self.board.read(seat % ROWS).step for seat in self.waste.seats), default=0)

    def _rank(self, seat: int) -> int | None:
        return self.membership.members.index(seat) if seat in self.membership.members else None

    # --- what is done -----------------------------------------------------------------------------------------

    def _do(self, instructions: list[m.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case m.Fork(seat):
                    self.processes.fork(seat)
                case m.Kill(seat):
                    self.processes[seat].fenced = True
                    self.processes.kill(seat)
                case m.Release(seat):
                    self.processes.order(seat, {"kind": "release"}, [])
                case m.Break():
                    self.begun = self._newest_begun()
                    self.waste.broke(self.begun, time.monotonic())
                    self.board.call_broken(True)
                case m.Ask():
                    self.board.ask_change(True)
                case m.Form():
                    self._form(instruction)
                case m.Tell():
                    self._tell(instruction)
                case m.GiveUp(why):
                    self.fail(why)
                case m.Finish():
                    pass  # those who are still at it end by themselves

    def _form(self, form: m.Form) -> None:
        """Sockets and memory of the epoch, which nobody of an older one has."""
        self.board.call_broken(False)
        self.board.ask_change(False)
        count = len(form.seats)
        self.pace.changed()
        self.waste = Waste(form.seats, max(form.steps), time.monotonic())
        self.formation = self._formation(count)
        if self.job.rebalance and len(self.formation.shares) == count:
            self.formation = Formation(self.pace.deal(form.seats, self.job.shards))
        heap = heap_file()
        arenas = [self.processes[s].arena[0] for s in form.seats if s in self.processes and self.processes[s].arena]
        shared = arenas if len(arenas) == count else []
        with SocketPairs(range(count)) as pairs:
            for rank, seat in enumerate(form.seats):
                if seat in self.processes:
                    self.processes[seat].name = named(rank, self.formation.workers)
                mine = [pairs.end(rank, other).fileno() for other in range(count) if other != rank]
                order = {**self._terms(form, rank), "run": str(self.record.run_dir or ""), "arenas": bool(shared)}
                self.processes.order(seat, order, [heap, self.mirror, *shared, *mine])
        os.close(heap)
        self._write_roster()

    def _formation(self, processes: int) -> Formation:
        wanted, deepest = (self.servers, self.job.depth), self.membership.deepest
        return formation_for(processes, *wanted, shards=self.job.shards, deepest=deepest)

    def _terms(self, form: m.Form, rank: int) -> dict[str, Any]:
        """Of an epoch, as its member with this rank is told."""
        return {
            "kind": "form",
            "epoch": form.epoch,
            "rank": rank,
            "steps": form.steps,
            "due": form.due,
            "cold": form.cold,
            "donor": form.donor,
            "shares": self.formation.shares,
            "depth": self.formation.depth,
            "servers": self.formation.servers,
            "quiet": self.processes.quiet(),
        }

    def _close_own(self) -> None:
        """In a forked worker: what is its agent's alone."""
        self.launcher.close()
        self.hold.forget()
        self.record.close_log()
