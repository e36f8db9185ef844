"""Runs of split models tell what all their workers' transports moved: message by message, byte by byte."""

import json
import os
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from train.tiny_runs import CONTEXT, VOCAB, Words, recipe, splits

from shoal.cli.main import main
from shoal.comm.stages.form import Head
from shoal.models.registry import build
from shoal.observe.bottleneck import bottleneck
from shoal.observe.communication import read_communication
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.layout.explain import explain
from shoal.recipe.plan import Plan
from shoal.run.run import Run
from shoal.train.step import Step

MICRO_BATCHES = 16  # of a step: 8 shards of two, of one sample each
STEPS = 6


def trained(run, kind, model=None, **mesh):
    """Evaluated after every second step: that belongs to none."""
    wanted = recipe(kind, micro_batches=2, steps=STEPS)
    wanted = replace(wanted, report=replace(wanted.report, evaluate_every=2))
    return Run(Path(run(wanted, plan=Plan(mesh=mesh, device="cpu"), data=splits(kind, 96), model=model)["run_dir"]))


def told(log):
    """step -> (operation, link) -> its row, of the steps that the log tells of one by one."""
    fields = [event["comm"] for event in log.events() if "comm" in event]
    assert [field["steps"] for field in fields] == [1] * (STEPS - 1)
    return {field["step"]: {(row["operation"], row["link"]): row for row in field["operations"]} for field in fields}


def section(log, capsys):
    assert main(["report", str(log.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == bottleneck(read_communication(log.events())).sentence
    page = (log.path / "report.html").read_text(encoding="utf-8")
    return page.partition('<section id="communication">')[2].partition("</section>")[0]


class Watched:
    """A model factory whose worker writes down, beside the counters, what each step hands to a stage's sockets."""

    def __init__(self, folder, spec, facts):
        self.folder, self.spec, self.facts, self.launcher = folder, spec, facts, os.getpid()

    def __call__(self):
        if os.getpid() != self.launcher:
            begin, commit, folder = Step._begin, Step.commit, self.folder

            def begun(step, **options):
                begin(step, **options)
                watch(step._crew.held.pipeline._messages._mesh)

            def committed(step, **options):
                figures = commit(step, **options)
                line = json.dumps([step.number, *step._crew.held.pipeline._messages._mesh.handed])
                with (folder / f"rank{step._crew.rank}").open("a") as file:
                    file.write(line + "\n")
                return figures

            Step._begin, Step.commit = begun, committed
        return build(self.spec, self.facts)


def watch(mesh):
    if not hasattr(mesh, "handed"):
        send = mesh.send

        def handed(to, kind, number, message):
            head = Head.decode(message[16 : 16 + int.from_bytes(message[8:16], "little")])
            numbers = sum(prod(view.shape) for view in head.views)
            mesh.handed = [mesh.handed[0] + 1, mesh.handed[1] + len(message), mesh.handed[2] + 4 * numbers]
            send(to, kind, number, message)

        mesh.send = handed
    mesh.handed = [0, 0, 0]  # messages, their bytes, those of numbers in tensors


def test_a_pipeline_tells_the_messages_and_the_bytes_of_both_stages(run, tmp_path, capsys):
    data = splits("mlp", 1).train
    log = trained(run, "mlp", Watched(tmp_path, recipe("mlp").model, data.facts), pipe=2)
    rows = told(log)
    handed = [[json.loads(line) for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in range(2)]
    hidden = 9 * 4  # bytes of an activation of a sample, and of its gradient
    for step, *of_ranks in ((first[0], first[1:], second[1:]) for first, second in zip(*handed, strict=True)):
        if step == STEPS:
            continue  # the last step is not told
        send, receive = rows[step]["stage send", "shared memory"], rows[step]["stage receive", "shared memory"]
        assert send["calls"] == receive["calls"] == [MICRO_BATCHES] * 2
        assert [of[::2] for of in of_ranks] == [[MICRO_BATCHES, MICRO_BATCHES * hidden]] * 2
        assert send["sent"] == [of[1] for of in of_ranks]
        assert receive["received"] == send["sent"][::-1]
    waits = [event["comm"]["waits"] for event in log.events() if "comm" in event]
    assert any(row[1 - rank] > 0 for field in waits for rank, row in enumerate(field))
    assert "stage receive" in section(log, capsys)


def test_slices_of_tensors_tell_the_bytes_of_their_formula(run, capsys):
    log = trained(run, "gpt", tensor=2)
    model = build(recipe("gpt").model, {"vocab": VOCAB, "context": CONTEXT})
    tokens = Words(1).fetch(np.arange(1), 0)["tokens"][:, :-1]
    formula = Counter()
    for sending in explain(model, layout_of(model, model.dimensions(), {}, 2), [tokens]):
        formula[f"{sending.operation} (tensor)"] += sending.bytes * MICRO_BATCHES
    for of_step in told(log).values():
        found = {operation: row for (operation, _), row in of_step.items() if operation.endswith("(tensor)")}
        assert found.keys() == formula.keys()
        for operation, row in found.items():
            assert row["sent"] == pytest.approx([formula[operation]] * 2, abs=MICRO_BATCHES), operation
    assert "all-reduce (tensor)" in section(log, capsys)


def test_sums_of_gradients_are_told_of_the_workers_of_all_stages(run):
    log = trained(run, "mlp", data=2, pipe=2)
    for of_step in told(log).values():
        sent = of_step["reduce-scatter", "shared memory"]["sent"]
        assert len(sent) == 4
        assert all(sent)
        assert of_step["stage send", "shared memory"]["calls"] == [MICRO_BATCHES // 2] * 4
    c = read_communication(log.events())
    assert c.workers == 4
    assert c.mesh == {"data": 2, "pipe": 2}
    assert [[worker.rank for worker in sample.workers] for sample in c.samples] == [[0, 2]] * 3
