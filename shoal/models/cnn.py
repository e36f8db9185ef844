"""A small convolutional network for digits, in the manner of LeNet-5 (LeCun et al., 1998)."""

from dataclasses import dataclass

from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.convolution import Conv2d
from shoal.models.dimensions import Dimensions, name_dimensions
from shoal.models.dropout import Dropout
from shoal.models.facts import at_least_one, probability


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
        self.pool = nn.MaxPool2d(2)
        self.dropout = Dropout(config.dropout)
        self.hidden = nn.Linear(channels * (height >> halvings) * (width >> halvings), config.hidden)
        self.head = nn.Linear(config.hidden, config.classes)
        for layer in (*self.convolutions, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(len(input), *self.shape)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.pool(
                norm(convolution(x))
            ).relu()  # ReLU keeps order, so pooling first is equal and four times less
        logits: Tensor = self.head(self.dropout(self.hidden(self.dropout(x.flatten(1))).relu()))
        return logits

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, _DIMENSIONS)


_DIMENSIONS = {
    "convolutions.*.weight": ("channels", "in_channels", "kernel_height", "kernel_width"),
    "convolutions.*.bias": ("channels",),
    "norms.*": ("channels",),
    "hidden.weight": ("hidden", "features"),
    "hidden.bias": ("hidden",),
    "head.weight": ("classes", "hidden"),
    "head.bias": ("classes",),
}
