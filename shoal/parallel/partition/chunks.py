"""What a cut model consists of: contiguous chunks of its forward pass, each of which one worker can hold."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

OUTPUT = "output"  # under this name the last chunk gives what the model returns


@dataclass(frozen=True)
class Chunk:
    """One stage of a pipeline (or one of a worker's several).

    ``module(values) -> values`` takes a mapping with ``inputs`` and ``batch_inputs`` (more does no harm) and gives one
    with exactly ``outputs``. Values are tensors, numbers, dtypes, None; tuples, lists and dicts of them. What a later
    chunk needs passes through every chunk between, so that messages go between neighbours only.

    For the bits of the uncut model, a tensor must arrive with the strides with which it left, at an address that is a
    multiple of 64, and require a gradient if it did. Dropout goes on drawing where the chunk before stopped."""

    module: nn.Module  # holds this chunk's parameters and buffers only, under the names that they have in the model
    inputs: tuple[str, ...]  # values of the chunk before; of the first chunk: ()
    outputs: tuple[str, ...]  # values for the chunk after; of the last chunk: (OUTPUT,)
    batch_inputs: tuple[str, ...]  # arguments of the model that it reads: every worker has the batch, so none is sent
    parameters: tuple[str, ...]  # names in the model's order; of tied ones every chunk that uses it lists it


@dataclass(frozen=True)
class Chunks:
    """``tied``: a parameter that several chunks use -> those chunks, in order; the first is its owner.

    The uncut model adds the uses of a parameter from the last to the first. To do the same, the gradient that the later
    chunks have of it goes into the backward pass of the earlier one as the gradient of the parameter itself:
    ``torch.autograd.backward([*outputs, parameter], [*gradients, later])``."""

    chunks: tuple[Chunk, ...]
    tied: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.chunks)
