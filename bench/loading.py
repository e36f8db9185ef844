"""Loading bandwidth against training bandwidth: can the loaders feed a model, and what does it wait without prefetch?

    python bench/loading.py [--mnist FOLDER] [--rounds 5] [--batches 150] [--out bench/results/loading.json]

For each source, in the same process and in turns: batches loaded with nobody to use them (in line, and by 1 and 2
threads), then a small model in plain PyTorch trained on them, in line and with batches made ahead. Reported are the
medians over the rounds and every round's own numbers."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shoal.data.ledger import Ids, Ledger
from shoal.data.loading import Prefetcher
from shoal.data.registry import open_data
from shoal.data.source import Batch, Source
from shoal.recipe.recipe import DataSpec

BATCH = 64
LOADING = {"in line": (0, 0), "1 thread": (2, 1), "2 threads": (4, 2)}  # name -> (ahead, threads)
TRAINING = {"in line": (0, 0), "prefetch": (2, 1)}


class SmallTransformer(nn.Module):
    """130 thousand parameters, causal, over bytes: the quicker the model, the harder it is to keep it fed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        out: Tensor = self.head(self.layers(self.embed(tokens), mask=causal, is_causal=True))
        return out


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    tokens = batch["tokens"]
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch["input"]), batch["target"])


def work(source: Source, batches: int) -> Iterator[tuple[int, Ids, int]]:
    ledger = Ledger(len(source), BATCH, 1, 1, seed=0)
    return ((step, ledger.ids(step), ledger.position(step)[0]) for step in range(batches))


def load(source: Source, batches: int, ahead: int, threads: int) -> dict[str, float]:
    next(work(source, 1))  # the epoch's order is drawn once an epoch: here, before the clock starts
    samples = size = 0
    start = time.perf_counter()
    with Prefetcher(source, work(source, batches), ahead, threads) as loaded:
        for _, batch in loaded:
            samples += len(next(iter(batch.values())))
            size += sum(tensor.nbytes for tensor in batch.values())
    seconds = time.perf_counter() - start
    return {"samples_per_s": samples / seconds, "mb_per_s": size / seconds / 1e6}


def train(
    source: Source, make: Callable[[], nn.Module], loss: Callable[[nn.Module, Batch], Tensor],
    batches: int, ahead: int, threads: int,
) -> dict[str, float]:  # fmt: skip
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples = 0
    start = time.perf_counter()
    with Prefetcher(source, work(source, batches), ahead, threads) as loaded:
        for _, batch in loaded:
            optimizer.zero_grad()
            torch.autograd.backward(loss(model, batch))
            optimizer.step()
            samples += len(next(iter(batch.values())))
        seconds = time.perf_counter() - start
        return {"samples_per_s": samples / seconds, "waiting_share": loaded.waited_s / seconds}


def measure(source: Source, make: Any, loss: Any, rounds: int, batches: int) -> dict[str, Any]:
    loading: dict[str, list[dict[str, float]]] = {name: [] for name in LOADING}
    training: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINING}
    load(source, 20, 0, 0)  # warm: files in the page cache
    train(source, make, loss, 5, 0, 0)
    for number in range(rounds):
        turn = 1 if number % 2 else -1  # in turns, and every other round backwards: a drift hits all alike
        for name in list(LOADING)[::turn]:
            loading[name].append(load(source, 4 * batches, *LOADING[name]))
        for name in list(TRAINING)[::turn]:
            training[name].append(train(source, make, loss, batches, *TRAINING[name]))
    summary = {kind: {name: median(runs) for name, runs in table.items()} for kind, table in
               (("loading", loading), ("training", training))}  # fmt: skip
    supply = summary["loading"]["1 thread"]["samples_per_s"]
    return {
        **summary,
        "supply_over_demand": supply / summary["training"]["prefetch"]["samples_per_s"],
        "prefetch_speedup": [
            a["samples_per_s"] / b["samples_per_s"]
            for a, b in zip(training["prefetch"], training["in line"], strict=True)
        ],
        "rounds": {"loading": loading, "training": training},
    }


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=Path("../shared/data/mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batches", type=int, default=150, help="training steps a round; four times as many are loaded"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/loading.json"))
    arguments = parser.parse_args()

    cases = {
        "text, 128 bytes of context": (DataSpec(), SmallTransformer, text_loss),
        "MNIST": (DataSpec(source="idx", path=str(arguments.mnist)), small_cnn, image_loss),
        "MNIST, random crops and mirroring": (
            DataSpec(source="idx", path=str(arguments.mnist), options={"flip": True, "crop": 2}), small_cnn, image_loss,
        ),
    }  # fmt: skip
    machine: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)), "torch_threads": torch.get_num_threads(), "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "load_average_before": os.getloadavg()[0],
    }  # fmt: skip
    results: dict[str, Any] = {"machine": machine, "batch": BATCH, "sources": {}}
    for name, (spec, make, loss) in cases.items():
        if spec.source == "idx" and not arguments.mnist.is_dir():
            print(f"{name}: left out, there is no {arguments.mnist}")
            continue
        found = measure(open_data(spec, 0).train, make, loss, arguments.rounds, arguments.batches)
        results["sources"][name] = found
        print(f"\n{name}")
        for how, row in found["loading"].items():
            print(f"  loads    {how:<10} {row['samples_per_s']:>11,.0f} samples/s {row['mb_per_s']:>9,.1f} MB/s")
        for how, row in found["training"].items():
            waiting = f"waits {row['waiting_share']:6.2%} of the time"
            print(f"  trains   {how:<10} {row['samples_per_s']:>11,.0f} samples/s   {waiting}")
        speedup = statistics.median(found["prefetch_speedup"])
        print(f"  one loader brings {found['supply_over_demand']:.1f}x what training takes; prefetch: {speedup:.3f}x")
    machine["load_average_after"] = os.getloadavg()[0]  # about 1 of this program's own; more is somebody else's
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
