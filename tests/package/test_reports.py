"""Ten public reports of people who use such networks, tried on this package.

Each test names its report: repository and number. What happened there must not happen here.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d, fuse_for_inference, mixnet_s
from tests.package.common import noise, randomize


def near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_in_place_of_a_plain_one_says_what_sizes_it_wants(stride: int) -> None:
    """ultralytics/yolov5 #5403: an integer, or another width, ended deep inside."""
    layer = MixConv2d(128, 3, stride)
    assert layer(noise(1, 128, 9, 9)).shape[2:] == (-(-9 // stride),) * 2
    with pytest.raises(ValueError, match=r"x must be \(N, 128, H, W\).*got \(1, 64, 9, 9\)"):
        layer(noise(1, 64, 9, 9))


def test_gates_take_few_channels() -> None:
    """leaderj1001/Mixed-Depthwise-Convolutional-Kernels #2: the gate's width failed."""
    for width in (0.25, 1.0, 1.3):
        model = mixnet_s(width_multiplier=width, num_classes=3).eval()
        assert model(noise(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("size", [(512, 512), (513, 513), (33, 70)])
def test_same_padding_follows_the_image(size: tuple[int, int]) -> None:
    """zylo117/Yet-Another-EfficientDet-Pytorch #519: zeros fixed once fail at another size."""
    layer = MixConv2d(4, (3, 5), 2, padding="same")
    for height, width in (size, (31, 64), size):
        wanted = (1, 4, -(-height // 2), -(-width // 2))
        assert layer(noise(1, 4, height, width)).shape == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fusing_keeps_the_type(dtype: torch.dtype) -> None:
    """Megvii-BaseDetection/YOLOX #1246, ultralytics/ultralytics #24480: Half met Float."""
    layers = MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.SiLU()
    row = randomize(nn.Sequential(*layers)).eval().to(dtype)
    fused, x = fuse_for_inference(row), noise(1, 8, 9, 9).to(dtype)
    with torch.no_grad():
        assert fused(x).dtype == dtype
        assert near(fused(x).double(), row(x).double(), 0.05)
    assert {t.dtype for t in fused.state_dict().values() if t.is_floating_point()} == {dtype}


def test_depthwise_layers_are_fused_with_their_shapes() -> None:
    """ultralytics/yolov3 #1694: weights of grouped layers were reshaped as if ungrouped."""
    layers = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
    row = randomize(nn.Sequential(*layers)).eval()
    x = noise(1, 16, 9, 9)
    for backend in ("kernel", "merged"):
        fused = fuse_for_inference(row, backend=backend)
        with torch.no_grad():
            assert near(fused(x), row(x))


def test_whole_models_are_saved_and_copied() -> None:
    """zhoudaxia233/EfficientUnet-PyTorch #2, mir-group/nequip #126: local classes, no pickle."""
    model, x = randomize(mixnet_s(num_classes=4)).eval(), noise(1, 3, 32, 32)
    for network in (model, fuse_for_inference(model)):
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        with torch.no_grad():
            for other in (again, pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
                assert torch.equal(other(x), network(x))


def test_small_images_train_from_two_on_and_evaluate_from_one() -> None:
    """d-li14/efficientnetv2.pytorch #10: 32 pixels, which one stride after the other makes 1."""
    model = mixnet_s(num_classes=10)
    assert model.train()(noise(2, 3, 32, 32)).shape == (2, 10)
    assert model.eval()(noise(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(noise(1, 3, 32, 32))


def test_every_depthwise_layer_is_depthwise() -> None:
    """mlcommons/GaNDLF #1041: `groups` forgotten, 23 times the parameters."""
    model = mixnet_s()
    blocks: Any = model.blocks
    for block in blocks:
        inner = block.depthwise.conv
        for conv in inner.convs if isinstance(inner, MixConv2d) else [inner]:
            assert conv.groups == conv.in_channels == conv.out_channels
    assert sum(p.numel() for p in model.parameters()) == 4_134_606


def test_maps_come_with_the_last_one_before_the_pool() -> None:
    """timm #1281, geffnet #13: the last map, after the head, is missing or must be cut out."""
    model, x = mixnet_s().eval(), noise(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert isinstance(last, Tensor)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        assert last.shape == (1, model.num_features, 2, 2)
        assert torch.equal(model.forward_head(last), model(x))


def test_padding_by_name_is_exported() -> None:
    """pytorch/pytorch #68880: `padding="same"` did not export; ours has free sizes besides."""
    model = MixConv2d(8, (3, 5), 2, padding="same").eval()
    sizes = {
        2: torch.export.Dim("rows", min=8, max=99),
        3: torch.export.Dim("columns", min=8, max=99),
    }
    program = torch.export.export(model, (noise(1, 8, 16, 18),), dynamic_shapes=(sizes,))
    for size in ((16, 18), (17, 33), (99, 8)):
        x = noise(1, 8, *size)
        assert torch.equal(program.module()(x), model(x))
