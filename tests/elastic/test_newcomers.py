"""A new worker that hangs while it builds is noticed, and another one takes its place."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from train.tiny_runs import recipe, splits

from shoal.elastic.faults import Fault

DATA = splits("cnn", 101)


@dataclass(frozen=True)
class StopsTheFourth:
    """Builds a model; the fourth process that does so is stopped in the middle of it."""

    folder: str

    def __call__(self) -> torch.nn.Module:
        place = Path(self.folder)
        (place / str(os.getpid())).touch()
        if len(list(place.iterdir())) == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))


def test_a_new_worker_that_is_stopped_while_it_builds_is_given_up_for_another(disturb, tmp_path):
    (tmp_path / "built").mkdir()
    made = StopsTheFourth(str(tmp_path / "built"))
    fault = Fault("kill", 1, 4, "forward")
    run = disturb(recipe("mlp", steps=8), least=3, data=DATA, model=made, faults=[fault])
    (suspected,) = run.of("suspected")
    assert suspected["why"].startswith("a new worker on ")
    assert "(stopped by a signal)" in suspected["why"]
    assert run.of("paused"), "the run waited for the third worker"
    assert run.of("recovered")[0]["workers"] == 3
    assert run.steps == list(range(1, 9))
    assert len(list((tmp_path / "built").iterdir())) == 5
