"""A model without memory gets, tensor by tensor, what building it whole would have given; and it is one only where that
is the truth."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, Tiny
from torch import nn

from shoal.models.first_values import blank, materialise, on_demand, present
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.initial_weights import GivenWeights
from shoal.models.registry import build, build_blank
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import pieces
from shoal.parallel.pipeline.head_and_tail import arguments_of

every_kind = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


def make(**changes):
    return GPT(GPTConfig(**{"layers": 1, "heads": 1, "width": 8, "vocab": 11, "context": 4, **changes}))


def seeded(factory, seed=3):
    torch.manual_seed(seed)
    return factory()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(t, second[name]) and t.dtype == second[name].dtype for name, t in first.items()
    )


def frozen():
    model = make()
    model.tokens.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("factory", [make, frozen, lambda: make().double(), lambda: seeded(make, 9)])
def test_a_factory_of_ones_own_gives_a_blank_where_nothing_is_done_to_the_model(factory):
    found, whole = seeded(lambda: blank(factory)), seeded(factory)
    assert found is not None
    before = list(found.module.parameters())
    assert all(t.is_meta for t in before)
    materialise([found.module], found.first)
    assert same(found.module, whole)
    assert all(a is b for a, b in zip(before, found.module.parameters(), strict=True))
    assert [p.requires_grad for p in before] == [p.requires_grad for p in whole.parameters()]


def changed(change):
    def factory():
        model = make(tied=False)
        with torch.no_grad():
            change(model)
        return model

    return factory


def _swap(model):
    one, other = model.blocks[0].norm1, model.blocks[0].norm2
    one.weight.data = other.weight.data


CHANGES = {
    "written": lambda model: model.norm.bias.fill_(3),
    "written without a trace in the version": lambda model: model.norm.bias.data.mul_(2),
    "filled by torch.nn.init": lambda model: nn.init.normal_(model.tokens.weight),
    "other data": lambda model: setattr(model.norm.bias, "data", torch.ones(8)),
    "the data of another": _swap,
    "another layer": lambda model: setattr(model, "norm", nn.LayerNorm(8)),
    "tied": lambda model: setattr(model.head, "weight", model.tokens.weight),
    "rounded": lambda model: model.bfloat16().float(),
    "a buffer with values": lambda model: model.register_buffer("mask", torch.ones(3, device="cpu")),
    "read": lambda model: float(model.norm.bias.sum().detach()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_after_it_said_its_values_is_no_blank(change):
    assert blank(changed(CHANGES[change])) is None


def test_a_model_inside_of_another_that_says_nothing_is_no_blank():
    assert blank(lambda: nn.Sequential(make())) is None


@every_kind
def test_without_memory_a_model_is_measured_and_cut_as_the_whole_one(tiny: Tiny):
    whole, found = tiny.build(3), seeded(lambda: build_blank(tiny.spec, tiny.facts))
    assert found is not None
    example = arguments_of(tiny.task.loss, found.module, tiny.batch)
    assert pieces(found.module, example, clock=False, first=found.first) == pieces(whole, example, clock=False)
    with on_demand(found.module, found.first):
        chunks = cut(found.module, 2, example=example, at=[1])
    assert all(t.is_meta for t in found.module.parameters())
    expected = cut(whole, 2, example=example, at=[1])
    assert chunks.tied == expected.tied
    materialise([*(chunk.module for chunk in chunks.chunks), found.module], found.first)
    for one, other in zip(chunks.chunks, expected.chunks, strict=True):
        assert (one.inputs, one.outputs, one.parameters) == (other.inputs, other.outputs, other.parameters)
        assert same(one.module, other.module)


@every_kind
def test_within_the_block_a_module_computes_and_after_it_holds_nothing(tiny: Tiny):
    found = seeded(lambda: build_blank(tiny.spec, tiny.facts))
    with present(found.module, found.first):
        torch.manual_seed(7)
        loss = tiny.task.loss(found.module, tiny.batch)[0]
    assert all(t.is_meta for t in (*found.module.parameters(), *found.module.buffers()))
    whole = tiny.build(3)
    torch.manual_seed(7)
    assert torch.equal(loss, tiny.task.loss(whole, tiny.batch)[0])


def test_a_file_gives_parts_of_what_it_holds_and_the_rest_is_drawn(tmp_path):
    tiny = TINY["bert-classification"]
    trained = {name: torch.randn_like(t) for name, t in tiny.build().state_dict().items() if "classifier" not in name}
    save_file(trained, tmp_path / "weights.safetensors")
    found = seeded(lambda: build_blank(tiny.spec, tiny.facts))
    given = GivenWeights(found.module, tmp_path / "weights.safetensors")
    assert given.new == ("classifier.weight", "classifier.bias")
    first = found.first.over(given)
    assert torch.equal(first.part("tokens.weight", {0: [(1, 3), (9, 10)]}), trained["tokens.weight"][[1, 2, 9]])
    assert torch.equal(first.part("classifier.weight"), tiny.build(3).classifier.weight)


def test_under_the_meta_device_building_gives_shapes_alone():
    with torch.device("meta"):
        model = build(TINY["gpt"].spec, TINY["gpt"].facts)
    assert all(t.is_meta for t in model.parameters())
