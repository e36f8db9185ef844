"""Generating tokens."""

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.generation import choose, generate
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.lstm import LSTM, LSTMConfig


class Counting(nn.Module):
    """Always expects the next token to be one more."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        return nn.functional.one_hot((tokens + 1) % 10, 10).float() * 9


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_a_cold_model_says_what_is_likeliest(temperature):
    model = Counting()
    tokens = generate(model, torch.tensor([[3]]), 8, temperature)
    assert tokens.tolist() == [[3, 4, 5, 6, 7, 8, 9, 0, 1]]
    assert model.training  # as it was


@pytest.mark.parametrize(
    "model",
    [GPT(GPTConfig(layers=1, heads=1, width=8, context=4, vocab=10)), LSTM(LSTMConfig(width=8, context=4, vocab=10))],
    ids=["gpt", "lstm"],
)
def test_a_generator_fixes_the_text_beyond_the_context_and_leaves_the_default_generator_alone(model):
    state = torch.get_rng_state()
    texts = [generate(model, torch.tensor([[1, 2]]), 12, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert texts[0].shape == (1, 14)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :2], torch.tensor([[1, 2]]))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_top_k_tokens_are_drawn():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, 1.0, 2, generator).item() for _ in range(100)}
    assert drawn == {1, 3}


def test_tokens_are_drawn_by_the_softmax_of_the_tempered_logits():
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([choose(logits, 2.0, 0, generator) for _ in range(4000)]).flatten()
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, (logits / 2).softmax(0), atol=0.03)  # four standard deviations


@pytest.mark.parametrize(
    ("tokens", "temperature", "why"),
    [(torch.zeros(1, 0), 1.0, "T of at least 1"), (torch.zeros(3), 1.0, r"\[1, T\]"), (torch.zeros(1, 1), -1.0, "neg")],
)
def test_a_prompt_or_temperature_that_makes_no_sense_is_refused(tokens, temperature, why):
    with pytest.raises(UserError, match=why):
        generate(Counting(), tokens.long(), 1, temperature)
