"""The idle share of every pipeline schedule in real processes, beside its formula and its simulation.

    python bench/pipeline_schedules.py [--pass-ms 120] [--rounds 3]

A worker is a process that runs its lowered schedule to the letter: a pass sleeps its time, a message goes over the
workers' sockets and is received where the schedule says. Idle is all of a worker's time between the step's first pass
and its last one in which it runs no pass. Activations are counted as they are made and dropped. All schedules take
turns in each round. Formulas know no messages: how late these make whoever stands still for one is measured on the
way, and the schedule simulated with it, so that what a miss is due to can be told. Then: how long the verification of a
schedule of 64 stages and 512 micro-batches takes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from shoal.comm.launch import Agent
from shoal.parallel.schedules import Kind, lower, make_schedule, verify
from shoal.parallel.schedules.actions import RECEIVES, SENDS
from shoal.parallel.schedules.formulas import bubble, peak
from shoal.parallel.schedules.registry import MAKERS
from shoal.parallel.schedules.simulation import Times, simulate

RESULTS = Path(__file__).parent / "results"
LOOPED = 2  # chunks a worker of the schedules that take any number
SHAPES = ((2, 6), (4, 8), (3, 2))  # workers, micro-batches
MESSAGE = 77  # kind of the bench's messages


def chunks(name: str) -> int:
    return MAKERS[name].chunks or LOOPED


def run_program(group, program: tuple, pass_s: float, first: int) -> tuple[float, float, float, int, int, list]:
    """One step of this worker; ``first`` numbers its messages. (first start, last end, busy seconds, the most
    activations, messages sent, seconds from the end of a pass to here of those that this worker stood still for)"""
    sent = dict.fromkeys(range(group.world), 0)
    received = dict.fromkeys(range(group.world), 0)
    held: set[tuple[int, int]] = set()
    late: list[float] = []
    most, busy, begun, end = 0, 0.0, None, 0.0
    for kind, chunk, micro_batch, peer in program:
        if kind in SENDS:
            group.mesh.send(peer, MESSAGE, first + sent[peer], f"{kind[1]} {chunk} {micro_batch} {end}".encode())
            sent[peer] += 1
        elif kind in RECEIVES:
            origin = chunk - 1 if kind is Kind.RECEIVE_ACTIVATION else chunk + 1
            asked = time.monotonic()
            words, _, passed = group.mesh.receive(peer, MESSAGE, first + received[peer]).decode().rpartition(" ")
            assert words == f"{kind[1]} {origin} {micro_batch}", (kind, chunk, micro_batch, words)
            if asked < float(passed):  # one clock for all processes of a host
                late.append(time.monotonic() - float(passed))
            received[peer] += 1
        else:
            start = time.monotonic()
            begun = start if begun is None else begun
            if kind is Kind.FORWARD:
                held.add((chunk, micro_batch))
                most = max(most, len(held))
            time.sleep(pass_s * (2 if kind is Kind.BACKWARD else 1))
            if kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
                held.remove((chunk, micro_batch))
            end = time.monotonic()
            busy += end - start
    assert not held
    return begun, end, busy, most, sum(sent.values()), late


def worker(group, programs: list, pass_s: float, rounds: int) -> list:
    """By round, by program: what `run_program` gives."""
    made, count = [], 0
    for _ in range(rounds):
        row = []
        for program in programs:
            group.gather(b"")  # all begin together
            row.append(run_program(group, program[group.rank], pass_s, count << 20))
            count += 1
        made.append(row)
    return made


def measure(agent: Agent, p: int, m: int, pass_s: float, rounds: int) -> list[dict]:
    schedules = [make_schedule(name, p, m, LOOPED if MAKERS[name].chunks is None else 1) for name in MAKERS]
    programs = [lower(schedule) for schedule in schedules]
    raw = agent.run(worker, (programs, pass_s, rounds), workers=p)
    rows = []
    for place, schedule in enumerate(schedules):
        steps = [[by_worker[turn][place] for by_worker in raw] for turn in range(rounds)]
        spans = [max(w[1] for w in step) - min(w[0] for w in step) for step in steps]
        idle = [1 - sum(w[2] for w in step) / (p * span) for step, span in zip(steps, spans, strict=True)]
        counted = [max(step[w][3] for step in steps) for w in range(p)]
        name, v = schedule.name, chunks(schedule.name)
        theory, seen = bubble(name, p, m, v), statistics.median(idle)
        late = statistics.fmean(late for step in steps for w in step for late in w[5])
        times = Times(*[(1.0,) * schedule.chunks] * 3, link=late / pass_s)
        told = simulate(schedule, times).bubble
        rows.append(
            {
                "schedule": name,
                "workers": p,
                "micro_batches": m,
                "chunks": v,
                "idle": seen,
                "idle_by_formula": theory,
                "idle_simulated": simulate(schedule).bubble,
                "error": seen / theory - 1,
                "message_s": late,
                "idle_simulated_with_messages": told,
                "error_with_messages": seen / told - 1,
                "all_idle": idle,
                "step_s": statistics.median(spans),
                "step_predicted_s": simulate(schedule).span * pass_s,
                "activations": counted,
                "activations_by_formula": [peak(name, w, p, m, v) for w in range(p)],
                "messages": sum(w[4] for w in steps[0]),
            }
        )
    return rows


def verification() -> list[dict]:
    """Seconds of processor time to verify, which lowers; 64 stages are 64 chunks, however many workers hold them."""
    rows = []
    for name in MAKERS:
        schedule = make_schedule(name, 64 // chunks(name), 512, LOOPED if MAKERS[name].chunks is None else 1)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            made = verify(schedule).program
            seconds.append(time.process_time() - start)
        rows.append({"schedule": name, "seconds": statistics.median(seconds), "actions": sum(map(len, made))})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass-ms", type=float, default=120.0, help="of one chunk: F, I and W each")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    report: dict = {"pass_ms": args.pass_ms, "rounds": args.rounds, "load_before": os.getloadavg(), "steps": []}
    report["verification"] = verification()
    for row in report["verification"]:
        print(f"verified {row['schedule']:<14} {row['seconds']:.2f} s  {row['actions']} actions")
    print(f"{'schedule':<14} p  m  v  idle    formula  error   a message  with it  error   activations")
    with Agent() as agent:
        for p, m in SHAPES:
            for row in measure(agent, p, m, args.pass_ms / 1e3, args.rounds):
                report["steps"].append(row)
                same = row["activations"] == row["activations_by_formula"]
                print(
                    f"{row['schedule']:<14} {p}  {m:<2} {row['chunks']}  {row['idle']:6.2%}  "
                    f"{row['idle_by_formula']:6.2%}  "
                    f"{row['error']:+6.1%}  {row['message_s'] * 1e3:6.2f} ms  "
                    f"{row['idle_simulated_with_messages']:6.2%}  {row['error_with_messages']:+6.1%}  "
                    f"{row['activations']} {'as the formula' if same else 'DIFFER'}",
                    flush=True,
                )
    report["load_after"] = os.getloadavg()
    steps = report["steps"]
    report["summary"] = {
        "within_5_percent": sum(abs(row["error"]) <= 0.05 for row in steps),
        "of": len(steps),
        "within_5_percent_with_messages": sum(abs(row["error_with_messages"]) <= 0.05 for row in steps),
        "largest_error": max(abs(row["error"]) for row in steps),
        "largest_difference_of_shares": max(abs(row["idle"] - row["idle_by_formula"]) for row in steps),
        "activations_equal": sum(row["activations"] == row["activations_by_formula"] for row in steps),
        "slowest_verification_s": max(row["seconds"] for row in report["verification"]),
    }
    print(json.dumps(report["summary"]))
    (RESULTS / "pipeline_schedules.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
