"""The mixture-of-experts GPT: routing, the balance loss, and that experts are ordinary layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import UserError
from shoal.models.generation import generate
from shoal.models.huggingface import save_folder
from shoal.models.moe import Mixture, MoE, MoEConfig, balance_loss, choose_experts
from shoal.models.tasks.language_model import LanguageModel

SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 8, "vocab": 11}
TOKENS = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))


def _mixture(**options: object) -> Mixture:
    torch.manual_seed(0)
    model = MoE(MoEConfig(**{**SMALL, "experts": 5, **options})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.blocks[0].mixture


def _by_the_token(mixture: Mixture, x: Tensor) -> Tensor:
    """The formula, one token after the other."""
    experts = mixture.experts
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        shares = F.softmax(mixture.router.weight @ token, 0)
        best, chosen = shares.topk(mixture.top_k)
        weights = best if mixture.top_k == 1 else best / best.sum()
        row = torch.zeros_like(token)
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            hidden = F.gelu(experts.up.weight[e] @ token + experts.up.bias[e])
            row = row + weight * (experts.down.weight[e] @ hidden + experts.down.bias[e])
        rows.append(row)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_mixture_is_the_formula_token_by_token_with_its_gradients(top_k):
    mixture = _mixture(top_k=top_k, balance=0.0)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    wanted = {"x": x, **dict(mixture.named_parameters())}
    toward = torch.randn_like(x)
    ours = torch.autograd.grad((mixture(x) * toward).sum(), wanted.values())
    theirs = torch.autograd.grad((_by_the_token(mixture, x) * toward).sum(), wanted.values())
    torch.testing.assert_close(mixture(x), _by_the_token(mixture, x), rtol=1e-12, atol=1e-12)
    for name, a, b in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_no_token_is_dropped_when_all_want_the_same_expert():
    mixture = _mixture(top_k=1)
    torch.nn.init.zeros_(mixture.router.weight)
    mixture.router.weight.data[3] = 9.0
    x = torch.rand(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixture(x), _by_the_token(mixture, x), rtol=1e-12, atol=1e-12)
    assert choose_experts(mixture.router(x), 1).order(5)[1] == [0, 0, 0, 14, 0]


@given(st.integers(1, 6), st.integers(0, 20), st.data())
def test_tokens_go_to_their_experts_in_the_order_of_the_tokens(experts, tokens, data):
    top_k = data.draw(st.integers(1, experts))
    routes = choose_experts(torch.rand(tokens, experts), top_k)
    order, counts = routes.order(experts)
    assert sum(counts) == tokens * top_k
    assert order.sort().values.tolist() == list(range(tokens * top_k))
    for expert, pairs in enumerate(order.split(counts)):
        assert (routes.experts.reshape(-1)[pairs] == expert).all()
        assert pairs.tolist() == sorted(pairs.tolist())


def test_the_balance_loss_is_one_a_token_when_even_and_as_many_as_experts_when_all_go_to_one():
    even = balance_loss(torch.full((3, 8, 4), 0.25), torch.full((3, 4), 0.25))
    one = F.one_hot(torch.zeros(3, 8, dtype=torch.long), 4).float()
    assert even.item() == pytest.approx(3 * 8)
    assert balance_loss(one, one.mean(1)).item() == pytest.approx(4 * 3 * 8)


def test_the_balance_loss_adds_its_gradient_and_leaves_the_loss_alone():
    mixture = _mixture(balance=0.5)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mixture.train()
    with_loss = torch.autograd.grad(mixture(x).sum(), mixture.router.weight)[0]
    mixture.eval()
    without = torch.autograd.grad(mixture(x).sum(), mixture.router.weight)[0]
    shares = mixture.router(x)
    loads = mixture.loads(choose_experts(shares.view(-1, 5), 2).experts.view(2, 7, 2), 5)
    assert loads.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    added = torch.autograd.grad(0.5 * balance_loss(shares, loads), mixture.router.weight)[0]
    torch.testing.assert_close(with_loss - without, added, rtol=1e-10, atol=1e-12)
    assert added.abs().max() > 0


def test_the_gradient_is_a_sum_over_samples_whatever_the_micro_batches():
    torch.manual_seed(0)
    model = MoE(MoEConfig(**SMALL, experts=4, balance=0.1)).double()
    task = LanguageModel()

    def gradients(*cuts: slice) -> list[Tensor]:
        model.zero_grad()
        for cut in cuts:
            task.loss(model, {"tokens": TOKENS[cut]})[0].backward()
        return [parameter.grad for parameter in model.parameters()]

    whole, parts = gradients(slice(0, 4)), gradients(slice(0, 1), slice(1, 4))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # the loss itself is in float32


def test_training_with_the_balance_loss_evens_out_what_the_experts_get():
    def spread(balance: float) -> float:
        torch.manual_seed(0)
        model = MoE(MoEConfig(**SMALL, experts=4, top_k=1, balance=balance))
        torch.nn.init.normal_(model.blocks[0].mixture.router.weight, std=2.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        seen: list[Tensor] = []
        model.blocks[0].mixture.register_forward_pre_hook(lambda m, x: seen.append(m.router(x[0].detach()).argmax(-1)))
        for _ in range(60):
            optimizer.zero_grad()
            LanguageModel().loss(model, {"tokens": TOKENS})[0].backward()
            optimizer.step()
        return seen[-1].flatten().bincount(minlength=4).max().item() / seen[-1].numel()

    assert spread(1.0) < spread(0.0)


def test_a_mixture_generates_and_a_token_changes_nothing_before_it():
    torch.manual_seed(0)
    model = MoE(MoEConfig(**SMALL)).eval()
    first = TOKENS[:1, :8]
    changed = first.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    torch.testing.assert_close(model(first)[:, :5], model(changed)[:, :5], rtol=1e-5, atol=1e-6)  # other groups of rows
    assert generate(model, first, 4, temperature=0.0).shape == (1, 12)


def test_an_empty_batch_goes_through():
    model = MoE(MoEConfig(**SMALL))
    total, count = LanguageModel().loss(model, {"tokens": TOKENS[:0]})
    total.backward()
    assert count == 0
    assert total.item() == 0


def test_a_mixture_is_not_written_as_a_plain_gpt(tmp_path):
    with pytest.raises(UserError, match="a MoE has no Hugging Face form here"):
        save_folder(MoE(MoEConfig(**SMALL)), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"top_k": 9}, "top_k must be from 1 to model.experts = 8, got 9"), ({"balance": -1.0}, "must not be negative")],
)
def test_a_routing_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        MoEConfig(**SMALL, **options)
