# Generated from notebooks/17_gpu.ipynb by `make book`. Edit the notebook, not this file.

"""The kernel of `gpu.py`, in Triton: channels last, sums in float32 (ours; chapter 17).

Without Triton the module still imports; `AVAILABLE` says whether it can be used.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["AVAILABLE", "constexpr", "tl", "triton"]


AVAILABLE = importlib.util.find_spec("triton") is not None

triton: Any = importlib.import_module("triton") if AVAILABLE else None

tl: Any = importlib.import_module("triton.language") if AVAILABLE else None

constexpr: Any = tl.constexpr if AVAILABLE else int  # known when the kernel is compiled

_jit: Callable[[Callable[..., Any]], Any] = triton.jit if AVAILABLE else lambda f: f


@_jit
def _sum_taps(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, group, oy, ox, lanes, height, width, channels, stride, sums
):
    count, size, dilation, top, left, step = group
    used = lanes < count
    for ky in range(0, size):
        iy = oy * stride + ky * dilation - top
        for kx in range(0, size):
            ix = ox * stride + kx * dilation - left
            inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            tap = tl.load(weight_ptr + (ky * size + kx) * step + lanes, mask=used, other=0.0)
            at = x_ptr + (iy * width + ix)[:, None] * channels + lanes[None, :]
            value = tl.load(at, mask=inside[:, None] & used[None, :], other=0.0)
            sums += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return sums


@_jit
def _activate(sums, activation):  # type: ignore[no-untyped-def]
    if activation == 1:
        sums = tl.where(sums < 0, 0.0, sums)  # written so that a NaN stays
    elif activation == 2:
        sums = sums / (1.0 + tl.exp(-sums))
    elif activation == 3:
        sums = tl.where(sums < 0, 0.0, tl.where(sums > 6, 6.0, sums))
    return sums


@_jit
def _read_group(entry):  # type: ignore[no-untyped-def]
    first, count, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    dilation, top, left = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    return first, tl.load(entry + 6), (count, size, dilation, top, left, tl.load(entry + 7))


@_jit
def _mixed_depthwise(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr, table_ptr,
    height, width, channels, out_height, out_width, tiles,
    stride: constexpr, has_bias: constexpr, activation: constexpr,
    rows: constexpr, columns: constexpr, lanes_: constexpr,
):  # fmt: skip
    first, start, group = _read_group(table_ptr + tl.program_id(1) * 8)
    image, lanes, tile = tl.program_id(2).to(tl.int64), tl.arange(0, lanes_), tl.program_id(0)
    pixels = tl.arange(0, rows * columns)
    oy = tile // tiles * rows + pixels // columns
    ox = tile % tiles * columns + pixels % columns
    x_ptr += image * height * width * channels + first
    sums = tl.zeros((rows * columns, lanes_), dtype=tl.float32)
    sums = _sum_taps(
        x_ptr, weight_ptr + start, group, oy, ox, lanes, height, width, channels, stride, sums
    )  # fmt: skip
    if has_bias:
        sums += tl.load(bias_ptr + first + lanes, mask=lanes < group[0], other=0.0)[None, :]
    at = (image * out_height + oy) * out_width + ox
    to = y_ptr + at[:, None] * channels + first + lanes[None, :]
    written = ((oy < out_height) & (ox < out_width))[:, None] & (lanes < group[0])[None, :]
    tl.store(to, _activate(sums, activation).to(y_ptr.dtype.element_ty), mask=written)
