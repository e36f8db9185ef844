"""A topology that was planted is found again from the times that programs take on it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.topology import Capacity, Speed, Topology
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.registry import build
from shoal.comm.measuring.link_fit import Observation, fit, misses

SIZES = (1 << 10, 1 << 16, 1 << 21)
CALIBRATION = [("all_gather", "ring"), ("all_gather", "direct"), ("reduce_scatter", "ring"), ("broadcast", "binomial")]


def observed(topology: Topology, programs) -> list[Observation]:
    made = [build(collective, name, topology.size) for collective, name in programs]
    return [Observation(p, size, 4, cost(p, size, topology, itemsize=4).seconds) for p in made for size in SIZES]


def one_host(rate: float, latency_s: float, message_s: float, adding: float, shared: float) -> Topology:
    made = Topology.synthetic(4, inside=Speed(rate, latency_s))
    links = tuple(replace(link, through=("h0:processors",)) for link in made.links)
    capacity = Capacity(name="h0:processors", bytes_per_s=rate * shared)
    return replace(
        made, links=links, capacities=(capacity,), message_s=message_s, reduce_s_per_byte=adding, cores={"h0": 2}
    )


factors = st.floats(0.2, 5.0)


@settings(max_examples=8)
@given(factors, factors, factors, factors, st.floats(1.0, 4.0))
def test_predictions_are_right_for_programs_that_were_not_observed(rate, latency, message, adding, shared):
    truth = one_host(2e9 * rate, 3e-5 * latency, 2e-5 * message, 2e-10 * adding, shared)
    guess = one_host(2e9, 3e-5, 2e-5, 2e-10, 2.0)
    before = misses(guess, observed(truth, CALIBRATION))
    found = fit(guess, observed(truth, CALIBRATION))
    assert found.residual < 0.1
    assert sum(map(abs, misses(found.topology, observed(truth, CALIBRATION)))) <= sum(map(abs, before)) + 1e-9
    unseen = misses(found.topology, observed(truth, [("all_reduce", "two_shot"), ("all_reduce", "halving_doubling")]))
    assert max(map(abs, unseen)) < 0.35


def test_without_observations_the_guess_is_the_answer():
    guess = Topology.synthetic(2)
    assert fit(guess, []).topology == guess
    assert fit(guess, []).residual == 0.0


def test_the_residual_says_how_far_predictions_miss():
    guess = Topology.synthetic(2, inside=Speed(1e9, 0.0))
    program = build("all_gather", "ring", 2)
    seconds = cost(program, 1 << 20, guess).seconds
    twice = [Observation(program, 1 << 20, 1, seconds), Observation(program, 1 << 20, 1, 2 * seconds)]
    assert fit(guess, twice).residual == pytest.approx(2**0.5 - 1, rel=0.2)  # halfway between what cannot both be true
