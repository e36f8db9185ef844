"""What all workers must have alike before a run begins or goes on: the first weights, the checkpoint."""

import json
from pathlib import Path

import torch
from torch import nn

from shoal.comm.group import Group
from shoal.errors import RunFailed
from shoal.train import checkpoint
from shoal.train.state import model_tensors
from shoal.train.weights import weights_sha256


@torch.no_grad()
def share_weights(module: nn.Module, group: Group) -> None:
    """Rank 0's weights for all: a factory that draws from elsewhere than the seed would differ by worker."""
    tensors = model_tensors(module)
    digests = group.gather(weights_sha256(tensors).encode())
    if all(other == digests[0] for other in digests):
        return
    for _, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else None
        sent = bytes(raw.numpy()) if group.rank == 0 and raw is not None else b""
        first = group.gather(sent)[0]
        if first:
            flat = torch.frombuffer(bytearray(first), dtype=tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))


def agreed_newest(
    folder: Path, group: Group
) -> tuple[checkpoint.Checkpoint | None, Path | None, list[tuple[Path, str]]]:
    """What `checkpoint.newest` finds in a folder. Raises RunFailed when workers see different ones."""
    found, path, skipped = checkpoint.newest(folder)
    seen = group.gather(json.dumps(found.facts if found else None, sort_keys=True, default=str).encode())
    if any(other != seen[0] for other in seen):
        steps = ", ".join(f"rank {r}: {(json.loads(s) or {}).get('step', 'none')}" for r, s in enumerate(seen))
        raise RunFailed(f"the workers see different checkpoints in {str(folder)!r} ({steps}): is it a shared folder?")
    return found, path, skipped
