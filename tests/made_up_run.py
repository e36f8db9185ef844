"""Results and events as the library makes them, without a run."""

from collections.abc import Mapping
from typing import Any


def trained(**changes: Any) -> dict[str, Any]:
    return {
        "steps": 4,
        "loss": 1.25,
        "weights_sha256": "ab" * 32,
        "samples": 128,
        "seconds": 75.2,
        "run_dir": "runs/one",
        "figures": {"loss": 1.5, "perplexity": 4.4817},
        "checkpoint": "runs/one/checkpoints/step-4",
        "interrupted": False,
        **changes,
    }


def committed(step: int, **changes: Any) -> Mapping[str, Any]:
    return {
        "event": "committed",
        "step": step,
        "loss": 2.0 - step / 10,
        "samples": 32,
        "targets": 32 * 128,
        "seconds": 0.5,
        "parts": {"data": 0.01},
        "waited": {"0": 0.01, "1": 0.05},
        **changes,
    }


STARTED = {
    "event": "started",
    "step": 0,
    "workers": 2,
    "placement": [5, 3],
    "device": "cpu",
    "precision": "float32",
    "parameters": 1_800_000,
    "steps": 4,
}
