"""Real workers that are killed, stopped, added and taken away: the weights are those of an undisturbed run."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from train.tiny_runs import recipe, splits

from shoal.elastic import roster
from shoal.elastic.faults import PHASES, Fault
from shoal.errors import RunFailed, UserError
from shoal.recipe.recipe import Reporting

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a file of tests

STEPS = 12
DATA = splits("cnn", 101)
# evaluation and checkpoints on the way, buffers (batch norm), dropout, clipping: all that could lose a bit
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=Reporting(evaluate_every=4, checkpoint_every=4, sample=False))
CNN = recipe("cnn", steps=STEPS, report=Reporting(evaluate_every=4, checkpoint_every=4, sample=False))


def on_commit(step: int, act: Any) -> Any:
    """A listener that acts once, when a step has been told as committed."""
    done: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "committed" and event["step"] >= step and not done:
            done.append(step)
            act(Path(event["run_dir"]))

    return listen


PLACES = [
    ("loading", 2),
    ("forward", 0),
    ("backward", 1),
    ("waiting", 1),
    ("exchanging", 0),
    ("updating", 0),
    ("evaluating", 1),
    ("saving", 0),
    ("bucket", 1),
    ("updated", 2),
]
AGAIN: list[Any] = [pytest.param(*place, marks=pytest.mark.soak) for place in (("exchanging", 2), ("updating", 1))]


def test_every_phase_is_among_those_that_are_tried():
    elsewhere = {"recovering"}  # which comes after another fault: test_scenarios.py
    assert {phase for phase, _ in PLACES} | elsewhere == set(PHASES)


@pytest.mark.parametrize(("phase", "rank"), [*PLACES, *AGAIN])
def test_a_kill_in_any_phase_costs_at_most_a_step_and_no_bit(disturb, undisturbed, phase, rank):
    step = 8 if phase in ("evaluating", "saving") else 6
    run = disturb(RESNET, faults=[Fault("kill", rank, step, phase)], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.steps == list(range(1, STEPS + 1)), "every step is told once, in order"
    (lost,), (recovered,) = run.of("lost"), run.of("recovered")
    assert lost["fault"] == f"kill rank {rank} at step {step}, {phase}"
    assert "SIGKILL" in lost["why"]
    assert lost["noticed_s"] < 5, "ten times the aim: other tests may run beside this one"
    assert (lost["cost_s"] > 0, lost["steps"] <= 2) == (True, True), "the work of all since the last committed step"
    assert recovered["step"] - lost["step"] <= 2
    assert recovered["before"] == 3
    assert run.result["samples"] == sum(e["samples"] for e in run.of("committed"))


def test_survivors_keep_their_processes_and_the_lost_place_is_taken(disturb):
    rosters: list[list[roster.Entry]] = []
    run = disturb(
        recipe("cnn", steps=40),
        faults=[Fault("kill", 1, 5, "backward")],
        data=DATA,
        progress=lambda event: rosters.append(roster.read(Path(event["run_dir"]))),
    )
    seen = [r for r in rosters if r]
    first, last = seen[0], seen[-1]
    assert [e.rank for e in first] == [0, 1, 2]
    assert [s for e in first for s in e.shards] == list(range(8))
    pids = [e.pid for e in first]
    smallest = min(seen, key=len)
    assert [e.pid for e in smallest] == [pids[0], pids[2]]
    assert [e.pid for e in last[:2]] == [pids[0], pids[2]]
    assert last[0].epoch > first[0].epoch
    if run.of("resized"):  # the run was long enough for the new worker
        assert run.of("resized")[0]["workers"] == 3
        assert last[2].pid not in pids
    assert json.loads((run.run.path / "workers.json").read_text()) == [], "nobody trains it any more"


def test_a_stopped_worker_is_suspected_by_the_runs_own_step_times_and_can_never_commit(disturb, undisturbed):
    run = disturb(CNN, faults=[Fault("stop", 0, 7, "exchanging")], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(CNN, data=DATA)
    (suspected,) = run.of("suspected")
    assert "stopped by a signal" in suspected["why"]
    assert "steps take at most" in suspected["why"]
    assert suspected["noticed_s"] >= 2.0
    assert "so that it cannot go on" in run.of("lost")[0]["why"]
    assert run.steps == list(range(1, STEPS + 1))


def test_faults_in_three_steps_in_a_row_and_during_recovery_cost_no_bit(disturb, undisturbed):
    faults = [
        Fault("kill", 0, 4, "forward"),
        Fault("kill", 0, 5, "updating"),
        Fault("kill", 0, 5, "loading"),
        Fault("kill", 1, 6, "backward"),
        Fault("kill", 0, 12, "evaluating"),
        Fault("kill", 0, 12, "saving"),
    ]
    run = disturb(RESNET, workers=4, faults=faults, data=DATA)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.steps == list(range(1, STEPS + 1))
    assert len(run.of("lost")) == len(faults)


def kill_all(path: Path) -> None:
    for entry in roster.read(path):
        os.kill(entry.pid, signal.SIGKILL)


def test_when_all_are_lost_the_run_goes_on_from_its_newest_checkpoint(disturb, undisturbed):
    run = disturb(CNN, data=DATA, progress=on_commit(6, kill_all))
    assert run.result["weights_sha256"] == undisturbed(CNN, data=DATA)
    assert any("all were lost" in e["why"] for e in run.of("joined"))
    assert run.of("resumed")[0]["step"] == 4
    assert run.steps == [*range(1, run.steps.index(5, 5) + 1), *range(5, STEPS + 1)], "steps past it are done again"


def test_below_its_minimum_the_run_waits_with_its_state_in_memory(disturb, undisturbed):
    run = disturb(CNN, least=3, faults=[Fault("kill", 1, 5, "forward")], data=DATA)
    assert run.result["weights_sha256"] == undisturbed(CNN, data=DATA)
    assert "2 workers are left and 3 are needed" in run.of("paused")[0]["why"]
    (recovered,) = run.of("recovered")
    assert recovered["workers"] == 3, "no step was done by fewer"
    assert not any("checkpoint" in e["why"] for e in run.of("resumed"))


def asks(**what: Any) -> Any:
    return lambda path: roster.wish(path, **what)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.soak), 5])
def test_another_number_of_workers_takes_no_step_back(disturb, undisturbed, workers):
    long = recipe("cnn", steps=60)
    run = disturb(long, data=DATA, progress=on_commit(3, asks(workers=workers)))
    assert run.result["weights_sha256"] == undisturbed(long, data=DATA)
    (resized,) = run.of("resized")
    assert (resized["before"], resized["workers"]) == (3, workers)
    assert not run.of("lost")
    assert not run.of("recovered")


def terminate_rank_0(path: Path) -> None:
    os.kill(roster.read(path)[0].pid, signal.SIGTERM)


def test_a_worker_that_is_asked_to_leave_does_so_after_its_step_also_when_it_is_rank_0(disturb, undisturbed):
    long = recipe("cnn", steps=60)
    run = disturb(long, data=DATA, progress=on_commit(3, terminate_rank_0))
    assert run.result["weights_sha256"] == undisturbed(long, data=DATA)
    (resized,) = run.of("resized")
    assert resized["workers"] == 2
    assert "asked to leave (SIGTERM)" in resized["why"]
    assert not run.of("lost")


class SlowInPlaces(torch.nn.Module):
    """Takes its time in the process whose number is in a file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        path = Path(self.file)
        if path.exists() and path.read_text() == str(os.getpid()):
            time.sleep(0.03)
        out: torch.Tensor = self.layers(input)
        return out


def test_a_slow_worker_is_named_and_its_shards_move_without_a_changed_bit(disturb, undisturbed, tmp_path):
    file, long = tmp_path / "slow", recipe("mlp", steps=70)

    def slow_down(path: Path) -> None:
        file.write_text(str(roster.read(path)[1].pid))

    make = partial(SlowInPlaces, str(file))
    run = disturb(long, data=DATA, model=make, rebalance=True, progress=on_commit(12, slow_down))
    assert run.result["weights_sha256"] == undisturbed(long, data=DATA, model=make)
    slow = [event for event in run.of("slow") if event["why"].startswith("rank 1 ")]
    assert slow
    assert "ms a shard, where the middle one of the others takes" in slow[0]["why"]
    assert slow[0]["step"] <= 12 + 40
    assert run.of("rebalanced")
    assert run.steps == list(range(1, 71))
    assert not run.of("lost")


def test_a_drained_run_is_saved_and_goes_on_later_with_the_same_bits(disturb, undisturbed, agent):
    from shoal.elastic.api import train_elastic

    long = recipe("cnn", steps=60)
    run = disturb(long, data=DATA, progress=on_commit(3, asks(drain="all")))
    assert run.result["interrupted"]
    assert run.result["steps"] < 60
    again = train_elastic(long, run.run.plan, agent=agent, resume=run.run.path, data=DATA)
    assert again["weights_sha256"] == undisturbed(long, data=DATA)


def test_a_worker_that_raises_fails_the_run_as_without_elasticity(disturb):
    from dataclasses import replace

    with pytest.raises(RunFailed, match=r"rank \d on .* failed at step"):
        disturb(replace(CNN, optimizer=replace(CNN.optimizer, lr=1e38)), data=DATA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sync": "local"}, "is not elastic yet"),
        ({"compression": "int8", "sync": "fast"}, "is not elastic yet"),
        ({"states": "zero1", "state_group": 1}, "is not elastic yet"),
        ({"mesh": {"data": 2, "tensor": 2}}, "a mesh with tensor = 2 is not elastic yet"),
        ({"placement": (7, 1)}, "leave --placement out"),
    ],
)
def test_plans_whose_workers_hold_what_no_other_one_does_are_refused(tmp_path, changes, said):
    from shoal.elastic.api import train_elastic
    from shoal.recipe.plan import Plan

    with pytest.raises(UserError, match=said):
        train_elastic(CNN, Plan(**{"mesh": {"data": 2}, **changes}), run_dir=tmp_path / "run", data=DATA)
