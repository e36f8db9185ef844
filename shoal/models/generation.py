"""Generate tokens from a language model, one at a time."""

import torch
from torch import Tensor, nn

from shoal.errors import UserError


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """One token int [1, 1] from the logits [vocab]: the likeliest at temperature 0, otherwise drawn among the
    ``top_k`` likeliest (0: among all) after division by the temperature."""
    if temperature == 0:
        return logits.argmax().view(1, 1)
    scaled = logits.float() / temperature
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    return torch.multinomial(scaled.softmax(0), 1, generator=generator).view(1, 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt int [1, T] continued by ``length`` tokens: [1, T + length]. T must be at least 1.

    The model maps tokens [1, t] to logits [1, t, vocab]; it sees at most the last ``context`` tokens of its config, and
    is in evaluation mode meanwhile. Raises UserError for an empty prompt or a negative temperature."""
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 1:
        raise UserError(f"the prompt must be tokens [1, T] with T of at least 1, got {list(tokens.shape)}.")
    if temperature < 0:
        raise UserError(f"temperature must not be negative, got {temperature}.")
    context = getattr(getattr(model, "config", None), "context", 0)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for _ in range(length):
            logits = model(tokens[:, -context:])[0, -1]
            tokens = torch.cat([tokens, choose(logits, temperature, top_k, generator).to(tokens)], dim=1)
    finally:
        for module, training in modes.items():
            module.training = training
    return tokens
