"""The weights of a GPT in the order in which the C++ step reads them."""

import mmap
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.gpt import GPT
from shoal.models.moe import ExpertLinear
from shoal.serve.generation.part import Part, whole
from shoal.serve.generation.step import shape_of

PANEL = 48  # outputs that go through the processor's registers together; kPanel of native/generation/step.hpp


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., out, in] -> [..., ceil(out / PANEL), in, PANEL], the last panel filled up with zeros."""
    *before, out, width = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -out % PANEL))
    return padded.view(*before, -1, PANEL, width).transpose(-1, -2).to(dtype).contiguous()


ENDS, OF_LAYER = 5, 13  # tensors: kEnds and kOfLayer of native/generation/step.hpp


def plain(model: GPT, part: Part | None = None) -> list[Tensor | None]:
    """The weights of a part, in the order of step.hpp: the ends, then OF_LAYER of each layer. None: a bias or a router
    that the model lacks, what another part has, or the token vectors of a tied model, which are those of its head."""
    part = part or whole(shape_of(model))
    size = model.config.width // model.config.heads
    tied = model.head is None
    head = model.tokens.weight if model.head is None else model.head.weight
    found: list[Tensor | None] = [
        _rows(model.tokens.weight, part.vocab) if part.first and not tied else None,
        model.positions.weight if part.first else None,
        _rows(head, part.vocab) if part.last or (part.first and tied) else None,
        *(_pair(model.norm) if part.last else (None, None)),
    ]
    inner = range(part.heads.start * size, part.heads.stop * size)
    for number in part.layers:
        block = model.blocks[number]
        attention = block.get_submodule("attention")
        qkv, qkv_bias = _pair(attention.get_submodule("qkv"))
        out, out_bias = _pair(attention.get_submodule("out"))
        hidden = block.get_submodule("mixture.experts") if part.experts else block
        up, up_bias = _pair(hidden.get_submodule("up"))
        down, down_bias = _pair(hidden.get_submodule("down"))
        if part.experts:
            up, down = (tensor[part.experts.start : part.experts.stop] for tensor in (up, down))
            up_bias, down_bias = _rows(up_bias, part.experts), _rows(down_bias, part.experts)
        found += _pair(block.get_submodule("norm1"))
        found += [_thirds(qkv, inner), _thirds(qkv_bias, inner), _columns(out, inner), out_bias]
        found += _pair(block.get_submodule("norm2"))
        found += [_rows(up, part.ffn, -2), _rows(up_bias, part.ffn, -1), _columns(down, part.ffn), down_bias]
        found.append(_pair(block.get_submodule("mixture.router"))[0] if part.experts else None)
    return [None if tensor is None else tensor.detach() for tensor in found]


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(layer, nn.Linear | nn.LayerNorm | ExpertLinear)
    return layer.weight, layer.bias


def _rows(tensor: Tensor | None, kept: range, dim: int = 0) -> Tensor | None:
    return None if tensor is None else tensor.narrow(dim, kept.start, len(kept))


def _columns(tensor: Tensor, kept: range) -> Tensor:
    return tensor[..., kept.start : kept.stop]


def _thirds(tensor: Tensor | None, kept: range) -> Tensor | None:
    """Queries, keys and values of some heads."""
    if tensor is None or len(kept) * 3 == len(tensor):
        return tensor
    return torch.cat([third[kept.start : kept.stop] for third in tensor.chunk(3)])


def is_matrix(place: int) -> bool:
    """Whether what stands at this place of `plain` is a matrix that may be rounded: a router never is."""
    return place == 2 or (place >= ENDS and (place - ENDS) % OF_LAYER in (2, 4, 8, 10))


def _is_router(place: int) -> bool:
    return place >= ENDS and (place - ENDS) % OF_LAYER == OF_LAYER - 1


def packed(weights: Sequence[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """`plain` as the C++ step reads it. ``dtype`` is that of the panels."""
    return [
        None
        if tensor is None
        else panels(tensor, dtype if is_matrix(place) else torch.float32)
        if is_matrix(place) or _is_router(place)
        else tensor.float().contiguous()
        for place, tensor in enumerate(weights)
    ]


_made: "WeakKeyDictionary[GPT, dict[torch.dtype, list[Tensor | None]]]" = WeakKeyDictionary()


def packed_once(model: GPT, dtype: torch.dtype) -> list[Tensor | None]:
    """`packed`, in one stretch of memory, and not again for the same model: processes forked later share it."""
    made = _made.setdefault(model, {})
    if dtype not in made:
        made[dtype] = gathered(packed(plain(model), dtype))
    return made[dtype]


def gathered(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies in one stretch of memory that asks for huge pages, each from a multiple of 64 bytes on: a step reads all
    weights once, and took up to a fifth longer with tensors that lay apart."""
    sizes = [0 if t is None else -(-t.numel() * t.element_size() // 64) * 64 for t in tensors]
    memory = large_memory(sum(sizes))
    out: list[Tensor | None] = []
    at = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor is None:
            out.append(None)
            continue
        copy = memory[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        out.append(copy.copy_(tensor))
        at += size
    return out


def large_memory(size_bytes: int) -> Tensor:
    """Zeros uint8 [size_bytes], in huge pages where the system gives some; freed with the tensor."""
    mapped = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)
