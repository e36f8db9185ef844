"""Time to accuracy on real data: a CNN on MNIST, a GPT on tiny Shakespeare, with this machine's cores.

python bench/accuracy.py mnist DIR            at least 99% of the test set in at most 3 epochs
python bench/accuracy.py shakespeare FILE     character-level validation loss of at most 1.60 within 10 minutes
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

import shoal
from shoal.cluster.detect import usable_cores
from shoal.recipe.layers import assemble
from shoal.recipe.plan import Plan
from shoal.run.run import Run

RESULTS = Path(__file__).parent / "results"


def trained(preset: str, data: Path, folder: Path) -> tuple[dict, Run, float]:
    recipe, origins = assemble(preset=preset, flags={"data.path": str(data)})
    begun = time.perf_counter()
    result = shoal.train(recipe, Plan(mesh={"data": usable_cores()}), origins=origins, run_dir=folder, progress=show)
    return result, Run(folder), time.perf_counter() - begun


def show(event: dict) -> None:
    if event["event"] == "evaluated":
        print(f"step {event['step']}", event["split"], event["figures"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("mnist", "shakespeare"))
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    preset = {"mnist": "mnist-cnn", "shakespeare": "gpt-chars"}[args.job]
    with tempfile.TemporaryDirectory() as scratch:
        load = os.getloadavg()
        result, run, seconds = trained(preset, args.data, Path(scratch) / "run")
        events = run.events()
        began = events[0]["time"]
        curve = [
            {"seconds": e["time"] - began, "step": e["step"], "split": e["split"], **e["figures"]}
            for e in events
            if e["event"] == "evaluated"
        ]
        out = {
            "job": args.job,
            "machine": f"{platform.machine()}, {usable_cores()} cores",
            "torch": torch.__version__,
            "load_average": load,
            "recipe": run.recipe.to_toml().replace(str(args.data), args.data.name),
            "seconds_whole_run": seconds,
            "seconds_training": result["seconds"],
            "steps": result["steps"],
            "curve": curve,
            "final": shoal.evaluate(run.path)["figures"],
        }
    if args.job == "mnist":
        reached = next((point["seconds"] for point in curve if point["accuracy"] >= 0.99), None)
        out["seconds_to_99_percent_of_validation"] = reached
        accuracy = out["final"]["accuracy"]
        print(f"test accuracy {accuracy:.4f} after {seconds:.0f} s; 99% of validation after {reached} s")
    else:
        best = min(curve, key=lambda point: point["loss"])
        reached = next((point["seconds"] for point in curve if point["loss"] <= 1.60), None)
        out["seconds_to_1.60"] = reached
        print(f"validation loss {best['loss']:.4f} (1.60 after {reached} s), whole run {seconds:.0f} s")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"accuracy-{args.job}.json"
    file.write_text(json.dumps(out, indent=1))
    print("raw numbers:", file)


if __name__ == "__main__":
    main()
