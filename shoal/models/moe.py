"""A mixture-of-experts GPT: in every block, a router sends each token to a few of many hidden layers.

Top-1 is Switch (Fedus et al., 2021), top-2 GShard (Lepikhin et al., 2020) and Mixtral (Jiang et al., 2024). No token is
ever dropped: experts take as many as come, in the order of the tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.activation import ACTIVATIONS
from shoal.models.dimensions import Dimensions, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.facts import at_least_one
from shoal.models.gpt import DIMENSIONS, GPT, STREAM, Attention, GPTConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig(GPTConfig):
    experts: int = 8  # hidden layers of each block
    top_k: int = 2  # experts that each token goes to
    balance: float = 0.01  # weight of the loss that spreads each sequence's tokens evenly over the experts

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "experts")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"model.top_k must be from 1 to model.experts = {self.experts}, got {self.top_k}.")
        if self.balance < 0:
            raise UserError(f"model.balance must not be negative, got {self.balance}.")


class ExpertLinear(nn.Module):
    """The weights of one linear layer for each expert: [experts, out, in] and [experts, out]."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs)) if bias else None

    def each(self) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of each expert. The backward pass of a split makes one gradient; slices would make many."""
        biases = self.bias.unbind() if self.bias is not None else [None] * len(self.weight)
        return list(zip(self.weight.unbind(), biases, strict=True))


class Experts(nn.Module):
    """Hidden layers side by side: rows [m, width], the first ``counts[0]`` for expert 0, and so on -> [m, width]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        ffn = config.ffn or 4 * config.width
        self.up = ExpertLinear(config.experts, config.width, ffn, config.bias)
        self.down = ExpertLinear(config.experts, ffn, config.width, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        layers = zip(torch.split(rows, counts), self.up.each(), self.down.each(), strict=True)
        made = [F.linear(self.activation(F.linear(x, *up)), *down) for x, up, down in layers if len(x)]
        return torch.cat(made) if made else rows


@dataclass(frozen=True)
class Routes:
    """Where each of N tokens goes."""

    experts: Tensor  # int [N, k]
    weights: Tensor  # [N, k]: what each expert's answer counts

    def order(self, experts: int) -> tuple[Tensor, list[int]]:
        """The N k pairs of token and expert, numbered token by token, sorted by expert; how many each expert gets."""
        flat = self.experts.reshape(-1)
        return flat.argsort(stable=True), flat.bincount(minlength=experts).tolist()


class Router(nn.Linear):
    """Scores [N, width] -> [N, experts], never in less than float32 (Fedus et al., 2021, section 2.4)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            return F.linear(wide, self.weight.to(wide.dtype)).softmax(-1)


class Mixture(nn.Module):
    """Each token's best experts, weighted by the router: [n, T, width] -> [n, T, width]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.balance = config.top_k, config.balance
        self.router = Router(config.width, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        shares = self.router(tokens)
        routes = choose_experts(shares, self.top_k)
        order, counts = routes.order(shares.shape[-1])
        copies = tokens.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])
        answers = _permute(self.experts(_permute(copies, order), counts), order.argsort())
        mixed: Tensor = (
            answers.view(-1, self.top_k, x.shape[-1]) * routes.weights.unsqueeze(-1).to(answers.dtype)
        ).sum(1)
        if self.training and self.balance:
            loads = self.loads(routes.experts.view(*x.shape[:2], self.top_k), shares.shape[-1])
            mixed = _add_loss(mixed, self.balance * balance_loss(shares.view(*x.shape[:2], shares.shape[-1]), loads))
        return mixed.view(x.shape)

    def loads(self, experts: Tensor, count: int) -> Tensor:
        """The share of each sequence's choices [n, T, k] that went to each of ``count`` experts: [n, count]."""
        chosen = F.one_hot(experts.flatten(1), count).sum(1)
        return chosen / (experts.shape[1] * experts.shape[2])


def choose_experts(shares: Tensor, top_k: int) -> Routes:
    """The ``top_k`` largest of the shares [N, experts], best first. With one expert its share is its weight, or the
    router would get no gradient; with several their weights add up to 1."""
    best, experts = shares.topk(top_k, dim=-1)
    return Routes(experts, best if top_k == 1 else best / best.sum(-1, keepdim=True))


def balance_loss(shares: Tensor, loads: Tensor) -> Tensor:
    """T experts sum(load x mean share), added over the sequences; 1 a token when balanced (Fedus et al., 2021, 2.2).

    ``shares`` [n, T, experts] and ``loads`` [n, experts] are those of one sequence each (as in DeepSeek-V2, 2.2.3): a
    sum over a whole batch would depend on how the batch is cut into micro-batches."""
    return shares.shape[-1] * (shares * loads.unsqueeze(1).to(shares.dtype)).sum()


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward pass of an index adds into zeros; this one is an index again."""

    @staticmethod
    def forward(context: Any, rows: Tensor, order: Tensor) -> Tensor:
        context.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = context.saved_tensors
        return gradients[0][order.argsort()], None


def _permute(rows: Tensor, order: Tensor) -> Tensor:
    permuted: Tensor = _Permute.apply(rows, order)  # type: ignore[no-untyped-call]
    return permuted


class _AddLoss(torch.autograd.Function):
    """x as it is; in the backward pass ``loss`` gets the gradient 1, as if it had been added to the task's own sum.

    So it need not travel to the last layer, which may be in another process."""

    @staticmethod
    def forward(context: Any, x: Tensor, loss: Tensor) -> Tensor:
        context.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(context.like)


def _add_loss(x: Tensor, loss: Tensor) -> Tensor:
    same: Tensor = _AddLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return same


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then a mixture of hidden layers, each added to its input."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
        self.mixture = Mixture(config)
        self.dropout = Dropout(config.dropout, STREAM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        added: Tensor = self.dropout(self.mixture(self.norm2(x)))
        return x + added


class MoE(GPT):
    """A GPT whose blocks hold mixtures: tokens [n, T] -> logits [n, T, vocab].

    In training its backward pass adds the gradient of ``balance`` times the balance loss to that of the task's."""

    config: MoEConfig
    block = Block

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, {**_DIMENSIONS, **DIMENSIONS})


_DIMENSIONS = {
    "*.router.weight": ("routes", "width"),  # whole on every worker: a token is compared with all experts
    "*.experts.up.weight": ("experts", "ffn", "width"),
    "*.experts.up.bias": ("experts", "ffn"),
    "*.experts.down.weight": ("experts", "width", "ffn"),
    "*.experts.down.bias": ("experts", "width"),
}
