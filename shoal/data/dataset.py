"""Any map-style data set from Python: of PyTorch, of Hugging Face ``datasets``, or a list."""

import hashlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.data.config import SourceConfig, read_config
from shoal.data.ledger import Ids
from shoal.data.reference import resolve
from shoal.data.source import Batch, Source, Splits
from shoal.data.split import random_parts
from shoal.errors import UserError, unknown_name
from shoal.recipe.recipe import DataSpec

Collate = Callable[[Sequence[Any]], Batch]


@dataclass(frozen=True, kw_only=True)
class PythonConfig(SourceConfig):
    factory: str = ""  # "module:function" that returns a data set, or {"train": ..., "validation": ..., "test": ...}
    arguments: Mapping[str, Any] = field(default_factory=dict)  # passed to it by name
    columns: Mapping[str, str] = field(default_factory=dict)  # batch's name -> sample's name, as { target = "label" }
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a sample does not tell a model, as { classes = 10 }


class DatasetSource:
    """Wraps a data set with ``__len__`` and ``__getitem__``.

    A sample may be a tuple (input, target), a mapping of names, or the input alone; ``collate`` (a list of samples ->
    Batch) may replace that. ``columns`` (name in the batch -> name in a sample) takes these out of a mapping and leaves
    the others. Fetches are serialised, since few data sets expect to be called by several threads.

    A data set that draws from the global generators of torch, NumPy or Python (as random transforms do) is found out by
    its first sample. Its samples are then drawn from generators seeded by (seed, epoch, id), whose states are put back
    afterwards; ``draws`` is set, and the batches are made in the training thread, since those generators are shared.

    Raises UserError when the data set has no length or no samples, or gives samples that cannot be collated."""

    def __init__(
        self,
        dataset: Any,
        collate: Collate | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        kind = type(dataset).__name__
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise UserError(f"{kind} is not a map-style data set: it needs __len__ and __getitem__.")
        if not len(dataset):
            raise UserError(f"the data set {kind} has no samples.")
        self._dataset = dataset
        self._collate = collate or (lambda samples: collate_samples(samples, columns or {}))
        self._seed = seed
        self._lock = threading.Lock()
        with _Generators() as generators:
            first = self._batch([0])
            self.draws = generators.moved()
        if self.draws:
            first = self.fetch(np.zeros(1, np.int64), 0)
        self.facts: Mapping[str, Any] = {**_facts(dataset, first), **(facts or {})}
        self.fingerprint = self._print(first)

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        with self._lock:
            if not self.draws:
                return self._batch(ids.tolist())
            with _Generators() as generators:
                samples = []
                for i in ids.tolist():
                    generators.seed(f"{self._seed}/{epoch}/{i}")
                    samples.append(self._dataset[i])
                return self._collate(samples)

    def _batch(self, ids: list[int]) -> Batch:
        if hasattr(self._dataset, "__getitems__"):  # PyTorch's protocol for a whole batch at once
            return self._collate(self._dataset.__getitems__(ids))
        return self._collate([self._dataset[i] for i in ids])

    def _print(self, first: Batch) -> str:
        """By what can be known without reading every sample: their number, and the first and the last of them."""
        digest = hashlib.sha256(f"dataset {len(self)}".encode())
        last = self.fetch(np.array([len(self) - 1]), 0)
        for batch in (first, last):
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class _Generators:
    """The global generators of torch, NumPy and Python: as they were, once the block is left."""

    def __enter__(self) -> "_Generators":
        self._before = (torch.random.get_rng_state(), np.random.get_state(legacy=True), random.getstate())
        return self

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self._before[0])
        np.random.set_state(self._before[1])
        random.setstate(self._before[2])

    def moved(self) -> bool:
        """Whether anything has been drawn since the block was entered."""
        torch_state, numpy_state, python_state = self._before
        return (
            not torch.equal(torch_state, torch.random.get_rng_state())
            or repr(numpy_state) != repr(np.random.get_state(legacy=True))
            or python_state != random.getstate()
        )

    def seed(self, words: str) -> None:
        number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
        torch.default_generator.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)


def collate_samples(samples: Sequence[Any], columns: Mapping[str, str]) -> Batch:
    """Stacks samples into a Batch; fractions become float32, whole numbers int64, bool stays. Raises UserError when the
    samples have different shapes, hold what is no number, or lack one of ``columns``."""
    first = samples[0]
    if isinstance(first, Mapping):
        for name in columns.values():
            if name not in first:
                raise unknown_name("column", name, map(str, first), "the samples of the data set")
        chosen = columns or {name: name for name in first}
        return {str(to): _stack([sample[name] for sample in samples], str(name)) for to, name in chosen.items()}
    if isinstance(first, tuple | list) and len(first) == 2:
        inputs, targets = zip(*samples, strict=True)
        return {"input": _stack(inputs, "input"), "target": _stack(targets, "target")}
    if isinstance(first, tuple | list) and len(first) != 1:
        raise UserError(f"a sample is a tuple of {len(first)}: give (input, target), a mapping of names, or a collate.")
    return {"input": _stack([s[0] if isinstance(s, tuple | list) else s for s in samples], "input")}


def _stack(values: Sequence[Any], name: str) -> Tensor:
    try:
        tensor = torch.stack([v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in values])
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = f"{type(values[0]).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"the samples' {name!r} cannot be stacked ({kinds}): give a collate function.") from None
    if tensor.dtype.is_floating_point:
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _facts(dataset: Any, first: Batch) -> dict[str, Any]:
    """What the first sample and a data set's own ``classes`` (as torchvision's have) tell."""
    facts: dict[str, Any] = {}
    if "input" in first:
        shape = tuple(first["input"].shape[1:])
        facts |= {"shape": shape} if len(shape) > 1 else {"features": shape[0] if shape else 1}
    if "tokens" in first and first["tokens"].ndim > 1:
        facts["context"] = first["tokens"].shape[1] - (0 if "target" in first else 1)
    target = first.get("target")
    labels = getattr(dataset, "classes", None)
    if isinstance(labels, list | tuple) and labels:
        facts |= {"classes": len(labels), "labels": [str(label) for label in labels]}
    elif target is not None and target.is_floating_point():
        facts["outputs"] = target[0].numel()
    return facts


def open_dataset(spec: DataSpec, seed: int) -> Splits:
    """What the factory named in the recipe returns: one data set, of which some is held out at random, or one a split.

    Raises UserError when there is no factory, or it returns something else."""
    config = read_config(PythonConfig, spec)
    if not config.factory:
        raise UserError("data with source = 'python' needs factory = 'module:function' that returns a data set.")
    made = resolve(config.factory, "data.factory")(**config.arguments)
    if not isinstance(made, Mapping):
        made = {"train": made}
    for name in made:
        if name not in ("train", "validation", "test"):
            raise unknown_name("split", str(name), ("train", "validation", "test"), config.factory)
    if "train" not in made:
        raise UserError(f"data.factory = {config.factory!r} returned no 'train' split.")
    sources: dict[str, Source] = {
        name: one
        if isinstance(one, DatasetSource)
        else DatasetSource(one, columns=config.columns, facts=config.facts, seed=seed)
        for name, one in made.items()
    }
    validation = 0.0 if "validation" in sources else spec.validation
    test = 0.0 if "test" in sources else spec.test
    drawn = random_parts(len(sources["train"]), validation, test, seed).splits(sources["train"])
    return Splits(drawn.train, sources.get("validation", drawn.validation), sources.get("test", drawn.test))
