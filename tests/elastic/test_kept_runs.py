"""Workers that keep states and parameters in fewer bits or on disk are lost: others hand on what they kept."""

from typing import Any

import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.api import train_elastic
from shoal.elastic.faults import Fault
from shoal.errors import UserError
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import train

DATA = splits("gpt", 101)
GPT = recipe(
    "gpt",
    steps=10,
    model=ModelSpec(
        kind="gpt", options={"layers": 2, "heads": 2, "width": 48, "dropout": 0.1}
    ),  # wide enough for 8 bits
)


@pytest.mark.parametrize(
    "memory",
    [
        {"optimizer_bits": 8, "offload_optimizer": "disk"},
        pytest.param({"parameters": "bfloat16-compensated", "offload_parameters": "disk"}, marks=pytest.mark.slow),
        pytest.param({"parameters": "bfloat16-stochastic", "offload_activations": "disk"}, marks=pytest.mark.soak),
    ],
)
def test_what_is_kept_in_fewer_bits_or_on_disk_is_gone_on_from_to_the_bit(disturb, agent, tmp_path, memory):
    how: dict[str, Any] = {"memory": MemoryPlan(**memory)}
    plan = Plan(mesh={"data": 3}, device="cpu", **how)
    calm = train(GPT, plan, agent=agent, run_dir=tmp_path / "calm", data=DATA)
    faults = [Fault("kill", 1, 4, "backward"), Fault("kill", 0, 7, "updating")]
    run = disturb(GPT, how=how, faults=faults, data=DATA)
    assert run.result["weights_sha256"] == calm["weights_sha256"]
    assert run.steps == list(range(1, 11))
    assert len(run.of("lost")) == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"memory": MemoryPlan(peak_bytes="1GiB")}, "memory.peak_bytes is not elastic yet"),
        ({"mesh": {"pipe": 2}, "memory": MemoryPlan(optimizer_bits=8)}, "is not elastic yet|is for whole models"),
    ],
)
def test_budgets_and_kept_states_of_parts_are_refused(tmp_path, how, said):
    with pytest.raises(UserError, match=said):
        train_elastic(GPT, Plan(**{"mesh": {"data": 2}, **how}), run_dir=tmp_path / "run", data=DATA)
