"""What every call checks of its tensors, and how they come to lie in a row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Unusable(ValueError):
    """This rank's arguments cannot be used; the others hear of it."""


def tensors_of(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def only(tensors: Sequence[Tensor], what: str) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(f"{what} takes one tensor a rank, got {len(tensors)}")
    return tensors[0]


def check(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise Unusable(f"a tensor is on {tensor.device}; this group takes tensors on cpu")
        if tensor.layout != torch.strided:
            raise Unusable("a tensor is sparse; this collective takes dense ones")
        if tensor.dtype != tensors[0].dtype:
            raise Unusable(
                f"one tensor is {tensors[0].dtype} and another one {tensor.dtype}: a collective converts nothing"
            )


def same_count(got: int, needed: int, what: str) -> None:
    if got != needed:
        raise Unusable(f"{what} has {got} elements where {needed} are needed")


def row_of(tensor: Tensor) -> Tensor:
    """Its values in a row: the tensor itself where they lie so."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def room_for(tensor: Tensor) -> Tensor:
    """Where its values can be written in a row; `bring_back` brings them."""
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return tensor if plain else torch.empty(tensor.shape, dtype=tensor.dtype)


def bring_back(row: Tensor, tensor: Tensor) -> None:
    if row.data_ptr() != tensor.data_ptr() or row.stride() != tensor.stride():
        with torch.no_grad():
            tensor.detach().copy_(row.view(tensor.shape))


def cut(tensor: Tensor, sizes: Sequence[int] | None, world: int, what: str) -> list[Tensor]:
    """Along its first dim into ``sizes``; None or []: into equal parts."""
    length = tensor.shape[0] if tensor.dim() else 1
    if not sizes and length % world:
        raise Unusable(f"all_to_all's {what} of {length} rows cannot be cut for {world} ranks")
    parts = list(sizes or [length // world] * world)
    if sum(parts) != length or len(parts) != world:
        raise Unusable(f"all_to_all's {what} has {length} rows where sizes {parts} are given")
    return list(torch.split(tensor.reshape(length, -1) if tensor.dim() == 0 else tensor, parts))
