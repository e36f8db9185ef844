"""The buckets of a DistributedDataParallel, and whose error is whose when they change.

After the first step, DDP sorts its parameters into other buckets. Errors therefore belong to parameters: buckets that
go leave theirs behind, new ones pick them up. What a rank owed as the owner of a slice it then owes as a worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from shoal.comm.compression.links import TorchLinks
from shoal.comm.compression.reduction import Division, Line, Steps, slices
from shoal.comm.compression.worth import Verdict
from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.comm.compression.compressor import Compressor


@dataclass(frozen=True)
class _Bucket:
    parameters: tuple[Tensor, ...]  # kept alive, so that their ids stay theirs
    places: tuple[range, ...]  # of each parameter in the bucket's buffer
    elements: int
    division: Division


class Buckets:
    def __init__(self, compressor: "Compressor") -> None:
        self._compressor = compressor
        self.group: dist.ProcessGroup | None = None  # None: the default group
        self.verdict: Verdict | None = None  # whether to compress at all; known after the first bucket
        self._links: TorchLinks | None = None
        self._line: Line | None = None
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        self._names: dict[int, str] = {}  # id of a parameter -> its name, or its number in the order of appearance
        self._unsent: dict[str, Tensor] = {}  # errors of parameters that are in no bucket just now

    def name(self, model: nn.Module) -> None:
        """Errors are saved under the parameters' names; without names, under numbers."""
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    @property
    def sent_bytes(self) -> int:
        """By this rank so far, to all others together; of what went uncompressed, the least that it can take."""
        return self._links.sent_bytes if self._links else 0

    def take(self, bucket: GradBucket) -> Future[Tensor]:
        """Start the reduction of a bucket; at the last one of a backward pass, finish them all."""
        buffer = bucket.buffer()
        links = self._links
        if links is None:
            self._links = links = TorchLinks(self.group, buffer.device, stages=4)
            self.verdict = self._compressor.verdict_for(links, buffer.device)
        if bucket.index() == 0 or self._line is None:
            self._line = Line(links)
        future: Future[Tensor] = Future(devices=[buffer.device]) if buffer.device.type != "cpu" else Future()
        small = buffer.nbytes < self._compressor.min_bytes
        if small or not self.verdict or not buffer.dtype.is_floating_point:
            self._line.start(_uncompressed(buffer, links), lambda: future.set_result(buffer))
        else:
            self._start(buffer, self._bucket_of(bucket, links), links, future)
        self._line.advance()
        if bucket.is_last():
            self._line.finish()
        return future

    def _start(self, buffer: Tensor, bucket: _Bucket, links: TorchLinks, future: Future[Tensor]) -> None:
        flat = buffer.float()  # the bucket's own memory, where it is float32

        def ended() -> None:
            if flat is not buffer:
                buffer.copy_(flat)
            future.set_result(buffer)

        assert self._line is not None
        bucket.division.start(self._line, flat, lambda: float(links.world), ended)

    def _bucket_of(self, bucket: GradBucket, links: TorchLinks) -> _Bucket:
        parameters = tuple(bucket.parameters())
        key = tuple(map(id, parameters))
        if key not in self._buckets:
            self._retire(set(key))
            self._buckets[key] = self._made(bucket, parameters, links)
        return self._buckets[key]

    def _made(self, bucket: GradBucket, parameters: tuple[Tensor, ...], links: TorchLinks) -> _Bucket:
        buffer = bucket.buffer()
        starts = [g.storage_offset() - buffer.storage_offset() for g in bucket.gradients()]
        places = tuple(range(start, start + p.numel()) for start, p in zip(starts, parameters, strict=True))
        shapes: list[tuple[int, ...]] = []
        at = 0
        for place, parameter in zip(places, parameters, strict=True):
            shapes += [(place.start - at,), tuple(parameter.shape)]
            at = place.stop
        shapes.append((buffer.numel() - at,))
        division = self._compressor.division(shapes, links, buffer.device)
        pending = torch.zeros(buffer.numel(), device=buffer.device)
        for place, parameter in zip(places, parameters, strict=True):
            kept = self._unsent.pop(self._name_of(parameter), None)
            if kept is None:
                continue
            if kept.numel() != len(place):
                raise UserError(
                    f"the saved error of parameter {self._name_of(parameter)!r} has {kept.numel()} elements, "
                    f"the parameter {len(place)}: load what the same model saved."
                )
            pending[place.start : place.stop] = kept.view(-1)
        for cut, reduction in division.parts:
            if (worker := reduction.state().get("worker")) is not None:
                worker.copy_(pending[cut.start : cut.stop])
        return _Bucket(parameters, places, buffer.numel(), division)

    def _name_of(self, parameter: Tensor) -> str:
        return self._names.setdefault(id(parameter), str(len(self._names)))

    def _retire(self, parameters: set[int]) -> None:
        """Take apart the buckets that hold any of these parameters."""
        for key in [key for key in self._buckets if parameters & set(key)]:
            self._unsent |= self._errors(self._buckets.pop(key))

    def _errors(self, bucket: _Bucket) -> dict[str, Tensor]:
        if not self._compressor.error_feedback or self._links is None:
            return {}
        owed = torch.empty(bucket.elements, device=bucket.parameters[0].device)
        for cut, reduction in bucket.division.parts:
            part, state = owed[cut.start : cut.stop], reduction.state()
            part.copy_(state["worker"])
            if "server" in state:  # an error of the mean
                own = slices(len(cut), self._links.world)[self._links.rank]
                part[own.start : own.stop] += state["server"] * self._links.world
        pairs = zip(bucket.parameters, bucket.places, strict=True)
        return {self._name_of(p): owed[place.start : place.stop].clone() for p, place in pairs}

    def state(self) -> dict[str, Tensor]:
        """Unsent numbers by parameter: flat, in the order of the parameter's memory."""
        state = dict(self._unsent)
        for bucket in self._buckets.values():
            state |= self._errors(bucket)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._buckets = {}
        self._unsent = dict(state)


def _uncompressed(buffer: Tensor, links: TorchLinks) -> Steps:
    yield links.all_reduce(buffer)
    buffer.div_(links.world)
