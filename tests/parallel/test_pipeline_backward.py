"""A backward pass in two halves has the bits of one in one go, and does nothing twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoal.memory import recompute
from shoal.memory.apply import set_up
from shoal.parallel.pipeline.backward import SplitBackward, whole
from shoal.parallel.pipeline.boundary import edges, enter
from shoal.recipe.memory_plan import MemoryPlan


class Reused(nn.Module):
    """A weight with three uses, one above the other; another one that is made of two parameters."""

    def __init__(self):
        super().__init__()
        self.again, self.last = nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        for _ in range(3):
            x = self.again(x).tanh()
        return self.last(x)


class Aside(nn.Module):
    """A layer that the inputs do not pass through."""

    def __init__(self):
        super().__init__()
        self.own, self.layer, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) + self.own(torch.ones(6))


MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6)), (2, 5, 6)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        (3, 2, 8, 8),
    ),
    "recurrent": (lambda: nn.LSTM(6, 7, batch_first=True), (2, 5, 6)),
    "reused": (Reused, (3, 6)),
    "aside": (Aside, (3, 6)),
}


def passed(name, halves):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module = make()
    x = torch.randn(shape, requires_grad=True)
    values, entered = enter({"x": x})
    made = module(values["x"])
    roots = edges([made])
    gradients = [
        torch.randn_like(root, generator=None) for root in ([made] if torch.is_tensor(made) else [made[0], *made[1]])
    ]
    parameters = list(module.parameters())
    counter = FlopCounterMode(display=False)
    counts = []
    with counter:
        if halves:
            split = SplitBackward(entered.anchor, parameters, [])
            split.inputs(roots, gradients, {})
            counts.append(counter.get_total_flops())
            early = list(entered.gradients)
            assert all(p.grad is None for p in parameters)
            split.weights()
            assert all(a is b for a, b in zip(early, entered.gradients, strict=True))
        else:
            whole(roots, gradients, {})
    counts.append(counter.get_total_flops())
    return [*entered.gradients, *(p.grad for p in parameters)], counts


@pytest.mark.parametrize("name", MODULES)
def test_two_halves_have_the_bits_of_one_pass_and_its_work(name):
    wanted, (work,) = passed(name, halves=False)
    found, (first, both) = passed(name, halves=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert both == work
    if name in ("linear", "convolution"):
        assert first == work / 2  # as many multiplications as the other half


@pytest.mark.parametrize("name", MODULES)
def test_what_is_computed_again_for_two_halves_is_computed_once_and_kept_no_longer_than_needed(name, monkeypatch):
    def halves():
        make, shape = MODULES[name]
        torch.manual_seed(0)
        module = make()
        (block,) = set_up(module, MemoryPlan(recompute="full"), blocks={"chunk": module})
        values, entered = enter({"x": torch.randn(shape, requires_grad=True)})
        made = module(values["x"])
        calls = []
        inner = block.inner
        block.inner = lambda *a: calls.append(1) or inner(*a)
        given = [torch.randn_like(r) for r in ([made] if torch.is_tensor(made) else [made[0], *made[1]])]
        split = SplitBackward(entered.anchor, list(module.parameters()), [])
        split.inputs(edges([made]), given, {})
        kept = block.store.meter.live
        split.weights()
        return [*entered.gradients, *(p.grad for p in module.parameters())], len(calls), kept

    wanted, _ = passed(name, halves=False)
    found, again, kept = halves()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert again == 1
    if name in ("linear", "convolution"):
        monkeypatch.setattr(recompute, "asked_again", lambda: True)
        assert halves()[2] > kept > 0, "whatever the first half asked for is kept"
        monkeypatch.setattr(recompute, "asked_again", lambda: False)
        assert halves()[1] == 2, "the second half asks for what the first one had"


def test_what_other_chunks_gave_of_a_tied_weight_is_added_first():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 5) * 1e3)
    given = torch.randn(5, 5)

    def make():
        values, entered = enter({"x": torch.ones(4, 5, requires_grad=True)})
        return edges([F.linear(F.linear(values["x"], weight), weight)]), entered

    gradient = torch.randn(4, 5)
    results = []
    for halves in (False, True):
        roots, entered = make()
        if halves:
            split = SplitBackward(entered.anchor, [weight], [])
            split.inputs(roots, [gradient], {weight: given})
            split.weights()
        else:
            whole(roots, [gradient], {weight: given})
        results.append(weight.grad)
        weight.grad = None
    x = torch.ones(4, 5)
    inner = F.linear(x, weight)
    wanted = (given + gradient.t() @ inner) + (gradient @ weight).t() @ x
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], wanted)
