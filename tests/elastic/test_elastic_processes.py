"""The command in a process of its own: when the launcher is killed nothing is left, and the bits can still be had."""

import json
import os
import signal
from pathlib import Path

from train.test_processes import folder, mark, marked, start, until, write_recipe  # noqa: F401  (two are fixtures)

from shoal.elastic import roster
from shoal.recipe.recipe import Reporting
from shoal.run.tail import told_lately


def test_a_killed_launcher_leaves_no_process_and_a_resumed_run_has_the_same_bits(mark, folder):  # noqa: F811
    report = Reporting(evaluate_every=10**9, checkpoint_every=10, sample=False)
    recipe = str(write_recipe(folder, steps=60, report=report))
    shoal = ("-m", "shoal", "train")
    whole = start(mark, folder, *shoal, recipe, "--workers", "1", "--run-dir", "whole", "--json")
    elastic = ("--workers", "3", "--elastic", "--json")
    running = start(mark, folder, *shoal, recipe, *elastic, "--run-dir", "broken")
    log = folder / "broken" / "events.jsonl"
    until(lambda: ("checkpointed", 10) in told_lately(log), "a checkpoint")
    pids = [entry.pid for entry in roster.read(folder / "broken")]
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "an end of the workers")
    result = json.loads(whole.communicate()[0].splitlines()[-1])
    until(lambda: not marked(mark), "an end of all processes")
    again = start(mark, folder, *shoal, *elastic, "--resume", "broken")
    resumed = json.loads(again.communicate()[0].splitlines()[-1])
    assert resumed["weights_sha256"] == result["weights_sha256"]
