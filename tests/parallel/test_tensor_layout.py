"""Rules and what becomes of them: laws of splits, the default layouts, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel.split_cases import CASES, ROWS, SLICED
from tiny_models import TINY

from shoal.errors import UserError
from shoal.models.dropout import Dropout, dropout
from shoal.models.registry import build
from shoal.parallel.layout.bands import band_treatments
from shoal.parallel.layout.decide import layout_for, layout_of
from shoal.parallel.layout.passage import Flow
from shoal.parallel.layout.split import even_split, shares
from shoal.parallel.layout.treatment import Layout, Weighted
from shoal.parallel.layout.window import Window
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec

# --- splits -----------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn):
    ways, parts, unit = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = parts * unit * draw(st.integers(ways, 7))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = size
    return even_split(dim, "tensor", size, ways, parts, unit), torch.randn(shape)


@given(cuts())
def test_parts_joined_are_the_whole_and_each_keeps_whole_units_of_every_part(cut):
    split, full = cut
    locals = [split.take(full, c) for c in range(len(split.kept))]
    assert [t.shape[split.dim] for t in locals] == list(split.sizes)
    assert split.full == full.shape[split.dim]
    assert torch.equal(split.join(locals), full)
    assert torch.equal(torch.cat(locals, split.dim), split.grouped(full))
    assert torch.equal(split.ungrouped(split.grouped(full)), full)


@given(st.integers(1, 50), st.integers(1, 8))
def test_shares_are_as_even_as_whole_units_allow(units, ways):
    counts = shares(units, ways)
    assert sum(counts) == units
    assert max(counts) - min(counts) <= 1


def test_seven_heads_on_two_workers_are_four_and_three_with_their_queries_keys_and_values():
    split = even_split(0, "tensor", 3 * 7 * 2, 2, parts=3, unit=2)
    assert split.kept == (((0, 8), (14, 22), (28, 36)), ((8, 14), (22, 28), (36, 42)))
    assert even_split(1, "tensor", 10, 4).sizes == (3, 3, 2, 2)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(6, 30), st.integers(2, 3))
def test_the_rows_that_a_band_needs_are_those_that_its_outputs_are_made_of(kernel, stride, padding, height, ways):
    padding = min(padding, kernel - 1)
    outputs = (height + 2 * padding - kernel) // stride + 1
    if outputs < ways:
        return
    window = Window(
        kernel, stride, padding, even_split(2, "tensor", height, ways), even_split(2, "tensor", outputs, ways)
    )
    for rank in range(ways):
        (first, last), (low, high) = window.outputs.kept[rank][0], window.needed[rank]
        read = {o * stride - padding + k for o in range(first, last) for k in range(kernel)}
        assert {row for row in read if 0 <= row < height} <= set(range(low, high))
        above, below = window.padded(rank)
        assert (high - low) + above + below == (last - first - 1) * stride + kernel
        held = [
            window.inputs.kept[owner][0][0] + row for owner in range(ways) for row in range(*window.shared(owner, rank))
        ]
        assert held == list(range(low, high))


def test_dropout_of_a_part_is_a_part_of_the_dropout():
    from shoal.models.dropout import Part

    x = torch.randn(3, 7, 5)
    torch.manual_seed(1)
    whole = dropout(x, 0.4)
    torch.manual_seed(1)
    part = dropout(x[:, 4:], 0.4, Part(1, 7, 4))
    assert torch.equal(part, whole[:, 4:])


# --- what rules give --------------------------------------------------------------------------------------------


def _model(name: str) -> torch.nn.Module:
    return build(
        ModelSpec(kind=CASES[name].kind, task=CASES[name].task, options=CASES[name].options), CASES[name].facts
    )


def _layout(name: str, rules=None, ways: int = 2) -> Layout:
    model = _model(name)
    return layout_of(model, model.dimensions(), rules or {}, ways)


def _flow(layout: Layout, module: str) -> Flow:
    treatment = layout.modules[module]
    assert isinstance(treatment, Weighted)
    return treatment.flow


@pytest.mark.parametrize(("name", "attention"), [("gpt", "blocks.1.attention."), ("bert-masked", "blocks.1.")])
def test_the_usual_rules_give_megatrons_layout(name, attention):
    layout = _layout(name)
    column, row = Flow("out", "whole", "features"), Flow("in", "features", "whole")
    assert _flow(layout, f"{attention}qkv") == _flow(layout, "blocks.1.up") == column
    assert _flow(layout, f"{attention}out") == _flow(layout, "blocks.1.down") == row
    assert _flow(layout, "tokens") == Flow("in", "whole", "whole")  # the vocabulary is the embedding's input
    assert _flow(layout, "logits") == column


def test_with_one_worker_nothing_is_cut():
    assert _layout("gpt", {"width": "tensor", "heads": "", "ffn": "", "vocab": ""}, ways=1) == Layout(1, {}, {})


@pytest.mark.parametrize(
    ("name", "rules", "ways", "message"),
    [
        ("gpt", {"head": "tensor"}, 2, "unknown dimension 'head' in plan.rules.head: did you mean 'heads'?"),
        ("gpt", {"ffn": "tensr"}, 2, "unknown axis 'tensr' in plan.rules.ffn: did you mean 'tensor'?"),
        ("gpt", {"upp.ffn": "tensor"}, 2, "unknown module 'upp' in plan.rules.upp.ffn: did you mean 'up'?"),
        ("gpt", {"ffn": "data"}, 2, "'ffn' cannot be split over axis 'data': write 'tensor', or '' to keep it whole"),
        ("gpt", {"width": "tensor"}, 2, "split tokens.weight .* twice, by 'vocab' and 'width': write rules.width = ''"),
        ("gpt", {}, 8, "'qkv' has 7 heads, fewer than the 8 .* use tensor = 7 at most, or rules.heads = ''"),
        ("gpt", {"context": "tensor"}, 2, "'context' of positions cannot be split: every worker needs all of them"),
        ("gpt", {**SLICED, "heads": ""}, 2, "rules.sequence = 'tensor' needs rules.heads = 'tensor'"),
        ("gpt", {**SLICED, "up.ffn": "", "up.width": "tensor"}, 2, "up .* cannot be cut in this way while 'sequence'"),
        ("mlp", SLICED, 2, "a MLP has no modules that work on slices of the sequence: leave the rule out"),
        ("lstm", {"width": "tensor", "vocab": ""}, 2, "has dimension 'width', and a LSTMLayers is not split"),
        ("lstm", {"vocab": ""}, 2, "splits nothing of this LSTM: give its dimensions .* a rule such as"),
        ("cnn", {**ROWS, "channels": "tensor"}, 2, "both 'rows' and 'channels' .* write rules.channels = ''"),
        ("cnn", ROWS, 5, "has 3 rows, fewer than the 5 workers"),
        ("moe", {"routes": "tensor"}, 2, "router.weight has dimension 'routes', and a Router is not split by it"),
        ("moe", {"width": "tensor", "vocab": "", "heads": ""}, 2, "experts.* twice, by 'ffn' and 'width'"),
        ("mlp", ROWS, 2, "needs a model that tells the shape of its images"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused_with_the_repair(name, rules, ways, message):
    with pytest.raises(UserError, match=message) as refused:
        _layout(name, rules, ways)
    assert "\n" not in str(refused.value)


def test_a_module_without_names_for_its_dimensions_is_told_where_to_give_them():
    with pytest.raises(UserError, match=r"nothing of this Sequential, .* a method dimensions\(\)"):
        layout_of(torch.nn.Sequential(torch.nn.Linear(4, 4)), {}, {}, 2)


def test_heads_that_are_not_whole_are_refused():
    model = TINY["gpt"].build()
    model.blocks[0].attention.qkv = torch.nn.Linear(16, 50)
    with pytest.raises(UserError, match="dimension 'qkv' has 50 elements, which are no whole heads of 3 x 8"):
        layout_of(model, model.dimensions(), {}, 2)


class Custom(torch.nn.Sequential):
    def __init__(self, mask: torch.nn.Module) -> None:
        super().__init__(torch.nn.Linear(3, 8), torch.nn.ReLU(), mask, torch.nn.Linear(8, 2))


NAMES = {"0.weight": ("ffn", "features"), "0.bias": ("ffn",), "3.weight": ("classes", "ffn")}


def test_a_users_own_layers_are_split_by_the_names_that_they_are_given():
    layout = layout_of(Custom(Dropout(0.5, ("samples", "ffn"))), NAMES, {}, 2)
    assert set(layout.splits) == {"0.weight", "0.bias", "3.weight"}
    assert set(layout.modules) == {"0", "2", "3"}


def test_a_plan_names_the_dimensions_of_a_model_that_does_not():
    model = Custom(torch.nn.Identity())
    plan = Plan(mesh={"tensor": 2}, dimensions={"0.weight": NAMES["0.weight"], "0.*": ("ffn",), "3*": ("out", "ffn")})
    assert set(layout_for(model, plan).splits) == {"0.weight", "0.bias", "3.weight"}
    with pytest.raises(
        UserError, match=r"unknown parameter with 1 dims '4.bias' in plan.dimensions: did you mean '3.bias'"
    ):
        layout_for(model, Plan(mesh={"tensor": 2}, dimensions={"4.bias": ("ffn",)}))


def test_a_mask_that_would_depend_on_the_layout_is_refused():
    with pytest.raises(UserError, match=r"2 is a torch.nn.Dropout, whose mask would depend on the layout: use"):
        layout_of(Custom(torch.nn.Dropout(0.5)), NAMES, {}, 2)


def test_bands_of_rows_follow_strides():
    treatments = band_treatments(_model("resnet-rows"), 2)
    assert treatments["conv1"].inputs is None
    assert [treatments[name].height for name in ("conv1", "bn1", "maxpool", "layer2.0.conv1", "average")] == [
        65,
        33,
        33,
        17,
        3,
    ]
