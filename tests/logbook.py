"""Run directories as a training run would have left them, with figures that the tests choose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe
from shoal.run.run import Run

Event = dict[str, Any]


def started(time: float = 0.0, **changed: Any) -> Event:
    facts = {"step": 0, "workers": 2, "placement": [4, 4], "host": "here", "device": "cpu", "threads": 1, "steps": 10}
    facts |= {"precision": "float32", "parameters": 12345, "recipe_hash": "ab", "torch": "2.13.0"}
    return {"time": time, "event": "started", **facts, **changed}


def committed(step: int, **changed: Any) -> Event:
    parts = {"data": 0.1, "forward": 0.3, "backward": 0.4, "exchange": 0.05, "update": 0.05, "checkpoint": 0.0}
    fields: Event = {"step": step, "epoch": 0, "index": step, "loss": 4.0 / step, "grad_norm": 1.0, "lr": 0.01}
    fields |= {"samples": 64, "targets": 640, "seconds": 1.0, "parts": parts, "waited": {"0": 0.1, "1": 0.25}}
    return {"time": float(step), "event": "committed", **fields, **changed}


def evaluated(step: int, split: str = "validation", **figures: Any) -> Event:
    return {
        "time": float(step),
        "event": "evaluated",
        "step": step,
        "split": split,
        "figures": figures,
        "seconds": 0.2,
    }


def story(steps: int = 10) -> list[Event]:
    """A run from start to end, with an evaluation, a checkpoint and a sample."""
    work: list[Event] = [committed(step) for step in range(1, steps + 1)]
    return [
        started(steps=steps),
        *work[: steps // 2],
        evaluated(steps // 2, loss=1.5, accuracy=0.25),
        *work[steps // 2 :],
        evaluated(steps, loss=1.75, accuracy=0.5),
        {"time": steps, "event": "checkpointed", "step": steps, "path": "checkpoints/last", "bytes": 2_000_000}
        | {"stall_s": 0.01, "write_s": 0.2, "best": True},
        {"time": steps + 1.0, "event": "sampled", "step": steps, "text": "to be or not"},
        {"time": steps + 2.0, "event": "ended", "step": steps, "result": {"weights_sha256": "5" * 64}},
    ]


def make_run(
    folder: Path,
    events: list[Event],
    recipe: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    workers: int = 2,
) -> Run:
    chosen = {"model": ModelSpec(kind="cnn", options={"width": 16}), "optimizer": OptimizerSpec(lr=0.01), "steps": 10}
    run = Run.create(Recipe(**{**chosen, **(recipe or {})}), Plan(mesh={"data": workers}), origins or {}, folder)
    log = run.open_log()
    for event in events:
        log.write(**event)
    log.close()
    return run
