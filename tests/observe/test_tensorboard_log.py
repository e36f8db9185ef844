"""The bridge to TensorBoard: which scalars an event becomes, and that they can be read back from the files."""

import builtins
import math

import pytest
from logbook import committed, evaluated, started, story

from shoal.errors import UserError
from shoal.run.tensorboard import TensorBoardLog, mirror, open_writer, scalars


class Recorded:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, scalar_value, global_step, walltime):
        self.rows.append((tag, scalar_value, global_step, walltime))

    def add_text(self, tag, text_string, global_step, walltime):
        self.rows.append((tag, text_string, global_step, walltime))

    def close(self):
        pass


def test_a_committed_step_becomes_loss_rates_parts_and_waiting():
    found = dict(scalars(committed(4, seconds=2.0)))
    assert found["train/loss"] == 1.0
    assert found["speed/samples_per_second"] == 32.0
    assert found["speed/targets_per_second"] == 320.0
    assert found["seconds/backward"] == 0.4
    assert found["data_wait_share/rank_1"] == 0.125


def test_figures_are_named_by_their_split():
    assert dict(scalars(evaluated(4, split="test", loss="nan", accuracy=0.5))) == {
        "test/loss": pytest.approx(math.nan, nan_ok=True),
        "test/accuracy": 0.5,
    }


def test_events_without_figures_are_not_mirrored():
    recorded = Recorded()
    for event in (
        started(),
        {"time": 1.0, "event": "failed", "why": "x"},
        {"time": 1.0, "event": "resumed", "step": 1},
    ):
        mirror(event, recorded)
    assert recorded.rows == []


def test_a_sample_is_text_that_markdown_leaves_alone():
    recorded = Recorded()
    mirror({"time": 2.0, "event": "sampled", "step": 3, "text": "# a\n*b*"}, recorded)
    assert recorded.rows == [("samples", "    # a\n    *b*", 3, 2.0)]


def test_the_scalars_of_a_run_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path / "tensorboard")
    for event in story(6):
        log.write(event)
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    losses = [(row.step, row.value, row.wall_time) for row in read.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(4.0 / step), float(step)) for step in range(1, 7)]
    assert [row.value for row in read.Scalars("validation/accuracy")] == [0.25, 0.5]
    assert "samples/text_summary" in read.Tags()["tensors"]


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'shoal\[tensorboard\]'"):
        open_writer(tmp_path)
