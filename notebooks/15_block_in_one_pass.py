# %% [markdown]
# # 15 · A block in one pass
#
# The depthwise layer is near its limit now, and a MixNet still spends most of its time elsewhere: in 1×1 convolutions, activations and gates that read and write the same wide tensor again and again. Must that tensor exist at all?
#
# The picture below counts the bytes of one block, step by step: six operations one after another, and the same block in one pass.
#
# **You will be able to**
# - count a block's bytes by hand, and say which of them can go;
# - follow a block through the kernel: expansion into the ring, sums for the gate, projection;
# - call a whole inverted residual block as one operation.
#
# **Know first:** [chapter 4](04_blocks.ipynb) and [chapter 14](14_whole_kernel.ipynb).
#
# **Time:** 35 minutes to read. Runs in under 40 seconds on two cores, after the kernel has been compiled once.

# %% [markdown]
# ## Bytes of a block, by hand
#
# One of MixNet-S's blocks: 28×28 pixels, 40 channels expanded to 240, depthwise kernels 3 and 5, a gate, and back to 40. The input has 28 · 28 · 40 · 4 = 125,440 bytes, the expanded tensor six times as many, 752,640. Who reads and writes what? (Weights, and the addition of the input, are left out.)

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

small, wide = 28 * 28 * 40 * 4, 28 * 28 * 240 * 4
assert (small, wide) == (125_440, 752_640)
steps = ["expand 1×1", "activation", "depthwise, activation", "means", "times gate", "project 1×1"]
separate = [(small, wide), (wide, wide), (wide, wide), (wide, 0), (wide, wide), (wide, small)]
one_pass = [(small, 0), (0, 0), (0, wide), (0, 0), (0, 0), (wide, small)]
use_style()
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharex=True, sharey=True)
for axis, title, passes in zip(
    panels, ("one operation after another", "in one pass"), (separate, one_pass), strict=True
):
    read, written = ([p[i] / 1e6 for p in passes] for i in (0, 1))
    axis.barh(range(len(passes)), read, color="#5b8db8", label="read")
    axis.barh(range(len(passes)), written, left=read, color="#d98b4a", label="written")
    axis.set(title=f"{title}: {sum(read) + sum(written):.1f} MB", xlabel="MB")
panels[0].set_yticks(range(len(steps)), steps)
panels[0].invert_yaxis()
panels[1].legend(fontsize=8)
show(
    figure,
    "block_bytes.png",
    "Bytes read and written by the six steps of a MixNet block. As separate operations each step "
    "reads or writes the wide tensor, three of them both; in one pass it is written once by "
    "the depthwise step and read once by the projection.",
)

# %% [markdown]
# The right side does without the expanded tensor. Chapter 14's kernel reads 16 channels of a row into its ring. It can as well *compute* them there, from the input: for 16 outputs, a 1×1 convolution of a row is a small matrix product. Nothing but `fetch_row` changes. (Every strip reads the input again; but that is narrow, and stays in the cache.)
#
# The depthwise layer's output must exist. The gate needs its means, over all pixels, before the projection can start. But the means can be summed up while the rows are still in the cache, and the gate can be multiplied into the projection's weights as they are loaded. (Without a gate that tensor could go, too; the kernel does not bother.)
#
# ## A block in one value
#
# A block is chapter 12's `MixSpec` with 1×1 layers around it. It must pass through PyTorch's dispatcher, which knows numbers and text but no classes of ours. So a block can be written down as a line of text, and read again: `str` and `BlockSpec.parse`. Reading evaluates nothing but literals and these three names.

# %%
#| export fast/fused_block.py
"""A whole inverted residual block as one operation: meaning, rules, module (ours; chapter 15)."""

import ast
import functools
from typing import Any, NamedTuple

from mixconv.fast.spec import MixSpec


class PointwiseSpec(NamedTuple):
    """A 1×1 convolution in equal groups, and the activation behind it."""

    inputs: int
    outputs: int
    groups: int
    activation: str


class BlockSpec(NamedTuple):
    """An inverted residual block; what is None is left out.

    `str` writes it down, and `BlockSpec.parse` reads that. Weights and biases go with it in the
    order expand, depthwise, squeeze, excite, project: 1×1 weights from `pack_pointwise`, the
    depthwise ones from `pack_weights`, empty where left out.
    """

    mix: MixSpec
    expand: PointwiseSpec | None
    squeeze: PointwiseSpec | None
    excite: PointwiseSpec | None
    project: PointwiseSpec
    residual: bool

    @staticmethod
    def parse(text: str) -> "BlockSpec":
        """A spec from what `str` made of it.

        Raises:
            ValueError: for any other text.
        """
        return _parse(text)


# %%
#| export fast/fused_block.py
@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> BlockSpec:
    try:
        spec = _build(ast.parse(text, mode="eval").body)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"not a block: {text!r} ({error!r})") from error
    if not isinstance(spec, BlockSpec) or str(spec) != text:
        raise ValueError(f"not a block as str writes it: {text!r}")
    return spec


def _build(node: Any) -> Any:
    """A literal, or one of the three specs with named entries; nothing else is evaluated."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    known: dict[str, Any] = {kind.__name__: kind for kind in (MixSpec, PointwiseSpec, BlockSpec)}
    entries = {str(entry.arg): _build(entry.value) for entry in node.keywords}
    return known[ast.unparse(node.func)](**entries)


# %%
spec = BlockSpec(
    MixSpec((120, 120), (3, 5), 1, (1, 1), "symmetric", "silu"),
    expand=PointwiseSpec(40, 240, 2, "silu"),
    squeeze=PointwiseSpec(240, 20, 1, "silu"),
    excite=PointwiseSpec(20, 240, 1, "sigmoid"),
    project=PointwiseSpec(240, 40, 2, "none"),
    residual=True,
)
assert BlockSpec.parse(str(spec)) == spec
print(str(spec)[:120], "…")
try:
    BlockSpec.parse("print('hello')")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Panels
#
# A matrix product for 16 outputs at a time wants its weights in another order: *panels* of 16 outputs, and within a panel all 16 weights of one input side by side, so that one load takes them. Where a group's outputs are no multiple of 16, the last panel is filled up with zeros.

# %%
#| export fast/fused_block.py

import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # the kernel's kPanel


def pack_pointwise(weight: Tensor, groups: int) -> Tensor:
    """A 1×1 convolution's weight `(outputs, inputs / groups, 1, 1)` as panels, one axis."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows = F.pad(weight.reshape(groups, outputs, inputs), (0, 0, 0, -outputs % PANEL))
    return rows.view(groups, -1, PANEL, inputs).transpose(2, 3).reshape(-1)


def unpack_pointwise(packed: Tensor, point: PointwiseSpec) -> Tensor:
    """`pack_pointwise` undone."""
    inputs, outputs = point.inputs // point.groups, point.outputs // point.groups
    rows = packed.view(point.groups, -1, inputs, PANEL).transpose(2, 3).flatten(1, 2)
    return rows[:, :outputs].reshape(point.outputs, inputs, 1, 1)


# %% [markdown]
# Two groups of 3 inputs and 2 outputs each. Each group has one panel of 3 rows, one for each input, and 16 places in a row, of which 2 are in use:

# %%
import torch

weight = torch.arange(1.0, 13).view(4, 3, 1, 1)
packed = pack_pointwise(weight, groups=2)
assert torch.equal(unpack_pointwise(packed, PointwiseSpec(6, 4, 2, "none")), weight)
packed.view(2, 3, PANEL)[:, :, :4].int()

# %% [markdown]
# ## What it computes
#
# One PyTorch operation after another: the form that the fast one is held to. It also computes wherever the kernel declines, and whenever a gradient is wanted.

# %%
#| export fast/fused_block.py

from collections.abc import Sequence

import torch

from mixconv.fast.operation import run_operation
from mixconv.fast.spec import activate


def block_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block as separate operations: the reference.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    def pointwise(y: Tensor, index: int, point: PointwiseSpec) -> Tensor:
        weight = unpack_pointwise(weights[index], point)
        return activate(F.conv2d(y, weight, biases[index], groups=point.groups), point.activation)

    with torch.autocast(x.device.type, enabled=False):  # all in the type of the weights
        y = x if spec.expand is None else pointwise(x, 0, spec.expand)
        y = run_operation(y, weights[1], biases[1], spec.mix)
        if spec.squeeze is not None and spec.excite is not None:
            means = y.mean((2, 3), keepdim=True)
            y = y * pointwise(pointwise(means, 2, spec.squeeze), 3, spec.excite)
        y = pointwise(y, 4, spec.project)
        return x + y if spec.residual else y


# %% [markdown]
# Before anyone computes with addresses, a block must fit together: each layer takes what the one before it gives, and each tensor holds as many numbers as the block says. As in chapter 12, `Forms` asks once for all calls that are alike.

# %%
#| export fast/fused_block.py
from mixconv.fast.spec import ACTIVATIONS, check_spec

POINT_ACTIVATIONS = (*ACTIVATIONS, "sigmoid")  # in the order of the kernel's enum


def _count_point(point: PointwiseSpec | None) -> tuple[int, int]:
    """How many packed weights and biases a 1×1 layer has."""
    if point is None:
        return 0, 0
    inputs, outputs, groups, activation = point
    if min(inputs, outputs, groups) < 1 or inputs % groups or outputs % groups:
        raise ValueError(f"groups must divide inputs and outputs, got {point}")
    if activation not in POINT_ACTIVATIONS:
        raise ValueError(f"activation must be one of {POINT_ACTIVATIONS}, got {activation!r}")
    return groups * -(-outputs // groups // PANEL) * PANEL * (inputs // groups), outputs


# %%
#| export fast/fused_block.py
@functools.lru_cache(maxsize=1024)
def check_block(spec: BlockSpec) -> tuple[int, list[int], list[int]]:
    """Channels of the input, and how many weights and biases each layer has.

    Raises:
        ValueError: for layers that cannot be, or do not take what the layer before gives.
    """
    mix, expand, squeeze, excite, project, residual = spec
    count, packed = check_spec(mix)
    points = [_count_point(point) for point in (expand, squeeze, excite, project)]
    inputs = expand.inputs if expand else count
    wide = {count, project.inputs, expand.outputs if expand else count}
    gate = squeeze is None and excite is None
    if squeeze and excite:
        wide |= {squeeze.inputs, excite.outputs}
        gate = squeeze.outputs == excite.inputs
    same = not residual or (mix.stride == 1 and inputs == project.outputs)
    if not gate or not same or len(wide) > 1:
        raise ValueError(f"the block's layers do not fit together: {spec}")
    weights, biases = zip(points[0], (packed, count), *points[1:], strict=True)
    return inputs, list(weights), list(biases)


# %%
#| export fast/fused_block.py
from mixconv.fast.forms import Call, Forms, Runner


def check_block_call(call: Call) -> None:
    """Raise unless the sizes of the tensors fit the block.

    Raises:
        ValueError: naming the tensors, their sizes and what they must be.
    """
    inputs, *expected = check_block(call.spec)
    if len(call.sizes) != 4 or call.sizes[1] != inputs:
        raise ValueError(f"x must be (N, {inputs}, H, W), got {tuple(call.sizes)}")
    for name, found, wanted in zip(("weights", "biases"), call.parameters, expected, strict=True):
        if list(found) != wanted:
            raise ValueError(f"{name} must hold {wanted} numbers, got {list(found)}")


def describe_block_call(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Call:
    """The call that these tensors make.

    Raises:
        ValueError: if they differ in dtype or device. (Sizes: see `check_block_call`.)
    """
    dtype, device = x.dtype, x.device
    for tensor in (*weights, *biases):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"weights and biases must have the dtype and device of x, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    parameters = tuple([t.numel() for t in weights]), tuple([t.numel() for t in biases])
    return Call(spec, x.shape, dtype, device.type, True, torch.get_num_threads(), parameters)


# %%
#| export fast/fused_block.py
def _prepare_block_form(call: Call) -> Runner:
    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        y = block_form(x, weights, biases, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


BLOCK_FORMS = Forms("inverted_residual", _prepare_block_form, check_block_call)

# %% [markdown]
# As in chapter 12, PyTorch's dispatcher learns of the operation: its schema, and the shape of its result. Where a derivative is taken, or a function transform is at work, the block is its separate steps, each of which knows its own rules.

# %%
#| export fast/fused_block.py
from typing import cast

from mixconv.fast.forms import is_plain, must_dispatch
from mixconv.fast.spec import output_size


@torch.library.custom_op(
    "mixconv::inverted_residual", mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, str spec) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    call = describe_block_call(x, weights, biases, BlockSpec.parse(spec))
    if x.is_cpu and not all(is_plain(t) for t in (x, *weights, *biases)):
        check_block_call(call)
        return BLOCK_FORMS.fallback(call)(x, weights, biases)
    return BLOCK_FORMS.choose(call)(x, weights, biases)


@_operation.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    block = BlockSpec.parse(spec)
    check_block_call(describe_block_call(x, weights, biases, block))
    rows, columns = (output_size(size, block.mix.stride) for size in x.shape[2:])
    size = x.shape[0], block.project.outputs, rows, columns
    return x.new_empty(size).to(memory_format=torch.channels_last)


# %%
#| export fast/fused_block.py
def inverted_residual(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """An inverted residual block, from its input to its output, in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weights: of the five layers of `spec`, packed; see `BlockSpec`.
        biases: of the five layers.
        spec: the block.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: for sizes and dtypes that do not fit together.

    Source: ours; the block is the paper's (section 4, Figure 8). Chapter 15.
    """
    if not must_dispatch(x, *weights, *biases):
        call = describe_block_call(x, weights, biases, spec)
        return BLOCK_FORMS.choose(call)(x, weights, biases)
    if _needs_formulas(x, *weights, *biases):
        check_block_call(describe_block_call(x, weights, biases, spec))
        return block_form(x, weights, biases, spec)
    operation = torch.ops.mixconv.inverted_residual
    return cast("Tensor", operation(x, weights, biases, str(spec)))


def _needs_formulas(*tensors: Tensor) -> bool:
    """Whether somebody differentiates or transforms: then the block is its separate steps."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


# %% [markdown]
# And a module that holds a block's parameters, to stand in a model where the block was. Chapter 16 puts it there.

# %%
#| export fast/fused_block.py

from torch import nn

from mixconv.fast.folding import refuse_training


class FusedBlock(nn.Module):
    """An inverted residual block, or a depthwise separable one, as one operation.

    Args:
        spec: the block.
        weights: packed, as `inverted_residual` takes them.
        biases: of the five layers.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the block it replaces.
    """

    def __init__(
        self, spec: BlockSpec, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.spec = spec
        for index, pair in enumerate(zip(weights, biases, strict=True)):
            for name, tensor in zip(("weight", "bias"), pair, strict=True):
                self.register_buffer(f"{name}{index}", tensor.detach().clone())
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block, in the type of its weights."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        buffers = [*self._buffers.values()]
        weights, biases = cast("list[Tensor]", buffers[0::2]), cast("list[Tensor]", buffers[1::2])
        return inverted_residual(x.to(weights[1].dtype), weights, biases, self.spec)

    def train(self, mode: bool = True) -> "FusedBlock":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ",\n".join(f"{name}={value}" for name, value in self.spec._asdict().items())


# %% [markdown]
# ## The block's kernel
#
# `mixconv/fast/inverted_residual.cpp` continues chapter 14's `depthwise.cpp`. First a 1×1 layer, and the inner loop. It is chapter 13's once more: sums that do not wait for one another, here over inputs instead of taps. One vector of weights, T pixels' inputs, T sums. With `V = 2`, two vectors of outputs share each input. The gate is multiplied into each vector of weights as it is loaded: `V` products, where the inputs would take `T`.
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
#     const Source& source = sources[&s - strips];
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
# The other 1×1 convolutions of a block read a tensor and write one: the projection, and the gate's two, whose only "pixel" is the means. A tile is 7 pixels by two vectors of outputs, 14 sums. Threads share the pixels in chunks, and where these are few, the outputs.
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
# What Python tells of a block, and what comes with a call. The gate: means from the parts' sums, then two small products. They are so small that every thread computes them for itself, rather than wait. The scratch memory holds rings, the wide tensor, gates and sums, one behind the other. In `run_image`, and only there, it is decided which `fetch_row` the depthwise kernel is compiled with.
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
#   float* gates = wide + b.sizes.wide;
#   float* sums = b.squeeze.inputs ? gates + l.parts * b.sizes.gate : nullptr;
#   const Tensors tensors{b.weight, b.bias, wide};
#   Vec* rings = reinterpret_cast<Vec*>(memory);
#   if (b.expand.inputs)
#     run_wide(plan, tensors, ExpandRow{b.expand, x, plan.strips, b.sources}, rings, sums);
#   else run_wide(plan, tensors, CopyRow{x}, rings, sums);
#   in_parallel(l.parts, [&](int64_t part, int64_t worker) {
#     float* gate = sums ? gates + worker * b.sizes.gate : nullptr;
#     if (gate) find_gate(b, l, sums, gate);
#     project({b.project, wide, gate, b.sizes.residual ? x : nullptr, y}, pixels, part, l.parts);
#   });
# }
# ```
#
# While there are at least as many images as threads, each thread takes whole images: nobody waits, and the wide tensor stays in that core's own cache. On each of the rest all threads work together. Hence two plans.
#
# ```c++
# //| export fast/inverted_residual.cpp
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
# With an expansion, strips are cut at whole vectors of the *panels*, not of the tensor: a strip's weights must be loadable as one vector. So no lanes are left over, and the expansion computes exactly the strip's channels.

# %%
#| export fast/block_kernel.py
"""The compiled kernel for whole blocks: plans, memory, the form (ours; chapter 15)."""

from typing import NamedTuple

from mixconv.fast.fused_block import PANEL, BlockSpec
from mixconv.fast.kernel import COPY_COST, Strip, cut_strips


class Source(NamedTuple):
    """Where a strip's inputs lie in a pixel of x, and its weights begin; as in the C++ file."""

    input: int
    panel: int


# %%
#| export fast/block_kernel.py
def cut_block(
    spec: BlockSpec, height: int, width: int, lanes: int
) -> tuple[list[Strip], list[int], list[Source]]:
    """A block's strips, what an output pixel of each costs, and where each has its input from."""
    if spec.expand is None:
        strips = cut_strips(spec.mix, height, width, lanes)
        return strips, [strip.kernel**2 + COPY_COST for strip in strips], []
    strips, sources, groups = [], [], spec.expand.groups
    inputs, outputs = spec.expand.inputs // groups, spec.expand.outputs // groups
    for strip in cut_strips(spec.mix, height, width, lanes, outputs):
        group, inside = divmod(strip.window + strip.skip, outputs)
        skip = inside % lanes
        moved = strip._replace(window=strip.window + strip.skip - skip, read=strip.lanes, skip=skip)
        strips.append(moved)
        panel, column = divmod(inside - skip, PANEL)
        row = (group * -(-outputs // PANEL) + panel) * inputs
        sources.append(Source(group * inputs, row * PANEL + column))
    before = inputs * spec.mix.stride**2  # so many pixels are expanded for one output
    return strips, [strip.kernel**2 + COPY_COST + before for strip in strips], sources


# %%
#| export fast/block_kernel.py
import itertools
from collections import namedtuple

from mixconv.fast.forms import Call
from mixconv.fast.fused_block import POINT_ACTIVATIONS, PointwiseSpec
from mixconv.fast.kernel import MOST_NUMBERS, count_parts, plan_layer, ring_size, round_up
from mixconv.fast.native import kernel_threads
from mixconv.fast.spec import output_size


def gate_size(spec: BlockSpec) -> int:
    """Numbers that finding the gate takes: the gate, the means, the squeezed means."""
    return 2 * sum(spec.mix.channels) + (spec.squeeze.outputs if spec.squeeze else 0)


def image_size(spec: BlockSpec, pixels: int, ring: int, parts: int) -> int:
    """Numbers of scratch that an image takes: rings, wide tensor, gates, sums for the means."""
    channels = sum(spec.mix.channels)
    return round_up(parts * (ring + gate_size(spec) + channels) + pixels * channels, 16)


Block = namedtuple("Block", "images apart workers pixel residual wide gate share")


# %%
#| export fast/block_kernel.py
def plan_block(call: Call, lanes: int) -> tuple[list[int], int, int]:
    """A block's work: the table that the kernel reads, how much scratch, and for how many."""
    spec: BlockSpec = call.spec
    images, inputs, height, width = call.sizes
    strips, costs, sources = cut_block(spec, height, width, lanes)
    pixels, ring = output_pixels(call), ring_size(spec.mix, width) * lanes
    each = spec.project.inputs // spec.project.groups * spec.project.outputs // lanes
    work, threads = pixels * (sum(costs) + each), min(call.threads, kernel_threads())
    parts, share = count_parts(work, threads), image_size(spec, pixels, ring, 1)
    workers = count_parts(work * images, min(threads, images, MOST_NUMBERS // share))
    apart = images // workers * workers if workers > 1 else 0
    wide = pixels * sum(spec.mix.channels)
    block = Block(images, apart, workers, inputs, spec.residual, wide, gate_size(spec), share)
    sizes = 1, inputs, height, width
    plans = [plan_layer(spec.mix, sizes, strips, costs, n) for n in (1, parts)]
    table = [*block, *write_points(spec), *plans[0], *plans[1], *itertools.chain(*sources)]
    return table, max(image_size(spec, pixels, ring, parts), workers * share), workers


# %%
#| export fast/block_kernel.py
def output_pixels(call: Call) -> int:
    """Pixels of an image of the block's output."""
    height, width = (output_size(size, call.spec.mix.stride) for size in call.sizes[2:])
    return height * width


def write_points(spec: BlockSpec) -> list[int]:
    """The 1×1 layers as the kernel reads them; one without inputs is left out."""
    absent = PointwiseSpec(0, 0, 1, "none")
    points = [point or absent for point in (spec.expand, spec.squeeze, spec.excite, spec.project)]
    return [n for p in points for n in (*p[:3], POINT_ACTIVATIONS.index(p.activation))]


# %% [markdown]
# The form. It declines what chapter 14's declines, and blocks whose wide tensor is too large.

# %%
#| export fast/block_kernel.py
import ctypes
from typing import Any

from mixconv.fast.forms import Runner
from mixconv.fast.fused_block import BLOCK_FORMS
from mixconv.fast.kernel import count_lanes, why_not
from mixconv.fast.native import load_library, why_no_library

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
        if answer[:] != [len(Block._fields) + points, len(Source._fields), PANEL]:
            raise RuntimeError(f"inverted_residual.cpp and block_kernel.py disagree: {answer[:]}")
        library.inverted_residual.argtypes = [ctypes.c_void_p] * 5
        library.inverted_residual.restype = None
    return library


# %%
#| export fast/block_kernel.py
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

from mixconv.fast.kernel import last_strides, scratch


def _make_runner(
    function: Any, table: Any, size: tuple[int, ...], needed: int, workers: int
) -> Runner:
    last, pointers, strides = torch.channels_last, ctypes.c_void_p * 10, last_strides(size)

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        x = x.contiguous(memory_format=last)
        kept = [t.contiguous() for pair in zip(weights, biases, strict=True) for t in pair]
        parameters = pointers(*[t.data_ptr() for t in kept])
        y, memory = x.new_empty_strided(size, strides), scratch(needed, workers)
        function(table, parameters, x.data_ptr(), y.data_ptr(), memory.data_ptr())
        return y

    return run


BLOCK_FORMS.add("cpu", BlockForm())

if hasattr(os, "register_at_fork"):  # plans for several threads do not suit a child
    os.register_at_fork(after_in_child=BLOCK_FORMS.forget)

# %% [markdown]
# ## Takeaways
# - The best pass over memory is the one not made: compute what is needed where it is needed.
# - The expansion goes into the ring, the means are summed on the way, the gate goes into the projection's weights.
#
# Previous: [14 · The whole kernel](14_whole_kernel.ipynb) · Next: [16 · A model, in pieces](16_model_pieces.ipynb)
