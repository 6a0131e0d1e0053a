import copy
from typing import Any

import pytest
import torch
from torch import nn

from mixconv import MixConv2d, mobilenet_v2, replace_depthwise
from mixconv.layer import Conv2dSame
from mixconv.surgery import find_padding, has_hooks

from .common import noise, randomize, same_state, snapshot


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
    assert str(report).startswith(
        "17 replaced, all computing the same; 0 skipped\nblocks.0.depthwise.conv: MixConv2d("
    )
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
    _, report = swap(depthwise(7), (3, 5, 9), crop=True)
    assert [layer.exact for layer in report.changed] == [False]
    assert "cropped" in report.changed[0].reason
    assert "not the same: 7×7 kernels cropped" in str(report)
    _, report = swap(depthwise(3), (3, 5), dilated=True)
    assert (report.changed[0].exact, report.changed[0].reason) == (False, "dilated")
    _, report = swap(depthwise(3, stride=2), (3, 5), dilated=True)
    assert report.changed[0].exact


def test_cropped_kernels_keep_their_centre():
    conv = depthwise(7)
    model, _ = swap(conv, (3, 9), crop=True)
    small, large = model[0].convs
    assert torch.equal(small.weight, conv.weight[:6, :, 2:5, 2:5])
    assert torch.equal(large.weight[:, :, 1:8, 1:8], conv.weight[6:])
    assert float(large.weight.detach().abs().sum()) == pytest.approx(
        float(conv.weight[6:].detach().abs().sum())
    )


def test_kernels_are_not_cropped_unless_asked_for():
    """A trained network must not change what it computes without anybody saying so."""
    conv = depthwise(5)
    model, report = swap(conv, (3, 5, 7))
    assert model[0] is conv
    assert str(report).splitlines() == [
        "0 replaced; 1 skipped",
        "0: skipped: 5×5 kernels would be cropped to 3×3; see crop",
    ]
    _, report = swap(depthwise(5), (3, 5, 7), crop=True)
    assert str(report).startswith("1 replaced, 1 of them NOT computing the same; 0 skipped\n")
    _, report = swap(depthwise(5), (5, 7, 9))
    assert report.changed[0].exact


def test_sizes_for_each_layer():
    model = nn.Sequential(depthwise(3), depthwise(5), depthwise(7))
    seen = []

    def grow(name, layer):
        seen.append(name)
        k = layer.kernel_size[0]
        return None if k == 7 else (k, k + 2)

    x = noise(1, 12, 9, 9)
    before = model(x)
    report = replace_depthwise(model, grow)
    assert sorted(seen) == ["0", "1", "2"]
    assert [r.name for r in report.skipped] == ["2"]
    assert "no kernel sizes were given" in report.skipped[0].reason
    assert [getattr(layer, "kernel_sizes", None) for layer in model] == [(3, 5), (5, 7), None]
    torch.testing.assert_close(model(x), before)


def test_a_bad_size_for_a_later_layer_changes_nothing():
    model = nn.Sequential(depthwise(3), depthwise(5))
    layers = [*model]
    with pytest.raises(ValueError, match="kernel_sizes"):
        replace_depthwise(model, lambda name, layer: (3, 5) if name == "0" else (4,))
    assert [*model] == layers


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        replace_depthwise("mixnet_s", (3, 5))  # type: ignore[arg-type]


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


HOOKS = [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_not_dropped_in_silence(kind):
    conv = depthwise()
    getattr(conv, kind)(lambda *_: None)
    model, report = swap(conv)
    assert model[0] is conv
    assert "hook" in report.skipped[0].reason


def test_a_forward_of_its_own_is_not_dropped_in_silence():
    conv = depthwise()
    conv.forward = lambda input: input  # type: ignore[method-assign]
    assert has_hooks(conv)
    model, report = swap(conv)
    assert model[0] is conv
    assert len(report.skipped) == 1


def test_a_class_is_not_known_by_its_name():
    impostor = type("Conv2dSame", (nn.Conv2d,), {})
    conv = impostor(12, 12, 3, groups=12)
    model, report = swap(conv)
    assert model[0] is conv
    assert "a Conv2dSame, which may compute something else" in report.skipped[0].reason


def test_find_padding():
    assert find_padding(depthwise(dilation=2)) == "symmetric"
    assert (
        find_padding(nn.Conv2d(3, 8, 5, 2, 2)) == "symmetric"
    )  # any odd kernel, not depthwise only
    assert find_padding(nn.Conv2d(4, 4, 3, padding="same")) == "symmetric"
    assert find_padding(Conv2dSame(4, 4, 3, 2)) == "same"
    with pytest.raises(ValueError, match="not odd"):
        find_padding(nn.Conv2d(4, 4, 4, padding=2))
    with pytest.raises(ValueError, match=r"padding \(0, 0\), not \(1, 1\)"):
        find_padding(nn.Conv2d(4, 4, 3))


def test_shared_weights_are_not_parted_in_silence():
    first, second = depthwise(), depthwise()
    second.weight = first.weight
    model = nn.Sequential(first, second, depthwise())
    report = replace_depthwise(model, (3, 5))
    assert model[0] is first
    assert model[1] is second
    assert [layer.name for layer in report.changed] == ["2"]
    assert all("shares its weights" in layer.reason for layer in report.skipped)


def test_a_forced_padding_does_not_take_a_subclass():
    conv = OddConv(12, 12, 3, padding=1, groups=12)
    model, report = swap(conv, padding="symmetric")
    assert model[0] is conv
    assert "OddConv" in report.skipped[0].reason


def test_a_weight_of_an_unusual_class_is_left_alone():
    class Unusual(nn.Parameter):
        pass

    conv = depthwise()
    conv.weight = Unusual(conv.weight.detach())
    model, report = swap(conv)
    assert model[0] is conv
    assert "Unusual" in report.skipped[0].reason
