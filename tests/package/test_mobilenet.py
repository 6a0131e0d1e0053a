import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixconv import MixConv2d, count_costs, mobilenet_v1, mobilenet_v2, replace_depthwise
from mixconv.blocks import DropPath
from mixconv.layer import Conv2dSame
from mixconv.mobilenet import initialize, round_channels

from .common import PAPER, noise, randomize, same_state, snapshot

MAKERS = {"v1": mobilenet_v1, "v2": mobilenet_v2}
EXPONENTIAL = ["3 5", "3 5 7", "3 5 7 9", "3 5 7 9 11", "3 5 7 9 11 13"]


def sizes_of(text: str) -> tuple[int, ...]:
    return tuple(int(k) for k in text.split())


def meta(version: str, text: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return MAKERS[version](sizes_of(text), **options)


def millions(version: str, text: str, **options: Any) -> float:
    image = torch.empty(1, 3, 224, 224, device="meta")
    costs = count_costs(meta(version, text, **options), image)
    return sum(cost.multiply_adds for cost in costs) / 1e6


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("version", "count"), [("v1", 4_231_976), ("v2", 3_504_872)])
def test_published_parameter_counts(version, count):
    assert parameters(meta(version, "3")) == count


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 2)])
@pytest.mark.parametrize("family", ["depthwise", "mixconv"])
def test_figure_4_growth(version, column, family):
    points = PAPER["figure_4"][family]
    base = PAPER["figure_4"]["depthwise"]["3"][column]
    plain = millions(version, "3")
    for text, point in points.items():
        growth = millions(version, text) - plain
        assert abs(growth - (point[column] - base)) < 1.5, text


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 2)])
def test_figure_6_growth(version, column):
    base = PAPER["figure_4"]["depthwise"]["3"][column]
    plain = millions(version, "3")
    for text, point in zip(EXPONENTIAL, PAPER["figure_6"]["exponential"][version], strict=True):
        growth = millions(version, text, partition="exponential") - plain
        assert abs(growth - (point - base)) < 1.5, text


@pytest.mark.parametrize(("version", "column"), [("v1", 0), ("v2", 3)])
def test_table_1_parameters(version, column):
    table, plain = PAPER["table_1"], parameters(meta(version, "3"))
    for text in ("5", "3 5", "7", "3 5 7"):
        growth = (parameters(meta(version, text)) - plain) / 1e6
        assert abs(growth - (table[text][column] - table["3"][column])) <= 0.01 + 1e-9, text


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize("kernels", [(3,), (3, 5, 7)])
def test_hooks_and_torch_count_alike(version, kernels):
    model = MAKERS[version](kernels, width_multiplier=0.5, num_classes=10).eval()
    x = noise(1, 3, 64, 64)
    counted = sum(cost.multiply_adds for cost in count_costs(model, x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == 2 * counted


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
    model.double().reset_classifier(4)
    assert model.num_classes == 4
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


@pytest.mark.parametrize("rate", [-0.1, 1.0])
@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
def test_bad_drop_rates(name, rate):
    with pytest.raises(ValueError, match=f"{name}.*{rate}"):
        mobilenet_v2(width_multiplier=0.35, **{name: rate})


@pytest.mark.parametrize(
    ("channels", "multiplier", "expected"),
    [
        (32, 1, 32), (20, 1, 20), (32, 0.35, 16), (16, 0.35, 8), (24, 0.35, 8), (40, 1.3, 56),
        (24, 1.3, 32), (16, 0.1, 8), (96, 1.3, 128), (200, 1.3, 264), (40, 0.5, 24), (24, 0.75, 24),
    ],
)  # fmt: skip
def test_round_channels(channels, multiplier, expected):
    assert round_channels(channels, multiplier) == expected


@pytest.mark.parametrize(("width", "features"), [(0.35, 1280), (1.0, 1280), (1.4, 1792)])
def test_the_head_of_v2_grows_but_does_not_shrink(width, features):
    with torch.device("meta"):
        assert mobilenet_v2(width_multiplier=width).num_features == features


def test_what_the_networks_are_made_of():
    with torch.device("meta"):
        v1, v2 = mobilenet_v1(), mobilenet_v2(drop_path_rate=0.34)
    for model, wanted, count in ((v1, nn.ReLU, 27), (v2, nn.ReLU6, 35)):
        kinds = [type(m) for m in model.modules() if "ReLU" in type(m).__name__]
        assert kinds == [wanted] * count
    rates = [m.rate for m in v2.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(17)])


def test_round_channels_never_loses_more_than_a_tenth():
    for channels in range(8, 400, 8):
        for percent in range(30, 300, 7):
            rounded = round_channels(channels, percent / 100)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * channels * percent / 100
    with pytest.raises(ValueError, match=r"width_multiplier.*-1"):
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


# --- replace_depthwise ------------------------------------------------------------------------


def swap(conv: nn.Module, kernels: Any = (3, 5), **options: Any) -> tuple[Any, Any]:
    model = nn.Sequential(conv)
    return model, replace_depthwise(model, kernels, **options)


def depthwise(k: int = 3, **options: Any) -> nn.Conv2d:
    spread = options.get("dilation", 1)
    return nn.Conv2d(12, 12 * options.pop("multiplier", 1), k, padding=spread * (k // 2), groups=12,
                     **options)  # fmt: skip


@pytest.mark.parametrize(
    "conv",
    [
        depthwise(), depthwise(stride=2), depthwise(stride=(1, 3), bias=False),
        depthwise(dilation=2), depthwise(5, dilation=3), depthwise(1), depthwise(multiplier=2),
        nn.Conv2d(12, 12, 3, padding="same", groups=12), Conv2dSame(12, 12, 3, 2, groups=12),
        Conv2dSame(12, 12, 5, 3, groups=12, dilation=2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("partition", ["equal", "exponential", "logarithmic"])
@pytest.mark.parametrize("training", [True, False])
def test_replacing_keeps_the_function(conv, partition, training):
    conv = copy.deepcopy(conv).train(training)
    model, report = swap(conv, (5, 7, 9), partition=partition)
    assert isinstance(model[0], MixConv2d)
    assert [layer.exact for layer in report.changed] == [True]
    assert model[0].training is training
    assert model[0].stride == conv.stride
    assert model[0].dilation == conv.dilation
    assert all((part.bias is None) == (conv.bias is None) for part in model[0].convs)
    for size in ((9, 10), (4, 7)):
        x = noise(2, 12, *size)
        torch.testing.assert_close(model(x), conv(x))


@pytest.mark.parametrize("training", [True, False])
def test_replacing_a_whole_network_keeps_its_function(training):
    model = randomize(mobilenet_v2(width_multiplier=0.5, drop_rate=0, num_classes=5))
    twin = copy.deepcopy(model).train(training)
    model.train(training)
    report = replace_depthwise(model, (3, 5, 7))
    assert len(report.changed) == 17
    assert not report.skipped
    x = noise(2, 3, 40, 56)
    torch.testing.assert_close(model(x), twin(x), atol=1e-4, rtol=1e-4)
    assert str(report).startswith("17 replaced, 0 skipped\nblocks.0.depthwise.conv: MixConv2d(")
    again = replace_depthwise(model, (3, 5, 7))
    assert not again.changed
    assert {layer.reason for layer in again.skipped} == {"it is a MixConv2d already"}


def test_type_format_place_and_gradients_are_kept():
    conv = depthwise().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    conv.weight.requires_grad_(False)
    model, _ = swap(conv)
    named = dict(model.named_parameters())
    assert {p.dtype for p in named.values()} == {torch.double}
    assert all(p.requires_grad is name.endswith("bias") for name, p in named.items())
    weights = [p for name, p in named.items() if name.endswith("weight")]
    assert all(w.stride(1) == 1 for w in weights)  # `is_contiguous` is true of both formats
    model, _ = swap(depthwise(device="meta", dtype=torch.bfloat16))
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    for kernel_size in (1, 3):
        model, _ = swap(depthwise(kernel_size))
        assert all(p.requires_grad for p in model.parameters())
        assert [part.weight.stride(1) for part in model[0].convs] == [9, 25]


def test_shared_and_nested_layers():
    shared = depthwise()
    model: Any = nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.ModuleList([depthwise()])), "b": shared, "c": nn.ReLU()}
    )
    report = replace_depthwise(model, (3, 5))
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], MixConv2d)
    assert isinstance(model["a"][1][0], MixConv2d)
    assert [layer.name for layer in report.changed] == ["a.0", "a.1.0"]


class OddConv(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(12, 12, 4, groups=12), "not square and odd"),
        (nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12), "not square"),
        (nn.Conv2d(12, 12, 3, groups=12), "padding (0, 0), not (1, 1)"),
        (nn.Conv2d(12, 12, 3, padding="valid", groups=12), "padding valid"),
        (nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect", groups=12), "'reflect'"),
        (nn.Conv2d(2, 2, 3, padding=1, groups=2), "2 channels"),
        (Conv2dSame(12, 12, 1, 2, groups=12), "wider than the kernel"),
        (Conv2dSame(12, 12, 3, (1, 4), groups=12), "wider than the kernel"),
        (OddConv(12, 12, 3, padding=1, groups=12), "OddConv"),
        (nn.utils.parametrizations.weight_norm(depthwise()), "parametrized"),
    ],
)
def test_what_cannot_be_replaced_is_left_and_said(conv, reason):
    model, report = swap(conv, (3, 5, 7))
    assert model[0] is conv
    assert len(report.skipped) == 1
    assert reason in report.skipped[0].reason
    assert f"0: skipped: {report.skipped[0].reason}" in str(report)


def test_other_layers_are_not_even_mentioned():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(8, 8, 3, groups=2))
    before = snapshot(model)
    assert not replace_depthwise(model, (3, 5)).layers
    assert same_state(model, before)


def test_what_is_not_exact_is_said():
    _, report = swap(depthwise(7), (3, 5, 9))
    assert [layer.exact for layer in report.changed] == [False]
    assert "cropped" in report.changed[0].reason
    assert "not the same: 7×7 kernels cropped" in str(report)
    _, report = swap(depthwise(3), (3, 5), dilated=True)
    assert (report.changed[0].exact, report.changed[0].reason) == (False, "dilated")
    _, report = swap(depthwise(3, stride=2), (3, 5), dilated=True)
    assert report.changed[0].exact


def test_cropped_kernels_keep_their_centre():
    conv = depthwise(7)
    model, _ = swap(conv, (3, 9))
    small, large = model[0].convs
    assert torch.equal(small.weight, conv.weight[:6, :, 2:5, 2:5])
    assert torch.equal(large.weight[:, :, 1:8, 1:8], conv.weight[6:])
    assert float(large.weight.detach().abs().sum()) == pytest.approx(
        float(conv.weight[6:].detach().abs().sum())
    )


def test_fresh_weights_on_request():
    torch.manual_seed(0)
    conv = depthwise()
    model, report = swap(conv, keep_center_weights=False)
    assert (report.changed[0].exact, report.changed[0].reason) == (False, "fresh weights")
    assert not torch.allclose(model[0].convs[0].weight, conv.weight[:6])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_sizes": (3, 4)}, "kernel_sizes.*4"),
        ({"kernel_sizes": ()}, "kernel_sizes"),
        ({"partition": "half"}, "'half'"),
        ({"padding": "valid"}, "padding.*'valid'"),
        ({"kernel_sizes": (1, 3), "partition": "logarithmic"}, "logarithmic"),
        ({"kernel_sizes": (1, 3), "dilated": True}, "dilated"),
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(options, words):
    model = nn.Sequential(depthwise())
    before = model[0]
    with pytest.raises(ValueError, match=words):
        replace_depthwise(model, **({"kernel_sizes": (3, 5)} | options))
    assert model[0] is before


def test_a_bare_depthwise_layer_cannot_be_swapped_in_place():
    with pytest.raises(TypeError, match=r"nn\.Sequential"):
        replace_depthwise(depthwise(), (3, 5))


@pytest.mark.parametrize(
    ("conv", "padding"),
    [
        (nn.Conv2d(12, 12, 3, groups=12), "symmetric"),
        (depthwise(stride=2), "same"),
        (Conv2dSame(12, 12, 3, 2, groups=12), "symmetric"),
        (depthwise(padding_mode="reflect"), "symmetric"),
    ],
    ids=str,
)
def test_a_padding_that_is_asked_for_is_not_called_exact(conv, padding):
    model, report = swap(conv, padding=padding)
    x = noise(1, 12, 8, 8)
    same = model(x).shape == conv(x).shape and torch.allclose(model(x), conv(x), atol=1e-5)
    assert not same
    assert not any(layer.exact for layer in report.changed)


def test_a_padding_that_agrees_stays_exact():
    for conv, padding in ((depthwise(stride=2), "symmetric"), (depthwise(), "same")):
        model, report = swap(conv, padding=padding)
        assert report.changed[0].exact
        x = noise(1, 12, 8, 8)
        torch.testing.assert_close(model(x), conv(x))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_not_dropped_in_silence(kind):
    conv = depthwise()
    getattr(conv, kind)(lambda *_: None)
    model, report = swap(conv)
    assert model[0] is conv
    assert "hook" in report.skipped[0].reason
