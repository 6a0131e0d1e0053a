# Generated from notebooks/14_whole_kernel.ipynb by `make book`. Edit the notebook, not this file.

"""How a layer's work is cut: the table that the kernel reads (ours; chapter 14)."""

import bisect
import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

from mixconv.fast.spec import ACTIVATIONS, MixSpec, output_size, pads

__all__ = [
    "APART",
    "BAND_BYTES",
    "PIXEL_COST",
    "TAP_COST",
    "TASKS_OF_A_PART",
    "WORK_OF_A_THREAD",
    "Layer",
    "Strip",
    "band_rows",
    "count_parts",
    "cut_strips",
    "plan_layer",
    "ring_size",
    "round_up",
    "share_out",
    "strip_costs",
]


class Strip(NamedTuple):
    """Neighbouring channels of one group, computed together; as in `depthwise.cpp`."""

    kernel: int
    top: int  # zeros above and left of the group's input
    left: int
    window: int  # the first channel that is read
    read: int  # how many are
    skip: int  # the first lane that is the strip's own
    lanes: int  # how many are
    weight: int  # of the strip's first channel, among the packed ones
    step: int  # to the weight of the next tap


def cut_strips(spec: MixSpec, height: int, width: int, lanes: int, part: int = 0) -> list[Strip]:
    """The layer's channels as strips of up to `lanes`, cut where vectors of the tensor end.

    Where `part` is given, vectors begin anew after so many channels.
    """
    total, strips, first, weight = sum(spec.channels), [], 0, 0
    groups = zip(spec.channels, spec.kernel_sizes, pads(spec, height, width), strict=True)
    for count, k, pad in groups:
        at = first
        while at < first + count:
            inside = at % (part or total)
            vector = min(lanes - inside % lanes, (part or total) - inside)
            own = min(vector, first + count - at)
            window = min(at, max(0, total - lanes))
            place = window, min(lanes, total), at - window, own
            strips.append(Strip(k, pad.top, pad.left, *place, weight + at - first, count))
            at += own
        first, weight = first + count, weight + count * k * k
    return strips


BAND_BYTES = 1 << 20  # rows worked on: half of a common second-level cache

TASKS_OF_A_PART = 4  # at least, if that needs no bands of less than four rows


def round_up(value: int, to: int) -> int:
    """The next multiple."""
    return -(-value // to) * to


def band_rows(out_height: int, row_bytes: int, strips: int, parts: int) -> int:
    """Rows of a band, where `strips` counts those of all images."""
    bands = -(-out_height * row_bytes // BAND_BYTES)
    if parts > 1:
        bands = max(bands, TASKS_OF_A_PART * parts // max(1, strips))
    if bands > 1:
        bands = round_up(bands, parts)
    return max(1, min(out_height, max(4, -(-out_height // max(1, bands)))))


PIXEL_COST, TAP_COST = 8, 16  # of moving a pixel, of loading a tap: in multiply-adds of vectors


def strip_costs(spec: MixSpec, height: int, width: int, strips: Sequence[Strip]) -> list[int]:
    """What an output pixel of each strip costs, in multiply-adds of vectors."""
    stride = spec.stride
    rows, columns = output_size(height, stride), max(1, output_size(width, stride))
    costs = {}
    for k, top in {strip[:2] for strip in strips}:
        begins = range(-top, rows * stride - top, stride)
        inside = sum(max(0, min(height, y + k) - max(0, y)) for y in begins)
        once = (k * inside * columns + TAP_COST * k * k) // max(1, rows * columns)
        costs[k, top] = once + PIXEL_COST * (1 + stride)
    return [costs[strip[:2]] for strip in strips]


WORK_OF_A_THREAD = 10000  # multiply-adds of vectors: for less, waking it costs more


def count_parts(work: int, threads: int) -> int:
    """Into how many parts some work is cut."""
    return max(1, min(threads, work // WORK_OF_A_THREAD))


Layer = namedtuple(
    "Layer",
    "batch height width channels out_height out_width stride activation "
    "band bands strips parts ring",
)


def share_out(strips: Sequence[Strip], costs: Sequence[int], layer: Layer) -> list[int]:
    """Where each part of the work begins, and where the last one ends, in numbered rows."""
    before = [0, *itertools.accumulate(costs)]
    image_cost, cuts = before[-1] * layer.out_height, []
    for part in range(layer.parts + 1):
        image, cost = divmod(layer.batch * image_cost * part // layer.parts, max(1, image_cost))
        band, cost = divmod(cost, before[-1] * layer.band)
        rows = min(layer.band, layer.out_height - band * layer.band)
        strip = bisect.bisect_right(before, cost // max(1, rows)) - 1
        row = (cost - before[strip] * rows) // costs[strip]
        if min(row, rows - row) < strips[strip].kernel:
            row = 0 if 2 * row <= rows else layer.band
        cuts.append(((image * layer.bands + band) * layer.strips + strip) * layer.band + row)
    return cuts


APART = 4096  # vectors between two threads' rings: several rows of the widest


def ring_size(spec: MixSpec, width: int) -> int:
    """Vectors that the largest ring of a layer takes at most, with its weights, and the gap."""
    columns = round_up(output_size(width, spec.stride), 14)
    rings = (k * ((columns - 1) * spec.stride + k) + k * k for k in spec.kernel_sizes)
    return max(rings) + APART


def plan_layer(
    spec: MixSpec, sizes: Sequence[int], strips: Sequence[Strip], costs: Sequence[int], parts: int
) -> list[int]:
    """A layer's work, cut into bands and parts: the table that the kernel reads.

    Args:
        spec: the layer.
        sizes: of x, `(N, C, H, W)`.
        strips: from `cut_strips`.
        costs: of a strip, for one output pixel.
        parts: into how many the work is cut.
    """
    batch, pixel, height, width = sizes
    rows, columns = output_size(height, spec.stride), output_size(width, spec.stride)
    channels, activation = sum(spec.channels), ACTIVATIONS.index(spec.activation)
    row_bytes = 4 * (spec.stride * width * pixel + columns * channels)
    band = band_rows(rows, row_bytes, batch * len(strips), parts)
    layer = Layer(
        batch, height, width, channels, rows, columns, spec.stride, activation,
        band, -(-rows // band), len(strips), parts, ring_size(spec, width),
    )  # fmt: skip
    return [*layer, *share_out(strips, costs, layer), *itertools.chain(*strips)]
