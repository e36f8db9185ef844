"""The contract of docs/design.md as one plain PyTorch loop, sharing neither tree, ledger nor exchange with Shoal."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.ledger import permutation
from shoal.data.source import Source
from shoal.models.registry import build, task_for
from shoal.recipe.recipe import Recipe
from shoal.train.streams import stream_seed

BLOCK, ALIGNED = 32768, 16


def tree(values: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Halve at the largest power of two; None is a leaf without samples."""
    if len(values) == 1:
        return values[0]
    half = 1
    while half * 2 < len(values):
        half *= 2
    left, right = tree(values[:half], add), tree(values[half:], add)
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def spread(count: int, parts: int) -> list[int]:
    return [count // parts + (1 if part < count % parts else 0) for part in range(parts)]


def shares(ids: Any, shards: int, micro_batches: int) -> list[list[Any]]:
    leaves, at = [], 0
    for size in spread(len(ids), shards):
        leaf = []
        for part in spread(size, micro_batches):
            if part:
                leaf.append(ids[at : at + part])
            at += part
        leaves.append(leaf)
    return leaves


def add_all(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]


def norm_of(gradients: list[Tensor]) -> float:
    pieces = []
    for gradient in gradients[::-1]:  # the flat buffer begins with the last parameter
        pieces += [gradient.reshape(-1), torch.zeros(-gradient.numel() % ALIGNED)]
    flat = torch.cat(pieces)
    flat = torch.cat([flat, torch.zeros(-len(flat) % BLOCK)])
    return math.sqrt(math.fsum(sum_of_squares(block) for block in flat.split(BLOCK)))


def sum_of_squares(block: Tensor) -> float:
    """In float64: 16 rows of 2048 one after the other, then the halves of what is left."""
    lanes = torch.zeros(2048, dtype=torch.float64)
    for row in block.double().view(16, 2048):
        lanes = lanes + row * row
    while len(lanes) > 1:
        left, right = lanes.chunk(2)
        lanes = left + right
    return float(lanes)


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def plain_training(
    recipe: Recipe, data: Source, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The final state dict, the losses and the gradient norms before clipping."""
    torch.manual_seed(recipe.seed)
    model = build(recipe.model, data.facts)
    task = task_for(recipe.model, data.facts)
    optimizer = make_optimizer(model)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    per_epoch = math.ceil(len(data) / recipe.batch)
    losses, norms = [], []
    for step in range(recipe.steps):
        epoch, index = divmod(step, per_epoch)
        order = permutation(len(data), "shoal.ledger", recipe.seed, epoch)
        ids = order[index * recipe.batch : (index + 1) * recipe.batch]
        begun = [buffer.clone() for buffer in buffers]
        leaf_gradients: list[Any] = []
        leaf_changes: list[Any] = []
        leaf_losses: list[Any] = []
        targets = 0
        for shard, micros in enumerate(shares(ids, recipe.shards, recipe.micro_batches)):
            gradients, loss_sum = None, None
            for buffer, old in zip(buffers, begun, strict=True):
                buffer.copy_(old)
            for micro, chosen in enumerate(micros):
                torch.manual_seed(stream_seed(recipe.seed, step, shard, micro))
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                    loss, count = task.loss(model, data.fetch(chosen, epoch))
                targets += count
                loss_sum = float(loss.detach()) + (loss_sum or 0.0)
                one = torch.autograd.grad(loss, parameters, materialize_grads=True)
                one = [gradient.contiguous() for gradient in one]  # as backward() would leave them
                gradients = one if gradients is None else add_all(gradients, one)
            leaf_gradients.append(gradients)
            leaf_losses.append(loss_sum)
            changes = [(buffer - old).float() for buffer, old in zip(buffers, begun, strict=True)]
            leaf_changes.append(changes if micros else None)
        mean = [total / targets for total in tree(leaf_gradients, add_all)]
        present = sum(gradients is not None for gradients in leaf_gradients)
        change = [total / present for total in tree(leaf_changes, add_all)]
        norm = norm_of(mean)
        if recipe.clip and norm > recipe.clip:
            mean = [gradient * (recipe.clip / norm) for gradient in mean]
        for parameter, gradient in zip(parameters, mean, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for buffer, old, difference in zip(buffers, begun, change, strict=True):
            buffer.copy_(old + difference.to(old.dtype))
        losses.append(tree(leaf_losses, lambda a, b: a + b) / targets)
        norms.append(norm)
    return dict(model.state_dict()), losses, norms
