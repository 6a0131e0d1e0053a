# %% [markdown]
# # 15 · Bytes of a block
#
# The depthwise layers take a small part of a network's time now (the next page counts). The rest goes elsewhere: to 1×1 convolutions, activations and gates that read and write the same wide tensor again and again. Must that tensor exist at all?
#
# The picture below counts the bytes of one block, step by step: six operations one after another, and the same block in one pass.
#
# **You will be able to**
# - count a block's bytes by hand, and say which of them can go;
# - write a block down as one value, and as one line of text;
# - call a whole inverted residual block as one operation of PyTorch's.
#
# **Know first:** [chapter 4](04_blocks.ipynb) and [chapter 14](14_whole_kernel.ipynb).
#
# **Time:** 20 minutes to read. Runs in under 30 seconds on two cores. It is the first of two pages, before [A block in one pass](15_block_in_one_pass.ipynb).

# %% [markdown]
# ## Bytes of a block, by hand
#
# One of MixNet-S's blocks: 28×28 pixels, 40 channels expanded to 240, depthwise kernels 3 and 5, a gate, and back to 40. The input has 28 · 28 · 40 · 4 = 125,440 bytes, the expanded tensor six times as many, 752,640. Who reads and writes what? (Weights, and the addition of the input, are left out.)

# %% tags=["drawing"]
# fold: The code that draws this
import logging

import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

logging.getLogger("mixconv").setLevel(logging.ERROR)  # a kernel may be compiled below
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
    caption="One after another, the steps of a block move the wide tensor nine times; in one pass "
    "it moves twice.",
)

# %% [markdown]
# (The depthwise layer has its activation inside, since chapter 12. Plain PyTorch has a step more, and moves the wide tensor eleven times.)
#
# The right side does without the expanded tensor. Chapter 14's kernel reads 16 channels of a row into its ring. It can as well *compute* them there, from the input: for 16 outputs, a 1×1 convolution of a row is a small matrix product. Nothing but `fetch_row` changes. (Every strip reads the input again; but that is narrow, and stays in the cache.)
#
# The depthwise layer's output must exist. The gate needs its means, over all pixels, before the projection can start. But the means can be summed up while the rows are still in the cache, and the gate can be multiplied into the projection's weights as they are loaded. (Without a gate that tensor could go, too: 2 · 125,440 = 250,880 bytes would be left to move. The kernel does not bother.)
#
# **15.1** ★ *5 minutes, two lines.* How many bytes does a block read and write in one pass? Count the narrow input once, the wide tensor behind the depthwise layer twice, and the output once; float32, one image, no weights.
#
# <details><summary>Hint: the equation</summary>
#
# Behind the stride there are $\lceil \mathrm{size} / \mathrm{stride} \rceil^2$ pixels, and each has $2 \cdot \mathrm{wide} + \mathrm{outputs}$ numbers to move.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def one_pass_bytes(size: int, inputs: int, wide: int, outputs: int, stride: int) -> int:
    raise NotImplementedError


def test_bytes(answer) -> None:
    expect(answer, 1, 1, 1, 1, 1, gives=16, why="one in, the wide one twice, one out")
    expect(answer, 28, 40, 240, 40, 1, gives=1_756_160, why="the block above")
    expect(answer, 56, 24, 144, 40, 2, gives=1_329_664, why="behind the stride, 28 · 28 pixels")


attempt(one_pass_bytes, test_bytes)


# %% tags=["solution"]
# fold: Solution
def one_pass_bytes_solution(size: int, inputs: int, wide: int, outputs: int, stride: int) -> int:
    before, after = size**2, (-(-size // stride)) ** 2
    return 4 * (before * inputs + after * (2 * wide + outputs))


def stride_forgotten(size: int, inputs: int, wide: int, outputs: int, stride: int) -> int:
    """count the wide tensor as large as the input"""
    return one_pass_bytes_solution(size, inputs, wide, outputs, 1)


def written_only(size: int, inputs: int, wide: int, outputs: int, stride: int) -> int:
    """count the wide tensor once: what is written is read again"""
    before, after = size**2, (-(-size // stride)) ** 2
    return 4 * (before * inputs + after * (wide + outputs))


attempt(one_pass_bytes_solution, test_bytes, wrong=[stride_forgotten, written_only])

# %% [markdown]
# ## A block in one value
#
# A block is chapter 12's `MixSpec` with 1×1 layers around it. It must pass through PyTorch's dispatcher, which knows numbers and text but no classes of ours. Chapter 12 passed its layer as numbers in a row, each known by its place. Of five layers some may be absent, and the dispatcher's `int[]` has no way to leave one out. So a block can be written down as a line of text, and read again: `str` and `BlockSpec.parse`. Reading evaluates nothing but literals and these three names.

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

PANEL = 16  # outputs side by side; the kernel of the next page has the same number


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
# **15.2** ★★ *10 minutes, two lines.* How many numbers do the packed weights of a 1×1 convolution take, zeros and all?
#
# <details><summary>Hint: the idea</summary>
#
# Each group has panels of its own: round its outputs up to whole panels of 16. A panel has 16 numbers for each input of its group.
#
# </details>

# %%
def packed_numbers(inputs: int, outputs: int, groups: int) -> int:
    raise NotImplementedError


def test_packed(answer) -> None:
    expect(answer, 6, 4, 2, gives=96, why="two panels of 3 inputs by 16")
    expect(answer, 40, 240, 1, gives=9600, why="fifteen whole panels: no zeros")
    expect(answer, 40, 240, 2, gives=5120, why="120 outputs fill eight panels, the last by half")


attempt(packed_numbers, test_packed)


# %% tags=["solution"]
# fold: Solution
def packed_numbers_solution(inputs: int, outputs: int, groups: int) -> int:
    return groups * -(-outputs // groups // 16) * 16 * (inputs // groups)


def one_group(inputs: int, outputs: int, groups: int) -> int:
    """let a panel reach into the next group"""
    return -(-outputs // 16) * 16 * (inputs // groups)


def no_zeros(inputs: int, outputs: int, groups: int) -> int:
    """forget the zeros that fill the last panel up"""
    return outputs * (inputs // groups)


attempt(packed_numbers_solution, test_packed, wrong=[one_group, no_zeros])

# %% [markdown]
# ## What it computes
#
# One operation after another: the form that the fast one is held to. It also computes wherever the kernel declines, and whenever a gradient is wanted. The depthwise step is chapter 12's operation, so chapter 14's kernel may run in it; in double precision, which no kernel takes, all of it is PyTorch's.

# %%
#| export fast/fused_block.py
from collections.abc import Sequence

import torch

from mixconv.fast.operation import run_operation
from mixconv.fast.spec import activate


def block_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block as separate operations: the reference, all PyTorch's own in double precision.

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
# Before anyone computes with addresses, a block must fit together: each layer takes what the one before it gives, and each tensor holds as many numbers as the block says.

# %% tags=["plumbing"]
# fold: What a 1×1 layer must be, and how many numbers it has
#| export fast/fused_block.py
from mixconv.fast.spec import ACTIVATIONS

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


# %% tags=["plumbing"]
# fold: Which layer must take what another gives
#| export fast/fused_block.py
def _check_fit(spec: BlockSpec, wide: int) -> None:
    """Raise unless each layer takes what the one before it gives."""
    pairs = [("project takes", spec.project.inputs, "the depthwise layer gives", wide)]
    if spec.expand:
        pairs += [("the depthwise layer takes", wide, "expand gives", spec.expand.outputs)]
    if spec.squeeze and spec.excite:
        pairs += [("squeeze takes", spec.squeeze.inputs, "the depthwise layer gives", wide),
                  ("excite takes", spec.excite.inputs, "squeeze gives", spec.squeeze.outputs),
                  ("the gate gives", spec.excite.outputs, "the depthwise layer", wide)]  # fmt: skip
    for one, taken, other, given in pairs:
        if taken != given:
            raise ValueError(f"layers do not fit together: {one} {taken} channels, {other} {given}")


# %% tags=["plumbing"]
# fold: The block's channels and sizes, checked
#| export fast/fused_block.py
from mixconv.fast.spec import check_spec


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
    if (squeeze is None) != (excite is None):
        raise ValueError("layers do not fit together: a gate has both, squeeze and excite")
    _check_fit(spec, count)
    if residual and (mix.stride > 1 or inputs != project.outputs):
        raise ValueError(f"layers do not fit together: input and result cannot be added in {spec}")
    weights, biases = zip(points[0], (packed, count), *points[1:], strict=True)
    return inputs, list(weights), list(biases)


# %% tags=["plumbing"]
# fold: The sizes of a call's tensors, checked
#| export fast/fused_block.py
from mixconv.fast.forms import Call


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


# %%
wrong = PointwiseSpec(200, 40, 2, "none")
for change in ({"project": wrong}, {"excite": None}, {"excite": PointwiseSpec(30, 240, 1, "none")}):
    try:
        check_block(spec._replace(**change))
    except ValueError as error:
        print(error)
check_block(spec)


# %% [markdown]
# The input's channels, then how many packed weights and biases each of the five layers has. By hand: the expansion has two groups of 20 inputs and eight panels, 2 · 20 · 128 = 5,120. The depthwise layer has 120 · (9 + 25) = 4,080. The squeeze's 20 outputs fill two panels, 240 · 32 = 7,680; the excitation has 20 · 240 = 4,800; and the projection two groups of 120 inputs, with 20 outputs in two panels, 2 · 120 · 32 = 7,680.
#
# The sizes are asked once for calls that are alike; types and devices in each call.

# %% tags=["plumbing"]
# fold: What is asked about the tensors of a call
#| export fast/fused_block.py
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
from mixconv.fast.forms import Forms, Runner


def _prepare_block_form(call: Call) -> Runner:
    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        y = block_form(x, weights, biases, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


BLOCK_FORMS = Forms("inverted_residual", _prepare_block_form, check_block_call)

# %% [markdown]
# ## As an operation of PyTorch's
#
# As in chapter 12, the dispatcher learns of the operation: its schema, and the shape of its result.

# %%
#| export fast/fused_block.py
from mixconv.fast.forms import check_memory, is_plain
from mixconv.fast.operation import meet_exporters
from mixconv.fast.spec import output_size


@torch.library.custom_op(
    "mixconv::inverted_residual", mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, str spec) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    call = describe_block_call(x, weights, biases, BlockSpec.parse(spec))
    if x.is_cpu and not all(is_plain(t) for t in (x, *weights, *biases)):
        check_block_call(call)
        check_memory(x, *weights, *biases)
        return BLOCK_FORMS.fallback(call)(x, weights, biases)
    return BLOCK_FORMS.choose(call)(x, weights, biases)


@_operation.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    meet_exporters()
    block = BlockSpec.parse(spec)
    check_block_call(describe_block_call(x, weights, biases, block))
    rows, columns = (output_size(size, block.mix.stride) for size in x.shape[2:])
    size = x.shape[0], block.project.outputs, rows, columns
    return x.new_empty(size).to(memory_format=torch.channels_last)


# %% [markdown]
# And whoever counts the operations of a network should find those of a block, too. PyTorch's counter asks a registry; chapter 1's `count_costs` asks the module.

# %% tags=["plumbing"]
# fold: The costs of a block, layer by layer
#| export fast/costs.py
"""What a whole block costs, layer by layer, for those who count (ours; chapter 15)."""

from collections.abc import Sequence
from typing import Any

from mixconv.fast.spec import output_size
from mixconv.formulation import LayerCost


def block_costs(
    spec: Any, name: str, before: Sequence[int], after: Sequence[int]
) -> list[LayerCost]:
    """The costs of a block's layers, as `count_costs` gives them.

    Args:
        spec: a `BlockSpec`.
        name: of the block.
        before: shape of its input, `(N, C, H, W)`.
        after: shape of its output.
    """
    wide, costs = sum(spec.mix.channels), []
    weights = sum(c * k * k for c, k in zip(spec.mix.channels, spec.mix.kernel_sizes, strict=True))
    pixels = {"expand": before[2:], "squeeze": (1, 1), "excite": (1, 1), "project": after[2:]}
    for part in ("expand", "depthwise", "squeeze", "excite", "project"):
        point = getattr(spec, part, None)
        if part == "depthwise":
            shape = (after[0], wide, *after[2:])
            costs.append(LayerCost(f"{name}.depthwise", part, shape, weights + wide,
                                   after[0] * after[2] * after[3] * weights))  # fmt: skip
        elif point is not None:
            shape, size = (before[0], point.outputs, *pixels[part]), point.inputs * point.outputs
            count = size // point.groups
            work = before[0] * pixels[part][0] * pixels[part][1] * count
            costs.append(
                LayerCost(f"{name}.{part}", "pointwise", shape, count + point.outputs, work)
            )
    return costs


def block_flops(spec: Any, before: Sequence[int]) -> int:
    """Twice the multiply-adds of a block for an input of shape `before`, as PyTorch counts."""
    sides = [output_size(size, spec.mix.stride) for size in before[2:]]
    costs = block_costs(spec, "", before, (before[0], spec.project.outputs, *sides))
    return 2 * sum(cost.multiply_adds for cost in costs)


# %% tags=["plumbing"]
# fold: Where PyTorch's counter finds them
#| export fast/fused_block.py
from torch.utils.flop_counter import flop_registry, shape_wrapper

from mixconv.fast.costs import block_costs, block_flops


def _count_flops(x: list[int], weights: Any, biases: Any, spec: str, **_: Any) -> int:
    return block_flops(BlockSpec.parse(spec), x)


flop_registry[torch.ops.mixconv.inverted_residual] = shape_wrapper(_count_flops)

# %% [markdown]
# Under autocast the layers around the block give bfloat16. The block computes in the type of its weights:

# %% tags=["plumbing"]
# fold: The operation under autocast
#| export fast/fused_block.py
from collections.abc import Callable
from typing import cast


def _under_autocast(key: str) -> Callable[..., Tensor]:
    """The operation where autocast rules: in the type of the weights, whatever x comes in."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y = torch.ops.mixconv.inverted_residual(x.to(weights[1].dtype), weights, biases, spec)
            return cast("Tensor", y)

    return run


_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
for _key in _AUTOCAST.values():
    _operation._lib.impl("inverted_residual", _under_autocast(_key), _key)


# %% [markdown]
# And the function that others call. Where a derivative is taken, or a function transform is at work, the block is its separate steps, each of which knows its own rules.

# %% tags=["plumbing"]
# fold: How a derivative or a transform is noticed
#| export fast/fused_block.py
def _needs_formulas(*tensors: Tensor) -> bool:
    """Whether somebody differentiates or transforms: then the block is its separate steps."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


# %%
#| export fast/fused_block.py
from mixconv.fast.forms import must_dispatch


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
    if x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type):
        x = x.to(weights[1].dtype)
    if _needs_formulas(x, *weights, *biases):
        if not torch.compiler.is_compiling():
            check_block_call(describe_block_call(x, weights, biases, spec))
        return block_form(x, weights, biases, spec)
    operation = torch.ops.mixconv.inverted_residual
    return cast("Tensor", operation(x, weights, biases, str(spec)))


# %% [markdown]
# A module holds a block's parameters, to stand in a model where the block was. Chapter 16 puts it there.

# %%
#| export fast/fused_block.py
from mixconv.fast.fused_layer import FusedModule
from mixconv.formulation import LayerCost


class FusedBlock(FusedModule):
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

    def compute(self, x: Tensor) -> Tensor:
        """The block, in the type of its weights."""
        # By name: counters of other packages register buffers of their own.
        weights: list[Tensor] = [getattr(self, f"weight{index}") for index in range(5)]
        biases: list[Tensor] = [getattr(self, f"bias{index}") for index in range(5)]
        if isinstance(x, torch.fx.Proxy):
            operation = torch.ops.mixconv.inverted_residual
            return cast("Tensor", operation(x, weights, biases, str(self.spec)))
        return inverted_residual(x.to(weights[1].dtype), weights, biases, self.spec)

    def layer_costs(self, name: str, x: Tensor, output: Tensor) -> list[LayerCost]:
        """What `count_costs` counts: the layers inside."""
        return block_costs(self.spec, name, x.shape, output.shape)


# %% [markdown]
# ## Equal to its layers
#
# A small block from PyTorch's and chapter 3's layers, and the same as one value with packed weights. With a gradient the steps compute, forward and backward; without, the operation does. Both are compared:

# %%
from torch import nn

from mixconv.fast.spec import pack_weights
from mixconv.layer import MixConv2d
from mixconv.teaching import check, check_rewrite

torch.manual_seed(0)
expand, mix, project = nn.Conv2d(6, 20, 1), MixConv2d(20, (3, 5), bias=True), nn.Conv2d(20, 6, 1)
tiny = BlockSpec(
    MixSpec((10, 10), (3, 5), 1, (1, 1), "symmetric", "silu"), PointwiseSpec(6, 20, 1, "silu"),
    None, None, PointwiseSpec(20, 6, 1, "none"), residual=True,
)  # fmt: skip
empty = torch.empty(0)
points = [pack_pointwise(layer.weight.detach(), 1) for layer in (expand, project)]
depthwise = pack_weights([conv.weight.detach() for conv in mix.convs])
weights = [points[0], depthwise, empty, empty, points[1]]
bias = torch.cat([conv.bias.detach() for conv in mix.convs])
biases = [expand.bias.detach(), bias, empty, empty, project.bias.detach()]


# %%
def layers(x: Tensor) -> Tensor:
    return x + project(silu(mix(silu(expand(x)))))


fused, silu, x = FusedBlock(tiny, weights, biases), nn.SiLU(), torch.randn(2, 6, 9, 8)
check_rewrite(layers, fused, x, what="layers and steps")
with torch.no_grad():
    check(fused(x), layers(x), "layers and one operation")
fused

# %% [markdown]
# ## Takeaways
# - Count the bytes before the multiply-adds: here seven of nine passes over the wide tensor can go.
# - An operation's description must pass through PyTorch as numbers and text; a value that prints and parses does.
# - The reference comes first. The kernel, on the next page, is held to it.
#
# Previous: [14 · The kernel, called](14_whole_kernel_called.ipynb) · Next: [15 · A block in one pass](15_block_in_one_pass.ipynb)
