"""Sharded states leave the bits of a replicated run, on any number of workers of one host."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import worker_fixtures
from torch import nn
from train import tiny_runs
from train.test_exactness import agrees, plan, trail
from train.tiny_runs import OptimizerSpec, recipe, splits

from shoal.comm.layout import BLOCK
from shoal.comm.server.optimizer import ELEMENTWISE
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.train.sharded_states import check
from shoal.train.worker import Worker

on_workers = worker_fixtures.on_workers
STATES = ("zero1", "zero2", "zero3")
MOMENTUM = OptimizerSpec(name="sgd", lr=0.05, options={"momentum": 0.9})
WIDE = replace(tiny_runs.model("mlp"), options={"hidden": (700, 300)})  # 8 blocks: slices cut its tensors


@pytest.mark.parametrize("states", STATES)
def test_the_weights_are_those_of_the_replicated_run(run, states):
    wanted = recipe("mlp", model=WIDE, clip=0.05)
    plans = [plan(3, 5, states=states), plan(4, 1, 2, 1, states=states, bucket_bytes=1)]
    agrees(run, wanted, splits("mlp", 101), plans, clips=True)


@pytest.mark.parametrize("kind", ["resnet", "gpt"])
def test_running_statistics_dropout_and_tied_weights_are_those_of_the_replicated_run(run, kind):
    wanted = recipe(kind, clip=0.05, optimizer=MOMENTUM, steps=8)
    one = run(wanted, 1, data=splits(kind, 67))
    result = run(wanted, plan=plan(2, 2, 3, 1, states="zero3", state_group=2), data=splits(kind, 67))
    assert result["weights_sha256"] == one["weights_sha256"]
    assert trail(result) == trail(one)


@pytest.mark.parametrize(("before", "after"), [("zero3", "replicated"), ("replicated", "zero1"), ("zero1", "zero2")])
def test_a_run_goes_on_with_other_states_on_another_number_of_workers(run, before, after):
    data = splits("mlp", 101)
    wanted = recipe("mlp", model=WIDE, clip=0.05, steps=10)
    whole = run(wanted, 1, data=data)
    part = run(replace(wanted, steps=7), plan=plan(3, 5, states=before, bucket_bytes=1), data=data)
    rest = run(wanted, plan=plan(2, 2, 4, states=after), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)


# --- every optimiser that treats elements alone -------------------------------------------------------------------

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {"momentum": 0.9, "fused": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "AdamW": [{"fused": True}, {"fused": False}],
    "Adagrad": [{"initial_accumulator_value": 0.1}, {"fused": True}],
    "RMSprop": [{"momentum": 0.5, "centered": True}],
}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_a_slice_is_updated_to_the_bits_of_the_whole_tensor(name):
    """Slices are cut where Shoal cuts them: at multiples of a block from the start of an aligned tensor."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * BLOCK + 77
    for options in OPTIONS.get(name, [{}]):
        start = torch.randn(size, generator=generator)
        whole = start.clone()
        cuts = [start[:BLOCK].clone(), start[BLOCK : 2 * BLOCK].clone(), start[2 * BLOCK :].clone()]
        one = getattr(torch.optim, name)([whole], lr=0.01, **options)
        other = getattr(torch.optim, name)(cuts, lr=0.01, **options)
        for _ in range(4):
            whole.grad = torch.randn(size, generator=generator)
            for piece, gradient in zip(cuts, torch.split(whole.grad, [BLOCK, BLOCK, 77]), strict=True):
                piece.grad = gradient.clone()
            one.step()
            other.step()
        assert torch.equal(torch.cat(cuts), whole), options


# --- somebody's own loop ------------------------------------------------------------------------------------------


class Partly(nn.Module):
    """A frozen layer, a trained one, one that no pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained, self.idle = nn.Linear(40, 900), nn.Linear(900, 90), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x).relu())


def _own_loop(group, states: str, fault: str = ""):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler would say that the optimiser has never made a step
        worker = Worker(group, Plan(mesh={"data": group.world}, states=states, device="cpu"), shards=4, clip=0.1)
        model = worker.model(Partly())
        optimizer = worker.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        points = [(torch.randn(40, generator=torch.Generator().manual_seed(i)), i % 90) for i in range(64)]
        for step in worker.steps(points, batch=16, epochs=2):
            for part in step:
                loss = F.cross_entropy(model(part["input"]), part["target"], reduction="sum")
                step.backward(loss, count=len(part["target"]))
            step.commit()
            assert states == "replicated" or all(parameter.grad is None for parameter in model.parameters())
            schedule.step()
            if fault == "write" and step.number == 3:
                with torch.no_grad():
                    model.trained.weight.mul_(0.5)
        held = worker._update.held_bytes() if states != "replicated" else {}
        shared = group.gather(b"")  # nobody leaves before all have counted
        return worker.weights_sha256, held, len(shared)


@pytest.mark.parametrize("workers", [1, 3])
def test_frozen_and_unused_parameters_and_the_users_scheduler_are_as_in_a_replicated_run(on_workers, workers):
    expected = on_workers(1, _own_loop, "replicated")[0][0]
    for states in STATES:
        assert {found[0] for found in on_workers(workers, _own_loop, states)} == {expected}


def test_each_worker_holds_its_part_of_the_states(on_workers):
    """Counted: what is allocated, and pages that are there. 81,090 trained elements, 36,900 frozen."""
    trained, frozen = 900 * 90 + 90 + 9 + 3, 40 * 900 + 900
    for states in STATES:
        found = [held for _, held, _ in on_workers(2, _own_loop, states)]
        moments = sum(held["optimizer"] for held in found)
        assert 8 * (trained - 12) <= moments <= 8 * trained + 100  # and a counter a piece; the idle layer has none
        assert max(held["optimizer"] for held in found) <= 8 * 2 * BLOCK + 100  # of its 3 blocks, 2 or 1
        for held in found:
            shared = (trained + (frozen if states == "zero3" else 0)) * 4 / 2
            assert shared <= held["parameters"] <= shared + 3 * 4096
            assert held["gradients"] == 4 * trained // 2
            assert states == "zero1" or held["partial sums"] <= 4096 * 4
        assert states != "zero1" or any(held["partial sums"] > 4 * trained // 2 for held in found)


def _infinite(group):
    worker = Worker(group, Plan(mesh={"data": group.world}, states="zero2", device="cpu"), shards=4)
    model = worker.model(nn.Linear(2, 2))
    worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in worker.steps([(torch.ones(2), 0)] * 8, batch=8, steps=1):
        for part in step:
            step.backward((model(part["input"]).sum() * 0.0 + (model.bias * 0.0).sqrt().sum()), count=1)
        step.commit()


def test_the_parameter_whose_gradient_is_not_finite_is_named(on_workers):
    with pytest.raises(RunFailed, match=r"at step 1 although the loss is .*parameter 'bias' is not"):
        on_workers(2, _infinite)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_parameter_that_is_written_to_between_steps_is_named(on_workers):
    with pytest.raises(UserError, match=r"parameter 'trained.weight' was written to between two updates"):
        on_workers(2, _own_loop, "zero1", "write")


def test_an_optimiser_that_looks_at_whole_tensors_is_refused_before_anything_is_written(run, tmp_path):
    wanted = recipe("mlp", optimizer=OptimizerSpec(name="Adafactor", lr=0.01))
    why = r"states = 'zero1' .* Adafactor .* use one of ASGD, .*, or states = 'replicated'"
    with pytest.raises(UserError, match=why):
        run(wanted, plan=plan(4, 4, states="zero1"), data=splits("mlp", 64), run_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Halved(torch.optim.SGD):
    """Somebody's own optimiser."""


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.LBFGS, Halved])
def test_optimisers_that_are_not_known_to_treat_each_element_alone_are_refused(kind):
    with pytest.raises(UserError, match=f"states = 'zero2' .*{kind.__name__} is not known"):
        check(Plan(states="zero2"), kind([torch.zeros(4, 4, requires_grad=True)], lr=0.1), nn.Linear(4, 4))


def _refused(group, make):
    worker = Worker(group, Plan(mesh={"data": 1}, states="zero1", device="cpu"), shards=1)
    model = worker.model(make())
    worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Linear(3, 3, dtype=torch.bfloat16), "parameter 'weight' is torch.bfloat16"),
        (lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "parameter 'weight' lies in memory in"),
    ],
)
def test_parameters_that_cannot_be_cut_are_named(on_workers, make, why):
    with pytest.raises(UserError, match=why):
        on_workers(1, _refused, make)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sync": "fast", "states": "zero1"}, "states = 'zero1' needs sync = 'exact'"),
        ({"state_group": 2}, "state_group = 2 must divide"),
        ({"states": "zero2", "state_group": 3}, "state_group = 3 must divide the 4 data replicas"),
    ],
)
def test_plans_that_cannot_be_are_refused_when_they_are_made(options, why):
    with pytest.raises(UserError, match=why):
        Plan(mesh={"data": 4}, **options)
