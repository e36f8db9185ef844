"""From measured times of programs to a topology under which the cost model gives those times. Pure.

A probe's first guess has the right shape (who is near whom, what is shared) and roughly the right sizes. The few
numbers that are alike for many links are then moved, one after the other, to where the predictions come closest to what
was measured: the processor time of a message, latency and rate of each kind of link, what they share, the time to add.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import median

from shoal.cluster.topology import Topology
from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.cost import cost

STEPS = (2.0, 1.4, 1.2, 1.1, 1.05)  # factors that are tried, the coarse ones first
TURNS = 4  # at most, with one factor
OUTLIER = 0.7  # a miss of this much (in logarithms) and more counts in proportion, not squared


@dataclass(frozen=True)
class Observation:
    program: Program
    nbytes: int
    itemsize: int
    seconds: float  # measured


@dataclass(frozen=True)
class Fitted:
    topology: Topology
    residual: float  # the median miss of predictions: 0.1 is 10 %


def fit(guess: Topology, observations: Sequence[Observation]) -> Fitted:
    """The topology nearest to what was observed; without observations, the guess itself."""
    if not observations:
        return Fitted(guess, 0.0)
    best, least = guess, _loss(guess, observations)
    knobs = _knobs(guess)
    for factor in STEPS:
        for _ in range(TURNS):
            moved = False
            for knob in knobs:
                for times in (factor, 1 / factor):
                    tried = knob(best, times)
                    loss = _loss(tried, observations)
                    if loss < least - 1e-9:
                        best, least, moved = tried, loss, True
                        break
            if not moved:
                break
    return Fitted(best, exp(median(abs(miss) for miss in misses(best, observations))) - 1)


def misses(topology: Topology, observations: Sequence[Observation]) -> list[float]:
    """Logarithms of predicted over measured seconds."""
    predicted = (cost(o.program, o.nbytes, topology, itemsize=o.itemsize).seconds for o in observations)
    return [log(max(p, 1e-9) / max(o.seconds, 1e-9)) for p, o in zip(predicted, observations, strict=True)]


def _loss(topology: Topology, observations: Sequence[Observation]) -> float:
    total = 0.0
    for miss in map(abs, misses(topology, observations)):
        total += miss * miss if miss < OUTLIER else OUTLIER * (2 * miss - OUTLIER)
    return total


Knob = Callable[[Topology, float], Topology]


def _knobs(topology: Topology) -> list[Knob]:
    """What may be multiplied by a factor."""

    def message(t: Topology, times: float) -> Topology:
        return replace(t, message_s=t.message_s * times)

    def adding(t: Topology, times: float) -> Topology:
        return replace(t, reduce_s_per_byte=t.reduce_s_per_byte * times)

    knobs: list[Knob] = [message, adding]
    for kind in sorted({link.kind for link in topology.links}):

        def latency(t: Topology, times: float, kind: str = kind) -> Topology:
            links = (replace(x, latency_s=x.latency_s * times) if x.kind == kind else x for x in t.links)
            return replace(t, links=tuple(links))

        def rate(t: Topology, times: float, kind: str = kind) -> Topology:
            links = (replace(x, bytes_per_s=x.bytes_per_s * times) if x.kind == kind else x for x in t.links)
            return replace(t, links=tuple(links))

        knobs += [latency, rate]
    for family in sorted({family_of(capacity.name) for capacity in topology.capacities}):

        def shared(t: Topology, times: float, family: str = family) -> Topology:
            capacities = (
                replace(c, bytes_per_s=c.bytes_per_s * times) if family_of(c.name) == family else c
                for c in t.capacities
            )
            return replace(t, capacities=tuple(capacities))

        knobs.append(shared)
    return knobs


def family_of(capacity: str) -> str:
    """Capacities that are moved together: those of one kind, on whichever host (``host:kind...``)."""
    return capacity.partition(":")[2]
