"""A trained model taken from its run again: scored on held-out data, or handed over as a Hugging Face folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.registry import open_data
from shoal.data.source import Source
from shoal.data.squad import SquadSource
from shoal.errors import UserError
from shoal.memory.conversion import converted
from shoal.models.huggingface import save_folder
from shoal.models.registry import build, task_for
from shoal.models.squad import Window, decode_answers, squad_scores
from shoal.recipe.memory_plan import MemoryPlan
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.evaluation import LARGEST_BATCH, evaluate
from shoal.train.precision import autocast
from shoal.train.state import load_model


@dataclass(frozen=True)
class Target:
    """A run, and the checkpoint of it that is meant; None: its newest whole one."""

    run: Run
    checkpoint: Path | None


def find_target(target: str | Path) -> Target:
    """From a run directory, "latest", or the folder of a checkpoint. Raises UserError when it is neither."""
    path = Path(target)
    if checkpoint.is_folder_name(path.name) and (path.parent.parent / "recipe.toml").exists():
        return Target(Run.find(path.parent.parent), path)
    return Target(Run.find(target), None)


def load_target(target: Target) -> checkpoint.Checkpoint:
    """Its verified checkpoint. Raises UserError when the run has no whole one."""
    if target.checkpoint:
        return checkpoint.load(target.checkpoint)
    found, _, skipped = checkpoint.newest(target.run.checkpoints)
    if found is None:
        why = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise UserError(f"no whole checkpoint in {str(target.run.checkpoints)!r}{f' ({why})' if why else ''}.")
    return found


def rebuild(target: Target, state: checkpoint.Checkpoint, facts: Mapping[str, Any]) -> nn.Module:
    """The model of the run's recipe with the checkpoint's weights, in evaluation mode; ``facts``: of its data."""
    recipe = target.run.recipe
    torch.manual_seed(recipe.seed)
    model = build(recipe.model, facts)
    prefix = "model/"
    weights = {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}
    load_model(model, converted(weights, {}, model, MemoryPlan())[0])
    return model.eval()


def score(group: Group, target: Target, split: str) -> dict[str, Any]:
    """The task's figures on a split: "train", "validation", "test", or "" for the test set if there is one."""
    group.report(Phase.building)
    recipe = target.run.recipe
    state = load_target(target)
    splits = open_data(recipe.data, recipe.seed)
    chosen = split or ("test" if splits.test is not None else "validation")
    source: Source | None = getattr(splits, chosen)
    if source is None or len(source) == 0:
        raise UserError(f"the data of {str(target.run.path)!r} has no {chosen} split: choose another with --split.")
    model = rebuild(target, state, splits.train.facts)
    device = torch.device("cpu")
    task = task_for(recipe.model, splits.train.facts)
    settings: dict[str, Any] = {"precision": recipe.precision, "device": device}
    figures = evaluate(group, model, task, source, batch=recipe.batch, **settings)
    if isinstance(source, SquadSource):
        figures |= _answer_scores(group, model, source, recipe.precision)
    return {
        "run_dir": str(target.run.path),
        "step": state.step,
        "split": chosen,
        "samples": len(source),
        "figures": {name: value for name, value in figures.items() if math.isfinite(value)},
    }


def _answer_scores(group: Group, model: nn.Module, source: SquadSource, precision: str) -> dict[str, float]:
    """Exact match and F1 of the answers' texts; each worker answers its share of the questions."""
    share = np.array_split(np.arange(len(source.questions)), group.world)[group.rank]
    mine = np.flatnonzero(np.isin(source.windows[:, 0], share))
    windows: list[Window] = []
    contexts: dict[str, str] = {}
    for ids in np.array_split(mine, max(1, -(-len(mine) // LARGEST_BATCH))):
        if not len(ids):
            continue
        group.report(Phase.evaluating)
        batch = source.fetch(ids, 0)
        with torch.no_grad(), autocast(precision, torch.device("cpu")):
            logits = model(batch["tokens"], mask=batch["mask"], types=batch["types"]).float().numpy()
        for row, id in enumerate(ids.tolist()):
            example = source.example(id)
            contexts[example["id"]] = example["context"]
            windows.append(Window(example["id"], example["offsets"], logits[row, :, 0], logits[row, :, 1]))
    answers: dict[str, str] = {}
    for told in group.gather(json.dumps(decode_answers(windows, contexts)).encode()):
        answers |= json.loads(told)
    return squad_scores(answers, source.dataset)


def export_target(target: Target, folder: Path) -> None:
    """Write the model as a Hugging Face folder. Raises UserError for models that have no such form."""
    recipe = target.run.recipe
    splits = open_data(recipe.data, recipe.seed)
    model = rebuild(target, load_target(target), splits.train.facts)
    save_folder(model, folder, _tokenizer_json(splits.train.facts))


def _tokenizer_json(facts: Mapping[str, Any]) -> str | None:
    """The text of tokenizer.json, for data that was cut by such a tokenizer."""
    described = facts.get("tokenizer", {})
    text = described.get("json")
    return None if text is None else text if isinstance(text, str) else json.dumps(text)
