"""What is to be served: a run, a checkpoint, a Hugging Face folder or module:factory, as a model and plain facts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.data.reference import resolve
from shoal.data.special import special_tokens
from shoal.data.tokenizer import from_description, open_tokenizer
from shoal.errors import UserError
from shoal.models.bert import Bert, BertConfig, Head
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface import load_folder
from shoal.models.on_meta import on_meta
from shoal.models.weights_file import read_json
from shoal.serve.generation.chat import chat_facts
from shoal.serve.precision import fastest, in_dtype


@dataclass(frozen=True)
class Loaded:
    """``facts`` are plain JSON values: all that the HTTP side must know, which never sees the model.

    Always "name", "task", "kind", "parameters", "dtype", "source"; by task "labels", "shape", "pixels", "columns",
    "shift", "scale", "tokenizer", "context", "vocab", "pad", "start", "separator", "chat", "pooling", "normalise"."""

    model: nn.Module
    facts: Mapping[str, Any]


def load(target: str, task: str = "", dtype: str = "float32", name: str = "") -> Loaded:
    """The model in evaluation mode on the CPU; ``task`` is one of shoal.serve.options.TASKS, or "" to infer it.
    ``dtype`` "auto" gives float32, from which `fitted` finds better ones.

    Raises UserError when there is no such target, and when it is not made for the task."""
    path = Path(target)
    if (path / "config.json").exists() and not (path / "recipe.toml").exists():
        loaded = _from_folder(path)
    elif ":" in target and not path.exists():
        loaded = _from_factory(target)
    else:
        loaded = _from_run(target)
    facts = dict(loaded.facts)
    if task and task != facts["task"]:
        if task not in ("tensors", *_ALSO.get(facts["task"], ())):
            raise UserError(f"{target!r} does {facts['task']}, not {task}: leave --task out, or choose tensors.")
        facts["task"] = task
    if facts["task"] == "embeddings":
        facts = {"pooling": "mean", "normalise": False, **facts}
    model = loaded.model.eval().requires_grad_(False)
    facts |= {
        "name": name or facts["name"],
        "dtype": "float32" if dtype == "auto" else dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    model = in_dtype(model, dtype, facts["task"])
    return Loaded(model, json.loads(json.dumps(facts)))


def fitted(loaded: Loaded, batch: int, threads: int) -> Loaded:
    """In the numbers that are measured to be the fastest and near enough."""
    model, told = fastest(loaded.model, loaded.facts, batch, threads)
    return Loaded(model, {**loaded.facts, **told})


_ALSO = {"tensors": ("classification", "image-classification")}  # tasks that another one's model may be told to do


def _from_folder(path: Path) -> Loaded:
    folder = load_folder(path)
    with on_meta():  # the file's weights take the place of what is made here
        if folder.config.kind == "bert":
            head: Head = folder.config.head  # type: ignore[assignment]
            model: nn.Module = Bert(BertConfig(**folder.config.options), head)
            task = _BERT_TASKS[head]
        else:
            model, task = GPT(GPTConfig(**folder.config.options)), "text-generation"
    _fill(model, folder.state, path)
    facts: dict[str, Any] = {
        "name": path.resolve().name,
        "source": str(path.resolve()),
        "kind": folder.config.kind,
        "task": task,
        **_text_facts(path, folder.config.options),
    }
    if task == "sequence-classification":
        labels = read_json(path / "config.json").get("id2label") or {}
        facts["labels"] = [labels.get(str(i), str(i)) for i in range(folder.config.options["classes"])]
    if task == "embeddings":
        facts |= _pooling(path)
    return Loaded(model, facts)


_BERT_TASKS = {
    "encoder": "embeddings",
    "classification": "sequence-classification",
    "question-answering": "question-answering",
    "masked-language-model": "tensors",
}


def _fill(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """What a model's own head never uses may lack in the file (an encoder's pooler), and the other way round."""
    wanted = model.state_dict()
    lacking = [name for name in wanted if name not in state]
    for name in lacking:
        if not name.startswith("pooler."):
            raise UserError(f"{str(path)!r} lacks the weights of {name!r}: train that head first.")
    found = {name: state[name] if name in state else torch.zeros(t.shape) for name, t in wanted.items()}
    try:
        model.load_state_dict(found, assign=True)
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip()
        raise UserError(f"the weights in {str(path)!r} do not fit its config.json: {first}") from None


def _text_facts(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"context": options["context"], "vocab": options["vocab"]}
    shorter = path / "sentence_bert_config.json"
    if shorter.exists():
        facts["context"] = min(facts["context"], read_json(shorter).get("max_seq_length") or facts["context"])
    if (path / "tokenizer.json").exists():
        tokenizer = open_tokenizer(str(path))
        special = special_tokens(tokenizer)
        facts |= {"tokenizer": tokenizer.description(), "pad": special.pad}
        facts |= {"start": special.start, "separator": special.separator, "chat": chat_facts(path)}
    return facts


def _pooling(path: Path) -> dict[str, Any]:
    """How sentence-transformers' folders say that states become one vector."""
    modules = json.loads((path / "modules.json").read_text()) if (path / "modules.json").exists() else []
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module.get("path", "") for module in modules}
    facts: dict[str, Any] = {"pooling": "mean", "normalise": "Normalize" in kinds}
    if "Pooling" in kinds:
        config = read_json(path / kinds["Pooling"] / "config.json")
        asked = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
        if len(asked) != 1 or asked[0] not in known:
            raise UserError(
                f"{str(path)!r} pools by {', '.join(asked) or 'nothing'}: only {', '.join(known)} are here."
            )
        facts["pooling"] = known[asked[0]]
    return facts


def _from_factory(target: str) -> Loaded:
    made = resolve(target, "the target")()
    if not isinstance(made, nn.Module):
        raise UserError(f"{target!r} must return an nn.Module, it returned {type(made).__name__}.")
    return Loaded(made, {"name": target.partition(":")[2], "source": target, "kind": "custom", "task": "tensors"})


def _from_run(target: str) -> Loaded:
    # Only here: what trains models takes longer to import than a folder's weights take to read.
    from shoal.data.description import pixel_table
    from shoal.data.registry import open_data
    from shoal.models.registry import task_name
    from shoal.train.scoring import find_target, load_target, rebuild

    try:
        found = find_target(target)
    except UserError as error:
        raise UserError(f"{error} Else give a checkpoint, a Hugging Face folder or module:factory.") from None
    recipe = found.run.recipe
    state = load_target(found)
    described = found.run.data
    if described is None or described["lacking"]:  # a run of an older version, or facts that only the data can tell
        train = open_data(recipe.data, recipe.seed).train
        described = {"facts": train.facts, "pixels": pixel_table(train)}
    given = dict(described["facts"])
    if "shape" in given:
        given["shape"] = tuple(given["shape"])
    model = rebuild(found, state, given)
    facts: dict[str, Any] = {
        "name": found.run.path.name,
        "source": f"{found.run.path} at step {state.step}",
        "kind": recipe.model.kind,
        "task": _run_task(task_name(recipe.model, given), given),
    }
    kept = ("shape", "labels", "columns", "shift", "scale", "tokenizer", "context", "vocab", "pad")
    facts |= {name: given[name] for name in kept if name in given}
    config = getattr(model, "config", None)
    if getattr(config, "context", 0):
        facts |= {"context": config.context, "vocab": getattr(config, "vocab", 0)}  # type: ignore[union-attr]
    if "tokenizer" in given and facts["task"] != "text-generation":
        special = special_tokens(from_description(given["tokenizer"]))
        facts |= {"pad": special.pad, "start": special.start, "separator": special.separator}
    if described["pixels"] is not None:
        facts["pixels"] = described["pixels"]
    return Loaded(model, facts)


def _run_task(trained_for: str, facts: Mapping[str, Any]) -> str:
    match trained_for:
        case "classification" if "tokenizer" in facts:
            return "sequence-classification"
        case "classification" if len(facts.get("shape", ())) == 3:
            return "image-classification"
        case "classification" if "features" in facts:
            return "classification"
        case "question-answering":
            return "question-answering"
        case "language-model":
            return "text-generation"
    return "tensors"
