# Generated from notebooks/17_gpu.ipynb by `make book`. Edit the notebook, not this file.

"""The operation on a GPU: one launch for all groups, by Triton (ours; chapter 17).

Importing this does not import Triton; the kernel itself is in `gpu_kernel.py`.
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Runner
from mixconv.fast.operation import FORMS
from mixconv.fast.spec import ACTIVATIONS, MixSpec, output_size, pads

__all__ = ["LANES", "GpuForm", "GpuGroup", "gpu_form", "group_table", "table_rows"]


LANES = 32  # channels of a program


class GpuGroup(NamedTuple):
    """One group of a layer, as the kernel's table tells it."""

    channels: int
    kernel_size: int
    dilation: int
    top: int
    left: int


def table_rows(groups: Sequence[GpuGroup]) -> list[list[int]]:
    """A row for each `LANES` channels of a group; large kernels first, since they take longest.

    Each row: first channel, how many, kernel size, dilation, zeros above and left, where the
    packed weights begin, and the step from one tap to the next.
    """
    rows, first, weight = [], 0, 0
    for channels, size, *rest in groups:
        for start in range(0, channels, LANES):
            count = min(LANES, channels - start)
            rows.append([first + start, count, size, *rest, weight + start, channels])
        first, weight = first + channels, weight + channels * size * size
    return sorted(rows, key=lambda row: -row[2])


@functools.lru_cache(maxsize=256)
def group_table(groups: tuple[GpuGroup, ...], device: torch.device) -> Tensor:
    """`table_rows` on a device, `(rows, 8)`."""
    return torch.tensor(table_rows(groups), dtype=torch.int32, device=device)


def _groups(spec: MixSpec, height: int, width: int) -> tuple[GpuGroup, ...]:
    around = pads(spec, height, width)
    entries = zip(spec.channels, spec.kernel_sizes, spec.dilations, around, strict=True)
    return tuple(GpuGroup(c, k, d, pad.top, pad.left) for c, k, d, pad in entries)


def gpu_form(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The operation by the Triton kernel: summed in float32, output in channels_last.

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`.
    """
    import mixconv.fast.gpu_kernel as kernel  # imports Triton: only for those who use it

    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    height, width = (output_size(size, spec.stride) for size in x.shape[2:])
    y = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)  # fmt: skip
    if y.numel():
        groups = group_table(_groups(spec, x.shape[2], x.shape[3]), x.device)
        columns, rows = min(8, _power_of_two(width)), min(4, _power_of_two(height))
        tiles = -(-width // columns)
        kernel._mixed_depthwise[tiles * -(-height // rows), groups.shape[0], x.shape[0]](
            x, weight.resolve_neg().contiguous(), x if bias is None else bias, y, groups,
            *x.shape[2:], x.shape[1], height, width, tiles, stride=spec.stride, lanes_=LANES,
            has_bias=bias is not None, activation=ACTIVATIONS.index(spec.activation),
            rows=rows, columns=columns,
        )  # fmt: skip
    return y


def _power_of_two(size: int) -> int:
    """The next one, at least `size`."""
    return 1 << (size - 1).bit_length()


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MOST_NUMBERS = 2**31  # the kernel counts within an image in 32 bits

_MOST_PROGRAMS = 65535  # on the second and third axis of CUDA's grid: rows of the table, images


class GpuForm:
    """Triton's kernel as a form of the operation."""

    name = "triton"

    def declines(self, call: Call) -> list[str]:
        """Why it cannot take a call; nothing if it can."""
        reasons = []
        if call.dtype not in _DTYPES:
            reasons.append(f"it sums in float32, and the tensors are {call.dtype}")
        if call.sizes[1] * call.sizes[2] * call.sizes[3] >= _MOST_NUMBERS:
            reasons.append(f"an image has {_MOST_NUMBERS:,} numbers or more")
        rows = sum(-(-count // LANES) for count in call.spec.channels)
        if max(call.sizes[0], rows) > _MOST_PROGRAMS:
            reasons.append(f"a launch has at most {_MOST_PROGRAMS:,} images and parts of groups")
        if find_spec("triton") is None:
            reasons.append("Triton is not installed")
        return reasons

    def prepare(self, call: Call) -> Runner:
        """A function of x, weight and bias."""

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return gpu_form(x, weight, bias, call.spec)

        return run


FORMS.add("cuda", GpuForm())
