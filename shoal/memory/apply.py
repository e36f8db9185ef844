"""What a plan says about activations, applied to a model in place."""

from collections.abc import Callable, Mapping

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


def set_up(
    module: nn.Module,
    plan: MemoryPlan,
    tell: Callable[[str], None] = print,
    say: Callable[[str], None] = print,
    *,
    blocks: Mapping[str, nn.Module] | None = None,
) -> list[Block]:
    """Wrap the blocks that a plan recomputes or offloads; [] for none. Parameters and their names stay what they are.

    Gradients keep their bits. Under a budget all blocks are wrapped, and do nothing until `keep_budget` chooses.
    ``blocks``: those to wrap, where the model is not called as one; None finds them.
    ``say`` is for what is true of all workers, ``tell`` for what happens to this one: it hears it once when what is
    offloaded finds no more room. Raises UserError when the model has no list of blocks, when a pattern fits none, and
    when there is no place to offload to."""
    if not plan.works_on_blocks:
        return []
    meter = meter_of(module)
    found = find_blocks(module, plan.blocks) if blocks is None else blocks
    if not found and not plan.budget_bytes:
        raise UserError(
            f"plan: memory.recompute and memory.offload_activations work on blocks, and {type(module).__name__} has no "
            f"list of layers: name its modules in plan.memory.blocks."
        )
    store = _store(plan, meter, device_of(module), tell, say)
    wrapped = []
    at_once = [*found][-1:] if blocks is None and not plan.blocks and not store.moves else []
    for number, (name, child) in enumerate(found.items()):
        recomputed = plan.recompute != "every" or number % plan.recompute_every == 0
        if plan.recompute == "full" and name in at_once:
            continue  # its backward pass is the first: all that it keeps would be there again at once
        if recomputed or store.moves:
            wrapped.append(Block(name, child, store))
            if plan.recompute == "selective":
                wrapped[-1].mode, wrapped[-1].dropped = "selective", frozenset(plan.recompute_operations)
            elif plan.recompute != "none" and recomputed:
                wrapped[-1].mode = "full"
    return wrapped


def meter_of(module: nn.Module) -> Meter:
    """One that does not count parameters and buffers."""
    meter = Meter()
    ignore_weights(meter, module)
    return meter


def ignore_weights(meter: Meter, module: nn.Module) -> None:
    """Have it not count a module's weights where they lie now."""
    meter.ignore([*module.parameters(), *module.buffers()])


def device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _store(
    plan: MemoryPlan, meter: Meter, device: torch.device, tell: Callable[[str], None], say: Callable[[str], None]
) -> Store:
    if plan.offload_activations == "disk":
        return Away(meter, Disk(device, plan.offload_dir), tell)
    if plan.offload_activations == "host" and device.type != "cpu":
        return Away(meter, Host(device), tell)
    if plan.offload_activations == "host":
        say("memory.offload_activations = 'host' moves nothing: the worker's device is the host's own processor.")
    return Here(meter)
