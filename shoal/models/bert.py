"""BERT: a Transformer encoder (Devlin et al., 2019) with a head for each of its tasks."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.activation import ACTIVATIONS, Activation
from shoal.models.attention import Mixing
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.ends import Joint, Logits, Positions, Segments
from shoal.models.facts import at_least_one, probability
from shoal.models.gpt import STREAM, head_grains
from shoal.models.initial_values import Constant, Initial, Normal, initialise

Head = Literal["encoder", "masked-language-model", "classification", "question-answering"]
HEADS: tuple[Head, ...] = get_args(Head)


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    layers: int = 4
    heads: int = 4
    width: int = 128
    ffn: int = 0  # width of the hidden layer in each block; 0: 4 x width
    context: int = 0  # most tokens seen at once; 0: from the data
    vocab: int = 0  # 0: from the data
    types: int = 2  # kinds of segment: question and context, for example
    classes: int = 0  # for classification; 0: from the data
    dropout: float = 0.1  # on the embeddings, on what each block adds and before the classifier
    attention_dropout: float = 0.0  # on the attention weights; above 0 it rules out the fused attention on a CPU
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    mask_token: int = -1  # id that hides a token; -1: from the data, or the first one after the data's vocabulary

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "heads", "width", "types")
        probability(self, "dropout", "attention_dropout")
        if self.width % self.heads:
            raise UserError(
                f"model.width = {self.width} is not divisible by model.heads = {self.heads}: "
                f"try width = {math.ceil(self.width / self.heads) * self.heads}."
            )


class Block(nn.Module):
    """Post-norm Transformer block: [n, T, width] -> [n, T, width]; ``mask`` bool [n, 1, 1, T] is False at padding."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        ffn = config.ffn or 4 * config.width
        self.head_size = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.mixing = Mixing(config.attention_dropout)
        self.out = nn.Linear(config.width, config.width)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, ffn)
        self.activation = ACTIVATIONS[config.activation]
        self.down = nn.Linear(ffn, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout, STREAM)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        mixed = self.mixing(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        hidden = self.activation(self.up(x))
        normed: Tensor = self.norm2(x + self.dropout(self.down(hidden)))
        return normed


class Bert(nn.Module):
    """Tokens int [n, T], ``mask`` [n, T] (0 at padding), ``types`` int [n, T] -> what the head gives:

    - encoder: the last layer's states [n, T, width]
    - masked-language-model: logits [n, T, vocab], or [k, vocab] at the k places where ``at`` bool [n, T] is true
    - classification: logits [n, classes]
    - question-answering: logits [n, T, 2] of the first and of the last token of the answer

    Raises UserError in ``forward`` when T is longer than the context."""

    sequences = (
        "tokens",
        "positions",
        "types",
        "norm",
        "blocks.*",
        "joint",
    )  # modules that may see slices of the sequence

    def __init__(self, config: BertConfig, head: Head) -> None:
        super().__init__()
        at_least_one(config, "context", "vocab")
        self.config = config
        self.head = head
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = Positions(config.context, config.width)
        self.types = Segments(config.types, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout, STREAM)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.joint = Joint(STREAM)
        if head in ("encoder", "classification"):
            self.pooler = nn.Linear(config.width, config.width)
        if head == "masked-language-model":
            self.transform = nn.Linear(config.width, config.width)
            self.transform_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.vocab_bias = nn.Parameter(torch.zeros(config.vocab))
            self.logits = Logits()
        if head == "classification":
            at_least_one(config, "classes")
            self.pooled_dropout = Dropout(config.dropout, ("samples", "pooled"))
            self.classifier = nn.Linear(config.width, config.classes)
        if head == "question-answering":
            self.span = nn.Linear(config.width, 2)
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        return {
            "*norm*.weight": Constant(1.0),
            "*bias": Constant(0.0),
            "*.weight": Normal(0.02),
        }

    def encode(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """The last layer's states [n, T, width]."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise UserError(f"{length} tokens do not fit the model's context of {self.config.context}.")
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions(length) + self.types(types)))
        visible = None if mask is None else mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, visible)
        return self.joint(x)  # type: ignore[no-any-return]

    def pool(self, states: Tensor) -> Tensor:
        """One vector a sequence, from its first token: [n, T, width] -> [n, width]."""
        return torch.tanh(self.pooler(states[:, 0]))

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        x = self.encode(tokens, mask, types)
        if self.head == "masked-language-model":
            x = x if at is None else x[at]
            x = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(x)))
            x = self.logits(x, self.tokens.weight, self.vocab_bias)
        elif self.head == "classification":
            x = self.classifier(self.pooled_dropout(self.pool(x)))
        elif self.head == "question-answering":
            x = self.span(x)
        return x

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, _DIMENSIONS)

    def grains(self) -> dict[str, Grain]:
        followers = {"transformed": Grain(follows="width")}  # what comes out of ``transform`` is a width again
        return {**head_grains(self.config.width // self.config.heads), **followers}


_DIMENSIONS = {
    "tokens.weight": ("vocab", "width"),
    "positions.weight": ("context", "width"),
    "types.weight": ("types", "width"),
    "*norm*": ("width",),
    "*.qkv.weight": ("qkv", "width"),  # queries, keys, values of all heads, one after the other
    "*.qkv.bias": ("qkv",),
    "*.out.weight": ("width", "heads"),  # "heads": the outputs of all heads, one after the other
    "*.out.bias": ("width",),
    "*.up.weight": ("ffn", "width"),
    "*.up.bias": ("ffn",),
    "*.down.weight": ("width", "ffn"),
    "*.down.bias": ("width",),
    "pooler.weight": ("pooled", "width"),
    "pooler.bias": ("pooled",),
    "transform.weight": ("transformed", "width"),
    "transform.bias": ("transformed",),
    "vocab_bias": ("vocab",),
    "classifier.weight": ("classes", "pooled"),
    "classifier.bias": ("classes",),
    "span.weight": ("span", "width"),  # "span": the first and the last token of an answer
    "span.bias": ("span",),
}
