"""A bidirectional language model and the mix of its layers, in the manner of ELMo (Peters et al., 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.models.dimensions import Dimensions, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.ends import Logits
from shoal.models.facts import at_least_one, probability
from shoal.models.initial_values import Constant, Initial, Normal, initialise
from shoal.models.recurrent import LSTMLayers


@dataclass(frozen=True, kw_only=True)
class ElmoConfig:
    layers: int = 2  # in each direction
    width: int = 128  # of the token embedding and of each LSTM layer
    dropout: float = 0.0  # on the embedding and on each layer's output; never across time steps
    tied: bool = True  # the softmax layer, which both directions share, is the token embedding too
    context: int = 0  # tokens of one training sample; 0: from the data
    vocab: int = 0  # 0: from the data

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "width")
        probability(self, "dropout")


class Elmo(nn.Module):
    """Tokens [n, T + 1] -> (logits [n, T, vocab] of the tokens 1..T, each from the tokens before it;
    logits [n, T, vocab] of the tokens 0..T-1, each from the tokens after it).

    The directions share the embedding and the softmax layer, and keep their own LSTM layers (section 3.1)."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        at_least_one(config, "vocab")
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocab, width)
        self.forward_layers = nn.ModuleList(LSTMLayers(width, width, batch_first=True) for _ in range(config.layers))
        self.backward_layers = nn.ModuleList(LSTMLayers(width, width, batch_first=True) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.head = None if config.tied else nn.Linear(width, config.vocab, bias=False)
        self.logits = Logits(("vocab", "width" if config.tied else "hidden"))
        self.bias = nn.Parameter(torch.zeros(config.vocab))
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        softmax = Normal(self.config.width**-0.5)
        return {"tokens.weight": softmax, "head.weight": softmax, "bias": Constant(0.0)}

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.dropout(self.tokens(tokens))
        weight = self.tokens.weight if self.head is None else self.head.weight
        after = self._states(self.forward_layers, embedded[:, :-1])[-1]
        before = self._states(self.backward_layers, embedded.flip(1)[:, :-1])[-1].flip(1)
        return self.logits(after, weight, self.bias), self.logits(before, weight, self.bias)

    def representations(self, tokens: Tensor) -> Tensor:
        """All layers' states for tokens [n, T]: [layers + 1, n, T, 2 x width], the embedding first.

        Each state holds the forward half (from the tokens up to it) and the backward half (from it to the end)."""
        embedded = self.dropout(self.tokens(tokens))
        forward = self._states(self.forward_layers, embedded)
        backward = [states.flip(1) for states in self._states(self.backward_layers, embedded.flip(1))]
        return torch.stack([torch.cat(pair, dim=-1) for pair in zip(forward, backward, strict=True)])

    def _states(self, layers: nn.ModuleList, embedded: Tensor) -> list[Tensor]:
        states = [embedded]
        for number, lstm in enumerate(layers):
            output = self.dropout(lstm(states[-1])[0])
            states.append(output if number == 0 else output + states[-1])  # residual from the second layer on
        return states

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, _DIMENSIONS)


class LayerMix(nn.Module):
    """A learnt weighted sum of layers, gamma * sum softmax(s)_j h_j: [layers, ...] -> [...] (equation 1)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        mixed: Tensor = self.gamma * torch.tensordot(self.scores.softmax(0), states, dims=1)
        return mixed

    def dimensions(self) -> Dimensions:
        return {"scores": ("layers",), "gamma": ("one",)}


_DIMENSIONS = {
    "tokens.weight": ("vocab", "width"),
    "*_layers.*.weight_ih_*": ("gates", "width"),  # "gates": input, forget, cell and output gate, one after the other
    "*_layers.*.weight_hh_*": ("gates", "hidden"),
    "*_layers.*.bias_*": ("gates",),
    "head.weight": ("vocab", "hidden"),
    "bias": ("vocab",),
}
