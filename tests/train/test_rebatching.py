"""Runs whose batch follows goodput: decided alike by all, told, repeated where steps are done again, and replayed."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn
from train import goodput_hosts
from train.goodput_hosts import DATA, MADE, POLICY, SGD, OnHost, fixed, rebatched
from train.tiny_runs import splits

from shoal.data.ledger import Ledger
from shoal.errors import UserError
from shoal.recipe.batching import Batching
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.batches import decided, recorded
from shoal.run.run import Run
from shoal.train.api import train
from shoal.train.worker import Worker

cloudpickle.register_pickle_by_value(goodput_hosts)
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def decided_by(agent, tmp_path_factory):
    """``decided_by(recipe)``: a run on two workers that decided on its batches, made once for all that look at it."""
    known = {}

    def train_it(made: Recipe) -> dict:
        key = made.to_toml()
        if key not in known:
            plan, folder = Plan(mesh={"data": 2}, device="cpu"), tmp_path_factory.mktemp("decided") / "run"
            known[key] = train(made, plan, agent=agent, data=DATA, model=OnHost(), run_dir=folder)
        return known[key]

    return train_it


def events_of(result: dict) -> list[dict]:
    return Run(Path(result["run_dir"])).events()


def ledger_of(made: Recipe) -> Ledger:
    return Ledger(len(DATA.train), made.batch, made.shards, made.micro_batches, made.seed)


def replayed(result: dict) -> Recipe:
    run = Run(Path(result["run_dir"]))
    return replace(run.recipe, batching=recorded(run))


@pytest.mark.parametrize(("made", "workers"), [(MADE, 1), (SGD, 3)], ids=["adamw, sqrt", "sgd, adascale"])
def test_a_replayed_run_has_the_bits_of_the_run_that_decided_on_any_number_of_workers(run, decided_by, made, workers):
    first = decided_by(made)
    told = events_of(first)
    assert rebatched(told)[0][1:] == (16, 32)
    assert rebatched(told)[-1][2] == 64, "a step costs the same with any batch there"
    again = run(replayed(first), workers, data=DATA)
    assert again["weights_sha256"] == first["weights_sha256"]
    keys = ("step", "before", "batch", "lr", "lr_before", "noise_scale", "efficiency")
    same = [[e[key] for key in keys] for e in events_of(again) if e["event"] == "rebatched"]
    assert same == [[e[key] for key in keys] for e in told if e["event"] == "rebatched"], "noise, too"


def test_a_run_whose_batch_changes_has_other_bits_than_one_whose_batch_does_not(run, decided_by):
    assert run(fixed(MADE), 2, data=DATA)["weights_sha256"] != decided_by(MADE)["weights_sha256"]


def test_every_step_has_the_batch_and_the_learning_rate_that_was_told_and_each_sample_comes_once(decided_by):
    told = events_of(decided_by(MADE))
    account = ledger_of(MADE).verify(told)
    assert account.wrong == ()
    assert account.ledger.changes == tuple((step, batch) for step, _, batch in rebatched(told))
    changes = {e["step"]: e for e in told if e["event"] == "rebatched"}
    for event in (e for e in told if e["event"] == "committed"):
        batch = account.ledger.batch_of(event["step"] - 1)
        assert event["lr"] == pytest.approx(0.01 * (batch / 16) ** 0.5), "the root rule of Adam"
        if event["step"] in changes:
            assert changes[event["step"]]["lr_before"] == event["lr"]
        if event["step"] - 1 in changes:
            assert changes[event["step"] - 1]["lr"] == event["lr"]


def test_so_many_epochs_stay_so_many_and_the_log_says_how_many_steps_that_are(run):
    made = replace(MADE, steps=0, epochs=4)
    result = run(made, 2, data=DATA, model=OnHost())
    told = events_of(result)
    assert result["samples"] == 4 * len(DATA.train)
    assert result["steps"] == [e["steps"] for e in told if e["event"] == "rebatched"][-1] < 4 * 19
    account = ledger_of(made).verify(told)
    assert account.wrong == ()
    assert account.epochs == 4


def test_adascale_multiplies_the_rate_by_at_most_the_batch_and_at_least_one(decided_by):
    told = events_of(decided_by(SGD))
    rates = [(e["lr"] / 0.05, e["samples"] / 16) for e in told if e["event"] == "committed" and e["step"] > 25]
    assert any(gain > 1 for gain, _ in rates)
    assert all(1 - 1e-9 <= gain <= 4 for gain, _ in rates)


# --- going on -------------------------------------------------------------------------------------------------------


def cut_back(result: dict, step: int, to: Path) -> Path:
    """A copy of the run as it would be had it been killed at its end, with its newest checkpoints not yet written."""
    folder = shutil.copytree(result["run_dir"], to)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return folder


@pytest.mark.parametrize("forgets", [False, True], ids=["as built", "planted: the log is not looked at"])
def test_a_resumed_run_decides_as_its_log_says_though_the_clock_says_otherwise(run, decided_by, tmp_path, forgets):
    first = decided_by(MADE)
    before = rebatched(events_of(first))
    assert any(step > 20 for step, _, _ in before)
    elsewhere = OnHost(fixed=0.0, a=1.0, forgets=forgets)  # where no batch is better than the recipe's
    again = run(MADE, 3, data=DATA, model=elsewhere, resume=cut_back(first, 20, tmp_path / "cut"))
    told = events_of(again)
    if forgets:
        assert again["weights_sha256"] != first["weights_sha256"], "or the test above could not fail"
        return
    assert again["weights_sha256"] == first["weights_sha256"]
    after = told[[e["event"] for e in told].index("resumed") :]
    assert rebatched(after) == [change for change in before if change[0] > 20]
    assert all("as in the log of" in e["why"] for e in after if e["event"] == "rebatched")
    assert ledger_of(MADE).verify(told).wrong == ()


def test_steps_beyond_the_log_are_decided_anew(run, tmp_path):
    first = run(replace(MADE, steps=30), 2, data=DATA, model=OnHost())
    known = rebatched(events_of(first))
    folder, elsewhere = cut_back(first, 20, tmp_path / "cut"), OnHost(fixed=0.0, a=1.0)
    again = run(replace(MADE, steps=50), 2, data=DATA, model=elsewhere, resume=folder)
    after = rebatched(events_of(again))[len(known) :]
    assert [change for change in after if change[0] <= 30] == [change for change in known if change[0] > 20]
    assert [change for change in after if change[0] > 30], "the other clock has its say"


def test_a_branch_begins_with_the_batches_of_the_run_it_comes_from_and_repeats_its_decisions(run, decided_by):
    first = decided_by(MADE)
    start = f"{first['run_dir']}@30"
    branch = run(MADE, 1, data=DATA, model=OnHost(fixed=0.0, a=1.0), start=start)
    assert branch["weights_sha256"] == first["weights_sha256"]
    assert ledger_of(MADE).verify(events_of(branch)).wrong == ()
    with pytest.raises(UserError, match="has changed to 64, and the recipe says that it stays 16"):
        run(fixed(MADE), 1, data=DATA, start=start)


@pytest.mark.parametrize(
    "states", ["zero3", *(pytest.param(each, marks=pytest.mark.slow) for each in ("zero1", "zero2"))]
)
def test_sharded_states_keep_the_bits_of_a_batch_that_changes(run, decided_by, states):
    first = decided_by(MADE)
    plan = Plan(mesh={"data": 3}, states=states, device="cpu")
    assert run(replayed(first), plan=plan, data=DATA)["weights_sha256"] == first["weights_sha256"]


# --- what a log says ------------------------------------------------------------------------------------------------


def log(*lines: tuple) -> list[dict]:
    names = {"r": "rebatched", "c": "committed", "resumed": "resumed", "branched": "branched"}
    fields = {"r": "batch", "branched": "batches"}
    return [
        {"event": names[kind], "step": step, **({fields[kind]: rest[0]} if rest else {})} for kind, step, *rest in lines
    ]


def test_a_log_tells_the_newest_decision_on_every_step_and_how_far_it_goes():
    straight = log(("c", 1), ("r", 2, 32), ("c", 2), ("c", 3), ("r", 4, 64), ("c", 4))
    assert decided(straight) == ([(2, 32), (4, 64)], 4)
    cut_short = [*straight, *log(("resumed", 1), ("r", 2, 32), ("c", 2))]
    assert decided(cut_short) == ([(2, 32), (4, 64)], 4), "what was not done again stays known"
    otherwise = [*straight, *log(("resumed", 1), ("c", 2), ("r", 3, 48), ("c", 3), ("c", 4), ("c", 5))]
    assert decided(otherwise) == ([(3, 48)], 5)
    assert decided(log(("branched", 9, [[3, 32]]), ("c", 10))) == ([(3, 32)], 10)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batching": Batching(policy="goodput", most=8)}, "batching.most = 8 is below the batch of 16"),
        ({"batching": Batching(most=64)}, "batching.most = 64 is for batching.policy = 'goodput'"),
        ({"batching": Batching(changes=((3, 16),))}, "batching.changes is for batching.policy = 'recorded'"),
        ({"batching": Batching(policy="recorded", changes=((3, 20),))}, "20 samples after step 3 are not divisible"),
        ({"batching": Batching(policy="recorded", changes=((3, 16), (2, 32)))}, "must go up"),
        ({"batching": POLICY, "shards": 1}, "use at least 2 shards"),
    ],
)
def test_a_recipe_whose_batch_cannot_change_so_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        replace(fixed(MADE), **changes)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sync": "fast"}, "sync = 'fast'"),
        ({"sync": "parameter-server"}, "sync = 'parameter-server'"),
        ({"mesh": {"pipe": 2}}, r"the mesh splits this one \(pipe = 2\)"),
        ({"compression": "fp16"}, "compression = 'fp16'"),
        ({"memory": MemoryPlan(peak_bytes=10**9)}, "memory.peak_bytes, which is found for one batch"),
    ],
)
def test_a_plan_under_which_the_batch_cannot_change_is_refused_before_anything_runs(run, tmp_path, how, said):
    with pytest.raises(UserError, match=said):
        run(MADE, plan=Plan(**{"mesh": {"data": 2}, "device": "cpu", **how}), data=DATA)
    assert not (tmp_path / "run1").exists()


def test_only_a_policy_is_part_of_the_recipes_hash():
    assert MADE.arithmetic_hash != fixed(MADE).arithmetic_hash
    plain = fixed(MADE)
    assert plain.arithmetic_hash == replace(plain, batching=Batching(rule="linear")).arithmetic_hash


def test_a_recorded_batch_goes_through_toml(tmp_path):
    recipe = replace(fixed(MADE), batching=Batching(policy="recorded", changes=((3, 32), (9, 16))))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.from_toml(tmp_path / "recipe.toml").batching == recipe.batching


def _own_loop(group):
    worker = Worker(group, Plan(mesh={"data": group.world}, device="cpu"), shards=4)
    model = worker.model(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match="between two steps"):
        worker.rebatch(16)
    samples = []
    for step in worker.steps(splits("cnn", 93).train, batch=8, epochs=1):
        for batch in step:
            loss = nn.functional.cross_entropy(model(batch["input"]), batch["target"], reduction="sum")
            step.backward(loss, len(batch["target"]))
        step.commit()
        samples.append(step.samples)
        if step.number in (2, 6):
            worker.rebatch(16 if step.number == 2 else 8)
    with pytest.raises(UserError, match="batch 10 is not divisible by 4 shards"):
        worker.rebatch(10)
    return samples, worker.weights_sha256


def test_an_own_loop_changes_its_batch_between_two_steps_on_any_number_of_workers(on_workers):
    (alone,) = on_workers(1, _own_loop)
    assert alone[0] == [8, 8, 16, 16, 16, 16, 8, 5]
    assert on_workers(3, _own_loop) == [alone] * 3
