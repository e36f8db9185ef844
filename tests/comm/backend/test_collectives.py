"""Every collective, type, size and number of ranks: equal to whole-number sums, and to what gloo gives."""

import hashlib
from functools import reduce

import pytest
import torch
import torch.distributed as dist

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
EVERY = [*FLOATING, *WHOLE, torch.bool, *COMPLEX]
MOVED = [*EVERY, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [0, 1, 3, 127, 4099, 70001]
MOVED_SIZES = [0, 3, 4099, 70001]
SOAK = pytest.mark.soak  # cases that lie between others
WORLDS = [  # ranks; whether the library is there
    (1, True), (2, True), pytest.param(3, True, marks=SOAK), (4, True), pytest.param(2, False, marks=SOAK), (3, False)
]  # fmt: skip


def numbers(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, different for each rank: their sums and products are exact in every type."""
    whole = (torch.arange(size) * 7 + rank * 3) % 5
    return (
        whole.to(torch.uint8).view(-1).to(dtype) if dtype.is_floating_point and dtype.itemsize == 1 else whole.to(dtype)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(got: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
    assert got.dtype == wanted.dtype, what
    assert torch.equal(bits(got), bits(wanted)), (what, got, wanted)


def combined(world: int, size: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    """In whole numbers of 64 bits, or in complex ones: exact, then converted once."""
    wide = torch.complex128 if dtype.is_complex else torch.int64
    parts = torch.stack([numbers(rank, size, dtype).to(wide) for rank in range(world)])
    if dtype == torch.bool:
        return parts.bool().any(0) if op in ("SUM", "MAX", "BOR") else parts.bool().all(0)
    made = {
        "SUM": lambda: parts.sum(0),
        "AVG": lambda: mean(parts.sum(0), world),
        "PRODUCT": lambda: parts.prod(0),
        "MIN": lambda: parts.min(0).values,
        "MAX": lambda: parts.max(0).values,
        "BAND": lambda: reduce(torch.bitwise_and, parts),
        "BOR": lambda: reduce(torch.bitwise_or, parts),
        "BXOR": lambda: reduce(torch.bitwise_xor, parts),
    }
    return made[op]().to(dtype)


def mean(total: torch.Tensor, count: int) -> torch.Tensor:
    """Part by part: torch's division of complex numbers by whole ones is off by a bit."""
    return torch.view_as_complex(torch.view_as_real(total) / count) if total.is_complex() else total.double() / count


def operations(dtype: torch.dtype) -> list[str]:
    if dtype == torch.bool:
        return ["SUM", "MAX", "MIN", "PRODUCT"]
    if dtype.is_complex:
        return ["SUM", "PRODUCT", "AVG"]
    return ["SUM", "PRODUCT", "MIN", "MAX", *(["AVG"] if dtype.is_floating_point else ["BAND", "BOR", "BXOR"])]


def _reductions(rank: int, world: int, types: list[torch.dtype] = EVERY) -> None:
    for dtype in types:
        for name in operations(dtype):
            op = getattr(dist.ReduceOp, name)
            for size in SIZES if name == "SUM" else SIZES[2:5]:
                what = (world, dtype, name, size)
                wanted = combined(world, size, dtype, name)
                tensor = numbers(rank, size, dtype)
                # through the group itself: dist.all_reduce turns complex numbers into pairs
                options = dist.AllreduceOptions()
                options.reduceOp = op
                dist.group.WORLD.allreduce([tensor], options).wait()
                same(tensor, wanted, ("all_reduce", *what))
                if dtype.is_complex:
                    continue
                for root in {0, world - 1}:
                    tensor = numbers(rank, size, dtype)
                    dist.reduce(tensor, root, op)
                    same(tensor, wanted if rank == root else numbers(rank, size, dtype), ("reduce", root, *what))
                whole = numbers(rank, size * world, dtype)
                wanted = combined(world, size * world, dtype, name).view(world, -1)[rank]
                out = torch.empty(size, dtype=dtype)
                dist.reduce_scatter_tensor(out, whole, op)
                same(out, wanted, ("reduce_scatter_tensor", *what))
                out = torch.empty(size, dtype=dtype)
                dist.reduce_scatter(out, list(whole.view(world, -1)), op)
                same(out, wanted, ("reduce_scatter", *what))


def _moves(rank: int, world: int, types: list[torch.dtype] = MOVED, sizes: list[int] = MOVED_SIZES) -> None:
    for dtype in types:
        for size in sizes:
            what = (world, dtype, size)
            mine, everyones = numbers(rank, size, dtype), [numbers(r, size, dtype) for r in range(world)]
            out = torch.empty(size * world, dtype=dtype)
            dist.all_gather_into_tensor(out, mine)
            same(out, torch.cat(everyones), ("all_gather_into_tensor", *what))
            outs = [torch.empty(size, dtype=dtype) for _ in range(world)]
            dist.all_gather(outs, mine)
            same(torch.cat(outs), torch.cat(everyones), ("all_gather", *what))
            for root in {0, world - 1}:
                tensor = mine.clone()
                dist.broadcast(tensor, root)
                same(tensor, everyones[root], ("broadcast", root, *what))
                outs = [torch.empty(size, dtype=dtype) for _ in range(world)] if rank == root else None
                dist.gather(mine, outs, root)
                if outs is not None:
                    same(torch.cat(outs), torch.cat(everyones), ("gather", root, *what))
                tensor = torch.empty(size, dtype=dtype)
                dist.scatter(tensor, [t.clone() for t in everyones] if rank == root else None, root)
                same(tensor, mine, ("scatter", root, *what))
            sent = [numbers(rank * 10 + r, size + (rank + r) % 3, dtype) for r in range(world)]
            got = [torch.empty(size + (rank + r) % 3, dtype=dtype) for r in range(world)]
            dist.all_to_all(got, sent)
            for r in range(world):
                same(got[r], numbers(r * 10 + rank, size + (rank + r) % 3, dtype), ("all_to_all", r, *what))
            flat = torch.empty(sum(map(len, got)), dtype=dtype)
            dist.all_to_all_single(flat, torch.cat(sent), [len(t) for t in got], [len(t) for t in sent])
            same(flat, torch.cat(got), ("all_to_all_single", *what))
    dist.barrier()


@pytest.mark.parametrize(("world", "is_compiled"), WORLDS)
def test_reductions_are_exact(in_group, world, is_compiled):
    in_group(world, _reductions, is_compiled=is_compiled)


@pytest.mark.parametrize(("world", "is_compiled"), WORLDS)
def test_what_is_moved_arrives(in_group, world, is_compiled):
    in_group(world, _moves, is_compiled=is_compiled)


HOSTS = [  # equal, unequal, interleaved; more than two
    [0, 1], pytest.param([0, 0, 1, 1], marks=SOAK), [0, 1, 1], [0, 1, 0, 1], [0, 1, 2]
]  # fmt: skip
FEW = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_reductions_between_hosts_are_exact(in_group, hosts):
    in_group(len(hosts), _reductions, FEW, kind="hier", hosts=hosts)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_what_is_moved_between_hosts_arrives(in_group, hosts):
    in_group(len(hosts), _moves, [*FEW, torch.float8_e5m2, torch.uint16], [0, 3, 4099], kind="hier", hosts=hosts)


def _large_sums(rank: int, world: int) -> str:
    torch.manual_seed(rank)
    digests = []
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(3_000_001).to(dtype)  # many chunks of a pipeline
        parts = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(parts, tensor)
        dist.all_reduce(tensor)
        assert torch.allclose(
            tensor.double(), sum(p.double() for p in parts), atol=0.1 if dtype.itemsize == 2 else 1e-5
        )
        digests.append(hashlib.sha256(bits(tensor).numpy()).hexdigest())
    return " ".join(digests)


@pytest.mark.parametrize(("kind", "hosts"), [("shm", None), ("hier", [0, 0, 1]), ("hier", [0, 1, 2])])
def test_rounded_sums_have_the_same_bits_on_all_ranks_and_in_every_run(in_group, kind, hosts):
    runs = [in_group(3, _large_sums, kind=kind, hosts=hosts) for _ in range(2)]
    assert len({digest for run in runs for digest in run}) == 1


def test_rounded_sums_in_python_have_the_bits_of_the_compiled_ones(in_group):
    compiled, in_python = (in_group(3, _large_sums, is_compiled=how) for how in (True, False))
    assert len({*compiled, *in_python}) == 1


def _beside_gloo(rank: int, world: int) -> None:
    gloo = dist.new_group(backend="gloo")
    torch.manual_seed(rank)
    for shape in ((5, 7), (1000,), ()):
        tensor = torch.randn(shape)
        ours, theirs = tensor.clone(), tensor.clone()
        dist.all_reduce(ours)
        dist.all_reduce(theirs, group=gloo)
        assert torch.allclose(ours, theirs, rtol=1e-6)  # float32: gloo adds in another order
    for strided in (torch.arange(12.0).view(3, 4).t(), torch.arange(12.0)[::2], torch.arange(3.0).expand(4, 3)):
        ours, theirs = strided.clone(memory_format=torch.preserve_format) + rank, strided.contiguous() + rank
        dist.all_reduce(ours)
        dist.all_reduce(theirs, group=gloo)
        assert torch.equal(ours, theirs)
        out = torch.zeros(2, *strided.shape).transpose(0, 1).contiguous().transpose(0, 1)
        dist.all_gather([out[r] for r in range(2)], strided)
        assert torch.equal(out[1], strided)
    # what shared memory cannot do goes through gloo
    sparse = torch.sparse_coo_tensor([[rank, 4]], [1.0, 2.0], (6,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1, 1, 0, 0, 4, 0]
    odd = torch.tensor([1 + 2j], dtype=torch.complex32)
    dist.broadcast(odd, 0)


def test_other_layouts_and_what_only_gloo_can_do_give_what_gloo_gives(in_group, is_compiled):
    in_group(2, _beside_gloo, is_compiled=is_compiled)


def _point_to_point(rank: int, world: int) -> None:
    tensor = torch.full((1000,), float(rank))
    if rank == 0:
        dist.send(tensor, 1, tag=3)
        dist.recv(tensor, 1)
        assert tensor[0] == 1
    else:
        got = torch.ones(1000)
        dist.recv(got, 0, tag=3)
        assert got[0] == 0
        dist.send(tensor, 0)
    work = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, torch.ones(3) * rank, 1 - rank), dist.P2POp(dist.irecv, tensor[:3], 1 - rank)]
    )
    for one in work:
        one.wait()
    assert tensor[0] == 1 - rank


def test_messages_between_two_ranks_arrive(in_group, is_compiled):
    in_group(2, _point_to_point, is_compiled=is_compiled)
