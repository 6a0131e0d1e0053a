"""MixNets and other networks of timm and geffnet, given to `fuse_for_inference`."""

from typing import Any

import pytest
import torch
from torch import nn

from mixconv.fast.describe import describe_block
from mixconv.fast.fuse import BACKENDS, fuse_for_inference
from tests.peers.common import images, import_timm, randomize

timm = import_timm()


def agrees(fused: nn.Module, model: nn.Module) -> None:
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        scale = float(expected.abs().max())
        assert scale > 0.01
        assert float((fused(x) - expected).abs().max()) < 1e-4 * scale


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def count_blocks(model: nn.Module) -> int:
    found = kinds(model)
    return found.count("InvertedResidual") + found.count("DepthwiseSeparableConv")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mixnet_s", "tf_mixnet_s", "tf_mixnet_m", "mixnet_l"])
def test_timm_mixnets(name: str, backend: str) -> None:
    model = randomize(timm.create_model(name, num_classes=7))
    fused: Any = fuse_for_inference(model, backend=backend)
    assert fused.fusion_report.left == []
    assert "BatchNormAct2d" not in kinds(fused)
    assert "MixedConv2d" not in kinds(fused)
    assert count_blocks(model) > 15
    if backend != "auto":
        assert kinds(fused).count("FusedBlock") == (backend == "kernel") * count_blocks(model)
    agrees(fused, model)
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 0), ("efficientnet_b0", 16), ("mobilenetv3_small_100", 2), ("convnext_atto", 0),
     ("tf_efficientnetv2_b0", 16), ("mobilenetv4_conv_small", 0), ("hrnet_w18_small", 0)],
)  # fmt: skip
def test_other_networks_of_timm(name: str, blocks: int) -> None:
    model = randomize(timm.create_model(name, num_classes=7))
    fused: Any = fuse_for_inference(model, backend="kernel")
    assert kinds(fused).count("FusedBlock") == blocks
    agrees(fused, model)


def test_a_subclass_of_timms_block_is_left() -> None:
    from timm.models._efficientnet_blocks import CondConvResidual, InvertedResidual

    class Doubling(InvertedResidual):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    for block in (Doubling(8, 8, exp_ratio=2), CondConvResidual(8, 8, exp_ratio=2, num_experts=2)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block).eval()
        fused = fuse_for_inference(model, backend="kernel")
        assert "FusedBlock" not in kinds(fused)
        agrees(fused, model)


def test_a_drop_in_timms_norm_is_kept() -> None:
    """timm's norms hold a drop layer and an activation, both of which do something."""
    from timm.layers.norm_act import BatchNormAct2d

    class Half(nn.Module):
        def forward(self, x: Any) -> Any:
            return 0.5 * x

    for drop in (Half, nn.Identity):
        for act in (nn.Hardswish, nn.SiLU):
            norm = BatchNormAct2d(8, act_layer=act, inplace=False, drop_layer=drop)
            model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
            fused = fuse_for_inference(model)
            assert "BatchNormAct2d" not in kinds(fused)
            assert ("Half" in kinds(fused)) == (drop is Half)
            agrees(fused, model)


def test_features_of_timm_have_hooks() -> None:
    model = timm.create_model("mixnet_s", features_only=True, feature_cfg={"feature_cls": "hook"})
    model = model.eval()
    fused = fuse_for_inference(model, backend="kernel")
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        for ours, wanted in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mixnet_s", "tf_mixnet_s", "efficientnet_b0"])
def test_geffnet(name: str) -> None:
    geffnet = pytest.importorskip("geffnet")
    model = randomize(getattr(geffnet, name)(num_classes=7))
    fused: Any = fuse_for_inference(model, backend="kernel")
    assert fused.fusion_report.left == []
    assert kinds(fused).count("FusedBlock") == count_blocks(model)
    assert {f"{kind.__module__}".partition(".")[0] for kind in describe_block.registry} >= {
        "mixconv", "timm", "geffnet",
    }  # fmt: skip
    agrees(fused, model)
