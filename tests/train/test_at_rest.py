"""A bit that flips in memory that only one worker answers for is seen before it is used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from train.tiny_runs import recipe, splits

from shoal.errors import RunFailed
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.train import checkpoint
from shoal.train.at_rest import EVERY, AtRest, Corrupt
from shoal.train.loop import Order, run_recipe

DATA = splits("mlp", 101)
MADE = recipe("mlp", steps=6, report=Reporting(checkpoint_every=1, keep=0, sample=False))


def flip(tensor: torch.Tensor) -> None:
    """As memory does: torch does not count it."""
    tensor.detach().numpy().view(np.int32).reshape(-1)[0] ^= 1 << 20


def _flipping(group, order, rank, what):
    def act(worker, step):
        if step.number == 3 and worker.rank == rank:
            if what == "parameter":
                flip(next(worker.held.module.parameters()))
            else:
                kept = [state for _, state in worker._update.rest._states() if state]
                flip(kept[0]["exp_avg"])

    return run_recipe(group, replace(order, observe=act))


@pytest.mark.parametrize(
    ("plan", "rank", "what"),
    [
        (Plan(device="cpu"), 0, "state"),
        (Plan(device="cpu"), 0, "parameter"),
        (Plan(mesh={"data": 2}, device="cpu"), 1, "state"),
        (Plan(mesh={"data": 2}, states="zero1", device="cpu"), 0, "state"),  # it has the only block
    ],
    ids=["state of a lone worker", "parameter of a lone worker", "replicated state", "sharded state"],
)
def test_a_flipped_bit_ends_the_run_before_it_is_used(on_workers, tmp_path, plan, rank, what):
    order = Order(MADE, plan, run_dir=tmp_path / "run", data=DATA)
    with pytest.raises(RunFailed, match=rf"rank {rank}: bits of .* have changed between the updates of steps 3 and 4"):
        on_workers(plan.workers, _flipping, order, rank, what, hang_after_s=60)
    if rank == 0:  # what was saved after the flip may hold it
        steps = [found.step for found in checkpoint.listing(tmp_path / "run" / "checkpoints") if not found.problem]
        assert max(steps) == 2


def sees(rest: AtRest, step: int, tensor: torch.Tensor, name: str) -> bool:
    rest.keep(step)
    flip(tensor)
    try:
        rest.check(0, step + 1)
    except Corrupt as found:
        return name in str(found)
    return False


def optimizer_of(parameters: int, size: int) -> tuple[AtRest, list[dict[str, torch.Tensor]]]:
    states = [{"exp_avg": torch.ones(size)} for _ in range(parameters)]
    return AtRest(lambda: [(f"p{number}", state) for number, state in enumerate(states)]), states


@pytest.mark.parametrize(("parameters", "size"), [(3, 8), (200, 4), (5, 1 << 20)])
def test_every_state_is_watched_within_some_steps(parameters, size):
    rest, states = optimizer_of(parameters, size)
    for number in {0, parameters // 2, parameters - 1}:
        assert any(sees(rest, step, states[number]["exp_avg"], f"'p{number}'") for step in range(1, EVERY + 1))


def test_what_is_written_by_torch_is_no_fault():
    rest, states = optimizer_of(2, 8)
    rest.keep(1)
    states[0]["exp_avg"].mul_(2.0)
    states[1]["exp_avg"] = torch.zeros(8)
    rest.check(0, 2)


def test_parameters_are_watched_where_nobody_else_has_them():
    parameter = nn.Parameter(torch.ones(8))
    rest = AtRest(tuple, [("weight", parameter.detach())])
    rest.keep(1)
    rest.check(0, 2)
    rest.keep(2)
    flip(parameter)
    with pytest.raises(Corrupt, match="parameter 'weight'"):
        rest.check(0, 3)


def test_states_that_were_moved_to_other_memory_are_watched_there():
    """As a checkpoint of slices moves them: the old memory is let go, and a bit that flips in the new one is seen."""
    state = {"exp_avg": torch.arange(8.0)}
    rest = AtRest(lambda: [("weight", state)])
    rest.keep(1)
    before = state["exp_avg"]
    state["exp_avg"] = before.clone()
    rest.follow()
    flip(before)
    rest.check(0, 2)
    rest.keep(2)
    state["exp_avg"] = state["exp_avg"].clone()
    rest.follow()
    flip(state["exp_avg"])
    with pytest.raises(Corrupt, match=r"rank 0: bits of the optimiser's 'exp_avg' of parameter 'weight' have changed"):
        rest.check(0, 3)
