"""MixConv put into other people's networks: what they compute stays the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d, replace_depthwise
from tests.peers.common import assert_near, images, import_timm, randomize

TIMM = [
    "mobilenetv2_035", "mobilenetv3_small_050", "tf_mobilenetv3_small_minimal_100",
    "efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_b0", "mnasnet_small",
    "convnext_atto",
]  # fmt: skip

GEFFNET = [
    "mobilenetv2_100", "mobilenetv3_small_075", "tf_mobilenetv3_small_minimal_100",
    "efficientnet_lite0", "tf_efficientnet_b0", "mnasnet_050", "mixnet_s",
]  # fmt: skip


def make(source: str, name: str) -> nn.Module:
    package = import_timm() if source == "timm" else pytest.importorskip("geffnet")
    torch.manual_seed(0)
    model: nn.Module = randomize(package.create_model(name), 1)
    return model


def depthwise(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1
    }


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients and buffers after a training step, in float64."""
    model = copy.deepcopy(model).double().train()
    torch.manual_seed(3)  # dropout inside
    output = model(images(2, 3, 33, 64).double())
    (output * images(*output.shape, seed=9).double()).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients, dict(model.named_buffers())


CASES = [("timm", name) for name in TIMM] + [("geffnet", name) for name in GEFFNET]


@pytest.mark.parametrize(("source", "name"), CASES)
def test_the_network_computes_what_it_did(source: str, name: str) -> None:
    before = make(source, name)
    after = copy.deepcopy(before)
    old = depthwise(before)
    largest = max(conv.kernel_size[0] for conv in old.values())
    sizes = (largest, largest + 2, largest + 4)
    report = replace_depthwise(after, sizes)
    assert {layer.name for layer in report.layers} == set(old)
    assert len(report.layers) == len(old) >= 8
    assert not report.skipped, str(report)
    assert all(layer.exact and not layer.reason for layer in report.changed), str(report)
    new = {n: m for n, m in after.named_modules() if isinstance(m, MixConv2d)}
    assert set(new) == set(old)
    for key, layer in new.items():
        assert layer.kernel_sizes == sizes
        assert layer.stride == old[key].stride
        assert (layer.convs[0].bias is None) == (old[key].bias is None)
    x = images(2, 3, 64, 65)
    with torch.no_grad():
        assert_near(after(x), before(x))

    output, gradients, buffers = run(before)
    output_after, gradients_after, buffers_after = run(after)
    assert_near(output_after, output, 1e-9)
    touched = {f"{key}.{part}" for key in old for part in ("weight", "bias")}
    assert gradients.keys() - touched <= gradients_after.keys()
    for key in gradients.keys() - touched:
        scale = max(1.0, float(gradients[key].abs().max()))
        assert float((gradients_after[key] - gradients[key]).abs().max()) <= 1e-8 * scale, key
    for key, value in buffers.items():
        torch.testing.assert_close(buffers_after[key], value, rtol=1e-8, atol=1e-8)
    for key, conv in old.items():
        parts = [gradients_after[f"{key}.convs.{i}.weight"] for i in range(len(sizes))]
        size = conv.kernel_size[0]
        middle = torch.cat(
            [p[:, :, (c := (p.shape[2] - size) // 2) : c + size, c : c + size] for p in parts]
        )
        scale = max(1.0, float(middle.abs().max()))
        error = float((middle - gradients[f"{key}.weight"]).abs().max())
        assert error <= 1e-8 * scale, key


def test_cropped_kernels_are_reported_as_not_the_same() -> None:
    before = make("timm", "convnext_atto")
    after = copy.deepcopy(before)
    report = replace_depthwise(after, (3, 5, 7), crop=True)
    assert len(report.changed) == len(depthwise(before)) == 12
    assert not any(layer.exact for layer in report.changed)
    assert all("7×7 kernels cropped to" in layer.reason for layer in report.changed)
    assert str(report).count("not the same") == 12
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(after(x), before(x), atol=1e-3)
    layer: Any = after.get_submodule("stages.0.blocks.0.conv_dw")
    old = depthwise(before)["stages.0.blocks.0.conv_dw"]
    first = layer.convs[0].weight
    assert torch.equal(first, old.weight[: len(first), :, 2:5, 2:5])
    assert old.bias is not None
    assert torch.equal(torch.cat([conv.bias for conv in layer.convs]), old.bias)


def test_a_mixed_report_tells_which_layers_stay_the_same() -> None:
    # EfficientNet has 3×3 and 5×5 layers: at (3, 5) the former are exact, the latter cropped.
    before = make("timm", "tf_efficientnet_b0")
    after = copy.deepcopy(before)
    report = replace_depthwise(after, (3, 5), crop=True)
    old = depthwise(before)
    for layer in report.layers:
        assert layer.exact == (old[layer.name].kernel_size == (3, 3)), str(layer)
        assert "Conv2dSame" in layer.before or old[layer.name].stride == (1, 1)
        assert ("padding='same'" in layer.after) == (type(old[layer.name]) is not nn.Conv2d)


def test_layers_that_are_mixconv_already_are_listed_once() -> None:
    model = make("timm", "mobilenetv2_035")
    first = replace_depthwise(model, (3, 5))
    second = replace_depthwise(model, (3, 5))
    assert [layer.name for layer in second.skipped] == [layer.name for layer in first.changed]
    assert not second.changed


def test_another_padding_is_not_the_same() -> None:
    before = make("timm", "mobilenetv2_035")
    after = copy.deepcopy(before)
    report = replace_depthwise(after, (3, 5), padding="same")
    x, old = images(1, 3, 64, 64), depthwise(before)
    with torch.no_grad():
        assert not torch.allclose(after(x), before(x), atol=1e-3)
    for layer in report.changed:
        assert layer.exact == (old[layer.name].stride == (1, 1)), str(layer)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 4)])
def test_same_padding_that_clamps_at_zero_is_not_called_exact(kernel: int, stride: int) -> None:
    # A stride wider than the kernel: TensorFlow's padding of a wider kernel starts elsewhere.
    timm = import_timm()
    torch.manual_seed(0)
    before = nn.Sequential(timm.layers.Conv2dSame(8, 8, kernel, stride=stride, groups=8))
    after = copy.deepcopy(before)
    report = replace_depthwise(after, 5)
    x = images(1, 8, 16, 16)
    if all(layer.exact for layer in report.changed):
        assert_near(after(x).detach(), before(x).detach())


def test_a_forced_padding_does_not_make_reflection_exact() -> None:
    before = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"))
    after = copy.deepcopy(before)
    report = replace_depthwise(after, 3, padding="symmetric")
    assert not any(layer.exact for layer in report.layers)


def test_hooks_are_not_lost_in_silence() -> None:
    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 2

    before = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8))
    before[0].register_forward_hook(double)
    after = copy.deepcopy(before)
    report = replace_depthwise(after, 5)
    assert len(report.layers) == 1
    x = images(1, 8, 9, 9)
    with torch.no_grad():
        same = torch.allclose(after(x), before(x), atol=1e-5)
    assert same or not report.layers[0].exact


def test_a_changed_network_is_saved_and_trained() -> None:
    model = make("timm", "mobilenetv3_small_050")
    replace_depthwise(model, (3, 5, 7), keep_center_weights=False)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict(), strict=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model.train()(images(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_the_changed_network_still_exports_and_compiles() -> None:
    x = images(1, 3, 64, 64)
    for name in ("tf_mobilenetv3_small_minimal_100", "convnext_atto"):
        model = make("timm", name)
        replace_depthwise(model, (7, 9))
        with torch.no_grad():
            assert_near(torch.export.export(model, (x,)).module()(x), model(x))
    block = make("timm", "convnext_atto").get_submodule("stages.0.blocks.0")
    replace_depthwise(block, (7, 9))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = images(1, 40, 16, 16)
    with torch.no_grad():
        assert_near(compiled(x), block(x))
