"""What holds for every kind of model."""

import pytest
import torch
from tiny_models import SAMPLES, TINY, Tiny

from shoal.models.registry import KINDS

every_kind = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


def test_every_kind_but_custom_is_among_the_examples():
    assert {tiny.spec.kind for tiny in TINY.values()} | {"custom"} == set(KINDS)


@every_kind
def test_every_parameter_has_one_distinct_name_for_each_of_its_dims(tiny: Tiny):
    model = tiny.build()
    named = model.dimensions()
    assert set(named) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert len(named[name]) == len(set(named[name])) == parameter.dim(), name


@every_kind
def test_a_named_dim_has_one_size_in_the_whole_model(tiny: Tiny):
    model = tiny.build()
    sizes: dict[str, set[int]] = {}
    for name, dims in model.dimensions().items():
        for dim, size in zip(dims, model.get_parameter(name).shape, strict=True):
            sizes.setdefault(dim, set()).add(size)
    convolves = any(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    vary = {"channels", "width", "narrower", "reduced", "kernel_height", "kernel_width"} if convolves else set()
    assert {dim: found for dim, found in sizes.items() if len(found) > 1 and dim not in vary} == {}


@every_kind
def test_the_loss_is_a_finite_sum_over_a_positive_count_and_reaches_every_parameter(tiny: Tiny):
    model = tiny.build()
    torch.manual_seed(0)
    total, count = tiny.task.loss(model, tiny.batch)
    assert total.shape == ()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert count > 0
    total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@every_kind
def test_the_same_seed_gives_the_same_weights_and_another_seed_gives_others(tiny: Tiny):
    first, again, other = (tiny.build(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@every_kind
def test_two_passes_from_the_same_seed_give_the_same_bits(tiny: Tiny):
    def pass_once() -> list[torch.Tensor]:
        model = tiny.build()
        torch.manual_seed(7)
        total, _ = tiny.task.loss(model, tiny.batch)
        total.backward()
        return [total.detach(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(pass_once(), pass_once(), strict=True))


@every_kind
def test_the_loss_is_float32_under_bfloat16_autocast_and_close_to_the_one_without(tiny: Tiny):
    model = tiny.build().eval()  # BatchNorm over three samples of one pixel would magnify the rounding
    torch.manual_seed(7)
    full, count = tiny.task.loss(model, tiny.batch)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        half, count_again = tiny.task.loss(model, tiny.batch)
    assert half.dtype == torch.float32
    assert count == count_again
    assert half.item() == pytest.approx(full.item(), rel=0.05)  # bfloat16 keeps 8 bits of the mantissa


@every_kind
def test_measuring_has_no_gradient_is_repeatable_and_adds_up_over_batches(tiny: Tiny):
    model = tiny.build().eval()
    whole = tiny.task.measure(model, tiny.batch)
    assert tiny.task.measure(model, tiny.batch) == whole
    sums = dict.fromkeys(whole, 0.0)
    for row in range(SAMPLES):
        part = tiny.task.measure(model, {name: tensor[row : row + 1] for name, tensor in tiny.batch.items()})
        sums = {name: sums[name] + part[name] for name in sums}
    assert sums == pytest.approx(whole, rel=1e-4)  # float32: only the order of the sums differs
    figures = tiny.task.summarise(whole)
    assert tiny.task.best[0] in figures
    assert figures["loss"] == pytest.approx(whole["loss"] / whole["count"])


@every_kind
def test_state_dicts_share_no_memory_so_that_they_can_be_written_to_safetensors(tiny: Tiny):
    state = tiny.build().state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
