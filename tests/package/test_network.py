import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mixconv import mixnet_s, mobilenet_v1, mobilenet_v2
from mixconv.network import ConvNet, drop_path_rates, initialize, refuse_timm_names, round_channels

from .common import noise

MAKERS: dict[str, Callable[..., ConvNet]] = {"v1": mobilenet_v1, "v2": mobilenet_v2}


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("width", [0.35, 0.5, 1.4])
def test_api(version, width):
    model = MAKERS[version]((3, 5), width_multiplier=width, num_classes=7, in_channels=1).eval()
    x = noise(2, 1, 33, 47)
    with torch.no_grad():
        features = model.forward_features(x)
        assert model(x).shape == (2, 7)
        assert features.shape == (2, model.num_features, 2, 2)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        torch.testing.assert_close(model(x), model.classifier(pooled))
        outputs = model.features(x)
    assert [f.shape[1] for f in outputs] == [info["num_chs"] for info in model.feature_info]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    for output, info in zip(outputs, model.feature_info, strict=True):
        step = int(info["reduction"])
        assert output.shape[2:] == (-(-33 // step), -(-47 // step))
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(str(info["module"])).register_forward_hook(
            lambda _module, _args, result, seen=seen: seen.append(result)
        )
        model(x)
        hook.remove()
        torch.testing.assert_close(seen[0], output)


def test_classifier_comes_and_goes():
    model = mobilenet_v2(width_multiplier=0.35, num_classes=0).eval()
    x = noise(1, 3, 32, 32)
    assert model(x).shape == (1, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.double().reset_classifier(4)
    assert model.num_classes == 4
    assert model.get_classifier() is model.classifier
    assert model(x.double()).shape == (1, 4)
    with pytest.raises(ValueError, match=r"num_classes.*-1"):
        model.reset_classifier(-1)
    assert model.num_classes == 4


@pytest.mark.parametrize("version", MAKERS)
def test_drop_rate_acts_in_training_only(version):
    model = MAKERS[version](width_multiplier=0.35, drop_rate=0.5)
    pixels = torch.ones(64, model.num_features, 1, 1)
    dropped = model.forward_head(pixels, pre_logits=True)
    assert abs(float((dropped == 0).float().mean()) - 0.5) < 0.05
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert bool((model.eval().forward_head(pixels, pre_logits=True) == 1).all())
    assert mobilenet_v2(width_multiplier=0.35).drop_rate == 0.2
    assert mobilenet_v1(width_multiplier=0.35).drop_rate == 0


@pytest.mark.parametrize(
    ("channels", "multiplier", "expected"),
    [
        (32, 1, 32), (20, 1, 20), (32, 0.35, 16), (16, 0.35, 8), (24, 0.35, 8), (40, 1.3, 56),
        (24, 1.3, 32), (16, 0.1, 8), (96, 1.3, 128), (200, 1.3, 264), (40, 0.5, 24), (24, 0.75, 24),
    ],
)  # fmt: skip
def test_round_channels(channels, multiplier, expected):
    assert round_channels(channels, multiplier) == expected


def test_round_channels_never_loses_more_than_a_tenth():
    for channels in range(8, 400, 8):
        for percent in range(30, 300, 7):
            rounded = round_channels(channels, percent / 100)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * channels * percent / 100
    with pytest.raises(ValueError, match=r"^multiplier.*-1"):
        round_channels(8, -1)


def test_initial_distributions():
    model: Any = nn.Sequential(
        nn.Conv2d(64, 128, 3), nn.Conv2d(512, 512, 5, groups=512), nn.Conv2d(256, 128, 1, groups=2),
        nn.Linear(300, 400),
    )  # fmt: skip
    torch.manual_seed(0)
    initialize(model)
    wanted = [2 / (9 * 128), 2 / 25, 2 / 64]
    for layer, variance in zip(model[:3], wanted, strict=True):
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight.detach()
        assert abs(float(weight.var()) / variance - 1) < 0.06
        assert abs(float(weight.mean())) < 0.05 * variance**0.5
        assert float(weight.abs().max()) > 3 * variance**0.5  # not truncated
        assert layer.bias is not None
        assert not layer.bias.any()
    weight = model[3].weight.detach()
    assert 0.99 / 20 < float(weight.abs().max()) <= 1 / 20
    assert abs(float(weight.var()) * 3 * 400 - 1) < 0.03
    assert not model[3].bias.any()


def test_the_ramp_of_stochastic_depth():
    assert drop_path_rates(0.4, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.0, 2) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"drop_path_rate.*1\.0"):
        drop_path_rates(1.0, 4)


@pytest.mark.parametrize("version", MAKERS)
def test_the_name_that_timm_has_for_channels_is_explained(version):
    with pytest.raises(TypeError, match="in_channels=1"):
        MAKERS[version](in_chans=1)
    names = list(inspect.signature(MAKERS[version]).parameters)
    assert names[:3] == ["kernel_sizes", "num_classes", "in_channels"]  # what Shift-Tab shows
    assert "in_channels: channels" in (MAKERS[version].__doc__ or "")
    assert refuse_timm_names(dict)(in_channels=1) == {"in_channels": 1}


def test_initialising_leaves_other_layers_alone():
    others = nn.BatchNorm2d(4), nn.PReLU()
    for module in others:
        nn.init.constant_(module.weight, 7.0)
    initialize(nn.Sequential(nn.Conv2d(2, 4, 1), *others))
    assert all((module.weight == 7).all() for module in others)


@pytest.mark.parametrize("version", MAKERS)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(version):
    torch.manual_seed(0)
    model = MAKERS[version]((3, 5), width_multiplier=0.35, num_classes=3, drop_rate=0.0).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # running means are updated twice where a block runs twice, as in timm
    grads, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(noise(2, 3, 64, 64)).square().sum()
        kept.append(sum(sizes))
        grads.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert kept[1] < kept[0] / 2
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("version", MAKERS)
def test_intermediates_as_timm_gives_them(version):
    model, x = MAKERS[version]((3,), width_multiplier=0.35).eval(), noise(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
        features = model.features(x)
        for got, wanted in ((maps, features), (model.forward_intermediates(x, 2)[1], features[-2:]),
                            (model.forward_intermediates(x, [0, 3], intermediates_only=True),
                             [features[0], features[3]])):  # fmt: skip
            assert len(got) == len(wanted)
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"pretrained": True}, "weights='timm/tf_mixnet_s.in1k'"),
        ({"features_only": True}, r"model\.features"),
        ({"global_pool": ""}, "forward_features"),
        ({"drop_block_rate": 0.1}, "drop_path_rate"),
    ],
)
@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, mixnet_s])
def test_timms_arguments_are_told_what_stands_for_them(build, options, hint):
    with pytest.raises(TypeError, match=hint):
        build(**options)
