"""A layout applied to a model: parameters are cut where they are, modules replaced by ones that work on a part."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.comm.tensors import Collectives
from shoal.models.dropout import Dropout
from shoal.models.ends import Joint, Logits, Positions, Segments
from shoal.models.moe import Experts
from shoal.models.resnet import PaddedShortcut
from shoal.parallel.layout.split import Split
from shoal.parallel.layout.treatment import Banded, Drawn, Enclosed, Layout, Mixed, Treatment, Weighted
from shoal.parallel.tensor.banded import banded
from shoal.parallel.tensor.crossing import Slices
from shoal.parallel.tensor.mixture import enclose, split_mixture
from shoal.parallel.tensor.pointwise import (
    SlicedJoint,
    SlicedNorm,
    SlicedPositions,
    SlicedSegments,
    SplitNorm,
    part_of,
)
from shoal.parallel.tensor.weighted import Doors, SplitConv2d, SplitEmbedding, SplitLinear, SplitLogits, SplitShortcut


def split_model(model: nn.Module, layout: Layout, collectives: Collectives) -> None:
    """Leave of ``model`` what this worker of the tensor axis holds, in place; names stay as they are.

    ``model`` may be a part of the model that the layout is for, with the same names: a stage of a pipeline. Called
    before anything holds on to the parameters' shapes: hooks, an optimiser's state."""
    cut_tensors(model, layout.splits, collectives.rank)
    slices = Slices(collectives)
    modules = dict(model.named_modules())
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
    for name, treatment in layout.modules.items():
        module = modules.get(name)
        if module is None or type(module) is nn.Module:  # of another stage, or what holds a tied weight in this one
            continue
        if isinstance(treatment, Drawn):
            assert isinstance(module, Dropout)
            module.part = part_of(treatment, collectives, slices)
            continue
        if isinstance(treatment, Mixed):
            assert isinstance(module, Experts)
            split_mixture(module, collectives)
            continue
        if isinstance(treatment, Enclosed):
            enclose(module, collectives, slices)
            continue
        made = _replacement(module, treatment, collectives, slices)
        for place in places[module]:
            parent, _, key = place.rpartition(".")
            setattr(model.get_submodule(parent), key, made)
    _learn_first(model, slices)


@torch.no_grad()
def cut_tensors(model: nn.Module, splits: Mapping[str, Split], rank: int) -> None:
    """Parameters stay the objects that they are; tied ones, and those of two stages, are cut once."""
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        split = splits.get(name)
        if split is not None and tensor.shape[split.dim] == split.full:
            part = _part(tensor, split, rank)
            # Autograd may have met the whole tensor and remember its shape; it forgets at a change of type.
            tensor.data = part.new_empty(0, dtype=torch.float16 if part.dtype == torch.float32 else torch.float32)
            tensor.data = part


def _part(tensor: Tensor, split: Split, rank: int) -> Tensor:
    if tensor.is_meta:  # a shape; `torch.cat` would import torch's compiler to find it
        shape = [split.sizes[rank] if dim == split.dim else size for dim, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    return split.take(tensor, rank).clone(memory_format=torch.contiguous_format)


def _learn_first(model: nn.Module, slices: Slices) -> None:
    """In a stage without the embedding, the first module that works on slices finds out how long the whole is."""
    for module in model.modules():
        arrives = module.doors.flow.arrives if isinstance(module, SplitLinear) else ""
        if arrives == "positions" or isinstance(module, SlicedNorm):
            module.register_forward_pre_hook(lambda _, given: slices.learn(given[0]))
            return


def _replacement(module: nn.Module, treatment: Treatment, collectives: Collectives, slices: Slices) -> nn.Module:
    if isinstance(treatment, Banded):
        return banded(module, treatment, collectives)
    if isinstance(treatment, Weighted):
        images = isinstance(module, nn.Conv2d | PaddedShortcut)
        doors = Doors(treatment, collectives, slices, 1 if images else -1)
        if isinstance(module, PaddedShortcut):
            return SplitShortcut(module, doors)
        if isinstance(module, nn.Linear):
            return SplitLinear(module, doors)
        if isinstance(module, nn.Conv2d):
            return SplitConv2d(module, doors)
        if isinstance(module, nn.Embedding):
            return SplitEmbedding(module, doors)
        assert isinstance(module, Logits)
        return SplitLogits(module, doors)
    if isinstance(module, nn.LayerNorm):
        split: Split | None = getattr(treatment, "split", None)
        return SlicedNorm(module, collectives) if split is None else SplitNorm(module, split, collectives)
    if isinstance(module, Positions):
        return SlicedPositions(module, collectives, slices)
    if isinstance(module, Segments):
        return SlicedSegments(module, collectives, slices)
    assert isinstance(module, Joint)
    return SlicedJoint(module, collectives, slices)
