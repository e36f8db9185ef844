"""The process groups of the transports that are measured, and the calls on them."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.measuring.cases import IN_PYTHON, NATIVE, ZERO_COPY_TRANSPORTS, Arm, Settings
from shoal.comm.measuring.operations import Empty, Tensors, native_call
from shoal.errors import UserError

TIMEOUT = timedelta(seconds=300)  # a cell of the largest size over the slowest transport


@dataclass(frozen=True)
class Groups:
    device: torch.device
    by_transport: Mapping[str, dist.ProcessGroup]

    def call(self, op: str, arm: Arm, tensors: Tensors) -> Callable[[], object]:
        group = self.by_transport[arm.transport]
        if arm.algorithm == NATIVE:
            return self.finished(native_call(op, tensors, group))
        return self.finished(algorithm_call(op, arm.algorithm, tensors, group))

    def finished(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call, and on an accelerator the wait for its end: there, calls only hand work over."""
        if self.device.type == "cpu":
            return call
        module = torch.get_device_module(self.device)

        def wait() -> None:
            call()
            module.synchronize(self.device)

        return wait

    def on_heap(self, transport: str, dtype: torch.dtype) -> Empty:
        """Makes tensors that the transport reads and writes where they lie."""
        from shoal.comm.backend.groups import backend_of, symm_empty

        group = self.by_transport[transport]

        def empty(elements: int) -> Tensor:
            made = symm_empty(elements, dtype, group).zero_()
            if elements and not backend_of(group).owns(made.data_ptr()):
                raise UserError(f"no room for {made.nbytes} bytes on the symmetric heap: take smaller --sizes.")
            return made

        return empty


def algorithm_call(op: str, algorithm: str, t: Tensors, group: dist.ProcessGroup) -> Callable[[], object]:
    """The operation by one of Shoal's own algorithms over the transport's messages."""
    from shoal.comm.collectives import operations as ours
    from shoal.comm.transports.torch_group import TorchGroup

    over, root, last = TorchGroup((group,)), t.rank == 0, t.rank == t.world - 1
    if op == "all_reduce":
        return lambda: ours.all_reduce(t.input, group=over, algorithm=algorithm)
    if op == "reduce":
        return lambda: ours.reduce(t.input, group=over, algorithm=algorithm)
    if op == "broadcast":
        return lambda: ours.broadcast(t.input, group=over, algorithm=algorithm)
    if op == "all_gather":
        return lambda: ours.all_gather(t.input, over, out=t.output.view(t.world, -1), algorithm=algorithm)
    if op == "reduce_scatter":
        return lambda: ours.reduce_scatter(t.input, group=over, out=t.output, algorithm=algorithm)
    if op == "all_to_all":
        return lambda: ours.all_to_all(t.input, over, out=t.output, algorithm=algorithm)
    if op == "scatter":
        given = t.input.view(t.world, -1) if root else None
        return lambda: ours.scatter(t.output, given, group=over, algorithm=algorithm)
    if op == "gather":

        def gather() -> None:
            found = ours.gather(t.input, group=over, algorithm=algorithm)
            if found is not None:
                t.output.copy_(found.view(-1))

        return gather
    if op == "send_recv":
        if root:
            return lambda: ours.send(t.input, t.world - 1, over)
        return (lambda: ours.receive(t.input, 0, over)) if last else (lambda: None)
    return lambda: ours.barrier(over, algorithm=algorithm)


@contextmanager
def opened(group: Group, settings: Settings) -> Iterator[Groups]:
    """A group of all ranks for each transport. Ranks that nobody has joined yet are joined for as long."""
    if set(settings.transports) & {*ZERO_COPY_TRANSPORTS, IN_PYTHON}:
        from shoal.comm.backend.registration import install

        install()
    ours = not dist.is_initialized()
    if ours:
        _join(group)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if "nccl" in settings.transports else torch.device("cpu")
    try:
        yield Groups(device, {name: _made(name) for name in settings.transports})
    finally:
        if ours:
            dist.destroy_process_group()


def _made(transport: str) -> dist.ProcessGroup:
    if transport == IN_PYTHON:
        return _made_in_python()
    made = dist.new_group(backend=transport, timeout=TIMEOUT)
    assert isinstance(made, dist.ProcessGroup)
    if transport in ZERO_COPY_TRANSPORTS:
        from shoal.comm.backend.groups import backend_of

        if backend_of(made) is None:
            raise UserError(f"the transport {transport!r} fell back to gloo; the line above says why.")
    return made


def _made_in_python() -> dist.ProcessGroup:
    from shoal.comm.backend.in_python.group import PythonGroup

    said = io.StringIO()  # what a group says that has to do without: here it was asked to
    with _without_compiled_parts(), redirect_stderr(said):
        made = dist.new_group(backend="shm", timeout=TIMEOUT)
    if not isinstance(made, PythonGroup):
        raise UserError(f"the transport {IN_PYTHON!r} is not to be had: {said.getvalue().strip()}.")
    return made


@contextmanager
def _without_compiled_parts() -> Iterator[None]:
    before = os.environ.get("SHOAL_NATIVE")
    os.environ["SHOAL_NATIVE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SHOAL_NATIVE"]
        else:
            os.environ["SHOAL_NATIVE"] = before


def _join(group: Group) -> None:
    """One process group of the ranks that an agent forked; its store listens on a free port of this host."""
    make = torch._C._distributed_c10d.TCPStore
    store = make("127.0.0.1", 0, group.world, True, wait_for_workers=False) if group.rank == 0 else None
    port = int(group.gather(str(store.port if store else 0).encode())[0])
    store = store or make("127.0.0.1", port, group.world, False)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.world, timeout=TIMEOUT)
