"""The networks for images."""

import pytest
import torch

from shoal.errors import UserError
from shoal.models.cnn import CNN, CNNConfig
from shoal.models.convolution import Conv2d
from shoal.models.mlp import MLP, MLPConfig
from shoal.models.resnet import ResNet, ResNetConfig


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_the_imagenet_resnets_have_the_parameters_of_the_published_ones(depth, parameters):
    with torch.device("meta"):
        model = ResNet(ResNetConfig(style="imagenet", depth=depth, shape=(3, 224, 224), classes=1000))
    assert _count(model) == parameters


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],  # He et al., 2016, table 6
)
def test_the_cifar_resnets_have_the_parameters_of_the_published_ones(depth, millions):
    with torch.device("meta"):
        model = ResNet(ResNetConfig(depth=depth, shape=(3, 32, 32), classes=10))
    assert _count(model) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)


def test_resnet18_takes_an_imagenet_image_and_halves_it_five_times():
    with torch.device("meta"):
        model = ResNet(ResNetConfig(style="imagenet", depth=18, shape=(3, 224, 224), classes=1000))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        x = model.maxpool(model.conv1(torch.empty(2, 3, 224, 224)))
        for name in model.stages:
            x = model.get_submodule(name)(x)
        assert x.shape == (2, 512, 7, 7)


def test_the_names_of_a_resnet_are_the_ones_that_published_weights_carry():
    with torch.device("meta"):
        names = set(ResNet(ResNetConfig(style="imagenet", depth=50, shape=(3, 64, 64), classes=5)).state_dict())
    wanted = ("conv1.weight", "bn1.running_mean", "layer1.0.conv3.weight", "layer2.0.downsample.0.weight", "fc.bias")
    assert names.issuperset(wanted)


def test_a_shortcut_of_a_cifar_resnet_takes_every_second_pixel_and_adds_channels_of_zeros():
    model = ResNet(ResNetConfig(depth=8, width=4, shape=(3, 8, 8), classes=2))
    x = torch.randn(1, 4, 8, 8)
    y = model.get_submodule("layer2.0.downsample")(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize(
    ("style", "depth", "advice"), [("cifar", 18, "depths 6n"), ("imagenet", 20, r"\[18, 34, 50, 101, 152\]")]
)
def test_a_depth_that_the_style_lacks_is_refused_with_those_that_it_has(style, depth, advice):
    with pytest.raises(UserError, match=advice):
        ResNetConfig(style=style, depth=depth)


def test_the_cnn_counts_its_parameters_by_hand():
    model = CNN(CNNConfig(channels=(4, 6), kernel=3, hidden=8, shape=(3, 12, 8), classes=5))
    assert _count(model) == (3 * 9 + 1) * 4 + (4 * 9 + 1) * 6 + (6 * 3 * 2 + 1) * 8 + (8 + 1) * 5


def test_a_grey_channel_may_be_left_out_of_the_images():
    torch.manual_seed(0)
    model = CNN(CNNConfig(channels=(4,), shape=(8, 8), classes=3))
    images = torch.randn(2, 8, 8)
    assert torch.equal(model(images), model(images[:, None]))


def test_images_too_small_for_the_pooling_are_refused():
    with pytest.raises(UserError, match="images of 3 x 9 are too small for 2 halvings"):
        CNN(CNNConfig(shape=(1, 3, 9), classes=2))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_neither_the_convolution_nor_the_layout_of_its_gradients(channels):
    torch.manual_seed(0)
    ours = Conv2d(channels, 4, 3, stride=2, padding=1)
    plain = torch.nn.Conv2d(channels, 4, 3, stride=2, padding=1)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, channels, 8, 8)
    outputs = ours(images), plain(images)
    torch.testing.assert_close(*outputs)  # float32: another order of sums
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert ours.weight.is_contiguous()
    assert ours.weight.grad.is_contiguous()
    assert not outputs[0].is_contiguous()


def test_an_even_kernel_is_refused():
    with pytest.raises(UserError, match="must be odd"):
        CNNConfig(kernel=4)


def test_an_mlp_without_hidden_layers_is_a_linear_model():
    model = MLP(MLPConfig(hidden=(), features=7, classes=3))
    assert _count(model) == 8 * 3
    assert model.dimensions() == {"layers.0.weight": ("classes", "features"), "layers.0.bias": ("classes",)}
