"""One batch through a model: the task's own reading of what comes out, for all samples at once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.models.tasks.cross_entropy import PartOfLogits

Forward = Callable[[Mapping[str, Tensor]], dict[str, NDArray[Any]]]
Reader = Callable[[Any, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


def open_forward(model: nn.Module, facts: Mapping[str, Any]) -> Forward:
    """The forward pass of a task (``facts["task"]``), from a batch's tensors to arrays whose dim 0 is the sample."""

    @torch.inference_mode()
    def forward(batch: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        args, named = arguments_of(given(batch, facts))
        return {name: as_array(t) for name, t in read(model(*args, **named), batch, facts).items()}

    return forward


def given(batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The batch in the numbers that the model computes with."""
    dtype = torch.float32 if facts["dtype"] == "int8" else getattr(torch, facts["dtype"])
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


def arguments_of(batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the model is called with: positional and named."""
    if "tokens" in batch:
        return (batch["tokens"],), {name: batch[name] for name in ("mask", "types") if name in batch}
    return ((batch["input"],), {}) if set(batch) == {"input"} else ((), dict(batch))


def read(output: Any, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the task makes of the model's output. Of the batch it reads ``READ`` at most."""
    output = output.whole() if isinstance(output, PartOfLogits) else output
    return _READERS.get(facts["task"], _plain)(output, batch, facts)


READ = ("mask",)


def as_array(tensor: Tensor) -> NDArray[Any]:
    plain = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return plain.cpu().numpy()


def _classes(output: Any, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"scores": output.float().softmax(-1)}


def _vectors(output: Any, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mean of the states of real tokens, or the first token's; of length 1 where the folder says so
    (sentence-transformers: Reimers and Gurevych, 2019)."""
    if facts["pooling"] == "first":
        vectors = output[:, 0].float()
    else:
        mask = batch.get("mask")
        weight = output.new_ones(output.shape[:2]).float() if mask is None else mask.float()
        vectors = (output.float() * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    return {"vectors": F.normalize(vectors, dim=-1) if facts["normalise"] else vectors}


def _spans(output: Any, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"spans": output.float()}


def _plain(output: Any, batch: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    named = output if isinstance(output, Mapping) else {f"output_{i}": value for i, value in enumerate(output)}
    return {str(name): value for name, value in named.items() if isinstance(value, Tensor)}


_READERS: dict[str, Reader] = {
    "image-classification": _classes,
    "sequence-classification": _classes,
    "classification": _classes,
    "embeddings": _vectors,
    "question-answering": _spans,
}
