"""What a plan says of parameters and optimiser states between two updates, applied to a model and its optimiser."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.memory.blocks import find_blocks
from shoal.memory.blockwise import Blockwise, movable
from shoal.memory.narrow import Rounding, narrow
from shoal.memory.shelves import Here, OnDisk, OnHost
from shoal.memory.streamed import Keeping, Origin, Streamed, check_streamable
from shoal.recipe.memory_plan import MemoryPlan

_ROUNDING: dict[str, Rounding] = {"bfloat16-stochastic": "stochastic", "bfloat16-compensated": "compensated"}
Tell = Callable[[str], None]


@dataclass
class KeptParameters:
    """Which of a model's parameters are not simply float32 in memory."""

    rests: dict[nn.Parameter, Tensor | None] = field(default_factory=dict)
    shelf: OnDisk | None = None


def keep_parameters(
    module: nn.Module,
    plan: MemoryPlan,
    *,
    device: torch.device,
    sharing: int,
    say: Tell,
    tell: Tell,
    parts: Sequence[nn.Module] = (),
) -> KeptParameters:
    """Have the module's parameters kept as the plan says, in place. Before anything that wraps blocks.

    ``parts``: of a module that is not called as one, what is (the chunks of a pipeline); parameters that only a part
    has, copies of another worker's, are kept like the others.
    ``sharing``: workers that use the same disk. ``say`` is for what is true of all workers, ``tell`` for what happens
    to this one. Raises UserError for a pattern of blocks that fits none, and for what this device cannot do."""
    kept, own = KeptParameters(), set(module.parameters())
    if plan.parameters in _ROUNDING:
        for part in parts or (module,):
            found = narrow(part, _ROUNDING[plan.parameters], plan.blocks)
            kept.rests |= {parameter: rest for parameter, rest in found.items() if parameter in own}
    if plan.offload_parameters == "none":
        return kept
    if device.type != "cpu":
        raise UserError(
            f"plan: memory.offload_parameters = {plan.offload_parameters!r} is for workers that compute on the "
            f"processor so far, and this one is on {device}: leave it out, or use memory.parameters in bfloat16."
        )
    if plan.offload_parameters == "host":
        say("memory.offload_parameters = 'host' moves nothing: the worker's device is the host's own processor.")
        return kept
    blocks = _with_parameters(parts) if parts else find_blocks(module, plan.blocks)
    if not blocks:
        raise UserError(
            "plan: memory.offload_parameters needs a model with a list of layers, and this one has none: "
            "name modules in memory.blocks."
        )
    parameters = movable(blocks, nn.ModuleList(parts) if parts else module)
    if parts:  # copies come from their owner after each update
        parameters = {name: [p for p in held if p in own] for name, held in parameters.items()}
    needed = sum(p.nbytes for held in parameters.values() for p in held)
    shelf = _disk(plan, device, "parameters", needed, sharing, say)
    if shelf is not None:
        Blockwise(blocks, parameters, shelf).move(tell)
        kept.shelf = shelf
    return kept


def _with_parameters(parts: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Of chunks, which take the model's lists of layers apart: the modules that have parameters of their own."""
    return {
        f"{number}.{name}": child
        for number, part in enumerate(parts)
        for name, child in part.named_modules()
        if any(p is not None for p in child._parameters.values())
    }


def keep_states(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    plan: MemoryPlan,
    parameters: KeptParameters,
    *,
    device: torch.device,
    seed: int,
    step: Callable[[], int],
    sharing: int,
    say: Tell,
    tell: Tell,
    sizes: Mapping[str, int] | None = None,
    holders: int = 1,
) -> torch.optim.Optimizer:
    """The optimiser, its states kept as the plan says; itself where that changes nothing.

    ``step``: how many updates have been made. ``sizes``: elements of whole parameters, of which ``module`` has parts.
    ``holders``: so many workers hold them together once, and who writes a checkpoint has all of them for it.
    ``sharing``, ``say``, ``tell``: as above. Raises UserError for an optimiser whose states cannot be kept so."""
    key = plan.changes_updates
    if not key:
        return optimizer
    check_streamable(optimizer, key, quantised=plan.optimizer_bits == 8)
    origins: dict[Tensor, Origin] = {}
    origins |= {p: Origin(name, (sizes or {}).get(name, p.numel())) for name, p in module.named_parameters()}
    if any(p not in origins for group in optimizer.param_groups for p in group["params"]):
        raise UserError("the optimiser holds a parameter that is not the model's.")
    keeping = Keeping(
        Here(device),
        quantised=plan.optimizer_bits == 8,
        rests=parameters.rests,
        weights=parameters.shelf,
        seed=seed,
        step=step,
        tell=tell,
    )
    moves_nothing = plan.offload_optimizer == "host" and device.type == "cpu"
    if moves_nothing:
        say("memory.offload_optimizer = 'host' moves nothing: the worker's device is the host's own processor.")
    if moves_nothing and plan.optimizer_bits == 32 and not parameters.rests and parameters.shelf is None:
        return optimizer
    streamed = Streamed(optimizer, origins, keeping)
    if plan.offload_optimizer == "host" and not moves_nothing:
        keeping.shelf = OnHost(device)
    elif plan.offload_optimizer == "disk":
        shelf = _disk(plan, device, "optimiser states", streamed.expected_bytes(), sharing, say, holders)
        if shelf is not None:
            keeping.shelf = shelf
            _read_ahead(module, streamed)
    return streamed


def _disk(
    plan: MemoryPlan, device: torch.device, what: str, each: int, sharing: int, say: Tell, holders: int = 1
) -> OnDisk | None:
    """A file for so many bytes of each ``holders`` workers, or None when there is no room for all."""
    shelf = OnDisk(device, plan.offload_dir)
    together = 1 if holders > 1 else 0  # what slices are brought together in
    needed, free = sharing * each // holders + (together + 1) * each, shelf.file.free_bytes  # and a checkpoint's copy
    if needed <= free:
        return shelf
    shelf.close()
    say(
        f"the {what} of {sharing} worker{'s' if sharing > 1 else ''} and of a checkpoint take {needed / 1e6:.1f} MB, "
        f"and {str(shelf.file.folder)!r} has {free / 1e6:.1f} MB to spare: they stay in memory. "
        f"memory.offload_dir names another folder."
    )
    return None


def _read_ahead(module: nn.Module, streamed: Streamed) -> None:
    """While the backward pass runs, the states that the update begins with come in."""
    trained = [p for p in module.parameters() if p.requires_grad]
    trained[-1].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _: streamed.prefetch()
    )
