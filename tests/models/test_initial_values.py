"""First values are a function of the seed, a tensor's name and the place in it, and of nothing else."""

import hashlib
import math

import numpy as np
import pytest
import torch
from tiny_models import TINY, Tiny
from torch import Tensor, nn

from shoal.models.counter_streams import CHUNK, CounterStream
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.initial_values import Constant, Initial, Kept, Normal, Uniform, draw, initial_values

every_kind = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


def values(kind: str, start: int, count: int, seed: int = 0, name: str = "blocks.0.up.weight") -> np.ndarray:
    out = np.empty(count, np.float32)
    stream = CounterStream(seed, name)
    (stream.normal if kind == "normal" else stream.uniform)(start, out)
    return out


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_any_run_of_values_can_be_drawn_alone(kind):
    whole = values(kind, 0, 2 * CHUNK + 9)
    for start, count in [(0, 1), (1, 1), (1, 8), (7, 100), (8, 8), (CHUNK - 1, CHUNK + 3), (CHUNK, 5), (3, 0)]:
        assert (values(kind, start, count) == whole[start : start + count]).all(), (start, count)


def test_one_stream_can_go_back_and_forth():
    stream, whole = CounterStream(0, "blocks.0.up.weight"), values("normal", 0, 1000)
    for start in (500, 20, 20, 900):
        out = np.empty(10, np.float32)
        stream.normal(start, out)
        assert (out == whole[start : start + 10]).all()


def test_the_bits_are_those_of_every_machine():
    """Made of operations that all processors round alike: a hash written down here holds everywhere."""
    drawn = {
        kind: hashlib.sha256(values(kind, 0, 100_000).tobytes()).hexdigest()[:16] for kind in ("normal", "uniform")
    }
    assert drawn == {"normal": "5b10b6b5850771c2", "uniform": "cb8d16a317fbdfe1"}


def test_normal_values_are_distributed_normally():
    drawn = np.sort(values("normal", 0, 400_000).astype(np.float64))
    expected = torch.special.ndtr(torch.from_numpy(drawn)).numpy()
    distance = np.abs(expected - (np.arange(len(drawn)) + 0.5) / len(drawn)).max()
    assert distance * math.sqrt(len(drawn)) < 1.95  # Kolmogorov and Smirnov: once in a thousand by chance
    assert 4.2 < np.abs(drawn).max() < 6.7
    pairs = values("normal", 0, 400_000).reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.01
    assert abs(np.corrcoef(np.abs(pairs.T))[0, 1]) < 0.01


def test_uniform_values_are_distributed_evenly():
    drawn = np.sort(values("uniform", 0, 400_000).astype(np.float64))
    distance = np.abs((drawn + 1) / 2 - (np.arange(len(drawn)) + 0.5) / len(drawn)).max()
    assert distance * math.sqrt(len(drawn)) < 1.95


def test_other_names_and_other_seeds_give_unrelated_values():
    first = values("normal", 0, 100_000)
    for other in (values("normal", 0, 100_000, seed=1), values("normal", 0, 100_000, name="blocks.1.up.weight")):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02


def part(whole: Tensor, kept: Kept) -> Tensor:
    for dim, runs in kept.items():
        whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in runs], dim)
    return whole


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((40, 30), {1: [(3, 9), (20, 30)]}),
        ((40, 30), {0: [(3, 9), (20, 30)]}),
        ((7, 5, 600), {0: [(2, 4)], 1: [(0, 1), (3, 5)]}),
        ((4, 6, 5), {0: [(1, 2), (3, 4)], 2: [(1, 3)]}),
        ((3, 50_000), {1: [(100, 900)]}),  # too long a row to draw what lies between
        ((9,), {0: [(0, 4)]}),
        ((9, 3), {0: [(4, 4)]}),
    ],
)
@pytest.mark.parametrize("initial", [Normal(0.5), Uniform(0.5), Constant(0.5)])
def test_a_part_of_a_tensor_has_the_bits_that_the_whole_has_there(initial: Initial, shape, kept):
    assert torch.equal(draw(initial, 1, "w", shape, kept), part(draw(initial, 1, "w", shape), kept))


@every_kind
def test_every_tensor_of_every_kind_says_its_first_values_and_has_them(tiny: Tiny):
    model = tiny.build(seed=5)
    said = initial_values(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor.detach().float(), draw(said[name], 5, name, tensor.shape)), name


def test_a_tied_weight_is_drawn_once():
    config = {"layers": 1, "heads": 1, "width": 8, "vocab": 11, "context": 4}
    torch.manual_seed(0)
    tied, apart = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, tied=False))
    assert "head.weight" not in initial_values(tied)
    assert torch.equal(tied.tokens.weight, apart.tokens.weight)  # and others do not depend on it
    assert torch.equal(tied.blocks[0].up.weight, apart.blocks[0].up.weight)


def test_what_adds_to_the_residual_stream_is_scaled_by_the_number_of_layers():
    said = initial_values(GPT(GPTConfig(layers=8, heads=1, width=8, vocab=11, context=4)))
    assert said["blocks.3.up.weight"] == Normal(0.02)
    assert said["blocks.3.down.weight"] == said["blocks.3.attention.out.weight"] == Normal(0.02 / 4)
    assert said["blocks.3.norm1.weight"] == Constant(1.0)
    assert said["blocks.3.norm1.bias"] == Constant(0.0)


def test_a_tensor_whose_values_nobody_says_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    with pytest.raises(LookupError, match=r"first values of 1\.weight"):
        initial_values(model)
