"""What a plan says about activations, applied to a model in place."""

from collections.abc import Callable

import torch
from torch import nn

from shoal.errors import UserError
from shoal.memory.away import Away
from shoal.memory.blocks import find_blocks
from shoal.memory.meter import Meter
from shoal.memory.places import Disk, Host
from shoal.memory.recompute import Block
from shoal.memory.store import Here, Store
from shoal.recipe.memory_plan import MemoryPlan


def set_up(module: nn.Module, plan: MemoryPlan, tell: Callable[[str], None] = print) -> list[Block]:
    """Wrap the blocks that a plan recomputes or offloads; [] for none. Parameters and their names stay what they are.

    Gradients keep their bits. ``tell`` hears it once when what is offloaded finds no more room. Raises UserError when
    the model has no list of blocks, when a pattern fits none, and when there is no place to offload to."""
    if plan.recompute == "none" and plan.offload_activations == "none":
        return []
    meter = Meter()
    meter.ignore([*module.parameters(), *module.buffers()])
    found = find_blocks(module, plan.blocks)
    if not found:
        raise UserError(
            f"plan: memory.recompute and memory.offload_activations work on blocks, and {type(module).__name__} has no "
            f"list of layers: name its modules in plan.memory.blocks."
        )
    store = _store(plan, meter, next((p.device for p in module.parameters()), torch.device("cpu")), tell)
    blocks = []
    for number, (name, child) in enumerate(found.items()):
        recomputed = plan.recompute != "every" or number % plan.recompute_every == 0
        if recomputed or store.moves:
            blocks.append(Block(name, child, store))
            if plan.recompute == "selective":
                blocks[-1].mode, blocks[-1].dropped = "selective", frozenset(plan.recompute_operations)
            elif plan.recompute != "none" and recomputed:
                blocks[-1].mode = "full"
    return blocks


def _store(plan: MemoryPlan, meter: Meter, device: torch.device, tell: Callable[[str], None]) -> Store:
    if plan.offload_activations == "none":
        return Here(meter)
    if plan.offload_activations == "disk":
        return Away(meter, Disk(device, plan.offload_dir), tell)
    if device.type == "cpu":
        raise UserError(
            "plan: memory.offload_activations = 'host' is for accelerators, and this worker computes on the host "
            "itself: use 'disk'."
        )
    return Away(meter, Host(device), tell)
