"""What the event log says of communication, as frozen values: per step, by worker, by operation and link."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from shoal.comm.accounting.counters import Kind, Place, Total, total
from shoal.comm.accounting.remedies import Measured
from shoal.comm.accounting.split_account import of_passes
from shoal.observe.curves import Event, number

WARM_UP = 3  # first steps of a session, which allocate and compile
MOST_STEPS = 10_000  # that one event may tell of
STEP_PHASES = ("loading", "forward", "backward", "updating")  # with the exposed seconds, these are a step
SMALL = frozenset({"facts", "barrier", "release", "gather", "clock"})  # operations that carry no gradients


@dataclass(frozen=True)
class Bucket:
    """Seconds since the step's first worker began it."""

    posted: float
    ready: float  # by the last worker
    begun: float
    reduced: float


@dataclass(frozen=True)
class Worker:
    """One worker in a sampled step."""

    rank: int
    begun: float
    finish: float  # its backward passes were over
    done: float  # it had the mean gradient
    end: float  # its next step began
    buckets: tuple[Bucket, ...]
    phases: tuple[tuple[str, float], ...]  # (phase, since)
    clock_error_s: float = 0.0  # how much its moments may be off against rank 0's, which has another clock


@dataclass(frozen=True)
class Sample:
    step: int
    workers: tuple[Worker, ...]


@dataclass(frozen=True)
class Communication:
    """Means over the steps that the log tells of, but for the first few of the session."""

    steps: int
    step_s: float  # of rank 0
    phases: Mapping[str, tuple[float, ...]]  # phase -> seconds a step, by worker
    flows: Mapping[Place, tuple[Total, ...]]  # (operation, link) -> what a step adds, by worker
    waits: tuple[tuple[float, ...], ...]  # [worker][peer]: seconds a step that the worker stood still for the peer
    transport: Mapping[str, Any]  # see the event `started`
    placement: tuple[int, ...]  # shards of each worker
    mesh: Mapping[str, int] | None = None  # of a model that is split: workers along each axis
    samples: tuple[Sample, ...] = ()

    @property
    def workers(self) -> int:
        return len(self.waits)

    @property
    def servers(self) -> int:
        told = self.transport.get("servers")
        return max(len(row) for row in self.waits) - self.workers or (told if isinstance(told, int) else 0)

    def peer(self, index: int) -> str:
        return f"rank {index}" if index < self.workers else f"server {index - self.workers}"

    def phase(self, name: str) -> tuple[float, ...]:
        return self.phases.get(name, (0.0,) * self.workers)

    @cached_property
    def by_worker(self) -> tuple[Total, ...]:
        return tuple(total(of[rank] for of in self.flows.values()) for rank in range(self.workers))

    def exposed(self, kind: Kind) -> float:
        """Seconds a step that the mean worker stood still for this."""
        return fmean(of.exposed[kind] for of in self.by_worker)

    @property
    def exposed_s(self) -> float:
        return fmean(of.exposed_s for of in self.by_worker)

    @property
    def hidden_s(self) -> float:
        return fmean(of.hidden_s for of in self.by_worker)

    @property
    def sent_bytes(self) -> float:
        """Of the mean worker, a step."""
        return fmean(of.sent_bytes for of in self.by_worker)

    @cached_property
    def compute(self) -> tuple[float, ...]:
        """Seconds of forward and backward passes a step, by worker, without what was reduced or sent inside of them."""
        sent = [sum(of[rank].exposed[Kind.transferring] for of in self.of_passes) for rank in range(self.workers)]
        both = zip(self.phase("forward"), self.phase("backward"), self.by_worker, sent, strict=True)
        return tuple(max(0.0, ahead + back - of.hidden[Kind.reducing] - moved) for ahead, back, of, moved in both)

    @property
    def busy(self) -> tuple[float, ...]:
        return tuple(load + work for load, work in zip(self.phase("loading"), self.compute, strict=True))

    @property
    def of_passes(self) -> list[tuple[Total, ...]]:
        """Of the operations that the passes of a split model make: stages, slices, experts."""
        return [of for (operation, _), of in self.flows.items() if of_passes(operation)]

    @property
    def large(self) -> list[tuple[Total, ...]]:
        """Of the operations that carry gradients."""
        return [of for (name, _), of in self.flows.items() if name not in SMALL and not of_passes(name)]

    @property
    def operations(self) -> float:
        """How many operations with gradients a worker starts in a step."""
        return fmean(sum(of[rank].calls for of in self.large) for rank in range(self.workers))

    @property
    def bucket_bytes(self) -> tuple[float, ...]:
        listed = self.transport.get("bucket_bytes")
        return tuple(float(size) for size in listed) if isinstance(listed, list | tuple) and listed else (0.0,)

    @property
    def algorithm(self) -> str:
        if self.servers:
            return "server"
        if self.transport.get("link") == "shared memory":
            return "memory"
        return "ring" if self.transport.get("operation") == "all-reduce" else "direct"

    @cached_property
    def measured(self) -> Measured:
        """What the model of remedies needs.

        Between workers who share memory, transferring is the time of the news alone, and the bytes move when they are
        read and added up. Elsewhere a part of transferring goes with the number of operations: their measured start
        cost, as far as it does not exceed the whole."""
        moving = fmean(sum(of[rank].spent(Kind.transferring) for of in self.large) for rank in range(self.workers))
        news = fmean(of.spent(Kind.transferring) for of in self.by_worker)
        adding = fmean(of.spent(Kind.reducing) for of in self.by_worker)
        shown = self.exposed(Kind.transferring)
        if self.algorithm == "memory":
            latency, under_way, shown = news, adding, shown + self.exposed(Kind.reducing)
        else:
            latency = min(self.operations * (number(self.transport.get("latency_s")) or 0.0), moving)
            under_way = moving - latency
        hosts = self.transport.get("hosts")
        return Measured(
            step_s=self.step_s,
            algorithm=self.algorithm,
            hosts=tuple(hosts) if isinstance(hosts, list) and len(hosts) == self.workers else (0,) * self.workers,
            gradient_bytes=sum(self.bucket_bytes),
            buckets=len(self.bucket_bytes),
            latency_s=latency,
            bytes_s=under_way,
            exposed_s=min(shown, latency + under_way),
            wait_s=tuple(sum(row[: self.workers]) for row in self.waits),
            busy_s=self.busy,
            load_s=self.phase("loading"),
            shards=self.placement,
            servers=self.servers,
            shared=self.transport.get("link") == "shared memory",
        )


def read_communication(events: Iterable[Event]) -> Communication | None:
    """None when the log does not tell: one worker, few steps, an older version, or fields that make no sense."""
    session: Event = {}
    fields: list[Event] = []
    seconds: dict[int, float] = {}
    found: tuple[Event, list[Event], dict[int, float]] | None = None
    for event in events:
        kind, step = event.get("event"), number(event.get("step"))
        if kind == "started" or (kind == "resumed" and fields):
            session = event if kind == "started" else session
            fields, seconds = [], {}
        elif kind == "committed" and step is not None:
            lasted = number(event.get("seconds"))
            if lasted:
                seconds[int(step)] = lasted
            field = event.get("comm")
            if isinstance(field, Mapping) and _usable(field):
                fields.append(field)
                found = (session, fields, seconds)
    try:
        return _means(*found) if found else None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _usable(field: Event) -> bool:
    step, steps, waits = field.get("step"), field.get("steps"), field.get("waits")
    told = isinstance(step, int) and isinstance(steps, int) and 1 <= steps <= MOST_STEPS
    return told and isinstance(waits, list) and len(waits) > 1


def _means(session: Event, fields: Sequence[Event], seconds: Mapping[int, float]) -> Communication | None:
    first = min(int(field["step"]) - int(field["steps"]) for field in fields)
    warm = [field for field in fields if field["step"] - field["steps"] >= first + WARM_UP] or list(fields)
    workers = len(warm[-1]["waits"])
    warm = [field for field in warm if len(field["waits"]) == workers]
    steps = sum(int(field["steps"]) for field in warm)
    covered = [s for f in warm for s in range(int(f["step"]) - int(f["steps"]) + 1, int(f["step"]) + 1) if s in seconds]
    phases: dict[str, list[float]] = {}
    flows: dict[Place, list[Total]] = {}
    peers = len(warm[0]["waits"][0])
    waits = [[0.0] * peers for _ in range(workers)]
    for field in warm:
        for name, values in field.get("phases", {}).items():
            phases[name] = [a + b for a, b in zip(phases.get(name, [0.0] * workers), values, strict=True)]
        for row in field.get("operations", []):
            place = (str(row["operation"]), str(row["link"]))
            old = flows.get(place, [Total()] * workers)
            flows[place] = [a + _total(row, rank) for rank, a in enumerate(old)]
        for mine, row in zip(waits, field["waits"], strict=True):
            for peer, value in enumerate(row):
                mine[peer] += value
    placement = session.get("placement")
    return Communication(
        steps=steps,
        step_s=fmean(seconds[step] for step in covered) if covered else _whole(phases, flows, steps, workers),
        phases={name: tuple(value / steps for value in values) for name, values in phases.items()},
        flows={place: tuple(of * (1 / steps) for of in totals) for place, totals in flows.items()},
        waits=tuple(tuple(value / steps for value in row) for row in waits),
        transport=session.get("transport") or {},
        placement=tuple(placement) if isinstance(placement, list) and len(placement) == workers else (1,) * workers,
        mesh={str(axis): int(size) for axis, size in ((session.get("split") or {}).get("mesh") or {}).items()},
        samples=tuple(_sample(field["sample"]) for field in fields if field.get("sample")),
    )


def _whole(
    phases: Mapping[str, Sequence[float]], flows: Mapping[Place, Sequence[Total]], steps: int, workers: int
) -> float:
    """The length of a step, put together, where no step says how long it took."""
    spent = sum(sum(phases.get(name, [])) for name in STEP_PHASES)
    return (spent + sum(of.exposed_s for totals in flows.values() for of in totals)) / workers / steps


def _total(row: Event, rank: int) -> Total:
    def of(key: str) -> tuple[float, ...]:
        return tuple(row.get(key, {}).get(kind.name, {rank: 0.0})[rank] for kind in Kind)

    return Total(row["calls"][rank], row["sent"][rank], row["received"][rank], of("hidden"), of("exposed"))


def _sample(field: Event) -> Sample:
    workers = tuple(
        Worker(
            rank=row["rank"],
            begun=row["begun"],
            finish=row["finish"],
            done=row["done"],
            end=row["end"],
            buckets=tuple(Bucket(*moments) for moments in row["buckets"]),
            phases=tuple((name, since) for name, since in row["phases"]),
            clock_error_s=row.get("clock_error_s", 0.0),
        )
        for row in field["workers"]
    )
    return Sample(int(field["step"]), workers)
