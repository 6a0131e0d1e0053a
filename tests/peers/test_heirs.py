"""The heirs of chapter 10 against timm's modules, and what the chapter says of timm's networks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv.heirs import ConvRelPosEnc, InceptionDWConv2d, PartialConv2d

from .common import assert_near, images, import_timm, randomize

timm = import_timm()
from timm.models import coat, fasternet, inception_next  # noqa: E402 - after the import that may skip


def take_over(ours: nn.Module, theirs: nn.Module) -> None:
    """Their weights into ours, by position, as chapter 10 says."""
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))


def assert_same_layer(
    ours: nn.Module, theirs: nn.Module, *arguments: Tensor | tuple[int, int]
) -> None:
    """Same output, same gradient of every input and every weight, in float64."""
    take_over(ours, theirs)
    results = []
    for layer in (ours.double(), theirs.double()):
        leaves = [a.double().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        y = layer(*leaves)
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        wanted = [*tensors, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, wanted, images(*y.shape, seed=3).double())])
    for one, other in zip(*results, strict=True):
        assert_near(one.detach(), other.detach(), 1e-12)


@pytest.mark.parametrize("head_channels", [1, 8])
def test_coat(head_channels):
    theirs = coat.ConvRelPosEnc(head_channels, 8, {3: 2, 5: 3, 7: 3})
    q, v = images(2, 2, 8, 1 + 5 * 9, head_channels)
    assert_same_layer(ConvRelPosEnc(head_channels), theirs, q, v, (5, 9))


def test_coat_with_other_windows():
    theirs = coat.ConvRelPosEnc(4, 6, {3: 1, 9: 5})
    q, v = images(2, 1, 6, 1 + 7 * 7, 4)
    assert_same_layer(ConvRelPosEnc(4, (1, 5), (3, 9)), theirs, q, v, (7, 7))


def test_coat_networks_use_the_default():
    with torch.device("meta"):
        model = timm.create_model("coat_lite_tiny")
    encodings: list[Any] = [m for m in model.modules() if isinstance(m, coat.ConvRelPosEnc)]
    assert len(encodings) > 0
    for theirs in encodings:
        ours = ConvRelPosEnc(theirs.channel_splits[0] // theirs.head_splits[0])
        assert list(ours.mix.partition) == theirs.channel_splits
        assert list(ours.mix.kernel_sizes) == [conv.kernel_size[0] for conv in theirs.conv_list]


@pytest.mark.parametrize(
    ("channels", "options"), [(8, {}), (20, {}), (40, {"band": 9, "ratio": 0.25})]
)
def test_inception_next(channels, options):
    names = {"band": "band_kernel_size", "ratio": "branch_ratio"}
    theirs = inception_next.InceptionDWConv2d(channels, **{names[k]: v for k, v in options.items()})
    assert_same_layer(InceptionDWConv2d(channels, **options), theirs, images(2, channels, 13, 12))


@pytest.mark.parametrize("divide", [4, 2])
def test_fasternet(divide):
    theirs = fasternet.Partial_conv3(12, divide, "split_cat")
    assert_same_layer(PartialConv2d(12, divide), theirs, images(2, 12, 6, 7))


def test_fasternet_as_it_runs_after_training():
    theirs, ours, x = (
        fasternet.Partial_conv3(12, 4, "slicing"),
        PartialConv2d(12),
        images(2, 12, 6, 7),
    )
    take_over(ours, theirs)
    with torch.no_grad():
        assert_near(ours(x), theirs(x), 1e-12)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("inception_next_atto", inception_next.InceptionDWConv2d, InceptionDWConv2d),
        ("fasternet_t0", fasternet.Partial_conv3, PartialConv2d),
    ],
)
def test_a_network_keeps_its_outputs_with_our_layers(name, theirs, ours):
    model = randomize(timm.create_model(name, num_classes=10))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected, replaced = model(x), 0
        for parent in list(model.modules()):
            for child, layer in list(parent.named_children()):
                if type(layer) is theirs:
                    parent.add_module(child, ours_for(layer, ours))
                    replaced += 1
        assert replaced > 5
        assert_near(model(x), expected)


def ours_for(theirs: Any, kind: type[nn.Module]) -> nn.Module:
    """Our layer of the same size as theirs, with its weights."""
    layer: nn.Module
    if kind is PartialConv2d:
        count = theirs.dim_conv3
        layer = PartialConv2d(count + theirs.dim_untouched, (count + theirs.dim_untouched) // count)
    else:
        channels, count = sum(theirs.split_indexes), theirs.split_indexes[-1]
        layer = InceptionDWConv2d(
            channels, band=theirs.dwconv_w.kernel_size[1], ratio=count / channels
        )
    take_over(layer, theirs)
    return layer


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mobilenetv4_conv_small", {3, 5}),
        ("mobilenetv4_conv_medium", {3, 5}),
        ("mobilenetv4_conv_large", {3, 5}),
        ("tf_efficientnetv2_s", {3}),
        ("convnext_tiny", {7}),
    ],
)
def test_one_size_a_layer(name, sizes):
    """What chapter 10 says of the networks that did not mix."""
    with torch.device("meta"):
        model = timm.create_model(name)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    depthwise = [m for m in convs if m.groups == m.in_channels > 1]
    assert {m.kernel_size for m in depthwise} == {(k, k) for k in sizes}
