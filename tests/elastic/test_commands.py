"""What is asked of a run from outside, against files that a run would write."""

import json
import os
from pathlib import Path

import pytest

from shoal.elastic import roster
from shoal.elastic.commands import drain, resize
from shoal.elastic.faults import Fault
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.notices import needed_s


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(Recipe(steps=9), Plan(), {}, tmp_path / "run")


def trained(run: Run, workers: int = 2) -> list[roster.Entry]:
    entries = [roster.Entry(os.getpid() + rank, rank, "here", [rank], 1) for rank in range(workers)]
    roster.write(run.path, entries)
    return entries


def test_the_list_of_workers_comes_back_as_it_was_written_and_is_replaced_whole(run):
    entries = trained(run)
    assert roster.read(run.path) == entries
    assert set(json.loads((run.path / "workers.json").read_text())[0]) == {"pid", "rank", "host", "shards", "epoch"}
    assert not list(run.path.glob(".workers*"))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"number": "x"}', '{"number": 1, "y": 1}', '{"workers": 2}'])
def test_a_wish_that_is_no_wish_is_none(run, text):
    (run.path / "wanted.json").write_text(text)
    assert roster.wanted_of(run.path) == roster.Wanted(0)


def test_a_newer_wish_has_a_larger_number(run):
    assert roster.wish(run.path, workers=3).number == 1
    assert roster.wish(run.path, drain="all").number == 2
    assert roster.wanted_of(run.path) == roster.Wanted(2, drain="all")


def test_nobody_is_asked_when_nobody_trains(run):
    for ask in (lambda: resize(run.path, 2), lambda: drain(run.path)):
        with pytest.raises(UserError, match="start it with shoal train --elastic"):
            ask()


def test_a_number_that_the_recipe_has_no_shards_for_is_refused_before_anything_is_asked(run):
    trained(run)
    with pytest.raises(UserError, match="use 1 to 8"):
        resize(run.path, 9)
    with pytest.raises(UserError, match=r"--servers 0: .* has no parameter servers"):
        resize(run.path, servers=0)
    with pytest.raises(UserError, match="ranks 0 to 1"):
        drain(run.path, rank=2)
    assert roster.wanted_of(run.path).number == 0


def test_a_run_that_does_not_answer_is_told_after_the_wait(run):
    trained(run)
    with pytest.raises(RunFailed, match="no 1 workers after 0 s"):
        resize(run.path, 1, wait_s=0.0)


def test_a_drain_needs_two_steps_and_a_checkpoint_at_worst():
    events = [{"event": "committed", "seconds": s} for s in (0.1, 0.4)]
    events.append({"event": "checkpointed", "stall_s": 0.5, "write_s": 1.5})
    assert needed_s(events, whole=True) == pytest.approx(2.8)
    assert needed_s(events, whole=False) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kil:step=3", "did you mean 'kill'"),
        ("kill:step=3,phase=bakward", "did you mean 'backward'"),
        ("kill:stp=3", "did you mean 'step'"),
        ("kill:step=x", "write it as kill:rank=1,step=5,phase=backward"),
    ],
)
def test_a_misspelt_fault_is_named_with_the_nearest(text, said):
    with pytest.raises(UserError, match=said):
        Fault.parse(text)


def test_a_fault_is_read_as_it_is_written():
    assert Fault.parse("stop:rank=1,step=5,phase=saving") == Fault("stop", 1, 5, "saving")
