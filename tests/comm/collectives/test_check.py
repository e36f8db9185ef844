"""Planted faults: each is caught, and the message names rank, round and action."""

import time
from dataclasses import replace

import pytest

from shoal.comm.collectives.actions import Add, Copy, Program, Receive, Reduce, Send
from shoal.comm.collectives.check import ProgramError, check, order
from shoal.comm.collectives.registry import build

RING = build("all_reduce", "ring", 4)
DIRECT = build("all_reduce", "direct", 3)


def edited(program, rank, number, actions):
    """The program with another round ``number`` of ``rank``."""
    rounds = list(program.rounds[rank])
    rounds[number] = tuple(actions)
    return replace(program, rounds=(*program.rounds[:rank], tuple(rounds), *program.rounds[rank + 1 :]))


def caught(program, *said):
    with pytest.raises(ProgramError) as told:
        check(program)
    message = str(told.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message


def test_the_programs_that_are_spoilt_here_are_right():
    check(RING)
    check(DIRECT)


def test_a_dropped_send():
    last = [a for a in RING.rounds[1][5] if not isinstance(a, Send)]
    caught(edited(RING, 1, 5, last), "rank 2, round 5, Receive(3<1)", "nothing comes: rank 1 sends 5 of 6 messages")


def test_a_dropped_send_in_the_middle_shifts_the_messages_and_is_seen_where_they_first_differ():
    rest = [a for a in RING.rounds[1][1] if not isinstance(a, Send)]
    caught(
        edited(RING, 1, 1, rest),
        "rank 2, round 1, Reduce(",
        "the message that comes is chunk 2 (rank 1, round 2, Send(",
    )


def test_a_missing_receive():
    rest = [a for a in RING.rounds[2][5] if isinstance(a, Send)]
    caught(edited(RING, 2, 5, rest), "rank 1, round 5, Send(3>2)", "left over: rank 2 receives 5 of 6")


def test_a_doubled_reduce():
    rounds = [
        (Send(1, 0), Reduce(1, 0), Send(1, 0)),
        (Send(0, 0), Reduce(0, 0), Reduce(0, 0)),
    ]
    program = Program(collective="all_reduce", algorithm="mine", ranks=2, rounds=tuple((r,) for r in rounds))
    caught(program, "rank 1, round 0, Reduce(0<+0): adds the operand of rank 0 a second time")


def test_an_operand_that_is_added_twice_by_a_local_action():
    twice = [*DIRECT.rounds[0][0], Add(0, 1)]
    caught(edited(DIRECT, 0, 0, twice), "rank 0, round 0, Add(0+=1): adds the operand of rank 1 a second time")


def test_two_messages_in_swapped_order():
    first, second = Send(1, 0), Send(1, 1)
    receives = (Receive(0, 0), Receive(0, 1))
    base = {"collective": "broadcast", "algorithm": "mine", "ranks": 2, "chunks": 2}
    check(Program(rounds=(((first, second),), (receives,)), **base))
    swapped = Program(rounds=(((second, first),), (receives,)), **base)
    caught(swapped, "rank 1, round 0, Receive(0<0): the message that comes is chunk 1 (rank 0, round 0, Send(1>1))")


def test_rounds_in_swapped_order():
    rounds = list(RING.rounds[2])
    rounds[2], rounds[3] = rounds[3], rounds[2]
    caught(replace(RING, rounds=(*RING.rounds[:2], tuple(rounds), RING.rounds[3])), "rank 2, round")


def test_an_addition_in_another_order_on_one_rank():
    """The numbers would be right, but not the bits alike."""
    program = build("all_reduce", "recursive_doubling", 4)
    turned = [replace(a, incoming_first=False) if isinstance(a, Reduce) else a for a in program.rounds[3][0]]
    spoilt = edited(program, 3, 0, turned)
    assert not order(spoilt).agrees
    caught(spoilt, "at the end: chunk 0 was added as", "((0+1)+(3+2))", "((0+1)+(2+3))")


def test_a_wrong_peer():
    wrong = [replace(a, to=0) if isinstance(a, Send) else a for a in RING.rounds[1][5]]
    caught(edited(RING, 1, 5, wrong), "rank 1, round 5, Send(3>0)", "left over: rank 0 receives 0 of 1")


@pytest.mark.parametrize("peer", [1, 4, -1])
def test_a_peer_that_is_none(peer):
    wrong = [replace(a, to=peer) if isinstance(a, Send) else a for a in RING.rounds[1][0]]
    caught(edited(RING, 1, 0, wrong), "rank 1, round 0, Send(", f"no peer {peer}: there are ranks 0 to 3")


def test_a_wrong_chunk():
    wrong = [replace(a, chunk=1) if isinstance(a, Send) else a for a in RING.rounds[0][0]]
    caught(edited(RING, 0, 0, wrong), "rank 1, round 0, Reduce(3<0+)", "the message that comes is chunk 1")


def test_a_chunk_that_is_not_there():
    wrong = [replace(a, chunk=9) if isinstance(a, Send) else a for a in RING.rounds[0][0]]
    caught(edited(RING, 0, 0, wrong), "rank 0, round 0, Send(9>1): there is no such chunk: 4 are numbered from 0")


def test_a_chunk_that_is_sent_and_overwritten_in_one_round():
    rounds = (((Send(1, 0), Receive(1, 0)),), ((Send(0, 0), Receive(0, 0)),))
    program = Program(collective="all_reduce", algorithm="mine", ranks=2, rounds=rounds)
    caught(program, "rank 0, round 0, Receive(0<1): chunk 0 is overwritten while the same round sends it")


def test_a_chunk_that_is_received_twice_in_one_round():
    rounds = (((Send(2, 0),),), ((Send(2, 0),),), ((Receive(0, 0), Receive(1, 0)),))
    program = Program(collective="reduce", algorithm="mine", ranks=3, rounds=rounds, root=2)
    caught(program, "rank 2, round 0, Receive(0<1): chunk 0 is received twice in one round")


def test_an_overwritten_operand():
    rounds = (((Receive(1, 0),),), ((Send(0, 0),),))
    program = Program(collective="reduce", algorithm="mine", ranks=2, rounds=rounds)
    caught(program, "rank 0, at the end: chunk 0 lacks the operand of rank 0")


def test_a_chunk_that_is_read_before_it_is_written():
    rounds = (((Receive(1, 0),),), ((Send(0, 0),),))
    program = Program(collective="broadcast", algorithm="mine", ranks=2, rounds=rounds, root=0)
    caught(program, "rank 1, round 0, Send(0>0): chunk 0 is read before anything is written to it")


def test_an_addition_of_different_data():
    program = Program(
        collective="reduce",
        algorithm="mine",
        ranks=1,
        chunks=2,
        scratch=(0,),
        rounds=(((Copy(2, 0), Add(2, 0)),),),
    )
    caught(program, "rank 0, round 0, Add(2+=0): adds the operand of rank 0 a second time")
    mixed = replace(program, rounds=(((Add(1, 0),),),))
    caught(mixed, "rank 0, round 0, Add(1+=0): chunks 1 and 0 differ in length")


def test_data_of_another_chunk_is_not_mistaken_for_ones_own():
    """Scratch is as long as both chunks: only what is in it differs."""
    moves = ((Send(1, 0),), (Receive(0, 2),))
    program = Program(
        collective="broadcast", algorithm="mine", ranks=2, chunks=2, scratch=(0,), rounds=tuple((m,) for m in moves)
    )
    caught(program, "rank 1, at the end: chunk 0 was never written")


def test_communication_after_local_actions():
    late = [*DIRECT.rounds[0][0], Send(1, 0)]
    caught(edited(DIRECT, 0, 0, late), "rank 0, round 0, Send(0>1): communication after local actions")


def test_two_ranks_that_send_before_they_receive_wait_for_ever():
    rounds = (((Send(1, 0),), (Reduce(1, 0),)), ((Send(0, 0),), (Reduce(0, 0),)))
    program = Program(collective="all_reduce", algorithm="mine", ranks=2, rounds=rounds)
    caught(
        program,
        "deadlock: rank 0, round 0, Send(0>1) waits for rank 1 to reach round 1; "
        "rank 1, round 0, Send(0>0) waits for rank 0 to reach round 1",
    )


def test_a_circle_of_three_is_told_from_end_to_end():
    rounds = tuple(((Send((r + 1) % 3, 0),), (Reduce((r + 2) % 3, 0),)) for r in range(3))
    program = Program(collective="all_reduce", algorithm="mine", ranks=3, rounds=rounds)
    caught(program, *(f"rank {r}, round 0, Send(0>{(r + 1) % 3}) waits" for r in range(3)))


def test_a_result_that_lacks_operands():
    rounds = tuple(rank[:-1] for rank in build("all_reduce", "recursive_doubling", 8).rounds)
    program = replace(build("all_reduce", "recursive_doubling", 8), rounds=rounds)
    caught(program, "rank 0, at the end: chunk 0 lacks the operand of ranks 4, 5, 6, 7")


def test_a_barrier_must_hear_of_everybody_but_may_hear_twice():
    dissemination = tuple(
        tuple((Send((rank + d) % 3, 0), Reduce((rank - d) % 3, 0)) for d in (1, 2)) for rank in range(3)
    )
    program = Program(collective="barrier", algorithm="mine", ranks=3, rounds=dissemination)
    check(program)
    caught(replace(program, rounds=tuple(rounds[:1] for rounds in dissemination)), "lacks the operand of rank")


def test_a_ring_of_64_ranks_is_checked_in_less_than_two_seconds():
    program = build("all_reduce", "ring", 64)
    start = time.process_time()
    found = check(program)
    assert time.process_time() - start < 2.0
    assert found.depth == 63
