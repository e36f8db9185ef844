"""Parameter servers and their workers are killed, added and taken away: every acknowledged push is applied once."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from elastic.test_elastic_runs import asks, kill_all, on_commit
from torch.optim.optimizer import register_optimizer_step_post_hook
from train.tiny_runs import CLASSES, model, recipe, splits

from shoal.elastic import roster
from shoal.elastic.api import train_elastic
from shoal.elastic.faults import Fault
from shoal.errors import UserError
from shoal.models.registry import build
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting

cloudpickle.register_pickle_by_value(sys.modules[__name__])
STEPS = 12
REPORT = Reporting(evaluate_every=4, checkpoint_every=4, sample=False)
DATA = splits("cnn", 101)
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)


def served(servers: int = 1) -> dict[str, Any]:
    return {"sync": "parameter-server", "servers": servers}


PLACES: list[Any] = [  # ranks 0 and 1 are workers, 2 and 3 servers
    ("updating", 2),  # a push has come
    ("waiting", 3),
    ("forward", 0),
    *(pytest.param(*place, marks=pytest.mark.soak) for place in
      (("exchanging", 1), ("updating", 0), ("evaluating", 1), ("saving", 0))),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "rank"), PLACES)
def test_a_killed_server_or_worker_costs_no_bit_and_no_other_process(disturb, undisturbed, phase, rank):
    step = 8 if phase in ("evaluating", "saving") else 6
    rosters: list[list[roster.Entry]] = []
    run = disturb(
        RESNET,
        workers=2,
        how=served(2),
        faults=[Fault("kill", rank, step, phase)],
        data=DATA,
        progress=lambda event: rosters.append(roster.read(Path(event["run_dir"]))),
    )
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.steps == list(range(1, STEPS + 1)), "every step is told once, in order"
    (lost,), (recovered,) = run.of("lost"), run.of("recovered")
    assert lost["why"].startswith(f"server {rank - 2} " if rank > 1 else f"rank {rank} ")
    assert recovered["redone"] <= 1, "nobody begins a step before the one before is in the mirror"
    before = [entry.pid for entry in next(r for r in rosters if len(r) == 4)]
    killed = before.pop(rank)
    assert all({e.pid for e in r} >= set(before) and killed not in [e.pid for e in r] for r in rosters if len(r) == 3)


def dies_after_its_update(file: str) -> torch.nn.Module:
    """The recipe's model; the first server that has made its sixth update dies before it tells anybody."""
    updates: list[int] = []

    def strike(*_: Any) -> None:
        updates.append(1)
        if len(updates) == 6:
            try:
                os.close(os.open(file, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(strike)
    return build(model("resnet"), {"shape": (1, 8, 8), "classes": CLASSES})


def test_an_update_that_no_worker_has_heard_of_is_made_once(disturb, undisturbed, tmp_path):
    make = partial(dies_after_its_update, str(tmp_path / "died"))
    run = disturb(RESNET, workers=2, how=served(2), model=make, data=DATA)
    (lost,) = run.of("lost")
    assert lost["why"].startswith("server ")
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_servers_are_added_and_taken_away_while_the_run_trains(disturb, undisturbed):
    long = recipe("resnet", steps=60)
    wishes = [(3, asks(servers=4)), (12, asks(servers=2))]
    seen: dict[int, int] = {}

    def listen(event: dict[str, Any]) -> None:
        path = Path(event["run_dir"])
        if event["event"] == "committed":
            seen[event["step"]] = sum(not entry.shards for entry in roster.read(path))
            if wishes and event["step"] >= wishes[0][0] and (len(wishes) == 2 or 4 in seen.values()):
                wishes.pop(0)[1](path)

    run = disturb(long, workers=2, how=served(1), data=DATA, progress=listen)
    assert run.result["weights_sha256"] == undisturbed(long, data=DATA)
    assert list(dict.fromkeys(seen.values())) == [1, 4, 2]
    assert not run.of("lost")
    assert run.steps == list(range(1, 61))


@pytest.mark.slow
def test_servers_and_workers_die_in_a_row_and_during_recovery(disturb, undisturbed):
    faults = [
        Fault("kill", 3, 4, "updating"),
        Fault("kill", 2, 4, "waiting"),
        Fault("kill", 0, 6, "backward"),
        Fault("kill", 1, 6, "loading"),
    ]
    run = disturb(RESNET, workers=3, how=served(2), faults=faults, data=DATA)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.steps == list(range(1, STEPS + 1))
    assert len(run.of("lost")) == len(faults)


@pytest.mark.slow
def test_when_servers_and_workers_are_all_lost_the_newest_checkpoint_is_served(disturb, undisturbed):
    run = disturb(RESNET, workers=2, how=served(1), data=DATA, progress=on_commit(6, kill_all))
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=DATA)
    assert run.of("resumed")[0]["step"] == 4


def test_shards_are_not_moved_between_workers_and_servers(tmp_path):
    with pytest.raises(UserError, match="--rebalance moves shards between workers that are all alike"):
        train_elastic(RESNET, Plan(**served()), rebalance=True, run_dir=tmp_path / "run", data=DATA)


def test_stale_servers_are_refused(tmp_path):
    with pytest.raises(UserError, match="staleness = 3 is not elastic yet"):
        train_elastic(RESNET, Plan(mesh={"data": 2}, staleness=3, **served()), run_dir=tmp_path / "run", data=DATA)
