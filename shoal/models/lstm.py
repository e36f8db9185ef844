"""A stacked LSTM language model, in the manner of Zaremba et al. (2014)."""

from dataclasses import dataclass

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.dimensions import Dimensions, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.ends import Logits
from shoal.models.facts import at_least_one, probability
from shoal.models.initial_values import Constant, Initial, Normal, initialise
from shoal.models.recurrent import LSTMLayers


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    layers: int = 2
    width: int = 128  # of the token embedding
    hidden: int = 0  # of each LSTM layer; 0: as the embedding
    dropout: float = 0.0  # on the embedding, between layers and on the output; never across time steps
    tied: bool = False  # the output layer is the token embedding (Press and Wolf, 2017)
    context: int = 0  # tokens of one training sample; 0: from the data
    vocab: int = 0  # 0: from the data

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "width")
        probability(self, "dropout")
        if self.tied and self.hidden not in (0, self.width):
            raise UserError(
                f"model.tied needs model.hidden = model.width, got {self.hidden} and {self.width}: leave hidden out."
            )


class LSTM(nn.Module):
    """Tokens [n, T] -> logits [n, T, vocab]; every sample starts from a zero state."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        at_least_one(config, "vocab")
        self.config = config
        hidden = config.hidden or config.width
        self.tokens = nn.Embedding(config.vocab, config.width)
        between = config.dropout if config.layers > 1 else 0.0
        self.lstm = LSTMLayers(config.width, hidden, config.layers, dropout=between, batch_first=True)
        self.dropout = Dropout(config.dropout)
        self.head = None if config.tied else nn.Linear(hidden, config.vocab, bias=False)
        self.logits = Logits(("vocab", "width" if config.tied else "hidden"))
        self.bias = nn.Parameter(self.tokens.weight.new_zeros(config.vocab))
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        softmax = Normal((self.config.hidden or self.config.width) ** -0.5)
        embedding = softmax if self.config.tied else Normal(0.1)
        return {"tokens.weight": embedding, "head.weight": softmax, "bias": Constant(0.0)}

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.dropout(self.tokens(tokens)))
        weight = self.tokens.weight if self.head is None else self.head.weight
        logits: Tensor = self.logits(self.dropout(states), weight, self.bias)
        return logits

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, _DIMENSIONS)


_DIMENSIONS = {
    "tokens.weight": ("vocab", "width"),
    "lstm.weight_ih_l0": ("gates", "width"),  # "gates": input, forget, cell and output gate, one after the other
    "lstm.weight_*": ("gates", "hidden"),
    "lstm.bias_*": ("gates",),
    "head.weight": ("vocab", "hidden"),
    "bias": ("vocab",),
}
