"""Parameters come in block by block while the model runs, and (ZeRO-3) go again: hooks on the model's blocks.

Each block's buckets are asked for one block ahead, on the way forward and on the way back, in the fixed order of
`gather_order`: that lets workers have passes of different numbers, and blocks that do not run in every one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from shoal.comm.gathered_weights import GatheredWeights
from shoal.comm.layout import Layout
from shoal.comm.slices import Piece
from shoal.errors import RunFailed, UserError
from shoal.memory.blocks import find_blocks
from shoal.train.gather_order import Order, order_of


class BlockWeights:
    """What `Sharded` calls Weights, for workers that share no memory.

    ``releases``: parameters of a block are on a worker only while it needs them. Else all are there, a little later
    than the step begins."""

    shared = False

    def __init__(
        self,
        weights: GatheredWeights,
        module: nn.Module,
        layout: Layout,
        passes: Callable[[], tuple[int, int]],
        *,
        releases: bool,
    ) -> None:
        """``passes``: in the step under way, those of this worker, and the most that a worker of its group has."""
        self.weights, self.parameters, self._releases, self._passes_due = weights, weights.parameters, releases, passes
        blocks = find_blocks(module)
        self.names = list(blocks)
        self.order, own = order_in(module, weights.parameters, layout)
        self._settled = True  # everything is here, and stays
        self._open = self._back = False  # a pass is under way; it is on its way back
        self._issued = self._passes = 0  # buckets of the sweep that were asked for; passes of this step
        self._done: set[int] = set()  # blocks that have run in this sweep
        self._trained = [len(members) for members in own]
        self._left = list(self._trained)  # parameters of each block whose gradient this pass still owes
        self._contexts: list[Any] = []
        self._hooks: list[RemovableHandle] = []
        for index, block in enumerate(blocks.values()):
            self._hooks.append(block.register_forward_pre_hook(partial(self._before, index)))
            if releases:
                self._hooks.append(block.register_forward_hook(partial(self._after, index), always_call=True))
        if releases:
            for slot, parameter in enumerate(weights.parameters):
                users = [index for index, members in enumerate(own) if slot in members]
                arrived = partial(self._arrived, users)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    # --- between steps ----------------------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        return self._settled

    def piece(self, piece: Piece) -> Tensor:
        return self.weights.piece(piece)

    def updated(self) -> None:
        """The own slices hold the new weights: what others own of them has to come in anew."""
        for bucket in self.order.forward:
            (self.weights.release if self._releases else self.weights.stale)(bucket)
        for bucket in self.order.always:
            self.weights.stale(bucket)
        self._settled, self._passes = False, 0
        self._start(self.order.always)
        if not self._releases:
            self._start(self.order.forward)

    def arrive(self) -> None:
        """Until what lies in no block is here; blocks come as they are needed."""
        if self._settled and self._releases:
            for bucket in self.order.forward:
                self.weights.release(bucket)
            self.weights.count_anew()
        self._settled = False
        self._start(self.order.always)
        for bucket in self.order.always:
            self.weights.wait(bucket)

    def settle(self) -> None:
        """Until everything is here. Called by all workers, between two steps."""
        self._start((*self.order.always, *self.order.forward))
        for bucket in (*self.order.always, *self.order.forward):
            self.weights.wait(bucket)
        self._settled = True

    def leave(self) -> None:
        """Also in the middle of a pass."""
        for hook in self._hooks:
            hook.remove()
        while self._contexts:
            self._contexts.pop()[1].__exit__()
        self._settled = True

    def _start(self, buckets: Sequence[int]) -> None:
        for bucket in buckets:
            self.weights.start(bucket)

    def count_anew(self) -> None:
        self.weights.count_anew()

    def most_bytes(self) -> int:
        return self.weights.most_bytes()

    def held_bytes(self) -> dict[str, int]:
        return self.weights.held_bytes()

    # --- in a pass --------------------------------------------------------------------------------------------

    def _before(self, block: int, module: nn.Module, inputs: Any) -> None:
        if self._settled:
            return
        if not self._releases:
            for bucket in self.order.needs[block]:
                self.weights.wait(bucket)
            return
        if _computing_again():
            self._turn()
        elif self._back or not self._open:
            self._begin_pass()
        elif block in self._done:
            raise UserError(
                f"block {self.names[block]!r} ran twice in one pass, and with states = 'zero3' its parameters had "
                f"gone by then: use states = 'zero2', or call worker.settle() before runs of the model of your own."
            )
        self._need(block)
        if torch.is_grad_enabled():
            context = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, self._saved)
            context.__enter__()
            self._contexts.append((block, context))

    def _after(self, block: int, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._contexts and self._contexts[-1][0] == block:
            self._contexts.pop()[1].__exit__()
        if self._settled or _computing_again():
            return
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._returning, block))  # type: ignore[no-untyped-call]
        self._finish(block)

    def _returning(self, block: int, gradient: Tensor) -> None:
        if not self._settled:
            self._turn()
            self._need(block)

    def _saved(self, tensor: Tensor) -> Tensor:
        """What a backward pass takes up again: parameters have to be here."""
        bucket = None if self._settled else self.weights.bucket_at(tensor.data_ptr())
        if bucket is not None and bucket not in self.weights.here:
            self._returning(next(i for i, needs in enumerate(self.order.needs) if bucket in needs), tensor)
        return tensor

    def _arrived(self, blocks: Sequence[int], parameter: Tensor) -> None:
        if self._settled or not self._open:
            return
        self._turn()  # also where no block has a part in the backward pass
        for block in blocks:
            self._left[block] -= 1
            if not self._left[block]:
                self._finish(block)

    def _need(self, block: int) -> None:
        self._issue_to(self.order.position(block, self._back))
        following = self.order.after(block, self._back)
        if following is not None:
            self._issue_to(self.order.position(following, self._back))
        for bucket in self.order.needs[block]:
            self.weights.wait(bucket)
            if bucket not in self.weights.here:
                raise RunFailed(
                    f"block {self.names[block]!r} was needed again after its part of the "
                    f"{'backward' if self._back else 'forward'} pass: states = 'zero2' keeps its parameters."
                )

    def _issue_to(self, position: int) -> None:
        if position > self._issued:
            self._start(self.order.sweep(self._back)[self._issued : position])
            self._issued = position

    def _finish(self, block: int) -> None:
        """A block needs its parameters no more in this sweep."""
        self._done.add(block)
        for bucket in self.order.needs[block]:
            over = all(other in self._done for other, needs in enumerate(self.order.needs) if bucket in needs)
            if over and (self._back or bucket not in self.order.kept):
                self.weights.release(bucket)

    def _begin_pass(self) -> None:
        if self._open:
            self._end_pass()
        self._open, self._passes = True, self._passes + 1
        self._sweep(back=False)

    def _sweep(self, *, back: bool) -> None:
        self._back, self._issued = back, 0
        self._done.clear()
        self._left = list(self._trained)

    def _turn(self) -> None:
        """The way back begins."""
        if not self._back:
            self._run_out()
            self._sweep(back=True)

    def _end_pass(self) -> None:
        self._turn()
        self._run_out()
        self._open = False

    def _run_out(self) -> None:
        """Take part in what is left of the sweep, and let go of what no block has asked for."""
        sweep = self.order.sweep(self._back)
        leaves = [*sweep, *(self.order.kept if self._back else ())]
        for bucket in sweep[self._issued :]:
            self.weights.start(bucket)
            if self._back or bucket not in self.order.kept:
                self.weights.release(bucket)
        self._issued = len(sweep)
        for bucket in leaves:
            if self._back or bucket not in self.order.kept:
                self.weights.release(bucket)

    def complete(self) -> None:
        """At the end of a step: take part in the gathers of workers that have more passes than this one."""
        if not self._releases or not self.order.needs:
            return
        if self._open:
            self._end_pass()
        own, most = self._passes_due()
        if self._passes != own:
            raise UserError(
                f"the model's blocks ran {self._passes} times forward in a step of {own} micro-batches: with states = "
                f"'zero3', run the model once for each, and call worker.settle() before runs of your own."
            )
        for _ in range(own, most):
            self._begin_pass()
            self._end_pass()
        self._passes = 0


def order_in(module: nn.Module, parameters: Sequence[nn.Parameter], layout: Layout) -> tuple[Order, list[list[int]]]:
    """In which order the parameters of a model's blocks come in, and their slots, of each block."""
    blocks = list(find_blocks(module).values())
    slots = {id(parameter): slot for slot, parameter in enumerate(parameters)}
    own = [[slots[id(p)] for p in block.parameters() if id(p) in slots] for block in blocks]
    ends = [slots[id(p)] for p in _outside(module, blocks) if id(p) in slots]
    return order_of(_buckets(layout, ends), [_buckets(layout, members) for members in own]), own


def _outside(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of modules that are in no block, those that a block has too among them."""
    if any(module is block for block in blocks):
        return
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        yield from _outside(child, blocks)


def _buckets(layout: Layout, slots: Sequence[int]) -> set[int]:
    return {bucket for slot in slots for bucket in layout.buckets_of(slot)}


def _computing_again() -> bool:
    """Whether a forward pass runs inside of a backward pass."""
    running: int = torch._C._current_graph_task_id()
    return running != -1
