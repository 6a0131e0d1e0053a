# %% [markdown]
# # 14 · The whole kernel
#
# Chapter 13 ended with a fast kernel for one group of channels: stride 1, channels a multiple of 16, one thread, and a padded copy of the whole image. What must be added before a network can use it?
#
# The picture below shows the answer's two halves: a *ring* that holds no more rows than the kernel spans, and the pieces into which a layer is cut.
#
# **You will be able to**
# - read a complete C++ kernel, from its first line to its last;
# - cut a layer into strips, bands and parts of equal cost, by hand;
# - say what a kernel that allocates nothing need not handle.
#
# **Know first:** [chapter 12](12_operation.ipynb) and [chapter 13](13_kernel_in_steps.ipynb).
#
# **Time:** 35 minutes to read. Runs in under 20 seconds on two cores. It is the first of two pages, before [The kernel, called](14_whole_kernel_called.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style


def box(axis, x: float, y: float, row: int, color: str, weight: str = "normal") -> None:
    axis.add_patch(plt.Rectangle((x, -y), 0.95, -0.85, color=color, alpha=0.55))
    axis.text(x + 0.48, -y - 0.44, str(row), ha="center", va="center", fontweight=weight)


def draw_ring(axis) -> None:
    for step in range(3):  # the window of output row oy covers rows oy - 1, oy, oy + 1
        oy, x = step + 1, 3.4 * step
        for row in range(6):
            near = abs(row - oy) <= 1
            box(axis, x, row, row, kernel_color(3) if near else "#e4e4e4")
            if near:
                weight = "bold" if row > oy else "normal"
                box(axis, x + 1.5, row % 3 + 1.2, row, kernel_color(3), weight)
        for place, y, text in ((0.5, 0.2, "image"), (1.98, -1, "ring"), (1.2, -6.7, "output")):
            words = f"{text} {oy}" if text == "output" else text
            axis.text(x + place, y, words, ha="center", fontsize=9)
    axis.text(4.7, -7.4, "bold: new in the ring", ha="center", fontsize=9)
    axis.set(xlim=(-0.2, 9.6), ylim=(-7.6, 0.9), title="a ring of three rows")
    axis.axis("off")


# %% tags=["drawing"]
# fold: The code that draws this
ENDS = (0, 16, 20, 32, 40, 48, 64)  # of the strips, in channels


def draw_pieces(axis) -> None:
    for begin, end, k in ((0, 20, 3), (20, 40, 5), (40, 64, 7)):
        axis.axvspan(begin, end, color=kernel_color(k), alpha=0.3)
        axis.text((begin + end) / 2, -1.2, f"{k}×{k}", ha="center", fontsize=9)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for number in range(12):  # in the order of the work
        begin, end, top = ENDS[number % 6], ENDS[number % 6 + 1], number // 6 * 28
        at, hatch = ((begin + end) / 2, top + 14), "//" if number > 5 else None
        piece = plt.Rectangle((begin, top), end - begin, 28, fill=False, hatch=hatch, alpha=0.3)
        axis.add_patch(piece)
        axis.text(*at, str(number + 1), ha="center", va="center", bbox=white)
    axis.vlines(ENDS[1:-1], 0, 56, color="black", lw=0.8)
    axis.hlines(28, 0, 64, color="black", lw=2)
    for top, text in ((14, "thread 1"), (42, "thread 2")):
        axis.text(65.5, top, text, rotation=90, va="center", fontsize=9)
    axis.set(xlim=(0, 64), ylim=(56, 0), xlabel="channels: 6 strips", ylabel="rows: 2 bands")
    axis.set_title("a layer in pieces", pad=16)


# %% tags=["drawing"]
# fold: The code that draws this
use_style()
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), width_ratios=(1.25, 1))
draw_ring(left)
draw_pieces(right)
show(
    figure,
    "ring_strips_bands.png",
    "Left: for output rows 1, 2 and 3 of a 3×3 kernel, which three rows of the image the ring "
    "holds; each new row takes the place of the oldest. Right: a layer of 64 channels in three "
    "groups, cut into six strips of up to 16 channels and two bands of rows. The pieces are "
    "numbered in the order of the work; the first six are thread 1's, the hatched ones thread 2's.",
    caption="A row that is new takes the place of the oldest, so three rows are memory enough; and "
    "a layer is one sequence of pieces, band by band and strip by strip, which the threads share.",
)

# %% [markdown]
# ## A ring of rows, by hand
#
# Chapter 13 copied the padded image into scratch memory, 16 channels at a time. At 56×56 pixels that copy has about 60 · 60 · 64 = 230,400 bytes: several times the first-level cache. But an output row needs only k rows of it. So keep k rows. When the window moves down by one, the new row takes the place of the oldest: row `y` always lies in slot `y % k`.
#
# One column of an image, and a kernel of three taps. The first window begins at row −1, which is not there. Rows outside the image are not stored as zeros: their taps are skipped.

# %%
import torch

column, taps = [1, 2, 3, 4, 5, 6], [1, 10, 100]
k, ring, fetched, outputs = len(taps), [0] * len(taps), 0, []
for oy in range(len(column)):
    top = oy - k // 2  # the window's first row
    while fetched < min(len(column), top + k):
        ring[fetched % k] = column[fetched]
        fetched += 1
    rows = [iy for iy in range(top, top + k) if 0 <= iy < len(column)]
    outputs.append(sum(taps[iy - top] * ring[iy % k] for iy in rows))
    print(f"output {oy}: ring {ring}, sum {outputs[-1]}")
expected = torch.conv1d(torch.tensor([[column]]), torch.tensor([[taps]]), padding=1)
assert outputs == expected.flatten().tolist()

# %% [markdown]
# Each row is fetched once, in this column. In the real ring a slot is a row of pixels, each pixel a vector of 16 channels, with zeros to the left and right. The line that puts a row into its slot is called `fetch_row` there. It is the only line of the kernel that chapter 15 exchanges.
#
# ## Strips
#
# The smallest piece of work is a *strip*: up to 16 neighbouring channels of one group, since a vector holds 16 (on some machines 8 or 4) and all its lanes must use the same kernel size. Groups have 20 or 90 channels, so where are they cut?
#
# - A strip ends where its group ends.
# - A strip ends at every multiple of 16 channels *of the tensor*. Where a pixel's channels are a multiple of 16, and the tensor begins where a cache line does (chapter 13's 64 bytes), a full strip writes whole lines that are its own. Only where a group ends inside a line do two strips share one: in the picture, whose layer has 64 channels, strips 2 and 3 do, and 4 and 5. Two threads that write to one line wait for each other all the time.
#
# A strip of fewer than 16 channels still reads full vectors, which is faster than a loop over its lanes. It may read its neighbours' channels, but not past the tensor. So it knows its `window`, the first channel it reads, and which lanes are its own: `lanes` of them, from lane `skip` on.

# %%
#| export fast/plan.py
"""How a layer's work is cut: the table that the kernel reads (ours; chapter 14)."""

from typing import NamedTuple


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


# %% [markdown]
# `top` and `left` are the padding of its group, from chapter 11's `pads`. `weight` is the place of its first weight among the packed ones, and `step` leads to the next tap: the group's number of channels.
#
# By hand, with vectors of four lanes: two groups of 6 and 4 channels, ten in all. Strips end at 4 and 8, which are multiples of four, and at 6, where the first group ends. The last strip begins at channel 8. A vector from there on would end past channel 9, so its window moves back to channel 6, and its own two channels are in lanes 2 and 3.

# %%
#| export fast/plan.py
from mixconv.fast.spec import MixSpec, pads


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


# %%
tiny = MixSpec((6, 4), (3, 5), 1, (1, 1), "symmetric", "none")
for s in cut_strips(tiny, height=8, width=8, lanes=4):
    last = s.window + s.skip + s.lanes - 1
    print(f"channels {last - s.lanes + 1} to {last}: window {s.window}, skip {s.skip}")

# %% [markdown]
# (Pass over `part` here: chapter 15 uses it for a 1×1 layer in groups, whose vectors begin anew at each group. Without it, `part or total` is all channels.)

# %% [markdown]
# **14.1** ★★ *10 minutes, two lines.* Into how many strips are groups of these many channels cut, with vectors of 16?
#
# <details><summary>Hint: the idea</summary>
#
# Count where strips *end*: at the end of each group, and at every multiple of 16. Some of these are the same place.
#
# </details>

# %%
import itertools

from mixconv.teaching import attempt, expect


def count_strips(channels: tuple[int, ...]) -> int:
    raise NotImplementedError


def test_strips(answer) -> None:
    expect(answer, (16, 16), gives=2, why="both groups end at a multiple of 16")
    expect(answer, (8, 8), gives=2, why="a strip ends where its group ends")
    expect(answer, (20, 12), gives=3, why="0 to 15, 16 to 19, 20 to 31")
    expect(answer, (90, 90, 90, 90), gives=26, why="ends at 90, 180, 270, 360 and 22 multiples")


attempt(count_strips, test_strips)


# %% tags=["solution"]
# fold: Solution
def count_strips_solution(channels: tuple[int, ...]) -> int:
    return len(set(itertools.accumulate(channels)) | set(range(16, sum(channels), 16)))


def each_alone(channels: tuple[int, ...]) -> int:
    """cut each group for itself, as if it began at a multiple of 16"""
    return sum(-(-c // 16) for c in channels)


def groups_forgotten(channels: tuple[int, ...]) -> int:
    """cut at multiples of 16 only, though two groups do not share a kernel"""
    return -(-sum(channels) // 16)


attempt(count_strips_solution, test_strips, wrong=[each_alone, groups_forgotten])

# %% [markdown]
# ## Bands, and parts of equal cost
#
# Neighbouring strips read and write the same rows of pixels. Those rows should be in the *second-level cache* still when the next strip comes: larger and slower than the first, a megabyte or two for each core. So an image is worked on in *bands* of rows, few enough for half of a common second-level cache.
#
# The order of the work is: for each image, for each band, for each strip, for each row. Each thread gets a *part* of this sequence. Where there are few strips, bands serve the threads, too: their number is a multiple of the number of parts, so that parts can end where bands do. (The code below makes up to four bands for each part then. That was a guess, and on two threads it brings nothing: layers of 16 and 32 channels took 1 to 6% longer than without. With more threads it was not tried.) <!-- measured: run_operation with TASKS_OF_A_PART = 4 and 0; 112×112 with 3×3, 56×56 with 9×9; two threads, shortest of 250, AVX-512, 2026-11-25 --> But bands must not be too small, since each fetches `kernel - 1` rows that the band above it has fetched before.
#
# By hand: 56 rows of 56 pixels and 240 channels, read and written, are 56 · 112 · 240 · 4 bytes, 6 MB. Bands of at most one MB are six, of 10 rows or less. And for two threads a single strip of 112 rows is cut into eight bands of 14, four for each thread.

# %%
#| export fast/plan.py
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


# %%
print(band_rows(56, 4 * 240 * (56 + 56), strips=15, parts=2), "rows of 56")
print(band_rows(112, 4 * 16 * (112 + 112), strips=1, parts=2), "rows of 112")


# %% [markdown]
# **14.2** ★ *5 minutes, one line.* How many input rows does the kernel fetch for a band of `rows` output rows in the middle of an image? (For 4 rows of a 9×9 kernel it is three times as many as it writes: that is why bands are not made too small.)
#
# <details><summary>Hint: the idea</summary>
#
# The first output row needs a whole window. How many *new* rows does each of the others need?
#
# </details>

# %%
def fetched_rows(rows: int, k: int, stride: int) -> int:
    raise NotImplementedError


def test_fetched(answer) -> None:
    expect(answer, 1, 9, 1, gives=9, why="one window")
    expect(answer, 4, 9, 1, gives=12, why="the first window, and three rows more")
    expect(answer, 4, 5, 2, gives=11, why="the window moves down by two rows")


attempt(fetched_rows, test_fetched)


# %% tags=["solution"]
# fold: Solution
def fetched_rows_solution(rows: int, k: int, stride: int) -> int:
    return (rows - 1) * stride + k


def without_a_ring(rows: int, k: int, stride: int) -> int:
    """fetch every window anew"""
    return rows * k


def without_stride(rows: int, k: int, stride: int) -> int:
    """let the window move by one row, whatever the stride"""
    return rows - 1 + k


attempt(fetched_rows_solution, test_fetched, wrong=[without_a_ring, without_stride])

# %% [markdown]
# A 9×9 strip costs more than a 3×3 strip, so equal numbers of strips would be unfair. What does an output pixel of a strip cost? Its taps, as far as they lie inside the image from top to bottom; reading and writing, more with a stride; and its share of loading the taps. The two constants were chosen so that a unit of cost takes about the same time in every strip of a layer. How well does that hold? One thread, kernels from 3×3 to 13×13, images of 14 to 112 pixels, each alone: a unit took 0.10 to 0.12 ns at stride 1, and 0.12 to 0.18 ns at stride 2. Good enough to share work out; no clock. <!-- measured: each kernel size as a layer of its own, shortest of 15 rounds, AVX-512, 2026-11-25 -->

# %%
#| export fast/plan.py
from collections.abc import Sequence

from mixconv.fast.spec import output_size

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


# %%
wide = MixSpec((48, 48), (3, 11), 1, (1, 1), "symmetric", "none")
for size in (112, 14, 7):
    costs = strip_costs(wide, size, size, cut_strips(wide, size, size, lanes=16))
    print(f"{size}×{size}: 3×3 costs {costs[0]}, 11×11 costs {costs[-1]}")

# %% [markdown]
# Work too small for several threads is one part. (10,000 units of 0.11 ns are 10,000 · 0.11 = 1,100 ns. That waking a thread takes about as long is a guess; the *start* that the next page finds, with Python in it, is a few times that.) Parts are cut where the cost says. So the rows of the work are numbered: row r of strip s is s · 80 + r, if a strip has 80 rows; the strips of the next band, and of the next image, go on from there. A part may begin inside a strip, at a price: its thread must fetch the `kernel - 1` rows above once more. Where the nearer end of the strip is closer than that, the part begins there instead.

# %%
#| export fast/plan.py
WORK_OF_A_THREAD = 10000  # multiply-adds of vectors: for less, waking it costs more


def count_parts(work: int, threads: int) -> int:
    """Into how many parts some work is cut."""
    return max(1, min(threads, work // WORK_OF_A_THREAD))


# %% [markdown]
# All that the kernel is told of a layer, in this order. `band` is how many rows a band has, `bands` how many bands there are, and `ring` how many vectors the largest ring takes.

# %%
#| export fast/plan.py
from collections import namedtuple

Layer = namedtuple(
    "Layer",
    "batch height width channels out_height out_width stride activation "
    "band bands strips parts ring",
)

# %% [markdown]
# By hand: three strips that cost 10, 10 and 20 a row, one image of 80 rows, one band: (10 + 10 + 20) · 80 = 3,200 in all. Two parts of 3,200 / 2 = 1,600: the first takes the two cheap strips, the second the expensive one. Three parts of 1,066⅔: the first takes strip 0, which costs 10 · 80 = 800, and 26 rows of strip 1. The second begins there, at row 106, and ends 533⅓ into strip 2, after 26 of its rows.

# %%
#| export fast/plan.py
import bisect
import itertools


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


# %%
layer = Layer(1, 80, 8, 48, 80, 8, 1, 0, band=80, bands=1, strips=3, parts=2, ring=0)
three = cut_strips(MixSpec((48,), (3,), 1, (1,), "symmetric", "none"), 80, 8, lanes=16)
assert share_out(three, [10, 10, 20], layer) == [0, 160, 240]
share_out(three, [10, 10, 20], layer._replace(parts=3))

# %% [markdown]
# `cost` is what is left to go: first inside the image, then inside its band. With two bands of 40 rows, row r of strip s in band b has the number (3 · b + s) · 40 + r, and each band costs 40 · 40 = 1,600. Three parts again: 1,066⅔ lies in band 0, behind strips 0 and 1, which cost 20 · 40 = 800: 13 rows into strip 2, at 2 · 40 + 13 = 93. And 2,133⅓ is 533⅓ into band 1: behind strip 0, which costs 10 · 40 = 400, 13 rows into strip 1, at (3 + 1) · 40 + 13 = 173.

# %%
two_bands = layer._replace(band=40, bands=2, parts=3)
assert share_out(three, [10, 10, 20], two_bands) == [0, 93, 173, 240]
share_out(three, [10, 10, 20], two_bands._replace(batch=2, parts=2))  # the second image: from 240

# %% [markdown]
# ## The kernel, from its first line to its last
#
# `mixconv/fast/depthwise.cpp` is extracted from the blocks below. It continues chapter 13's `simd.cpp`: `Vec`, `kLanes`, `kTile`, `load`, `store` and `activate` come from there. It plans nothing and allocates nothing: Python hands it a table of integers and a piece of scratch memory. So it has no error to report: no memory that could be missing, no size that nobody has checked. (One thing is left that can go wrong, and it comes with the threads below.)
#
# ```c++
# //| export fast/depthwise.cpp
# // Mixed depthwise convolution, float32, channels last; follows simd.cpp.
# //
# //   y[n, oy, ox, c] = act(bias[c] + sum over ky, kx of
# //       w[ky, kx, c] * x[n, oy * stride + ky - top, ox * stride + kx - left, c])
# //
# // Channels come in groups, each with its own kernel size and padding (top, left). The weights lie as
# // (k, k, channels of the group), one group after another. kernel.py plans the work and brings the
# // memory: here nothing is allocated, and nothing is thrown.
# #include <algorithm>
# #ifdef _OPENMP
# #include <omp.h>
# #else
# #include <thread>
# #endif
#
# namespace {
#
# struct Layer {
#   int64_t batch, height, width, channels, out_height, out_width, stride, activation;
#   int64_t band, bands, strips;  // rows of a band, and how many bands and strips there are
#   int64_t parts, ring;          // shares of the work; vectors of scratch for each
# };
#
# struct Strip {
#   int64_t kernel, top, left;
#   int64_t window;             // the vector's first channel in the tensor
#   int64_t read, skip, lanes;  // lanes to read; the first lane to write, and how many
#   int64_t weight, step;       // of the first channel to write; from a tap to the next
# };
#
# struct Tensors {
#   const float *weight, *bias;
#   float* y;
# };
# ```
#
# `Layer` and `Strip` are the tables from above, entry for entry. `Tensors` are the pointers that come with a call. (The input's is not among them: it belongs to `fetch_row`.)
#
# Next, a strip's vector of a parameter: of its bias, or of one tap. The strip's own first number must land in lane `skip`, and stepping back by `skip` numbers puts it there in one load. Is what lies before still inside the buffer? Yes: each group has at least one weight for each of its channels, so at least `skip` weights lie before, and likewise behind. Only where the whole tensor has fewer channels than a vector, lanes are copied one by one.
#
# ```c++
# //| export fast/depthwise.cpp
# // A vector of a parameter; what comes into lanes that are not written does not matter.
# inline Vec load_own(const float* first, const Strip& s) {
#   if (s.read == kLanes) return load(first - s.skip, kLanes);
#   Vec v{};
#   copy_lanes(reinterpret_cast<float*>(&v) + s.skip, first, int(s.lanes));
#   return v;
# }
# ```
#
# ### The ring
#
# Chapter 13's template parameter again, here of a struct: `Ring<3>` and `Ring<5>` are two types, compiled apart. With the kernel size known, loops over taps can be unrolled, and `iy % K` is cheap.
#
# `pitch` is the length of a row: as many input columns as the tiles of a row of outputs reach, of which `begin` to `end` hold pixels of the image. The rest is zero, and stays zero. Behind the K rows lie the strip's weights.
#
# ```c++
# //| export fast/depthwise.cpp
# template <int K>
# struct Ring {
#   Vec* rows;                     // K rows of `pitch` vectors, then the weights
#   int64_t pitch, begin, end;     // vectors of a row; where the image's columns are in it
#   int64_t next = 0;              // the first input row that is not inside yet
#   Vec* row(int64_t iy) const { return rows + iy % K * pitch; }
#   Vec* taps() const { return rows + K * pitch; }
# };
#
# template <int K, int S, int T>
# Ring<K> open_ring(const Layer& l, const Strip& s, const float* weight, Vec* scratch) {
#   const int64_t columns = (l.out_width + T - 1) / T * T;  // whole tiles
#   const int64_t pitch = (columns - 1) * S + K;
#   Ring<K> ring{scratch, pitch, std::min(s.left, pitch), std::min(s.left + l.width, pitch)};
#   for (int64_t i = 0; i < K * K; ++i) ring.taps()[i] = load_own(weight + s.weight + i * s.step, s);
#   for (int64_t i = 0; i < K; ++i) {  // zeros left and right of the image
#     std::fill(ring.row(i), ring.row(i) + ring.begin, Vec{});
#     std::fill(ring.row(i) + ring.end, ring.row(i) + pitch, Vec{});
#   }
#   return ring;
# }
# ```
#
# ### `fetch_row`: how a row gets into the ring
#
# Here it is copied from the image. `row` is its number in the tensor, all images one below the other, and `count` how many pixels are wanted. Pixels are `channels` numbers apart. The processor's own prefetching does not follow such strides well, so the kernel asks for the row below. `CopyRow` is a struct with a call operator: a function that carries its data, as a Python closure does.
#
# ```c++
# //| export fast/depthwise.cpp
# struct CopyRow {
#   const float* x;
#   void operator()(const Layer& l, const Strip& s, int64_t row, int64_t count, Vec* to) const {
#     const int64_t line = l.width * l.channels;
#     const float* from = x + row * line + s.window;
#     if (s.read == kLanes) {
#       for (int64_t i = 0; i < count; ++i, from += l.channels) {
#         __builtin_prefetch(from + line);  // the row below: a hint, harmless past the last row
#         to[i] = load(from, kLanes);
#       }
#     } else {
#       for (int64_t i = 0; i < count; ++i, from += l.channels) to[i] = load(from, int(s.read));
#     }
#   }
# };
# ```
#
# ### One row of outputs
#
# Chapter 13's inner loop, with a stride: T sums of neighbouring outputs, all in registers. Then, storing: the fast case is a whole tile of whole vectors. Else only the strip's own lanes are written, and nothing beyond the row's end.
#
# ```c++
# //| export fast/depthwise.cpp
# // sums[t] += w[kx] * in[t * S + kx]
# template <int K, int S, int T>
# inline __attribute__((always_inline)) void add_row(Vec (&sums)[T], const Vec* in, const Vec* w) {
# #pragma GCC unroll 16
#   for (int kx = 0; kx < K; ++kx) {
#     const Vec tap = w[kx];
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) sums[t] += tap * in[t * S + kx];
#   }
# }
#
# template <int T>
# inline __attribute__((always_inline)) void store_row(const Vec (&sums)[T], const Layer& l,
#                                                      const Strip& s, float* to, int64_t ox) {
#   if (ox + T <= l.out_width && s.lanes == kLanes) {
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) store(to + (ox + t) * l.channels, sums[t], 0, kLanes);
#   } else {
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t)
#       if (ox + t < l.out_width)
#         store(to + (ox + t) * l.channels, sums[t], int(s.skip), int(s.lanes));
#   }
# }
# ```
#
# And the ring turns. A task is some rows of the output of one image; this computes them for one strip. It is the hand-sized model from above: fetch until the window is full, add up the rows that exist, store. One line is new, the first of the inner `for`: a task may begin in the middle of an image, and a 1×1 kernel at stride 2 skips every second row. What lies above the window is not fetched.
#
# ```c++
# //| export fast/depthwise.cpp
# struct Task {
#   int64_t image, begin, end;  // rows of the output of one image
# };
#
# template <int K, int S, int T, typename FetchRow>
# void convolve_rows(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
#                    const FetchRow& fetch_row, Vec* scratch) {
#   const int64_t first = s.window + s.skip, size = l.out_width * l.channels;
#   Ring<K> ring = open_ring<K, S, T>(l, s, tensors.weight, scratch);
#   const Vec bias = tensors.bias ? load_own(tensors.bias + first, s) : Vec{};
#   for (int64_t oy = task.begin; oy < task.end; ++oy) {
#     const int64_t y0 = oy * S - s.top;
#     for (ring.next = std::max(ring.next, y0); ring.next < std::min(l.height, y0 + K); ++ring.next)
#       fetch_row(l, s, task.image * l.height + ring.next, ring.end - ring.begin,
#                 ring.row(ring.next) + ring.begin);
#     float* to = tensors.y + (task.image * l.out_height + oy) * size + first;
#     for (int64_t ox = 0; ox < l.out_width; ox += T) {
#       Vec sums[T];
# #pragma GCC unroll 16
#       for (int t = 0; t < T; ++t) {
#         sums[t] = bias;
#         __builtin_prefetch(to + (ox + t) * l.channels, 1);  // will be written: fetch it meanwhile
#       }
#       for (int64_t ky = 0; ky < K; ++ky) {
#         const int64_t iy = y0 + ky;
#         if (iy < 0 || iy >= l.height) continue;
#         add_row<K, S, T>(sums, ring.row(iy) + ox * S, ring.taps() + ky * K);
#       }
#       if (l.activation != kNone) activate(sums, l.activation);
#       store_row(sums, l, s, to, ox);
#     }
#   }
# }
# ```
#
# Rows above and below the image are skipped, not multiplied by zero: at 7×7 with a 9×9 kernel that saves a third of the work (counted below). The prefetch is for the output: a cache line that will be written must be fetched first, and that can happen while the sums are made.

# %%
inside = sum(0 <= oy + ky - 4 < 7 for oy in range(7) for ky in range(9))
print(f"{inside} of {7 * 9} rows of taps lie inside the image")


# %% [markdown]
# Seven kernel sizes, two strides and two tiles make 28 versions (half of that where both tiles are 7). The layer picks one. (`[&](…) {…}` is a function without a name that sees the variables around it, a Python `lambda`; `auto` lets the compiler find a type out.)
#
# ```c++
# //| export fast/depthwise.cpp
# template <int K, typename FetchRow>
# void convolve_tiles(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
#                     const FetchRow& fetch_row, Vec* scratch) {
#   const auto columns = [&](int64_t tile) { return (l.out_width + tile - 1) / tile * tile; };
#   const bool wide = columns(kTile) <= columns(kShortTile);  // fewer sums beyond the row's end
#   const auto version = l.stride == 1
#       ? (wide ? convolve_rows<K, 1, kTile, FetchRow> : convolve_rows<K, 1, kShortTile, FetchRow>)
#       : (wide ? convolve_rows<K, 2, kTile, FetchRow> : convolve_rows<K, 2, kShortTile, FetchRow>);
#   version(l, s, task, tensors, fetch_row, scratch);
# }
#
# template <typename FetchRow>
# void convolve(const Layer& l, const Strip& s, const Task& task, const Tensors& tensors,
#               const FetchRow& fetch_row, Vec* scratch) {
#   switch (s.kernel) {
#     case 1: return convolve_tiles<1>(l, s, task, tensors, fetch_row, scratch);
#     case 3: return convolve_tiles<3>(l, s, task, tensors, fetch_row, scratch);
#     case 5: return convolve_tiles<5>(l, s, task, tensors, fetch_row, scratch);
#     case 7: return convolve_tiles<7>(l, s, task, tensors, fetch_row, scratch);
#     case 9: return convolve_tiles<9>(l, s, task, tensors, fetch_row, scratch);
#     case 11: return convolve_tiles<11>(l, s, task, tensors, fetch_row, scratch);
#     case 13: return convolve_tiles<13>(l, s, task, tensors, fetch_row, scratch);
#   }
# }
# ```
#
# ### Tasks and threads
#
# A plan is the whole table that comes from Python: the layer, the beginnings of the parts, the strips. A part is a range of numbered rows, as `share_out` counts them. It is one task for each strip that it touches; the first and the last may be cut.
#
# By hand, with the three strips of 80 rows from above, and the part from 106 to 186. Number 106 is 106 / 80 = 1, remainder 26: row 26 of the first piece after 0, which is strip 1. Its rows go up to 80, so the next number is 160: strip 2, row 0. The part ends at 186, so that task ends at row 26. With several bands or images the pieces simply go on: piece number p is strip p mod 3 of band p / 3, and bands are counted through all images. A last band may be shorter; the numbers that it does not use are empty tasks.
#
# ```c++
# //| export fast/depthwise.cpp
# struct Plan {
#   const Layer& layer;
#   const int64_t* ranges;  // where each part of the work begins, and where the last one ends
#   const Strip* strips;
# };
#
# constexpr int64_t kLayerFields = sizeof(Layer) / sizeof(int64_t);
#
# inline Plan read_plan(const int64_t* table) {
#   const Layer* layer = reinterpret_cast<const Layer*>(table);
#   const int64_t* ranges = table + kLayerFields;
#   return {*layer, ranges, reinterpret_cast<const Strip*>(ranges + layer->parts + 1)};
# }
#
# inline const int64_t* end_of(const Plan& plan) {
#   return reinterpret_cast<const int64_t*>(plan.strips + plan.layer.strips);
# }
#
# template <typename Work>
# void for_each_task(const Plan& plan, int64_t part, const Work& work) {
#   const Layer& l = plan.layer;
#   const int64_t end = plan.ranges[part + 1];
#   for (int64_t at = plan.ranges[part]; at < end;) {
#     const int64_t piece = at / l.band, next = (piece + 1) * l.band;  // a strip of a band
#     const int64_t strip = piece % l.strips, band = piece / l.strips;  // of all images' bands
#     const int64_t first = band % l.bands * l.band;                    // row of the image
#     const int64_t last = first + std::min(end, next) - piece * l.band;
#     work(plan.strips[strip],
#          Task{band / l.bands, first + at % l.band, std::min(last, l.out_height)});
#     at = next;
#   }
# }
# ```

# %% [markdown]
# The same in Python, for the layer that was shared out above:

# %%
def tasks(ranges: list[int], part: int, layer: Layer) -> list[str]:
    at, end, found = ranges[part], ranges[part + 1], []
    while at < end:
        piece = at // layer.band
        next_piece = (piece + 1) * layer.band
        row = at % layer.band
        rows = row, row + min(end, next_piece) - at
        found.append(f"strip {piece % layer.strips}, rows {rows[0]} to {rows[1] - 1}")
        at = next_piece
    return found


ranges = share_out(three, [10, 10, 20], layer._replace(parts=3))
for part in range(3):
    print(f"part {part}:", "; ".join(tasks(ranges, part, layer)))

# %% [markdown]
#
# `#pragma omp parallel` runs the block behind it once on each of so many threads. OpenMP, which PyTorch uses too, keeps its threads from call to call. It may give fewer than were asked for; then a thread takes several parts. Without OpenMP, as with Apple's compiler, plain threads are started. Starting one can fail: what it would have done is then done by the calling thread, and still nothing is thrown.
#
# Here is the one thing that can go wrong. Where the system refuses to start a thread (no memory for its stack, say), GNU's OpenMP does not answer with an error: it ends the process. PyTorch's own loops end in the same way on such a system, with the same words: "Thread creation failed". We could not have caught it.
#
# ```c++
# //| export fast/depthwise.cpp
# // work(part, worker) for every part; two workers never use the same number at the same time.
# template <typename Work>
# void in_parallel(int64_t parts, const Work& work) {
#   if (parts == 1) return work(0, 0);
# #ifdef _OPENMP
# #pragma omp parallel num_threads(int(parts))
#   {
#     const int64_t me = omp_get_thread_num(), count = omp_get_num_threads();  // perhaps fewer
#     for (int64_t part = me; part < parts; part += count) work(part, me);
#   }
# #else
#   constexpr int64_t kMost = 64;
#   std::thread others[kMost];
#   int64_t next = 1;
#   try {
#     for (; next < std::min(parts, kMost); ++next)
#       others[next] = std::thread([&work, next] { work(next, next); });
#   } catch (...) {  // no more threads to be had: the rest is done here
#   }
#   work(0, 0);
#   for (; next < parts; ++next) work(next, 0);
#   for (std::thread& other : others)
#     if (other.joinable()) other.join();
# #endif
# }
# ```
#
# And the functions that Python calls:
#
# ```c++
# //| export fast/depthwise.cpp
# }  // namespace
#
# extern "C" void mixed_depthwise2d(const int64_t* table, const float* x, const float* weight,
#                                   const float* bias, float* y, float* scratch) {
#   const Plan plan = read_plan(table);
#   const Tensors tensors{weight, bias, y};
#   in_parallel(plan.layer.parts, [&](int64_t part, int64_t worker) {
#     Vec* ring = reinterpret_cast<Vec*>(scratch) + worker * plan.layer.ring;
#     for_each_task(plan, part, [&](const Strip& s, const Task& task) {
#       convolve(plan.layer, s, task, tensors, CopyRow{x}, ring);
#     });
#   });
# }
#
# // What kernel.py must agree with, and what it must know.
# extern "C" void depthwise_layout(int64_t* to) {
#   to[0] = kLayerFields, to[1] = sizeof(Strip) / sizeof(int64_t), to[2] = kLanes;
# }
# ```
#
# ## The plan
#
# What is left for Python to compute: room for the rings, with rows of whole tiles (14 is the longest), and the table.
#
# Two threads' rings must not lie side by side. We did not think of this. We measured two threads that were slower than one, and found the cure by moving the rings apart. Our explanation: a ring's rows are a fixed distance apart; the processor notices such steps and fetches ahead; and one step behind the last row lies the next thread's ring, so that the two cores take each other's cache lines away. (The cure was measured, the cause was not.) The gap is never touched, so it costs addresses but no memory.

# %%
#| export fast/plan.py
from mixconv.fast.spec import ACTIVATIONS

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


# %% [markdown]
# The largest ring of a MixNet layer, by hand: 7×7 at stride 2, from 112 pixels to 56. A row has 55 · 2 + 7 = 117 vectors. Seven rows and 49 weights make 7 · 117 + 49 = 868 vectors of 64 bytes, 54 kB: a little more than a first-level cache of 32 or 48 kB. Is that the rule?

# %%
import json
from pathlib import Path

assert ring_size(MixSpec((48,), (7,), 2, (1,), "symmetric", "none"), 112) == 868 + APART
bench = json.loads(Path("../figures/bench.json").read_bytes())
found = {}
for row in (row for row in bench["layers"] if row["batch"] == 1):  # the MixNets' layers
    kernels, count = row["kernel_sizes"], len(row["channels"])
    spec = MixSpec(row["channels"], kernels, row["stride"], (1,) * count, "same", "none")
    name = f"{max(kernels)}×{max(kernels)}, {row['size']} pixels, stride {row['stride']}"
    found[name] = 64 * (ring_size(spec, row["size"]) - APART)
for name, size in sorted(found.items(), key=lambda pair: -pair[1]):
    print(f"{size / 1024:3.0f} kB: {name}")

# %% [markdown]
# Three kinds of layers do not fit 32 kB, and only one does not fit 48 kB. The rest leaves room for the rows that go in and out.
#
# Now a plan. Two parts for a layer of 48 channels at 14×14 pixels, with an 11×11 kernel:

# %%
eleven = MixSpec((48,), (11,), 1, (1,), "symmetric", "none")
strips = cut_strips(eleven, 14, 14, lanes=16)
costs = strip_costs(eleven, 14, 14, strips)
numbers = plan_layer(eleven, (1, 48, 14, 14), strips, costs, parts=2)
layer = Layer(*numbers[:13])
print(layer)
print("parts begin and end at", numbers[13:16])


# %% [markdown]
# Thirteen numbers of the `Layer`, and the beginnings of the parts; the strips follow. The next page takes the plan to the kernel.
#
# ## Exercises
#
# **14.3** ★★★ *15 minutes, two lines.* Design under a budget: a strip's ring and weights shall fit into so many bytes of cache. How many outputs may a row have at most, at stride 1 and with vectors of 16? Whole tiles of 14 only; 0 if not even one fits. Leave the gap between two rings out.
#
# <details><summary>Hint: the equation</summary>
#
# A vector has 64 bytes. The ring has $k$ rows of $\mathrm{columns} + k - 1$ vectors, and the weights are $k^2$ more.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `vectors = budget // 64 - k * k` are left for the ring. How long may each of its k rows be?
#
# </details>

# %%
def widest(k: int, budget: int) -> int:
    raise NotImplementedError


def test_widest(answer) -> None:
    cache = 32 * 1024
    expect(answer, 11, cache, gives=14, why="11 · 24 + 121 vectors are 385; 28 take 539 of 512")
    expect(answer, 3, cache, gives=154, why="3 · 156 + 9 vectors are 477 of 512")
    expect(answer, 13, cache // 2, gives=0, why="one tile takes 507 vectors, and there are 256")
    expect(answer, 5, 64 * (5 * 18 + 25), gives=14, why="one tile, and nothing is left")


attempt(widest, test_widest)


# %% tags=["solution"]
# fold: Solution
def widest_solution(k: int, budget: int) -> int:
    columns = (budget // 64 - k * k) // k - (k - 1)
    return max(0, columns // 14 * 14)


def without_weights(k: int, budget: int) -> int:
    """forget that the weights lie behind the ring"""
    return max(0, (budget // 64 // k - (k - 1)) // 14 * 14)


def without_borders(k: int, budget: int) -> int:
    """forget the k - 1 columns that a row of the ring has beside its outputs"""
    return max(0, (budget // 64 - k * k) // k // 14 * 14)


attempt(widest_solution, test_widest, wrong=[without_weights, without_borders])

# %% [markdown]
# ## Takeaways
# - A ring of k rows holds all that a row of outputs needs; each row is fetched once for a strip of a band.
# - Strips for the lanes, bands for the cache, parts of equal cost for the threads: Python plans them, the kernel only follows.
# - One line of the kernel says where a row comes from: `fetch_row`.
#
# Previous: [13 · A kernel, compiled](13_kernel_in_steps_compiled.ipynb) · Next: [14 · The kernel, called](14_whole_kernel_called.ipynb)
