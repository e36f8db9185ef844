"""Split models whose states and parameters are kept in fewer bits, or elsewhere: which bits they have."""

from dataclasses import replace

import pytest
import torch
from train.test_exactness import trail
from train.test_kept_states import EXACT, LOSSY, large
from train.test_split_models import loaded, over
from train.tiny_runs import splits

from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec

MOE = ModelSpec(kind="moe", options={"layers": 2, "heads": 2, "width": 48, "experts": 4, "dropout": 0.1})
WAYS = {**EXACT, **LOSSY}


@pytest.mark.parametrize("way", ["both, recomputed", "8 bits", "compensated", "all"])
def test_stages_keep_states_and_parameters_to_the_bits_of_one_process(run, way):
    """Random rounding goes by the element's place in its parameter, 8-bit blocks by a parameter's own elements."""
    wanted, data = large("gpt", clip=0.05, micro_batches=2, steps=5), splits("gpt", 101)
    alone = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data)
    last = "1f1b" if way == "both, recomputed" else "zb-v"  # the latter's passes come in two halves
    for plan in (over(pipe=2), over(last, 2 if last == "zb-v" else 1, data=2, pipe=2)):
        found = run(wanted, plan=replace(plan, memory=WAYS[way]), data=data)
        assert found["weights_sha256"] == alone["weights_sha256"], plan
        assert trail(found) == trail(alone), plan
        ours, theirs = loaded(found), loaded(alone)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"expert": 2}, {"pipe": 2, "tensor": 2}], ids=str)
def test_what_a_split_worker_keeps_elsewhere_keeps_every_bit(run, mesh):
    kind = "moe" if "expert" in mesh else "gpt"
    wanted, data = large(kind, clip=0.05, steps=4) if kind == "gpt" else large_mixture(), splits(kind, 101)
    plain = run(wanted, plan=over(**mesh), data=data)
    found = run(wanted, plan=replace(over(**mesh), memory=EXACT["both, recomputed"]), data=data)
    assert found["weights_sha256"] == plain["weights_sha256"]
    assert trail(found) == trail(plain)


def large_mixture():
    return replace(large("gpt", clip=0.05, steps=4), model=MOE)


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}, {"expert": 2}], ids=str)
@pytest.mark.parametrize("way", ["8 bits", "all"])
def test_what_is_lossy_in_a_split_model_is_near_one_process_and_goes_on_to_the_same_bits(run, mesh, way):
    """Blocks of 8 bits and draws go by a worker's part of a tensor: replicas of the split have its bits, one process
    others. A checkpoint holds the scale of each element, so that the parts find their blocks in it again."""
    kind = "moe" if "expert" in mesh else "gpt"
    wanted, data = large("gpt", steps=4) if kind == "gpt" else large_mixture(), splits(kind, 101)
    alone = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data)
    whole = run(wanted, plan=replace(over(**mesh), memory=WAYS[way]), data=data)
    assert whole["loss"] == pytest.approx(alone["loss"], rel=0.01)
    part = run(replace(wanted, steps=2), plan=replace(over(**mesh), memory=WAYS[way]), data=data)
    rest = run(wanted, plan=replace(over(**mesh), memory=WAYS[way]), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    if mesh == {"tensor": 2}:
        twice = run(wanted, plan=replace(over(data=2, **mesh), memory=WAYS[way]), data=data)
        assert twice["weights_sha256"] == whole["weights_sha256"]
        begun = run(replace(wanted, steps=2), plan=replace(over(**mesh), memory=WAYS[way]), data=data)
        one = run(wanted, plan=replace(over(data=1), memory=WAYS[way]), data=data, resume=begun["run_dir"])
        assert one["loss"] == pytest.approx(alone["loss"], rel=0.01)


def test_a_part_below_4096_elements_is_kept_as_the_whole_is(run):
    """Seven heads on two workers: of 4,116 elements one worker has 1,764, and both keep them in 8 bits."""
    options = {"layers": 1, "heads": 7, "width": 42, "ffn": 98}
    wanted = replace(large("gpt", steps=3), model=ModelSpec(kind="gpt", options=options))
    found = run(wanted, plan=replace(over(tensor=2), memory=MemoryPlan(optimizer_bits=8)), data=splits("gpt", 64))
    states = loaded(found)
    narrow = [name for name in states if name.endswith("exp_avg.codes")]
    assert narrow
    for name in narrow:
        parameter = name.removeprefix("optimizer/").rpartition("/")[0]
        assert states[name].shape == states[f"model/{parameter}"].shape
        assert states[name].numel() >= 4096
