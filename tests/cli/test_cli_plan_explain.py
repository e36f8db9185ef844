"""`shoal plan --explain`: what a layout sends, for people and for programs."""

import json


def test_explain_shows_what_each_layer_sends_and_adds_it_up(shoal):
    arguments = ("plan", "--mesh", "tensor=2", "--set", "model.layers=2", "--explain")
    code, out, err = shoal(*arguments)
    assert (code, err) == (0, "")
    assert "blocks.*.attention.qkv" in out
    code, out, err = shoal(*arguments, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["layout"]
    assert told["bytes"] == sum(row["bytes"] for row in told["rows"])
    assert {row["operation"] for row in told["rows"]} == {"all-reduce", "all-gather"}


def test_rules_given_on_the_command_line_are_explained(shoal):
    code, out, _ = shoal("plan", "--mesh", "tensor=2", "--set", "rules.sequence=tensor", "--explain", "--json")
    assert code == 0
    assert "reduce-scatter" in {row["operation"] for row in json.loads(out)["layout"]["rows"]}


def test_an_illegal_layout_is_one_line_with_the_repair(shoal):
    code, out, err = shoal("plan", "--mesh", "tensor=2", "--set", "rules.width=tensor", "--explain")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "twice, by 'vocab' and 'width': write rules.width = ''" in err


def test_explain_shows_every_value_of_the_plan_and_what_was_chosen_and_why(shoal):
    code, out, err = shoal("plan", "--mesh", "data=2", "--explain", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["states"] == {"kind": "zero1", "origin": "chosen: 2 workers of one host share weights"}
    rows = {row["key"]: (row["value"], row["origin"]) for row in told["plan"]}
    assert rows["states"] == ("zero1", "chosen: 2 workers of one host share weights")
    assert rows["mesh.data"] == (2, "flag --mesh")
    assert "states: replicated (flag --set)" in shoal("plan", "--mesh", "data=2", "--set", "states=replicated")[1]
    assert "states: replicated (chosen: sync = 'fast')" in shoal("plan", "--mesh", "data=2", "--fast")[1]


def test_what_building_takes_is_told_by_worker_and_a_plan_that_cannot_be_built_is_refused(shoal, monkeypatch):
    arguments = ("plan", "--mesh", "tensor=2", "--set", "model.layers=2", "--explain")
    code, out, err = shoal(*arguments, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["building"]
    assert (told["how"], told["why"]) == ("in parts", "")
    assert [row["rank"] for row in told["workers"]] == [0, 1]
    assert all(row["peak"] == row["held"] + row["beside"] > 0 for row in told["workers"])
    assert "building the model: in parts" in shoal(*arguments)[1]
    monkeypatch.setattr("shoal.parallel.building_run.memory_bytes", lambda: 1 << 10)
    code, out, err = shoal(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "building the model takes at least" in err
