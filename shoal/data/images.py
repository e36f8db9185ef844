"""Folders of images, one sub-folder a class."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.config import at_least, read_config
from shoal.data.ledger import Ids
from shoal.data.pixels import ImageConfig, Images, Pixels, pixels
from shoal.data.source import Batch, Splits
from shoal.data.split import random_parts
from shoal.errors import UserError, unknown_name
from shoal.recipe.recipe import DataSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of ImageNet's training set, as widely published


@dataclass(frozen=True, kw_only=True)
class FolderConfig(ImageConfig):
    size: int | tuple[int, int] = 32  # pixels, or (height, width): scaled to cover it, then cut about the centre
    channels: Literal[1, 3] = 3  # 1: grey; mean and std: (): those of ImageNet

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, size=min(self.height_width))

    @property
    def height_width(self) -> tuple[int, int]:
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


@dataclass(frozen=True)
class ImageSource:
    """{"input": float32 [n, C, H, W], "target": int64 [n]}; files are decoded when they are fetched."""

    root: Path
    files: tuple[Path, ...]
    targets: NDArray[np.int64]
    labels: tuple[str, ...]
    shape: tuple[int, int, int]  # C, H, W
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.files)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"shape": self.shape, "classes": len(self.labels), "labels": list(self.labels)}

    @cached_property
    def fingerprint(self) -> str:
        """By the files' names and sizes: reading every image of a large set only to name it would take too long."""
        digest = hashlib.sha256(f"images {self.shape} {self.pixels.words}".encode())
        for file in self.files:
            digest.update(f"{file.relative_to(self.root).as_posix()} {file.stat().st_size}\n".encode())
        return digest.hexdigest()

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        images: Images = np.stack([_decode(self.files[i], self.shape) for i in ids.tolist()])
        return {
            "input": torch.from_numpy(self.pixels(images, ids, epoch)),
            "target": torch.from_numpy(self.targets[ids]),
        }


def _decode(path: Path, shape: tuple[int, int, int]) -> Images:
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (width, height))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files it cannot decode
        raise UserError(f"cannot decode image {str(path)!r}: {error}: mend or remove it.") from None
    return np.asarray(fitted, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def open_images(spec: DataSpec, seed: int) -> Splits:
    """The images under ``path``, some held out at random; those under ``test_path``, by the same classes, to test on.

    Raises UserError when there are none, and when Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError("reading images needs pillow: pip install 'shoal[images]'") from None
    config = read_config(FolderConfig, spec)
    shape = (config.channels, *config.height_width)
    mean, std = (np.array(numbers if config.channels == 3 else [np.mean(numbers)]) for numbers in IMAGENET)
    treatment = pixels(config, mean, std, seed)

    root = Path(spec.path).expanduser()
    labels = _labels(root)
    files, targets = _listing(root, labels)
    train, plain = (ImageSource(root, files, targets, labels, shape, kind) for kind in (treatment, treatment.plain()))
    splits = random_parts(len(files), spec.validation, spec.test, seed).splits(train, plain)
    if spec.test_path:
        apart = Path(spec.test_path).expanduser()
        for label in _labels(apart):
            if label not in labels:
                raise unknown_name("class folder", label, labels, spec.test_path)
        files, targets = _listing(apart, labels)
        splits = replace(splits, test=ImageSource(apart, files, targets, labels, shape, treatment.plain()))
    return splits


def _labels(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise UserError(f"data: no folder {str(root)!r}: data.path holds one sub-folder of images for each class.")
    return tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] != "."))


def _listing(root: Path, labels: tuple[str, ...]) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    """All images, class by class and sorted by name, and the class of each."""
    files: list[Path] = []
    targets: list[int] = []
    for target, label in enumerate(labels):
        found = sorted(path for path in (root / label).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += found
        targets += [target] * len(found)
    if not files:
        raise UserError(f"data: no images in the sub-folders of {str(root)!r}: each class needs a folder of its own.")
    return tuple(files), np.array(targets, np.int64)
