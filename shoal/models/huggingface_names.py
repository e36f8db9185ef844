"""What the tensors of BERT and GPT-2 are called in Hugging Face files, and how they are laid out there."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import UserError
from shoal.models.initial_values import Kept, Run
from shoal.models.weights_file import StoredTensors

State = dict[str, Tensor]


@dataclass(frozen=True)
class Link:
    ours: str
    theirs: tuple[str, ...]  # joined along dim 0 they are ours; without the prefix of the model's body
    transposed: bool = False  # GPT-2 stores its matrices as [in, out]


def _both(ours: str, *theirs: str, transposed: bool = False) -> Iterator[Link]:
    yield Link(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)
    yield Link(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))


def bert_links(layers: int) -> list[Link]:
    """The encoder and all heads."""
    links = [
        Link("tokens.weight", ("embeddings.word_embeddings.weight",)),
        Link("positions.weight", ("embeddings.position_embeddings.weight",)),
        Link("types.weight", ("embeddings.token_type_embeddings.weight",)),
        *_both("norm", "embeddings.LayerNorm"),
    ]
    for i in range(layers):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        links += _both(f"{block}.qkv", *(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")))
        links += _both(f"{block}.out", f"{layer}.attention.output.dense")
        links += _both(f"{block}.norm1", f"{layer}.attention.output.LayerNorm")
        links += _both(f"{block}.up", f"{layer}.intermediate.dense")
        links += _both(f"{block}.down", f"{layer}.output.dense")
        links += _both(f"{block}.norm2", f"{layer}.output.LayerNorm")
    links += _both("pooler", "pooler.dense")
    links += _both("transform", "cls.predictions.transform.dense")
    links += _both("transform_norm", "cls.predictions.transform.LayerNorm")
    links.append(Link("vocab_bias", ("cls.predictions.bias",)))
    links += _both("classifier", "classifier")
    links += _both("span", "qa_outputs")
    return links


def gpt_links(layers: int) -> list[Link]:
    links = [Link("tokens.weight", ("wte.weight",)), Link("positions.weight", ("wpe.weight",))]
    for i in range(layers):
        block, layer = f"blocks.{i}", f"h.{i}"
        links += _both(f"{block}.norm1", f"{layer}.ln_1")
        links += _both(f"{block}.attention.qkv", f"{layer}.attn.c_attn", transposed=True)
        links += _both(f"{block}.attention.out", f"{layer}.attn.c_proj", transposed=True)
        links += _both(f"{block}.norm2", f"{layer}.ln_2")
        links += _both(f"{block}.up", f"{layer}.mlp.c_fc", transposed=True)
        links += _both(f"{block}.down", f"{layer}.mlp.c_proj", transposed=True)
    links += _both("norm", "ln_f")
    links.append(Link("head.weight", ("lm_head.weight",)))
    return links


def links_of(kind: str, layers: int) -> list[Link]:
    """``kind``: "bert" or "gpt"."""
    return bert_links(layers) if kind == "bert" else gpt_links(layers)


_HEAD = re.compile(r"(cls|classifier|qa_outputs|lm_head)\.")  # these stand beside the body, not inside it
_REDUNDANT = re.compile(  # position numbers, causal masks, copies of the tied embedding, BERT's next-sentence head
    r"embeddings\.position_ids|h\.\d+\.attn\.(masked_)?bias|cls\.predictions\.decoder\.(weight|bias)|cls\.seq_relationship\..*"
)


class Renamed:
    """The tensors of files under our names, in float32; files with and without the body's prefix, and old ones, fit.

    Raises UserError when they hold a tensor that the model has no place for, or only a part of one."""

    def __init__(self, stored: StoredTensors, links: list[Link]) -> None:
        self._stored = stored
        there = {_plain(name): name for name in stored}
        self._links: dict[str, tuple[Link, list[str]]] = {}
        for link in links:
            parts = [there.pop(name) for name in link.theirs if name in there]
            if len(parts) not in (0, len(link.theirs)):
                raise UserError(f"the weights hold only some of {', '.join(link.theirs)}.")
            if parts:
                self._links[link.ours] = (link, parts)
        unplaced = sorted(name for name in there if not _REDUNDANT.fullmatch(name))
        if unplaced:
            raise UserError(
                f"the weights hold {unplaced[0]!r}, which this model and its number of layers have no place for."
            )

    @property
    def names(self) -> Collection[str]:
        return self._links.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        link, parts = self._links[name]
        first, *rest = self._stored.shape(parts[0])
        joined = (first + sum(self._stored.shape(part)[0] for part in parts[1:]), *rest)
        return joined[::-1] if link.transposed else joined

    def part(self, name: str, kept: Kept) -> Tensor:
        """The places that are kept of one tensor; nothing else is read."""
        link, parts = self._links[name]
        dims = len(self.shape(name))
        there = {(dims - 1 - dim if link.transposed else dim): runs for dim, runs in kept.items()}
        first = {dim: runs for dim, runs in there.items() if dim}
        found, start = [], 0
        for part in parts:
            stop = start + self._stored.shape(part)[0]
            cut = {0: _within(there[0], start, stop)} if 0 in there else {}
            found.append(self._stored.part(part, {**first, **cut}).float())
            start = stop
        joined = torch.cat(found)
        return joined.t().contiguous() if link.transposed else joined

    def state(self) -> State:
        """All of them, whole."""
        return {name: self.part(name, {}) for name in self.names}


def _within(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """Of the places start to stop, counted from start; one empty run where there are none."""
    found = [(max(a, start) - start, min(b, stop) - start) for a, b in runs if max(a, start) < min(b, stop)]
    return found or [(0, 0)]


def to_theirs(ours: Mapping[str, Tensor], links: list[Link], prefix: str) -> State:
    """Copies of our tensors under their names, ``prefix`` before those of the body.

    A bias that a model goes without is written as zeros."""
    theirs: State = {}
    for link in links:
        weight = link.ours.removesuffix("bias") + "weight"
        if link.ours in ours:
            tensor = ours[link.ours].detach().cpu()
        elif link.ours.endswith(".bias") and weight in ours:
            tensor = torch.zeros(ours[weight].shape[0])
        else:
            continue
        laid = tensor.t() if link.transposed else tensor
        for name, part in zip(link.theirs, laid.chunk(len(link.theirs)), strict=True):
            full = name if _HEAD.match(name) else f"{prefix}{name}"
            theirs[full] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def _plain(name: str) -> str:
    """Without the prefix of the body, and with the present name of what old files call gamma and beta."""
    plain = name.removeprefix("bert.").removeprefix("transformer.")
    return plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
