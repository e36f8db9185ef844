"""Linear layers whose products are of 8-bit whole numbers: a weight's row has one scale, and so has each input row.

How a row is rounded depends on that row alone (dynamic quantisation; Dettmers et al., 2022, without their outliers),
and whole numbers add up to the same in any order: a layer gives a row the same bits in any company."""

import torch
from torch import Tensor, nn

MOST = 127


class Int8Linear(nn.Module):
    """[..., in] -> [..., out] in float32, as the `nn.Linear` that it is made of, to within the rounding."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / MOST
        self.register_buffer("weight", (weight / scale).round_().to(torch.int8))  # [out, in]
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(MOST)
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight.t())
        made = product.float().mul_(scale).mul_(self.scale)
        made = made if self.bias is None else made.add_(self.bias)
        return made.reshape(*x.shape[:-1], -1)


def to_int8(model: nn.Module) -> int:
    """Puts an `Int8Linear` in the place of each `nn.Linear`, in place; how many. Subclasses keep what they are.

    A layer whose weights another one shares (a tied head) is left as it is."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    changed = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and uses[id(child.weight)] == 1:
                setattr(module, name, Int8Linear(child))
                changed += 1
    return changed
