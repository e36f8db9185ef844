"""A checkpoint's weights and optimiser states, turned into the form that this run keeps them in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.memory.narrow import REST
from shoal.memory.quantised import blocks_of, decode, encode
from shoal.memory.rounding import joined, split
from shoal.memory.streamed import CODES, SCALES, SIGNED, quantisable
from shoal.recipe.memory_plan import MemoryPlan


def converted(
    weights: Mapping[str, Tensor], states: Mapping[str, Tensor], module: nn.Module, plan: MemoryPlan
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(weights by name, states by "<parameter>/<key>", what was changed, a line each), as ``module`` and ``plan`` keep
    them. What has that form already is passed on as it is."""
    new_weights, rests, said = _weights(weights, states, module, plan)
    new_states, also = _states(states, plan)
    return new_weights, new_states | rests, said + also


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


def _states(states: Mapping[str, Tensor], plan: MemoryPlan) -> tuple[dict[str, Tensor], list[str]]:
    found: dict[str, Tensor] = {}
    said = dict[str, None]()
    for path, tensor in states.items():
        key = path.rsplit("/", 1)[1]
        if key == REST or (key.endswith(SCALES) and plan.optimizer_bits == 32):
            continue
        if key.endswith(CODES) and plan.optimizer_bits == 32:
            name = path.removesuffix(CODES)
            scales = states[name + SCALES]
            values = torch.empty(tensor.numel())
            decode(tensor.reshape(-1), scales, values, signed=SIGNED[key.removesuffix(CODES)])
            found[name] = values.view(tensor.shape)
            said["the checkpoint's 8-bit optimiser states go on in 32 bits."] = None
        elif plan.optimizer_bits == 8 and quantisable(key, tensor.numel(), tensor.dtype):
            codes = torch.empty(tensor.numel(), dtype=torch.uint8)
            scales = torch.empty(blocks_of(tensor.numel()))
            encode(tensor.reshape(-1), codes, scales, signed=SIGNED[key])
            found[path + CODES], found[path + SCALES] = codes.view(tensor.shape), scales
            said["the checkpoint's 32-bit optimiser states go on in 8 bits."] = None
        else:
            found[path] = tensor
    return found, list(said)
