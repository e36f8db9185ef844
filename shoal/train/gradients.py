"""From backward passes to one mean gradient: accumulate in tree order, reduce while the last pass still runs."""

import json
from collections.abc import Callable, Sequence
from functools import partial

import torch

from shoal.comm.exchange import Exchange, HeapExchange, Placement
from shoal.comm.group import Group
from shoal.comm.layout import Layout
from shoal.comm.mesh import PeerLost
from shoal.comm.tree import Accumulate, Accumulation
from shoal.errors import UserError
from shoal.train.checksum import parameter_checksum
from shoal.train.figures import CHANGE, CHECKSUM, FIRED, STOP, TOUCHED, WAITED, StepFigures, figures_of
from shoal.train.kept import CutShort, Kept, Sums
from shoal.train.noise import PassSquares
from shoal.train.trained import UNSHARED, Trained, storage_users

ExchangeFactory = Callable[[Layout, int, Callable[[torch.Tensor], tuple[float, float]], torch.dtype], Exchange]


class Gradients:
    """Hooks on parameters that carry their gradients into the exchange's buffers.

    A pass is `open`, a backward pass, `close`. After it no parameter holds a gradient; after `reduce` and `hang` each
    holds the global mean."""

    def __init__(
        self,
        trained: Trained,
        placement: Placement,
        leaves: int,
        make_exchange: ExchangeFactory,
        *,
        copies: int = 1,
        measures: bool = False,
    ) -> None:
        """``copies``: how many workers make passes of each leaf, each for a part of it. ``measures``: see `noise`."""
        self._placement = self._usual = placement
        self.leaves, self._copies, self.dtype = leaves, copies, trained.dtype
        self.names = list(trained.parameters)
        self.parameters = list(trained.parameters.values())
        self._state = [trained.real(buffer) for buffer in trained.buffers.values()]
        self.layout = trained.layout
        facts = FIRED + len(self.parameters) + 2 * leaves
        self.noise = PassSquares(facts, leaves, measures=measures)  # how noisy passes are
        self.exchange = make_exchange(self.layout, facts + self.noise.width, self._denominators, trained.dtype)
        self._buckets_of = [self.layout.buckets_of(slot) for slot in range(len(self.layout.slots))]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self.parameters)
        ]
        self._views: list[Sums] = []  # of each slot: in the flat buffers
        self._at: list[Sums] = []  # the same in the step under way, adopted gradients and further sums among them
        self._state_views: list[Sums] = []
        self._state_at: list[Sums] = []
        self._viewed: list[int] = []
        self._passes: tuple[int, ...] = ()
        self._program = self._state_program = Accumulation((), 0, 0)
        self._now: Accumulate | None = None
        self._last = self._claimed = False
        self._fired: list[bool] = []  # parameters that the pass under way has reached
        self._used: list[bool] = []  # parameters that any pass of the step has reached
        self._open: list[int] = []
        self._done = self._leaf_ends = self._posted = 0
        self._leaf = self._opened = -1
        self._begun_state: list[torch.Tensor] = []
        self._votes = self._careful = False
        self._brought: Kept | None = None  # sums that the next step begins with
        self._lost: PeerLost | None = None  # found out in the middle of a pass
        self._left: float | None = None  # the checksum of the parameters as the last update left them
        self.watched: Sequence[torch.Tensor] = self.parameters  # of which checksums are taken
        self.spoilt: list[tuple[int, str]] = []  # (leaf, parameter), of a careful step
        self.remembers = True  # the parameters stay as an update leaves them until the next one

    # --- one step ---------------------------------------------------------------------------------------------

    def begin(
        self,
        passes: tuple[int, ...],
        *,
        stop: bool,
        change: bool = False,
        votes: bool = False,
        careful: bool = False,
    ) -> None:
        """Start a step in which leaf i has ``passes[i]`` backward passes, over all workers.

        ``votes``: the checksum is taken when the last pass has used the parameters: whatever has changed them up to
        then is found in this step. ``careful``: look at the gradient of each pass for what is not finite."""
        self._passes, self._votes, self._careful, self.spoilt = passes, votes, careful, []
        if votes and self.remembers and self._left is None and len(self.exchange.all_facts) == 2:
            self.remember()
        self._begun_state = [b.clone() for b in self._state]
        self._program = self._placement.accumulation(passes)
        self._state_program = self._placement.accumulation(tuple(min(1, p) for p in passes))
        self.exchange.begin(passes)
        self._bind()
        self._at = [dict(views) for views in self._views]
        self._state_at = [dict(views) for views in self._state_views]
        self._open = [0] * len(self.layout.buckets)
        for buckets in self._buckets_of:
            for bucket in buckets:
                self._open[bucket] += 1
        self._used = [False] * len(self.parameters)
        self._done = self._leaf_ends = self._posted = 0
        self._claimed = False
        self._lost = None
        self._leaf = -1
        facts = self.exchange.facts
        facts.zero_()
        facts[STOP], facts[CHANGE] = float(stop), float(change)
        for parameter in self.parameters:
            parameter.grad = None
        if self._brought is not None:
            self._bring(self._brought)
            self._brought = None

    def deal(self, placement: Placement | None, passes: tuple[int, ...] = (), kept: Kept | None = None) -> None:
        """Other workers bring other sums to the next steps, this one ``kept``; None: the usual ones again.

        Called by all alike, between two steps."""
        assert isinstance(self.exchange, HeapExchange)
        self._placement, self._brought = placement or self._usual, kept
        self.exchange.deal(self._placement, passes or (1,) * self.leaves)

    @torch.no_grad()
    def _bring(self, kept: Kept) -> None:
        self._claim()
        self._used = list(kept.used)
        base = FIRED + len(self.parameters)
        for number, (node, sums) in enumerate(zip(kept.nodes, kept.sums, strict=True)):
            for views, held in zip((*self._views, *self._state_views), sums, strict=True):
                views[number].copy_(held)
            for first in (base, base + self.leaves, *self.noise.starts):
                told = slice(first + node.start, first + node.stop)
                self.exchange.facts[told] = kept.facts[told]

    @property
    def leaves_of_step(self) -> Sequence[int]:
        """Those that this worker computes in the step under way, or in the next one."""
        return self._placement.leaves

    def cut_short(self, step: int) -> CutShort | None:
        """What this worker has done of ``step``, which nobody will end; None when it has not begun, or is reduced."""
        if not self._at or not isinstance(self.exchange, HeapExchange):
            return None
        programs, done = (self._program, self._state_program), (self._done, self._leaf_ends)
        sums, facts = (self._at, self._state_at), self.exchange.facts.clone()
        return CutShort(step, self.exchange, self._placement, programs, self._passes, done, sums, facts, self._used)

    def _bind(self) -> None:
        """Views of every slot in every partial sum; made again only when these are others."""
        buffers = self.exchange.partials
        identity = [b.data_ptr() for b in buffers]
        if identity == self._viewed:
            return
        self._viewed = identity
        count = len(self.parameters)
        shapes = [p.shape for p in self.parameters] + [b.shape for b in self._state]
        views = [
            {number: b[s.offset : s.offset + s.size].view(shape) for number, b in enumerate(buffers)}
            for s, shape in zip(self.layout.slots, shapes, strict=True)
        ]
        self._views, self._state_views = views[:count], views[count:]

    def enter_leaf(self, leaf: int) -> None:
        """Before the first forward pass of a leaf: buffers start from the step's first state."""
        if leaf != self._leaf:
            self._leaf = leaf
            self.undo()

    def undo(self) -> None:
        """Buffers are as they were when the step began."""
        with torch.no_grad():
            for buffer, begun in zip(self._state, self._begun_state, strict=True):
                buffer.copy_(begun)

    def open(self, leaf: int, value: float, count: float, *, waited_s: float) -> None:
        """Before a backward pass, the next one of the program, of a loss of ``value``, a sum over ``count`` targets.

        ``waited_s`` is how long this worker has waited for data in the step so far."""
        base = FIRED + len(self.parameters)
        self._opened = leaf
        self.exchange.facts[WAITED] = waited_s
        self.exchange.facts[base + leaf] += value
        self.exchange.facts[base + self.leaves + leaf] += count
        self.noise.opens(leaf, count)
        self._claim()
        self._now = self._program.passes[self._done]
        self._done += 1
        self._last = self._done == len(self._program.passes)
        self._fired = [False] * len(self.parameters)

    def close(self) -> None:
        """After the backward pass."""
        for index, fired in enumerate(self._fired):
            if not fired:
                self._absent(index)
        self.noise.fold(self.exchange.facts)
        self._now = None
        if self._last or self._lost is not None:
            self._post_ready()

    def _claim(self) -> None:
        if not self._claimed:
            self._claimed = True
            self.exchange.claim()

    @torch.no_grad()
    def leave_leaf(self) -> None:
        """After the last forward pass of a leaf: what it changed in the buffers is accumulated as gradients are."""
        self._claim()
        now = self._state_program.passes[self._leaf_ends]
        self._leaf_ends += 1
        last = self._leaf_ends == len(self._state_program.passes)
        count = len(self.parameters)
        for index, (buffer, begun) in enumerate(zip(self._state, self._begun_state, strict=True)):
            if buffer.dtype == torch.bool:
                change = begun ^ buffer
            else:  # an infinity that stays (a mask) has not changed, though inf - inf is not a number
                change = torch.where(buffer == begun, torch.zeros_like(buffer), buffer - begun)
            self._put(self._state_at[index], change, now)
            if last:
                self._finish_slot(count + index)

    def _arrived(self, index: int, parameter: torch.Tensor) -> None:
        now = self._now
        if now is None:
            return  # a backward pass outside of a step: the user's own business
        gradient = parameter.grad
        parameter.grad = None
        self._fired[index] = True
        if gradient is None:
            return
        if gradient.is_sparse:
            raise UserError(f"parameter {self.names[index]!r} has a sparse gradient: use a dense one (sparse=False).")
        self._used[index] = True
        self.noise.saw(gradient)
        if self._careful and not bool(gradient.isfinite().all()):
            self.spoilt.append((self._opened, self.names[index]))
        with torch.no_grad():
            if now.first:
                self._adopt(index, now.buffer, gradient)
            self._put(self._at[index], gradient, now)
        if self._last:
            self._finish_slot(index)
            self._post_ready()

    def _absent(self, index: int) -> None:
        """A parameter that this pass did not use: its gradient is zero, which is added like any other.

        Leaving the addition out would keep a -0.0 where another placement has -0.0 + 0.0 = 0.0."""
        views = self._at[index]
        assert self._now is not None
        with torch.no_grad():
            zero = views[0].new_zeros(()).expand_as(views[0])
            self._put(views, zero, self._now)
        if self._last:
            self._finish_slot(index)

    def _adopt(self, index: int, buffer: int, gradient: torch.Tensor) -> None:
        """Let a gradient that comes first stay where it is and be the buffer, where that can be: a copy saved."""
        view = self._views[index][0]
        if gradient.dtype != view.dtype or gradient.stride() != view.stride() or storage_users(gradient) > UNSHARED:
            return
        if buffer >= len(self.exchange.partials) or self.exchange.adopt(buffer, index, gradient):
            self._at[index][buffer] = gradient

    def _put(self, sums: Sums, value: torch.Tensor, now: Accumulate) -> None:
        """A sum beside the partial ones is made when its first value cannot stay where it is, and goes once added."""
        held = sums.get(now.buffer)
        if held is None:
            sums[now.buffer] = torch.empty_like(sums[0]).copy_(value)
        elif not now.first:
            held.add_(value)
        elif held is not value:
            held.copy_(value)
        for add in now.then:
            sums[add.into].add_(sums[add.other])
            if add.other >= len(self.exchange.partials):
                del sums[add.other]

    def _finish_slot(self, slot: int) -> None:
        for bucket in self._buckets_of[slot]:
            self._open[bucket] -= 1

    def _post_ready(self) -> None:
        """Hand over the buckets that are complete, in order, and reduce what has come meanwhile.

        A peer that is lost within a pass is told of after it: half a pass would spoil the sums that it is added to."""
        if self._lost is None:
            try:
                self._hand_over()
            except PeerLost as lost:
                self._lost = lost
        if self._lost is not None and self._now is None:
            raise self._lost

    def _hand_over(self) -> None:
        before = self._posted
        while self._posted < len(self._open) and self._open[self._posted] == 0:
            if self._posted == len(self._open) - 1:
                used = self.exchange.facts[FIRED : FIRED + len(self._used)]
                used.copy_(torch.tensor(self._used, dtype=torch.float64))
                self.noise.fold(self.exchange.facts)
                self._vote()
            self.exchange.post()
            self._posted += 1
        if self._posted > before:
            self.exchange.advance()

    def _vote(self) -> None:
        if self._votes:
            self.exchange.facts[CHECKSUM] = found = parameter_checksum(self.watched)
            self.exchange.facts[TOUCHED] = float(self._left is not None and self._left != found)

    def remember(self) -> None:
        """Keep what an update has left: of two workers that differ, the one whose parameters changed since is wrong."""
        self._left = parameter_checksum(self.watched)

    # --- its end ----------------------------------------------------------------------------------------------

    def origins(self, group: Group) -> set[int]:
        """After `reduce`, before `hang`: the ranks whose own partial sums hold what is not finite. Called by all.

        A sum that another one has been added to, which is not finite, says nothing of its own worker, nor does one
        whose memory has been given back."""
        mine = [
            each
            for each in range(len(self.exchange.partials))
            if self.exchange.keeps_sums and not all(bool(views[each].isfinite().all()) for views in self._at)
        ]
        rows = [json.loads(row) for row in group.gather(json.dumps(mine).encode())]
        operands = [(rank, each) for rank, count in enumerate(self._placement.partials(self._passes))
                    for each in range(count)]  # fmt: skip
        spoilt = {number for number, (rank, each) in enumerate(operands) if each in rows[rank]}
        added = {add.into for add in self._placement.adds(self._passes) if add.other in spoilt}
        return {operands[number][0] for number in spoilt - added}

    def reduce(self) -> torch.Tensor:
        """Wait for the global mean gradient; the sums of squares of its blocks, as `Exchange.finish` gives them."""
        if self._done != len(self._program.passes):
            raise UserError(
                f"commit came after {self._done} of {len(self._program.passes)} backward passes of this worker: "
                f"call backward once for each micro-batch of the step."
            )
        self._open = [0] * len(self._open)
        self._post_ready()
        return self.exchange.finish()

    @torch.no_grad()
    def hang(self, factor: float = 1.0, *, keep_gradients: bool = True) -> None:
        """Hang the mean gradient on the parameters, times ``factor``, and give the buffers their new state.

        ``keep_gradients``: the optimiser is known not to write to p.grad; else every worker gets a copy of its own."""
        if factor != 1.0:
            self.exchange.scale(factor)
        copy = self.exchange.shared_result and not keep_gradients
        self._at = []
        unused = set(self.unused())
        for index, parameter in enumerate(self.parameters):
            if self.exchange.sliced_result:
                parameter.grad = None
                continue
            mean = self.exchange.result_of(index).view(parameter.shape)
            if mean.stride() != parameter.stride():  # fused optimisers take both in the order of memory
                mean = torch.empty_like(parameter, dtype=mean.dtype).copy_(mean)
            elif copy:
                mean = mean.clone()
            parameter.grad = None if index in unused else mean.to(parameter.grad_dtype or parameter.dtype)
        self.undo()
        for index, buffer in enumerate(self._state, start=len(self.parameters)):
            change = self.exchange.result_of(index).view(buffer.shape)
            if buffer.dtype == torch.bool:
                buffer.logical_xor_(change > 0)
            else:
                buffer.add_(change.to(buffer.dtype))
        self._begun_state = []

    def release(self) -> None:
        """Let go of the module: no hook of this object acts any more, and what a step in flight has done is undone."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            parameter.grad = None
        self._at = []
        if self._begun_state:
            self.undo()

    def unused(self) -> list[int]:
        """The parameters that no pass of the finished step has reached, by number."""
        used = self.exchange.all_facts[:, FIRED : FIRED + len(self.parameters)].any(dim=0).tolist()
        return [index for index, reached in enumerate(used) if not reached]

    def sums_bytes(self, passes: tuple[int, ...]) -> int:
        """What sums of gradients take in a step: an adopted gradient lies in the place of its part of one."""
        return self.layout.elements * self.dtype.itemsize * self._placement.accumulation(passes).buffers

    @property
    def checksums(self) -> list[float]:
        """Of each worker's parameters, after `reduce`; 0.0 when not taken."""
        found: list[float] = self.exchange.all_facts[:, CHECKSUM].tolist()
        return found

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The module's buffers, as real numbers, in the order of the flat layout."""
        return self._state

    @property
    def kept(self) -> list[bool]:
        """Of each worker: whether it has seen no change of its parameters since its own last update."""
        return [not touched for touched in self.exchange.all_facts[:, TOUCHED].tolist()]

    def let_go(self, slots: Sequence[int]) -> None:
        """Nobody will read these slots of this worker's partial sums any more in this step: ZeRO-2 frees them."""
        for slot in slots:
            if slot < len(self._at):
                self._at[slot] = {}

    def first_not_finite(self) -> str:
        """The first parameter, in the model's order, whose gradient is not finite; "" for none."""
        if self.exchange.sliced_result:
            from shoal.comm.sliced import SlicedExchange
            from shoal.comm.sliced_heap import SlicedHeapExchange

            assert isinstance(self.exchange, SlicedExchange | SlicedHeapExchange)
            found = self.exchange.not_finite()
            return self.names[max(found)] if found else ""
        for index in reversed(range(len(self.names))):
            if not bool(self.exchange.result_of(index).isfinite().all()):
                return self.names[index]
        return ""

    def _denominators(self, facts: torch.Tensor) -> tuple[float, float]:
        counts = facts[:, FIRED + len(self.parameters) + self.leaves :][:, : self.leaves]
        return max(float(counts.sum()), 1.0), float(self._copies * sum(1 for passes in self._passes if passes))

    def figures(
        self, norm: float, facts: torch.Tensor | None = None, passes: Sequence[int] | None = None
    ) -> StepFigures:
        """What the rows of workers, [workers, facts], say of a step with these passes a leaf; by default this one."""
        facts = self.exchange.all_facts if facts is None else facts
        passes = self._passes if passes is None else passes
        base, targets = FIRED + len(self.parameters), self._denominators(facts)[0]
        return figures_of(facts, facts[:, base : base + self.leaves], passes, targets, norm)
