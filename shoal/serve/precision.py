"""In which numbers a model is served: as told, or those that are measured to be fastest here and near enough.

Measured is, in the parent before the weights are shared, a forward pass of one sample and of a full batch (of text
generation: sixteen tokens of one stream and of eight), in turns; near enough is said by `GUARD`, on samples that are
drawn at random in the form that the model takes: a model decides less surely on these than on real ones."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.serve.forward import open_forward
from shoal.serve.int8 import to_int8

SAMPLES = 64  # that the guard looks at
TOKENS = 32  # of each, at most
ROUNDS = 3
STREAMS, NEW = 8, 16
FASTER = 0.95  # of float32's time, or it is not worth another result
GUARD = {"agree": 0.98, "error": 0.02}  # share of samples with the same first choice; largest error of a probability,
# of a vector's direction (1 - cosine), or of a plain output, in terms of the largest


@dataclass(frozen=True)
class Measured:
    """One way to hold the numbers. ``seconds``: of a pass, by its rows."""

    dtype: str
    seconds: Mapping[int, float]
    agree: float
    error: float

    def json(self) -> dict[str, Any]:
        milliseconds = {str(rows): 1e3 * seconds for rows, seconds in self.seconds.items()}
        return {"dtype": self.dtype, "ms": milliseconds, "agree": self.agree, "error": self.error}

    @property
    def near(self) -> bool:
        return self.agree >= GUARD["agree"] and self.error <= GUARD["error"]


def choose(measured: list[Measured]) -> Measured:
    """The first one is float32. The fastest of those that are near enough, over all numbers of rows alike."""
    plain = measured[0]

    def time_of(one: Measured) -> float:
        return statistics.geometric_mean([one.seconds[rows] / plain.seconds[rows] for rows in plain.seconds])

    best = min((one for one in measured if one.near), key=time_of, default=plain)
    return best if time_of(best) < FASTER else plain


def in_dtype(model: nn.Module, dtype: str, task: str) -> nn.Module:
    """The model with its weights in ``dtype``, changed in place. Raises UserError where there is no such way."""
    if dtype != "int8":
        return model.to(getattr(torch, "float32" if dtype == "auto" else dtype))
    if task == "text-generation":
        raise UserError("--dtype int8 is for models that answer in one pass: text is generated in float32 or bfloat16.")
    if not to_int8(model.float()):
        raise UserError("--dtype int8: the model has no nn.Linear layer of its own weights.")
    return model


def fastest(model: nn.Module, facts: Mapping[str, Any], batch: int, threads: int) -> tuple[nn.Module, dict[str, Any]]:
    """(the model in the chosen numbers, the facts that say so: "dtype" and "precision"). ``model`` is in float32."""
    samples = samples_for(facts)
    if samples is None:
        told: dict[str, Any] = {
            "chosen": "float32",
            "why": "what the model takes is not known: nothing was measured",
            "measured": [],
        }
        return model, {"dtype": "float32", "precision": told}
    ways: dict[str, nn.Module] = {"float32": model}
    ways["bfloat16"] = in_dtype(copy.deepcopy(model), "bfloat16", facts["task"])
    if facts["task"] != "text-generation":
        whole = copy.deepcopy(model)
        if to_int8(whole):
            ways["int8"] = whole
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measured = _measured(ways, facts, samples, batch)
    finally:
        torch.set_num_threads(before)
    chosen = choose(measured)
    told = {"chosen": chosen.dtype, "why": "", "measured": [one.json() for one in measured]}
    return ways[chosen.dtype], {"dtype": chosen.dtype, "precision": told}


def _measured(
    ways: Mapping[str, nn.Module], facts: Mapping[str, Any], samples: Mapping[str, Tensor], batch: int
) -> list[Measured]:
    outputs = {way: _outputs(model, {**facts, "dtype": way}, samples) for way, model in ways.items()}
    passes = {way: _pass(model, {**facts, "dtype": way}, samples) for way, model in ways.items()}
    full = STREAMS if facts["task"] == "text-generation" else batch
    spent: dict[str, dict[int, list[float]]] = {way: {1: [], full: []} for way in ways}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for rows in (1, full):
            for way, run in passes.items():
                begun = time.perf_counter()
                run(rows)
                if turn:
                    spent[way][rows].append(time.perf_counter() - begun)
    exact = outputs["float32"]
    return [
        Measured(way, {rows: min(times) for rows, times in spent[way].items()}, *compared(exact, outputs[way]))
        for way in ways
    ]


def _outputs(model: nn.Module, facts: Mapping[str, Any], samples: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    if facts["task"] != "text-generation":
        return open_forward(model, facts)(samples)
    with torch.inference_mode():
        return {"scores": model(samples["tokens"]).float().softmax(-1).flatten(0, 1).numpy()}


def _pass(model: nn.Module, facts: Mapping[str, Any], samples: Mapping[str, Tensor]) -> Callable[[int], object]:
    if facts["task"] == "text-generation":
        from shoal.serve.generation.api import run_all
        from shoal.serve.generation.messages import Ask
        from shoal.serve.generation.opening import open_generator
        from shoal.serve.generation.options import Options

        generator = open_generator(model, Options(threads=torch.get_num_threads(), cache_bytes=64 << 20))
        ask = Ask(samples["tokens"][0].tolist(), NEW, temperature=0.0)
        return lambda rows: run_all(generator, [ask] * rows)
    forward = open_forward(model, facts)

    def run(rows: int) -> object:
        return forward({name: t[torch.arange(rows) % len(t)] for name, t in samples.items()})

    return run


def compared(exact: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    """(share of first choices that agree, largest error) of one task's outputs; the meaning of each is in `GUARD`."""
    agree, error = 1.0, 0.0
    for name, a in exact.items():
        a, b = a.astype(np.float64), other[name].astype(np.float64)
        if name == "spans":  # [sample, place, 2]: over places
            a, b = (np.exp(x - x.max(1, keepdims=True)) for x in (a, b))
            a, b = (x / x.sum(1, keepdims=True) for x in (a, b))
            agree = min(agree, float((a.argmax(1) == b.argmax(1)).mean()))
            error = max(error, float(np.abs(a - b).max()))
        elif name == "scores":
            agree = min(agree, float((a.argmax(-1) == b.argmax(-1)).mean()))
            error = max(error, float(np.abs(a - b).max()))
        elif name == "vectors":
            cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
            error = max(error, float((1 - cosine).max()))
        else:
            error = max(error, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)))
    return agree, error


def samples_for(facts: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Inputs that the model takes, by what is known of them; None: nothing is."""
    drawn = torch.Generator().manual_seed(0)
    if facts.get("vocab") and facts.get("context"):
        room = facts["context"] - (NEW if facts["task"] == "text-generation" else 0)
        tokens = torch.randint(0, facts["vocab"], (SAMPLES, max(1, min(TOKENS, room))), generator=drawn)
        return {"tokens": tokens.to(torch.int32)}
    if facts.get("pixels") and len(facts.get("shape", ())) == 3:
        values = torch.randint(0, 256, (SAMPLES, *facts["shape"]), generator=drawn)
        table = torch.tensor(facts["pixels"], dtype=torch.float32)
        return {"input": torch.stack([table[channel][values[:, channel]] for channel in range(len(table))], 1)}
    shape = facts.get("shape") or ([len(facts["columns"])] if facts.get("columns") else None)
    return None if not shape else {"input": torch.randn(SAMPLES, *shape, generator=drawn)}
