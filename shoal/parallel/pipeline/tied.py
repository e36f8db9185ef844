"""Parameters that several chunks use: one of them owns it, the others hold copies.

Autograd adds the uses of a parameter from the last to the first. So each user hands its sum of a micro-batch to the
user before it in the model, which starts from that, down to the owner: the order of one process, whatever the cuts.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Parameter

from shoal.parallel.partition.chunks import Chunk, Chunks


@dataclass(frozen=True)
class Ties:
    """The trained parameters that several chunks use."""

    users: Mapping[str, tuple[int, ...]]  # in the order of the model; the first one is the owner

    @staticmethod
    def of(chunks: Chunks) -> "Ties":
        parameters = {name: p for chunk in chunks.chunks for name, p in chunk.module.named_parameters()}
        return Ties({name: users for name, users in chunks.tied.items() if parameters[name].requires_grad})

    def owned(self, chunk: int) -> list[str]:
        return [name for name, users in self.users.items() if users[0] == chunk]

    def copied(self, chunk: int) -> list[str]:
        return [name for name, users in self.users.items() if chunk in users[1:]]

    def given(self, chunk: int) -> dict[int, list[str]]:
        """Of which parameters a chunk hands its sum to which other chunk."""
        found: dict[int, list[str]] = {}
        for name in self.copied(chunk):
            users = self.users[name]
            found.setdefault(users[users.index(chunk) - 1], []).append(name)
        return found

    def taken(self, chunk: int) -> dict[int, list[str]]:
        """From which other chunk it takes which sums."""
        found: dict[int, list[str]] = {}
        for name, users in self.users.items():
            if chunk in users[:-1]:
                found.setdefault(users[users.index(chunk) + 1], []).append(name)
        return found


def with_own_copies(chunk: Chunk, copied: list[str]) -> tuple[Chunk, dict[str, Parameter]]:
    """The chunk with parameters of its own in the place of those that another chunk owns, and these, by name."""
    if not copied:
        return chunk, {}
    parameters = dict(chunk.module.named_parameters())
    kept: dict[int, Any] = {id(p): p for name, p in parameters.items() if name not in copied}
    kept |= {id(b): b for b in chunk.module.buffers()}
    module = deepcopy(chunk.module, kept)
    found = dict(module.named_parameters())
    return replace(chunk, module=module), {name: found[name] for name in copied}
