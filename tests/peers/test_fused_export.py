"""Fused models in ONNX Runtime: with the backend "merged" they are ordinary convolutions."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mixconv import MixConv2d, MixConvBlock, mixnet_s
from mixconv.fast.fuse import fuse_for_inference
from tests.peers.common import images, randomize

pytest.importorskip("onnxruntime")
export = pytest.importorskip("tests.peers.test_export")


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_merged_mixnet_exports_with_free_batch_and_size(padding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(mixnet_s(num_classes=7, width_multiplier=0.35, padding=padding))
    fused = fuse_for_inference(model, backend="merged")
    assert "BatchNorm2d" not in str(fused)
    export.check(fused, images(2, 3, 64, 65), tmp_path / "fused.onnx")


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("model", [MixConv2d(8, (3, 5)), MixConvBlock(8, 8, (3, 5))])
@pytest.mark.filterwarnings("ignore:.*legacy:DeprecationWarning")
def test_the_kernel_names_the_backend_for_onnx(
    model: nn.Module, dynamo: bool, tmp_path: Path
) -> None:
    fused = fuse_for_inference(model.eval(), backend="kernel")
    with pytest.raises(Exception, match=r'export fuse_for_inference.*backend="merged"'):
        torch.onnx.export(fused, (images(1, 8, 9, 9),), tmp_path / "fused.onnx", dynamo=dynamo)
