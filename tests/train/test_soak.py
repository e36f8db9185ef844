"""Long runs."""

import random
from dataclasses import replace

import pytest
from train.tiny_runs import recipe, splits

from shoal.recipe.plan import Plan


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["cnn", "lstm", "gpt", "resnet"])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_stopped_and_moved_twenty_times_ends_with_the_bits_of_an_undisturbed_one(run, kind, seed):
    chance = random.Random(seed)
    data = splits(kind, 107)
    wanted = recipe(kind, steps=200, clip=0.05)
    wanted = replace(wanted, schedule=replace(wanted.schedule, kind="constant"))
    parts, at = None, 0
    while at < wanted.steps:
        at = min(wanted.steps, at + chance.randint(1, 20))
        cuts = sorted(chance.sample(range(1, wanted.shards), chance.randint(0, wanted.shards - 1)))
        counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, wanted.shards], strict=True))
        plan = Plan(mesh={"data": len(counts)}, placement=counts, device="cpu")
        part = replace(wanted, steps=at)
        parts = run(part, plan=plan, data=data, **({"resume": parts["run_dir"]} if parts else {}))
    undisturbed = run(wanted, 1, data=data)
    assert parts["steps"] == undisturbed["steps"]
    assert parts["weights_sha256"] == undisturbed["weights_sha256"]
