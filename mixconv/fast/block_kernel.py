# Generated from notebooks/15_block_in_one_pass.ipynb by `make book`.
# Edit the notebook, not this file.

"""The compiled kernel for whole blocks: plans, memory, the form (ours; chapter 15)."""

import ctypes
import itertools
import os
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Runner
from mixconv.fast.fused_block import BLOCK_FORMS, PANEL, POINT_ACTIVATIONS, BlockSpec, PointwiseSpec
from mixconv.fast.kernel import MOST_NUMBERS, count_lanes, output_maker, scratch, why_not
from mixconv.fast.native import kernel_threads, load_library, why_no_library
from mixconv.fast.plan import (
    Strip,
    count_parts,
    cut_strips,
    plan_layer,
    ring_size,
    round_up,
    strip_costs,
)
from mixconv.fast.spec import output_size

__all__ = [
    "SOURCES",
    "BlockForm",
    "BlockSizes",
    "Source",
    "cut_block",
    "cut_expanded",
    "gate_size",
    "image_size",
    "load_block_kernel",
    "output_pixels",
    "plan_block",
    "share_images",
    "write_points",
]


class Source(NamedTuple):
    """Where a strip's inputs lie in a pixel of x, and its weights begin; as in the C++ file."""

    input: int
    panel: int


def cut_expanded(
    point: PointwiseSpec, strips: Sequence[Strip], lanes: int
) -> tuple[list[Strip], list[Source]]:
    """Strips as the panels have them, and where each has its input and weights."""
    cut, sources = [], []
    inputs, outputs = point.inputs // point.groups, point.outputs // point.groups
    for strip in strips:
        group, inside = divmod(strip.window + strip.skip, outputs)
        skip = inside % lanes
        window = strip.window + strip.skip - skip
        cut.append(strip._replace(window=window, read=strip.lanes, skip=skip))
        panel, column = divmod(inside - skip, PANEL)
        panel += group * -(-outputs // PANEL)
        sources.append(Source(group * inputs, panel * inputs * PANEL + column))
    return cut, sources


def cut_block(
    spec: BlockSpec, height: int, width: int, lanes: int
) -> tuple[list[Strip], list[int], list[Source]]:
    """A block's strips, what an output pixel of each costs, and where each has its input from."""
    mix, point = spec.mix, spec.expand
    if point is None:
        strips, sources, before = cut_strips(mix, height, width, lanes), list[Source](), 0
    else:
        strips = cut_strips(mix, height, width, lanes, point.outputs // point.groups)
        strips, sources = cut_expanded(point, strips, lanes)
        before = point.inputs // point.groups * mix.stride**2  # so many pixels for one output
    costs = [cost + before for cost in strip_costs(mix, height, width, strips)]
    return strips, costs, sources


def gate_size(spec: BlockSpec) -> int:
    """Numbers that finding the gate takes: the gate, the means, the squeezed means."""
    return 2 * sum(spec.mix.channels) + (spec.squeeze.outputs if spec.squeeze else 0)


def image_size(spec: BlockSpec, pixels: int, ring: int, parts: int) -> int:
    """Numbers of scratch that an image takes: rings, wide tensor, gate, sums for the means."""
    channels = sum(spec.mix.channels)
    return round_up(parts * (ring + channels) + pixels * channels + gate_size(spec), 16)


BlockSizes = namedtuple(
    "BlockSizes", "images apart workers pixel residual wide gate share"
)  # as in the C++ file; the four 1×1 layers follow


def plan_block(call: Call, lanes: int) -> tuple[list[int], int, int]:
    """A block's work: the table that the kernel reads, how much scratch, and for how many."""
    spec: BlockSpec = call.spec
    images, inputs, height, width = call.sizes
    strips, costs, sources = cut_block(spec, height, width, lanes)
    pixels, ring = output_pixels(call), ring_size(spec.mix, width) * lanes
    parts, workers = share_images(call, sum(costs), ring, lanes)
    share, wide = image_size(spec, pixels, ring, 1), pixels * sum(spec.mix.channels)
    apart = images // workers * workers if workers > 1 else 0
    block = BlockSizes(images, apart, workers, inputs, spec.residual, wide, gate_size(spec), share)
    sizes = 1, inputs, height, width
    plans = [plan_layer(spec.mix, sizes, strips, costs, n) for n in (1, parts)]
    table = [*block, *write_points(spec), *plans[0], *plans[1], *itertools.chain(*sources)]
    return table, max(image_size(spec, pixels, ring, parts), workers * share), workers


def share_images(call: Call, cost: int, ring: int, lanes: int) -> tuple[int, int]:
    """Into how many parts an image is cut, and how many workers have images of their own."""
    project, pixels = call.spec.project, output_pixels(call)
    cost += project.inputs // project.groups * project.outputs // lanes
    threads, images = min(call.threads, kernel_threads()), call.sizes[0]
    fitting = MOST_NUMBERS // image_size(call.spec, pixels, ring, 1)
    workers = count_parts(pixels * cost * images, min(threads, images, fitting))
    return count_parts(pixels * cost, threads), workers


def output_pixels(call: Call) -> int:
    """Pixels of an image of the block's output."""
    height, width = (output_size(size, call.spec.mix.stride) for size in call.sizes[2:])
    return height * width


def write_points(spec: BlockSpec) -> list[int]:
    """The 1×1 layers as the kernel reads them; one without inputs is left out."""
    absent = PointwiseSpec(0, 0, 1, "none")
    points = [point or absent for point in (spec.expand, spec.squeeze, spec.excite, spec.project)]
    return [n for p in points for n in (*p[:3], POINT_ACTIVATIONS.index(p.activation))]


SOURCES = ("simd.cpp", "depthwise.cpp", "inverted_residual.cpp")


def load_block_kernel() -> Any:
    """The library that computes blocks, compiled at first use; None where it cannot be.

    Raises:
        RuntimeError: if its tables are not those of this module.
    """
    library = load_library(*SOURCES)
    if library is not None:
        answer, points = (ctypes.c_int64 * 3)(), 4 * len(PointwiseSpec._fields)
        library.block_layout(answer)
        if answer[:] != [len(BlockSizes._fields) + points, len(Source._fields), PANEL]:
            raise RuntimeError(f"inverted_residual.cpp and block_kernel.py disagree: {answer[:]}")
        library.inverted_residual.argtypes = [ctypes.c_void_p] * 5
        library.inverted_residual.restype = None
    return library


class BlockForm:
    """The compiled kernel for whole blocks: float32 on a CPU, output in channels_last."""

    name = "kernel"

    def declines(self, call: Call) -> list[str]:
        """Why this form cannot take the call; nothing if it can."""
        ring = 16 * ring_size(call.spec.mix, call.sizes[3])  # 16: the most on any machine
        needed = image_size(call.spec, output_pixels(call), ring, call.threads)
        reasons = why_not(call.spec.mix, call.dtype, needed)
        if not reasons and load_block_kernel() is None:
            reasons.append(f"no compiled kernel: {why_no_library(*SOURCES)}")
        return reasons

    def prepare(self, call: Call) -> Runner:
        """What computes such calls; the plans are made here, once."""
        library = load_block_kernel()
        numbers, needed, workers = plan_block(call, count_lanes(library))
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        rows, columns = (output_size(size, call.spec.mix.stride) for size in call.sizes[2:])
        size = call.sizes[0], call.spec.project.outputs, rows, columns
        return _make_runner(library.inverted_residual, table, size, needed, workers)


def _make_runner(
    function: Any, table: Any, size: tuple[int, ...], needed: int, workers: int
) -> Runner:
    last, pointers, make_output = torch.channels_last, ctypes.c_void_p * 10, output_maker(size)

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        x = x.contiguous(memory_format=last)
        kept = [t.contiguous() for pair in zip(weights, biases, strict=True) for t in pair]
        parameters = pointers(*[t.data_ptr() for t in kept])
        y, memory = make_output(x), scratch(needed, workers)
        function(table, parameters, x.data_ptr(), y.data_ptr(), memory.data_ptr())
        return y

    return run


BLOCK_FORMS.add("cpu", BlockForm())


if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=BLOCK_FORMS.forget)
