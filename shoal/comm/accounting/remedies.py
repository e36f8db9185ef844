"""What would make a step shorter, and by how much: a pure model over what a run has measured of itself.

Buckets are handed over evenly through a window at the end of the backward pass, and cross the link one after the other.
So of C seconds of communication, in m buckets through a window of W seconds, exposed(C, W, m) = max(C - W (1 - 1/m),
C/m) are left when the worker has nothing more to compute. W is whatever explains the exposed seconds that the run has
measured. A remedy changes C or m: start costs go with the number of messages in sequence, the rest with the bytes that
cross the busiest line. Nothing is assumed to get worse: a remedy that would make the step longer gains 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shoal.comm.layout import BLOCK

CODECS: Mapping[str, float] = {"bf16": 2.0, "int8": 4.0, "1bit": 32.0, "topk": 50.0}  # name -> bytes before / after
CODEC_BYTES_PER_S = 3e9  # a core, of float32: what the compressors of shoal.comm.compression are held to
_ALGORITHMS = ("direct", "ring", "halving-doubling", "double tree", "two-level")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step of a run as it was: seconds of the mean worker, where no other is named."""

    step_s: float
    algorithm: str  # how gradients are summed now: one of `lines`
    hosts: tuple[int, ...]  # the number of the host of each worker
    gradient_bytes: float  # of the flat buffer
    buckets: int
    latency_s: float = 0.0  # of communication: the part that goes with the number of messages
    bytes_s: float = 0.0  # of communication: the part that goes with the bytes under way
    exposed_s: float = 0.0  # of both: what the worker stood still for
    wait_s: tuple[float, ...] = ()  # by worker: stood still for workers who came later
    busy_s: tuple[float, ...] = ()  # by worker: loading and computing, what goes with its shards
    load_s: tuple[float, ...] = ()  # by worker: loading
    shards: tuple[int, ...] = ()  # by worker
    servers: int = 0
    shared: bool = False  # gradients lie in memory that all map: too fast a link to gain from compression

    @property
    def workers(self) -> int:
        return len(self.hosts)

    @property
    def spent_s(self) -> float:
        return self.latency_s + self.bytes_s


@dataclass(frozen=True)
class Remedy:
    name: str  # what to change
    gain_s: float  # seconds a step, predicted; 0.0: nothing
    how: str  # which key or flag does it, or what it takes
    why: str = ""  # the numbers behind it


# --- the overlap of buckets with the backward pass ----------------------------------------------------------------


def exposed(spent_s: float, window_s: float, buckets: int) -> float:
    """Seconds of communication that are left when the window is over."""
    return max(spent_s - window_s * (1 - 1 / buckets), spent_s / buckets, 0.0)


def window(m: Measured) -> float:
    """The window through which buckets are handed over that explains what was exposed."""
    if m.buckets < 2:
        return 0.0
    return max(0.0, (m.spent_s - m.exposed_s) / (1 - 1 / m.buckets))


def gain(m: Measured, latency_s: float, bytes_s: float, buckets: int = 0, cost_s: float = 0.0) -> float:
    """Seconds a step saved when communication takes so long instead. ``cost_s``: computing that it adds."""
    if m.exposed_s <= 0:
        return 0.0
    before = exposed(m.spent_s, window(m), m.buckets)
    after = exposed(latency_s + bytes_s, window(m), buckets or m.buckets) * _scale(m.exposed_s, before)
    return min(max(m.exposed_s - after - cost_s, 0.0), m.exposed_s, m.step_s)


def _scale(value: float, modelled: float) -> float:
    """Where the model is off (its last bucket is as large as the others), it is off alike before and after."""
    return value / modelled if modelled > 0 else 1.0


# --- what crosses the busiest line --------------------------------------------------------------------------------


def lines(algorithm: str, hosts: Sequence[int], servers: int = 0) -> tuple[float, float]:
    """(messages in sequence, bytes over the busiest line in one direction / bytes of the gradients) of one all-reduce.

    The line is a host's where there are several hosts, each worker's own otherwise. Thakur, Rabenseifner and Gropp,
    2005, for the flat ones. A server takes its share of every worker's gradients and gives its share of the parameters,
    both ways at once (Jiang and others, 2020). "memory": workers read each other's, one buffer in all."""
    n, h = len(hosts), len(set(hosts))
    if n < 2:
        return 0.0, 0.0
    here = max(list(hosts).count(host) for host in set(hosts)) if h > 1 else 1
    ring = 2 * (n - 1) / n
    rounds = 2 * math.ceil(math.log2(n))
    crossing = here * 2 * (n - here) / n if h > 1 else ring  # each worker sends others' parts over its host's line
    if algorithm == "direct":
        return 2, crossing
    if algorithm == "ring":
        return 2 * (n - 1), ring
    if algorithm == "halving-doubling":
        return rounds + (0 if n & (n - 1) == 0 else 2), crossing
    if algorithm == "double tree":
        return rounds + 2, 2
    if algorithm == "two-level":
        return 2 * (h - 1) + 2, 2 * (h - 1) / h if h > 1 else ring
    if algorithm == "server":
        return 2, max(float(here), n / max(1, servers))
    if algorithm == "memory":
        return 2, 1
    raise ValueError(f"no algorithm {algorithm!r} is known")


def takes(m: Measured, algorithm: str, servers: int = 0) -> tuple[float, float]:
    """(latency_s, bytes_s) of the run's communication with another algorithm."""
    now, then = lines(m.algorithm, m.hosts, m.servers), lines(algorithm, m.hosts, servers)
    if not now[0] or not now[1]:
        return m.latency_s, m.bytes_s
    return m.latency_s * then[0] / now[0], m.bytes_s * then[1] / now[1]


# --- remedies -----------------------------------------------------------------------------------------------------


def faster_link(m: Measured, times: float) -> float:
    """Seconds saved by a link of ``times`` the bytes a second."""
    return gain(m, m.latency_s, m.bytes_s / max(times, 1.0))


def lower_latency(m: Measured, times: float) -> float:
    return gain(m, m.latency_s / max(times, 1.0), m.bytes_s)


def compression(m: Measured, factor: float, codec_bytes_per_s: float = CODEC_BYTES_PER_S) -> float:
    """Seconds saved by sending 1/factor of the bytes; each is compressed once and opened (2n-1)/n times, by a core."""
    passes = 1 + (2 * m.workers - 1) / m.workers
    return gain(m, m.latency_s, m.bytes_s / max(factor, 1.0), cost_s=passes * m.gradient_bytes / codec_bytes_per_s)


def bucket_count(m: Measured) -> tuple[int, float]:
    """(the number of buckets that leaves least exposed, seconds saved by it): a power of two times more or fewer.

    Never less than a block a worker. Where start costs are not known, more buckets would look free: only fewer then."""
    best = (m.buckets, 0.0)
    most = max(m.buckets, m.gradient_bytes / (BLOCK * 4 * m.workers)) if m.latency_s > 0 else m.buckets
    for power in range(-10, 7):
        count = max(1, round(m.buckets * 2.0**power))
        saved = gain(m, m.latency_s * count / m.buckets, m.bytes_s, count)
        if saved > best[1] * (1 + 1e-9) and count != m.buckets and count <= most:
            best = (count, saved)
    return best


def balanced(costs: Sequence[float], shards: int) -> tuple[int, ...]:
    """So many shards for each worker that the slowest ends soonest, at least one each. ``costs``: seconds a shard.

    One shard after the other goes to whoever would end first with it: for equal shards nothing is better."""
    counts = [1] * len(costs)
    for _ in range(shards - len(costs)):
        first = min(range(len(costs)), key=lambda rank: ((counts[rank] + 1) * costs[rank], rank))
        counts[first] += 1
    return tuple(counts)


def rebalancing(m: Measured) -> tuple[tuple[int, ...], float]:
    """(shards of each worker, seconds saved): away from those for whom the others wait."""
    waited = max(m.wait_s, default=0.0)
    if waited <= 0 or len(m.shards) < 2 or min(m.shards) < 1 or len(m.busy_s) != len(m.shards):
        return m.shards, 0.0
    costs = [max(busy, 0.0) / shards for busy, shards in zip(m.busy_s, m.shards, strict=True)]
    found = balanced(costs, sum(m.shards))
    longest = max(cost * count for cost, count in zip(costs, found, strict=True))
    saved = min(max(max(m.busy_s) - longest, 0.0), waited, m.step_s)
    return (found, saved) if saved > 0 else (m.shards, 0.0)


def faster_loading(m: Measured) -> float:
    """Seconds saved if nobody waited for data: the longest chain of load and compute gets shorter."""
    if not m.load_s or len(m.busy_s) != len(m.load_s):
        return 0.0
    without = max(busy - load for busy, load in zip(m.busy_s, m.load_s, strict=True))
    return min(max(max(m.busy_s) - without, 0.0), m.step_s)


def remedies(m: Measured, codec_bytes_per_s: float = CODEC_BYTES_PER_S) -> tuple[Remedy, ...]:
    """Everything the model knows, the largest gain first; those without a gain stand at the end."""
    out: list[Remedy] = []
    placement, saved = rebalancing(m)
    out.append(
        Remedy(
            "other shares of the work",
            saved,
            f"placement = {list(placement)}" if saved else "placement",
            f"now {list(m.shards)} of {sum(m.shards)} shards",
        )
    )
    loaders = "loaders, prefetch, or data that costs less to prepare"
    out.append(Remedy("data that is there in time", faster_loading(m), loaders))
    rate = _scale(m.gradient_bytes * lines(m.algorithm, m.hosts, m.servers)[1], m.bytes_s)
    link = "memory" if m.shared or m.algorithm == "memory" else "a link"
    out.append(Remedy(f"{link} twice as fast", faster_link(m, 2.0), "other hardware", f"now {rate / 1e9:.3g} GB/s"))
    out.append(Remedy("start costs halved", lower_latency(m, 2.0), "fewer, nearer or less busy workers"))
    count, saved = bucket_count(m)
    size = m.gradient_bytes / count
    name = "buckets" if count == m.buckets else "larger buckets" if count < m.buckets else "smaller buckets"
    why = f"{count} of {size / 1e6:.3g} MB, now {m.buckets} of {m.gradient_bytes / m.buckets / 1e6:.3g} MB"
    out.append(Remedy(name, saved, f"bucket_bytes = {max(1, round(size))}", why if saved else ""))
    for codec, factor in () if m.shared else CODECS.items():
        saved = compression(m, factor, codec_bytes_per_s)
        passes = 1 + (2 * m.workers - 1) / m.workers
        cost = passes * m.gradient_bytes / codec_bytes_per_s
        why = f"1/{factor:g} of the bytes for {cost * 1e3:.3g} ms of a core"
        out.append(Remedy(f"compression: {codec}", saved, f"compression = {codec!r}", why))
    out += _algorithms(m)
    return tuple(sorted(out, key=lambda remedy: -remedy.gain_s))


def _algorithms(m: Measured) -> list[Remedy]:
    """Other ways to sum; none for workers who read each other's memory."""
    out: list[Remedy] = []
    if m.algorithm == "memory":
        return out
    if m.servers:
        for servers in (2 * m.servers, 4 * m.servers):
            saved = gain(m, *takes(m, "server", servers))
            out.append(Remedy(f"{servers} servers", saved, f"servers = {servers}", f"now {m.servers}"))
        best = min(_ALGORITHMS, key=lambda name: sum(takes(m, name)))
        out.append(Remedy(f"no servers: {best}", gain(m, *takes(m, best)), "sync = 'exact'"))
        return out
    for name in _ALGORITHMS:
        if name == m.algorithm or (name == "two-level" and len(set(m.hosts)) in (1, m.workers)):
            continue
        latency, under_way = takes(m, name)
        rounds, share = lines(name, m.hosts)
        title = "hierarchy: sums inside of each host first" if name == "two-level" else f"algorithm: {name}"
        why = f"{rounds:g} messages in a row, {share:.3g} times the gradients over the busiest line"
        how = {"ring": "sync = 'fast'", "direct": "sync = 'exact'", "two-level": "backend hier"}
        out.append(Remedy(title, gain(m, latency, under_way), how.get(name, "another transport"), why))
    return out


# --- a parameter server beside an all-reduce -----------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to bring gradients together, predicted from the same link."""

    name: str
    worker_bytes: float  # that a worker sends in a step; it receives as many
    server_bytes: float  # that a server receives in a step; it sends as many. 0.0: there is none
    spent_s: float  # seconds of communication, hidden or not
    exposed_s: float
    step_s: float
    servers: int = 0


def ways(m: Measured, servers: Sequence[int] = (1, 2, 4)) -> tuple[Way, ...]:
    """All-reduce and parameter servers for the run's gradients, workers and link."""
    n, size = m.workers, m.gradient_bytes
    out = []
    for name in (m.algorithm,) if not m.servers else ("direct",):
        latency, under_way = takes(m, name)
        title = "all-reduce" if m.servers else f"all-reduce ({name})"
        out.append(_way(m, title, 2 * (n - 1) / n * size, 0.0, latency, under_way))
    for count in sorted({*servers, *((m.servers,) if m.servers else ())}):
        latency, under_way = takes(m, "server", count)
        title = f"{count} parameter server{'s' if count > 1 else ''}"
        out.append(replace(_way(m, title, size, n * size / count, latency, under_way), servers=count))
    return tuple(out)


def _way(m: Measured, name: str, worker: float, server: float, latency_s: float, bytes_s: float) -> Way:
    spent = latency_s + bytes_s
    before = exposed(m.spent_s, window(m), m.buckets)
    left = exposed(spent, window(m), m.buckets) * _scale(m.exposed_s, before)
    return Way(name, worker, server, spent, left, max(0.0, m.step_s - m.exposed_s + left))
