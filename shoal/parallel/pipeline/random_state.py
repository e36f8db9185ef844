"""The state of torch's default generators, which travels from stage to stage with a micro-batch."""

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # of the processor's generator; of the device's, where there is one


def random_state(device: torch.device) -> State:
    on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *on_device)


def set_random_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1].cpu(), device)


def drawn(before: State, after: State) -> bool:
    """Whether anything was drawn between two states."""
    return not all(map(torch.equal, before, after))
