"""float32 or bfloat16: measured where the recipe leaves it open."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from shoal.recipe.recipe import Recipe
from shoal.train.worker import Worker

Precision = Literal["float32", "bfloat16"]
WORTH = 1.3  # bfloat16 must make matmuls faster by so much, or its lost digits are not worth it


@dataclass(frozen=True)
class Measured:
    precision: Precision
    why: str


def measure_precision(device: torch.device, size: int = 512, repeats: int = 5) -> Measured:
    """Time one square matmul in both precisions, with the threads that are set now, and pick.

    A processor with AMX multiplies bfloat16 about ten times faster than float32; one without may be slower."""
    speed = {dtype: _matmul_flops(device, dtype, size, repeats) for dtype in (torch.float32, torch.bfloat16)}
    ratio = speed[torch.bfloat16] / speed[torch.float32]
    choice: Precision = "bfloat16" if ratio >= WORTH else "float32"
    return Measured(choice, f"measured: bfloat16 matmul runs at {ratio:.1f}x float32")


def _matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: parameters stay float32, matmuls run in bfloat16 where asked."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def settled(recipe: Recipe, worker: Worker) -> tuple[Recipe, str]:
    """The recipe with nothing left open: rank 0 measures, all take its choice."""
    if recipe.precision != "auto":
        return recipe, ""
    said = ["", ""]
    if worker.rank == 0:
        found = measure_precision(worker.device)
        said = [found.precision, found.why]
    precision, why = json.loads(worker.group.gather(json.dumps(said).encode())[0])
    return replace(recipe, precision=precision), why
