"""A few lines from a language model, to see what it has learnt."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shoal.data.tokenizer import from_description
from shoal.models.generation import generate
from shoal.models.gpt import GPT
from shoal.models.lstm import LSTM
from shoal.recipe.recipe import Recipe

TOKENS = 200
TEMPERATURE = 0.8


def writes_text(model: nn.Module, facts: Mapping[str, Any]) -> bool:
    """``model`` may be a part of one."""
    return isinstance(model, GPT | LSTM) and "tokenizer" in facts


def sample_text(model: nn.Module, facts: Mapping[str, Any], recipe: Recipe) -> str:
    """Text that a model that `writes_text` goes on to write after a line break."""
    tokenizer = from_description(facts["tokenizer"])
    prompt = torch.tensor([tokenizer.encode("\n") or [0]])
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(recipe.seed)
    tokens = generate(model, prompt.to(device), TOKENS, temperature=TEMPERATURE, top_k=0, generator=generator)
    return tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())
