"""Whether compressing pays: bytes saved on the link against time spent on them. The decision is pure."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from shoal.comm.compression.codec import Codec
from shoal.comm.compression.links import TorchLinks
from shoal.comm.compression.low_rank import LowRank, orthonormal, squarest, start_of
from shoal.comm.compression.reduction import raw_bytes
from shoal.comm.finishing import finish_flat
from shoal.comm.layout import BLOCK
from shoal.comm.tree import Add

if TYPE_CHECKING:
    from shoal.comm.compression.compressor import Compressor

PROBE_BYTES = 4 << 20  # about a bucket
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Bytes of float32 a second on one rank: compressing with error feedback, and adding up what others compressed."""

    compress: float
    open: float


@dataclass(frozen=True)
class Verdict:
    yes: bool
    why: str  # one line, with the numbers
    plain_s: float = 0.0  # predicted for one all-reduce
    compressed_s: float = 0.0
    break_even_bytes_per_s: float = math.inf  # the link speed below which compressing pays

    def __bool__(self) -> bool:
        return self.yes


def worth_it(
    compressor: "Compressor",
    nbytes: int,
    link_bytes_per_s: float,
    compress_bytes_per_s: float,
    ranks: int,
    *,
    open_bytes_per_s: float | None = None,
) -> Verdict:
    """Whether an all-reduce of ``nbytes`` of float32 ends sooner when it is compressed.

    ``link_bytes_per_s``: what a rank sends a second. As it is, a rank sends 2 (n-1)/n of the bytes. Compressed, it
    sends ``compressor.bytes_sent``, compresses each byte once (the others' slices, then its own sum) and opens
    (2n-1)/n of them (the others' contributions, then the result); neither hides behind the other.
    ``open_bytes_per_s``: as fast as compressing unless given."""
    name, elements = compressor.name, nbytes // 4
    if ranks < 2:
        return Verdict(False, f"{name}: one rank sends nothing")
    plain = raw_bytes(elements, ranks)
    sent = compressor.bytes_sent(elements, ranks)
    if sent >= plain:
        return Verdict(False, f"{name}: {nbytes} bytes are too few, it would send {sent} instead of {plain}")
    opened = open_bytes_per_s or compress_bytes_per_s
    compute_s = nbytes / compress_bytes_per_s + nbytes * (2 * ranks - 1) / ranks / opened
    plain_s, compressed_s = plain / link_bytes_per_s, sent / link_bytes_per_s + compute_s
    break_even = (plain - sent) / compute_s
    yes = compressed_s < plain_s
    return Verdict(
        yes,
        f"{name} {'pays' if yes else 'does not pay'}: over a link of {_rate(link_bytes_per_s)}, {nbytes / 1e6:.1f} MB "
        f"take {plain_s * 1e3:.2f} ms as they are and {compressed_s * 1e3:.2f} ms compressed (at "
        f"{_rate(compress_bytes_per_s)} a core); it pays below {_rate(break_even)}",
        plain_s,
        compressed_s,
        break_even,
    )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


# --- measuring --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def measured_speed(method: Codec | LowRank, device: torch.device) -> Speed:
    """Of this process, on 4 MiB: the best of a few."""
    elements = PROBE_BYTES // 4
    gradient = (torch.arange(elements, device=device) * 2654435761 % 65536).float() - 32768.0
    error = torch.zeros_like(gradient)
    if isinstance(method, LowRank):
        [(rows, columns), _] = squarest(elements)
        q = start_of(columns, method.rank, 0).to(device)

        matrix = error[: rows * columns].view(rows, columns)

        def factor() -> None:
            error.add_(gradient)
            basis = orthonormal(torch.mm(q, matrix.t()))
            matrix.addmm_(basis.t(), torch.mm(basis, matrix), alpha=-1.0)

        return Speed(PROBE_BYTES / _best(factor, device), math.inf)
    payload = torch.zeros(method.payload_bytes(elements), dtype=torch.uint8, device=device)
    compress = _best(lambda: method.compress(gradient, error, payload), device)
    return Speed(PROBE_BYTES / compress, PROBE_BYTES / _best(lambda: method.add(payload, gradient), device))


def shared_memory_bytes_per_s(world: int) -> float:
    """The "link" of workers that share their memory: nothing is sent, each adds up its slice where it lies.

    In the bytes that a rank would send for it, so that `worth_it` can compare."""
    elements = -(-PROBE_BYTES // 4 // world // BLOCK) * BLOCK
    operands = [torch.zeros(elements) for _ in range(world)]
    adds = [Add(0, other) for other in range(1, world)]
    return raw_bytes(elements * world, world) / _best(lambda: finish_flat(operands, adds, 1.0), operands[0].device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        _settle(device)
        begun = time.perf_counter()
        run()
        _settle(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_link(links: TorchLinks, device: torch.device) -> float:
    """Bytes a second that each rank sends in the backend's own all-reduce of 4 MiB. Called by all ranks."""
    numbers = torch.zeros(PROBE_BYTES // 4, device=device)
    one = torch.zeros(1, device=device)

    def together() -> None:
        links.all_reduce(numbers).wait()

    def aligned() -> float:
        links.all_reduce(one).wait()
        _settle(device)
        begun = time.perf_counter()
        together()
        _settle(device)
        return time.perf_counter() - begun

    aligned()
    return raw_bytes(numbers.numel(), links.world) / min(aligned() for _ in range(REPEATS))


def agreed(compressor: "Compressor", links: TorchLinks, device: torch.device) -> Verdict:
    """The verdict from what all ranks measure: the slowest rank's speeds count. Called by all ranks."""
    if compressor.force:
        return Verdict(True, f"{compressor.name}: forced")
    if links.world == 1:
        return worth_it(compressor, PROBE_BYTES, 1.0, 1.0, 1)
    speed = measured_speed(compressor.method, device)
    mine = torch.tensor([measured_link(links, device), speed.compress, min(speed.open, 1e30)], device=device)
    rows = (mine.view(torch.uint8), torch.zeros(links.world, mine.nbytes, dtype=torch.uint8, device=device))
    links.all_gather(0, rows).wait()
    link, compress, opened = rows[1].view(torch.float32).min(dim=0).values.tolist()
    return worth_it(compressor, PROBE_BYTES, link, compress, links.world, open_bytes_per_s=opened)


def on_one_host(compressor: "Compressor", world: int) -> Verdict:
    """The verdict for workers that share their memory, from what this process measures."""
    if compressor.force:
        return Verdict(True, f"{compressor.name}: forced")
    speed = measured_speed(compressor.method, torch.device("cpu"))
    link = shared_memory_bytes_per_s(world) if world > 1 else 1.0
    return worth_it(compressor, PROBE_BYTES, link, speed.compress, world, open_bytes_per_s=speed.open)
