"""A group of torch.distributed whose collectives go over shared memory in Python; what is left goes through gloo.

torch 2.13 lets Python be a whole ProcessGroup, not one of its backends: this one takes the calls on tensors on cpu, and
holds a gloo backend, to which torch itself brings all that is not defined here (send and recv, sparse tensors)."""

# mypy: disable-error-code="override, assignment, call-arg"
# one signature takes all overloads that torch declares for each call; it does not declare the maker that Python needs

import os
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from shoal.comm.backend.in_python.arguments import (
    Unusable,
    bring_back,
    check,
    cut,
    only,
    room_for,
    row_of,
    same_count,
    tensors_of,
)
from shoal.comm.backend.in_python.calls import Calls, CallWork
from shoal.comm.backend.in_python.chunks import Chunks, wording
from shoal.comm.backend.in_python.lines import Failure, Lines
from shoal.comm.backend.in_python.sums import can_reduce, name_of

Options = Any  # one of torch's many, or what stands in its place in a short form of the call
Act = Callable[[float], None]  # gets its time limit in seconds; 0: the group's


class Local:
    """What the ranks of a host share: memory, and words."""

    def __init__(
        self,
        file: int,
        place: int,
        world: int,
        connections: Mapping[int, socket.socket],
        watches: Mapping[int, int],
        pids: Sequence[int],
        name: str,
        timeout_s: float,
    ) -> None:
        """The descriptors stay the caller's. Raises OSError where the memory cannot be mapped."""
        lines = Lines(
            place,
            {rank: connection.dup() for rank, connection in connections.items()},
            {rank: os.dup(watch) for rank, watch in watches.items()},
            pids,
            name,
            timeout_s,
        )
        try:
            self.chunks = Chunks(file, lines)
        except OSError:
            lines.close()
            raise
        self.lines = lines
        self.close = weakref.finalize(self, lines.close)


class PythonGroup(dist.ProcessGroup):
    """The methods are torch's: their arguments, and what they return."""

    def __init__(self, store: Store, rank: int, size: int, local: Local, gloo: Any, membership: Any, kind: str) -> None:
        super().__init__(rank, size)
        self.membership, self.hosts = membership, [list(range(size))]
        self._local, self._gloo, self._kind, self._store = local, gloo, kind, store
        self._calls = Calls()
        self._sequence = 0
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, gloo)

    # what torch asks of a group, and Shoal of its backends

    def getBackendName(self) -> str:
        return self._kind

    def _get_backend(self, device: torch.device) -> Any:
        return self if torch.device(device).type == "cpu" else super()._get_backend(device)

    def get_group_store(self) -> Store:
        return self._store

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._local.lines.timeout_s)

    def set_timeout(self, timeout: timedelta) -> None:
        self._local.lines.timeout_s = timeout.total_seconds()
        super().set_timeout(timeout)

    def _set_sequence_number_for_group(self) -> None:
        """Every group begins with 0, on all ranks."""

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    supports_splitting, supports_coalescing = True, False

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> Any:
        members = sorted(ranks)
        if self.rank() not in members:
            return None
        name = group_name or f"part {members} of {self._kind}"
        store = PrefixStore(f"{name}/", self._store)
        place, size = members.index(self.rank()), len(members)
        made = self.membership.part(store, place, size, name, timeout or self.timeout)
        if not isinstance(made, dist.ProcessGroup):
            whole = dist.ProcessGroup(store, place, size)
            whole._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, made)
            made = whole
        made._set_group_name(dist.distributed_c10d.GroupName(name))
        made._set_group_desc(group_desc or name)
        return made

    def why_aborted(self) -> str:
        return self._local.lines.why_aborted

    def abort(self) -> None:
        self._local.lines.abort(f"rank {self.rank()} aborted {self.membership.name}")
        self._gloo.abort()

    def shutdown(self) -> None:
        self._calls.close()
        self._local.close()
        self._gloo.shutdown()

    def supports_tensor_alloc(self, device: Any) -> bool:
        return False

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: Any) -> Tensor:
        """Ordinary memory: only the compiled backend works on tensors where they lie."""
        return torch.empty(size, dtype=dtype, device=device)

    def counters(self) -> dict[str, dict[str, Any]]:
        """As the compiled backend's."""
        chunks = self._local.chunks
        return {
            name: {
                "calls": counted.calls,
                "bytes": counted.bytes,
                "zero_copy_calls": 0,
                "moving_s": counted.moving_s,
                "waiting_s": dict(chunks.waiting_s.get(name, {})),
            }
            for name, counted in chunks.counted.items()
        }

    # the one way in

    def _call(self, name: str, results: Any, options: Options, act: Act, timeout: timedelta | None = None) -> CallWork:
        limit = timeout or getattr(options, "timeout", None)
        limit_s = limit.total_seconds() if limit is not None and limit > timedelta(0) else 0.0
        now = not getattr(options, "asyncOp", True)
        self._sequence += 1
        return self._calls.call(results, partial(self._carry_out, name, act, limit_s), now)

    def _carry_out(self, name: str, act: Act, limit_s: float) -> None:
        def explained() -> None:
            try:
                self._local.chunks.counting(name, lambda: act(limit_s))
            except Unusable as error:  # the others are in the call, or will be: they must not wait for this one
                with suppress(Failure):
                    self._local.chunks.meet(name, f"{name} with arguments that cannot be used", 0, limit_s)
                raise ValueError(str(error)) from None
            except Failure as failure:
                raise dist.DistBackendError(str(failure)) from None

        if torch._C._autograd._profiler_enabled():
            with torch.profiler.record_function(f"shoal:{name}"):
                explained()
        else:
            explained()

    def _root(self, root: int) -> int:
        if not 0 <= root < self.size():
            raise Unusable(f"there is no rank {root} among {self.size()}")
        return root

    def _reduces(self, op: Any, tensor: Tensor) -> str:
        name = name_of(op)
        if not can_reduce(tensor.dtype, name):
            raise Unusable(f"{name} of {str(tensor.dtype)[6:]} is not defined; use another operation, or convert first")
        return name

    # collectives that all ranks end with the same

    def allreduce(self, tensors: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        tensor = only(tensors_of(tensors), "all_reduce")
        op = getattr(opts, "reduceOp", opts or dist.ReduceOp.SUM)

        def sparse(limit_s: float) -> None:
            self._local.chunks.meet("all_reduce", wording("all_reduce of a sparse tensor", tensor), 0, limit_s)
            options = dist.AllreduceOptions()
            options.reduceOp = op
            self._gloo.allreduce([tensor], options).wait()

        act = sparse if tensor.is_sparse else partial(self._all_reduce, tensor, op)
        return self._call("all_reduce", [tensor], opts, act, timeout)

    def _all_reduce(self, tensor: Tensor, op: Any, limit_s: float) -> None:
        check(tensor)
        reduction = self._reduces(op, tensor)
        row = row_of(tensor)
        words = wording("all_reduce", row, reduction=reduction)
        self._local.chunks.all_reduce(row, reduction, words, limit_s)
        bring_back(row, tensor)

    def allreduce_coalesced(self, tensors: Any, opts: Options = None) -> Any:
        every, op = tensors_of(tensors), getattr(opts, "reduceOp", dist.ReduceOp.SUM)

        def act(limit_s: float) -> None:
            for tensor in every:
                self._all_reduce(tensor, op, limit_s)

        return self._call("all_reduce", every, opts, act)

    def broadcast(self, tensors: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        tensor = only(tensors_of(tensors), "broadcast")
        given = int(getattr(opts, "rootRank", opts or 0))

        def act(limit_s: float) -> None:
            check(tensor)
            root = self._root(given)
            row = row_of(tensor) if root == self.rank() else room_for(tensor)
            self._local.chunks.broadcast(row, root, wording("broadcast", row, root=root), limit_s)
            if root != self.rank():
                bring_back(row, tensor)

        return self._call("broadcast", [tensor], opts, act, timeout)

    def reduce(self, tensors: Any, opts: Options = None, op: Any = None, timeout: timedelta | None = None) -> Any:
        tensor = only(tensors_of(tensors), "reduce")
        given, kind = int(getattr(opts, "rootRank", opts or 0)), getattr(opts, "reduceOp", op or dist.ReduceOp.SUM)

        def act(limit_s: float) -> None:
            check(tensor)
            root, reduction = self._root(given), self._reduces(kind, tensor)
            row = row_of(tensor)
            words = wording("reduce", row, reduction=reduction, root=root)
            self._local.chunks.reduce(row, root, reduction, words, limit_s)
            if root == self.rank():
                bring_back(row, tensor)

        return self._call("reduce", [tensor], opts, act, timeout)

    def _all_gather(self, tensor: Tensor, outs: Sequence[Tensor], limit_s: float) -> None:
        check(tensor, *outs)
        if len(outs) != self.size():
            raise Unusable(f"all_gather takes an output a rank: {self.size()}")
        same_count(tensor.numel(), outs[self.rank()].numel(), "all_gather's input")
        rows, sizes = [room_for(out) for out in outs], [out.numel() for out in outs]
        words = wording("all_gather", tensor, count=sum(sizes), sizes=sizes)
        longest = max(sizes) * tensor.itemsize
        self._local.chunks.all_gather("all_gather", row_of(tensor), rows, longest, words, limit_s)
        for row, out in zip(rows, outs, strict=True):
            bring_back(row, out)

    def allgather(self, outputs: Any, inputs: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        tensor = only(tensors_of(inputs), "all_gather")
        lists = [list(outputs)] if isinstance(inputs, Tensor) else [list(one) for one in outputs]
        if len(lists) != 1:
            raise ValueError(f"all_gather takes one list of outputs, got {len(lists)}")
        return self._call("all_gather", lists, opts, partial(self._all_gather, tensor, lists[0]), timeout)

    def _gather_whole(self, out: Tensor, tensor: Tensor, limit_s: float) -> None:
        check(tensor, out)
        same_count(out.numel(), tensor.numel() * self.size(), "all_gather's output")
        row = room_for(out)
        self._all_gather(tensor.reshape(-1), list(row.view(self.size(), -1)), limit_s)
        bring_back(row, out)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Any:
        return self._call("all_gather", [output], opts, partial(self._gather_whole, output, input))

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Options = None) -> Any:
        pairs = list(zip(outputs, inputs, strict=True))

        def act(limit_s: float) -> None:
            for out, tensor in pairs:
                self._gather_whole(out, tensor, limit_s)

        return self._call("all_gather", [out for out, _ in pairs], opts, act)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Options = None) -> Any:
        """``outputs[r][i]`` takes ``inputs[i]`` of rank r."""
        lists, tensors = [list(of_rank) for of_rank in outputs], list(inputs)

        def act(limit_s: float) -> None:
            if any(len(of_rank) != len(tensors) for of_rank in lists):
                raise Unusable("all_gather_coalesced: lists of unequal lengths")
            for index, tensor in enumerate(tensors):
                self._all_gather(tensor, [of_rank[index] for of_rank in lists], limit_s)

        return self._call("all_gather", lists, opts, act)

    # collectives that each rank ends with its own of

    def _reduce_scatter(self, out: Tensor, ins: Sequence[Tensor], op: Any, limit_s: float) -> None:
        check(out, *ins)
        if len(ins) != self.size():
            raise Unusable(f"reduce_scatter takes an input a rank: {self.size()}")
        same_count(out.numel(), ins[self.rank()].numel(), "reduce_scatter's output")
        reduction, sizes = self._reduces(op, out), [part.numel() for part in ins]
        words = wording("reduce_scatter", out, reduction=reduction, count=sum(sizes), sizes=sizes)
        row = room_for(out)
        self._local.chunks.reduce_scatter([row_of(part) for part in ins], row, reduction, words, limit_s)
        bring_back(row, out)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        out = only(tensors_of(outputs), "reduce_scatter")
        lists = [list(inputs)] if isinstance(outputs, Tensor) else [list(one) for one in inputs]
        if len(lists) != 1:
            raise ValueError(f"reduce_scatter takes one list of inputs, got {len(lists)}")
        op = getattr(opts, "reduceOp", opts or dist.ReduceOp.SUM)
        return self._call("reduce_scatter", [out], opts, partial(self._reduce_scatter, out, lists[0], op), timeout)

    def _scatter_whole(self, out: Tensor, whole: Tensor, op: Any, limit_s: float) -> None:
        check(out, whole)
        same_count(whole.numel(), out.numel() * self.size(), "reduce_scatter's input")
        row = room_for(out)
        self._reduce_scatter(row.view(-1), list(row_of(whole).view(self.size(), -1)), op, limit_s)
        bring_back(row, out)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Any:
        op = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        return self._call("reduce_scatter", [output], opts, partial(self._scatter_whole, output, input, op))

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Options = None) -> Any:
        pairs, op = list(zip(outputs, inputs, strict=True)), getattr(opts, "reduceOp", dist.ReduceOp.SUM)

        def act(limit_s: float) -> None:
            for out, whole in pairs:
                self._scatter_whole(out, whole, op, limit_s)

        return self._call("reduce_scatter", [out for out, _ in pairs], opts, act)

    def gather(self, outputs: Any, inputs: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        tensor = only(tensors_of(inputs), "gather")
        given = int(getattr(opts, "rootRank", opts or 0))
        outs = list(outputs) if isinstance(inputs, Tensor) else [out for one in outputs for out in one]

        def act(limit_s: float) -> None:
            check(tensor, *outs)
            root = self._root(given)
            if root == self.rank() and len(outs) != self.size():
                raise Unusable(f"gather takes an output a rank on the root: {self.size()}")
            for out in outs if root == self.rank() else ():
                same_count(out.numel(), tensor.numel(), "gather's output")
            rows = [room_for(out) for out in outs] if root == self.rank() else None
            words = wording("gather", tensor, root=root)
            self._local.chunks.all_gather("gather", row_of(tensor), rows, tensor.nbytes, words, limit_s)
            for row, out in zip(rows or (), outs, strict=False):
                bring_back(row, out)

        return self._call("gather", [outs], opts, act, timeout)

    def scatter(self, outputs: Any, inputs: Any, opts: Options = None, timeout: timedelta | None = None) -> Any:
        out = only(tensors_of(outputs), "scatter")
        given = int(getattr(opts, "rootRank", opts or 0))
        ins = list(inputs) if isinstance(outputs, Tensor) else [part for one in inputs for part in one]

        def act(limit_s: float) -> None:
            check(out, *ins)
            root = self._root(given)
            mine = ins if root == self.rank() else None
            if mine is not None and len(mine) != self.size():
                raise Unusable(f"scatter takes an input a rank on the root: {self.size()}")
            for part in mine or ():
                same_count(part.numel(), out.numel(), "scatter's input")
            row, words = room_for(out), wording("scatter", out, root=root)
            self._local.chunks.scatter(mine and [row_of(part) for part in mine], row, root, words, limit_s)
            bring_back(row, out)

        return self._call("scatter", [out], opts, act, timeout)

    def _all_to_all(self, outs: Sequence[Tensor], ins: Sequence[Tensor], limit_s: float) -> None:
        check(*ins, *outs)
        if len(ins) != self.size() or len(outs) != self.size():
            raise Unusable(f"all_to_all takes an input and an output a rank: {self.size()}")
        rows = [room_for(out) for out in outs]
        words = wording("all_to_all", ins[0], count=-1)
        self._local.chunks.all_to_all([row_of(part) for part in ins], rows, words, limit_s)
        for row, out in zip(rows, outs, strict=True):
            bring_back(row, out)

    def alltoall(self, outputs: Any, inputs: Any, opts: Options = None) -> Any:
        outs, ins = list(outputs), list(inputs)
        return self._call("all_to_all", outs, opts, partial(self._all_to_all, outs, ins))

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Options = None,
        timeout: timedelta | None = None,
    ) -> Any:
        def act(limit_s: float) -> None:
            check(input, output)
            out = room_for(output)
            ins = cut(row_of(input), input_split_sizes, self.size(), "input")
            self._all_to_all(cut(out, output_split_sizes, self.size(), "output"), ins, limit_s)
            bring_back(out, output)

        return self._call("all_to_all", [output], opts, act, timeout)

    def barrier(self, opts: Options = None, timeout: timedelta | None = None) -> Any:
        def act(limit_s: float) -> None:
            self._local.chunks.meet("barrier", wording("barrier"), 0, limit_s)

        return self._call("barrier", [], opts, act, timeout)

    # names that torch had before
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
