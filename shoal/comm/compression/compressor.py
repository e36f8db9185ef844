"""What a user holds: how to compress, and what earlier steps have left unsent."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.comm.compression.cast import Bfloat16, Float16
from shoal.comm.compression.codec import Codec
from shoal.comm.compression.int8 import Int8Blocks
from shoal.comm.compression.links import Links, TorchLinks
from shoal.comm.compression.low_rank import LowRank, LowRankReduction, squarest
from shoal.comm.compression.onebit import SignBits
from shoal.comm.compression.reduction import (
    CodedReduction,
    Division,
    Keeper,
    Line,
    ScatterReduction,
    coded_bytes,
    load,
    segments,
)
from shoal.comm.compression.topk import TopShare
from shoal.comm.compression.worth import Verdict, agreed
from shoal.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

    from shoal.comm.compression.buckets import Buckets

Shapes = Sequence[Sequence[int]]


class Compressor:
    """A way to compress, and its memory. One for each model.

    ``error_feedback``: what a step leaves unsent is added to the next step's gradient.
    ``min_bytes``: smaller buckets go uncompressed. ``force``: compress although measurements say that it does not pay.
    """

    def __init__(
        self,
        method: Codec | LowRank,
        *,
        error_feedback: bool = True,
        min_bytes: int = 1 << 16,
        force: bool = False,
    ) -> None:
        if min_bytes < 0:
            raise UserError(f"{method.name}: min_bytes must be at least 0, got {min_bytes}.")
        self.method, self.error_feedback = method, error_feedback
        self.min_bytes, self.force = min_bytes, force
        self._named: dict[str, Division] = {}
        self._scatters: dict[str, ScatterReduction] = {}
        self._verdicts: dict[TorchLinks, Verdict] = {}
        self._links: dict[Any, TorchLinks] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._buckets: Buckets | None = None

    @property
    def name(self) -> str:
        return self.method.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method}, error_feedback={self.error_feedback})"

    def division(self, shapes: Shapes, links: Links, device: torch.device) -> Division:
        """For tensors of these shapes, one after the other in a float32 vector. Called by all ranks in one order."""
        method, feedback, elements = self.method, self.error_feedback, sum(math.prod(shape) for shape in shapes)
        if isinstance(method, LowRank):
            whole = LowRankReduction(method, shapes, links, device, feedback=feedback)
            return Division([(range(elements), whole)])
        cuts = segments(elements)
        return Division([(cut, CodedReduction(method, len(cut), links, device, feedback=feedback)) for cut in cuts])

    def bytes_sent(self, elements: int, world: int, shapes: Shapes | None = None) -> int:
        """What one rank sends in one all-reduce of so many float32, to all others together."""
        if isinstance(self.method, LowRank):
            return self.method.bytes_sent(shapes or squarest(elements), world)
        return coded_bytes(self.method, elements, world)

    # --- one tensor -----------------------------------------------------------------------------------------------

    def named(self, name: str, shapes: Shapes, links: Links, device: torch.device) -> Division:
        """The division that keeps its errors under a name."""
        elements = sum(math.prod(shape) for shape in shapes)
        key = f"{name}:{elements}"
        if key not in self._named:
            self._named[key] = self.division(shapes, links, device)
            if key in self._loaded:
                load(self._named[key], self._loaded.pop(key), repr(name))
        return self._named[key]

    def scatter(self, name: str, elements: int, links: Links, device: torch.device) -> ScatterReduction:
        """The reduce-scatter that keeps its errors under a name."""
        key = f"{name}:{elements}"
        if key not in self._scatters:
            assert isinstance(self.method, Codec)  # `compress` has refused the others
            made = ScatterReduction(self.method, elements, links, device, feedback=self.error_feedback)
            self._scatters[key] = made
            if key in self._loaded:
                load(made, self._loaded.pop(key), repr(name))
        return self._scatters[key]

    def verdict_for(self, links: TorchLinks, device: torch.device) -> Verdict:
        """Whether to compress over these links; measured once, by all ranks, and a warning when it does not pay."""
        if links not in self._verdicts:
            self._verdicts[links] = verdict = agreed(self, links, device)
            links.sent_bytes = 0  # measuring does not count
            if not verdict and links.rank == 0:
                warnings.warn(f"gradients go uncompressed: {verdict.why}; force=True compresses", stacklevel=2)
        return self._verdicts[links]

    def links(self, group: "dist.ProcessGroup | None", device: torch.device) -> TorchLinks:
        key = (group, device)
        if key not in self._links:
            self._links[key] = TorchLinks(group, device, stages=2)
        return self._links[key]

    @property
    def sent_bytes(self) -> int:
        """By this rank so far, to all others together, in `compressed_all_reduce`."""
        return sum(links.sent_bytes for links in self._links.values())

    @property
    def buckets(self) -> "Buckets":
        """What the hook of a DistributedDataParallel keeps."""
        if self._buckets is None:
            from shoal.comm.compression.buckets import Buckets

            self._buckets = Buckets(self)
        return self._buckets

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's errors: every rank saves and loads its own."""
        kept = {key: {k: v.clone() for k, v in r.state().items()} for key, r in self._keepers().items()}
        return {"method": self.name, "tensors": self._loaded | kept, "parameters": self.buckets.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises UserError for another method's, or for other sizes."""
        if state["method"] != self.name:
            raise UserError(f"the saved errors are those of {state['method']!r}, this compressor is {self.name!r}.")
        self._loaded = {key: dict(tensors) for key, tensors in state["tensors"].items()}
        for key, keeper in self._keepers().items():
            if key in self._loaded:
                load(keeper, self._loaded.pop(key), repr(key))
        self.buckets.load(state["parameters"])

    def _keepers(self) -> dict[str, Keeper]:
        return {**self._named, **self._scatters}


class FP16(Compressor):
    """Half as many bytes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Float16(), **options)


class BF16(Compressor):
    """Half as many bytes, with float32's range."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Bfloat16(), **options)


class Int8(Compressor):
    """A quarter: blocks of 2048 with a scale each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Int8Blocks(), **options)


class TopK(Compressor):
    """The largest ``share`` of the numbers, and where they stand: 8 bytes each."""

    def __init__(self, share: float = 0.01, **options: Any) -> None:
        super().__init__(TopShare(share), **options)


class OneBit(Compressor):
    """A thirty-first: signs, and a mean magnitude for each 2048."""

    def __init__(self, **options: Any) -> None:
        super().__init__(SignBits(), **options)


class PowerSGD(Compressor):
    """Matrices as a product of two of ``rank`` columns."""

    def __init__(self, rank: int = 4, seed: int = 0, **options: Any) -> None:
        super().__init__(LowRank(rank, seed), **options)


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "fp16": FP16, "bf16": BF16, "int8": Int8, "topk": TopK, "1bit": OneBit, "powersgd": PowerSGD,
}  # fmt: skip


def compressed_all_reduce(
    tensor: Tensor,
    compressor: Compressor,
    group: "dist.ProcessGroup | None" = None,
    *,
    average: bool = False,
    name: str = "",
) -> Tensor:
    """Sum a tensor over a group of torch.distributed, in place and compressed; the same bits on every rank.

    Each rank sends ``compressor.bytes_sent(elements, ranks)`` bytes. Sums are float32, in rank order, whatever the
    tensor's type. With error feedback, what this call leaves unsent is added to the next one of the same ``name`` and
    size: give every tensor that is reduced again and again a name of its own."""
    if not tensor.dtype.is_floating_point:
        raise UserError(f"compressed_all_reduce sums real floating-point numbers, got {tensor.dtype}.")
    shapes: Shapes = [tensor.shape] if tensor.dim() > 1 else squarest(tensor.numel())
    links = compressor.links(group, tensor.device)
    division = compressor.named(name, shapes, links, tensor.device)
    flat = tensor.detach().reshape(-1).float()  # the tensor's own memory, where it is contiguous float32
    line = Line(links)
    division.start(line, flat, lambda: float(links.world) if average else 1.0)
    line.finish()
    with torch.no_grad():
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
    return tensor
