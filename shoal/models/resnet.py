"""Residual networks (He et al., 2016) for small images (section 4.2) and for large ones (table 1).

Parameters carry the names that torchvision made common (conv1, bn1, layer1.0.conv1, ..., fc), so that weights published
under those names fit."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.cnn import image_shape
from shoal.models.convolution import Conv2d
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.ends import GlobalAverage
from shoal.models.facts import at_least_one
from shoal.models.initial_values import Initial, Normal, initialise

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    style: Literal["cifar", "imagenet"] = "cifar"
    depth: int = 20  # cifar: 6n + 2 (20, 32, 44, 56, 110, ...); imagenet: 18, 34, 50, 101, 152
    width: int = 0  # channels of the first stage; 0: 16 for cifar, 64 for imagenet
    shape: tuple[int, ...] = ()  # (channels, height, width) or (height, width) of one image; (): from the data
    classes: int = 0  # 0: from the data

    def __post_init__(self) -> None:
        if self.style == "cifar" and (self.depth < 8 or (self.depth - 2) % 6):
            raise UserError(f"model.depth = {self.depth}: style 'cifar' has depths 6n + 2, such as 20, 32, 44 or 56.")
        if self.style == "imagenet" and self.depth not in IMAGENET_BLOCKS:
            raise UserError(f"model.depth = {self.depth}: style 'imagenet' has depths {list(IMAGENET_BLOCKS)}.")


def _conv3(channels: int, wider: int, stride: int = 1) -> Conv2d:
    return Conv2d(channels, wider, 3, stride, padding=1, bias=False)


class PaddedShortcut(nn.Module):
    """Without parameters: every stride-th pixel, and zeros for the new channels (option A of section 4.2)."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added = added
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        first = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, first, self.added - first))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions."""

    growth = 1

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3(width, width), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        summed: Tensor = y + (x if self.downsample is None else self.downsample(x))
        return summed.relu()


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1; the stride is on the 3 x 3."""

    growth = 4

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        wider = width * self.growth
        self.conv1, self.bn1 = Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = Conv2d(width, wider, 1, bias=False), nn.BatchNorm2d(wider)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        summed: Tensor = y + (x if self.downsample is None else self.downsample(x))
        return summed.relu()


def _projection(channels: int, wider: int, stride: int) -> nn.Module:
    return nn.Sequential(Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))


def _padding(channels: int, wider: int, stride: int) -> nn.Module:
    return PaddedShortcut(wider - channels, stride)


class ResNet(nn.Module):
    """Images float [n, channels, height, width] -> logits [n, classes]."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        at_least_one(config, "classes")
        self.config = config
        self.shape = image_shape(config.shape)
        small = config.style == "cifar"
        width = config.width or (16 if small else 64)
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if small or config.depth < 50 else Bottleneck
        self.bottleneck = block is Bottleneck
        blocks = (((config.depth - 2) // 6,) * 3) if small else IMAGENET_BLOCKS[config.depth]
        shortcut = _padding if small else _projection
        self.conv1 = (
            _conv3(self.shape[0], width) if small else Conv2d(self.shape[0], width, 7, 2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        channels = width
        self.stages: list[str] = []
        for stage, count in enumerate(blocks):
            name = f"layer{stage + 1}"
            self.add_module(name, _stage(block, channels, width << stage, count, 1 if stage == 0 else 2, shortcut))
            self.stages.append(name)
            channels = (width << stage) * block.growth
        self.average = GlobalAverage()
        self.fc = nn.Linear(channels, config.classes)
        initialise(self)

    def initial_values(self) -> dict[str, Initial]:
        """Of convolutions those that keep the size of gradients through ReLUs (He et al., 2015, section 2.2)."""
        return {
            f"{name}.weight": Normal((2 / (module.out_channels * math.prod(module.kernel_size))) ** 0.5)
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d)
        }

    def forward(self, input: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(input.reshape(len(input), *self.shape))).relu())
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(self.average(x))
        return logits

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, _BOTTLENECK if self.bottleneck else _BASIC)

    def grains(self) -> dict[str, Grain]:
        return {"narrower": Grain(follows="width")}  # the width of the stage before


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    channels: int,
    width: int,
    count: int,
    stride: int,
    shortcut: Callable[[int, int, int], nn.Module],
) -> nn.Sequential:
    wider = width * block.growth
    changes = stride != 1 or channels != wider
    first = block(channels, width, stride, shortcut(channels, wider, stride) if changes else None)
    return nn.Sequential(first, *(block(wider, width, 1, None) for _ in range(count - 1)))


_KERNEL = ("kernel_height", "kernel_width")
_ENDS = {
    "conv1.weight": ("width", "image", *_KERNEL),
    "bn1.*": ("width",),
    "fc.weight": ("classes", "width"),
    "fc.bias": ("classes",),
    "*.downsample.0.weight": ("width", "narrower", *_KERNEL),
    "*.downsample.1.*": ("width",),
}
_BASIC = {  # "channels": inside of a block; "width": from block to block
    **_ENDS,
    "*.conv1.weight": ("channels", "width", *_KERNEL),
    "*.bn1.*": ("channels",),
    "*.conv2.weight": ("width", "channels", *_KERNEL),
    "*.bn2.*": ("width",),
}
_BOTTLENECK = {
    **_ENDS,
    "*.conv1.weight": ("reduced", "width", *_KERNEL),
    "*.bn1.*": ("reduced",),
    "*.conv2.weight": ("channels", "reduced", *_KERNEL),
    "*.bn2.*": ("channels",),
    "*.conv3.weight": ("width", "channels", *_KERNEL),
    "*.bn3.*": ("width",),
}
