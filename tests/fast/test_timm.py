"""MixNets of timm and geffnet, given to `fuse_for_inference`."""

import pytest
import torch

import mixconv.fast as fast
from mixconv import fuse_for_inference
from tests.peers.common import images, import_timm, randomize

timm = import_timm()


@pytest.mark.parametrize("backend", fast.BACKENDS)
@pytest.mark.parametrize("name", ["mixnet_s", "tf_mixnet_s", "tf_mixnet_m", "mixnet_l"])
def test_timm_mixnets(name: str, backend: str) -> None:
    model = randomize(timm.create_model(name, num_classes=7))
    fused = fuse_for_inference(model, backend=backend)
    kinds = [type(module).__name__ for module in fused.modules()]
    assert "BatchNormAct2d" not in kinds
    kinds_before = [type(module).__name__ for module in model.modules()]
    blocks = kinds_before.count("InvertedResidual") + kinds_before.count("DepthwiseSeparableConv")
    assert blocks > 15
    with_kernel = backend == "kernel" or (backend == "auto" and fast.load_kernel() is not None)
    assert kinds.count("FusedBlock") == (blocks if with_kernel else 0)
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        scale = float(expected.abs().max())
        assert scale > 0.01
        assert float((fused(x) - expected).abs().max()) < 1e-4 * scale
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100"])
def test_other_networks_of_timm(name: str) -> None:
    model = randomize(timm.create_model(name, num_classes=7))
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        scale = float(expected.abs().max())
        assert float((fuse_for_inference(model)(x) - expected).abs().max()) < 1e-4 * scale


def test_geffnet() -> None:
    geffnet = pytest.importorskip("geffnet")
    model = randomize(geffnet.mixnet_s(num_classes=7))
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        scale = float(expected.abs().max())
        assert float((fuse_for_inference(model)(x) - expected).abs().max()) < 1e-4 * scale
