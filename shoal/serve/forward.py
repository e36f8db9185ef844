"""One batch through a model: the task's own reading of what comes out, for all samples at once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Forward = Callable[[Mapping[str, Tensor]], dict[str, NDArray[Any]]]


def open_forward(model: nn.Module, facts: Mapping[str, Any]) -> Forward:
    """The forward pass of a task (``facts["task"]``), from a batch's tensors to arrays whose dim 0 is the sample."""
    dtype = getattr(torch, facts["dtype"])
    read = _READERS.get(facts["task"], _plain)

    @torch.inference_mode()
    def forward(batch: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
        return {name: _numpy(tensor) for name, tensor in read(model, given, facts).items()}

    return forward


def _numpy(tensor: Tensor) -> NDArray[Any]:
    plain = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return plain.cpu().numpy()


def _call(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    if "tokens" in batch:
        extra = {name: batch[name] for name in ("mask", "types") if name in batch}
        return model(batch["tokens"], **extra)
    return model(batch["input"]) if set(batch) == {"input"} else model(**batch)


def _classes(model: nn.Module, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"scores": _call(model, batch).float().softmax(-1)}


def _vectors(model: nn.Module, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mean of the states of real tokens, or the first token's; of length 1 where the folder says so
    (sentence-transformers: Reimers and Gurevych, 2019)."""
    states = _call(model, batch)
    if facts["pooling"] == "first":
        vectors = states[:, 0].float()
    else:
        mask = batch.get("mask")
        weight = states.new_ones(states.shape[:2]).float() if mask is None else mask.float()
        vectors = (states.float() * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return {"vectors": F.normalize(vectors, dim=-1) if facts["normalise"] else vectors}


def _spans(model: nn.Module, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"spans": _call(model, batch).float()}


def _plain(model: nn.Module, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    output = _call(model, batch)
    if isinstance(output, Tensor):
        return {"output": output}
    named = output if isinstance(output, Mapping) else {f"output_{i}": value for i, value in enumerate(output)}
    return {str(name): value for name, value in named.items() if isinstance(value, Tensor)}


_READERS: dict[str, Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]] = {
    "image-classification": _classes,
    "sequence-classification": _classes,
    "classification": _classes,
    "embeddings": _vectors,
    "question-answering": _spans,
}
