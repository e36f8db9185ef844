"""Training on parameter servers, and with local steps: the same bits where promised, the bound where not."""

import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import cloudpickle
import pytest
import torch
from train import tiny_runs
from train.test_exactness import plan, trail
from train.tiny_runs import OptimizerSpec, recipe, splits

from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting, ScheduleSpec
from shoal.run.run import Run
from shoal.train.loop import Order, run_recipe
from shoal.train.worker import Worker

SCHEDULE = ScheduleSpec(kind="cosine", warmup_steps=3)


def served(*placement: int, servers: int = 1, staleness: int = 0, **options: object) -> Plan:
    return plan(*placement, sync="parameter-server", servers=servers, staleness=staleness, **options)


def local(*placement: int, every: int = 4) -> Plan:
    return plan(*placement, sync="local", average_every=every)


def events(result: dict, kind: str) -> list[dict]:
    return [event for event in Run(Path(result["run_dir"])).events() if event["event"] == kind]


# --- synchronous: the bits of all-reduce --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cnn", "resnet", "gpt"])
def test_synchronous_servers_give_the_bits_of_exact_training(run, kind):
    """Dropout, running statistics, tied weights, clipping, a schedule, and a tail that leaves a worker without work."""
    wanted, data = recipe(kind, clip=0.05, schedule=SCHEDULE, steps=5), splits(kind, 53)  # the fourth is a tail
    exact = run(wanted, 2, data=data)
    for other in (served(8, servers=2), served(3, 5), served(3, 3, 2, servers=2), served(2, 2, 2, 2, servers=3)):
        result = run(wanted, plan=other, data=data)
        assert result["weights_sha256"] == exact["weights_sha256"], other
        assert trail(result) == trail(exact), other
        assert result["figures"] == exact["figures"], other


def test_a_tensor_that_spans_servers_and_buckets_is_updated_to_the_bit(run):
    wide = replace(tiny_runs.model("mlp"), options={"hidden": (700, 300)})
    wanted, data = recipe("mlp", model=wide, clip=0.1, steps=5), splits("mlp", 53)
    exact = run(wanted, 2, data=data)
    for other in (served(3, 5, servers=2), served(4, 4, servers=3, bucket_bytes=1), served(8, bucket_bytes=300_000)):
        assert run(wanted, plan=other, data=data)["weights_sha256"] == exact["weights_sha256"], other


OPTIMIZERS = {
    "SGD": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": False},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "ASGD": {},
    "Rprop": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_gives_on_servers_what_it_gives_on_workers(run, name):
    """Adafactor looks at whole matrices: the servers then cut between tensors only."""
    wide = replace(
        tiny_runs.model("mlp"), options={"hidden": (300,), "bias": False} if name == "Muon" else {"hidden": (300,)}
    )
    spec = OptimizerSpec(name=name, lr=0.01, options=OPTIMIZERS[name])
    wanted, data = recipe("mlp", model=wide, optimizer=spec, steps=6), splits("mlp", 40)
    exact = run(wanted, 1, data=data)
    result = run(wanted, plan=served(3, 5, servers=2), data=data)
    assert result["weights_sha256"] == exact["weights_sha256"]


def test_frozen_parameters_stay_where_they_are(run):
    frozen = replace(tiny_runs.model("cnn"), freeze=("*0*",))
    wanted, data = recipe("cnn", model=frozen, steps=6), splits("cnn", 40)
    result = run(wanted, plan=served(4, 4, servers=2), data=data)
    assert result["weights_sha256"] == run(wanted, 1, data=data)["weights_sha256"]


def test_a_model_of_low_precision_is_not_cut_inside_of_tensors(run):
    def half():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 77), torch.nn.Linear(77, 5)).bfloat16()

    wanted = recipe("mlp", precision="bfloat16", steps=6, optimizer=OptimizerSpec(name="sgd", lr=0.1))
    exact = run(wanted, 1, data=splits("mlp", 40), model=half)
    result = run(wanted, plan=served(4, 4, servers=3), data=splits("mlp", 40), model=half)
    assert result["weights_sha256"] == exact["weights_sha256"]


def test_parameters_that_do_not_lie_in_rows_keep_their_strides_and_their_bits(run):
    """A convolution in channels_last runs other kernels, which may sum in another order."""

    def made():
        torch.manual_seed(0)
        body = [torch.nn.Conv2d(1, 6, 3), torch.nn.Conv2d(6, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 5)]
        return torch.nn.Sequential(*body).to(memory_format=torch.channels_last)

    wanted, data = recipe("cnn", steps=6), splits("cnn", 40)
    exact = run(wanted, 2, data=data, model=made)
    for other in (served(4, 4, servers=2), served(8, servers=2, staleness=1)):
        result = run(wanted, plan=other, data=data, model=made)
        if not other.staleness:
            assert result["weights_sha256"] == exact["weights_sha256"]
        assert result["figures"]["accuracy"] == pytest.approx(exact["figures"]["accuracy"], abs=0.2)


@pytest.mark.parametrize("kind", ["cnn", "gpt"])
def test_a_run_may_go_on_with_other_servers_or_none_and_keeps_its_bits(run, kind):
    wanted, data = recipe(kind, clip=0.05, steps=7), splits(kind, 53)
    whole = run(wanted, 1, data=data)
    part = run(replace(wanted, steps=3), plan=served(3, 5, servers=2), data=data)
    more = run(replace(wanted, steps=5), plan=served(3, 3, 2, servers=3), data=data, resume=part["run_dir"])
    rest = run(wanted, 2, data=data, resume=more["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)


# --- stale-synchronous and asynchronous ---------------------------------------------------------------------------


@pytest.mark.parametrize(("staleness", "placement", "servers"), [(1, (3, 5), 2), (2, (2, 2, 2, 2), 1), (3, (7, 1), 3)])
def test_no_worker_is_further_ahead_than_the_bound_and_the_log_says_how_far(run, staleness, placement, servers):
    evaluate = Reporting(evaluate_every=7, checkpoint_every=9, sample=False)
    wanted = recipe("cnn", steps=24, clip=0.5, report=evaluate)
    result = run(wanted, plan=served(*placement, servers=servers, staleness=staleness), data=splits("cnn", 101))
    told = events(result, "committed")
    assert [event["step"] for event in told] == list(range(1, 25))
    seen = [event["staleness"] for event in told]
    assert all(0 <= s["mean"] <= s["max"] <= staleness for s in seen)
    assert told[-1]["loss"] < told[0]["loss"]
    assert [event["step"] for event in events(result, "evaluated")] == [7, 14, 21, 24]
    assert result["samples"] == sum(event["samples"] for event in told)


def test_evaluation_and_checkpoints_are_points_where_all_workers_meet(run):
    report = Reporting(evaluate_every=5, checkpoint_every=5, sample=False)
    wanted = recipe("gpt", steps=10, report=report)
    result = run(wanted, plan=served(3, 5, servers=2, staleness=3), data=splits("gpt", 101))
    order = [
        (e["event"], e["step"])
        for e in Run(Path(result["run_dir"])).events()
        if e["event"] in ("committed", "evaluated")
    ]
    assert order.index(("evaluated", 5)) == order.index(("committed", 5)) + 1


def test_a_stale_run_goes_on_from_its_checkpoint_with_the_state_of_the_servers(run):
    wanted, data = (
        recipe("cnn", steps=8, optimizer=OptimizerSpec(name="sgd", lr=0.05, options={"momentum": 0.9})),
        splits("cnn", 101),
    )
    part = run(replace(wanted, steps=5), plan=served(8, servers=2, staleness=2), data=data)
    rest = run(wanted, plan=served(8, servers=1, staleness=2), data=data, resume=part["run_dir"])
    whole = run(wanted, plan=served(8, servers=3, staleness=2), data=data)  # alone, nothing can come in between
    assert rest["weights_sha256"] == whole["weights_sha256"]


def test_asynchronous_workers_learn_too(run):
    result = run(recipe("mlp", steps=40), plan=served(2, 3, 3, servers=2, staleness=-1), data=splits("mlp", 101))
    assert result["figures"]["accuracy"] > 0.8


# --- local steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cnn", "resnet"])
def test_local_steps_give_the_same_bits_each_time_and_when_resumed_at_an_average(run, kind):
    wanted, data = recipe(kind, steps=12), splits(kind, 101)
    whole = run(wanted, plan=local(3, 3, 2), data=data)
    assert run(wanted, plan=local(3, 3, 2), data=data)["weights_sha256"] == whole["weights_sha256"]
    part = run(replace(wanted, steps=8), plan=local(3, 3, 2), data=data)
    rest = run(wanted, plan=local(3, 3, 2), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)


def test_averaging_each_step_of_plain_sgd_is_the_mean_over_workers(run):
    """With as many samples on each worker, the mean of the weights after a step is a step with the mean gradient."""
    wanted = recipe("mlp", steps=6, optimizer=OptimizerSpec(name="sgd", lr=0.1))
    exact = run(wanted, 1, data=splits("mlp", 96))
    result = run(wanted, plan=local(4, 4, every=1), data=splits("mlp", 96))
    losses = [
        (a["loss"], b["loss"]) for a, b in zip(events(exact, "committed"), events(result, "committed"), strict=True)
    ]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6)
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-4)  # float32: the means are taken in another order


def test_a_lone_worker_with_local_steps_is_a_plain_run(run):
    wanted, data = recipe("cnn", clip=0.05), splits("cnn", 101)
    assert run(wanted, plan=local(8), data=data)["weights_sha256"] == run(wanted, 1, data=data)["weights_sha256"]


# --- what is refused, and what dies -------------------------------------------------------------------------------


ADAFACTOR = OptimizerSpec(name="Adafactor", lr=0.1)


@pytest.mark.parametrize(
    ("changes", "options", "line"),
    [
        ({}, {"servers": 60}, r"^60 parameter servers for a model of \d+ runs of 16 elements: .* Use at most \d+ "),
        ({}, {"servers": 99999}, r"^99999 parameter servers on one host: use at most 64"),
        ({"optimizer": ADAFACTOR}, {"servers": 7}, r"^7 parameter servers for a model of 4 parameters: "),
        (
            {},
            {"compression": "bf16"},
            r"^plan: compression = 'bf16' gains nothing where workers and servers share mem",
        ),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(run, changes, options, line):
    with pytest.raises(UserError, match=line) as refused:
        run(recipe("mlp", **changes), plan=served(4, 4, **options), data=splits("mlp", 40))
    assert "\n" not in str(refused.value)


def killing(victim):
    """At step 4 rank 1 kills itself or the second server, whose row is behind the workers' on the page of positions."""

    def observe(worker, step):
        if step.number == 4 and worker.rank == 1:
            row = 1 if victim == "worker" else worker.world + 1
            os.kill(worker.group.report.board.read(row).pid, signal.SIGKILL)
            if victim == "server":
                signal.pause()  # so that nothing else can be the first cause

    return observe


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(("victim", "named"), [("worker", "rank 1"), ("server", "server 1")])
def test_who_died_is_named(agent, tmp_path, victim, named, staleness):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    wanted = served(3, 5, servers=2, staleness=staleness)
    order = Order(recipe("mlp"), wanted, run_dir=tmp_path / "run", data=splits("mlp", 101), observe=killing(victim))
    with pytest.raises(RunFailed) as failed:
        agent.run(run_recipe, (order,), workers=2, servers=2)
    assert re.match(rf"^{named} on \S+ \(pid \d+\) was killed by SIGKILL", str(failed.value))


# --- asked to stop, and a loop of one's own -----------------------------------------------------------------------


def _ask_to_stop(worker, step):
    if step.number == 6 and worker.rank == 1:
        worker.group.report.board.ask_stop()


STOPPED = [served(3, 5), served(3, 5, servers=2, staleness=2), local(3, 5)]


@pytest.mark.parametrize("wanted", STOPPED, ids=lambda p: f"{p.sync}-{p.staleness}")
def test_a_run_that_is_asked_to_stop_ends_on_all_workers_after_the_same_step_and_saves(agent, tmp_path, wanted):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    long, data = recipe("mlp", steps=60), splits("mlp", 101)
    order = Order(long, wanted, run_dir=tmp_path / "run", data=data, observe=_ask_to_stop)
    results = agent.run(run_recipe, (order,), workers=2, servers=wanted.server_processes)
    assert results[0]["interrupted"]
    assert 6 <= results[0]["steps"] == results[1]["steps"] < 20
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["checkpoint"].endswith(f"step-{results[0]['steps']:08d}")


def _own_loop(group, wanted):
    worker = Worker(group, wanted, shards=8, seed=3)
    model = worker.model(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Dropout(0.1), torch.nn.Linear(9, 2)))
    worker.optimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    data = torch.utils.data.TensorDataset(torch.arange(400.0).sin().view(100, 4), torch.arange(100) % 2)
    seen = []
    for step in worker.steps(data, batch=16, epochs=2):
        for batch in step:
            x, y = batch.values()
            step.backward(torch.nn.functional.cross_entropy(model(x), y, reduction="sum"), count=len(y))
        step.commit()
        seen.append(worker.weights_sha256)  # right after commit: they have come
    return seen


def test_in_a_loop_of_ones_own_the_weights_are_there_after_each_commit(agent):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    exact = agent.run(_own_loop, (plan(4, 4),), workers=2)
    results = agent.run(_own_loop, (served(3, 3, 2, servers=2),), workers=3, servers=2)
    assert results == [exact[0]] * 3
