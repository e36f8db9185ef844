"""--batch-policy: from what is written to the recipe's table, and back from a run's log."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_up_run import STARTED, committed, trained

from shoal.cli.progress import PlainLines, remark
from shoal.recipe.batching import Batching
from shoal.recipe.layers import assemble
from shoal.recipe.plan import Plan
from shoal.run.run import Run

CHANGED = {
    "event": "rebatched", "step": 2, "before": 32, "batch": 64, "lr_before": 1e-3, "lr": 1.414e-3, "steps": 9,
    "why": "noise scale 1e+03 samples",
}  # fmt: skip


@pytest.fixture
def recipes(library):
    """Those that the library is called with."""
    made = []

    def train(recipe, plan=None, **given):
        made.append(recipe)
        return trained()

    library("shoal.train.api", train=train)
    return made


def ran(folder: str, batching: Batching, *events: dict) -> Run:
    """A run with this policy, and this log."""
    recipe, origins = assemble(None, "gpt-stdlib")
    run = Run.create(replace(recipe, batching=batching), Plan(), origins, Path(folder))
    log = run.open_log()
    for event in events:
        log.write(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})
    log.close()
    return run


@pytest.mark.parametrize(
    ("text", "batching"),
    [
        ("goodput", Batching(policy="goodput")),
        ("goodput:512", Batching(policy="goodput", most=512)),
        ("fixed", Batching()),
    ],
)
def test_a_policy_is_a_table_of_the_recipe(recipes, shoal, text, batching):
    assert shoal("train", "--batch-policy", text)[0] == 0
    assert recipes[0].batching == batching


def test_the_decisions_of_a_run_become_a_recipe_with_the_same_rule(recipes, shoal):
    ran("old", Batching(policy="goodput", rule="linear"), committed(1), CHANGED, committed(2))
    assert shoal("train", "--batch-policy", "replay:old")[0] == 0
    assert recipes[0].batching == Batching(policy="recorded", rule="linear", changes=((2, 64),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("godput", "--batch-policy 'godput': use fixed, goodput, goodput:MAX (samples, 512 say) or replay:RUN."),
        ("goodput:", "use fixed, goodput"),
        ("goodput:0", "use fixed, goodput"),
        ("goodput:many", "use fixed, goodput"),
        ("replay:", "use fixed, goodput"),
        ("goodput:16", "batching.most = 16 is below the batch of 32"),
        ("replay:gone", "no run in 'gone'"),
        ("replay:plain", "the batch of '{here}/plain' stays 32: there is nothing to replay."),
    ],
)
def test_what_cannot_be_is_one_line(recipes, shoal, text, said):
    ran("plain", Batching())
    code, out, err = shoal("train", "--batch-policy", text)
    assert (code, out, recipes) == (2, "", [])
    assert said.format(here=Path.cwd()) in err
    assert err.count("\n") == 1


def test_explain_says_that_the_flag_has_chosen(recipes, shoal):
    _, out, _ = shoal("train", "--explain", "--batch-policy", "goodput:512")
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["batching.policy"] == ["batching.policy", "goodput", "flag", "--batch-policy"]
    assert rows["batching.most"] == ["batching.most", "512", "flag", "--batch-policy"]


def test_a_change_has_a_line_and_the_length_that_follows_from_it(tmp_path):
    assert remark(CHANGED) == (
        "rebatched after step 2: 32 -> 64 samples, lr 0.001 -> 0.00141: noise scale 1e+03 samples"
    )
    with (tmp_path / "out").open("w+") as out:
        lines = PlainLines(out, clock=lambda: 0.0)
        for event in (STARTED, committed(1), CHANGED, committed(9)):
            lines(event)
        out.seek(0)
        assert "step 9/9" in out.read()
