"""The background writer: what was submitted is written, whatever training does to the tensors meanwhile."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.train import checkpoint
from shoal.train.checkpoint import listing, load, newest
from shoal.train.snapshot import BackgroundWriter


class Gate:
    """Holds every save until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)
        real = checkpoint.save

        def held(*args: Any, **named: Any) -> Path:
            self.entered.release()
            assert self.open.acquire(timeout=30)
            return real(*args, **named)

        patch.setattr(checkpoint, "save", held)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def test_the_state_of_the_submit_is_written_not_what_training_makes_of_it(tmp_path, gate):
    state = {"model/w": torch.zeros(1000), "model/t": torch.zeros(3, 4).t()}
    with BackgroundWriter(tmp_path, like=state) as writer:
        for tensor in state.values():
            tensor.fill_(1.0)
        writer.submit(state, {"step": 1})
        assert gate.entered.acquire(timeout=30)
        for tensor in state.values():
            tensor.fill_(2.0)  # training goes on
        assert listing(tmp_path) == []
        gate.open.release()
    loaded = newest(tmp_path)[0]
    assert all((tensor == 1.0).all() for tensor in loaded.tensors.values())
    assert loaded.tensors["model/t"].shape == (4, 3)


def test_a_written_checkpoint_is_reported_with_its_path_size_and_times(tmp_path):
    with BackgroundWriter(tmp_path) as writer:
        stall_s = writer.submit({"model/w": torch.zeros(10)}, {"step": 7}, best=True)
    [written] = writer.poll()
    assert writer.poll() == []
    assert written.path == tmp_path / "step-00000007"
    assert (written.step, written.bytes, written.best, written.error) == (7, 40, True, "")
    assert written.stall_s == stall_s > 0
    assert written.write_s > 0
    assert listing(tmp_path)[0].best


def test_a_busy_writer_makes_the_next_submit_wait_and_loses_none(tmp_path):
    with BackgroundWriter(tmp_path) as writer:
        for step in range(5):
            writer.submit({"model/w": torch.full((10,), float(step))}, {"step": step})
    assert [written.step for written in writer.poll()] == [0, 1, 2, 3, 4]
    for step in range(5):
        assert (load(tmp_path / f"step-{step:08d}").tensors["model/w"] == step).all()


@pytest.mark.parametrize("kind", ["best", "final"])
def test_a_skipping_writer_skips_an_ordinary_checkpoint_but_never_the_best_or_the_final_one(tmp_path, gate, kind):
    state = {"model/w": torch.zeros(10)}
    with BackgroundWriter(tmp_path, busy="skip") as writer:
        writer.submit(state, {"step": 1})
        assert gate.entered.acquire(timeout=30)
        writer.submit(state, {"step": 2})
        gate.open.release(2)
        writer.submit(state, {"step": 3}, **{kind: True})
    skipped, first, last = writer.poll()
    assert (skipped.step, skipped.path) == (2, None)
    assert skipped.error == "skipped: the previous checkpoint is still written"
    assert (first.step, last.step) == (1, 3)
    assert [listed.step for listed in listing(tmp_path)] == [3, 1]


def test_the_memory_is_allocated_once_and_grows_with_the_state(tmp_path):
    like = {"model/w": torch.zeros(100)}
    with BackgroundWriter(tmp_path, like=like) as writer:
        address = writer._copies["model/w"].data_ptr()
        writer.submit({"model/w": torch.ones(100)}, {"step": 1})
        moments = {"optimizer/w/exp_avg": torch.ones(100), "optimizer/w/step": torch.tensor(2.0)}
        writer.submit({"model/w": torch.ones(100), **moments}, {"step": 2})
        assert writer._copies["model/w"].data_ptr() == address
    assert set(newest(tmp_path)[0].tensors) == {"model/w", "optimizer/w/exp_avg", "optimizer/w/step"}
    assert set(load(tmp_path / "step-00000001").tensors) == {"model/w"}


def test_a_tensor_of_another_shape_or_dtype_than_foretold_is_written_as_it_is(tmp_path):
    with BackgroundWriter(tmp_path, like={"a": torch.zeros(3), "b": torch.zeros(3)}) as writer:
        writer.submit({"a": torch.ones(4), "b": torch.ones(3, dtype=torch.int64)}, {"step": 1})
    loaded = newest(tmp_path)[0].tensors
    assert torch.equal(loaded["a"], torch.ones(4))
    assert torch.equal(loaded["b"], torch.ones(3, dtype=torch.int64))


def test_a_failed_write_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    def broken(*args: Any, **named: Any) -> Path:
        raise RuntimeError("out of ink")

    with BackgroundWriter(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", broken)
            writer.submit({"model/w": torch.zeros(10)}, {"step": 1})
            writer._join()
        writer.submit({"model/w": torch.zeros(10)}, {"step": 2})
    failed, written = writer.poll()
    assert (failed.path, failed.error) == (None, "RuntimeError: out of ink")
    assert written.error == ""
    assert [listed.step for listed in listing(tmp_path)] == [2]


def test_facts_may_change_after_the_submit(tmp_path, gate):
    facts = {"step": 1, "kept": {"seen": [1, 2]}}
    with BackgroundWriter(tmp_path) as writer:
        writer.submit({}, facts)
        assert gate.entered.acquire(timeout=30)
        facts["kept"]["seen"].append(3)
        gate.open.release()
    assert newest(tmp_path)[0].facts == {"step": 1, "kept": {"seen": [1, 2]}}


def test_facts_that_json_cannot_hold_are_reported_and_training_goes_on(tmp_path):
    with BackgroundWriter(tmp_path) as writer:
        writer.submit({}, {"step": 1, "loss": float("inf")})
        writer.submit({}, {"step": 2})
    failed, written = writer.poll()
    assert failed.error.startswith("checkpoint: facts.loss is inf, which JSON cannot hold")
    assert (failed.path, written.path) == (None, tmp_path / "step-00000002")


def test_it_prunes_to_so_many_beside_the_best(tmp_path):
    with BackgroundWriter(tmp_path, keep=2) as writer:
        for step in range(6):
            writer.submit({"model/w": torch.zeros(10)}, {"step": step}, best=step == 1)
    assert [listed.step for listed in listing(tmp_path, verify=True)] == [5, 4, 1]
    assert len(os.listdir(tmp_path)) == 3


def test_leaving_the_block_through_an_exception_still_finishes_the_write(tmp_path, gate):
    def train() -> None:
        with BackgroundWriter(tmp_path) as writer:
            writer.submit({"model/w": torch.zeros(10)}, {"step": 1})
            gate.open.release()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert newest(tmp_path)[0].step == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_closed_writer_says_so(tmp_path):
    writer = BackgroundWriter(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(ShoalError, match="closed"):
        writer.submit({}, {"step": 1})
