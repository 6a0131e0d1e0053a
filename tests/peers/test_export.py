"""torch.export, ONNX and torch.compile, with ONNX Runtime as the judge."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import MixConv2d, mixnet_s
from tests.peers.common import assert_near, images, randomize

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

OTHER_SHAPES = [(1, 64, 64), (1, 33, 33), (3, 97, 50), (2, 40, 71)]


def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """With free batch and size; below 33 pixels a MixNet's last map is 1×1, a special case."""
    free = torch.export.Dim
    shapes = {0: free("batch"), 2: free("height", min=33), 3: free("width", min=33)}
    return torch.export.export(model, (x,), dynamic_shapes=(shapes,))


def to_onnx(program: torch.export.ExportedProgram, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        torch.onnx.export(program, (), str(path), dynamo=True, verbose=False)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check(model: nn.Module, x: Tensor, path: Path) -> None:
    program = export(model, x)
    session = to_onnx(program, path)
    (entry,) = session.get_inputs()
    assert [isinstance(size, str) for size in entry.shape] == [True, False, True, True]
    for batch, height, width in OTHER_SHAPES:
        other = images(batch, x.shape[1], height, width, seed=height)
        assert other.shape != x.shape
        with torch.no_grad():
            expected = model(other)
            assert_near(program.module()(other), expected)
        (result,) = session.run(None, {entry.name: other.numpy()})
        assert_near(torch.from_numpy(result), expected, 1e-4)


@pytest.mark.parametrize(
    ("padding", "stride", "dilated"),
    [("symmetric", 2, False), ("same", 2, False), ("same", 3, False), ("same", 1, True)],
)
def test_mixconv_exports_with_free_batch_and_size(
    padding: str, stride: int, dilated: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = MixConv2d(
        10, (3, 5, 9), stride, padding=padding, bias=True, dilated=dilated, channel_multiplier=2
    ).eval()
    check(layer, images(2, 10, 48, 51), tmp_path / "layer.onnx")


def test_mixnet_s_exports_with_free_batch_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(mixnet_s(num_classes=10), 1)
    check(model, images(2, 3, 65, 64), tmp_path / "model.onnx")


def test_mixconv_compiles_to_machine_code() -> None:
    torch.manual_seed(0)
    layer = MixConv2d(8, (3, 5), 2, padding="same")
    compiled = torch.compile(layer, fullgraph=True)
    x = images(2, 8, 17, 18).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_near(gradient, expected)


def test_mixnet_s_traces_in_one_piece() -> None:
    torch.manual_seed(0)
    model = randomize(mixnet_s(num_classes=10), 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(1, 3, 33, 64)
    with torch.no_grad():
        assert_near(compiled(x), model(x))


@pytest.mark.slow
def test_mixnet_s_compiles_to_machine_code() -> None:
    torch.manual_seed(0)
    model = randomize(mixnet_s(num_classes=10), 1)
    x = images(2, 3, 33, 33)
    with torch.no_grad():
        assert_near(torch.compile(model, fullgraph=True)(x), model(x))
