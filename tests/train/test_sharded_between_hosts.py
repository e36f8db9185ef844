"""Sharded states between workers that share no memory leave the bits of one worker: blocks come, and go again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
import torchrun_workers
from torch import nn
from torchrun_workers import as_torchrun
from train import tiny_runs
from train.test_exactness import plan, trail
from train.tiny_runs import recipe, splits

from shoal.comm.gathered_weights import GatheredWeights
from shoal.errors import RunFailed, UserError
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.loop import Order, run_recipe
from shoal.train.worker import Worker

GPT = replace(tiny_runs.model("gpt"), options={"layers": 4, "heads": 2, "width": 80, "dropout": 0.1})
STATES = ("zero1", "zero2", "zero3")


@pytest.fixture
def joined(agent, tmp_path, request):
    """Train a recipe on workers that torch.distributed joins; the result of each."""
    cloudpickle.register_pickle_by_value(request.module)
    cloudpickle.register_pickle_by_value(torchrun_workers)
    count = 0

    def train(wanted: Recipe, how: Plan, data: Any, **options: Any) -> list[dict[str, Any]]:
        nonlocal count
        count += 1
        options.setdefault("run_dir", tmp_path / f"joined{count}")
        order = Order(wanted, how, data=data, **options)
        return agent.run(as_torchrun, (run_recipe, order), workers=how.workers)

    return train


@pytest.mark.parametrize("states", STATES)
def test_the_weights_are_those_of_one_worker(run, joined, states):
    """Dropout, clipping, unequal shares, a tail that leaves workers without work, checkpoints on the way."""
    often = replace(recipe("gpt").report, evaluate_every=4, checkpoint_every=3)
    wanted = recipe("gpt", model=GPT, clip=0.05, report=often, steps=7)  # an epoch has 5: the last one of 3 samples
    data = splits("gpt", 67)
    one = run(wanted, 1, data=data)
    plans = [plan(1, 7, states=states, bucket_bytes=1)]
    plans.append(plan(2, 2, 3, 1, states=states, state_group=2, bucket_bytes=1))
    for other in plans:
        for result in joined(wanted, other, data):
            assert result["weights_sha256"] == one["weights_sha256"], other
            assert trail(result) == trail(one), other
            assert result["figures"] == one["figures"], other


@pytest.mark.parametrize("kind", ["resnet", "lstm"])
def test_running_statistics_and_recurrent_layers_are_those_of_one_worker(run, joined, kind):
    wanted, data = recipe(kind, clip=0.05, steps=6), splits(kind, 67)
    one = run(wanted, 1, data=data)
    for result in joined(wanted, plan(3, 5, states="zero3", bucket_bytes=1), data):
        assert result["weights_sha256"] == one["weights_sha256"]
        assert trail(result) == trail(one)


def test_a_block_that_is_computed_again_finds_its_parameters(run, joined):
    wanted, data = recipe("gpt", model=GPT, steps=3, micro_batches=2), splits("gpt", 67)
    one = run(wanted, 1, data=data)
    for mode in ("full", "selective"):
        how = plan(3, 5, states="zero3", bucket_bytes=1, memory=MemoryPlan(recompute=mode))
        assert joined(wanted, how, data)[0]["weights_sha256"] == one["weights_sha256"], mode


def test_a_mixture_of_experts_whose_blocks_keep_losses_of_their_own_is_trained(run, joined):
    options = {"layers": 2, "heads": 2, "width": 64, "experts": 3, "top_k": 1, "dropout": 0.0}
    wanted = recipe("gpt", model=replace(GPT, kind="moe", options=options), steps=3)
    data = splits("gpt", 67)
    one = run(wanted, 1, data=data)
    assert (
        joined(wanted, plan(3, 5, states="zero3", bucket_bytes=1), data)[0]["weights_sha256"] == one["weights_sha256"]
    )


@pytest.mark.parametrize(("before", "after"), [("zero3", "zero1"), ("replicated", "zero3"), ("zero2", "replicated")])
def test_a_run_goes_on_with_other_states_on_another_number_of_workers(run, joined, before, after):
    wanted, data = recipe("gpt", model=GPT, clip=0.05, steps=6), splits("gpt", 67)
    whole = run(wanted, 1, data=data)
    part = joined(replace(wanted, steps=3), plan(3, 5, states=before, bucket_bytes=1), data)[0]
    folder = Path(part["run_dir"])
    rest = joined(wanted, plan(2, 4, 2, states=after, bucket_bytes=1), data, run_dir=folder, resume=True)[0]
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)


# --- somebody's own loop ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(300, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).relu()


class Net(nn.Module):
    """Four blocks between two ends; ``fault`` is what goes wrong at step 3."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 300)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.last = nn.Linear(300, 5)
        self.fault, self.step = fault, 0
        if fault == "tied":
            self.extra = nn.Linear(300, 300)
            self.extra.weight = self.blocks[1].inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if self.step == 3 and self.fault == "twice":
            x = self.blocks[0](x)
        if self.step == 3 and self.fault == "not run":
            x = x.detach()
        if self.step == 3 and self.fault == "nan":
            x = x + (self.last.weight[0] * 0.0).sqrt()  # the gradient of a root is infinite at 0
        return self.last(self.extra(x) if self.fault == "tied" else x)


def _own_loop(group, states: str, fault: str = "", runs: int = 1):
    torch.set_num_threads(1)
    how = Plan(mesh={"data": group.world}, states=states, device="cpu", bucket_bytes=1)
    worker = Worker(group, how, shards=4)
    model = worker.model(Net(fault))
    worker.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    points = [(torch.randn(20, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(64)]
    hashes, held = [], {}
    for step in worker.steps(points, batch=16, epochs=2):
        model.step = step.number
        for part in step:
            for _ in range(runs if step.number == 3 else 1):
                loss = F.cross_entropy(model(part["input"]), part["target"], reduction="sum")
            step.backward(loss, count=len(part["target"]))
        step.commit()
        if step.number == 2:
            held = worker._update.held_bytes() if states != "replicated" else {}
        if step.number == 4 and fault != "unsettled":
            worker.settle()
        if step.number == 4:
            hashes.append(worker.weights_sha256)
    return [*hashes, worker.weights_sha256], held


def test_weights_can_be_read_once_they_are_settled_and_after_the_last_step(agent, joined):
    one = agent.run(_own_loop, ("replicated",), workers=1)[0][0]
    assert one[0] != one[1]
    for states in STATES:
        for found, _ in agent.run(as_torchrun, (_own_loop, states), workers=2):
            assert found == one, states


def test_each_worker_holds_its_part_of_all_states_and_what_lies_in_no_block(agent, joined):
    """Counted: pages that are there, and tensors. 369,000 elements are 12 times 32,768, of which each holds six."""
    for held in (h for _, h in agent.run(as_torchrun, (_own_loop, "zero3"), workers=2)):
        assert held["parameters"] <= 4 * 6 * 32768 + 8192
        assert held["gradients"] <= 4 * 6 * 32768
        assert held["optimizer"] <= 2 * 4 * 6 * 32768 + 200
        assert held["partial sums"] <= 8192
    every = [h["parameters"] + h["gathered"] for _, h in agent.run(as_torchrun, (_own_loop, "zero2"), workers=2)]
    some = [h["parameters"] + h["gathered"] for _, h in agent.run(as_torchrun, (_own_loop, "zero3"), workers=2)]
    assert sum(every) == 2 * 4 * 12 * 32768
    assert sum(some) == 2 * 4 * (6 + 2) * 32768  # the first and the last pair of slices hold the ends of the model


@pytest.mark.parametrize(
    ("fault", "runs", "why"),
    [
        ("unsettled", 1, r"call worker.settle\(\) on every worker before they are read"),
        ("twice", 1, r"block 'blocks.0' ran twice in one pass"),
        ("", 2, r"block 'blocks.0' ran twice in one pass"),
    ],
)
def test_what_would_read_parameters_that_are_not_there_is_refused(agent, joined, fault, runs, why):
    with pytest.raises(UserError, match=why):
        agent.run(as_torchrun, (_own_loop, "zero3", fault, runs), workers=2)


def test_a_block_whose_gradient_no_pass_asks_for_takes_part_in_the_gathers(agent, joined):
    one = agent.run(_own_loop, ("replicated", "not run"), workers=1)[0][0]
    for found, _ in agent.run(as_torchrun, (_own_loop, "zero3", "not run"), workers=2):
        assert found == one


def test_a_parameter_that_a_block_and_an_end_share_stays_for_the_step(agent, joined):
    one = agent.run(_own_loop, ("replicated", "tied"), workers=1)[0][0]
    for found, _ in agent.run(as_torchrun, (_own_loop, "zero3", "tied"), workers=2):
        assert found == one


def test_the_parameter_whose_gradient_is_not_finite_is_named_by_all(agent, joined):
    with pytest.raises(RunFailed, match=r"at step 3 although the loss is .*parameter 'last.weight' is not"):
        agent.run(as_torchrun, (_own_loop, "zero2", "nan"), workers=2)


def _stale(group):
    """As `_own_loop`, but what rank 1 is sent of the last update does not come in."""
    if group.rank == 1:
        GatheredWeights.wait = _wait_and_lose
    worker = Worker(group, Plan(mesh={"data": group.world}, states="zero2", device="cpu", bucket_bytes=1), shards=4)
    model = worker.model(Net())
    worker.optimizer(torch.optim.SGD(model.parameters(), lr=1e-2))
    points = [(torch.randn(20, generator=torch.Generator().manual_seed(i)), i % 5) for i in range(64)]
    for step in worker.steps(points, batch=16, steps=2):
        for part in step:
            loss = F.cross_entropy(model(part["input"]), part["target"], reduction="sum")
            step.backward(loss, count=len(part["target"]))
        step.commit()
    worker.compare_parameters()


def _wait_and_lose(self, bucket):
    for work in self._works.pop(bucket, ()):
        work.wait()
        whole = self._layout.buckets[bucket]
        self._pages[torch.float32].tensor[whole.start : whole.start + whole.slice] = 0.5
    self.here.add(bucket)


def test_a_parameter_that_did_not_come_in_is_noticed_when_workers_are_compared(agent, joined):
    with pytest.raises(RunFailed, match="parameters differ after step 2: no majority of ranks 0, 1 agrees"):
        agent.run(as_torchrun, (_stale,), workers=2)


def test_a_compiled_model_is_refused(agent, joined):
    with pytest.raises(UserError, match=r"states = 'zero1' between hosts .* leave model.compile out"):
        agent.run(as_torchrun, (_compiled,), workers=2)


def _compiled(group):
    worker = Worker(group, Plan(mesh={"data": group.world}, states="zero1", device="cpu"), shards=4)
    worker.model(Net(), compile=True)
