"""What people do with networks around them: torch.fx, timm's other sizes and strides."""

from typing import Any

import pytest
import torch
from torch import nn

from mixconv import MixConv2d, fuse_for_inference, mixnet_s, mixnet_xl, mobilenet_v2
from tests.peers.common import NAMES, assert_near, build, images, import_timm, randomize

timm = import_timm()


def test_fused_networks_can_be_traced_by_fx() -> None:
    fused = fuse_for_inference(randomize(mixnet_s()))
    assert "16 blocks and 2 layers" in str(fused.fusion_report)
    traced, x = torch.fx.symbolic_trace(fused), images(1, 3, 64, 64)
    assert_near(traced(x), fused(x))
    targets = [str(node.target) for node in traced.graph.nodes]
    assert targets.count("mixconv.inverted_residual") == 16


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Identity()])
def test_fused_layers_can_be_traced_by_fx(activation: nn.Module) -> None:
    layer = nn.Sequential(MixConv2d(8, (3, 5, 7), bias=True), nn.BatchNorm2d(8), activation)
    fused, x = fuse_for_inference(layer.eval(), backend="kernel"), images(2, 8, 9, 7)
    assert_near(torch.fx.symbolic_trace(fused)(x), fused(x))


def test_feature_extractors_get_a_clear_line() -> None:
    extract = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = mixnet_s().eval(), images(1, 3, 64, 64)
    got = extract.create_feature_extractor(model, ["blocks.6"])(x)
    assert_near(got["blocks.6"], model.features(x)[2])
    with pytest.raises(RuntimeError, match="create_feature_extractor"):
        extract.create_feature_extractor(fuse_for_inference(model), ["blocks.6"])


@pytest.mark.parametrize("named", [True, False])
def test_extra_large_is_timms(named: bool) -> None:
    theirs = randomize(timm.create_model("mixnet_xl"))
    state = {"arch": "mixnet_xl", "state_dict": theirs.state_dict()}
    ours = (
        mixnet_xl(state)
        if named
        else mixnet_xl(theirs.state_dict(), padding="symmetric", norm_eps=1e-5)
    )
    x = images(1, 3, 65, 96)
    assert_near(ours.eval()(x), theirs(x))
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts == [11_896_768] * 2


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_output_strides_are_timms(name: str, output_stride: int) -> None:
    theirs: Any = randomize(timm.create_model(name, output_stride=output_stride))
    ours = build(name, theirs.state_dict(), output_stride=output_stride)
    for shape in [(1, 3, 64, 64), (1, 3, 65, 98)]:
        x = images(*shape)
        with torch.no_grad():
            maps = ours.forward_features(x)
            assert maps.shape[-1] == -(-x.shape[-1] // output_stride)
            assert_near(maps, theirs.forward_features(x))
            assert_near(ours(x), theirs(x))
    assert ours.feature_info[-1]["reduction"] == output_stride


def test_networks_of_stride_8_are_fused_and_others_refused() -> None:
    model, x = randomize(mixnet_s(output_stride=8)), images(1, 3, 64, 64)
    fused = fuse_for_inference(model)
    assert "8 blocks and 34 layers fused, 0 left" in str(fused.fusion_report)
    with torch.no_grad():
        assert_near(fused(x), model(x))
    for wrong in (0, 4.5, 12, True, "8"):
        with pytest.raises(ValueError, match="output_stride must be 2, 4, 8, 16 or 32"):
            mixnet_s(output_stride=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output_stride"):
        mobilenet_v2(output_stride=8)  # type: ignore[call-arg]


def test_buffers_of_others_do_not_disturb_a_fused_block() -> None:
    fused, x = fuse_for_inference(randomize(mixnet_s())), images(1, 3, 64, 64)
    wanted = fused(x)
    for module in fused.modules():  # as thop does
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    assert torch.equal(fused(x), wanted)


def test_a_layer_splits_by_what_its_convolutions_take() -> None:
    """As torch-pruning leaves them: fewer channels in each, and nothing else told."""
    layer, x = MixConv2d(8, (3, 5)), images(1, 5, 9, 9)
    for conv, count in zip(layer.convs, (2, 3), strict=True):
        assert isinstance(conv, nn.Conv2d)
        conv.weight = nn.Parameter(conv.weight[:count].detach())
        conv.in_channels = conv.out_channels = conv.groups = count
    outputs = [conv(part) for conv, part in zip(layer.convs, x.split([2, 3], 1), strict=True)]
    assert torch.equal(layer(x), torch.cat(outputs, 1))
    with pytest.raises(ValueError, match=r"x must be \(N, 5, H, W\)"):
        layer(images(1, 8, 9, 9))


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_fx_quantisation_takes_either_padding(padding: str) -> None:
    """Folded before, no norm is left over; without that, those behind a mixed layer are."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    layers = MixConv2d(12, (3, 5), 2, padding=padding), nn.BatchNorm2d(12), nn.ReLU()
    model, x = randomize(nn.Sequential(*layers), in_channels=12), images(4, 12, 32, 32)
    for network, norms in ((model, 1), (fuse_for_inference(model, backend="merged"), 0)):
        prepared = prepare_fx(network, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantised = convert_fx(prepared)
        with torch.no_grad():
            assert_near(quantised(x), model(x), 0.05)
        kinds = [type(part).__name__ for part in quantised.modules()]
        assert sum("BatchNorm" in kind or "BNReLU" in kind for kind in kinds) == norms
