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
# - say which calls the kernel takes, which it leaves to the split form, and what limits it.
#
# **Know first:** [chapter 12](12_operation.ipynb) and [chapter 13](13_kernel_in_steps.ipynb).
#
# **Time:** 45 minutes to read. Runs in under 40 seconds on two cores, after the kernel has been compiled once.

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), width_ratios=(1.25, 1))


def box(x: float, y: float, row: int, color: str, weight: str = "normal") -> None:
    left.add_patch(plt.Rectangle((x, -y), 0.95, -0.85, color=color, alpha=0.55))
    left.text(x + 0.48, -y - 0.44, str(row), ha="center", va="center", fontweight=weight)


for step in range(3):  # the window of output row oy covers rows oy - 1, oy, oy + 1
    oy, x = step + 1, 3.4 * step
    for row in range(6):
        box(x, row, row, kernel_color(3) if abs(row - oy) <= 1 else "#e4e4e4")
        if abs(row - oy) <= 1:
            box(x + 1.5, row % 3 + 1.2, row, kernel_color(3), "bold" if row > oy else "normal")
    for place, height, text in (
        (0.5, 0.2, "image"),
        (1.98, -1, "ring"),
        (1.2, -6.7, f"output {oy}"),
    ):
        left.text(x + place, height, text, ha="center", fontsize=9)
left.set(xlim=(-0.2, 9.6), ylim=(-7, 0.9), title="a ring of three rows")
left.axis("off")
for begin, end, k in ((0, 20, 3), (20, 40, 5), (40, 56, 7)):
    right.axvspan(begin, end, color=kernel_color(k), alpha=0.3)
    right.text((begin + end) / 2, -1.2, f"{k}×{k}", ha="center", fontsize=9)
right.vlines((16, 20, 32, 40, 48), 0, 56, color="black", lw=0.8)
right.hlines((20, 40), 0, 56, color="black", lw=2)
right.set(xlim=(0, 56), ylim=(56, 0), xlabel="channels: 6 strips", ylabel="rows: 3 bands")
right.set_title("a layer in pieces", pad=16)
show(
    figure,
    "ring_strips_bands.png",
    "Left: for output rows 1, 2 and 3 of a 3×3 kernel, which three rows of the image the ring "
    "holds; each new row takes the place of the oldest. Right: a layer of 56 channels in three "
    "groups, cut into six strips of up to 16 channels and three bands of rows.",
)

# %% [markdown]
# ## A ring of rows, by hand
#
# Chapter 13 copied the padded image into scratch memory, 16 channels at a time. At 56×56 pixels that copy has about 60 · 60 · 64 bytes, 230 kB: several times the first-level cache. But an output row needs only k rows of it. So keep k rows. When the window moves down by one, the new row takes the place of the oldest: row `y` always lies in slot `y % k`.
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
# Each row is fetched once. In the real ring a slot is a row of pixels, each pixel a vector of 16 channels, with zeros to the left and right. The line that puts a row into its slot is called `fetch_row` there. It is the only line of the kernel that chapter 15 exchanges.
#
# ## Strips
#
# The smallest piece of work is a *strip*: up to 16 neighbouring channels of one group, since a vector holds 16 (on some machines 8 or 4) and all its lanes must use the same kernel size. Groups have 20 or 90 channels, so where are they cut?
#
# - A strip ends where its group ends.
# - A strip ends at every multiple of 16 channels *of the tensor*, so that what it writes lies on one cache line. Two threads that write to the same line wait for each other all the time.
#
# A strip of fewer than 16 channels still reads full vectors, which is faster than a loop over its lanes. It may read its neighbours' channels, but not past the tensor. So it knows its `window`, the first channel it reads, and which lanes are its own: `lanes` of them, from lane `skip` on.

# %%
#| export fast/kernel.py
"""The compiled kernel as a form of the operation: its plan and its memory (ours; chapter 14)."""

from typing import NamedTuple

from mixconv.fast.spec import MixSpec, pads


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


# %%
#| export fast/kernel.py
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


# %% [markdown]
# By hand, with vectors of four lanes: two groups of 6 and 4 channels, ten in all. Strips end at 4 and 8, which are multiples of four, and at 6, where the first group ends. The last strip begins at channel 8. A vector from there on would end past channel 9, so its window moves back to channel 6, and its own two channels are in lanes 2 and 3.

# %%
tiny = MixSpec((6, 4), (3, 5), 1, (1, 1), "symmetric", "none")
for s in cut_strips(tiny, height=8, width=8, lanes=4):
    last = s.window + s.skip + s.lanes - 1
    print(f"channels {last - s.lanes + 1} to {last}: window {s.window}, skip {s.skip}")

# %% [markdown]
# ## Bands, and parts of equal cost
#
# Neighbouring strips read and write the same rows of pixels. Those rows should be in the second-level cache still when the next strip comes. So an image is worked on in *bands* of rows, few enough for half of a common second-level cache. Not too few: each band fetches `kernel - 1` rows that the band above it has fetched before.
#
# The order of the work is: for each image, for each band, for each strip, for each row. Threads get *parts* of this sequence. A 9×9 strip costs more than a 3×3 strip, so equal numbers of strips would be unfair. The cost of one output pixel of a strip, in multiply-adds of vectors: its taps, and `COPY_COST` for reading and writing.
#
# Number the rows of the work from 0 on. A part may begin inside a strip, at a price: its thread must fetch the `kernel - 1` rows above once more. Where the nearer end of the strip is closer than that, the part begins there instead.

# %%
#| export fast/kernel.py
import bisect
import itertools
from collections import namedtuple
from collections.abc import Sequence

BAND_BYTES = 1 << 20  # rows worked on: half of a common second-level cache


def band_rows(out_height: int, row_bytes: int) -> int:
    """Rows of a band: as many as the cache holds, but not so few that most are read twice."""
    return max(1, min(out_height, max(4, BAND_BYTES // max(1, row_bytes))))


COPY_COST = 16  # of reading a pixel and writing an output, in multiply-adds of a vector
WORK_OF_A_THREAD = 10000  # multiply-adds of vectors: for less, waking it costs more


def count_parts(work: int, threads: int) -> int:
    """Into how many parts some work is cut."""
    return max(1, min(threads, work // WORK_OF_A_THREAD))


Layer = namedtuple(
    "Layer",
    "batch height width channels out_height out_width stride activation "
    "band bands strips parts ring",
)


# %%
#| export fast/kernel.py
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


# %% [markdown]
# `Layer` is all that the kernel is told of a layer, in this order. By hand: three strips that cost 10, 10 and 20 a row, one image of 80 rows, one band: 3,200 in all. Two parts of 1,600: the first takes the two cheap strips, the second the expensive one. Three parts of 1,066⅔: the first takes strip 0, which costs 800, and 26 rows of strip 1. The second begins there, at row 106, and ends 533⅓ into strip 2, after 26 of its rows.

# %%
layer = Layer(1, 80, 8, 48, 80, 8, 1, 0, band=80, bands=1, strips=3, parts=2, ring=0)
three = cut_strips(MixSpec((48,), (3,), 1, (1,), "symmetric", "none"), 80, 8, lanes=16)
assert share_out(three, [10, 10, 20], layer) == [0, 160, 240]
share_out(three, [10, 10, 20], layer._replace(parts=3))

# %% [markdown]
# ## The kernel, from its first line to its last
#
# `mixconv/fast/depthwise.cpp` is extracted from the blocks below. It continues chapter 13's `simd.cpp`: `Vec`, `kLanes`, `kTile`, `load`, `store` and `activate` come from there. It plans nothing and allocates nothing: Python hands it a table of integers and a piece of scratch memory. So nothing in it can fail.
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
# A *template* is code with a blank that the compiler fills in: `Ring<3>` and `Ring<5>` are two types, compiled apart. With the kernel size known, loops over taps can be unrolled, and `iy % K` is cheap.
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
# And the ring turns. A task is some rows of the output of one image; this computes them for one strip. It is the hand-sized model from above: fetch until the window is full, add up the rows that exist, store.
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
# Rows above and below the image are skipped, not multiplied by zero: at 7×7 with a 9×9 kernel that saves a third of the work. The prefetch is for the output: a cache line that will be written must be fetched first, and that can happen while the sums are made.
#
# Seven kernel sizes, two strides and two tiles make 28 versions. The layer picks one:
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
#     const int64_t number = at / l.band, strip = number % l.strips, band = number / l.strips;
#     const int64_t first = band % l.bands * l.band, next = (number + 1) * l.band;
#     const int64_t last = first + std::min(end, next) - number * l.band;
#     work(plan.strips[strip],
#          Task{band / l.bands, first + at % l.band, std::min(last, l.out_height)});
#     at = next;
#   }
# }
# ```
#
# With OpenMP, the threads are those of PyTorch's own pool. OpenMP may give fewer than were asked for; then a thread takes several parts. Without OpenMP, as with Apple's compiler, plain threads are started. Starting one can fail: what it would have done is then done by the calling thread, and still nothing is thrown.
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
# ## The call from Python
#
# Two tables on either side of a language border drift apart one day. So the library says how many numbers it takes for a `Layer` and for a `Strip`, and a disagreement is an error at once, not a wrong result later.

# %%
#| export fast/kernel.py

import ctypes
from typing import Any

from mixconv.fast.native import load_library

KERNEL_SIZES = (1, 3, 5, 7, 9, 11, 13)  # for which there is compiled code
SOURCES = ("simd.cpp", "depthwise.cpp")


def load_kernel() -> Any:
    """The kernel's library, compiled at first use; None where it cannot be."""
    library = load_library(*SOURCES)
    if library is not None:
        library.mixed_depthwise2d.argtypes = [ctypes.c_void_p] * 6
        library.mixed_depthwise2d.restype = None
    return library


def count_lanes(library: Any) -> int:
    """Numbers in a vector of a library with `depthwise.cpp` in it.

    Raises:
        RuntimeError: if its tables are not those of this module.
    """
    answer = (ctypes.c_int64 * 3)()
    library.depthwise_layout(answer)
    if answer[:2] != [len(Layer._fields), len(Strip._fields)]:
        raise RuntimeError(f"depthwise.cpp and kernel.py disagree about their tables: {[*answer]}")
    return int(answer[2])


# %% [markdown]
# Room for the ring, with rows of whole tiles (14 is the longest), and a layer's whole plan:

# %%
#| export fast/kernel.py

from mixconv.fast.spec import ACTIVATIONS, output_size


def round_up(value: int, to: int) -> int:
    """The next multiple."""
    return -(-value // to) * to


def ring_size(spec: MixSpec, width: int) -> int:
    """Vectors that the largest ring of a layer takes at most, and the weights behind it."""
    columns = round_up(output_size(width, spec.stride), 14)
    return max(k * ((columns - 1) * spec.stride + k) + k * k for k in spec.kernel_sizes)


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
    band = band_rows(rows, 4 * (spec.stride * width * pixel + columns * channels))
    layer = Layer(
        batch, height, width, channels, rows, columns, spec.stride, activation,
        band, -(-rows // band), len(strips), parts, ring_size(spec, width),
    )  # fmt: skip
    return [*layer, *share_out(strips, costs, layer), *itertools.chain(*strips)]


# %% [markdown]
# Fresh memory costs more than the work done in it. So each thread of Python's keeps its scratch memory from call to call, unless it is very large.

# %%
#| export fast/kernel.py

import threading

import torch
from torch import Tensor

KEPT_NUMBERS = 1 << 22  # of scratch, for each part, that stay from call to call: 16 MB
MOST_NUMBERS = 1 << 28  # that a call may ask for: 1 GB


class _Memory(threading.local):
    kept = torch.empty(0, dtype=torch.float32, device="cpu")


_memory = _Memory()


def scratch(count: int, parts: int) -> Tensor:
    """At least so many float32 numbers to write to, this thread's own; kept if not too large."""
    memory = _memory.kept
    if memory.numel() < count:
        memory = torch.empty(count, dtype=torch.float32, device="cpu")
        if count <= parts * KEPT_NUMBERS:
            _memory.kept = memory
    return memory


# %% [markdown]
# ## What the kernel declines
#
# Chapter 12: a form answers with its reasons, and when there are any, the split form computes. The kernel declines what it has no compiled version for. Dilation and stride 3 could be had with loops whose bounds are known only at run time. But no MixNet has them, and slow code for rare cases is what the split form is for. Sizes are checked here, too, before the call. Whether the kernel can be compiled is asked last, if nothing else speaks against it.

# %%
#| export fast/kernel.py

from mixconv.fast.forms import Call
from mixconv.fast.native import why_no_library


def why_not(spec: MixSpec, dtype: torch.dtype, numbers: int) -> list[str]:
    """Reasons why there is no compiled code for a layer, a type, or so much scratch memory."""
    dilations, sizes = set(spec.dilations) - {1}, set(spec.kernel_sizes) - {*KERNEL_SIZES}
    found = {
        f"only float32, not {dtype}": dtype != torch.float32,
        f"only strides 1 and 2, not {spec.stride}": spec.stride > 2,
        f"no dilation, not {sorted(dilations)}": dilations,
        f"only kernel sizes {KERNEL_SIZES}, not {sorted(sizes)}": sizes,
        f"{numbers >> 18} MB of scratch, the most is {MOST_NUMBERS >> 18}": numbers > MOST_NUMBERS,
    }
    return [reason for reason, holds in found.items() if holds]


class KernelForm:
    """The compiled kernel: float32 on a CPU, output in channels_last."""

    name = "kernel"

    def declines(self, call: Call) -> list[str]:
        """Why this form cannot take the call; nothing if it can."""
        ring = 16 * ring_size(call.spec, call.sizes[3])  # 16: the most on any machine
        reasons = why_not(call.spec, call.dtype, call.threads * ring)
        if not reasons and load_kernel() is None:
            reasons.append(f"no compiled kernel: {why_no_library(*SOURCES)}")
        return reasons


# %%
#| export fast/kernel.py

from mixconv.fast.forms import Runner
from mixconv.fast.native import kernel_threads


class KernelForm(KernelForm):
    def prepare(self, call: Call) -> Runner:
        """What computes such calls; the plan is made here, once."""
        library, spec = load_kernel(), call.spec
        batch, channels, height, width = call.sizes
        rows, columns = output_size(height, spec.stride), output_size(width, spec.stride)
        lanes = count_lanes(library)
        strips = cut_strips(spec, height, width, lanes)
        costs = [strip.kernel**2 + COPY_COST for strip in strips]
        threads = min(call.threads, kernel_threads())
        parts = count_parts(batch * rows * columns * sum(costs), threads)
        numbers = plan_layer(spec, call.sizes, strips, costs, parts)
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        needed = parts * ring_size(spec, width) * lanes
        out = batch, channels, rows, columns
        return _make_runner(library.mixed_depthwise2d, table, out, needed, parts)


# %% [markdown]
# What is left to do in each call: make sure of the layout, ask for an output, give six addresses away. `ctypes` lets go of Python's lock while the kernel runs.

# %%
#| export fast/kernel.py

import os

from mixconv.fast.operation import FORMS


def last_strides(size: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor `(N, C, H, W)` in channels_last."""
    _, channels, height, width = size
    return height * width * channels, 1, width * channels, channels


def _make_runner(
    function: Any, table: Any, size: tuple[int, ...], needed: int, parts: int
) -> Runner:
    last, address, strides = torch.channels_last, ctypes.addressof, last_strides(size)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(memory_format=last), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, memory = x.new_empty_strided(size, strides), scratch(needed, parts)
        function(
            address(table), x.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), memory.data_ptr(),
        )  # fmt: skip
        return y

    return run


FORMS.add("cpu", KernelForm())

if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=FORMS.forget)

# %% [markdown]
# Which calls does it take? A layer of 20 channels, some changes of it, and a row of thirty million pixels, which is described without being made:

# %%
from mixconv.fast.operation import describe_call
from mixconv.fast.spec import check_spec

plain = MixSpec((12, 8), (3, 5), 1, (1, 1), "symmetric", "none")
same = plain._replace(kernel_sizes=(1, 3), stride=2, padding="same")
cases = {
    "as it is": plain,
    "1×1 and 3×3, stride 2, SAME": same,
    "stride 3": plain._replace(stride=3),
}
cases |= {
    "dilated": plain._replace(dilations=(1, 2)),
    "15×15": plain._replace(kernel_sizes=(3, 15)),
}
for name, spec in (cases | {"a long row": plain}).items():
    x = torch.zeros(1).expand(1, 20, 1, 30_000_000 if name == "a long row" else 9)
    call = describe_call(x, torch.zeros(check_spec(spec)[1]), None, spec)._replace(threads=1)
    print(f"{name}: {'; '.join(FORMS.reasons(call)['kernel']) or 'taken'}")

# %% [markdown]
# ## Equal to the split form
#
# Random layers: kernels 1 to 13, both strides and paddings, sizes from 1 to 40, channels that are no multiple of anything, one to three threads.

# %% tags=["drawing"]
import random

from mixconv.fast.operation import run_operation
from mixconv.fast.spec import split_form


def random_case(seed: int):
    """A layer, and tensors for it."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kernels = tuple(rng.choice(KERNEL_SIZES) for _ in range(rng.randint(1, 4)))
    channels = tuple(rng.randint(1, 40) for _ in kernels)
    kind = rng.choice((1, 2)), (1,) * len(kernels), rng.choice(("symmetric", "same"))
    spec = MixSpec(channels, kernels, *kind, rng.choice(ACTIVATIONS))
    sizes = (rng.randint(1, 3), sum(channels), rng.randint(1, 40), rng.randint(1, 40))
    shapes = sizes, (check_spec(spec)[1],), (sum(channels),)
    return spec, [torch.randn(shape, generator=generator) / 4 for shape in shapes]


threads = torch.get_num_threads()
for seed in range(120):
    spec, tensors = random_case(seed)
    torch.set_num_threads(1 + seed % 3)
    y, wanted = run_operation(*tensors, spec), split_form(*tensors, spec)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4, msg=str(spec))
torch.set_num_threads(threads)
print("equal: 120 layers")

# %% [markdown]
# Forward *and* gradient: the gradient's formulas are chapter 12's, but the outputs, and the sums before the activation, come from the kernel now.

# %%
from mixconv.teaching import check_rewrite

mixed = MixSpec((20, 13), (3, 7), 2, (1, 1), "same", "silu")
check_rewrite(
    lambda *t: split_form(*t, mixed),
    lambda *t: run_operation(*t, mixed),
    *(torch.randn(2, 33, 15, 14), torch.randn(check_spec(mixed)[1]) / 5, torch.randn(33)),
    what="split form and kernel",
)

# %% [markdown]
# ## What limits it
#
# `make bench` times every depthwise layer of the three MixNets and stores the times in `figures/bench.json`, next to the layer's *roofline* time from chapter 11: its multiply-adds at the machine's peak, or a copy of as many bytes, whichever takes longer. How near does the kernel come?

# %% tags=["drawing"]
import json
from pathlib import Path

rows = json.loads(Path("../figures/bench.json").read_text())["layers"]
batches = sorted({row["batch"] for row in rows})
sizes = sorted({row["size"] for row in rows}, reverse=True)
figure, panels = plt.subplots(1, len(batches), figsize=(8, 2.9), sharey=True)
for axis, batch in zip(panels, batches, strict=True):
    for row in (row for row in rows if row["batch"] == batch):
        ratio = row["seconds"]["fused"] / row["seconds_roofline"]
        color = kernel_color(max(row["kernel_sizes"]))
        place = sizes.index(row["size"]) + 0.1 * (row["stride"] - 1.5)
        axis.plot(place, ratio, "o" if row["stride"] == 1 else "^", ms=5, color=color)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(title=f"batch {batch}", xlabel="height = width")
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
panels[0].set(ylabel="time / roofline's time", ylim=(0, None))
panels[0].text(0, 0.85, "roofline", fontsize=8, va="top")
show(
    figure,
    "kernel_over_roofline.png",
    "How many times as long as its roofline each depthwise layer of the MixNets takes, by image "
    "size and batch; round markers for stride 1, triangles for stride 2, coloured by the largest "
    "kernel.",
)

# %% [markdown]
# Round: stride 1; triangles: stride 2; the colour is that of the largest kernel. In words:

# %%
import statistics


def over_roof(batch: int, size: int) -> float:
    chosen = [r for r in rows if (r["batch"], r["size"]) == (batch, size)]
    return statistics.geometric_mean(r["seconds"]["fused"] / r["seconds_roofline"] for r in chosen)


for batch in batches:
    best, *_, worst = sorted((over_roof(batch, size), size) for size in sizes)
    print(f"batch {batch}: {best[0]:.1f} times the roofline's time at {best[1]}×{best[1]}, "
          f"{worst[0]:.1f} times at {worst[1]}×{worst[1]}")  # fmt: skip

# %% [markdown]
# What the roofline does not know:
#
# - **The start.** A small layer is over in tens of microseconds. Some of these are Python, and waking the other threads.
# - **The ring.** Each pixel is read, written into the ring, and read again for each tap. With small kernels that is as much work as the sums.
# - **Strides.** A strip reads 64 bytes of each pixel and jumps over the rest, and a core can wait for only so many cache lines at a time. At stride 2, four pixels are read for each one written.
# - **Fresh memory.** The system hands out a large output page by page, on first touch.
#
# Tried, and not worth it: reading several neighbouring strips in one pass at 112×112 (better where pixels are a multiple of 256 bytes apart, worse elsewhere, since the rings no longer fit the cache); stores that go around the cache; tiles of 28 outputs (registers run out).
#
# A block of MixNet has five other steps that read or write the same tensor. Chapter 15 does them in the same pass.
#
# ## Exercises
#
# **14.1** Into how many strips are groups of these many channels cut, with vectors of 16?

# %%
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
def count_strips_solution(channels: tuple[int, ...]) -> int:
    return len(set(itertools.accumulate(channels)) | set(range(16, sum(channels), 16)))


def each_alone(channels):
    """cut each group for itself, as if it began at a multiple of 16"""
    return sum(-(-c // 16) for c in channels)


attempt(count_strips_solution, test_strips, wrong=[each_alone])


# %% [markdown]
# **14.2** A band needs input rows. How many does the kernel fetch for `rows` output rows in the middle of an image? (For 4 rows of a 9×9 kernel it is three times as many as it writes: that is why bands are not made too small.)

# %%
def fetched_rows(rows: int, k: int, stride: int) -> int:
    raise NotImplementedError


def test_fetched(answer) -> None:
    expect(answer, 4, 9, 1, gives=12, why="the first window, and three rows more")
    expect(answer, 4, 5, 2, gives=11, why="the window moves down by two rows")


attempt(fetched_rows, test_fetched)


# %% tags=["solution"]
def fetched_rows_solution(rows: int, k: int, stride: int) -> int:
    return (rows - 1) * stride + k


def without_a_ring(rows, k, stride):
    """fetch every window anew"""
    return rows * k


attempt(fetched_rows_solution, test_fetched, wrong=[without_a_ring])

# %% [markdown]
# ## Takeaways
# - A ring of k rows holds all that a row of outputs needs; each row is fetched once.
# - Strips for the lanes, bands for the cache, parts of equal cost for the threads: Python plans them once for each kind of call.
# - A kernel that allocates nothing cannot fail; whoever calls it must have checked everything before.
# - What has no compiled version is declined with a reason, and the split form computes.
#
# Previous: [13 · A kernel in steps](13_kernel_in_steps.ipynb) · Next: [15 · A block in one pass](15_block_in_one_pass.ipynb)
