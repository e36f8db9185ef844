"""Images split into bands of rows: which rows each worker holds before and after each module."""

from collections.abc import Mapping

import torch
from torch import nn

from shoal.errors import UserError
from shoal.models.ends import GlobalAverage, Joint
from shoal.models.resnet import PaddedShortcut
from shoal.parallel.layout.rules import TENSOR
from shoal.parallel.layout.shapes import module_shapes
from shoal.parallel.layout.split import Split, even_split
from shoal.parallel.layout.treatment import Banded
from shoal.parallel.layout.window import Window

ROWS = 2  # the dim of rows in [n, channels, height, width]


def band_treatments(model: nn.Module, ways: int) -> Mapping[str, Banded]:
    """Raises UserError for a model that does not say the shape of its images, and for too few rows."""
    shape = getattr(model, "shape", None)
    if shape is None:
        raise UserError(
            f"plan.rules.rows = 'tensor' needs a model that tells the shape of its images, 'shape' (channels, height, "
            f"width); a {type(model).__name__} does not: leave the rule out."
        )
    found: dict[str, Banded] = {}
    first = True
    sizes = module_shapes(model, [torch.empty(2, *shape, dtype=next(model.parameters()).dtype)])
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.BatchNorm2d | PaddedShortcut | Joint | GlobalAverage):
            continue
        given, made = sizes[name]
        ends = isinstance(module, Joint | GlobalAverage)
        before = _bands(name, given[ROWS], ways)
        after = None if ends else _bands(name, made[ROWS], ways)
        window = None if after is None else _window(name, module, before, after)
        found[name] = Banded(None if first else before, after, window, given[ROWS])
        first = False
    return found


def _window(name: str, module: nn.Module, inputs: Split, outputs: Split) -> Window | None:
    if isinstance(module, PaddedShortcut):
        return Window(1, module.stride, 0, inputs, outputs)
    if not isinstance(module, nn.Conv2d | nn.MaxPool2d):
        return None
    if isinstance(module.padding, str) or getattr(module, "padding_mode", "zeros") != "zeros":
        raise UserError(f"plan.rules.rows: {name} pads with {module.padding!r}: give it a number of rows of zeros.")
    kernel, stride, padding, dilation = (
        value if isinstance(value, int) else value[0]
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return Window(dilation * (kernel - 1) + 1, stride, padding, inputs, outputs)


def _bands(name: str, height: int, ways: int) -> Split:
    if height < ways:
        raise UserError(
            f"plan.rules.rows: {name} has {height} rows, fewer than the {ways} workers of mesh axis 'tensor': "
            f"use tensor = {height} at most, or larger images."
        )
    return even_split(ROWS, TENSOR, height, ways)
