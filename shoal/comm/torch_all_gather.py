"""torch.distributed's all-gather into one tensor, by the name that this torch has for it."""

from typing import Any

import torch.distributed as dist

all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
