"""GPT: a causal Transformer language model with the arithmetic of GPT-2 (Radford et al., 2019)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.activation import ACTIVATIONS, Activation
from shoal.models.attention import Mixing
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.ends import Logits, Positions
from shoal.models.facts import at_least_one, probability
from shoal.models.initial_values import Constant, Initial, Normal, initialise

STREAM = ("samples", "sequence", "width")  # the dims of what flows from block to block


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    layers: int = 4
    heads: int = 4
    width: int = 128
    ffn: int = 0  # width of the hidden layer in each block; 0: 4 x width
    context: int = 0  # most tokens seen at once; 0: from the data
    vocab: int = 0  # 0: from the data
    dropout: float = 0.0  # on the embeddings and on what each block adds
    attention_dropout: float = 0.0  # on the attention weights; above 0 it rules out the fused attention on a CPU
    tied: bool = True  # the output layer is the token embedding
    bias: bool = True  # in the linear layers and layer norms
    activation: Activation = "gelu"  # GPT-2's own weights need gelu_tanh
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "heads", "width")
        probability(self, "dropout", "attention_dropout")
        if self.width % self.heads:
            raise UserError(
                f"model.width = {self.width} is not divisible by model.heads = {self.heads}: "
                f"try width = {math.ceil(self.width / self.heads) * self.heads}."
            )


class Attention(nn.Module):
    """Causal self-attention: [n, T, width] -> [n, T, width]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.mixing = Mixing(config.attention_dropout, causal=True)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        projected: Tensor = self.out(self.mixing(q, k, v).transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then a hidden layer, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        ffn = config.ffn or 4 * config.width
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.up = nn.Linear(config.width, ffn, bias=config.bias)
        self.down = nn.Linear(ffn, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout, STREAM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = self.activation(self.up(self.norm2(x)))
        added: Tensor = self.dropout(self.down(hidden))
        return x + added


class GPT(nn.Module):
    """Tokens [n, T] -> logits [n, T, vocab]; the logits at t depend on tokens 0..t only.

    Raises UserError in ``forward`` when T is longer than the context."""

    block: Callable[..., nn.Module] = Block
    # modules that may see slices of the sequence
    sequences: tuple[str, ...] = ("tokens", "positions", "blocks.*", "norm", "logits")

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        at_least_one(config, "context", "vocab")
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = Positions(config.context, config.width)
        self.dropout = Dropout(config.dropout, STREAM)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.logits = Logits()
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        """Normal(0, 0.02); what adds to the residual stream is scaled by 1 / sqrt(2 layers) (GPT-2, section 2.3)."""
        added = Normal(0.02 * (2 * self.config.layers) ** -0.5)
        return {
            "*norm*.weight": Constant(1.0),
            "*.bias": Constant(0.0),
            "*.attention.out.weight": added,
            "*.down.weight": added,
            "*.weight": Normal(0.02),
        }

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.config.context:
            raise UserError(f"{length} tokens do not fit the model's context of {self.config.context}.")
        x = self.dropout(self.tokens(tokens) + self.positions(length))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.norm(x), self.tokens.weight if self.head is None else self.head.weight)
        return logits

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, DIMENSIONS)

    def grains(self) -> dict[str, Grain]:
        return head_grains(self.config.width // self.config.heads)


def head_grains(head_size: int) -> dict[str, Grain]:
    """A head stays whole, and goes with its queries, keys and values."""
    return {"qkv": Grain(3, head_size, "heads", follows="heads"), "heads": Grain(1, head_size, "heads")}


DIMENSIONS = {
    "tokens.weight": ("vocab", "width"),
    "positions.weight": ("context", "width"),
    "head.weight": ("vocab", "width"),
    "*norm*": ("width",),
    "*.qkv.weight": ("qkv", "width"),  # queries, keys, values of all heads, one after the other
    "*.qkv.bias": ("qkv",),
    "*.attention.out.weight": ("width", "heads"),  # "heads": the outputs of all heads, one after the other
    "*.attention.out.bias": ("width",),
    "*.up.weight": ("ffn", "width"),
    "*.up.bias": ("ffn",),
    "*.down.weight": ("width", "ffn"),
    "*.down.bias": ("width",),
}
