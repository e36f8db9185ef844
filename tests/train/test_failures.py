"""A run that fails says so in one line, leaves nothing behind and loses nothing on disk."""

import os
import re
import resource
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from train.tiny_runs import Images, recipe, splits

from shoal.data.source import Splits
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.api import train

SHORT = recipe("mlp", steps=8)


@dataclass(frozen=True)
class Spoilt(Images):
    """Sample 11 does something else than being fetched."""

    deed: str = "nan"

    def fetch(self, ids, epoch):
        batch = super().fetch(ids, epoch)
        if 11 in ids:
            if self.deed == "nan":
                batch["input"][list(ids).index(11)] = float("nan")
            elif self.deed == "raise":
                raise ValueError("sample 11 is damaged")
            elif self.deed.startswith("full at "):
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.deed[8:]),) * 2)
            elif self.deed == "exit":
                os._exit(5)
            else:
                os.kill(os.getpid(), getattr(signal, self.deed))
        return batch


def spoilt(deed: str) -> Splits:
    return Splits(Spoilt(96, deed=deed))


def plan(workers: int, **changes) -> Plan:
    return Plan(mesh={"data": workers}, device="cpu", loaders=1, **changes)


def told(run, deed: str, tmp_path: Path, **changes) -> str:
    with pytest.raises(RunFailed) as failed:
        run(SHORT, plan=plan(3, **changes), data=spoilt(deed), run_dir=tmp_path / "new")
    line = str(failed.value)
    assert "\n" not in line
    events = Run(tmp_path / "new").events()
    assert events[-1]["event"] == "failed"
    assert events[-1]["why"] == line
    return line


def where_sample_11_is() -> tuple[int, int]:
    """(step counted from 1, shard)."""
    from shoal.data.ledger import Ledger

    ledger = Ledger(96, 16, 8, 1, 0)
    return next((step + 1, shard) for step in range(6) for shard in range(8) if 11 in ledger.shard(step, shard)[0])


def test_a_loss_that_is_not_a_number_names_step_shard_and_sample_ids(run, tmp_path):
    step, shard = where_sample_11_is()
    line = told(run, "nan", tmp_path)
    found = re.search(r"loss is nan at step (\d+), shard (\d+), sample ids ([\d, ]+)$", line)
    assert found, line
    assert (int(found[1]), int(found[2])) == (step, shard)
    assert "11" in found[3].split(", ")


def test_a_sample_that_cannot_be_fetched_names_rank_host_and_cause(run, tmp_path):
    assert re.search(
        r"^rank \d on \S+ \(pid \d+\) failed at step \d+, .*sample 11 is damaged", told(run, "raise", tmp_path)
    )


def test_a_worker_that_exits_is_named(run, tmp_path):
    line = told(run, "exit", tmp_path)
    assert re.search(r"^rank \d on \S+ \(pid \d+\) exited with code 5 at step \d+", line)


def test_a_killed_worker_is_named(run, tmp_path):
    line = told(run, "SIGKILL", tmp_path)
    assert re.search(r"^rank \d on \S+ \(pid \d+\) was killed by SIGKILL \(out of memory\?\) at step \d+", line)


def test_a_stopped_worker_is_named_and_those_who_wait_for_it(run, tmp_path):
    line = told(run, "SIGSTOP", tmp_path, hang_after_s=0.4)
    assert re.search(r"rank \d on \S+ \(pid \d+\) hangs at (step \d+, )?\w+.* \(stopped by a signal\)", line), line


def test_a_gradient_that_is_not_finite_names_the_parameter(run):
    def exploding():
        class Root(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(64, 5)
                self.scale = torch.nn.Parameter(torch.zeros(5))

            def forward(self, input):
                return self.head(input.flatten(1)) + self.scale.sqrt()  # its slope at 0 is infinite

        return Root()

    with pytest.raises(RunFailed, match=r"gradient is not finite at step 1 although the loss is .* 'scale' is not"):
        run(SHORT, 2, data=splits("mlp", 48), model=exploding)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_is_refused_and_changes_nothing(run):
    first = run(SHORT, 2, data=splits("mlp", 48))
    before = tree(Path(first["run_dir"]))
    with pytest.raises(UserError, match=r"has done all of its 8 steps: raise --steps or --epochs\.$"):
        run(SHORT, 1, data=splits("mlp", 48), resume=first["run_dir"])
    assert tree(Path(first["run_dir"])) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "seed = 0, this run has 1"),
        ({"batch": 32}, "batch = 16, this run has 32"),
        ({"clip": 1.0}, "clip"),
    ],
)
def test_resuming_with_another_recipe_is_refused_and_loses_nothing(run, change, text):
    first = run(SHORT, 2, data=splits("mlp", 48))
    before = tree(Path(first["run_dir"]))
    with pytest.raises(UserError, match=f"the checkpoint was made with {text}"):
        run(replace(SHORT, steps=12, **change), 2, data=splits("mlp", 48), resume=first["run_dir"])
    assert tree(Path(first["run_dir"])) == before


def test_resuming_with_other_samples_is_refused(run):
    first = run(SHORT, 2, data=splits("mlp", 48))
    with pytest.raises(UserError, match="samples = 48, this run has 50"):
        run(replace(SHORT, steps=12), 2, data=splits("mlp", 50), resume=first["run_dir"])


def test_resuming_with_another_model_is_refused_naming_a_tensor(run):
    first = run(SHORT, 2, data=splits("mlp", 48))
    with pytest.raises(UserError, match=r"belongs to another model|in the checkpoint and"):
        run(recipe("cnn"), 2, data=splits("cnn", 48), resume=first["run_dir"])


def test_a_run_interrupted_before_any_evaluation_goes_on(run):
    """Nothing was the best yet when that checkpoint was written."""
    whole = run(SHORT, 2, data=splits("mlp", 48))
    first = run(replace(SHORT, steps=3), 2, data=Splits(splits("mlp", 48).train))
    rest = run(SHORT, 2, data=splits("mlp", 48), resume=first["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- a full disk --------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_the_last_checkpoint_but_no_older_one(run, agents_here, capfd):
    """A limit on the size of files stands for a full disk: the log may not grow, nor a checkpoint be written."""
    first = run(replace(SHORT, steps=3), 2, data=splits("mlp", 48))
    folder = Path(first["run_dir"])
    before = tree(folder / "checkpoints")
    log_size = (folder / "events.jsonl").stat().st_size

    full = Splits(Spoilt(48, deed=f"full at {log_size + 700}"))
    with pytest.raises(UserError, match=r"the last checkpoint of .* was not written: .*File too large") as failed:
        train(SHORT, plan(1), data=full, resume=first["run_dir"])  # in an agent whose stderr is this test's
    assert "\n" not in str(failed.value)
    said = capfd.readouterr().err
    assert said.count("cannot write") == 1
    # the limit falls between two lines of the log, or inside of one
    assert re.search(r"events\.jsonl': (File too large|only \d+ of \d+ .*); training goes on\.", said)
    assert tree(folder / "checkpoints") == before
    assert checkpoint.newest(folder / "checkpoints")[0].step == 3
    data = splits("mlp", 48)
    rest = run(SHORT, 2, data=data, resume=first["run_dir"])
    assert rest["weights_sha256"] == run(SHORT, 1, data=data)["weights_sha256"]
