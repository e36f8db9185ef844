"""One GPT on four workers, laid out as Megatron-LM does, as Mesh-TensorFlow does, and in plain data parallelism.

    python bench/hybrid.py [--rounds 3] [--most-s 150] [--quick]

Each arm is a run of `shoal.train` on the same recipe: eight shards, one thread a worker, four processes on this host.
The arms take turns in an order that rotates. What is counted is exact: bytes that each worker sends in a step, by
operation; bytes of parameters and of optimiser states that it holds. Seconds of a step are medians over all steps but
the first three of all rounds, slowest worker's view; on fewer cores than workers they say what the layout costs in
work, not what it gains. Goals: none; docs/case_studies.md names the trade-offs. Raw numbers to
bench/results/hybrid.json. A round that would end after ``--most-s`` is not begun, but for the first one.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from turns import turns

import shoal
from shoal.comm.accounting.counters import Counters, since
from shoal.comm.launch import Agent
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, Recipe, Reporting, ScheduleSpec
from shoal.train.loop import Order, run_recipe

RESULTS = Path(__file__).parent / "results"
ONE_F_ONE_B = PipelinePlan(schedule="1f1b")
ARMS = {
    "data": Plan(mesh={"data": 4}, device="cpu"),
    "data, states in slices": Plan(mesh={"data": 4}, states="zero1", device="cpu"),
    "megatron": Plan(mesh={"pipe": 2, "tensor": 2}, pipeline=ONE_F_ONE_B, device="cpu"),
    "mesh-tensorflow": Plan(mesh={"data": 2, "tensor": 2}, device="cpu"),  # the usual rules: batch, heads, ffn, vocab
    "mesh-tensorflow, all on one axis": Plan(mesh={"tensor": 4}, device="cpu"),
    "stages": Plan(mesh={"pipe": 4}, pipeline=ONE_F_ONE_B, device="cpu"),
}


def recipe(text: Path, steps: int, quick: bool) -> Recipe:
    size = {"layers": 4, "heads": 4, "width": 16} if quick else {"layers": 6, "heads": 8, "width": 192}
    return Recipe(
        model=ModelSpec(kind="gpt", options=size),
        data=DataSpec(source="text", path=str(text), options={"context": 16 if quick else 64}),
        schedule=ScheduleSpec(kind="constant"),
        report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False),
        batch=16,
        shards=8,
        micro_batches=1,
        steps=steps,
        precision="float32",
    )


def counted(group: Any, wanted: Recipe, plan: Plan, folder: Path) -> dict[str, Any]:
    """What one worker counts and holds."""
    seconds: list[float] = []
    begun: dict[Any, Any] = {}
    found: dict[str, Any] = {}

    def observe(worker: Any, step: Any) -> None:
        now = {(id(c), place): total for c in Counters.live for place, total in c.totals().items()}
        if step.number == 3:
            begun.update(now)
        if step.number > 3:
            seconds.append(sum(step.parts.values()))
        if step.number == wanted.steps:
            sent: dict[str, float] = {}
            for (_, (operation, _)), gain in since(begun, now).items():
                sent[operation] = sent.get(operation, 0.0) + gain.sent_bytes / (step.number - 3)
            states = worker._optimizer.state.values()
            found.update(
                sent={name: count for name, count in sent.items() if count},
                parameters=sum(p.nbytes for p in worker.held.module.parameters()),
                optimizer=sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor)),
            )
            held = getattr(worker._update, "held_bytes", None)
            if held is not None:
                found["optimizer"] = held()["optimizer"]

    result = run_recipe(group, Order(wanted, plan, run_dir=folder, observe=observe))
    return {**found, "seconds": seconds, "loss": result["loss"], "weights": result["weights_sha256"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-s", type=float, default=150.0, help="seconds after which no further round ends")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder, Agent(("shoal.train.loop",)) as agent:
        text = Path(folder) / "text.txt"
        text.write_text("".join(path.read_text() for path in sorted(Path(shoal.__file__).parent.rglob("*.py"))))
        wanted = recipe(text, 5 if args.quick else 9, args.quick)
        begun = time.monotonic()
        for number, name in enumerate(turns(list(ARMS), args.rounds)):
            done, place_in_round = divmod(number, len(ARMS))
            if done and place_in_round == 0 and (time.monotonic() - begun) * (done + 1) / done > args.most_s:
                break
            place = Path(folder) / f"run{number}"
            runs[name].append(agent.run(counted, (wanted, ARMS[name], place), workers=4, threads=1))
            print(f"{name}: loss {runs[name][-1][0]['loss']:.6f}", flush=True)
    rows = []
    usual = statistics.median(slowest(runs["data"]))
    for name, rounds in runs.items():
        first = rounds[0]
        rows.append(
            {
                "arm": name,
                "mesh": dict(ARMS[name].mesh),
                "step_s": statistics.median(slowest(rounds)),
                "of_data": statistics.median(slowest(rounds)) / usual,
                "sent_bytes": [sum(worker["sent"].values()) for worker in first],
                "sent": [worker["sent"] for worker in first],
                "parameters": [worker["parameters"] for worker in first],
                "optimizer": [worker["optimizer"] for worker in first],
                "rounds": len(rounds),
                "loss": first[0]["loss"],
                "bits_of_data": first[0]["weights"] == runs["data"][0][0]["weights"],
            }
        )
    print(f"{'arm':<34}{'step of data':>13}{'sent MB':>9}{'weights MB':>12}{'states MB':>11}  bits of data")
    for row in rows:
        most = [max(row[key]) / 1e6 for key in ("sent_bytes", "parameters", "optimizer")]
        print(
            f"{row['arm']:<34}{row['of_data']:>12.2f}x{most[0]:>9.2f}{most[1]:>12.2f}{most[2]:>11.2f}"
            f"  {'yes' if row['bits_of_data'] else 'no'}"
        )
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        machine = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
        (RESULTS / "hybrid.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def slowest(rounds: list[list[dict[str, Any]]]) -> list[float]:
    """Of each step of all rounds, the slowest worker's seconds."""
    return [max(each) for workers in rounds for each in zip(*(worker["seconds"] for worker in workers), strict=True)]


if __name__ == "__main__":
    main()
