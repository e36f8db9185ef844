"""The contract of docs/design.md once more, by another hand: what `shoal prove` itself is held against."""

import hashlib
import math

import torch

from shoal.data.ledger import Ledger
from shoal.models.registry import build, task_for
from shoal.train.optimizers import make_optimizer
from shoal.train.schedules import learning_rate
from shoal.train.weights import weights_sha256


def added(leaves):
    """Pairs of neighbours, then pairs of pairs: the tree from the bottom up, None where there is nothing."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = []
        for pair in pairs:
            both = [leaf for leaf in pair if leaf is not None]
            leaves.append([x + y for x, y in zip(*both, strict=True)] if len(both) == 2 else both[0] if both else None)
    return leaves[0]


def squares(block):
    """The sum of a block's squares as the contract orders it."""
    table = block.double().square().view(16, 2048)
    column = table[0]
    for row in table[1:]:
        column = column + row
    for width in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        column = column[:width] + column[width:]
    return column.item()


def seed_of(*place):
    digest = hashlib.blake2b(("shoal/" + "/".join(map(str, place))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 2


def train(recipe, splits, steps):
    """weights_sha256 after so many steps."""
    data, length = splits.train, steps
    torch.manual_seed(recipe.seed)
    model = build(recipe.model, data.facts)
    task = task_for(recipe.model, data.facts)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.optimizer.lr)
    ledger = Ledger(len(data), recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    for step in range(steps):
        before = [buffer.clone() for buffer in buffers]
        gradients, changes, denominator = [], [], 0
        for shard in range(recipe.shards):
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            summed = None
            for micro, ids in enumerate(ledger.shard(step, shard)):
                batch = data.fetch(ids, step // ledger.steps_per_epoch)
                torch.manual_seed(seed_of(recipe.seed, step, shard, micro))
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                    loss, count = task.loss(model, batch)
                now = torch.autograd.grad(loss, parameters)
                summed = now if summed is None else [x + y for x, y in zip(summed, now, strict=True)]
                denominator += count
            gradients.append(summed)
            changes.append(summed and [b.float() - v.float() for b, v in zip(buffers, before, strict=True)])
        present = sum(1 for leaf in gradients if leaf is not None)
        mean = [g / denominator for g in added(gradients)]
        flat = []
        for gradient in reversed(mean):
            flat += [gradient.flatten(), torch.zeros(-gradient.numel() % 16)]
        blocks = torch.split(torch.cat(flat), 32768)
        padded = [torch.cat([block, torch.zeros(32768 - len(block))]) for block in blocks]
        norm = math.sqrt(math.fsum(squares(block) for block in padded))
        for parameter, gradient in zip(parameters, mean, strict=True):
            parameter.grad = gradient * (recipe.clip / norm) if 0 < recipe.clip < norm else gradient
        for buffer, value, change in zip(buffers, before, added(changes), strict=True):
            buffer.copy_(value + (change / present).to(value.dtype))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step + 1, length)
        optimizer.step()
    return weights_sha256(model.state_dict())
