"""Time to a loss on MNIST: a batch that follows goodput against fixed batches, in turns.

    python bench/goodput.py DIR [--workers 2] [--batch 32] [--most 512] [--target 0.1] [--rounds 3] [--epochs 2]

Arms: the recipe's batch; the largest batch, with the learning rate that the same rule gives it; the policy between
both. Told for each: seconds and samples until the training loss, averaged over the last 4,096 samples, is below the
target, as sums of the steps' own seconds (the policy's measuring is in them), and ratios of the rounds. On a busy host
seconds are trends; the number of samples is not: it is what a larger batch costs in statistical efficiency."""

import argparse
import json
import math
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from turns import turns

import shoal
from shoal.comm.launch import Agent
from shoal.recipe.batching import Batching
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, OptimizerSpec, Recipe, Reporting, ScheduleSpec
from shoal.run.run import Run
from shoal.train.api import PRELOAD
from shoal.train.notices import Notice

AVERAGED = 4096  # samples


def arms(args: argparse.Namespace) -> dict[str, Recipe]:
    base = Recipe(
        model=ModelSpec(kind="cnn"),
        data=DataSpec(source="idx", path=str(args.data)),
        optimizer=OptimizerSpec(name="adamw", lr=args.lr),
        schedule=ScheduleSpec(kind="constant"),
        report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False),
        batch=args.batch,
        precision="float32",
        epochs=args.epochs,
    )
    rate = OptimizerSpec(name="adamw", lr=args.lr * math.sqrt(args.most / args.batch))
    return {
        f"fixed {args.batch}": base,
        f"fixed {args.most}": replace(base, batch=args.most, optimizer=rate),
        "goodput": replace(base, batching=Batching(policy="goodput", most=args.most)),
    }


class Watch:
    """Listens to a run until its averaged loss is below ``target``; then ``notice`` is there, and the run ends."""

    def __init__(self, target: float, notice: Path) -> None:
        self.target, self.notice = target, notice
        self.reached: dict[str, float] | None = None
        self._seconds, self._samples, self._held, self._total = 0.0, 0, 0, 0.0
        self._window: deque[tuple[int, float]] = deque()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "committed" or self.reached is not None:
            return
        self._seconds += event["seconds"]
        self._samples += event["samples"]
        self._window.append((event["samples"], event["loss"]))
        self._held += event["samples"]
        self._total += event["samples"] * event["loss"]
        while self._held - self._window[0][0] >= AVERAGED:
            count, loss = self._window.popleft()
            self._held -= count
            self._total -= count * loss
        if self._held >= AVERAGED and self._total / self._held < self.target:
            self.reached = {"seconds": self._seconds, "samples": self._samples, "steps": event["step"]}
            self.notice.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with MNIST's IDX files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--most", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--target", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/goodput.json"))
    args = parser.parse_args()
    recipes, plan = arms(args), Plan(mesh={"data": args.workers}, device="cpu")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, Agent(PRELOAD) as agent:
        for number, name in enumerate(turns(list(recipes), args.rounds)):
            watch = Watch(args.target, Path(scratch) / f"reached{number}")
            folder, notice = Path(scratch) / str(number), Notice(str(watch.notice))
            shoal.train(recipes[name], plan, run_dir=folder, agent=agent, progress=watch, notice=notice)
            events, row = Run(folder).events(), watch.reached
            changes = [[e["step"], e["before"], e["batch"]] for e in events if e["event"] == "rebatched"]
            found[name].append({"reached": row, "changes": changes})
            told = f"{row['seconds']:.1f} s, {row['samples']} samples, {row['steps']} steps" if row else "not reached"
            print(f"{name:<12} loss {args.target}: {told}; {len(changes)} changes of the batch", flush=True)
    told_arguments = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
    out = {"load_average_before": load, "torch": torch.__version__, "arguments": told_arguments, "runs": found}
    out |= {"ratios": ratios(found)}
    for name, ratio in ratios(found).items():
        print(f"seconds of {name} / goodput: {ratio:.2f} (median of rounds)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")


def ratios(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Of each fixed arm: its seconds over those of the policy in the same round, the median of rounds that both end."""
    ends: dict[str, float] = {}
    for name, runs in found.items():
        pairs = [
            (run["reached"]["seconds"], policy["reached"]["seconds"])
            for run, policy in zip(runs, found["goodput"], strict=True)
            if run["reached"] and policy["reached"]
        ]
        if name != "goodput" and pairs:
            ends[name] = statistics.median(seconds / ours for seconds, ours in pairs)
    return ends


if __name__ == "__main__":
    main()
