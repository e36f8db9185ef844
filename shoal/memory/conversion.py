"""A checkpoint's weights and optimiser states, turned into the form that this run keeps them in."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from shoal.memory.narrow import REST
from shoal.memory.quantised import BLOCK, blocks_of, decode, encode, values_of
from shoal.memory.rounding import joined, split
from shoal.memory.streamed import CODES, SCALES, SIGNED, quantisable
from shoal.recipe.memory_plan import MemoryPlan

EACH = ".scale"  # at the end of a key: of a state in 8 bits, the scale of every element


def converted(
    weights: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    module: nn.Module,
    plan: MemoryPlan,
    sizes: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(weights by name, states by "<parameter>/<key>", what was changed, a line each), as ``module`` and ``plan`` keep
    them. What has that form already is passed on as it is. ``sizes``: elements of whole parameters, where ``module``
    has parts."""
    new_weights, rests, said = _weights(weights, states, module, plan)
    blocked, anew = _in_blocks(states)
    new_states, also = _states(blocked, plan, sizes or {})
    return new_weights, new_states | rests, said + (anew or also)


def _weights(
    weights: Mapping[str, Tensor], states: Mapping[str, Tensor], module: nn.Module, plan: MemoryPlan
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    first = {parameter: name for name, parameter in module.named_parameters()}  # of a tied one's names
    found, rests, said = dict(weights), {}, dict[str, None]()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        saved = weights.get(name)
        if saved is None or saved.shape != parameter.shape:
            continue
        key = f"{first[parameter]}/{REST}"
        rest = states.get(key)
        if parameter.dtype == torch.float32 and saved.dtype == torch.bfloat16:
            found[name] = saved.float() if rest is None else joined(saved.flatten(), rest.flatten()).view(saved.shape)
            said["the checkpoint's bfloat16 parameters go on in float32."] = None
        elif parameter.dtype == torch.bfloat16:
            if saved.dtype == torch.float32:
                said["the checkpoint's float32 parameters go on in bfloat16."] = None
                upper, rest = split(saved.reshape(-1))
                keeps = plan.parameters == "bfloat16-compensated"
                found[name] = upper.view(saved.shape) if keeps else saved.bfloat16()
                rest = rest.view(saved.shape)
            if plan.parameters == "bfloat16-compensated":
                rests[key] = torch.zeros(saved.shape, dtype=torch.int16) if rest is None else rest
    return found, rests, list(said)


def _states(
    states: Mapping[str, Tensor], plan: MemoryPlan, sizes: Mapping[str, int]
) -> tuple[dict[str, Tensor], list[str]]:
    found: dict[str, Tensor] = {}
    said = dict[str, None]()
    for path, tensor in states.items():
        parameter, key = path.rsplit("/", 1)
        if key == REST or (key.endswith(SCALES) and plan.optimizer_bits == 32):
            continue
        if key.endswith(CODES) and plan.optimizer_bits == 32:
            name = path.removesuffix(CODES)
            values = torch.empty(tensor.numel())
            decode(tensor.reshape(-1), states[name + SCALES], values, signed=SIGNED[key.removesuffix(CODES)])
            found[name] = values.view(tensor.shape)
            said["the checkpoint's 8-bit optimiser states go on in 32 bits."] = None
        elif plan.optimizer_bits == 8 and quantisable(key, sizes.get(parameter, tensor.numel()), tensor.dtype):
            codes = torch.empty(tensor.numel(), dtype=torch.uint8)
            scales = torch.empty(blocks_of(tensor.numel()))
            encode(tensor.reshape(-1), codes, scales, signed=SIGNED[key])
            found[path + CODES], found[path + SCALES] = codes.view(tensor.shape), scales
            said["the checkpoint's 32-bit optimiser states go on in 8 bits."] = None
        else:
            found[path] = tensor
    return found, list(said)


def spread(states: Mapping[str, Tensor], parameters: Collection[str]) -> dict[str, Tensor]:
    """With the scale of each element, in its parameter's shape, in the place of those of blocks: what can be cut and
    joined as these ``parameters`` are. `converted` takes both."""
    found = {}
    for path, tensor in states.items():
        name = path.removesuffix(SCALES)
        if path.endswith(SCALES) and name.rpartition("/")[0] in parameters:
            codes = states[name + CODES]
            found[name + EACH] = tensor.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
        else:
            found[path] = tensor
    return found


def _in_blocks(states: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What `spread` did, undone; float32 where the blocks of who saved it are not those of who loads it."""
    found, said = dict(states), dict[str, None]()
    for path in [path for path in states if path.endswith(EACH)]:
        name = path.removesuffix(EACH)
        codes, each = states[name + CODES], found.pop(path).reshape(-1)
        scales = each[::BLOCK].clone()
        if torch.equal(scales.repeat_interleave(BLOCK)[: len(each)], each):
            found[name + SCALES] = scales
            continue
        del found[name + CODES]
        found[name] = values_of(SIGNED[name.rsplit("/", 1)[1]])[codes.long()] * each.view(codes.shape)
        said["the checkpoint's 8-bit optimiser states are of tensors cut in another way: their blocks are new."] = None
    return found, list(said)
