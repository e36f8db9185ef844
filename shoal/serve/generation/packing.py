"""The weights of a GPT in the order in which the C++ step reads them."""

import mmap
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.gpt import GPT

PANEL = 48  # outputs that go through the processor's registers together; kPanel of native/generation/step.hpp


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] -> [ceil(out / PANEL), in, PANEL], the last panel filled up with zeros."""
    padded = F.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % PANEL))
    return padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).to(dtype).contiguous()


def packed(model: GPT, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """In the order of step.hpp: the ends, then twelve of each layer. None: a bias that the model lacks, or the token
    vectors of a tied model, which are read from the panels of its head. ``dtype`` is that of the panels."""

    def plain(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().float().contiguous()

    def linear(layer: nn.Module) -> list[Tensor | None]:
        assert isinstance(layer, nn.Linear)
        return [panels(layer.weight, dtype), plain(layer.bias)]

    def norm(layer: nn.Module) -> list[Tensor | None]:
        assert isinstance(layer, nn.LayerNorm)
        return [plain(layer.weight), plain(layer.bias)]

    head = model.tokens.weight if model.head is None else model.head.weight
    tokens = None if model.head is None else plain(model.tokens.weight)
    found = [tokens, plain(model.positions.weight), panels(head, dtype), *norm(model.norm)]
    for block in model.blocks:
        attention = block.get_submodule("attention")
        found += norm(block.get_submodule("norm1"))
        found += linear(attention.get_submodule("qkv")) + linear(attention.get_submodule("out"))
        found += norm(block.get_submodule("norm2"))
        found += linear(block.get_submodule("up")) + linear(block.get_submodule("down"))
    return found


_made: "WeakKeyDictionary[GPT, dict[torch.dtype, list[Tensor | None]]]" = WeakKeyDictionary()


def packed_once(model: GPT, dtype: torch.dtype) -> list[Tensor | None]:
    """`packed`, in one stretch of memory, and not again for the same model: processes forked later share it."""
    made = _made.setdefault(model, {})
    if dtype not in made:
        made[dtype] = gathered(packed(model, dtype))
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
