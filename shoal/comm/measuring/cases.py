"""Which collectives are measured: operations, sizes, dtypes, and the arms that take turns at each. Pure."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.comm.collectives import registry
from shoal.errors import UserError, unknown_name

OPS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter",
    "send_recv", "barrier",
)  # fmt: skip
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int32": 4, "int64": 8, "int8": 1, "uint8": 1}
IN_PYTHON = "shm-python"  # shm as it is where nothing can be compiled
TRANSPORTS = ("gloo", "shm", "hier", IN_PYTHON, "nccl", "mpi")
ZERO_COPY_TRANSPORTS = ("shm", "hier")
NATIVE = "native"  # the algorithm that the transport itself chooses
AUTO = "auto"  # the one that the cost model chooses
ALGORITHMS = (NATIVE, AUTO, *registry.ALGORITHMS)
BLOCK_OPS = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")  # whose buffer is a block a rank
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
FACTOR = 4  # between the sizes of a range, where none is given
MOST_WORKERS = 40  # whose sums of test patterns an int8 holds


@dataclass(frozen=True)
class Arm:
    """One way to carry out a collective."""

    transport: str
    algorithm: str = NATIVE
    zero_copy: bool = False  # its tensors lie on the transport's symmetric heap

    def __str__(self) -> str:
        parts = [self.transport, *([self.algorithm] if self.algorithm != NATIVE else [])]
        return " ".join([*parts, *(["zero-copy"] if self.zero_copy else [])])


@dataclass(frozen=True)
class Cell:
    """One operation on one size, for which all arms take turns."""

    op: str
    dtype: str
    elements: int  # of the full buffer: the input of reduce-scatter, the output of all-gather
    arms: tuple[Arm, ...]

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {size_text(self.nbytes)}" if self.op != "barrier" else self.op


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. Raises UserError where a value cannot be used."""

    workers: int
    ops: tuple[str, ...] = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
    sizes: tuple[int, ...] = (1 << 10, 1 << 16, 1 << 20, 1 << 24)  # bytes of the full buffer
    dtypes: tuple[str, ...] = ("float32",)
    transports: tuple[str, ...] = ("gloo", "shm")
    algorithms: tuple[str, ...] = (NATIVE,)
    zero_copy: bool = False  # beside the usual tensors, ones on the symmetric heap
    rounds: int = 3  # of the whole sweep; figures are medians over them
    seconds: float = 45.0  # for all of it, about; every cell gets the same share, and its least number of iterations
    least: int = 5  # iterations of a cell in a round
    most: int = 300

    def __post_init__(self) -> None:
        for what, given, known in (
            ("operation", self.ops, OPS),
            ("dtype", self.dtypes, DTYPES),
            ("transport", self.transports, TRANSPORTS),
            ("algorithm", self.algorithms, ALGORITHMS),
        ):
            if not given:
                raise UserError(f"bench collectives: name at least one {what}.")
            for name in given:
                if name not in known:
                    raise unknown_name(what, name, known)
        if not 2 <= self.workers <= MOST_WORKERS:
            raise UserError(f"bench collectives: --workers must be 2 to {MOST_WORKERS}, got {self.workers}.")
        if not self.sizes or min(self.sizes) < 1:
            raise UserError("bench collectives: --sizes needs sizes of at least 1 byte.")
        if self.rounds < 1 or not 0 < self.seconds < math.inf:
            raise UserError("bench collectives: --rounds must be at least 1 and --seconds above 0.")
        if "nccl" in self.transports and set(self.transports) & {"shm", "hier", IN_PYTHON}:
            raise UserError("nccl moves memory of accelerators and shm that of the host: measure them in two runs.")
        if self.zero_copy and not set(self.transports) & set(ZERO_COPY_TRANSPORTS):
            raise UserError(
                f"--zero-copy needs a transport with a symmetric heap: {' or '.join(ZERO_COPY_TRANSPORTS)} "
                f"in --transports, which has {', '.join(self.transports)}."
            )


def cells(settings: Settings) -> list[Cell]:
    """The cells in the order in which they are measured. An algorithm is left out where it has no such operation."""
    out = []
    for op in settings.ops:
        for dtype in settings.dtypes if op != "barrier" else settings.dtypes[:1]:
            sizes = {elements_of(op, size, dtype, settings.workers): None for size in settings.sizes}
            for elements in sizes if op != "barrier" else [0]:
                arms = [
                    Arm(transport, algorithm, zero_copy)
                    for transport in settings.transports
                    for algorithm in settings.algorithms
                    if algorithm == NATIVE or algorithm in (AUTO, *registry.algorithms(op))
                    for zero_copy in (False, True)
                    if not zero_copy or (settings.zero_copy and can_be_zero_copy(op, transport) and algorithm == NATIVE)
                ]
                if arms:
                    out.append(Cell(op, dtype, elements, tuple(arms)))
    return out


def can_be_zero_copy(op: str, transport: str) -> bool:
    return transport in ZERO_COPY_TRANSPORTS and op not in ("send_recv", "barrier")


def elements_of(op: str, nbytes: int, dtype: str, workers: int) -> int:
    """Elements of a full buffer of about ``nbytes``: at least one, and a whole block a rank where there are blocks."""
    elements = max(1, nbytes // DTYPES[dtype])
    return max(1, elements // workers) * workers if op in BLOCK_OPS else elements


def memory_needed(all_cells: Sequence[Cell], workers: int) -> int:
    """Bytes that the largest cell takes, over all ranks: input, output, the pair for memcpy, the heap's."""
    return max(
        (cell.nbytes * workers * (6 if any(a.zero_copy for a in cell.arms) else 4) for cell in all_cells), default=0
    )


def sizes(text: str) -> tuple[int, ...]:
    """``1KiB,64KiB`` or ``1KiB..64MiB`` (each 4 times the last) or ``1KiB..64MiB:2`` (2 times), or both; rising.

    Raises UserError."""
    out: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        span, _, factor_text = part.partition(":")
        first, dots, last = span.partition("..")
        low = size(first)
        if not dots and not factor_text:
            out.add(low)
            continue
        high = size(last) if dots else low
        factor = int(factor_text) if factor_text.isdecimal() else FACTOR if not factor_text else 0
        if factor < 2 or high < low:
            raise UserError(f"--sizes {part!r}: write a range as 1KiB..64MiB, or 1KiB..64MiB:2 to double each time.")
        while low < high:
            out.add(low)
            low *= factor
        out.add(high)
    if not out:
        raise UserError(f"--sizes {text!r}: write sizes such as 1KiB,1MiB or a range such as 1KiB..64MiB.")
    return tuple(sorted(out))


def size(text: str) -> int:
    """Bytes of ``64KiB``, ``1.5MiB``, ``2MB`` (decimal), ``4K`` (as KiB) or a plain number. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(iB|B)?", text.strip(), flags=re.IGNORECASE)
    if match:
        number, prefix, suffix = match.groups()
        decimal = bool(prefix) and (suffix or "").upper() == "B"
        unit = _UNITS[prefix.upper() + ("B" if decimal else "")]
        if float(number) * unit >= 1:
            return int(float(number) * unit)
    raise UserError(f"--sizes: {text.strip()!r} is no size: write such as 64KiB, 16MiB or 4096.")


def size_text(nbytes: int) -> str:
    """65536 -> "64 KiB"; 1500 -> "1500 B"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        number = f"{nbytes / unit:.4g}"
        if nbytes >= unit and float(number) * unit == nbytes and "e" not in number:
            return f"{number} {name}"
    return f"{nbytes} B"
