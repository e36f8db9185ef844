"""A model in chunks computes what the whole model computes."""

import re
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_programs import Source, run
from parallel.cut_passes import Pass, in_chunks, whole
from parallel.models import AWKWARD, Branching, Ranges, UNet
from tiny_models import TINY, Tiny
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models import recurrent
from shoal.parallel.partition.arguments import bind
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.chunks import OUTPUT, Chunks
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import pieces

COUNTS = (1, 2, 3, 5, 1000)  # 1000: as many as there are pieces


def counts(available: int) -> list[int]:
    return sorted({min(count, available) for count in COUNTS})


class Asked(nn.Module):
    """Stands in for a model in a task's loss: takes down the arguments, and gives what it is told to."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.arguments = (args, kwargs)
        if self.output is None:
            raise StopIteration
        return self.output


def arguments_of(tiny: Tiny, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the task calls the model with."""
    asked = Asked()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        with pytest.raises(StopIteration):
            tiny.task.loss(asked, batch)
    args, kwargs = asked.arguments
    return dict(bind(model, args, kwargs).arguments)


def loss_of(tiny: Tiny, batch: Mapping[str, Tensor]) -> Callable[[Any], Tensor]:
    def loss(output: Any) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return tiny.task.loss(Asked(output), batch)[0]

    return loss


def with_dropout(tiny: Tiny) -> nn.Module:
    """The tiny model, with dropout wherever it has a place for it."""
    model = tiny.build()
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.2
        if type(module).__name__ in ("Attention", "Block"):
            module.attention_dropout = 0.2
    return model


@pytest.mark.parametrize("kind", TINY)
def test_every_built_in_model_in_chunks_has_the_bits_of_the_whole_one(kind: str) -> None:
    tiny = TINY[kind]
    model = with_dropout(tiny)
    example = arguments_of(tiny, model, tiny.batch)
    for count in counts(len(pieces(model, example, clock=False))):
        chunks = cut(model, count, example=example)
        assert len(chunks) == count
        for samples in (3, 2):  # the micro-batch of the example, and a ragged tail
            batch = {name: tensor[:samples] for name, tensor in tiny.batch.items()}
            arguments, loss = arguments_of(tiny, model, batch), loss_of(tiny, batch)
            expected = whole(model, arguments, loss)
            assert expected.gradients
            assert not expected.differs(in_chunks(model, chunks, arguments, loss)), (count, samples)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_in_chunks_have_the_bits_of_the_whole_ones_in_training_and_in_evaluation(name: str) -> None:
    awkward = AWKWARD[name]
    model = awkward.build()
    modes = {module: module.training for module in model.modules()}
    for count in range(1, 1 + len(pieces(model, awkward.batch, clock=False))):
        chunks = cut(model, count, example=awkward.batch)
        compare(model, chunks, awkward.first)
        for module in (model, *(chunk.module for chunk in chunks.chunks)):
            module.eval()
        compare(model, chunks, awkward.first)
        for module, mode in modes.items():
            module.training = mode


def compare(model: nn.Module, chunks: Chunks, first: Callable[[int], dict[str, Any]]) -> None:
    for samples in (6, 5):
        assert not whole(model, first(samples)).differs(in_chunks(model, chunks, first(samples))), samples


@pytest.mark.parametrize("fault", ["loss", "gradient", "draw"])
def test_a_planted_difference_is_seen(fault: str) -> None:
    awkward = AWKWARD["shared"]
    model = awkward.build()
    chunks = cut(model, 3, example=awkward.batch)

    def faulty(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
        if fault == "draw":
            torch.rand(())
        return {name: value * 1.01 if fault == "loss" else value for name, value in output.items()}

    chunks.chunks[1].module.register_forward_hook(faulty)
    expected = whole(model, awkward.batch)
    if fault == "gradient":
        expected.gradients["middle.bias"][0] += 1e-6
    found: Pass = in_chunks(model, chunks, awkward.batch)
    wanted = {"loss": "loss", "gradient": "middle.bias", "draw": "random stream"}[fault]
    assert wanted in expected.differs(found)


@pytest.mark.parametrize("kind", ["gpt", "resnet-cifar", "elmo", "bert-masked"])
def test_a_chunk_holds_its_own_parameters_under_their_names_and_in_their_order(kind: str) -> None:
    tiny = TINY[kind]
    model = tiny.build()
    chunks = cut(model, 3, example=arguments_of(tiny, model, tiny.batch))
    names = [name for name, _ in model.named_parameters()]
    for chunk in chunks.chunks:
        assert list(chunk.parameters) == [name for name in names if name in chunk.parameters]
        assert [name for name, _ in chunk.module.named_parameters()] == list(chunk.parameters)
        for name in chunk.parameters:
            assert chunk.module.get_parameter(name) is model.get_parameter(name)
    assert {name for chunk in chunks.chunks for name in chunk.parameters} == set(names)
    buffers = {name: b for chunk in chunks.chunks for name, b in chunk.module.named_buffers()}
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())


def test_tied_parameters_are_those_that_several_chunks_use() -> None:
    shared = AWKWARD["shared"]
    chunks = cut(shared.build(), 5, example=shared.batch)
    assert chunks.tied == {"tokens.weight": (0, 4), "block.0.weight": (1, 3), "block.0.bias": (1, 3)}
    assert "tokens.weight" in chunks.chunks[4].parameters, "by its first name, though the layer calls it head.weight"
    tiny = TINY["gpt"]
    model = tiny.build()
    assert cut(model, 2, example=arguments_of(tiny, model, tiny.batch)).tied == {"tokens.weight": (0, 1)}


def test_what_a_later_chunk_needs_passes_through_the_chunks_between() -> None:
    awkward = AWKWARD["unet"]
    chunks = cut(awkward.build(), 9, example=awkward.batch).chunks
    assert chunks[0].inputs == ()
    assert chunks[-1].outputs == (OUTPUT,)
    for before, after in pairwise(chunks):
        assert before.outputs == after.inputs
    assert all("relu" in chunk.inputs for chunk in chunks[2:]), "the first skip connection goes to the last layer"


def test_the_batch_is_not_sent_and_masks_are_worked_out_where_they_are_needed() -> None:
    tiny = TINY["bert-classification"]
    model = tiny.build()
    chunks = cut(model, 3, example=arguments_of(tiny, model, tiny.batch), cuts=["blocks.0", "blocks.1"]).chunks
    assert [chunk.inputs for chunk in chunks] == [(), ("dropout",), ("blocks_0",)]
    assert "mask" in chunks[1].batch_inputs
    assert "mask" in chunks[2].batch_inputs
    assert "tokens" not in chunks[1].batch_inputs


def test_numbers_none_and_tuples_cross_cuts() -> None:
    awkward = AWKWARD["ranges"]
    model = awkward.build()
    chunks = cut(model, 3, example=awkward.batch, cuts=("mix", "head")).chunks
    values: dict[str, Any] = dict(awkward.batch)
    kinds: set[type] = set()
    for chunk in chunks[:-1]:
        values = {**chunk.module(values), **awkward.batch}
        kinds |= {type(values[name]) for name in chunk.outputs}
    assert int in kinds
    assert any(issubclass(kind, tuple) for kind in kinds)


@pytest.mark.parametrize("runs", [2, 4])
def test_every_worker_that_cuts_for_itself_cuts_alike(runs: int) -> None:
    made = [cut(AWKWARD["unet"].build(), 4, example=AWKWARD["unet"].batch) for _ in range(runs)]
    tables = [[(c.inputs, c.outputs, c.batch_inputs, c.parameters) for c in chunks.chunks] for chunks in made]
    assert all(table == tables[0] for table in tables)


def test_cutting_leaves_the_model_and_the_random_stream_alone() -> None:
    tiny = TINY["cnn-norm"]
    model = with_dropout(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward, attributes = nn.Module.__call__, {m: set(vars(m)) for m in model.modules()}
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    pieces(model, {"input": tiny.batch["input"]}, runs=1)
    cut(model, 3, example={"input": tiny.batch["input"]})
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert nn.Module.__call__ is forward
    assert {m: set(vars(m)) for m in model.modules()} == attributes
    assert len([1]) == 1
    assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_a_cut_goes_where_the_user_says() -> None:
    tiny = TINY["gpt"]
    model = tiny.build()
    example = arguments_of(tiny, model, tiny.batch)
    chunks = cut(model, 4, example=example, cuts=["blocks.0.norm2", "blocks.1", "norm"]).chunks
    assert [chunk.parameters[0] for chunk in chunks[1:3]] == ["blocks.0.norm2.weight", "blocks.1.norm1.weight"]
    assert chunks[3].parameters == ("tokens.weight", "norm.weight", "norm.bias")
    lstm = TINY["lstm"].build()
    chunks = cut(lstm, 2, example=(TINY["lstm"].batch["tokens"],), cuts=["lstm.weight_ih_l1"]).chunks
    assert "lstm.weight_hh_l0" in chunks[0].parameters
    assert {"lstm.weight_ih_l1", "lstm.weight_hh_l1"} <= set(chunks[1].parameters)


@pytest.mark.parametrize("known", [True, False], ids=["as it is", "without bfloat16 instructions"])
def test_a_stack_of_lstm_layers_is_cut_between_them_in_bfloat16_too(monkeypatch, known):
    if not known:
        monkeypatch.setattr(recurrent, "_has_bfloat16", lambda: False)
    tiny = TINY["lstm"]
    model = tiny.build()
    arguments = arguments_of(tiny, model, tiny.batch)
    with torch.autocast("cpu", torch.bfloat16):
        chunks = cut(model, 2, example=arguments, cuts=["lstm.weight_ih_l1"])
        assert in_chunks(model, chunks, arguments).differs(whole(model, arguments)) == []


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        (["positoins"], "unknown cut point 'positoins' in GPT: did you mean 'positions'?"),
        (["blocks.0.attention.qkv"], "no cut can be at 'blocks.0.attention.qkv', inside 'blocks.0.attention'"),
        (["tokens"], "the model begins with it"),
        (["blocks.1", "blocks.0"], "name cuts in forward order: ['blocks.0', 'blocks.1']"),
        (["blocks.1", "blocks.1"], "name cuts in forward order"),
        (["blocks.1", "norm", "head"], "2 cuts between them, but 3 are given"),
    ],
)
def test_a_cut_that_cannot_be_is_one_line(cuts: list[str], said: str) -> None:
    tiny = TINY["gpt-untied"]
    model = tiny.build()
    with pytest.raises(UserError) as error:
        cut(model, 3 if len(cuts) > 1 else 2, example=arguments_of(tiny, model, tiny.batch), cuts=cuts)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_more_chunks_than_pieces_are_refused_with_the_largest_count() -> None:
    tiny = TINY["mlp"]
    with pytest.raises(UserError, match="3 pieces, too few for 4 chunks: take at most 3"):
        cut(tiny.build(), 4, example=(tiny.batch["input"],))


@pytest.mark.parametrize("at", [(1, 1), (2,), (2, 1), (1, 9)])
def test_pieces_that_are_no_cut_are_refused(at: tuple[int, ...]) -> None:
    tiny = TINY["mlp"]
    with pytest.raises(UserError, match=r"3 chunks need 2 increasing numbers from 1 to 2"):
        cut(tiny.build(), 3, example=(tiny.batch["input"],), at=at)


def test_a_table_measured_on_one_worker_cuts_on_all() -> None:
    awkward = AWKWARD["unet"]
    table = pieces(awkward.build(), awkward.batch, runs=1)
    at = balance(table, 3)
    chunks = cut(awkward.build(), 3, example=awkward.batch, at=at).chunks
    assert [sum(p.parameter_bytes for p in table[a:b]) for a, b in zip((0, *at), (*at, len(table)), strict=True)] == [
        sum(p.numel() * p.element_size() for p in chunk.module.parameters()) for chunk in chunks
    ]


def test_weights_and_speeds_move_the_cuts() -> None:
    tiny = TINY["mlp"]
    model, example = tiny.build(), (tiny.batch["input"],)
    ends = [cut(model, 2, example=example, weights=w).chunks[0].parameters[-1] for w in ([1, 1, 5], [5, 1, 1])]
    assert ends == ["layers.1.bias", "layers.0.bias"]
    ends = [
        cut(model, 2, example=example, weights=[1, 1, 1], speeds=s).chunks[0].parameters[-1] for s in ([2, 1], [1, 2])
    ]
    assert ends == ["layers.1.bias", "layers.0.bias"]
    with pytest.raises(UserError, match="2 weights are given for the model's 3 pieces"):
        cut(model, 2, example=example, weights=[1, 2])


def test_without_an_example_a_plain_model_is_cut_by_its_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    chunks = cut(model, 2)
    assert [chunk.parameters[0] for chunk in chunks.chunks] == ["0.weight", "4.weight"]
    x = torch.randn(3, 4)
    assert not whole(model, {"input": x}).differs(in_chunks(model, chunks, {"input": x}))
    with pytest.raises(UserError, match="no example batch to tell it"):
        cut(Branching(), 2)


def test_a_model_without_memory_is_cut_like_one_with_it() -> None:
    """On the meta device shapes are known and nothing is computed: so a model is cut that no worker could hold."""
    with torch.device("meta"):
        model = UNet()
    image = AWKWARD["unet"].batch["image"]
    chunks = cut(model, 4, example={"image": image.to("meta")}).chunks
    real = cut(AWKWARD["unet"].build(), 4, example={"image": image}).chunks
    assert [chunk.parameters for chunk in chunks] == [chunk.parameters for chunk in real]
    assert [chunk.inputs for chunk in chunks] == [chunk.inputs for chunk in real]


def test_autocast_reaches_into_chunks() -> None:
    awkward = AWKWARD["unet"]
    model = awkward.build()
    chunks = cut(model, 4, example=awkward.batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not whole(model, awkward.batch).differs(in_chunks(model, chunks, awkward.batch))


def test_a_plain_attribute_that_holds_a_tensor_stays_the_model_s() -> None:
    model = Ranges()
    chunks = cut(model, 2, example=AWKWARD["ranges"].batch)
    assert any(vars(chunk.module).get("_constant0") is model.table for chunk in chunks.chunks)


def test_the_page_about_cutting_shows_what_its_program_prints(warm: Source) -> None:
    page = (Path(__file__).parents[2] / "docs/cutting.md").read_text(encoding="utf-8")
    program, shown = re.findall(r"^```(?:python|text)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert run([sys.executable, "-c", program], warm).stdout == shown
