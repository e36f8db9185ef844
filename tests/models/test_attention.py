"""The faster ways to compute attention and dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shoal.models.attention import LONGEST_WITH_WEIGHTS, attention
from shoal.models.dropout import Dropout, dropout

MASK = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None, :]


@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), (MASK, False)])
def test_attention_with_kept_weights_is_as_close_to_float64_as_the_fused_kernel_is(mask, causal):
    torch.manual_seed(0)
    parts = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64)
    grad = torch.randn(2, 3, 9, 8, dtype=torch.float64)

    def passes(way, dtype: torch.dtype) -> torch.Tensor:
        q, k, v = (part.to(dtype).requires_grad_() for part in parts)
        out = way(q, k, v, mask, causal)
        out.backward(grad.to(dtype))
        return torch.stack([out.detach(), q.grad, k.grad, v.grad]).double()

    def fused(q, k, v, mask, causal):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    exact = passes(fused, torch.float64)
    assert torch.equal(passes(attention, torch.float32), passes(fused, torch.float32))
    ours, theirs = (passes(way, torch.bfloat16) for way in (attention, fused))
    assert (ours - exact).norm() < max(1.5 * (theirs - exact).norm(), 0.01 * exact.norm())


def test_attention_dropout_keeps_the_mean_and_zeroes_whole_weights():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 6)
    v = torch.eye(6)[None, None]  # the output is then the weights themselves
    drawn = torch.stack([attention(q, k, v, dropout=0.25) for _ in range(2000)])
    assert (drawn == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)  # six standard deviations
    torch.testing.assert_close(drawn.mean(0), attention(q, k, v), rtol=0.1, atol=0.01)


def test_a_long_sequence_keeps_no_weights(monkeypatch):
    q = torch.randn(1, 1, LONGEST_WITH_WEIGHTS + 1, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "baddbmm", None)
    assert attention(q, q, q, causal=True).shape == q.shape


def test_a_row_that_sees_nothing_is_finite():
    q = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert attention(q, q, q, torch.zeros(1, 1, 1, 3).bool()).isfinite().all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_scales_the_rest_to_the_same_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(501, 401, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.005)  # four standard deviations of 200,901 draws
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=0.005)
    assert torch.equal(x.grad, y)


def test_neighbours_that_share_random_bits_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(50_000, 4), 0.5) == 0).float()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.02  # four standard deviations


def test_dropout_follows_the_default_generator_is_off_in_evaluation_and_draws_nothing_at_zero():
    x = torch.ones(3, 5)
    torch.manual_seed(1)
    first = dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)
    state = torch.get_rng_state()
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(nn.Sequential(Dropout(0.5))) == "Sequential(\n  (0): Dropout(p=0.5)\n)"


def test_dropout_does_not_depend_on_the_number_of_threads():
    def drawn(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        try:
            return dropout(torch.ones(300_000), 0.3)
        finally:
            torch.set_num_threads(before)

    assert torch.equal(drawn(1), drawn(2))
