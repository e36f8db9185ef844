"""IDX files: MNIST and its kin, plain or gzipped."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.config import read_config
from shoal.data.ledger import Ids
from shoal.data.pixels import ImageConfig, Images, Pixels, channel_statistics, pixels
from shoal.data.source import Batch, Splits
from shoal.data.split import random_parts
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> NDArray[Any]:
    """The array in an IDX file (format: Y. LeCun's MNIST page); a plain file is memory-mapped, a gzipped one unpacked.

    Raises UserError naming the file and what is wrong with it."""
    try:
        return _parse(path, gzip.decompress(path.read_bytes()) if _is_gzip(path) else _mapped(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{str(path)!r} is a damaged gzip file: {error}: fetch it again.") from None
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: check data.path.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}.") from None


def _mapped(path: Path) -> bytes | NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else b""


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _parse(path: Path, raw: bytes | NDArray[np.uint8]) -> NDArray[Any]:
    head = bytes(raw[:4])
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES or not head[3]:
        raise UserError(
            f"{str(path)!r} is not an IDX file: it starts with {head.hex() or 'nothing'}, not 0000, type, dims."
        )
    start = 4 + 4 * head[3]
    if len(raw) < start:
        raise UserError(
            f"{str(path)!r} is cut short: its header needs {start} bytes, it has {len(raw)}: fetch it again."
        )
    shape = tuple(int(n) for n in np.frombuffer(bytes(raw[4:start]), ">u4"))
    dtype = np.dtype(TYPES[head[2]])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        size = "x".join(map(str, shape))
        raise UserError(
            f"{str(path)!r} is {'cut short' if len(raw) < expected else 'too long'}: "
            f"{len(raw)} bytes, but its header says {size} values, {expected} bytes: fetch it again."
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class IdxConfig(ImageConfig):
    prefix: str = ""  # what the files' names start with, as "emnist-letters-"; mean and std: (): of the training images


@dataclass(frozen=True)
class IdxSource:
    """{"input": float32 [n, C, H, W], "target": int64 [n]}"""

    images: Images
    targets: NDArray[np.int64]
    classes: int
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def facts(self) -> Mapping[str, Any]:
        labels = [str(label) for label in range(self.classes)]
        return {"shape": self.images.shape[1:], "classes": self.classes, "labels": labels}

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"idx {self.images.shape} {self.pixels.words}".encode())
        for part in (self.images, self.targets.astype("<i8")):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        return {
            "input": torch.from_numpy(self.pixels(self.images[ids], ids, epoch)),
            "target": torch.from_numpy(self.targets[ids]),
        }


def open_idx(spec: DataSpec, seed: int) -> Splits:
    """The training files of a folder, some samples held out at random; test files, if any, are the test split.

    Raises UserError naming the file that is missing or damaged."""
    config = read_config(IdxConfig, spec)
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data: no folder {spec.path!r}: data.path is the folder that holds the IDX files.")
    images, targets = _pair(folder, f"{config.prefix}train")
    parts = random_parts(len(images), spec.validation, spec.test, seed)
    used = images[parts.train]
    histogram = np.stack([np.bincount(used[:, c].ravel(), minlength=256) for c in range(images.shape[1])])
    treatment = pixels(config, *channel_statistics(histogram), seed)
    classes = int(targets.max()) + 1
    train, plain = (IdxSource(images, targets, classes, kind) for kind in (treatment, treatment.plain()))
    splits = parts.splits(train, plain)
    apart = Path(spec.test_path).expanduser() if spec.test_path else folder
    name = next((n for n in ("t10k", "test") if _find(apart, f"{config.prefix}{n}", "images")), "")
    if spec.test_path and not name:
        raise UserError(f"data: no t10k-images or test-images IDX file in {spec.test_path!r}: check data.test_path.")
    if name and (spec.test_path or not spec.test):
        test_images, test_targets = _pair(apart, f"{config.prefix}{name}")
        if test_images.shape[1:] != images.shape[1:] or test_targets.max() >= classes:
            raise UserError(
                f"data: the {name} images in {str(apart)!r} have other shapes or labels than the training ones."
            )
        splits = replace(splits, test=IdxSource(test_images, test_targets, classes, treatment.plain()))
    return splits


def _find(folder: Path, name: str, what: str) -> Path | None:
    endings = ("-idx3-ubyte", ".idx3-ubyte") if what == "images" else ("-idx1-ubyte", ".idx1-ubyte")
    candidates = (folder / f"{name}-{what}{ending}{packed}" for ending in endings for packed in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _pair(folder: Path, name: str) -> tuple[Images, NDArray[np.int64]]:
    """The images [n, C, H, W] and labels [n] of one set."""
    paths = [_find(folder, name, what) for what in ("images", "labels")]
    if paths[0] is None or paths[1] is None:
        missing = "images-idx3" if paths[0] is None else "labels-idx1"
        raise UserError(f"data: no file {name}-{missing}-ubyte or .gz in {str(folder)!r}: check data.path and prefix.")
    images, labels = read_idx(paths[0]), read_idx(paths[1])
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(f"{str(paths[0])!r} holds {images.dtype} {images.shape}, not 8-bit images: check data.path.")
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise UserError(f"{str(paths[1])!r} holds {labels.dtype} {labels.shape}, not 8-bit labels: check data.path.")
    if len(images) != len(labels):
        raise UserError(f"{str(paths[0])!r} has {len(images)} images, but {str(paths[1])!r} {len(labels)} labels.")
    return (images[:, None] if images.ndim == 3 else images), labels.astype(np.int64)
