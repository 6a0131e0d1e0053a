"""The operation on a GPU: as a form everywhere, its kernel where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mixconv.fast.forms import Call
from mixconv.fast.gpu import GpuForm, GpuGroup, gpu_form, table_rows
from mixconv.fast.operation import FORMS
from mixconv.fast.spec import ACTIVATIONS, MixSpec, split_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
needs_triton = pytest.mark.skipif(  # on Linux the test extra holds it: there, missing is an error
    sys.platform != "linux" and importlib.util.find_spec("triton") is None,
    reason="Triton is not installed",
)
SPECS = [
    MixSpec((3, 5), (3, 5), 1, (1, 1), "symmetric", "none"),
    MixSpec((33, 7, 1), (3, 7, 1), 2, (1, 1, 1), "same", "relu"),
    MixSpec((4, 4), (3, 3), 1, (2, 3), "symmetric", "silu"),
    MixSpec((40,), (9,), 3, (1,), "same", "relu6"),
]


def call(spec, dtype=torch.float32, size=(1, 8, 5, 5)):
    weights = sum(c * k * k for c, k in zip(spec.channels, spec.kernel_sizes, strict=True))
    return Call(spec, size, dtype, "cuda", False, 1, ((weights,),))


@pytest.mark.parametrize(("images", "channels", "fits"), [(65535, 4, True), (65536, 4, False),
                                                          (1, 65535 * 32, True),
                                                          (1, 65535 * 32 + 1, False)])  # fmt: skip
def test_a_launch_has_so_many_images_and_rows_of_the_table(images, channels, fits):
    spec = MixSpec((channels,), (1,), 1, (1,), "same", "none")
    reasons = GpuForm().declines(call(spec, size=(images, channels, 1, 1)))
    assert ("65,535" not in " ".join(reasons)) == fits


def test_it_is_a_form_of_the_operation_and_says_why_it_declines(monkeypatch):
    assert "triton" in FORMS.reasons(call(SPECS[0]))
    (reason,) = [r for r in GpuForm().declines(call(SPECS[0], torch.float64)) if "float" in r]
    assert "float64" in reason
    assert any(
        "numbers" in r for r in GpuForm().declines(call(SPECS[0], size=(1, 8, 1 << 20, 512)))
    )
    monkeypatch.setattr("mixconv.fast.gpu.find_spec", lambda name: None)
    assert GpuForm().declines(call(SPECS[0])) == ["Triton is not installed"]


def test_table_by_hand():
    rows = table_rows([GpuGroup(40, 3, 1, 1, 0), GpuGroup(2, 5, 2, 4, 3)])
    assert rows == [
        [40, 2, 5, 2, 4, 3, 360, 2],
        [0, 32, 3, 1, 1, 0, 0, 40],
        [32, 8, 3, 1, 1, 0, 32, 40],
    ]


@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("spec", SPECS)
def test_it_computes_what_the_split_form_does(spec, dtype):
    channels = sum(spec.channels)
    weights = sum(c * k * k for c, k in zip(spec.channels, spec.kernel_sizes, strict=True))
    x, weight = torch.randn(2, channels, 6, 9), torch.randn(weights) / 5
    for bias in (None, torch.randn(channels)):
        given: Any = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
        moved: Any = [None if t is None else t.to(DEVICE) for t in given]
        y = gpu_form(moved[0], moved[1], moved[2], spec)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        exact: Any = [None if t is None else t.double() for t in given]
        wanted = split_form(exact[0], exact[1], exact[2], spec)
        within = TOLERANCE[dtype]
        torch.testing.assert_close(y.cpu().double(), wanted, rtol=within, atol=within)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_empty_batches(activation):
    spec = SPECS[0]._replace(activation=activation)
    x, weight = torch.full((1, 8, 2, 2), torch.nan, device=DEVICE), torch.ones(152, device=DEVICE)
    assert gpu_form(x, weight, None, spec).isnan().all()
    assert gpu_form(x[:0], weight, None, spec).shape == (0, 8, 2, 2)


@needs_triton
def test_it_compiles_for_a_gpu_without_one():
    """The interpreter takes more than the compiler does."""
    code = """
import mixconv.fast.gpu_kernel as kernel
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), "*fp16")
names = ("height", "width", "channels", "out_height", "out_width", "tiles")
fixed = {"stride": 2, "has_bias": True, "activation": 2, "rows": 4, "columns": 8, "lanes_": 32}
signature = {**pointers, "table_ptr": "*i32", **dict.fromkeys(names, "i32")}
signature |= dict.fromkeys(fixed, "constexpr")
source = ASTSource(kernel._mixed_depthwise, signature, constexprs=fixed)
assert ".visible" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
