"""A multi-layer perceptron for feature tables and small images."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.facts import at_least_one, probability
from shoal.models.initial_values import Constant, Initial, Normal, fan_in, initialise


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    hidden: tuple[int, ...] = (128, 128)  # width of each hidden layer; () is a linear model
    dropout: float = 0.0
    features: int = 0  # numbers in one sample; 0: from the data
    classes: int = 0  # for classification; 0: from the data
    outputs: int = 0  # for regression; 0: from the data

    def __post_init__(self) -> None:
        probability(self, "dropout")
        if any(width < 1 for width in self.hidden):
            raise UserError(f"model.hidden = {list(self.hidden)}: every width must be at least 1.")


class MLP(nn.Module):
    """[n, ...] with ``features`` numbers a sample -> logits [n, classes] or values [n, outputs]."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        at_least_one(config, "features")
        self.config = config
        self.last = config.classes or config.outputs
        widths = (config.features, *config.hidden, self.last)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropouts = nn.ModuleList(
            Dropout(config.dropout, ("samples", _hidden(i))) for i in range(len(config.hidden))
        )
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        """Of the hidden layers those for a ReLU (He et al., 2015, section 2.2)."""
        said: dict[str, Initial] = {}
        for number, layer in enumerate(self.layers[:-1]):
            said |= {f"layers.{number}.weight": Normal((2 / fan_in(layer)) ** 0.5)}  # type: ignore[arg-type]
            said |= {f"layers.{number}.bias": Constant(0.0)}
        return said

    def forward(self, input: Tensor) -> Tensor:
        x = input.flatten(1)
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            x = dropout(layer(x).relu())
        output: Tensor = self.layers[-1](x)
        return output

    def dimensions(self) -> Dimensions:
        names = ["features", *(_hidden(i) for i in range(len(self.config.hidden)))]
        names.append("classes" if self.config.classes else "outputs")
        patterns: Dimensions = {}
        for i, (before, after) in enumerate(pairwise(names)):
            patterns |= {f"layers.{i}.weight": (after, before), f"layers.{i}.bias": (after,)}
        return name_dimensions(self, patterns)

    def grains(self) -> dict[str, Grain]:
        """Layers of other sizes are split as the first ones are."""
        later = range(2, len(self.config.hidden))
        return {_hidden(i): Grain(follows=_hidden(i % 2)) for i in later}


def _hidden(layer: int) -> str:
    """By turns, so that a layout can split every second layer by its outputs and the next one by its inputs."""
    name = "width" if layer % 2 else "ffn"
    return name if layer < 2 else f"{name}{layer}"
