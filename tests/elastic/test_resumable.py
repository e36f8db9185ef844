"""What of a user's own code gives two answers to one question is named, and what does not is not."""

import torch
from torch import nn
from torch.utils.data import Dataset
from train.tiny_runs import recipe, splits

from shoal.comm.arena import Arenas
from shoal.comm.group import HostGroup
from shoal.comm.heap import Heap, heap_file
from shoal.comm.mesh import Mesh
from shoal.comm.status import Reporter
from shoal.elastic.resumable import not_resumable
from shoal.recipe.plan import Plan
from shoal.train.loop import Order

CNN, DATA = recipe("cnn", steps=4), splits("cnn", 101)


class Counting(nn.Module):
    """As many classes as the data has; its output depends on how often it was called."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.calls, self.step = 0, step

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(input.flatten(1)) * (1 + self.step * self.calls)


class Drifting(Dataset):
    def __init__(self, step: float) -> None:
        self.seen, self.step = 0, step

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.seen += 1
        return {"input": torch.full((1, 8, 8), i + self.step * self.seen), "target": torch.tensor(i % 4)}


def lines(**instead: object) -> list[str]:
    report = Reporter(0, 0, None)
    memory = {"heap": Heap(heap_file()), "arenas": Arenas(0, [])}
    group = HostGroup(0, 1, Mesh(0, [None], report), report, lambda _: None, **memory)
    return not_resumable(group, Order(CNN, Plan(device="cpu"), **{"data": DATA, **instead}))


def test_what_gives_the_same_answer_twice_is_not_named_though_it_counts():
    assert not lines()
    assert not lines(model=lambda: Counting(0.0), data=Drifting(0.0))


def test_a_model_that_depends_on_its_calls_is_named_with_what_has_changed():
    (line,) = lines(model=lambda: Counting(0.01))
    assert line.startswith("the model gives another loss")
    assert "'calls' of the model was 0 and is 2" in line


def test_a_data_set_whose_samples_change_is_named_with_what_has_changed():
    (line,) = lines(model=lambda: Counting(0.0), data=Drifting(0.01))
    assert line.startswith("the data set gives another 'input'")
    assert "'seen' of the data set was" in line
