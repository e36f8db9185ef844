"""Ring attention, held to attention over whole sequences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from shoal.comm.group import HostGroup
from shoal.errors import UserError
from shoal.models.registry import build, task_for
from shoal.models.tasks.language_model import BidirectionalLanguageModel
from shoal.parallel.context.model import split_sequence
from shoal.parallel.context.ring import COLUMNS, Ring
from shoal.parallel.context.slices import contiguous, places, zigzag
from shoal.parallel.context.task import SplitTask
from shoal.recipe.recipe import ModelSpec

NEAR = {"rtol": 1e-10, "atol": 1e-10}  # float64: only the order of sums differs


@given(st.integers(0, 60), st.integers(1, 6), st.sampled_from([contiguous, zigzag]))
def test_every_place_is_held_once_and_a_cut_sequence_is_joined_again(length, ranks, cut):
    slices = cut(length, ranks)
    held = [places(slices, rank) for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert max(map(len, held)) - min(map(len, held)) <= (1 if cut is contiguous else 2)
    whole = torch.arange(length)[None, :, None]
    parts = [slices.take(whole, rank) for rank in range(ranks)]
    assert all(part.flatten().tolist() == place.tolist() for part, place in zip(parts, held, strict=True))
    assert torch.equal(slices.join(parts), whole)


@given(st.integers(8, 400), st.integers(2, 8))
def test_zigzag_shares_out_a_causal_mask_evenly(length, ranks):
    def work(slices: Any) -> list[int]:
        return [int((places(slices, rank) + 1).sum()) for rank in range(ranks)]

    even = work(zigzag(length, ranks))
    assert max(even) - min(even) <= 2 * length  # of length x length / (2 x ranks): a row or two
    uneven = work(contiguous(length - length % ranks, ranks))
    assert max(uneven) - min(uneven) == (length - length % ranks) ** 2 // ranks**2 * (ranks - 1)


def _parts(length: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 2, 3, length, 8, dtype=dtype, generator=torch.Generator().manual_seed(length))


def _full(length: int, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, toward = (part.requires_grad_() for part in _parts(length, dtype).unbind())
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), toward)]


def _in_a_ring(group: HostGroup, length: int, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    ring = Ring.of(group, causal)
    ring.cut(length)
    q, k, v, toward = (ring.own(part.unsqueeze(0), 3)[0].requires_grad_() for part in _parts(length, dtype))
    out = ring.attention(q, k, v, mask, causal)
    ring.cut(1)  # the backward pass goes by the cut of its forward pass
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), toward)]


MASK = (torch.arange(13) < torch.tensor([[13], [4]]))[:, None, None, :]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("length", "mask", "causal"), [(13, None, True), (13, None, False), (13, MASK, False), (COLUMNS * 3, None, True)]
)
def test_ring_attention_has_the_results_and_gradients_of_attention(on_workers, world, length, mask, causal):
    parts = on_workers(world, _in_a_ring, length, mask, causal, torch.float64)
    slices = (zigzag if causal else contiguous)(length, world)
    for index, whole in enumerate(_full(length, mask, causal, torch.float64)):
        joined = slices.along(2).join([part[index] for part in parts])
        torch.testing.assert_close(joined, whole, **NEAR)


def test_in_bfloat16_a_ring_is_as_close_to_float64_as_one_worker_is(on_workers):
    exact = _full(13, None, True, torch.float64)
    parts = on_workers(2, _in_a_ring, 13, None, True, torch.bfloat16)
    for index, whole in enumerate(_full(13, None, True, torch.bfloat16)):
        joined = zigzag(13, 2).along(2).join([part[index] for part in parts])
        assert joined.dtype == torch.bfloat16
        ours, theirs = ((t.double() - exact[index]).norm() for t in (joined, whole))
        assert ours < max(1.5 * theirs, 0.01 * exact[index].norm())


def test_a_row_that_sees_nothing_is_zero_with_a_gradient_of_zero(on_workers):
    mask = torch.zeros(2, 1, 1, 13, dtype=torch.bool)
    for out, *gradients in on_workers(2, _in_a_ring, 13, mask, False, torch.float64):
        assert not any(t.any() for t in (out, *gradients))


def _memory(group: HostGroup, length: int) -> int:
    """Elements that the forward pass keeps for the backward pass."""
    ring = Ring.of(group, True)
    ring.cut(length)
    q, k, v, _ = (ring.own(part.unsqueeze(0), 3)[0].requires_grad_() for part in _parts(length, torch.float32))
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ring.attention(q, k, v, causal=True)
    return sum(kept)


def test_what_a_worker_keeps_shrinks_with_the_workers_and_grows_with_the_length_alone(on_workers):
    alone, half, longer = (on_workers(world, _memory, n)[0] for world, n in ((1, 512), (2, 512), (2, 1024)))
    assert half * 2 == alone
    assert longer == 2 * half


def _bytes(group: HostGroup, length: int) -> list[float]:
    """What a forward pass sends, and what it and the backward pass do."""
    ring = Ring.of(group, True)
    ring.cut(length)
    q, k, v, _ = (ring.own(part.unsqueeze(0), 3)[0].requires_grad_() for part in _parts(length, torch.float32))

    def sent() -> float:
        return sum(total.sent_bytes for place, total in group.counters.totals().items() if place[0] == "stage send")

    out = ring.attention(q, k, v, causal=True)
    forward = sent()
    out.sum().backward()
    return [forward, sent()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_keys_and_values_go_round_once_forward_and_once_backward_with_their_gradients(on_workers, world):
    block = 2 * 2 * 3 * (64 // world) * 8 * 4  # keys and values of a slice
    for forward, both in on_workers(world, _bytes, 64):
        for sent, blocks in ((forward, world - 1), (both, 3 * world - 2 if world > 1 else 0)):
            assert blocks * block <= sent <= blocks * (block + 512)  # each message says what is in it


SIZES = {"layers": 2, "heads": 2, "width": 16}
FACTS = {"vocab": 17, "context": 12, "classes": 3}
TOKENS = torch.randint(17, (3, 13), generator=torch.Generator().manual_seed(1))
FRAMED = {
    "tokens": TOKENS[:, :12],
    "mask": torch.arange(12) < torch.tensor([[12], [7], [3]]),
    "types": (torch.arange(12) > 4).long().expand(3, -1),
}
WHOLE: dict[str, tuple[ModelSpec, dict[str, Tensor]]] = {
    "gpt": (ModelSpec(kind="gpt", options={**SIZES, "dropout": 0.3}), {"tokens": TOKENS}),
    "moe": (ModelSpec(kind="moe", options={**SIZES, "experts": 4, "balance": 0.5, "dropout": 0.3}), {"tokens": TOKENS}),
    "masked": (ModelSpec(kind="bert", task="masked-language-model", options={**SIZES, "dropout": 0.3}), FRAMED),
    "classes": (
        ModelSpec(kind="bert", task="classification", options={**SIZES, "dropout": 0.3}),
        {**FRAMED, "target": torch.tensor([0, 2, 1])},
    ),
    "answers": (
        ModelSpec(kind="bert", task="question-answering", options={**SIZES, "dropout": 0.3}),
        {**FRAMED, "start": torch.tensor([1, 2, 0]), "end": torch.tensor([3, 2, 0])},
    ),
}


def _pass(model: torch.nn.Module, task: Any, batch: dict[str, Tensor]) -> tuple[Any, ...]:
    torch.manual_seed(5)
    loss, count = task.loss(model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    return loss.item(), count, gradients, task.measure(model, batch)


def _model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(WHOLE[name][0], FACTS).double()
    for parameter in model.parameters():  # all start far from zero, so that no mistake hides
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _split_pass(group: HostGroup, name: str) -> tuple[Any, ...]:
    spec, batch = WHOLE[name]
    model = _model(name)
    names = [n for n, _ in model.named_parameters()]
    ring = Ring.of(group, spec.kind != "bert")
    split_sequence(model, ring)
    assert [n for n, _ in model.named_parameters()] == names
    return _pass(model, SplitTask(task_for(spec, FACTS), ring), batch)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_model_on_slices_has_the_loss_gradients_and_measures_of_one_process(on_workers, name, world):
    spec, batch = WHOLE[name]
    loss, count, gradients, sums = _pass(_model(name), task_for(spec, FACTS), batch)
    parts = on_workers(world, _split_pass, name)
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-10)
    assert sum(part[1] for part in parts) == count
    for key, whole in sums.items():
        assert sum(part[3][key] for part in parts) == pytest.approx(whole, rel=1e-10)
    for key, whole in gradients.items():
        added = sum(part[2][key] for part in parts if part[2][key] is not None)
        torch.testing.assert_close(added, whole, **NEAR, msg=lambda said, key=key: f"{key}: {said}")


class Alone:
    rank, world, counters = 0, 1, None


def _alone() -> Ring:
    return Ring.of(Alone(), True)


def test_what_cannot_be_split_is_refused_with_the_repair():
    with pytest.raises(UserError, match=r"a LSTM cannot split its sequences over mesh axis 'context'"):
        split_sequence(build(ModelSpec(kind="lstm", options={"width": 8}), FACTS), _alone())
    with pytest.raises(UserError, match=r"attention_dropout = 0.1: set it to 0"):
        split_sequence(build(ModelSpec(kind="gpt", options={**SIZES, "attention_dropout": 0.1}), FACTS), _alone())
    with pytest.raises(UserError, match="task 'bidirectional-language-model' cannot split"):
        SplitTask(BidirectionalLanguageModel(), _alone())
    model = build(ModelSpec(kind="gpt", options=SIZES), FACTS)
    split_sequence(model, _alone())
    with pytest.raises(UserError, match="13 tokens do not fit the model's context of 12"):
        model(TOKENS)
