"""What a layout makes of each module of a model. Plain values, which `shoal.parallel.tensor` carries out."""

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.parallel.layout.passage import Flow, Lie
from shoal.parallel.layout.split import Split
from shoal.parallel.layout.window import Window


@dataclass(frozen=True)
class Weighted:
    """A Linear, Conv2d, Embedding or Logits with its weight. The splits are those of the features of what comes in and
    goes out; None where nothing splits them."""

    flow: Flow
    inputs: Split | None
    outputs: Split | None
    learns: bool  # what comes in has a gradient: it is not the model's input


@dataclass(frozen=True)
class Normed:
    """A LayerNorm over features that lie so."""

    lies: Lie
    split: Split | None


@dataclass(frozen=True)
class Placed:
    """A table of vectors by position or by segment, of which ``lies`` says what is wanted."""

    lies: Lie


@dataclass(frozen=True)
class Drawn:
    """A dropout: which dim of what comes in is cut; ``split`` is None for the sequence, whose length varies."""

    dim: int
    split: Split | None


@dataclass(frozen=True)
class Joined:
    """A Joint: what was cut along the sequence or by rows is whole from here on."""

    dim: int
    split: Split | None  # None for the sequence


@dataclass(frozen=True)
class Banded:
    """A module that sees bands of an image's rows: how the rows of what comes in and goes out are split.

    ``inputs`` is None where the whole image comes in, ``outputs`` where the rows end."""

    inputs: Split | None
    outputs: Split | None
    window: Window | None  # of a layer that needs rows of other bands
    height: int  # rows that come in, over all bands


@dataclass(frozen=True)
class Mixed:
    """The experts of a mixture, each split as a hidden layer is; every token goes to ``top_k`` of them."""

    top_k: int


@dataclass(frozen=True)
class Enclosed:
    """A module that needs whole sequences among others that see slices: joined before it, cut again behind it."""


Treatment = Weighted | Normed | Placed | Drawn | Joined | Banded | Mixed | Enclosed


@dataclass(frozen=True)
class Layout:
    """One model over the ``ways`` workers of the tensor axis."""

    ways: int
    splits: Mapping[str, Split]  # parameters and buffers that are cut, by their names
    modules: Mapping[str, Treatment]  # modules that are replaced

    @property
    def cuts_anything(self) -> bool:
        return bool(self.modules)
