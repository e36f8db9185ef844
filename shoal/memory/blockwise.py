"""Parameters of each block on disk while other blocks work: mapped from a file, read ahead, and let go again.

A parameter stays what it is to everybody, a tensor that can be read at any time; only where its memory lies changes, so
nothing here can be too late, or wrong: what has not been read ahead is read when it is touched. (Layer by layer as in
ZeRO-Infinity, Rajbhandari et al., 2021, with the system's own paging in the place of a buffer pool.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.memory.shelves import SMALLEST, OnDisk

Tell = Callable[[str], None]


def movable(blocks: Mapping[str, nn.Module], module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each block that are worth moving and that no other part of the model uses."""
    users: dict[nn.Parameter, int] = {}
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                users[parameter] = users.get(parameter, 0) + 1
    return {
        name: [p for p in block.parameters() if users[p] == 1 and p.numel() >= SMALLEST and p.is_contiguous()]
        for name, block in blocks.items()
    }


class Blockwise:
    """Knows which block is at work, and tells the shelf what comes next and what may go."""

    def __init__(self, blocks: Mapping[str, nn.Module], parameters: Mapping[str, list[nn.Parameter]], shelf: OnDisk):
        self._shelf = shelf
        self._parameters = [parameters[name] for name in blocks]
        self._at = -1
        for number, block in enumerate(blocks.values()):
            block.register_forward_pre_hook(self._entered(number))
            block.register_forward_hook(self._left(number))
            for parameter in self._parameters[number]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._graded(number))  # type: ignore[no-untyped-call]

    def move(self, tell: Tell) -> None:
        """To the shelf, as far as there is room: said once where there is none."""
        try:
            for parameter in (p for parameters in self._parameters for p in parameters):
                moved = self._shelf.make(parameter.shape, parameter.dtype)
                self._shelf.write(moved, 0, parameter.detach().view(-1))
                parameter.data = moved
        except OSError as error:
            tell(
                f"offload to disk takes no more ({error.strerror or error}): the parameters that are left stay in "
                f"memory, and training goes on."
            )
        for number in range(len(self._parameters)):
            self._shelf.done(self._tensors(number))

    def _tensors(self, number: int) -> list[Tensor]:
        return [p.detach() for p in self._parameters[number]] if 0 <= number < len(self._parameters) else []

    def _entered(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._shelf.ahead(self._tensors(number + 1))

        return hook

    def _left(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            last = number == len(self._parameters) - 1
            if not (last and torch.is_grad_enabled()):  # the backward pass begins with the last one
                self._shelf.done(self._tensors(number))
            self._at = number

        return hook

    def _graded(self, number: int) -> Callable[[Any], None]:
        def hook(_: Any) -> None:
            if self._at == number:
                return
            self._shelf.done(self._tensors(self._at))
            self._at = number
            self._shelf.ahead(self._tensors(number - 1))

        return hook
