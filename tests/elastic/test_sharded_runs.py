"""Workers that hold slices of states alone are killed: what they held is in memory that outlives them."""

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

from shoal.elastic.faults import Fault
from shoal.models.registry import build
from shoal.recipe.recipe import Reporting

cloudpickle.register_pickle_by_value(sys.modules[__name__])
STEPS = 12
IMAGES, WORDS = splits("cnn", 101), splits("gpt", 101)
REPORT = Reporting(evaluate_every=4, checkpoint_every=4, sample=False)
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)  # buffers, clipping
GPT = recipe("gpt", steps=STEPS, report=REPORT)  # a tensor with two names, dropout

PLACES: list[Any] = [
    ("zero1", "backward", 1),
    ("zero2", "exchanging", 2),
    ("zero3", "updating", 1),
    ("zero1", "saving", 0),
    *(pytest.param(*place, marks=pytest.mark.soak) for place in
      (("zero1", "loading", 0), ("zero2", "updating", 0), ("zero3", "waiting", 1), ("zero3", "evaluating", 1))),
]  # fmt: skip


@pytest.mark.parametrize(("states", "phase", "rank"), PLACES)
def test_slices_of_a_killed_worker_are_gone_on_from_without_a_changed_bit(disturb, undisturbed, states, phase, rank):
    step = 8 if phase in ("evaluating", "saving") else 6
    run = disturb(RESNET, how={"states": states}, faults=[Fault("kill", rank, step, phase)], data=IMAGES)
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=IMAGES)
    assert run.steps == list(range(1, STEPS + 1)), "every step is told once, in order"
    (lost,), (recovered,) = run.of("lost"), run.of("recovered")
    assert lost["fault"] == f"kill rank {rank} at step {step}, {phase}"
    assert recovered["before"] == 3
    assert recovered["redone"] <= 1


def dies_after_its_update(file: str, kind: str = "resnet") -> torch.nn.Module:
    """The recipe's model; the first worker that has updated its slices for the sixth time dies before it says so."""
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
    return build(model(kind), {"shape": (1, 8, 8), "classes": CLASSES})


@pytest.mark.parametrize("states", [pytest.param("zero1", marks=pytest.mark.soak), "zero3"])
def test_slices_that_were_half_updated_are_updated_once(disturb, undisturbed, tmp_path, states):
    make = partial(dies_after_its_update, str(tmp_path / "died"))
    run = disturb(RESNET, how={"states": states}, model=make, data=IMAGES)
    assert Path(tmp_path / "died").exists()
    assert len(run.of("lost")) == 1
    assert run.result["weights_sha256"] == undisturbed(RESNET, data=IMAGES)
    assert run.steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_kills_in_a_row_and_during_recovery_are_survived_down_to_one_worker(disturb, undisturbed):
    faults = [
        Fault("kill", 0, 4, "forward"),
        Fault("kill", 0, 5, "updating"),
        Fault("kill", 0, 5, "loading"),
        Fault("kill", 1, 6, "backward"),
        Fault("kill", 0, 9, "exchanging"),
    ]
    run = disturb(GPT, workers=4, how={"states": "zero1"}, faults=faults, data=WORDS)
    assert run.result["weights_sha256"] == undisturbed(GPT, data=WORDS)
    assert run.steps == list(range(1, STEPS + 1))
    assert len(run.of("lost")) == len(faults)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_slices_are_cut_anew_for_another_number_of_workers_without_a_step_lost(disturb, undisturbed, workers):
    long = recipe("gpt", steps=40)
    how = {"states": "zero2"}
    run = disturb(long, workers=2, how=how, data=WORDS, progress=on_commit(3, asks(workers=workers)))
    assert run.result["weights_sha256"] == undisturbed(long, data=WORDS)
    (resized,) = run.of("resized")
    assert (resized["before"], resized["workers"]) == (2, workers)
    assert not run.of("lost")
    assert not run.of("recovered")
    assert run.steps == list(range(1, 41))


@pytest.mark.slow
def test_when_all_who_held_slices_are_lost_the_run_goes_on_from_its_newest_checkpoint(disturb, undisturbed):
    run = disturb(GPT, how={"states": "zero1"}, data=WORDS, progress=on_commit(6, kill_all))
    assert run.result["weights_sha256"] == undisturbed(GPT, data=WORDS)
    assert run.of("resumed")[0]["step"] == 4
