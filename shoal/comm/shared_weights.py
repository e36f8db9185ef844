"""Parameters of workers of one host in one memory: each writes its own slices, and all read the whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shoal.comm.group import HostGroup
from shoal.comm.layout import ALIGNMENT, Layout, Slot
from shoal.comm.pages import resident_bytes
from shoal.comm.slices import Piece

_UPDATED = 1  # the only message kind of its channel


class SharedWeights:
    """The parameters lie on the heap in the order of the flat buffer: an all-gather that costs a barrier.

    An update goes between two barriers, that of the exchange (nobody reads the old weights any more) and `arrive`
    (everybody has written the new ones)."""

    shared = readable = True

    def __init__(
        self,
        group: HostGroup,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        frozen: Sequence[nn.Parameter] = (),
        *,
        values: Callable[[nn.Parameter], Tensor] | None = None,
    ) -> None:
        """``parameters`` in the order of the layout. ``frozen`` ones, never written, are shared too.

        ``values`` of a parameter are made by one of the workers, each some of them; None: they are rank 0's."""
        self._group, self._layout, self._values = group, layout, values
        self._words = group.split([range(group.world)]).mesh  # of their own: they come between those of the group
        self.parameters = parameters
        self._sequence = self._arrived = 0
        self._flats: dict[torch.dtype, Tensor] = {}
        self._place(parameters, layout.slots[: len(parameters)], layout.state_start)
        slots, end = [], 0
        for parameter in frozen:
            slots.append(Slot(end, parameter.numel()))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self._frozen = self._place(frozen, slots, end, keep=False)

    @torch.no_grad()
    def _place(
        self, parameters: Sequence[nn.Parameter], slots: Sequence[Slot], elements: int, *, keep: bool = True
    ) -> list[Tensor]:
        """Let the parameters lie in one flat tensor for each dtype, at these slots."""
        group = self._group
        flats: dict[torch.dtype, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            device = parameters[0].device
            on_host = device.type == "cpu"  # a lone worker with an accelerator shares nothing
            flats[dtype] = (
                group.heap.tensor(elements, dtype) if on_host else torch.zeros(elements, dtype=dtype, device=device)
            )
        views = [
            flats[p.dtype][slot.offset : slot.offset + slot.size].view(p.shape)
            for p, slot in zip(parameters, slots, strict=True)
        ]
        for parameter, view, slot in zip(parameters, views, slots, strict=True):
            if self._values is None and group.rank == 0:
                view.copy_(parameter)
            elif self._values is not None and group.rank == slot.offset * group.world // elements:
                view.copy_(self._values(parameter))
        group.gather(b"")
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
        if keep:
            self._flats = flats
        return list(flats.values())

    def piece(self, piece: Piece) -> Tensor:
        """See `Piece.of`."""
        parameter = self.parameters[piece.slot]
        return piece.of(self._flats[parameter.dtype], parameter.shape)

    def updated(self) -> None:
        """The own slices hold the new weights."""
        self._sequence += 1
        self._words.broadcast(_UPDATED, self._sequence)

    def arrive(self) -> None:
        """Wait until everybody's slices hold the new weights."""
        if self._arrived < self._sequence:
            for rank in self._words.others:
                self._words.receive(rank, _UPDATED, self._sequence)
            self._arrived = self._sequence

    def settle(self) -> None:
        self.arrive()

    def leave(self) -> None: ...

    def count_anew(self) -> None: ...

    def most_bytes(self) -> int:
        """See `GatheredWeights.most_bytes`."""
        return self.held_bytes()["parameters"]

    def held_bytes(self) -> dict[str, int]:
        """This worker's share of the memory that all of its group hold together once."""
        shared = [*self._flats.values(), *self._frozen]
        return {"parameters": sum(map(resident_bytes, shared)) // self._group.world}
