"""The form of messages between stages: whatever goes in comes out, tensors as they lay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.stages.form import Head, pack, unpack
from shoal.errors import UserError

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), nested, max_size=4))
def test_plain_values_come_out_as_they_went_in(values):
    packed = pack(values)
    head = Head.decode(Head((1, 2, 3), packed.words, packed.views, (None,) * len(packed.views)).encode())
    found = unpack(head.words, [])
    assert found == values
    assert repr(found) == repr(values)  # types too: True is no 1, a tuple no list
    assert head.key == (1, 2, 3)


def lying(shape, dtype=torch.float32):
    whole = torch.arange(7 * 5 * 6).view(7, 5, 6).to(dtype)
    return {
        "dense": whole,
        "permuted": whole.permute(2, 0, 1),
        "with gaps": whole[:, 1:, ::2],
        "expanded": whole[:1, :, :1].expand(7, 5, 6),
        "a few of many": whole[::6, ::4, ::5],
        "one": whole[3, 2, 1],
        "none": whole[:0],
        "late": whole.view(-1)[3:9],
    }[shape]


SHAPES = ("dense", "permuted", "with gaps", "expanded", "one", "none", "late")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_tensor_keeps_values_strides_and_its_start_within_a_cache_line(shape, dtype):
    tensor = lying(shape, dtype)
    packed = pack({"x": (tensor, 3)})
    head = Head.decode(Head((0,), packed.words, packed.views, (None,)).encode())
    region = torch.empty(packed.regions[0].numel() + 16, dtype=dtype)[: packed.regions[0].numel()]
    region.copy_(packed.regions[0])
    found, three = unpack(head.words, [head.views[0].of(region)])["x"]
    assert three == 3
    assert torch.equal(found, tensor)
    assert found.stride() == tensor.stride()
    assert not tensor.numel() or found.data_ptr() % 64 == tensor.data_ptr() % 64


def test_a_few_elements_out_of_many_are_made_dense_rather_than_sent_with_all_between():
    tensor = lying("a few of many")
    (region,) = pack({"x": tensor}).regions
    assert region.numel() == tensor.numel()


def test_whether_a_tensor_wants_a_gradient_travels_with_it():
    wants = torch.ones(3, requires_grad=True) * 2
    packed = pack({"a": wants, "b": wants.detach()})
    a, b = (view.of(region) for view, region in zip(packed.views, packed.regions, strict=True))
    assert a.requires_grad
    assert a.is_leaf
    assert not b.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "value 'x' of a stage is a object: stages hand on tensors, numbers"),
        ([{"y": {1, 2}}], "value 'x' of a stage is a set"),
        (torch.nn.utils.rnn.pack_sequence([torch.ones(2)]), "is a PackedSequence"),
        (torch.ones(2, 2).to_sparse(), "sparse_coo tensor on cpu: make it dense first"),
    ],
)
def test_what_cannot_travel_is_refused_by_name(value, message):
    with pytest.raises(UserError, match=message):
        pack({"x": value})
