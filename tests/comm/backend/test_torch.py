"""What torch builds on a process group runs unchanged, and ends where a single process ends."""

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()


def alone() -> list[torch.Tensor]:
    net = model()
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), *data())
    return [p.detach() for p in net.parameters()]


def close(got, wanted=None) -> None:
    for a, b in zip(got, wanted or alone(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32: a mean of two means in another order


def own_part(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = data()
    return inputs.chunk(world)[rank], targets.chunk(world)[rank]


def _ddp(rank: int, world: int) -> None:
    net = DistributedDataParallel(model())
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), *own_part(rank, world))
    close([p.detach() for p in net.parameters()])


def _power_sgd(rank: int, world: int) -> None:
    """Its callback waits for further collectives: a thread that completes futures and carries out calls would hang."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    net = DistributedDataParallel(model())
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=4, start_powerSGD_iter=2, min_compression_rate=1
    )
    net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), *own_part(rank, world))
    parts = [torch.empty(4, 16) for _ in range(world)]
    dist.all_gather(parts, net.module[2].weight.detach())
    assert torch.equal(parts[0], parts[1])


def _fsdp(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), *own_part(rank, world))
    close([p.full_tensor().detach() for p in net.parameters()])


def _fsdp_in_shared_memory(rank: int, world: int, own: bool) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Linear(1000, 600)
    fully_shard(net)
    net.set_allocate_memory_from_process_group_for_comm(own)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.ones(2, 1000) * (rank + 1), torch.ones(2, 600))
    counters = dist.group.WORLD._get_backend(torch.device("cpu")).counters()
    assert own == (counters["reduce_scatter"]["zero_copy_calls"] > 0)
    return [p.full_tensor().detach() for p in net.parameters()]


def test_fsdp_takes_its_buffers_from_shared_memory_when_asked_to_and_gets_the_same_bits(in_group):
    copied, in_place = (in_group(2, _fsdp_in_shared_memory, own) for own in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(copied[0], in_place[0], strict=True))


def _tensor_parallel(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
    net = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), *data())
    close([p.full_tensor().detach() for p in net.parameters()])


def _zero(rank: int, world: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(net, optimizer, *own_part(rank, world))
    close([p.detach() for p in net.parameters()])


def _objects(rank: int, world: int) -> None:
    found: list = [None] * world
    dist.all_gather_object(found, {"rank": rank, "text": "x" * (rank * 1000)})
    assert [f["rank"] for f in found] == list(range(world))
    said = [f"from {rank}", rank]
    dist.broadcast_object_list(said, 1)
    assert said == ["from 1", 1]
    gathered: list | None = [None] * world if rank == 0 else None
    dist.gather_object(rank, gathered, 0)
    assert gathered in (None, list(range(world)))


def _functional(rank: int, world: int) -> None:
    from torch.distributed import _functional_collectives as functional

    mine = torch.arange(4.0) + rank
    total = sum(torch.arange(4.0) + r for r in range(world))
    assert torch.equal(functional.all_reduce(mine, "sum", dist.group.WORLD) + 0, total)
    rows = functional.all_gather_tensor(mine, 0, dist.group.WORLD)
    assert torch.equal(rows + 0, torch.cat([torch.arange(4.0) + r for r in range(world)]))
    part = functional.reduce_scatter_tensor(rows + 0, "avg", 0, dist.group.WORLD)
    assert torch.equal(part + 0, torch.arange(4.0) + rank)
    many = functional.all_reduce_coalesced([mine, mine * 2], "sum", dist.group.WORLD)
    assert torch.equal(many[1] + 0, total * 2)


def _checkpoint(rank: int, world: int, folder: str) -> None:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(24.0).view(6, 4)
    state = {"sharded": distribute_tensor(whole, mesh, [Shard(0)]), "step": 7}
    checkpoint.save(state, checkpoint_id=folder)
    again = {"sharded": distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)]), "step": 0}
    checkpoint.load(again, checkpoint_id=folder)
    assert torch.equal(again["sharded"].full_tensor(), whole)
    assert again["step"] == 7


PROGRAMS: list[Callable[[int, int], None]] = [
    _ddp, _power_sgd, _fsdp, _tensor_parallel, _zero, _objects, _functional
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__.strip("_"))
@pytest.mark.parametrize(("kind", "hosts"), [("shm", None), ("hier", [0, 1])], ids=["shm", "hier"])
def test_it_ends_where_one_process_ends(in_group, program, kind, hosts):
    in_group(2, program, kind=kind, hosts=hosts)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__.strip("_"))
def test_it_does_so_without_a_compiler_too(in_group, program):
    in_group(2, program, is_compiled=False)


def test_sharded_checkpoints_come_back_with_another_sharding(in_group, tmp_path, is_compiled):
    in_group(2, _checkpoint, str(tmp_path / "checkpoint"), is_compiled=is_compiled)


def _sub_groups(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    for name, wanted in (("rows", rank % 2 * 2 + 2), ("columns", rank // 2 * 4 + 1)):
        group = mesh.get_group(name)
        assert dist.get_backend(group) == dist.get_backend()
        tensor = torch.tensor(rank)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == wanted
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2], backend="shm" if dist.get_backend() == "hier" else "hier")]
    tensor = torch.tensor(rank)
    dist.all_reduce(tensor, group=pairs[rank in (1, 2)])
    assert tensor.item() == 3
    dist.broadcast(tensor, 3, group=pairs[0]) if rank in (0, 3) else None


def test_sub_groups_inherit_the_backend_or_have_one_of_their_own(in_group, is_compiled):
    for kind in ("shm", "hier", "cpu:hier"):
        in_group(4, _sub_groups, kind=kind, is_compiled=is_compiled)


def _split(rank: int, world: int) -> tuple[float, str]:
    mine = [0, 2] if rank in (0, 2) else [1]
    part = dist.group.WORLD.split_group(mine, timeout=timedelta(seconds=30), group_name=f"part{mine[0]}")
    tensor = torch.tensor([float(rank)])
    part.allreduce([tensor]).wait()
    return tensor.item(), part._get_backend(torch.device("cpu")).membership.name


def test_a_group_is_split_without_the_help_of_those_who_are_not_in_the_part(in_group, is_compiled):
    found = in_group(3, _split, kind="hier", is_compiled=is_compiled)
    assert [total for total, _ in found] == [2, 1, 2]
    assert all("of 'default'" in name for _, name in found)


def _two_at_once(rank: int, world: int) -> None:
    first, second = dist.group.WORLD, dist.new_group()
    works = []
    tensors = [torch.full((100_001,), float(i + rank)) for i in range(20)]
    for i, tensor in enumerate(tensors):  # one order in the one group, another in the other
        works.append(dist.all_reduce(tensor, group=(first, second)[i % 2], async_op=True))
    for work in works if rank == 0 else reversed(works):
        work.wait()
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full((100_001,), float(2 * i + 1)))


def test_two_groups_at_the_same_time_do_not_mix(in_group, is_compiled):
    in_group(2, _two_at_once, is_compiled=is_compiled)


def _order(rank: int, world: int) -> None:
    """Each reads what the one before wrote, on whatever thread that ran."""
    tensor, other = torch.ones(50_000), torch.zeros(50_000)
    works = []
    for round_ in range(30):
        works.append(dist.all_reduce(tensor, async_op=True))
        if round_ % 3 == rank:
            works[-1].wait()
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG, async_op=False)  # synchronous, behind what is queued
        assert tensor[0] == 2.0 ** (round_ + 1)
        works.append(dist.broadcast(other if rank else tensor, 0, async_op=True))
    works[-1].wait()
    assert torch.equal(other if rank else tensor, torch.full((50_000,), 2.0**30))
    assert all(work.is_completed() and work.is_success() for work in works if work is not None)


def test_synchronous_and_asynchronous_calls_keep_their_order(in_group, is_compiled):
    in_group(2, _order, is_compiled=is_compiled)


def _futures(rank: int, world: int) -> None:
    seen = []
    tensor = torch.full((10,), float(rank))
    work = dist.all_reduce(tensor, async_op=True)

    def then(future):
        inner = dist.all_reduce(future.value()[0] + 1, async_op=True)  # from within a callback, and waited for there
        inner.wait()
        seen.append(inner.result()[0][0].item())
        return seen[0]

    assert work.get_future().then(then).wait() == 4.0
    done = dist.all_reduce(tensor, async_op=True)
    done.wait()
    assert done.get_future().done()
    assert done.get_future().value()[0] is tensor or torch.equal(done.get_future().value()[0], tensor)
    gathered = dist.all_gather([torch.empty(10), torch.empty(10)], tensor, async_op=True).get_future().wait()
    assert len(gathered[0]) == 2
    wrong = dist.all_reduce(torch.ones(2 + rank), async_op=True)
    with pytest.raises(RuntimeError, match="3 elements"):
        wrong.get_future().wait()
    assert not wrong.is_success()


def test_futures_complete_and_their_callbacks_may_wait_for_more(in_group, is_compiled):
    in_group(2, _futures, is_compiled=is_compiled)


def _profiled(rank: int, world: int) -> list[str]:
    from torch.profiler import profile

    with profile() as seen:
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    return sorted({event.key for event in seen.key_averages() if "all_reduce" in event.key or "allreduce" in event.key})


def test_a_profile_shows_the_calls(in_group, is_compiled):
    for names in in_group(2, _profiled, is_compiled=is_compiled):
        assert names == [*(["c10d::allreduce_"] if is_compiled else []), "shoal:all_reduce"]


def _symmetric(rank: int, world: int) -> dict:
    from shoal.comm import symm_empty

    one, two = symm_empty(1 << 20, torch.float32), symm_empty(7, torch.int64)
    address = one.data_ptr()
    one.fill_(rank + 1)
    dist.all_reduce(one)
    assert torch.equal(one, torch.full((1 << 20,), 3.0))
    two.fill_(rank)
    dist.all_reduce(two)
    assert two.tolist() == [1] * 7
    view = one[5:]
    del one
    assert symm_empty(1 << 20, torch.float32).data_ptr() != address  # a view still uses it
    del view
    assert symm_empty(1 << 20, torch.float32).data_ptr() == address
    assert symm_empty(0, torch.float32).numel() == 0
    kept = symm_empty(1000, torch.float32)
    counters = dist.group.WORLD._get_backend(torch.device("cpu")).counters()["all_reduce"]
    dist.destroy_process_group()
    kept.fill_(1)  # outlives the group
    return counters


def test_symmetric_memory_is_worked_on_in_place_and_comes_back_when_the_tensor_goes(in_group):
    for counters in in_group(2, _symmetric):
        assert counters["calls"] == 2
        assert counters["bytes"] == 4 * (1 << 20) + 56
        assert counters["zero_copy_calls"] >= 1
        assert set(counters["waiting_s"]) == {0, 1}


def _files() -> dict[str, str]:
    """What each open file leads to, by its number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what a thread has closed since
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _made_and_destroyed(rank: int, world: int, times: int) -> tuple[list[tuple[str, str]], int]:
    """The files that are new afterwards, and by how many threads there are more."""

    def once() -> None:
        group = dist.new_group()
        dist.all_reduce(torch.ones(10), group=group)
        dist.all_reduce(torch.ones(10), group=group, async_op=True).wait()
        dist.barrier()
        dist.destroy_process_group(group)

    for _ in range(3):
        once()
    before, threads = _files().items(), len(os.listdir("/proc/self/task"))
    for _ in range(times):
        once()
    deadline = time.monotonic() + 20  # gloo closes what it had on a thread of its own, maybe after we are back
    while True:
        new = sorted(_files().items() - before)
        more = len(os.listdir("/proc/self/task")) - threads
        if not (new or more > 0) or time.monotonic() > deadline:
            return new, more
        os.sched_yield()


def test_groups_leave_no_file_and_no_thread_behind_and_nothing_ever_had_a_name(in_group, is_compiled):
    names = set(os.listdir("/dev/shm"))
    for new, more_threads in in_group(2, _made_and_destroyed, 10, is_compiled=is_compiled):
        assert new == []
        assert more_threads <= 0
    assert set(os.listdir("/dev/shm")) - names == set()
