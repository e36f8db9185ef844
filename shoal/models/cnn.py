"""A small convolutional network for digits, in the manner of LeNet-5 (LeCun et al., 1998)."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.convolution import Conv2d
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.ends import Joint
from shoal.models.facts import at_least_one, probability
from shoal.models.initial_values import Constant, Initial, Normal, fan_in, initialise


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    channels: tuple[int, ...] = (32, 64)  # of each convolution; each is followed by ReLU and a 2 x 2 max pool
    kernel: int = 3
    hidden: int = 128  # width of the fully connected layer
    dropout: float = 0.0  # before and after the fully connected layer
    norm: bool = False  # BatchNorm after each convolution
    shape: tuple[int, ...] = ()  # (channels, height, width) or (height, width) of one image; (): from the data
    classes: int = 0  # 0: from the data

    def __post_init__(self) -> None:
        at_least_one(self, "kernel", "hidden")
        probability(self, "dropout")
        if self.kernel % 2 == 0:
            raise UserError(f"model.kernel = {self.kernel} must be odd, so that an image keeps its size.")
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"model.channels = {list(self.channels)}: give at least one convolution with a channel.")


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of an image whose grey channel may be left out. Raises UserError for other shapes."""
    full = (1, *shape) if len(shape) == 2 else shape
    if len(full) != 3 or min(full) < 1:
        raise UserError(f"the model takes images of shape [channels, height, width], the data has {list(shape)}.")
    return (full[0], full[1], full[2])


class CNN(nn.Module):
    """Images float [n, channels, height, width] (or [n, height, width]) -> logits [n, classes]."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        at_least_one(config, "classes")
        self.config = config
        self.shape = image_shape(config.shape)
        channels, height, width = self.shape
        halvings = len(config.channels)
        if min(height, width) >> halvings == 0:
            raise UserError(
                f"images of {height} x {width} are too small for {halvings} halvings: list fewer model.channels."
            )
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        for wider in config.channels:
            self.convolutions.append(Conv2d(channels, wider, config.kernel, padding=config.kernel // 2))
            self.norms.append(nn.BatchNorm2d(wider) if config.norm else nn.Identity())
            channels = wider
        self.pools = nn.ModuleList(nn.MaxPool2d(2) for _ in config.channels)
        names = self._names()
        self.joint = Joint(("samples", names[-3], "rows", "columns"))
        self.pixels = (height >> halvings) * (width >> halvings)  # of each channel, in the end
        self.dropouts = nn.ModuleList(Dropout(config.dropout, ("samples", name)) for name in ("pixels", names[-2]))
        self.hidden = nn.Linear(channels * self.pixels, config.hidden)
        self.head = nn.Linear(config.hidden, config.classes)
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        """Of what a ReLU comes after, those for one (He et al., 2015, section 2.2)."""
        layers = {f"convolutions.{i}": layer for i, layer in enumerate(self.convolutions)} | {"hidden": self.hidden}
        said: dict[str, Initial] = {f"{name}.bias": Constant(0.0) for name in layers}
        return said | {f"{name}.weight": Normal((2 / fan_in(layer)) ** 0.5) for name, layer in layers.items()}  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(len(input), *self.shape)
        for convolution, norm, pool in zip(self.convolutions, self.norms, self.pools, strict=True):
            x = pool(norm(convolution(x))).relu()  # ReLU keeps order, so pooling first is equal and four times less
        before, after = self.dropouts
        logits: Tensor = self.head(after(self.hidden(before(self.joint(x).flatten(1))).relu()))
        return logits

    def _names(self) -> list[str]:
        """What the layers take and give, in turn; by turns, as in `shoal.models.mlp`."""
        count = len(self.config.channels)
        convolved = ["width" if i % 2 else "channels" for i in range(count)]
        return ["image", *convolved, "hidden" if count % 2 else "ffn", "classes"]

    def dimensions(self) -> Dimensions:
        names = self._names()
        patterns: Dimensions = {}
        for i, (before, after) in enumerate(pairwise(names[:-2])):
            patterns |= {
                f"convolutions.{i}.weight": (after, before, "kernel_height", "kernel_width"),
                f"convolutions.{i}.bias": (after,),
                f"norms.{i}.*": (after,),
            }
        hidden, classes = names[-2:]
        patterns |= {"hidden.weight": (hidden, "pixels"), "hidden.bias": (hidden,)}
        patterns |= {"head.weight": (classes, hidden), "head.bias": (classes,)}
        return name_dimensions(self, patterns)

    def grains(self) -> dict[str, Grain]:
        return {"pixels": Grain(unit=self.pixels, called="channels", follows=self._names()[-3])}
