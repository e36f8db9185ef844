"""Run directories with a checkpoint of a model as it was built: served like trained ones, made in no time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_samples import idx_bytes

from shoal.data.registry import open_data
from shoal.models.registry import build
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, Recipe
from shoal.run.run import Run
from shoal.train import checkpoint


def save_run(folder: Path, model: ModelSpec, data: DataSpec, scale: float = 1.0) -> Path:
    recipe = Recipe(model=model, data=data, batch=8, shards=1, steps=1)
    run = Run.create(recipe, Plan(), {}, folder)
    torch.manual_seed(0)
    made = build(model, open_data(data, recipe.seed).train.facts)
    tensors = {f"model/{name}": tensor * scale for name, tensor in made.state_dict().items()}
    checkpoint.save(checkpoint.Checkpoint(tensors, {"step": 1}), run.checkpoints)
    return run.path


def image_run(folder: Path) -> Path:
    """A CNN on 12 x 12 grey images of 4 classes, from IDX files."""
    data = folder / "images"
    data.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images, labels = draw.integers(0, 256, (40, 12, 12), np.uint8), np.arange(40, dtype=np.uint8) % 4
        (data / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (data / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    spec = ModelSpec(kind="cnn", options={"channels": (4, 6), "hidden": 8})
    return save_run(folder / "run", spec, DataSpec(source="idx", path=str(data)))


def table_run(folder: Path) -> Path:
    """An MLP on a CSV file with two columns of numbers and two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{10 + i},{i * 0.5},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (folder / "table.csv").write_text("\n".join(["height,weight,target", *rows]))
    spec = ModelSpec(kind="mlp", options={"hidden": (8,)})
    return save_run(folder / "run", spec, DataSpec(source="csv", path=str(folder / "table.csv")))


def text_run(folder: Path) -> Path:
    """A BERT that tells two kinds of text apart, byte by byte."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": f"line {i}", "target": "ab"[i % 2]}) for i in range(40)]
    (folder / "lines.jsonl").write_text("\n".join(rows))
    options: dict[str, Any] = {"layers": 1, "heads": 2, "width": 16}
    data = DataSpec(source="jsonl", path=str(folder / "lines.jsonl"), options={"text": "text", "context": 24})
    return save_run(folder / "run", ModelSpec(kind="bert", options=options), data, scale=8.0)


def gpt_run(folder: Path, kind: str = "gpt", **more: Any) -> Path:
    """A GPT on characters, or with kind "moe" a mixture of experts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    data = DataSpec(source="text", path=str(folder / "text.txt"), options={"tokenizer": "chars", "context": 32})
    options = {"layers": 1, "heads": 2, "width": 16, **more}
    return save_run(folder / "run", ModelSpec(kind=kind, options=options), data)
