"""Recomputation changes the memory of a run, never its bits; what a plan can say and training cannot do is refused."""

import pytest
import torch
from train.test_exactness import plan, trail
from train.tiny_runs import recipe, splits

import shoal
from shoal.errors import RunFailed, UserError
from shoal.memory.apply import set_up
from shoal.memory.gauge import gauge_for
from shoal.memory.meter import storage_of
from shoal.memory.rehearsal import passes_of, rehearse
from shoal.models.registry import build
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan

WAYS = {
    "full": MemoryPlan(recompute="full"),
    "every third": MemoryPlan(recompute="every", recompute_every=3),
    "selective": MemoryPlan(recompute="selective"),
}


@pytest.mark.parametrize("kind", ["gpt", "resnet", "lstm"])
def test_a_run_that_recomputes_has_the_bits_of_one_that_does_not(run, kind):
    wanted, data = recipe(kind, micro_batches=2, clip=0.05), splits(kind, 101)
    plain = run(wanted, 1, data=data)
    for memory in WAYS.values():
        result = run(wanted, plan=plan(3, 5, memory=memory), data=data)
        assert result["weights_sha256"] == plain["weights_sha256"], memory
        assert trail(result) == trail(plain), memory


def kept_bytes(memory: MemoryPlan) -> int:
    """What one forward pass of a GPT leaves for its backward pass, parameters apart."""
    torch.manual_seed(0)
    model = build(recipe("gpt").model, splits("gpt", 101).train.facts)
    weights = {storage_of(p) for p in model.parameters()}
    blocks = set_up(model, memory)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_of(tensor) not in weights:
            saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.zeros(8, 8, dtype=torch.int64))
    assert logits.requires_grad
    return sum(saved.values()) + sum(block.store.meter.live for block in blocks[:1])  # all blocks have one meter


def test_recomputation_keeps_less_the_more_is_recomputed():
    each = MemoryPlan(recompute="every", recompute_every=1)
    none, some, full, every = (kept_bytes(m) for m in (MemoryPlan(), WAYS["selective"], WAYS["full"], each))
    assert every < some < none
    assert every < 0.4 * none
    assert every < full < none


def test_the_last_block_is_not_computed_again_because_nothing_is_gained_by_it():
    """Its backward pass is the first. Said by name, or by `every`, it is."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    for memory, blocks in (
        (WAYS["full"], ["0", "1"]),
        (MemoryPlan(recompute="full", blocks=("?",)), ["0", "1", "2"]),
        (MemoryPlan(recompute="every", recompute_every=1), ["0", "1", "2"]),
    ):
        wrapped = set_up(model, memory)
        assert [block.name for block in wrapped] == blocks
        for block in wrapped:
            block.unwrap()
    whole, each = (peak_of(memory) for memory in (WAYS["full"], MemoryPlan(recompute="every", recompute_every=1)))
    assert whole <= 1.02 * each


def peak_of(memory: MemoryPlan) -> int:
    """Of a pass there and back."""
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(),
                                                      torch.nn.Linear(256, 64)) for _ in range(4)))  # fmt: skip
    set_up(model, memory)
    x = torch.randn(2048, 64)
    return rehearse(model, passes_of(lambda: model(x).sum()), gauge_for(torch.device("cpu")))


def test_a_block_that_does_not_compute_the_same_again_is_named():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), Fickle()), torch.nn.Linear(3, 1))
    set_up(model, MemoryPlan(recompute="full", blocks=("0",)))
    with pytest.raises(RunFailed, match="block '0' did not compute the same again"):
        model(torch.ones(2, 3)).sum().backward()


class Fickle(torch.nn.Module):
    """Another dtype each time."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.double().sin().float() if self.calls % 2 else x.sin().sin()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            Plan(mesh={"pipe": 2}, memory=MemoryPlan(peak_bytes="1GiB", blocks=("blocks.*",))),
            "memory.blocks are modules, and a pipeline computes its chunks again",
        ),
        (Plan(memory=MemoryPlan(peak_bytes="1GiB"), sync="local"), "memory.peak_bytes does not go with sync = 'local'"),
        (Plan(memory=MemoryPlan(optimizer_bits=8), sync="local"), "8 does not go with sync = 'local'"),
    ],
)
def test_what_a_plan_can_say_and_training_cannot_do_is_refused_before_anything_starts(tmp_path, wanted, message):
    with pytest.raises(UserError, match=message):
        shoal.train(recipe("gpt"), wanted, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
