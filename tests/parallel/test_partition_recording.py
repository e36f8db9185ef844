"""What a recording of a forward pass rests on is checked, and what it cannot hold is kept whole or refused."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parallel.cut_passes import in_chunks, whole
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.parallel.partition.cut import cut
from shoal.parallel.partition.measure import pieces
from shoal.parallel.partition.recording import record


class Two(nn.Module):
    """Something between two layers."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Longer(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if len(x) > 4:
            y = y * 2
        return self.second(y)


class LongerInside(nn.Module):
    """Branches on sizes and on the mode, in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4 or not self.training:
            return self.inner(x) * 2
        return x


class Counted(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for _ in range(x.shape[1] // 2):
            y = y + 1
        return self.second(y)


class MaybeMasked(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, mode: str = "plain") -> Tensor:
        y = self.first(x)
        if mask is not None:
            y = y * mask[:, None]
        return self.second(y if mode == "plain" else y.relu())


class ByMode(Two):
    """Does something else in evaluation, in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            y = F.dropout(y, 0.5)
        return self.second(y)


class Remembers(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x)
        return self.second(self.last)


class Numpy(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.seen = y.detach().numpy().sum()
        return self.second(y)


class Unseen(Two):
    """Draws from Python's own generator, which a recording takes for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * random.random())


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def refused(model: nn.Module, example: Any = (X,), count: int = 2) -> str:
    with pytest.raises(UserError) as error:
        cut(model, count, example=example)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_branch_that_would_go_the_other_way_is_an_error_and_not_another_result() -> None:
    model = Longer()
    chunks = cut(model, 2, example=(X,))
    assert not whole(model, {"x": X[:5]}).differs(in_chunks(model, chunks, {"x": X[:5]}))
    with pytest.raises(UserError, match=r"Longer.forward \(test_partition_recording.py:\d+\) gives True.* gives False"):
        in_chunks(model, chunks, {"x": X[:4]})


def test_a_part_that_branches_is_kept_whole_and_goes_either_way() -> None:
    model = Two(LongerInside())
    assert record(model, (X,)).whole == {"LongerInside": "it branches on the sizes of its input"}
    chunks = cut(model, 3, example=(X,))
    for mode in (True, False):
        for module in (model, *(chunk.module for chunk in chunks.chunks)):
            module.train(mode)
        for n in (6, 3):
            assert not whole(model, {"x": X[:n]}).differs(in_chunks(model, chunks, {"x": X[:n]}))


def test_a_loop_over_a_size_holds_for_that_size() -> None:
    model = Counted()
    chunks = cut(model, 2, example=(X,))
    assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))
    chunks.chunks[0].module.first = nn.Linear(6, 4)
    with pytest.raises(UserError, match="gives 2, and this one gives 3"):
        chunks.chunks[0].module({"x": torch.randn(6, 6)})


def test_arguments_that_were_none_or_words_must_stay_so() -> None:
    model = MaybeMasked()
    chunks = cut(model, 2, example=(X,)).chunks
    assert chunks[0].batch_inputs == ("mask", "mode", "x")
    with pytest.raises(UserError, match="the argument 'mask' gives None, and this one gives another value"):
        chunks[0].module({"x": X, "mask": torch.ones(6), "mode": "plain"})
    with pytest.raises(UserError, match="the argument 'mode' gives plain, and this one gives relu"):
        chunks[0].module({"x": X, "mask": None, "mode": "relu"})
    masked = cut(model, 2, example={"x": X, "mask": torch.ones(6)})
    arguments = {"x": X[:3], "mask": torch.tensor([1.0, 0.0, 1.0])}
    assert not whole(model, arguments).differs(in_chunks(model, masked, arguments))


def test_a_model_that_torch_export_can_follow_is_cut_for_its_present_mode() -> None:
    model = ByMode()
    chunks = cut(model, 2, example=(X,))
    for n in (6, 5):
        assert not whole(model, {"x": X[:n]}).differs(in_chunks(model, chunks, {"x": X[:n]}))
    assert [chunk.parameters for chunk in chunks.chunks] == [
        ("first.weight", "first.bias"),
        ("second.weight", "second.bias"),
    ]
    assert chunks.chunks[0].module.get_parameter("first.weight") is model.first.weight
    with pytest.raises(UserError, match=r"cannot change to evaluation: it was cut through torch.export, for training"):
        chunks.chunks[1].module.eval()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Numpy(), "it sets its attribute 'seen'"),
        (Unseen(), "do not give its output for the example"),
    ],
)
def test_what_no_recording_can_hold_is_refused_in_one_line(model: nn.Module, why: str) -> None:
    said = refused(model)
    assert why in said
    assert "submodule" in said


def test_the_same_inside_a_part_is_no_problem() -> None:
    for inside, name in ((Numpy(), "seen"), (Remembers(), "last")):
        model = Two(inside)
        chunks = cut(model, 2, example=(X,))
        assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))
        assert not isinstance(getattr(inside, name), torch.fx.Proxy), "what it remembers is real"


def test_an_example_that_does_not_fit_is_refused_with_the_place() -> None:
    assert "these are not arguments of Two.forward" in refused(Two(), (X, X))
    said = refused(Two(), (X[:, :3],))
    assert "a Two does not run on the example (test_partition_recording.py" in said
    assert "mat1 and mat2 shapes cannot be multiplied" in said


def test_a_model_s_own_error_passes_through() -> None:
    class Strict(Two):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 5:
                raise UserError("at most 5 samples.")
            return super().forward(x)

    with pytest.raises(UserError, match=r"^at most 5 samples\.$"):
        cut(Strict(), 2, example=(X,))


def test_a_failed_recording_leaves_nothing_patched() -> None:
    call, zeros, apply = nn.Module.__call__, torch.zeros, torch.autograd.Function.apply
    model = Unseen(Numpy())
    refused(model)
    refused(Numpy())
    assert nn.Module.__call__ is call
    assert torch.zeros is zeros
    assert torch.autograd.Function.apply == apply
    assert all("training" in vars(module) for module in model.modules())


class Aliased(Two):
    """Writes into a tensor that has a second name, which is used at the end."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 1.0
        other = y.view(6, 4)
        z = self.second(y * 1.0)
        other.mul_(2)
        return z + y + other


class InPlaceOn(Two):
    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x) * 2))


class SharedNorm(Two):
    """One BatchNorm used twice: its statistics cannot be at two places."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4))
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.between(self.second(self.between(self.first(x)))))


def test_a_layer_that_writes_into_what_arrived_gets_a_copy() -> None:
    model = InPlaceOn()
    chunks = cut(model, 2, example=(X,), cuts=("between",))
    assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))


def test_no_cut_separates_a_change_from_another_name_of_what_is_changed() -> None:
    with pytest.raises(UserError, match="is changed in place after it, and has another name"):
        cut(Aliased(), 2, example=(X,), cuts=("second",))
    model = Aliased()
    assert len(pieces(model, (X,), clock=False)) == 2, "it can be before the second name is given"
    assert not whole(model, {"x": X}).differs(in_chunks(model, cut(model, 2, example=(X,)), {"x": X}))


def test_no_cut_lies_between_two_uses_of_a_layer_with_running_statistics() -> None:
    model = SharedNorm()
    with pytest.raises(UserError, match=r"the buffer between.running_mean is changed before it and used after it"):
        cut(model, 2, example=(X,), cuts=("second",))
    chunks = cut(model, 3, example=(X,))
    assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))


def test_no_cut_crosses_a_part_of_a_tensor() -> None:
    """Its copy would be aligned otherwise, and a matrix product may then round otherwise."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join, self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.join(x).chunk(2, -1)
            return self.left(a) + self.right(b)

    with pytest.raises(UserError, match="is a part of another tensor"):
        cut(Halves(), 2, example=(X,), cuts=("right",))
    chunks = cut(Halves(), 2, example=(X,)).chunks
    assert chunks[0].outputs == ("join",), "the whole of it goes over, and is taken apart there"


class Masked(nn.Module):
    """Layers behind a branch on values, which differ from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x if (x > -9).all() else x * 2
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_part_that_branches_on_values_is_kept_whole_and_named_when_pieces_are_too_few() -> None:
    model = Two(Masked())
    chunks = cut(model, 3, example=(X,))
    for x in (X, X - 20):
        assert not whole(model, {"x": x}).differs(in_chunks(model, chunks, {"x": x}))
    said = refused(model, count=4)
    assert "a Two has 3 pieces, too few for 4 chunks: take at most 3" in said
    assert "Kept whole are parts (Masked: it branches on the values of its input)" in said


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class Answers(Two):
    def forward(self, x: Tensor) -> Answer:
        y = self.first(x)
        return Answer(self.second(y), (y,))


def test_a_dataclass_that_a_model_returns_is_made_by_the_last_chunk() -> None:
    model = Answers()
    chunks = cut(model, 2, example=(X,))

    def loss(answer: Answer) -> Tensor:
        assert isinstance(answer, Answer)
        return answer.logits.sum() + answer.hidden[0].square().sum()

    assert not whole(model, {"x": X}, loss).differs(in_chunks(model, chunks, {"x": X}, loss))


def test_hooks_of_layers_run_in_chunks_too() -> None:
    model = Two(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    model.between.register_forward_hook(lambda module, args, output: output * 3)
    model.first.register_forward_hook(lambda module, args, output: output + 1)
    chunks = cut(model, 3, example=(X,))
    assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))


def test_reparametrised_layers_are_cut_as_layers() -> None:
    model = Two()
    torch.nn.utils.parametrizations.weight_norm(model.second)
    chunks = cut(model, 2, example=(X,))
    assert not whole(model, {"x": X}).differs(in_chunks(model, chunks, {"x": X}))
    assert any("original" in name for name in chunks.chunks[1].parameters)


def test_a_traced_or_exported_model_can_be_cut_as_well() -> None:
    model = Two(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    expected = whole(model, {"x": X})
    traced = torch.fx.symbolic_trace(model)
    program = torch.export.export(model, (X,)).module()
    for made in (traced, program):
        chunks = cut(made, 3, example=(X,))
        assert torch.equal(in_chunks(made, chunks, {"x": X}).loss, expected.loss)


def test_models_of_transformers_are_cut_with_and_without_padding() -> None:
    """Code that nobody wrote with a recording in mind."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **sizes)
    )
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False, **sizes))
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
    whole_mask = torch.ones_like(tokens)
    padded = torch.where(torch.arange(12) < 9, whole_mask, 0)
    for model in (bert.train(), gpt.train()):
        chunks = cut(model, 4, example={"input_ids": tokens, "attention_mask": whole_mask})
        for mask in (whole_mask, padded):
            arguments = {"input_ids": tokens[:2], "attention_mask": mask[:2]}
            expected = whole(model, arguments, lambda answer: answer.logits.square().sum())
            assert not expected.differs(in_chunks(model, chunks, arguments, lambda a: a.logits.square().sum()))
