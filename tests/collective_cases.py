"""Collectives for tests: every algorithm there is, operands that are exact, and what must come out."""

from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from shoal.comm.collectives.actions import COLLECTIVES, ROOTED, Program
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.registry import ALGORITHMS, build
from shoal.comm.transports.loopback import Loopback, Simulated

PAIRS = [(collective, name) for name, algorithm in ALGORITHMS.items() for collective in algorithm.makes]
IN_PLACE = ("all_reduce", "reduce", "broadcast", "send_recv")


def host_lists(ranks: int) -> list[Sequence[int] | None]:
    """One host; two alike; hosts of 1, 2, 3, ... ranks; neighbours on different hosts."""
    growing = [host for host in range(ranks) for _ in range(host + 1)][:ranks]
    return [None, [rank * 2 // ranks for rank in range(ranks)], growing, [rank % 3 for rank in range(ranks)]]


def programs(collective: str, name: str, ranks: int) -> Iterator[Program]:
    """The algorithm with several roots, hosts and numbers of segments."""
    algorithm = ALGORITHMS[name]
    roots = sorted({0, ranks // 2, ranks - 1}) if collective in ROOTED else [0]
    for hosts in host_lists(ranks) if algorithm.uses_hosts else [None]:
        for segments in (1, 3) if collective in algorithm.pipelined else (1,):
            for root in roots:
                target = (root + 1) % ranks
                yield build(collective, name, ranks, hosts=hosts, segments=segments, root=root, target=target)


@st.composite
def any_program(draw: st.DrawFn, most_ranks: int = 24) -> Program:
    collective, name = draw(st.sampled_from(PAIRS))
    ranks = draw(st.integers(1, most_ranks))
    hosts = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks))
    segments = draw(st.integers(1, 5)) if collective in ALGORITHMS[name].pipelined else 1
    root = draw(st.integers(0, ranks - 1)) if collective in ROOTED else 0
    target = draw(st.integers(0, ranks - 1))
    return build(collective, name, ranks, hosts=hosts, segments=segments, root=root, target=target)


def blocks_of(program: Program, chunks: Sequence[int]) -> list[int]:
    return [chunk // program.segments for chunk in list(chunks)[:: program.segments]]


def operands(
    program: Program, sizes: Sequence[int], dtype: torch.dtype, seed: int = 0, spread: int = 3
) -> list[Tensor | None]:
    """What each rank starts with: small whole numbers, so that sums are exact in every type and order."""
    generator = torch.Generator().manual_seed(seed)
    out: list[Tensor | None] = []
    for chunks in program.starts:
        count = sum(sizes[block] for block in blocks_of(program, chunks))
        numbers = torch.randint(0 if dtype is torch.uint8 else -spread, spread + 1, (count,), generator=generator)
        out.append(numbers.to(dtype) if len(chunks) else None)
    return out


def results(program: Program, sizes: Sequence[int], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Where each rank ends: the operand itself where a collective is in place, else a tensor full of another value."""
    out: list[Tensor | None] = []
    dtype = next(tensor.dtype for tensor in given if tensor is not None)
    for rank, chunks in enumerate(program.ends):
        count = sum(sizes[block] for block in blocks_of(program, chunks))
        own = given[rank] if program.collective in IN_PLACE else None
        out.append((torch.full((count,), 9).to(dtype) if own is None else own) if len(chunks) else None)
    return out


def expected(
    program: Program, sizes: Sequence[int], given: Sequence[Tensor | None], combine=torch.add
) -> list[Tensor | None]:
    """Computed in int64 or float64, block by block, without any program."""
    exact: dict[int, Tensor] = {}
    dtype = next(tensor.dtype for tensor in given if tensor is not None)
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    for rank, chunks in enumerate(program.starts):
        at = 0
        for block in blocks_of(program, chunks):
            part = given[rank][at : at + sizes[block]].to(wide)
            exact[block] = combine(exact[block], part) if block in exact else part
            at += sizes[block]
    ends = [[exact[block] for block in blocks_of(program, chunks)] for chunks in program.ends]
    return [torch.cat(parts).to(dtype) if parts else None for parts in ends]


def simulate(
    program: Program,
    given: Sequence[Tensor | None],
    into: Sequence[Tensor | None],
    sizes: Sequence[int],
    topology=None,
    **options,
) -> Simulated[None]:
    network = Loopback(program.ranks if topology is None else topology)
    return network.run(lambda end: carry_out(end, program, given[end.rank], into[end.rank], sizes=sizes, **options))


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def equal(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> bool:
    pairs = zip(got, want, strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


assert {collective for collective, _ in PAIRS} == set(COLLECTIVES)
