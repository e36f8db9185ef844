"""What is wrong with a step is caught in that step, before it is committed: the guards, and planted faults for each."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from train.tiny_runs import recipe, splits

from shoal.data.ledger import Ledger
from shoal.errors import RunFailed
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.checksum import Diverged, compare, parameter_checksum
from shoal.train.loop import Order, run_recipe

STEP, RANK = 3, 1  # faults are planted when this rank has committed this step
RESNET = recipe("resnet", steps=6, clip=0.05)  # batch norm's buffers must be taken back too
DATA = splits("cnn", 101)


@dataclass(frozen=True)
class Planted:
    """One worker does something to its model after a step."""

    fault: str
    rank: int = RANK

    def __call__(self, worker, step):
        if worker.rank != self.rank or step.number != STEP:
            return
        first = next(worker.held.module.parameters())
        if self.fault == "bit":
            first.data.view(torch.int32).view(-1)[0] ^= 1 << 22
        elif self.fault == "gradient":
            self._spoil(first.register_hook)
        elif self.fault == "loss":
            self._spoil(lambda act: worker.held.module.register_forward_hook(lambda m, i, out: act(out)))

    @staticmethod
    def _spoil(hook):
        """The next value that the hook sees becomes NaN, and no later one."""

        def act(value):
            hooked.remove()
            return value * float("nan")

        hooked = hook(act)


def _planted(group, order, fault):
    return run_recipe(group, replace(order, observe=fault))


@pytest.fixture
def with_fault(agent, tmp_path, request):
    import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)

    def run(fault, workers=3, made=RESNET, data=DATA, states="replicated"):
        wanted = Plan(mesh={"data": workers}, states=states, device="cpu")
        order = Order(made, wanted, run_dir=tmp_path / "run", data=data)
        return agent.run(_planted, (order, fault), workers=workers)[0], Run(tmp_path / "run").events()

    return run


def ids_of(step: int, shards: range) -> set[int]:
    ledger = Ledger(len(DATA.train), RESNET.batch, RESNET.shards, RESNET.micro_batches, RESNET.seed)
    return {int(each) for shard in shards for ids in ledger.shard(step - 1, shard) for each in ids}


@pytest.mark.parametrize(
    ("fault", "states"), [("loss", "replicated"), ("gradient", "replicated"), ("loss", "zero1"), ("gradient", "zero1")]
)
def test_a_nan_that_comes_once_is_named_and_its_step_done_again_with_the_same_bits(with_fault, run, fault, states):
    result, events = with_fault(Planted(fault), states=states)
    assert result["weights_sha256"] == run(RESNET, 1, data=DATA)["weights_sha256"]
    (replayed,) = [event for event in events if event["event"] == "replayed"]
    assert replayed["step"] == STEP + 1
    assert replayed["cost_s"] > 0
    who, _, ids = replayed["why"].partition(", sample ids ")
    shards = Plan(mesh={"data": 3}).owned(RESNET.shards)[RANK]
    named = {int(each) for each in ids.split(", ")}
    if fault == "loss":
        assert who == f"rank {RANK}: loss is nan at step {STEP + 1}, shard {shards[0]}"
        assert named == ids_of(STEP + 1, shards[:1])
    else:  # its shards have been added up by the time that it is noticed
        assert who.startswith(f"rank {RANK}: the gradient is not finite at step {STEP + 1} although the loss is (")
        assert who.endswith(f"one of shards {shards[0]} to {shards[-1]}")
        assert named == ids_of(STEP + 1, shards)
    assert [event["step"] for event in events if event["event"] == "committed"] == list(range(1, 7))


class RootOfZero(torch.nn.Module):
    """Its gradient is infinite at any time, its loss is not."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 5)
        self.scale = torch.nn.Parameter(torch.zeros(5))

    def forward(self, input):
        return self.head(input.flatten(1)) + self.scale.sqrt()


def test_a_gradient_that_is_never_finite_ends_the_run_with_one_line_and_exact_shards(run, tmp_path):
    with pytest.raises(RunFailed) as failed:
        run(RESNET, 2, data=DATA, model=RootOfZero, run_dir=tmp_path / "run")
    line = str(failed.value)
    assert "\n" not in line
    assert "the same when the step was done again, rank 0 and 7 more: the gradient is not finite at step 1" in line
    assert "that of parameter 'scale' is not, shard 0, sample ids " in line
    assert {int(each) for each in line.partition("sample ids ")[2].split(", ")} == ids_of(1, range(1))
    events = Run(tmp_path / "run").events()
    assert not [event for event in events if event["event"] in ("committed", "replayed")]


@pytest.mark.parametrize(("workers", "rank"), [(3, 0), (3, 2), (2, 0), (2, 1)])
def test_a_flipped_bit_in_one_workers_parameters_is_caught_before_the_next_commit(with_fault, tmp_path, workers, rank):
    """Two workers have no majority: each remembers what its own update left."""
    with pytest.raises(RunFailed, match=f"parameters differ in step {STEP + 1}: rank {rank} disagrees with the others"):
        with_fault(Planted("bit", rank), workers)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, lines) if e["event"] == "committed"] == list(range(1, STEP + 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_in_parameters_that_workers_share_is_caught_before_the_next_commit(with_fault, tmp_path, rank):
    """There is one copy: each worker remembers what its own update left of its slices, whoever has written to them."""
    made = replace(RESNET, report=Reporting(evaluate_every=0, checkpoint_every=1, sample=False))
    line = rf"shared parameters were written to before step {STEP + 1} was committed, .*: the slices of rank \d are not"
    with pytest.raises(RunFailed, match=line):
        with_fault(Planted("bit", rank), 2, made, states="zero1")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, lines) if e["event"] == "committed"] == list(range(1, STEP + 1))
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / f"doubtful-step-{STEP:08d}").is_dir()
    assert checkpoint.newest(folder)[0].step == STEP - 1


def test_what_a_wrong_rank_0_has_saved_is_put_out_of_the_way_and_the_run_goes_on_from_before(with_fault, tmp_path, run):
    made = replace(RESNET, report=Reporting(evaluate_every=0, checkpoint_every=1, sample=False))
    with pytest.raises(RunFailed, match=f"differ in step {STEP + 1}: rank 0 disagrees with the others"):
        with_fault(Planted("bit", 0), made=made)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / f"doubtful-step-{STEP:08d}").is_dir()
    assert checkpoint.newest(folder)[0].step == STEP - 1
    again = run(made, 2, data=DATA, resume=tmp_path / "run")
    assert again["weights_sha256"] == run(made, 1, data=DATA)["weights_sha256"]


def test_without_the_vote_the_flipped_bit_would_be_trained_on(with_fault, monkeypatch, run):
    """The planted mistake: a checksum that is always the same lets other weights through."""

    def blind(group, order, fault):
        import shoal.train.gradients

        shoal.train.gradients.parameter_checksum = lambda parameters: 0.0
        return run_recipe(group, replace(order, observe=fault))

    monkeypatch.setitem(globals(), "_planted", blind)
    with pytest.raises(RunFailed, match="differ after step 6"):
        with_fault(Planted("bit"))


def test_any_one_flipped_bit_changes_the_checksum():
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((3, 5), (4,), (1,))]
    parameters += [torch.nn.Parameter(torch.randn(3).bfloat16()), torch.nn.Parameter(torch.randn(2).double())]
    whole = parameter_checksum(parameters)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for parameter in parameters:
        size = parameter.element_size()
        words = parameter.data.view(-1).view(kinds[size])
        for place in range(len(words)):
            for bit in range(8 * size):
                mask = torch.tensor(-(1 << bit) if bit == 8 * size - 1 else 1 << bit, dtype=words.dtype)
                words[place] ^= mask
                assert parameter_checksum(parameters) != whole, (place, bit)
                words[place] ^= mask
    assert parameter_checksum(parameters) == whole


@pytest.mark.parametrize(
    ("checksums", "kept", "ranks", "sure"),
    [
        ((1.0, 1.0, 2.0), (), (2,), True),
        ((1.0, 2.0), (True, False), (1,), True),
        ((1.0, 2.0), (True, True), (0, 1), False),
        ((1.0, 2.0), (False, False), (0, 1), False),
        ((1.0, 1.0, 2.0, 2.0), (), (0, 1, 2, 3), False),
        ((1.0, 2.0, 3.0), (), (0, 1, 2), False),
    ],
)
def test_only_a_majority_or_a_workers_own_memory_says_who_is_wrong(checksums, kept, ranks, sure):
    with pytest.raises(Diverged) as found:
        compare(range(len(checksums)), checksums, "now", kept)
    assert (found.value.ranks, found.value.sure) == (ranks, sure)


def test_a_step_whose_gradient_is_not_finite_changes_nothing_in_a_loop_of_ones_own(agent, run):
    from shoal.train.api import _as_worker

    settings = {"shards": 2, "micro_batches": 1, "seed": 0, "clip": 0.0}
    told = agent.run(_as_worker, (own_loop, (), Plan(device="cpu"), settings), workers=1)[0]
    assert "the gradient is not finite at step 1" in told


def own_loop(worker):
    model = worker.model(RootOfZero())
    worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in worker.steps(DATA.train, batch=4, steps=1):
        try:
            for batch in step:
                step.backward(model(batch["input"]).sum(), len(batch["input"]))
            step.commit()
        except RunFailed as error:
            assert all(map(torch.equal, before, model.parameters()))
            return str(error)
    return "nothing was said"
