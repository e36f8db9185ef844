"""Make a GPT, a mixture of experts or a BERT work on slices of its sequences, in place: parameters keep their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.attention import Mixing
from shoal.models.bert import Bert
from shoal.models.dropout import Dropout, Part
from shoal.models.ends import Joint, Positions
from shoal.models.gpt import GPT
from shoal.models.moe import Mixture
from shoal.parallel.context.gather import gather_sequence
from shoal.parallel.context.ring import Ring
from shoal.parallel.context.slices import SEQUENCE
from shoal.parallel.partition.chunks import OUTPUT, Chunk

WHOLE = "mask"  # the argument that is that of the keys, which come from everywhere
_LENGTH = "sequence length"


def check_sequence(model: nn.Module) -> None:
    """Raises UserError for a model whose sequences cannot be split, and for dropout of attention weights."""
    if not isinstance(model, GPT | Bert):
        raise UserError(
            f"a {type(model).__name__} cannot split its sequences over mesh axis 'context': a gpt, moe or bert can."
        )
    if model.config.attention_dropout:
        raise UserError(
            f"mesh axis 'context' with model.attention_dropout = {model.config.attention_dropout}: set it to 0; "
            f"its mask would hold a number for every pair of tokens."
        )


def split_sequence(model: nn.Module, ring: Ring) -> None:
    """From now on all workers of the ring call ``model(...)`` with whole sequences, and each computes its own places.

    What a GPT and a masked language model give is then of the own places alone; a BERT's other heads get whole
    sequences of states, on all workers. Raises UserError as `check_sequence` does."""
    check_sequence(model)
    _split_modules(model, ring, gathers=_gathers(model))
    model.forward = (_GPTForward if isinstance(model, GPT) else _BertForward)(model, ring)


def split_stage(chunk: Chunk, model: nn.Module, ring: Ring) -> None:
    """As `split_sequence`, of one chunk of a pipeline that ``model`` was cut into: batches are whole, what chunks hand
    each other is of the own places."""
    check_sequence(model)
    _split_modules(chunk.module, ring, gathers=_gathers(model))
    chunk.module.forward = _StageForward(chunk, ring)


def _split_modules(part: nn.Module, ring: Ring, *, gathers: bool) -> None:
    for module in part.modules():
        replacement: Any = None
        if isinstance(module, Mixing):
            replacement = _Mixing(module.causal, ring)
        elif isinstance(module, Positions):
            replacement = _Positions(module, ring)
        elif isinstance(module, Joint) and gathers:
            replacement = _Gathering(ring)
        elif isinstance(module, Mixture):
            module.loads = _Loads(ring)  # type: ignore[method-assign]
        elif isinstance(module, Dropout) and "sequence" in module.dims:
            module.part = _Parts(module.dims.index("sequence"), ring)
        if replacement is not None:
            module.forward = replacement


def _gathers(model: nn.Module) -> bool:
    return isinstance(model, Bert) and model.head != "masked-language-model"


# What stands in for methods.


class _Forward:
    def __init__(self, model: Any, ring: Ring) -> None:
        self.model, self.ring = model, ring

    def cut(self, tokens: Tensor) -> None:
        length, context = tokens.shape[1], self.model.config.context
        if length > context:
            raise UserError(f"{length} tokens do not fit the model's context of {context}.")
        self.ring.cut(length)


class _GPTForward(_Forward):
    def __call__(self, tokens: Tensor) -> Tensor:
        self.cut(tokens)
        logits: Tensor = type(self.model).forward(self.model, self.ring.own(tokens))
        return logits


class _BertForward(_Forward):
    def __call__(
        self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        self.cut(tokens)
        types, at = (None if t is None else self.ring.own(t) for t in (types, at))
        made: Tensor = type(self.model).forward(self.model, self.ring.own(tokens), mask, types, at)
        return made


class _StageForward:
    """A chunk on slices. The length of the whole sequence goes from chunk to chunk beside what the model hands on."""

    def __init__(self, chunk: Chunk, ring: Ring) -> None:
        self.run, self.ring = chunk.module.forward, ring
        self.read, self.ends = [name for name in chunk.batch_inputs if name != WHOLE], chunk.outputs == (OUTPUT,)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        length = values[_LENGTH] if _LENGTH in values else values["tokens"].shape[SEQUENCE]
        self.ring.cut(length)
        given = {name: self.ring.own(values[name]) for name in self.read if values[name] is not None}
        made: dict[str, Any] = self.run({**values, **given})
        return made if self.ends else {**made, _LENGTH: length}


class _Mixing:
    def __init__(self, causal: bool, ring: Ring) -> None:
        self.causal, self.ring = causal, ring

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.ring.attention(q, k, v, mask, self.causal)


class _Positions:
    def __init__(self, positions: Positions, ring: Ring) -> None:
        self.positions, self.ring = positions, ring

    def __call__(self, length: int) -> Tensor:
        return self.ring.own(self.positions.weight, dim=0)


class _Gathering:
    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def __call__(self, x: Tensor) -> Tensor:
        return gather_sequence(x, self.ring)


class _Loads:
    """What a mixture's experts get of whole sequences."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def __call__(self, experts: Tensor, count: int) -> Tensor:
        chosen = F.one_hot(experts.flatten(1), count).sum(1)
        return self.ring.collectives.all_reduce(chosen) / (self.ring.slices.full * experts.shape[2])


class _Parts:
    """Tells dropout what part of whole sequences it sees."""

    def __init__(self, dim: int, ring: Ring) -> None:
        self.dim, self.ring = dim, ring

    def __call__(self, x: Tensor) -> Part:
        return _Slice(self.dim, self.ring.slices.full, 0, self.ring)


@dataclass(frozen=True)
class _Slice(Part):
    """Places that need not lie in a row."""

    ring: Ring

    def of(self, whole: Tensor, x: Tensor) -> Tensor:
        return self.ring.own(whole, self.dim)
