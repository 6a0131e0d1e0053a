"""The Triton kernel, on a GPU where there is one, else in Triton's interpreter."""

import os
import random
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

import mixconv.fast as fast
from tests.package.test_fast import make_case, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("block", range(4))
def test_random_shapes(dtype: torch.dtype, block: int) -> None:
    torch.manual_seed(block)
    rng = random.Random(block)
    x, weights, bias, mix = make_case(rng)
    x = x[:2, :, :8, :9].to(dtype)
    weights = [weight.to(dtype) for weight in weights]
    bias = None if bias is None else bias.to(dtype)
    packed = fast.pack_weights(weights).to(DEVICE)
    moved = None if bias is None else bias.to(DEVICE)
    y = fast.triton_form(x.to(DEVICE), packed, moved, mix)
    wanted = reference(x, weights, bias, mix)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    within = TOLERANCE[dtype]
    torch.testing.assert_close(y.cpu().double(), wanted, rtol=within, atol=within)


def test_compiles_for_a_gpu_without_one() -> None:
    """The interpreter takes more than the compiler does."""
    code = """
import mixconv.triton_kernel as kernel
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), "*fp16")
names = ("height", "width", "channels", "out_height", "out_width", "tiles")
fixed = {"stride": 2, "has_bias": True, "activation": 2, "rows": 4, "columns": 8, "block": 32}
signature = {**pointers, "table_ptr": "*i32", **dict.fromkeys(names, "i32")}
signature |= dict.fromkeys(fixed, "constexpr")
source = ASTSource(kernel._mixed_depthwise, signature, constexprs=fixed)
assert ".visible" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
