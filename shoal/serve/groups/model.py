"""A loaded model made ready for groups: cut along its forward pass, each place's own weights in memory of their own.

This happens once, in the parent of the model processes. A process that is forked later maps the weights of its place
alone; those of the others are not in its address space."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.tensors import Collectives
from shoal.errors import UserError
from shoal.parallel.layout.decide import layout_for
from shoal.parallel.layout.treatment import Layout
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.chunks import Chunk, Chunks
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import piece_names, pieces
from shoal.parallel.tensor.apply import split_model
from shoal.recipe.plan import Plan
from shoal.serve.forward import arguments_of, given
from shoal.serve.weights import Sealed

Names = frozenset[str]  # of the arrays of a batch
ROWS, TOKENS = 8, 32  # of the example on which pieces are timed


@dataclass(frozen=True)
class _Part:
    """What one place of the mesh holds: tensors of the model, by what the whole calls them, and their values there."""

    tensors: tuple[Tensor, ...]
    sealed: Sealed


class SplitModel:
    """``module``'s tensors have their shapes, and no memory: it is the model's signature and structure."""

    def __init__(self, module: nn.Module, plan: Plan, facts: Mapping[str, Any], clock: bool = True) -> None:
        """Takes the weights out of ``module``. It is cut where the clock says, or, the same in every process that does
        so, where the number of operations does. Raises UserError for what cannot be split as the plan says."""
        self.module, self.plan = module, plan
        axes = plan.axes
        if axes.size("expert") > 1:
            raise UserError(
                f"--mesh expert={axes.size('expert')}: it is for text from a mixture of experts: leave it out."
            )
        self._layout: Layout = layout_for(module, plan)
        self._variants: dict[Names | None, Chunks] = {}
        if axes.size("pipe") > 1:
            self._variants = _cut(module, facts, axes.size("pipe"), clock)
        self._parts = {
            (stage, slice): self._part(stage, slice)
            for stage in range(axes.size("pipe"))
            for slice in range(axes.size("tensor"))
        }
        self.bytes = sum(part.sealed.bytes for part in self._parts.values())
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
            tensor.data = tensor.new_zeros(()).expand(tensor.shape)

    def variant(self, names: Names) -> Names | None:
        """Which of the cuts is for batches of these arrays. Raises ValueError when none is."""
        if not self._variants or names in self._variants:
            return names if names in self._variants else None
        if None in self._variants:
            return None
        raise ValueError(f"the model is cut for batches of other arrays than {', '.join(sorted(names))}")

    def chunk(self, stage: int, variant: Names | None) -> Chunk | None:
        """None where the model is not cut into stages."""
        return self._variants[variant].chunks[stage] if self._variants else None

    def wanted(self, stage: int) -> set[str]:
        """The arguments of the model that a stage reads, whatever the batch."""
        return {name for chunks in self._variants.values() for name in chunks.chunks[stage].batch_inputs}

    def take(self, stage: int, slice: int, along: Collectives | None) -> None:
        """In a forked process: map the weights of this place, and make its modules work on their part."""
        for place, part in self._parts.items():
            if place == (stage, slice):
                for tensor, mapped in zip(part.tensors, part.sealed.mapped(), strict=True):
                    assert mapped is not None
                    tensor.data = mapped
            part.sealed.close()
        if along is not None:
            for module in self._modules(stage):
                split_model(module, self._layout, along)

    def _modules(self, stage: int) -> list[nn.Module]:
        chunks = [variant.chunks[stage].module for variant in self._variants.values()]
        return chunks or [self.module]

    def _part(self, stage: int, slice: int) -> _Part:
        held: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for name, tensor in _named_tensors(self._modules(stage)):
            if not tensor.numel():
                continue
            split = self._layout.splits.get(name)
            if split is not None and tensor.shape[split.dim] == split.full:
                values[id(tensor)] = split.take(tensor, slice)
            else:
                values.setdefault(id(tensor), tensor)
            held[id(tensor)] = tensor
        return _Part(tuple(held.values()), Sealed([values[key].detach() for key in held]))


def _named_tensors(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        yield from module.named_parameters(remove_duplicate=False)
        yield from module.named_buffers(remove_duplicate=False)


def _cut(module: nn.Module, facts: Mapping[str, Any], stages: int, clock: bool) -> dict[Names | None, Chunks]:
    """By the arrays that a batch can have: a forward pass takes other ways with a mask than without, and all ways are
    cut at the same places."""
    examples = _examples(module, facts)
    if not examples:  # nobody knows what it takes: it is followed without an example, and cut by its operations
        return {None: cut(module, stages)}
    made: dict[Names | None, Chunks] = {}
    places: list[str] = []
    for names, example in examples.items():
        args, named = arguments_of(given(example, facts))
        arguments = inspect.signature(module.forward).bind(*args, **named).arguments
        called = list(piece_names(module, arguments))
        if len(called) < stages:
            raise UserError(f"--mesh pipe={stages}: a {type(module).__name__} has {len(called)} pieces, too few.")
        if not places:
            places = [called[number] for number in balance(pieces(module, arguments, clock=clock, runs=3), stages)]
        made[names] = cut(module, stages, example=arguments, at=[called.index(name) for name in places])
    return made


def _examples(module: nn.Module, facts: Mapping[str, Any]) -> dict[Names, dict[str, Tensor]]:
    """Batches of each kind that the task brings, by the names of their arrays; {} where that is not known."""
    if "context" in facts and "tokenizer" in facts:
        shape = ROWS, min(TOKENS, facts["context"])
        whole = {
            "tokens": torch.zeros(shape, dtype=torch.int32),
            "mask": torch.ones(shape, dtype=torch.bool),
            "types": torch.zeros(shape, dtype=torch.int32),
        }
        taken = [name for name in ("mask", "types") if name in inspect.signature(module.forward).parameters]
        kinds = [("tokens", *more) for count in range(len(taken) + 1) for more in combinations(taken, count)]
        return {frozenset(kind): {name: whole[name] for name in kind} for kind in kinds}
    if "shape" in facts:
        return {frozenset(["input"]): {"input": torch.zeros(ROWS, *facts["shape"])}}
    return {}
