"""The decider: no request starves, no block is lost or used twice, whatever comes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.generation.simulated_steps import Simulation

from shoal.serve.generation.pace import Pace
from shoal.serve.generation.scheduler import Limits

requests = st.tuples(
    st.integers(1, 70),  # tokens of the prompt
    st.integers(1, 40),  # new tokens
    st.integers(0, 3),  # which beginning it shares
    st.integers(-1, 2),  # priority
    st.sampled_from([b"", b"another"]),  # client
)
events = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("fork"), st.integers(0, 30)),
    st.tuples(st.just("draft"), st.integers(1, 5)),
    st.tuples(st.just("steps"), st.integers(1, 6)),
)


@settings(max_examples=150)
@given(events=st.lists(events, max_size=30), blocks=st.integers(7, 24), running=st.integers(1, 5))
def test_everything_that_is_not_cancelled_comes_to_its_end_and_every_block_comes_back(events, blocks, running):
    simulation = Simulation(blocks, Limits(running=running, priority_s=2.0))
    cancelled, known = set(), 0
    for number, (event, value) in enumerate(events):
        streams = list(simulation.scheduler.streams.values())
        if event == "submit":
            length, most, shared, priority, salt = value
            tokens = [shared * 100 + i % 50 for i in range(length)]
            known += simulation.submit(number, tokens, most, priority=priority, salt=salt) is not None
        elif event == "cancel" and streams:
            stream = streams[value % len(streams)]
            cancelled.add(stream.name)
            simulation.scheduler.end(stream)
        elif event == "fork" and streams:
            parent = streams[value % len(streams)]
            if len(parent.tokens) - parent.computed == 1:  # only between two steps, with its prompt done
                simulation.fork(parent, 100 + number)
                known += 1
        elif event == "draft":
            for stream in simulation.scheduler.running:
                if len(stream.tokens) - stream.computed == 1:
                    room = simulation.left[stream.name] - 1
                    stream.draft = [7] * min(value, room)
        elif event == "steps":
            for _ in range(value):
                simulation.step()
    simulation.run()
    assert len(simulation.ended) == known - len(cancelled)
    assert simulation.scheduler.pool.held == 0
    assert not simulation.scheduler.streams


def test_the_simulation_notices_a_block_that_is_shared_before_it_is_full():
    simulation = Simulation(8)
    first = simulation.submit(0, [1] * 20, 10)
    simulation.step()
    fork = simulation.fork(first, 1)
    fork.blocks[-1], dropped = first.blocks[-1], fork.blocks[-1]  # the planted fault: no copy of the last block
    simulation.scheduler.pool.hold(first.blocks[-1])
    simulation.scheduler.pool.release(dropped)
    with pytest.raises(AssertionError, match="two streams write"):
        simulation.run()


def test_an_old_request_of_low_priority_is_served_under_a_flood_of_high_ones():
    simulation = Simulation(16, Limits(running=2, priority_s=5.0))
    simulation.submit(0, [1] * 30, 5, priority=0)
    for number in range(1, 80):
        simulation.submit(number, [number] * 30, 5, priority=2)
        simulation.step()
    assert (0, 0) in simulation.ended
    before = sum(name[0] > 0 for name in simulation.ended[: simulation.ended.index((0, 0))])
    assert before <= 12, "it waits for what came within two priorities of seconds, not longer"


def test_a_request_of_higher_priority_takes_the_memory_of_a_lower_one_which_goes_on_later():
    simulation = Simulation(8, Limits(running=8))
    low = simulation.submit(0, [1] * 60, 30)
    simulation.step()
    simulation.step()
    high = simulation.submit(1, [2] * 90, 5, priority=1)
    simulation.step()
    assert not low.running
    assert high.running
    assert simulation.scheduler.preempted == 1
    simulation.run()
    assert simulation.ended == [(1, 0), (0, 0)]


def test_equal_priorities_do_not_push_each_other_out_for_admission():
    simulation = Simulation(8, Limits(running=8))
    first = simulation.submit(0, [1] * 60, 30)
    simulation.step()
    simulation.submit(1, [2] * 90, 5)
    while first.name not in simulation.ended:
        simulation.step()
    assert simulation.scheduler.preempted == 0
    simulation.run()


def test_when_the_cache_is_full_the_last_in_the_order_is_put_off_and_loses_nothing():
    simulation = Simulation(10, Limits(running=4))
    for number in range(4):
        simulation.submit(number, [number] * 20, 60)
    simulation.run()
    assert simulation.scheduler.preempted > 0
    assert sorted(simulation.ended) == [(number, 0) for number in range(4)]
    assert simulation.ended[0] == (0, 0)


def test_a_prompt_that_was_seen_before_is_not_computed_again():
    simulation = Simulation(32)
    simulation.submit(0, [5] * 40, 1)
    simulation.run()
    simulation.submit(1, [5] * 40, 1)
    simulation.run()
    assert simulation.rows == [40, 8], "two whole blocks are shared"
    simulation.submit(2, [5] * 40, 1, salt=b"another client")
    simulation.run()
    assert simulation.rows[2:] == [40]


def test_of_a_prompt_that_is_known_to_its_end_the_last_block_is_computed_for_its_logits():
    simulation = Simulation(32)
    for number in range(2):
        simulation.submit(number, [5] * 32, 1)
        simulation.run()
    assert simulation.rows == [32, 16]


def test_two_that_run_together_share_the_blocks_of_their_beginning():
    simulation = Simulation(32)
    first = simulation.submit(0, [5] * 32 + [1], 20)
    simulation.step()
    second = simulation.submit(1, [5] * 32 + [2], 20)
    simulation.step()
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    simulation.run()


def test_of_two_equal_prompts_that_come_together_one_waits_for_the_others_blocks():
    simulation = Simulation(32)
    for number in range(2):
        simulation.submit(number, [5] * 33, 1)
    simulation.run()
    assert simulation.rows == [33, 1]


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one_which_goes_on_too():
    pace = Pace(of_step=16.0, of_decode=2.0, stretch=1.5)
    simulation = Simulation(200, Limits(running=16), pace)
    for number in range(4):
        simulation.submit(number, [number], 90)
    simulation.step()
    long = simulation.submit(4, [7] * 500, 1)
    simulation.step()
    for number in range(5, 8):
        simulation.submit(number, [number] * 10, 1)
    simulation.step()
    begun = long.computed
    for _ in range(6):
        simulation.step()
    assert {(number, 0) for number in range(5, 8)} <= set(simulation.ended)
    assert long.computed - begun >= 6 * -(-pace.prompt_rows(4) // 4)


def test_a_fork_shares_full_blocks_and_copies_the_rest_of_the_last():
    simulation = Simulation(32)
    parent = simulation.submit(0, [5] * 20, 20)
    simulation.step()
    fork, copy = simulation.scheduler.fork(parent, 1)
    assert fork.blocks[0] == parent.blocks[0]
    assert copy == (parent.blocks[1], fork.blocks[1])
    assert fork.computed == parent.computed


def test_a_long_prompt_comes_forward_beside_those_who_wait_for_a_token_but_does_not_hold_them_up():
    pace = Pace(of_step=16.0, of_decode=2.0, stretch=1.5, most=256)
    simulation = Simulation(64, Limits(running=8), pace)
    for number in range(4):
        simulation.submit(number, [number], 60)
    simulation.step()
    simulation.submit(4, [9] * 200, 1)
    simulation.step()
    assert simulation.rows[-1] == 4 + pace.prompt_rows(4) == 4 + 12
    for _ in range(16):
        simulation.step()
        assert simulation.rows[-1] <= 4 + 12
    assert (4, 0) in simulation.ended


def test_a_deadline_that_has_passed_ends_a_request_whether_it_waits_or_runs():
    simulation = Simulation(8, Limits(running=1))
    simulation.submit(0, [1] * 10, 50, deadline=5.0)
    simulation.submit(1, [2] * 10, 50, deadline=3.0)
    simulation.submit(2, [3] * 10, 4, deadline=100.0)
    simulation.run()
    assert simulation.expired == [1, 0]
    assert simulation.ended == [(2, 0)]
    assert simulation.scheduler.pool.held == 0


def test_what_could_never_be_served_is_refused_with_both_numbers():
    simulation = Simulation(4, Limits(running=2))
    assert simulation.scheduler.refusal(64, 1) == ""
    assert "need 5 cache blocks of 16; there are 4" in simulation.scheduler.refusal(65, 1)
    assert "3 sequences" in simulation.scheduler.refusal(1, 3)


@given(decodes=st.integers(0, 64), of_step=st.floats(0, 100), of_decode=st.floats(0.1, 10))
def test_a_step_with_prompts_is_at_most_stretched_as_told_and_always_comes_forward(decodes, of_step, of_decode):
    pace = Pace(of_step, of_decode, stretch=1.5, most=100)
    rows = pace.prompt_rows(decodes)
    assert 1 <= rows <= 100
    alone = of_step + decodes * of_decode
    assert not decodes or rows == 1 or alone + rows <= 1.5 * alone + 1e-6
