"""The GPT itself: causality, sizes, start."""

import math

import pytest
import torch

from shoal.errors import UserError
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.tasks.language_model import LanguageModel

SMALL = GPTConfig(layers=2, heads=2, width=16, context=8, vocab=11)


def test_gpt2_small_has_124_million_parameters():
    config = GPTConfig(layers=12, heads=12, width=768, context=1024, vocab=50257, activation="gelu_tanh")
    with torch.device("meta"):
        model = GPT(config)
    block = 12 * 768**2 + 13 * 768  # four matrices of the attention, eight of the hidden layer; biases and norms
    assert sum(p.numel() for p in model.parameters()) == (50257 + 1024) * 768 + 12 * block + 2 * 768 == 124_439_808


def test_a_token_changes_no_logits_before_it_and_some_from_it_on():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 8, 11)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_the_attention_is_the_textbook_formula():
    torch.manual_seed(0)
    attention = GPT(SMALL).blocks[0].attention
    x = torch.randn(2, 8, 16)
    q, k, v = (part.view(2, 8, 2, 8).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)  # float32: another order of sums


def test_an_untrained_model_is_nearly_uniform_and_a_uniform_one_loses_ln_vocab():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    batch = {"tokens": torch.randint(11, (4, 9))}
    total, count = LanguageModel().loss(model, batch)
    assert total.item() / count == pytest.approx(math.log(11), rel=0.05)
    torch.nn.init.zeros_(model.tokens.weight)
    total, count = LanguageModel().loss(model, batch)
    assert count == 32
    assert total.item() / count == pytest.approx(math.log(11), rel=1e-6)
    figures = LanguageModel().summarise(LanguageModel().measure(model, batch))
    assert figures["perplexity"] == pytest.approx(11, rel=1e-5)


def test_what_adds_to_the_residual_stream_starts_smaller_by_the_root_of_twice_the_layers():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=8, heads=2, width=64, context=8, vocab=11))
    assert model.blocks[3].up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[3].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_dropout_draws_from_the_default_generator_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=16, context=8, vocab=11, dropout=0.5, attention_dropout=0.5))
    tokens = torch.randint(11, (2, 8))

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(tokens)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    model.eval()
    assert torch.equal(seeded(1), seeded(2))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(UserError, match="9 tokens do not fit the model's context of 8"):
        GPT(SMALL)(torch.zeros(1, 9, dtype=torch.long))


def test_a_width_that_the_heads_do_not_divide_is_refused_with_one_that_they_do():
    with pytest.raises(UserError, match=r"not divisible by model.heads = 3: try width = 18"):
        GPTConfig(heads=3, width=16)
