# %% [markdown]
# # 15 · A block in one pass
#
# Chapter 14's kernel has one line that says where a row comes from. What if the row is computed there, and never written to memory?
#
# The picture below shows a block in one pass. The narrow input is read once for each strip. (The page before counts it once. It counts what must come from memory: the other strips find the rows in the cache.) Sixteen expanded channels of a few rows exist in the ring, and nowhere else. The wide tensor is written once and read once; its means become the gate, and the gate goes into the projection's weights.
#
# **You will be able to**
# - follow a block through the kernel: expansion into the ring, sums for the gate, projection;
# - say why the wide tensor is still there, and what it would take to lose it;
# - tell from measurements what one pass buys a whole network.
#
# **Know first:** [chapter 14](14_whole_kernel.ipynb), and the page before this one.
#
# **Time:** 25 minutes to read. Runs in under 60 seconds on two cores, after the kernel has been compiled once. It is the second of two pages, after [Bytes of a block](15_block_bytes.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
import logging

import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

logging.getLogger("mixconv").setLevel(logging.ERROR)  # a kernel may be compiled below
boxes = {
    "x\n40 channels": (0, 0.8, 1, 0.6, "#d7e3ee"),
    "ring:\nk rows, 16\nchannels": (2.3, 0.8, 0.9, 0.6, "#f3d9b8"),
    "wide tensor\n240 channels": (4.9, 0.8, 1.1, 1.4, "#d7e3ee"),
    "y\n40 channels": (8.0, 0.8, 1, 0.6, "#d7e3ee"),
    "project:\nweights": (6.55, 0.8, 0.9, 0.6, "#e3e3e3"),
    "gate": (6.5, 2.2, 1, 0.45, "#f3d9b8"),
}
arrows = {
    "expand (fetch_row)": ((1.05, 0.8), (2.25, 0.8), (1.65, 0.9)),
    "depthwise": ((3.25, 0.8), (4.85, 0.8), (4.05, 0.9)),
    "": ((6.05, 0.8), (6.5, 0.8), (6.2, 0.9)),
    " ": ((7.5, 0.8), (7.95, 0.8), (7.6, 0.9)),
    "sums of rows": ((5.6, 1.55), (6.45, 2.2), (5.4, 2.0)),
    "times": ((7.0, 1.95), (7.0, 1.15), (7.3, 1.45)),
}
legend = {"a whole map": "#d7e3ee", "scratch, in the cache": "#f3d9b8", "weights": "#e3e3e3"}

# %% tags=["drawing"]
# fold: The code that draws this
use_style()
figure, axis = plt.subplots(figsize=(8, 2.6))
for text, (x, y, width, height, color) in boxes.items():
    axis.add_patch(plt.Rectangle((x, y - height / 2), width, height, color=color))
    axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)
for text, (begin, end, place) in arrows.items():
    axis.annotate("", end, begin, arrowprops={"arrowstyle": "->", "lw": 1.2})
    axis.text(*place, text, ha="center", va="bottom", fontsize=8)
for place, (label, color) in enumerate(legend.items()):
    axis.add_patch(plt.Rectangle((0, 2.25 - 0.28 * place), 0.25, 0.18, color=color))
    axis.text(0.35, 2.34 - 0.28 * place, label, va="center", fontsize=8)
axis.set(xlim=(-0.1, 9), ylim=(0, 2.5))
axis.axis("off")
show(
    figure,
    "block_in_one_pass.png",
    "A block's way through memory: the narrow input is expanded into a ring of a few rows of 16 "
    "channels, the depthwise layer writes the wide tensor once, sums of its rows become the gate, "
    "and the projection reads the wide tensor once, its weights multiplied by the gate.",
    caption="One of the two wide tensors is never in memory: a ring holds 16 channels of it.",
)

# %% [markdown]
# ## The block's kernel
#
# `mixconv/fast/inverted_residual.cpp` continues chapter 14's `depthwise.cpp`. First a 1×1 layer, and the inner loop. It is chapter 13's once more: sums that do not wait for one another, here over inputs instead of taps. One vector of weights, T pixels' inputs, T sums. With `V = 2`, two vectors of outputs share each input. (`struct Pointwise : PointSizes` has all that `PointSizes` has, and more; only the sizes come from Python's table.) The gate is multiplied into each vector of weights as it is loaded: `V` products, where the inputs would take `T`.
#
# ```c++
# //| export fast/inverted_residual.cpp
# // A whole inverted residual block, image by image; follows simd.cpp and depthwise.cpp. The ring is
# // filled with rows of the expansion, the depthwise layer writes one image's wide tensor, and a gate
# // and the projection read it. block_kernel.py plans the work and brings the memory.
# namespace {
#
# constexpr int kPanel = 16;  // outputs of a 1x1 convolution whose weights lie together
#
# // A 1x1 convolution in equal groups of channels. Weights: for each group, for each kPanel of its
# // outputs, (inputs of the group, kPanel), with zeros for outputs that are not there.
# struct PointSizes {
#   int64_t inputs, outputs, groups, activation;  // 0 inputs: there is no such layer
# };
#
# struct Pointwise : PointSizes {
#   const float *weight, *bias;
#   int64_t group_inputs() const { return inputs / groups; }
#   int64_t group_outputs() const { return outputs / groups; }
#   const float* panel(int64_t group, int64_t c) const {  // of the group's outputs from c on
#     const int64_t panels = (group_outputs() + kPanel - 1) / kPanel;
#     return weight + (group * panels + c / kPanel) * group_inputs() * kPanel + c % kPanel;
#   }
# };
#
# // sums[v * T + t] += weights of vector v * x[t * pixel + i], over i
# template <int V, int T>
# inline __attribute__((always_inline)) void multiply(Vec (&sums)[V * T], const float* x,
#                                                     int64_t pixel, const float* panel, int64_t n,
#                                                     const float* gate) {
#   for (int64_t i = 0; i < n; ++i, panel += kPanel) {
#     Vec weight[V];
# #pragma GCC unroll 16
#     for (int v = 0; v < V; ++v) {
#       // The second vector: with 16 lanes of the next panel, with fewer the next part of this one.
#       const int64_t next_panels = v * kLanes / kPanel * n * kPanel;
#       weight[v] = load(panel + next_panels + v * kLanes % kPanel, kLanes);
#       if (gate) weight[v] *= gate[i];
#     }
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) {
#       const float input = x[t * pixel + i];
# #pragma GCC unroll 16
#       for (int v = 0; v < V; ++v) sums[v * T + t] += weight[v] * input;
#     }
#   }
# }
# ```
#
# ### Expansion into the ring
#
# Here is the other `fetch_row`: a row of pixels, of each 16 expanded channels. `Source` says where a strip's inputs lie in a pixel, and where its weights begin. The last tile of a row moves back so as to end where the row ends; some pixels are then computed twice, with the same result.
#
# ```c++
# //| export fast/inverted_residual.cpp
# struct Source {
#   int64_t input, panel;  // a strip's first input of a pixel; where its weights begin
# };
#
# template <int T>
# void expand_pixels(const Pointwise& p, const Strip& s, const Source& source, const float* x,
#                    int64_t count, Vec* to) {
#   const Vec bias = load_own(p.bias + s.window + s.skip, s);
#   for (int64_t at = 0; at < count; at += T) {
#     const int64_t from = std::min(at, count - T);
#     Vec sums[T];
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) sums[t] = bias;
#     multiply<1, T>(sums, x + from * p.inputs, p.inputs, p.weight + source.panel, p.group_inputs(),
#                    nullptr);
#     if (p.activation != kNone) activate(sums, p.activation);
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) to[from + t] = sums[t];
#   }
# }
#
# struct ExpandRow {
#   const Pointwise& expand;
#   const float* x;
#   const Strip* strips;
#   const Source* sources;  // of each strip
#   void operator()(const Layer& l, const Strip& s, int64_t row, int64_t count, Vec* to) const {
#     const Source& source = sources[&s - strips];  // the strip's number: how far from the first
#     const float* from = x + row * l.width * expand.inputs + source.input;
#     if (count >= kTile) expand_pixels<kTile>(expand, s, source, from, count, to);
#     else if (count >= kShortTile) expand_pixels<kShortTile>(expand, s, source, from, count, to);
#     else expand_pixels<1>(expand, s, source, from, count, to);
#   }
# };
# ```
#
# ### Projection
#
# The other 1×1 convolutions of a block read a tensor and write one: the projection, and the gate's two, whose only "pixel" is the means. A tile is 7 pixels by two vectors of outputs: 7 · 2 = 14 sums. Threads share the pixels in chunks, and where these are few, the outputs.
#
# ```c++
# //| export fast/inverted_residual.cpp
# constexpr int kVectors = kTile == 14 ? 2 : 1;  // vectors of outputs in the inner loop
# constexpr int64_t kPointTile = 7, kPointChunk = 14 * kPointTile;  // pixels
#
# struct Projection {  // what a 1x1 convolution reads and writes; gate and residual may be null
#   const Pointwise& point;
#   const float *x, *gate, *residual;
#   float* y;
# };
#
# template <int V, int T>
# void point_tile(const Projection& q, int64_t pixel, int64_t group, int64_t c) {
#   const Pointwise& p = q.point;
#   const int64_t n = p.group_inputs(), first = group * p.group_outputs() + c;
#   const auto lanes = [&](int v) {
#     return int(std::min<int64_t>(kLanes, p.group_outputs() - c - v * kLanes));
#   };
#   Vec sums[V * T];
# #pragma GCC unroll 16
#   for (int i = 0; i < V * T; ++i) sums[i] = load(p.bias + first + i / T * kLanes, lanes(i / T));
#   const float *x = q.x + pixel * p.inputs + group * n, *panel = p.panel(group, c);
#   if (q.gate) multiply<V, T>(sums, x, p.inputs, panel, n, q.gate + group * n);
#   else multiply<V, T>(sums, x, p.inputs, panel, n, nullptr);
#   if (p.activation != kNone) activate(sums, p.activation);
# #pragma GCC unroll 16
#   for (int i = 0; i < V * T; ++i) {
#     const int64_t at = (pixel + i % T) * p.outputs + first + i / T * kLanes;
#     if (q.residual) sums[i] += load(q.residual + at, lanes(i / T));
#     store(q.y + at, sums[i], 0, lanes(i / T));
#   }
# }
#
# template <int V, int T>
# void point_pixels(const Projection& q, int64_t begin, int64_t end, int64_t group, int64_t c) {
#   for (int64_t pixel = begin; pixel < end; pixel += T)
#     point_tile<V, T>(q, std::min(pixel, end - T), group, c);
# }
#
# void project(const Projection& q, int64_t pixels, int64_t part, int64_t parts) {
#   const Pointwise& p = q.point;
#   const int64_t step = kVectors * kLanes, columns = (p.group_outputs() + step - 1) / step;
#   const int64_t each = columns * p.groups, chunks = (pixels + kPointChunk - 1) / kPointChunk;
#   const int64_t tasks = chunks * each;
#   for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
#     const int64_t begin = task / each * kPointChunk, end = std::min(pixels, begin + kPointChunk);
#     const int64_t group = task % each / columns, c = task % columns * step;
#     const bool several = p.group_outputs() - c > (kVectors - 1) * kLanes;
#     const auto compute = end - begin >= kPointTile
#         ? (several ? point_pixels<kVectors, kPointTile> : point_pixels<1, kPointTile>)
#         : (several ? point_pixels<kVectors, 1> : point_pixels<1, 1>);
#     compute(q, begin, end, group, c);
#   }
# }
# ```
#
# ### Sums for the gate
#
# When a task is done, its rows are added up, channel by channel. They were written a moment ago and are in the cache still. Each part of the work has sums of its own, so no thread waits for another.
#
# ```c++
# //| export fast/inverted_residual.cpp
# void add_to_sums(const Layer& l, const Strip& s, const Task& task, const float* y, float* sums) {
#   const int64_t first = s.window + s.skip, end = task.end * l.out_width;
#   Vec total = load(sums + first, int(s.lanes));
#   for (int64_t pixel = task.begin * l.out_width; pixel < end; ++pixel)
#     total += load(y + pixel * l.channels + first, int(s.lanes));
#   store(sums + first, total, 0, int(s.lanes));
# }
#
# template <typename FetchRow>
# void run_wide(const Plan& plan, const Tensors& tensors, const FetchRow& fetch_row, Vec* rings,
#               float* sums) {
#   const Layer& l = plan.layer;
#   in_parallel(l.parts, [&](int64_t part, int64_t worker) {
#     float* own = sums ? sums + part * l.channels : nullptr;
#     if (own) std::fill(own, own + l.channels, 0.0f);
#     for_each_task(plan, part, [&](const Strip& s, const Task& task) {
#       convolve(l, s, task, tensors, fetch_row, rings + worker * l.ring);
#       if (own) add_to_sums(l, s, task, tensors.y, own);
#     });
#   });
# }
# ```
#
# ### An image, and all images
#
# What Python tells of a block, and what comes with a call. The gate: means from the parts' sums, then two products so small that one thread makes them while the others wait. The scratch memory holds rings, the wide tensor, the gate and the sums, one behind the other. In `run_image`, and only there, it is decided which `fetch_row` the depthwise kernel is compiled with.
#
# ```c++
# //| export fast/inverted_residual.cpp
# struct BlockSizes {
#   int64_t images, apart, workers;  // the first `apart` images: each worker computes its own
#   int64_t pixel, residual;         // numbers of x in a pixel; whether x is added to the result
#   int64_t wide, gate, share;       // memory: for a wide tensor, a gate, and a worker apart
#   PointSizes expand, squeeze, excite, project;
# };
#
# struct Block {
#   const BlockSizes& sizes;
#   Pointwise expand, squeeze, excite, project;
#   const float *weight, *bias;  // of the depthwise layer
#   const Source* sources;
#   const float* x;
#   float* y;
# };
#
# void find_gate(const Block& b, const Layer& l, const float* sums, float* gate) {
#   float *means = gate + l.channels, *squeezed = means + l.channels;
#   for (int64_t c = 0; c < l.channels; ++c) {
#     float sum = 0;
#     for (int64_t part = 0; part < l.parts; ++part) sum += sums[part * l.channels + c];
#     means[c] = sum / float(l.out_height * l.out_width);
#   }
#   project({b.squeeze, means, nullptr, nullptr, squeezed}, 1, 0, 1);
#   project({b.excite, squeezed, nullptr, nullptr, gate}, 1, 0, 1);
# }
#
# void run_image(const Block& b, const Plan& plan, int64_t image, float* memory) {
#   const Layer& l = plan.layer;
#   const int64_t pixels = l.out_height * l.out_width;
#   const float* x = b.x + image * l.height * l.width * b.sizes.pixel;
#   float* y = b.y + image * pixels * b.project.outputs;
#   float* wide = memory + l.parts * l.ring * kLanes;
#   float* gate = b.squeeze.inputs ? wide + b.sizes.wide : nullptr;
#   float* sums = gate ? gate + b.sizes.gate : nullptr;
#   const Tensors tensors{b.weight, b.bias, wide};
#   Vec* rings = reinterpret_cast<Vec*>(memory);
#   if (b.expand.inputs)
#     run_wide(plan, tensors, ExpandRow{b.expand, x, plan.strips, b.sources}, rings, sums);
#   else run_wide(plan, tensors, CopyRow{x}, rings, sums);
#   if (gate) find_gate(b, l, sums, gate);
#   const Projection last{b.project, wide, gate, b.sizes.residual ? x : nullptr, y};
#   in_parallel(l.parts, [&](int64_t part, int64_t) { project(last, pixels, part, l.parts); });
# }
#
# constexpr int64_t kBlockFields = sizeof(BlockSizes) / sizeof(int64_t);
#
# }  // namespace
#
# // The table holds BlockSizes, the plan for one worker, the plan for all, and the Sources.
# // The parameters are weight and bias of expand, depthwise, squeeze, excite, project.
# extern "C" void inverted_residual(const int64_t* table, const float* const* parameters,
#                                   const float* x, float* y, float* memory) {
#   const BlockSizes& sizes = *reinterpret_cast<const BlockSizes*>(table);
#   const Plan alone = read_plan(table + kBlockFields), together = read_plan(end_of(alone));
#   const auto point = [&](const PointSizes& point, int i) {
#     return Pointwise{point, parameters[2 * i], parameters[2 * i + 1]};
#   };
#   const Block block{
#       sizes, point(sizes.expand, 0), point(sizes.squeeze, 2), point(sizes.excite, 3),
#       point(sizes.project, 4), parameters[2], parameters[3],
#       reinterpret_cast<const Source*>(end_of(together)), x, y};
#   in_parallel(sizes.workers, [&](int64_t part, int64_t worker) {
#     const int64_t each = sizes.apart / sizes.workers;
#     for (int64_t image = part * each; image < (part + 1) * each; ++image)
#       run_image(block, alone, image, memory + worker * sizes.share);
#   });
#   for (int64_t image = sizes.apart; image < sizes.images; ++image)
#     run_image(block, together, image, memory);
# }
#
# // What block_kernel.py must agree with.
# extern "C" void block_layout(int64_t* to) {
#   to[0] = kBlockFields, to[1] = sizeof(Source) / sizeof(int64_t), to[2] = kPanel;
# }
# ```
#
# ## The plan of a block
#
# With an expansion, strips are cut at whole vectors of the *panels*, not of the tensor: a strip's weights must be loadable as one vector. A strip at a group's end uses a part of its vector; the other lanes are computed, and dropped. For the block of the page before: groups of 120 channels are 7 strips of 16 and one of 8.

# %%
#| export fast/block_kernel.py
"""The compiled kernel for whole blocks: plans, memory, the form (ours; chapter 15)."""

from collections.abc import Sequence
from typing import NamedTuple

from mixconv.fast.fused_block import PANEL, BlockSpec, PointwiseSpec
from mixconv.fast.plan import Strip, cut_strips, strip_costs


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


# %%
#| export fast/block_kernel.py
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


# %%
#| export fast/block_kernel.py
import itertools
from collections import namedtuple

from mixconv.fast.forms import Call
from mixconv.fast.kernel import MOST_NUMBERS
from mixconv.fast.native import kernel_threads
from mixconv.fast.plan import count_parts, plan_layer, ring_size, round_up
from mixconv.fast.spec import output_size


def gate_size(spec: BlockSpec) -> int:
    """Numbers that finding the gate takes: the gate, the means, the squeezed means."""
    return 2 * sum(spec.mix.channels) + (spec.squeeze.outputs if spec.squeeze else 0)


def image_size(spec: BlockSpec, pixels: int, ring: int, parts: int) -> int:
    """Numbers of scratch that an image takes: rings, wide tensor, gate, sums for the means."""
    channels = sum(spec.mix.channels)
    return round_up(parts * (ring + channels) + pixels * channels + gate_size(spec), 16)


# %% [markdown]
# How is work shared? By hand, five images and two threads. Each thread computes two whole images, with a ring and a wide tensor of its own: `workers` is 2, and the first four images are computed `apart`. The fifth is left; both threads compute it together, in two parts. For that one there is a second plan.

# %%
#| export fast/block_kernel.py
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


# %%
#| export fast/block_kernel.py
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


# %%
#| export fast/block_kernel.py
from mixconv.fast.fused_block import POINT_ACTIVATIONS


def write_points(spec: BlockSpec) -> list[int]:
    """The 1×1 layers as the kernel reads them; one without inputs is left out."""
    absent = PointwiseSpec(0, 0, 1, "none")
    points = [point or absent for point in (spec.expand, spec.squeeze, spec.excite, spec.project)]
    return [n for p in points for n in (*p[:3], POINT_ACTIVATIONS.index(p.activation))]


# %% [markdown]
# The same by numbers, with one image, two and five. One image alone has no workers; it is cut into parts at once:

# %%
import torch

from mixconv.fast.spec import MixSpec
from mixconv.teaching import table

block = BlockSpec(
    MixSpec((120, 120), (3, 5), 1, (1, 1), "symmetric", "silu"),
    PointwiseSpec(40, 240, 2, "silu"), PointwiseSpec(240, 20, 1, "silu"),
    PointwiseSpec(20, 240, 1, "sigmoid"), PointwiseSpec(240, 40, 2, "none"), residual=True,
)  # fmt: skip
threads = torch.get_num_threads()
torch.set_num_threads(2)

# %%
rows = []
for images in (1, 2, 5):
    numbers, scratch_size, _ = plan_block(
        Call(block, (images, 40, 28, 28), torch.float32, "cpu", True, 2), lanes=16
    )
    sizes = BlockSizes(*numbers[: len(BlockSizes._fields)])
    rows.append([images, sizes.workers, sizes.apart, sizes.wide, sizes.gate, scratch_size])
torch.set_num_threads(threads)
table(["images", "workers", "apart", "wide tensor", "gate", "scratch, all in all"], rows)

# %% [markdown]
# Numbers of four bytes. The wide tensor has 28 · 28 · 240 = 188,160 of them, the gate 240 + 240 + 20 = 500: the gate, the means, and the squeezed means. Two workers need two of everything. It does not grow with the number of images.
#
# (`share_images` also sees to it that the workers' memory fits under the limit of the form: it asks how many fit, and makes no more.)
#
# So why is the wide tensor still there? The projection of the first pixel needs the gate, the gate needs the means of all pixels, and so the last row must be computed before the first can be used. To lose the tensor, the block would be computed twice: once for the means only, and again, row by row, for the projection. That trades the tensor's one writing and reading for a second expansion and a second depthwise layer, which are most of the multiply-adds. Without a gate no second pass is needed; then the projection could follow each band of rows at once.
#
# ## The form
#
# It declines what chapter 14's declines, and blocks whose wide tensor is too large.

# %%
#| export fast/block_kernel.py
import ctypes
from typing import Any

from mixconv.fast.native import load_library

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


# %%
#| export fast/block_kernel.py
from mixconv.fast.forms import Runner
from mixconv.fast.kernel import count_lanes, why_not
from mixconv.fast.native import why_no_library


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


# %%
#| export fast/block_kernel.py
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mixconv.fast.fused_block import BLOCK_FORMS
from mixconv.fast.kernel import output_maker, scratch


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

# %% [markdown]
# ## Equal to its steps
#
# Random blocks, with and without expansion, gate and addition, on one to three threads. The steps are computed in double precision, which no kernel takes: so all of the reference is PyTorch's own. (Whether a gradient comes out right is not the kernel's business: then the steps compute, as the page before this one has checked.)

# %%
import random

from mixconv.fast.fused_block import BlockSpec, block_form, check_block, inverted_residual
from mixconv.fast.kernel import KERNEL_SIZES
from mixconv.fast.spec import ACTIVATIONS, MixSpec


def random_block(rng: random.Random) -> BlockSpec:
    """A block whose layers fit together."""
    kernels = tuple(rng.choice(KERNEL_SIZES) for _ in range(rng.randint(1, 4)))
    mix = MixSpec(tuple(2 * rng.randint(1, 20) for _ in kernels), kernels, rng.choice((1, 2)),
                  (1,) * len(kernels), rng.choice(("symmetric", "same")), "silu")  # fmt: skip
    wide, hidden = sum(mix.channels), rng.randint(1, 9)
    inputs = rng.choice((wide, 2 * rng.randint(1, 20)))
    expand = PointwiseSpec(inputs, wide, rng.choice((1, 2)), rng.choice(ACTIVATIONS))
    if inputs == wide:  # then it can go without
        expand = rng.choice((expand, None))
    gate = PointwiseSpec(wide, hidden, 1, "relu"), PointwiseSpec(hidden, wide, 1, "sigmoid")
    project = PointwiseSpec(wide, inputs, rng.choice((1, 2)), "none")
    gate = rng.choice((gate, (None, None)))
    residual = mix.stride == 1 and rng.choice((True, False))
    return BlockSpec(mix, expand, *gate, project, residual)


# %%
assert load_block_kernel() is not None, "this page needs a C++ compiler"
torch.manual_seed(0)
rng, kinds = random.Random(0), []
for count in 20 * (1, 2, 3):
    spec = random_block(rng)
    inputs, *counts = check_block(spec)
    weights, biases = ([torch.randn(n) / 5 for n in line] for line in counts)
    x = torch.randn(rng.randint(1, 4), inputs, rng.randint(1, 30), rng.randint(1, 30))
    torch.set_num_threads(count)
    y = inverted_residual(x, weights, biases, spec)
    exact = [[t.double() for t in line] for line in (weights, biases)]
    wanted = block_form(x.double(), *exact, spec).float()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4 * scale, msg=str(spec))
    kinds.append((spec.expand is None, spec.squeeze is None, spec.residual))

# %%
torch.set_num_threads(threads)
print(f"equal: {len(kinds)} blocks in {len(set(kinds))} of 8 kinds")
print(sum(k[0] for k in kinds), "without expansion,", sum(k[1] for k in kinds), "without gate")

# %% [markdown]
# ## What it bought
#
# First, why it was worth it. With every layer rewritten, but one by one, how much of MixNet-S's time do its depthwise layers take? Add up their times in `bench.json` and compare with the whole network's.

# %%
import json
from pathlib import Path

from mixconv import MixConv2d, mixnet_s

bench = json.loads(Path("../figures/bench.json").read_bytes())
found = {
    (r["size"], tuple(r["channels"]), tuple(r["kernel_sizes"])): r["seconds"]["fused"]
    for r in bench["layers"] if r["batch"] == 1
}  # fmt: skip
size, depthwise = 112, 0.0
for block in mixnet_s().blocks:
    layer = block.depthwise.conv
    convs = [*layer.convs] if isinstance(layer, MixConv2d) else [layer]
    sizes = tuple(conv.kernel_size[0] for conv in convs)
    depthwise += found[size, tuple(conv.in_channels for conv in convs), sizes]
    size //= block.stride
network = next(r["seconds"] for r in bench["networks"] if r["batch"] == 1)
print(f"depthwise layers: at least {100 * depthwise / network['fused, layers']:.0f}% of the time")

# %% [markdown]
# (At least: the layers were timed alone, each with its input in the cache already.) Most of the rest is what this chapter is about; the stem, the head, the classifier and Python are in it, too. Whole networks with blocks in one pass, against the same networks rewritten layer by layer (chapter 16 does both: each layer with its norm and activation as one operation, or each block):

# %%
rows = []
for name in dict.fromkeys(row["network"] for row in bench["networks"]):
    seconds = {r["batch"]: r["seconds"] for r in bench["networks"] if r["network"] == name}
    gains = [s["fused, layers"] / s["fused"] for s in seconds.values()]
    rows.append([name, *(f"{gain:.1f}" for gain in gains)])
table(["times as fast", *(f"batch {batch}" for batch in seconds)], rows)

# %% [markdown]
# Tried, and not worth it (from notes; the numbers were not kept): oneDNN's convolutions with weights packed in advance and activations inside, for the 1×1 layers (a few percent: the time is in the passes, not in the products); an approximate division for SiLU (no gain: the multiply-adds around it hide it).
#
# ## Exercises
#
# **15.3** ★★ *10 minutes, three lines.* The kernel multiplies the gate into the projection's weights. Do it with tensors: from a weight `(outputs, inputs / groups, 1, 1)` and one image's gate `(inputs,)`, make the weight that does both. Why must it be made anew for each image?
#
# <details><summary>Hint: the equation</summary>
#
# $\sum_i w_{o,i} \, (g_i x_i) = \sum_i (w_{o,i} \, g_i) \, x_i$: each gate meets the weights of *its input*.
#
# </details>
#
# <details><summary>Hint: the idea</summary>
#
# With groups, an output has weights for the inputs of its own group only. Let the weight's outputs be an axis of groups and an axis of outputs in them, then multiply.
#
# </details>

# %%
import torch.nn.functional as F

from mixconv.teaching import attempt, expect


def gated_weight(weight: Tensor, gate: Tensor, groups: int) -> Tensor:
    raise NotImplementedError


def test_gated(answer) -> None:
    gate = torch.tensor([3.0, 5.0])
    wanted = torch.tensor([[3.0, 5.0], [3.0, 5.0]]).view(2, 2, 1, 1)
    expect(answer, torch.ones(2, 2, 1, 1), gate, 1, gives=wanted, why="a gate for each input")
    wanted = torch.tensor([3.0, 5.0]).view(2, 1, 1, 1)
    expect(answer, torch.ones(2, 1, 1, 1), gate, 2, gives=wanted, why="a group has its own inputs")
    torch.manual_seed(0)
    weight, gate, x = torch.randn(6, 4, 1, 1), torch.rand(8), torch.randn(1, 8, 3, 3)
    wanted = F.conv2d(x * gate.view(-1, 1, 1), weight, groups=2)
    found = F.conv2d(x, answer(weight, gate, 2), groups=2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


attempt(gated_weight, test_gated)


# %% tags=["solution"]
# fold: Solution
def gated_weight_solution(weight: Tensor, gate: Tensor, groups: int) -> Tensor:
    parts = weight.view(groups, -1, weight.shape[1])  # groups, outputs, inputs
    return (parts * gate.view(groups, 1, -1)).view_as(weight)  # each image has its own gate


def by_output(weight: Tensor, gate: Tensor, groups: int) -> Tensor:
    """multiply the outputs instead of the inputs"""
    return weight * gate.view(-1, 1, 1, 1)


def first_inputs(weight: Tensor, gate: Tensor, groups: int) -> Tensor:
    """give every group the gate of the first group's inputs"""
    return weight * gate[: weight.shape[1]].view(1, -1, 1, 1)


attempt(gated_weight_solution, test_gated, wrong=[by_output, first_inputs])

# %% [markdown]
# ## Takeaways
# - The best pass over memory is the one not made: compute what is needed where it is needed.
# - The expansion goes into the ring, the means are summed on the way, the gate goes into the projection's weights.
# - One template parameter, `fetch_row`, tells the two kernels apart.
#
# **Further reading**: Alwani and others, *Fused-layer CNN accelerators*, MICRO 2016: the same thought, in hardware.
#
# Previous: [15 · Bytes of a block](15_block_bytes.ipynb) · Next: [16 · A model, in pieces](16_model_pieces.ipynb)
