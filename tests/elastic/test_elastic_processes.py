"""The command in a process of its own, whose launcher or agent is killed: nothing is left, and no bit is lost."""

import json
import os
import signal
from pathlib import Path

import pytest
from train.test_processes import folder, mark, marked, start, until, write_recipe  # noqa: F401  (two are fixtures)

from shoal.elastic import roster
from shoal.errors import UserError
from shoal.recipe.recipe import Reporting
from shoal.run.run import Run
from shoal.run.tail import told_lately

SHOAL = ("-m", "shoal", "train")
ELASTIC = ("--workers", "3", "--elastic", "--json")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
def test_a_run_outlives_its_launcher_and_after_its_agent_goes_on_from_a_checkpoint(mark, folder):  # noqa: F811
    report = Reporting(evaluate_every=10**9, checkpoint_every=10, sample=False)
    recipe = str(write_recipe(folder, steps=100, report=report))
    whole = start(mark, folder, *SHOAL, recipe, "--workers", "1", "--run-dir", "whole", "--json")
    orphan = start(mark, folder, *SHOAL, recipe, *ELASTIC, "--run-dir", "orphan")
    until(lambda: ("committed", 5) in told_lately(folder / "orphan" / "events.jsonl"), "a step")
    orphan.send_signal(signal.SIGKILL)
    orphan.wait()
    with pytest.raises(UserError, match="is being trained by another process"), Run(folder / "orphan").held(True):
        pass
    orphan.communicate()
    broken = start(mark, folder, *SHOAL, recipe, *ELASTIC, "--run-dir", "broken")
    until(lambda: ("checkpointed", 10) in told_lately(folder / "broken" / "events.jsonl"), "a checkpoint")
    workers = [entry.pid for entry in roster.read(folder / "broken")]
    os.kill(parent(workers[0]), signal.SIGKILL)
    assert broken.wait() == 1
    assert "the agent of" in broken.communicate()[1]
    again = start(mark, folder, *SHOAL, *ELASTIC, "--resume", "broken")
    resumed = json.loads(again.communicate()[0].splitlines()[-1])
    until(lambda: not marked(mark), "an end of all processes")
    wanted = json.loads(whole.communicate()[0].splitlines()[-1])["weights_sha256"]
    alone = Run(folder / "orphan").result
    assert alone is not None
    assert (resumed["weights_sha256"], alone["weights_sha256"]) == (wanted, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--fault", "kill:rank=1,step=110"), marks=pytest.mark.soak, id="one host"),
        pytest.param(("--emulate-hosts", "3", "--fault", "kill-host:host=1,step=110"), id="hosts"),
    ],
)
def test_a_rehearsal_ends_with_its_launcher(mark, folder, how):  # noqa: F811
    """Its agents could only wait for each other for ever: the network between them was the launcher's."""
    command = ("-m", "shoal", "chaos", str(write_recipe(folder)), "--workers", "3", "--steps", "120", *how)
    rehearsal = start(mark, folder, *command, "--run-dir", "rehearsal")
    disturbed = folder / "rehearsal" / "disturbed" / "events.jsonl"
    until(lambda: ("committed", 5) in told_lately(disturbed), "a step")
    rehearsal.send_signal(signal.SIGKILL)
    rehearsal.communicate()
    until(lambda: not marked(mark), "an end of all processes")
    assert Run(disturbed.parent).result is None
