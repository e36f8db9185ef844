"""Sharded states leave the bits of a replicated run: on any number of workers, clipped, resumed, under torchrun."""

from dataclasses import replace

import pytest
from train import tiny_runs
from train.test_exactness import agrees, plan
from train.tiny_runs import OptimizerSpec, recipe, splits

ADAMW = OptimizerSpec(name="adamw", lr=0.01)
MOMENTUM = OptimizerSpec(name="sgd", lr=0.05, options={"momentum": 0.9})
WIDE = replace(tiny_runs.model("mlp"), options={"hidden": (700, 300)})  # 8 blocks: slices cut its tensors


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
@pytest.mark.parametrize("states", ["zero1", "zero2", "zero3"])
def test_the_weights_are_those_of_the_replicated_run(run, states, optimizer):
    wanted = recipe("mlp", model=WIDE, optimizer=optimizer, clip=0.05)
    plans = [plan(8, states=states), plan(3, 5, states=states), plan(2, 2, 2, 2, states=states, bucket_bytes=1)]
    agrees(run, wanted, splits("mlp", 101), [*plans, plan(4, 1, 3, states=states)], clips=True)
