"""What a cut model consists of: contiguous chunks of its forward pass, each of which one worker can hold."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

OUTPUT = "output"  # under this name the last chunk gives what the model returns


@dataclass(frozen=True)
class Chunk:
    """One stage of a pipeline (or one of a worker's several).

    ``module(values) -> values`` takes a mapping with ``inputs`` and ``batch_inputs`` (others are ignored) and gives a new
    one with exactly ``outputs``. Values are tensors, numbers, None, or tuples, lists and dicts of them. A value that a
    later chunk needs passes through every chunk between, so that messages go between neighbours only."""

    module: nn.Module  # holds this chunk's parameters and buffers only, under the names that they have in the model
    inputs: tuple[str, ...]  # values of the chunk before; of the first chunk: ()
    outputs: tuple[str, ...]  # values for the chunk after; of the last chunk: (OUTPUT,)
    batch_inputs: tuple[str, ...]  # arguments of the model that it reads: every worker has the batch, so none is sent
    parameters: tuple[str, ...]  # names in the model's order; of tied ones every chunk that uses it lists it


@dataclass(frozen=True)
class Chunks:
    chunks: tuple[Chunk, ...]
    tied: Mapping[
        str, tuple[int, ...]
    ]  # parameter that several chunks use -> those chunks, the first (its owner) first

    def __len__(self) -> int:
        return len(self.chunks)
