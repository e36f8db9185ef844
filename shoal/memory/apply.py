"""Recomputation as a plan asks for it, applied to a model in place."""

import torch
from torch import nn

from shoal.memory.blocks import find_blocks
from shoal.memory.meter import Hold, Meter
from shoal.memory.recompute import Block
from shoal.recipe.memory_plan import MemoryPlan


class _Here:
    """What a block needs again stays where it is."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def keep(self, tensor: torch.Tensor) -> Hold:
        return self.meter.hold(tensor)


def recompute(module: nn.Module, plan: MemoryPlan) -> list[Block]:
    """Wrap the blocks that ``plan.recompute`` names; [] for "none". Parameters and their names stay what they are.

    Gradients keep their bits. Raises UserError when the model has no list of blocks, or a pattern fits none."""
    if plan.recompute == "none":
        return []
    meter = Meter()
    meter.ignore([*module.parameters(), *module.buffers()])
    every = plan.recompute_every if plan.recompute == "every" else 1
    chosen = list(find_blocks(module, plan.blocks).items())[::every]
    blocks = [Block(name, child, _Here(meter)) for name, child in chosen]
    for block in blocks:
        block.mode = "selective" if plan.recompute == "selective" else "full"
        block.dropped = frozenset(plan.recompute_operations) if plan.recompute == "selective" else frozenset()
    return blocks
