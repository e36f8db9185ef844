"""Pixels to numbers: 8-bit images normalised by channel, and their random changes keyed by (seed, epoch, id)."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.data.config import SourceConfig, at_least
from shoal.data.ledger import Ids
from shoal.errors import UserError

Images = NDArray[np.uint8]  # [n, C, H, W]


@dataclass(frozen=True, kw_only=True)
class ImageConfig(SourceConfig):
    mean: float | tuple[float, ...] = ()  # of each channel, on the scale 0 .. 1; (): see the source
    std: float | tuple[float, ...] = ()
    flip: bool = False  # training images: mirrored left to right, every other one
    crop: int = 0  # training images: moved by up to so many pixels each way, with black behind them

    def __post_init__(self) -> None:
        at_least(0, crop=self.crop)
        if (self.mean == ()) != (self.std == ()):
            raise UserError("data: give both mean and std, or neither.")
        if self.std != () and min(np.atleast_1d(self.std)) <= 0:
            raise UserError(f"data: std must be greater than 0, got {self.std}.")


@dataclass(frozen=True)
class Pixels:
    """What happens to 8-bit images on their way to a model."""

    table: NDArray[np.float32]  # [C, 256]: the number that each pixel value becomes
    flip: bool = False
    crop: int = 0
    seed: int = 0

    def plain(self) -> "Pixels":
        """Without random changes: for held-out images."""
        return replace(self, flip=False, crop=0)

    @property
    def words(self) -> str:
        """What a fingerprint must know of it."""
        return f"{self.table.tobytes().hex()} {self.flip} {self.crop} {self.seed if self.flip or self.crop else 0}"

    def __call__(self, images: Images, ids: Ids, epoch: int) -> NDArray[np.float32]:
        """uint8 [n, C, H, W] -> float32 [n, C, H, W]; a pure function of the images, their ids and the epoch."""
        if self.crop:
            images = self._cropped(images, _draws(self.seed, epoch, ids, 1))
        out = np.empty(images.shape, np.float32)
        for channel, table in enumerate(self.table):
            np.take(table, images[:, channel], out=out[:, channel])
        if self.flip:
            mirrored = _draws(self.seed, epoch, ids, 0) & np.uint64(1) == 1
            out[mirrored] = out[mirrored, :, :, ::-1]
        return out

    def _cropped(self, images: Images, draws: NDArray[np.uint64]) -> Images:
        _, _, height, width = images.shape
        room = np.uint64(2 * self.crop + 1)
        down, right = draws % room, (draws >> np.uint64(32)) % room
        edge = (self.crop, self.crop)
        padded = np.pad(images, ((0, 0), (0, 0), edge, edge))
        out = np.empty_like(images)
        for i, (y, x) in enumerate(zip(down.tolist(), right.tolist(), strict=True)):
            out[i] = padded[i, :, y : y + height, x : x + width]
        return out


def pixels(config: ImageConfig, mean: NDArray[np.float64], std: NDArray[np.float64], seed: int) -> Pixels:
    """The treatment that a config asks for; ``mean`` and ``std`` [C] stand in where it names none.

    Raises UserError when the config's numbers are not one a channel."""
    if config.mean != ():
        given = [np.atleast_1d(np.asarray(numbers, np.float64)) for numbers in (config.mean, config.std)]
        if any(len(numbers) not in (1, len(mean)) for numbers in given):
            raise UserError(f"data: mean and std must be one number, or one for each of the {len(mean)} channels.")
        mean, std = (np.broadcast_to(numbers, mean.shape) for numbers in given)
    table = (np.arange(256) / 255.0 - mean[:, None]) / std[:, None]
    return Pixels(table.astype(np.float32), config.flip, config.crop, seed)


def channel_statistics(histogram: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel on the scale 0 .. 1, from counts of pixel values [C, 256].

    Whole-number counts, so that they do not depend on the order in which pixels were added."""
    values = np.arange(256) / 255.0
    counts = np.maximum(histogram.sum(1), 1)
    mean = (histogram * values).sum(1) / counts
    variance = (histogram * (values - mean[:, None]) ** 2).sum(1) / counts
    std = np.sqrt(variance)
    return mean, np.where(std > 0, std, 1.0)


def _draws(seed: int, epoch: int, ids: Ids, stream: int) -> NDArray[np.uint64]:
    """64 random bits for each id: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), chained over the key."""
    state = np.zeros(len(ids), np.uint64)
    for word in (np.uint64(seed % 2**64), np.uint64(epoch), np.uint64(stream), ids.astype(np.uint64)):
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
