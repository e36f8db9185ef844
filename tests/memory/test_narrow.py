"""Parameters in bfloat16: what float32 learns is learnt, where plain rounding stands still."""

import pytest
import torch
from memory.test_streamed import CPU
from torch import Tensor, nn

from shoal.memory.apply import set_up
from shoal.memory.keeping import KeptParameters, keep_parameters, keep_states
from shoal.memory.narrow import REST
from shoal.memory.rounding import joined
from shoal.models.registry import build
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec

WAYS = pytest.mark.parametrize("way", ["bfloat16-stochastic", "bfloat16-compensated"])


def narrowed(module: nn.Module, way: str, **plan) -> KeptParameters:
    tell = [].append
    return keep_parameters(module, MemoryPlan(parameters=way, **plan), device=CPU, sharing=1, say=tell, tell=tell)


class Trained:
    """A module, its optimiser and the steps that it has made."""

    def __init__(self, module: nn.Module, way: str, lr: float, **options) -> None:
        self.module, self.steps = module, 0
        plan = MemoryPlan(parameters=way)
        tell = [].append
        parameters = keep_parameters(module, plan, device=CPU, sharing=1, say=tell, tell=tell)
        rest = {"device": CPU, "seed": 0, "step": lambda: self.steps, "sharing": 1, "say": tell, "tell": tell}
        inner = torch.optim.AdamW(module.parameters(), lr=lr, fused=True, **options)
        self.optimizer = keep_states(inner, module, plan, parameters, **rest)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1, bias=False))


def learnt(way: str, *, steps: int = 300, lr: float = 1e-4) -> float:
    """The mean loss of a network's last steps on a formula. "rounded": the nearest bfloat16 after each update."""
    module = network()
    rounded = way == "rounded"
    trained = Trained(module, "float32" if rounded else way, lr)
    matrices = [p for p in module.parameters() if p.dim() == 2]
    stream = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        if rounded:
            with torch.no_grad():
                for matrix in matrices:
                    matrix.copy_(matrix.bfloat16())
        x = torch.randn(128, 8, generator=stream)
        y = (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3]
        loss = (module(x) - y).square().mean()
        losses.append(float(loss.detach()))
        trained.step(loss)
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_both_ways_of_rounding_learn_what_float32_learns_and_plain_rounding_does_not():
    float32, plain = learnt("float32"), learnt("rounded")
    assert plain > 1.5 * float32, "plain rounding must stand still here, or this proves nothing"
    assert learnt("bfloat16-stochastic") < 1.1 * float32
    assert learnt("bfloat16-compensated") < 1.05 * float32


def test_compensated_parameters_and_their_rests_are_the_very_float32_update():
    module, plain = network(), network()
    kept, other = Trained(module, "bfloat16-compensated", 0.01), Trained(plain, "float32", 0.01)
    stream = torch.Generator().manual_seed(2)
    for _ in range(5):
        for mine, yours in zip(module.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=stream)
            yours.grad = mine.grad.clone()
        kept.optimizer.step()
        other.optimizer.step()
    for mine, yours in zip(module.parameters(), plain.parameters(), strict=True):
        rest = kept.optimizer.state[mine].get(REST)
        assert (rest is None) == (mine.dim() == 1)
        whole = mine if rest is None else joined(mine.detach(), rest)
        assert torch.equal(whole, yours)


@WAYS
def test_half_the_bytes_of_matrices_and_gradients_that_stay_float32(way):
    module = network()
    names = [name for name, _ in module.named_parameters()]
    narrowed(module, way)
    assert [name for name, _ in module.named_parameters()] == names
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    module(x).sum().backward()
    wide = network()
    wide.load_state_dict({name: p.float() for name, p in module.state_dict().items()})
    wide(x).sum().backward()
    for mine, yours in zip(module.parameters(), wide.parameters(), strict=True):
        assert mine.dtype == (torch.bfloat16 if mine.dim() == 2 else torch.float32)
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, yours.grad)


OPTIONS = {"gpt": {"layers": 2, "heads": 2, "width": 16}, "lstm": {"width": 12, "layers": 2}, "elmo": {"width": 8}}
FACTS = {"vocab": 31, "context": 8}


@WAYS
@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_models_forward_and_backward_pass_are_those_of_its_own_weights_in_float32(kind, way, recompute):
    """Tied heads, recurrent layers and blocks that are recomputed included."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return build(ModelSpec(kind=kind, options=OPTIONS[kind]), FACTS)

    tokens = torch.arange(24).view(3, 8) % 31
    module, wide = made(), made()
    narrowed(module, way)
    set_up(module, MemoryPlan(recompute=recompute), [].append)
    wide.load_state_dict({name: t.float() for name, t in module.state_dict().items()})
    outputs = [each(tokens) for each in (module, wide)]
    parts = [out if isinstance(out, tuple) else (out,) for out in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    for part in parts:
        torch.stack([out.square().sum() for out in part]).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(module.parameters(), wide.parameters(), strict=True))
    assert any(p.dtype == torch.bfloat16 for p in module.parameters())


def test_under_autocast_products_take_the_weights_as_they_are_with_the_bits_of_widened_ones():
    module, wide = network(), network()
    narrowed(module, "bfloat16-stochastic")
    wide.load_state_dict({name: t.float() for name, t in module.state_dict().items()})
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    kept: list[set[torch.dtype]] = []
    for each in (module, wide):
        seen: set[torch.dtype] = set()
        each[2].register_forward_pre_hook(lambda m, _, seen=seen: seen.add(m.weight.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each(x).float().sum().backward()
        kept.append(seen)
    assert kept == [{torch.bfloat16}, {torch.float32}]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(module.parameters(), wide.parameters(), strict=True))


def test_frozen_parameters_stay_as_they_are():
    module = network()
    module[0].weight.requires_grad_(False)
    narrowed(module, "bfloat16-compensated")
    assert module[0].weight.dtype == torch.float32
    assert module[2].weight.dtype == torch.bfloat16
