"""What people do with networks around them: torch.fx, timm's other sizes and strides."""

import pytest
import torch
from torch import nn

from mixconv import MixConv2d, fuse_for_inference, mixnet_s, mixnet_xl
from tests.peers.common import assert_near, images, import_timm, randomize

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
