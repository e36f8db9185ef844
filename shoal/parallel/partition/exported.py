"""Models whose own code cannot be recorded, through ``torch.export``."""

import inspect
import logging
import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from shoal.parallel.partition.recorded import Untraceable


def exported(model: nn.Module, bound: inspect.BoundArguments) -> nn.Module:
    """The model in its present mode as one forward pass of ATen operations, with the same parameters and buffers.

    Every size of the example may be another at the next batch, unless the code rests on it, which is then checked.
    Raises Untraceable where the export does not succeed."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in variadic for parameter in bound.signature.parameters.values()):
        raise Untraceable("torch.export would rename its variable arguments")
    sizes = tree_map(_open_sizes, dict(bound.arguments))
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        logging.disable(logging.CRITICAL)  # it logs what it raises
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, bound.args, bound.kwargs, dynamic_shapes=sizes, strict=False)
            made = program.module()
    except Exception as error:  # it fails in as many ways as there are models
        raise Untraceable(f"nor does torch.export follow it, {type(error).__name__}") from error
    finally:
        logging.disable(logging.NOTSET)
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
        if made.get_parameter(name) is not parameter:
            raise Untraceable("torch.export copied its parameters")
    return made


def _open_sizes(a: object) -> dict[int, object] | None:
    return dict.fromkeys(range(a.dim()), Dim.AUTO) if isinstance(a, Tensor) else None
