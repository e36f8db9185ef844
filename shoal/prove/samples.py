"""Samples made from a formula, for proofs that need no data of anybody's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.data.source import Batch

CLASSES, VOCAB = 5, 31


@dataclass(frozen=True)
class Pictures:
    """Noise around one picture a class: float [n, 1, side, side]."""

    samples: int
    side: int = 8
    wide: bool = False  # float64

    def __len__(self) -> int:
        return self.samples

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"shape": (1, self.side, self.side), "classes": CLASSES}

    @property
    def fingerprint(self) -> str:
        return f"pictures {self.samples} {self.side} {self.wide}"

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        shape = (1, self.side, self.side)
        classes = ids % CLASSES
        pictures = np.random.default_rng(1).normal(size=(CLASSES, *shape))
        noise = np.stack([np.random.default_rng(int(i)).normal(size=shape) for i in ids])
        dtype = np.float64 if self.wide else np.float32
        return {
            "input": torch.from_numpy((pictures[classes] + noise).astype(dtype)),
            "target": torch.from_numpy(classes.astype(np.int64)),
        }


@dataclass(frozen=True)
class Sentences:
    """Windows of a text that repeats itself: tokens int [n, context + 1]."""

    samples: int
    context: int = 8

    def __len__(self) -> int:
        return self.samples

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"vocab": VOCAB, "context": self.context}

    @property
    def fingerprint(self) -> str:
        return f"sentences {self.samples} {self.context}"

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        at = ids[:, None].astype(np.int64) * 3 + np.arange(self.context + 1)[None]
        return {"tokens": torch.from_numpy((at * at + at // 7) % VOCAB)}
