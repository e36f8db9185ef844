"""What a layout sends: one row for each layer, direction and operation, from shapes alone.

Bytes are those that one worker sends for a micro-batch, on average over the n workers of the axis: an all-reduce of S
bytes sends 2(n-1)/n S, an all-gather or reduce-scatter of S bytes in all (n-1)/n S."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from shoal.models.ends import GlobalAverage, Joint, Logits, Positions, Segments
from shoal.parallel.layout.passage import Operation
from shoal.parallel.layout.shapes import Shapes, module_shapes
from shoal.parallel.layout.treatment import Banded, Enclosed, Joined, Layout, Mixed, Normed, Placed, Treatment, Weighted

LOSS = "loss"  # the layer that the cross-entropy counts as
_NUMBERS = 3  # that a cross-entropy in parts gathers for each target


@dataclass(frozen=True)
class Sending:
    layer: str
    direction: str  # forward or backward
    operation: str
    formula: str  # with n for the workers of the axis
    bytes: float


def explain(
    model: nn.Module,
    layout: Layout,
    inputs: Sequence[Tensor] | Mapping[str, Any],
    *,
    itemsize: int = 4,
    targets: float = 1.0,
) -> list[Sending]:
    """``inputs``: those of one micro-batch, in order or by name, on any device; ``itemsize``: bytes of an activation's
    number; ``targets``: share of the places that a loss looks at (masked language models look at few)."""
    if layout.ways == 1:
        return []
    shapes = module_shapes(model, inputs)
    teller = _Teller(layout.ways, itemsize)
    rows: list[Sending] = []
    modules = dict(model.named_modules())
    for name, treatment in layout.modules.items():
        if isinstance(treatment, Mixed):
            rows += teller.mixed(f"{name}.down", modules[name], treatment, shapes[name.rpartition(".")[0]][1])
        elif name in shapes:
            rows += teller.rows(name, modules[name], treatment, shapes, targets)
    return [row for row in rows if row.bytes]


class _Teller:
    def __init__(self, ways: int, itemsize: int) -> None:
        self.ways, self.itemsize = ways, itemsize
        self.wide = max(4, itemsize)  # statistics and losses are in float32 at least

    def rows(
        self, name: str, module: nn.Module, treatment: Treatment, shapes: Shapes, targets: float
    ) -> Iterator[Sending]:
        given, made = shapes[name]
        if isinstance(treatment, Weighted):
            yield from self._weighted(name, module, treatment, given, made, targets)
        elif isinstance(treatment, Normed):
            yield from self._normed(name, module, treatment, made)
        elif isinstance(treatment, Placed):
            assert isinstance(module, Positions | Segments)
            yield self._send(name, "backward", "all-reduce", list(module.weight.shape))
        elif isinstance(treatment, Joined):
            yield self._send(name, "forward", "all-gather", list(made))
        elif isinstance(treatment, Enclosed):
            yield self._send(name, "forward", "all-gather", given)
            yield self._send(name, "backward", "all-gather", made)
        elif isinstance(treatment, Banded):
            yield from self._banded(name, module, treatment, given, made)

    def _send(
        self, layer: str, direction: str, operation: Operation, shape: Sequence[int], share: float = 1.0, size: int = 0
    ) -> Sending:
        size = size or self.itemsize
        factor = "2(n-1)/n" if operation == "all-reduce" else "(n-1)/n"
        times = (2 if operation == "all-reduce" else 1) * (self.ways - 1) / self.ways
        part = "" if share == 1.0 else f"{share:g} x "
        formula = f"{factor} x {part}{' x '.join(map(str, shape))} x {size} B"
        sent = 0.0 if operation in ("", "take") else times * share * prod(shape) * size
        return Sending(layer, direction, operation, formula, sent)

    def _weighted(
        self, name: str, module: nn.Module, treatment: Weighted, given: Sequence[int], made: Sequence[int], share: float
    ) -> Iterator[Sending]:
        flow = treatment.flow
        logits = isinstance(module, Logits)
        share = share if logits else 1.0
        if not isinstance(module, nn.Embedding):
            yield self._send(name, "forward", flow.arrival.forward, given, share)
            if treatment.learns:
                yield self._send(name, "backward", flow.arrival.backward, given, share)
        yield self._send(name, "forward", flow.departure.forward, made, share)
        yield self._send(name, "backward", flow.departure.backward, made, share)
        bias = getattr(module, "bias", None)
        if flow.partial:
            yield self._send(name, "backward", "all-reduce", [sum(p.numel() for p in module.parameters(recurse=False))])
        elif flow.cut == "in" and bias is not None and flow.leaves == "positions":
            yield self._send(name, "backward", "all-reduce", list(bias.shape))
        if logits and flow.leaves == "features":
            places = [self.ways, *made[:-1], _NUMBERS]
            yield self._send(LOSS, "forward", "all-gather", places, share, self.wide)

    def _normed(self, name: str, module: nn.Module, treatment: Normed, made: Sequence[int]) -> Iterator[Sending]:
        if treatment.lies == "positions":
            weights = sum(p.numel() for p in module.parameters(recurse=False))
            yield self._send(name, "backward", "all-reduce", [weights])
        else:
            yield self._send(name, "forward", "all-gather", [self.ways, *made[:-1], 2], size=self.wide)
            yield self._send(name, "backward", "all-reduce", [*made[:-1], 2], size=self.wide)

    def mixed(self, name: str, module: nn.Module, treatment: Mixed, made: Sequence[int]) -> Iterator[Sending]:
        rows = [prod(made[:-1]), treatment.top_k, made[-1]]  # every token goes to so many experts
        yield self._send(name, "forward", "all-reduce", rows)
        yield self._send(name, "backward", "all-reduce", rows)
        biases = [p for key, p in module.named_parameters() if key == "down.bias"]
        for bias in biases:
            yield self._send(name, "backward", "all-reduce", list(bias.shape))

    def _banded(
        self, name: str, module: nn.Module, treatment: Banded, given: Sequence[int], made: Sequence[int]
    ) -> Iterator[Sending]:
        if isinstance(module, Joint):
            yield self._send(name, "forward", "all-gather", made)
        elif isinstance(module, GlobalAverage):
            yield self._send(name, "forward", "all-reduce", made)
        elif isinstance(module, nn.BatchNorm2d):
            yield self._send(name, "forward", "all-gather", [self.ways, given[1], 2], size=self.wide)
            yield self._send(name, "backward", "all-reduce", [given[1], 2], size=self.wide)
        elif treatment.window is not None and treatment.inputs is not None:
            samples, channels, _, width = given
            rows = treatment.window.sent
            sent = rows * samples * channels * width * self.itemsize / self.ways
            formula = f"{rows} halo rows x {samples} x {channels} x {width} x {self.itemsize} B / n"
            for direction in ("forward", "backward"):
                yield Sending(name, direction, "all-to-all", formula, sent)
        weights = sum(p.numel() for p in module.parameters(recurse=False))
        yield self._send(name, "backward", "all-reduce", [weights])
