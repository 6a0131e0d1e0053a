# %% [markdown]
# # 3 · The layer
#
# `MixConv2d`: a layer that goes where a depthwise `nn.Conv2d` went.
#
# **You will be able to**
# - use `MixConv2d` with any odd kernel sizes, split, stride and dilation, and with two paddings;
# - say what TensorFlow's 'SAME' padding does where PyTorch's habit does something else;
# - check the layer, with stride and dilation, against the loops of chapter 1, and rewrite it as *one* depthwise convolution.
#
# **Know first:** [chapter 1](01_formulation.ipynb) and [chapter 2](02_partitioning.ipynb).
#
# **Time:** 25 minutes to read. Runs in under 20 seconds on two cores.

# %% [markdown]
# ## In a dozen lines
#
# Chapter 1's MixConv as a PyTorch module: split, one depthwise `nn.Conv2d` for each group, concatenate.

# %%
import torch
from torch import nn


class TinyMixConv(nn.Module):
    def __init__(self, partition: tuple[int, ...], kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.partition = partition
        self.convs = nn.ModuleList(
            nn.Conv2d(c, c, k, padding=k // 2, groups=c, bias=False)
            for c, k in zip(partition, kernel_sizes, strict=True)
        )

    def forward(self, x):
        groups = x.split(self.partition, dim=1)
        return torch.cat([conv(group) for conv, group in zip(self.convs, groups, strict=True)], 1)


# %% [markdown]
# By hand first. Chapter 1's example had a channel that counts from 0 to 24 under a 3×3 kernel of ones, and a channel of ones under a 5×5 kernel of ones. At the centre: 108 and 25. In the corner: 12 and 9.

# %%
tiny = TinyMixConv((1, 1), (3, 5))
for conv in tiny.convs:
    nn.init.ones_(conv.weight)
x = torch.stack([torch.arange(25.0).view(5, 5), torch.ones(5, 5)])[None]
with torch.no_grad():
    y = tiny(x)[0]
assert (y[0, 2, 2], y[1, 2, 2], y[0, 0, 0], y[1, 0, 0]) == (108, 25, 12, 9)
y[:, 2, 2], y[:, 0, 0]

# %% [markdown]
# And on random numbers, forward and gradient, against the loops. `functional_call` runs a module with weights given from outside.

# %%
from torch.func import functional_call

from mixconv.formulation import count_parameters, mixconv_loops
from mixconv.teaching import check_rewrite


def as_function(layer):
    """The layer as a function of its input and its weights."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), x)


def weights_of(layer):
    return [parameter.detach() for parameter in layer.parameters()]


torch.manual_seed(0)
tiny = TinyMixConv((2, 1), (3, 5)).double()
check_rewrite(
    lambda x, *w: mixconv_loops(x[0], w)[None],
    as_function(tiny),
    torch.randn(1, 3, 4, 5).double(),
    *weights_of(tiny),
    what="loops and a dozen lines",
)

# %% [markdown]
# That is the whole idea. A layer for real use must also answer: what happens at stride 2, with dilation, in another type, with a bad argument? The rest of the chapter answers, padding first.
#
# ## Padding, by hand
#
# With stride 1 everybody agrees: put (k − 1) / 2 zeros on each side, and the output is as large as the input.
# With stride 2 there are two habits. Take a row of six pixels and a kernel of size 3.
#
# **Symmetric** (PyTorch's habit): one zero on each side. Windows are centred on pixels 0, 2 and 4.
#
# **'SAME'** (TensorFlow): there must be ⌈6 / 2⌉ = 3 outputs, so the windows span (3 − 1) · 2 + 3 = 7 pixels. That is one more than there are. One zero is needed, and TensorFlow puts the odd one at the *end*. Windows are centred on pixels 1, 3 and 5. (PyTorch's own `padding="same"` is no way out: it refuses every stride but 1, where alone the two habits agree.)
#
# Both give three outputs, and they look at different pixels. Weights belong to the padding they were trained with: [chapter 8](08_official.ipynb) shows what the wrong one does to MixNet's scores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(3, 1, figsize=(6.6, 4.0))
cases = [("6 pixels, symmetric", 6, 0), ("6 pixels, 'SAME'", 6, 1), ("7 pixels, both", 7, 0)]
for axis, (title, size, first) in zip(axes, cases, strict=True):
    for pixel in range(first - 1, size + 1):
        inside = 0 <= pixel < size
        style = {"facecolor": "#e4e4e4"} if inside else {"facecolor": "white", "hatch": "////"}
        axis.add_patch(plt.Rectangle((pixel - 0.46, 0), 0.92, 0.7, edgecolor="#aaaaaa", **style))
        axis.text(pixel, 0.35, str(pixel) if inside else "", ha="center", va="center")
    for number, centre in enumerate(range(first, size, 2)):
        height = 0.95 + 0.3 * (number % 2)
        axis.plot([centre - 1.42, centre + 1.42], [height] * 2, lw=5, color=kernel_color(3))
        axis.plot(centre, height, "o", color="white", markersize=3.5)
    centres = ", ".join(map(str, range(first, size, 2)))
    axis.text(7.7, 0.35, f"centres {centres}", va="center", weight="bold")
    axis.text(-1.9, 0.35, title, va="center", ha="right")
    axis.set(xlim=(-5.2, 11), ylim=(-0.1, 1.6))
    axis.axis("off")
show(
    figure,
    "same_padding.png",
    "Rows of pixels, hatched where a zero is added, under the windows of a 3-kernel at stride 2, "
    "a white dot in the middle of each. On six pixels, symmetric padding "
    "centres them on pixels 0, 2, 4 and TensorFlow's 'SAME' on 1, 3, 5. On seven pixels both "
    "centre on 0, 2, 4, 6.",
    caption="At stride 2, 'SAME' looks one pixel further on if the pixels are even in number; if "
    "odd, the two agree. (Windows at two heights, so that none hides another.)",
)

# %% [markdown]
# At stride 2, on an odd number of pixels the two agree. On an even number, 'SAME' is shifted by one pixel. MixNet's input has 224 = 16 · 14 pixels a side: even at each of its strides down to 14.
#
# As formulas: the output has $\lceil H / s \rceil$ rows. The windows need $(\lceil H/s \rceil - 1) \cdot s + (k - 1) \cdot d + 1$ pixels. What is missing is added, the smaller half first.
# Since $(\lceil H/s \rceil - 1) \cdot s = H - 1 - ((H - 1) \bmod s)$, the total shrinks to
#
# $$
# \mathrm{total} = \max\left((k - 1) \cdot d - ((H - 1) \bmod s),\ 0\right)
# $$
#
# The code takes the maximum only where it can matter. (`torch.sym_max` is `max`, also for a size that is not known yet: chapter 18 exports such models.)

# %%
#| export layer.py
"""`MixConv2d`, the layer, and TensorFlow's 'SAME' padding (paper, section 3; chapter 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(
    size: int, kernel_size: int, stride: int = 1, dilation: int = 1
) -> tuple[int, int]:
    """Zeros before and after an axis under TensorFlow's 'SAME' rule.

    The output has `ceil(size / stride)` positions. Where the zeros are odd in number, the
    extra one goes after. Works on symbolic sizes, so that exported models keep them free.

    Args:
        size: pixels along the axis.
        kernel_size: taps of the kernel along it.
        stride: step between outputs.
        dilation: step between taps.

    Source: TensorFlow's padding rule; the official MixNet uses it everywhere.
    """
    total = dilation * (kernel_size - 1) - (size - 1) % stride
    if dilation * (kernel_size - 1) < stride - 1:  # otherwise never negative
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2


# %%
[same_padding(6, 3, 2), same_padding(7, 3, 2), same_padding(6, 5, 2), same_padding(6, 1, 2)]

# %% [markdown]
# The first two are in the figure: one zero after six pixels, one on each side of seven.
#
# `Conv2dSame` is `nn.Conv2d` with that rule. The zeros depend on the input size, so they are added in `forward`. How many go in front decides where the windows are centred. Behind, it adds the rest of (k − 1) · d. That may be a few zeros more than the rule asks for, which no window reads; and the total is the same for every image size.

# %%
#| export layer.py
from mixconv._checks import refuse_script


class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's 'SAME' padding, for any input size and stride.

    Takes the arguments of `nn.Conv2d`; `padding` and `padding_mode` are not used.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name for it
        """Pad by TensorFlow's rule, then convolve."""
        zeros: list[int] = []
        for axis in (1, 0):  # F.pad begins with the last axis
            k, step, spread = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            before, _ = same_padding(input.shape[axis - 2], k, step, spread)
            # The rest behind: what lies after the last window is never read.
            zeros += [before, spread * (k - 1) - before]
        x = F.pad(input, zeros)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


# %% [markdown]
# Check it without TensorFlow. Stride 2 is stride 1 with every other output thrown away. By the figure, 'SAME' keeps the odd ones of an even axis and the even ones of an odd axis:

# %%
strided = Conv2dSame(4, 4, 5, stride=2, bias=False)
check_rewrite(
    lambda x, w: F.conv2d(x, w, padding=2)[:, :, 1::2, 0::2],
    as_function(strided),
    torch.randn(1, 4, 6, 7).double(),
    torch.randn(4, 4, 5, 5).double(),
    what="'SAME' on 6×7 pixels",
)

# %% [markdown]
# (That the official code agrees is tested against its own numbers in chapter 8.)
#
# At stride 1 and odd k the rule asks for (k − 1) / 2 zeros on each side, always. `nn.Conv2d` does that by itself, and faster. So one function picks the right class:

# %%
#| export layer.py
from mixconv._checks import as_pair, check_positive

PADDINGS = ("symmetric", "same")


def make_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int | tuple[int, int] = 1,
    *,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = False,
    padding: str = "symmetric",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv2d:
    """A convolution with an odd kernel that keeps `ceil(size / stride)` outputs.

    Args as in `nn.Conv2d`, for odd kernels, but for two: `bias` is off, since a batch norm mostly
    follows, and `padding` is "symmetric" (k // 2 on each side, PyTorch's habit) or "same"
    (TensorFlow's rule).

    Raises:
        ValueError: for an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    spread = as_pair("dilation", dilation)
    conv: type[nn.Conv2d] = nn.Conv2d
    zeros = (spread[0] * (kernel_size // 2), spread[1] * (kernel_size // 2))
    if padding == "same" and stride not in (1, (1, 1)):
        conv, zeros = Conv2dSame, (0, 0)
    return conv(
        in_channels, out_channels, kernel_size, stride, zeros,
        dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
    )  # fmt: skip


# %%
make_conv2d(8, 8, 5, padding="same"), make_conv2d(8, 8, 5, stride=2, padding="same")

# %% [markdown]
# **3.1** ★ *5 minutes, one line.* Kernel 9, stride 2. How many zeros does TensorFlow put before and after an axis of 28 pixels? And of 27? Work it out by hand.
#
# <details><summary>Hint: the idea</summary>
#
# 28 / 2 = 14 outputs, and as many from 27. How many pixels do 14 windows of 9 span, two pixels apart? What is missing is added, half in front.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# $(14 - 1) \cdot 2 + 9 = 35$
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def zeros_by_hand() -> tuple[tuple[int, int], tuple[int, int]]:
    raise NotImplementedError


def test_zeros(answer) -> None:
    right = (same_padding(28, 9, 2), same_padding(27, 9, 2))
    expect(answer, gives=right, why="7 zeros and 8 zeros; of an odd number the smaller half first")


attempt(zeros_by_hand, test_zeros)


# %% tags=["solution"]
# fold: Solution
def zeros_by_hand_solution() -> tuple[tuple[int, int], tuple[int, int]]:
    return (3, 4), (4, 4)


def odd_one_first() -> tuple[tuple[int, int], tuple[int, int]]:
    """put the odd zero in front: TensorFlow puts it behind"""
    return (4, 3), (4, 4)


def as_pytorch() -> tuple[tuple[int, int], tuple[int, int]]:
    """pad as PyTorch does, half a kernel on each side"""
    return (4, 4), (4, 4)


attempt(zeros_by_hand_solution, test_zeros, wrong=[odd_one_first, as_pytorch])

# %% [markdown]
# ## The layer
#
# `MixConv2d` is `TinyMixConv` with every option. Two defaults differ from `nn.Conv2d`: there is no bias, since a batch normalisation mostly follows, and at stride 1 the padding keeps the image size.
#
# The class is told in pieces: a later cell with `class MixConv2d(MixConv2d)` adds methods to it, and in the package it is one class.
#
# The constructor checks its arguments, splits the channels as in chapter 2, and makes one depthwise convolution for each group.
#
# > 📄 **Paper.** Section 3.2: a large kernel may be replaced by a dilated 3×3 kernel.
#
# > ⚙️ **Official code.** With `dilated`, a k×k kernel becomes 3×3 with dilation (k − 1) / 2, in layers of stride 1 only. Layers with a stride keep their full kernels. We follow the code.

# %%
#| export layer.py
from collections.abc import Sequence
from typing import cast

from mixconv._checks import check_flags, check_kernel_sizes
from mixconv.partition import resolve_partition


class MixConv2d(nn.Module):
    """Mixed depthwise convolution: groups of channels with kernel sizes of their own.

    With one kernel size it is the depthwise layer `nn.Conv2d(channels, channels, k,
    padding=k // 2, groups=channels, bias=False)`.

    Args:
        channels: input channels.
        kernel_sizes: one odd size for each group; one integer makes it a plain depthwise layer.
        stride: step between outputs, for both axes or each.
        partition: "equal", "exponential", "logarithmic", or the channels of each group.
        dilated: replace k×k kernels by 3×3 with dilation (k - 1) / 2; only acts at stride 1,
            as in the official code.
        padding: "symmetric" (PyTorch's habit) or "same" (TensorFlow's rule).
        channel_multiplier: outputs for each input channel.
        bias: whether to add a bias.
        dilation: step between the taps of every kernel; not together with `dilated`.
        device: where the weights live.
        dtype: their type.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`; output `(N, m·C, ceil(H / stride),
        ceil(W / stride))`, or the same without N.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: naming the argument, its value and what would be right.

    Source: paper, section 3; `MixConv` in the official `custom_layers.py`. Chapter 3.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        channels: int,
        kernel_sizes: int | Sequence[int],
        stride: int | tuple[int, int] = 1,
        *,
        partition: str | Sequence[int] = "equal",
        dilated: bool = False,
        padding: str = "symmetric",
        channel_multiplier: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, int] = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("channel_multiplier", channel_multiplier)
        check_flags(dilated=dilated, bias=bias)
        self.kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.partition = resolve_partition(channels, self.kernel_sizes, partition)
        self.in_channels, self.out_channels = channels, channels * channel_multiplier
        self.stride, self.dilation = as_pair("stride", stride), as_pair("dilation", dilation)
        self.padding, self.dilated, self.channel_multiplier = padding, dilated, channel_multiplier
        self.convs = nn.ModuleList(
            make_conv2d(
                count, count * channel_multiplier, size, self.stride, dilation=spread,
                groups=count, bias=bias, padding=padding, device=device, dtype=dtype,
            )
            for count, (size, spread) in zip(self.partition, self._kernels(), strict=True)
        )  # fmt: skip


# %% [markdown]
# Which kernel does each group really get? Its size, and the step between its taps. (`_convolutions` only tells the type checker what `convs` holds.)

# %%
#| export layer.py
class MixConv2d(MixConv2d):
    def _kernels(self) -> list[tuple[int, tuple[int, int]]]:
        """Kernel size and dilation of each group, after the rule for `dilated`."""
        if not self.dilated or self.stride != (1, 1):
            return [(k, self.dilation) for k in self.kernel_sizes]
        if self.dilation != (1, 1):
            raise ValueError(f"dilated sets the dilation itself, got dilation={self.dilation}")
        if 1 in self.kernel_sizes:
            raise ValueError(f"dilated needs kernel_sizes of 3 or more, got {self.kernel_sizes}")
        return [(3, ((k - 1) // 2, (k - 1) // 2)) for k in self.kernel_sizes]

    def _convolutions(self) -> list[nn.Conv2d]:
        return cast("list[nn.Conv2d]", list(self.convs))


# %% [markdown]
# `forward` is the definition: split, convolve, concatenate. It counts dimensions from the end, so that a single image without batch works, as with `nn.Conv2d`.

# %%
#| export layer.py
class MixConv2d(MixConv2d):
    def forward(self, x: Tensor) -> Tensor:
        """Convolve each group with its own kernel size.

        Raises:
            TypeError: if `x` is not a tensor.
            ValueError: if it is not an image or batch with the layer's channels.
        """
        # torch.fx passes proxies: they can be split, but have no shape to compare.
        if not hasattr(x, "split") or isinstance(x, str):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        sizes = [conv.in_channels for conv in self._convolutions()]  # narrower ones, once pruned
        count = sum(sizes)
        if isinstance(x, Tensor) and (x.dim() not in (3, 4) or x.shape[-3] != count):
            wanted = f"(N, {count}, H, W) or ({count}, H, W)"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        groups = x.split(sizes, dim=-3)
        outputs = [conv(groups[index]) for index, conv in enumerate(self.convs)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-3)


# %% [markdown]
# Two courtesies that `nn.Conv2d` users expect: a readable `repr`, and `reset_parameters`.

# %% tags=["plumbing"]
# fold: `reset_parameters`, and what `print` shows
#| export layer.py
class MixConv2d(MixConv2d):
    def reset_parameters(self) -> None:
        """Draw new weights, as each `nn.Conv2d` does."""
        for conv in self._convolutions():
            conv.reset_parameters()

    def __repr__(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_sizes={self.kernel_sizes}",
            f"partition={self.partition}, stride={self.stride}, padding={self.padding!r}",
        ]
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.dilated:
            parts.append("dilated=True")
        if self._convolutions()[0].bias is None:
            parts.append("bias=False")
        return f"MixConv2d({', '.join(parts)})"


# %%
layer = MixConv2d(32, (3, 5, 7, 9), partition="exponential", stride=2, padding="same")
print(layer)
print(tuple(layer(torch.zeros(2, 32, 15, 20)).shape))

# %% [markdown]
# A bad argument is named, with its value and what would be right:

# %%
try:
    MixConv2d(30, (3, 5, 7, 9), partition=(8, 8, 8, 8))
except ValueError as error:
    print(error)

# %% [markdown]
# ## The layer is the loops
#
# Same weights, same input: output and every gradient must agree. With one kernel size, with PyTorch's own depthwise layer; with several, with chapter 1's loops.

# %%
plain = MixConv2d(8, 5)
check_rewrite(
    lambda x, w: F.conv2d(x, w, padding=2, groups=8),
    as_function(plain),
    torch.randn(2, 8, 6, 6).double(),
    torch.randn(8, 1, 5, 5).double(),
    what="nn.Conv2d and MixConv2d with one size",
)
layer = MixConv2d(3, (3, 5, 7), channel_multiplier=2, dtype=torch.double)
check_rewrite(
    lambda x, *w: mixconv_loops(x, w, channel_multiplier=2),
    as_function(layer),
    torch.randn(3, 4, 5).double(),
    *weights_of(layer),
    what="loops and MixConv2d, two outputs per channel",
)


# %% [markdown]
# The loops know neither stride nor dilation, but both can be said in their terms. Stride 2 with symmetric padding keeps every other output of stride 1, from the first on. A kernel with dilation d is a larger one, with d − 1 zeros between its taps. In code that shares nothing with the layer:

# %%
def spread_out(weight, d):
    """A kernel with d - 1 zeros between its taps, along both axes."""
    side = d * (weight.shape[-1] - 1) + 1
    rows = [[torch.zeros_like(weight[:, :, 0, 0])] * side for _ in range(side)]
    for i in range(weight.shape[-1]):
        for j in range(weight.shape[-1]):
            rows[d * i][d * j] = weight[:, :, i, j]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


spread_out(torch.arange(1.0, 10).view(1, 1, 3, 3), 2)[0, 0]

# %%
cases = {  # options of the layer, and the dilation of each of its kernels
    "stride 2": ({"stride": 2}, (1, 1, 1)),
    "stride 2 by 3": ({"stride": (2, 3)}, (1, 1, 1)),
    "dilation 2": ({"dilation": 2}, (2, 2, 2)),
    "dilation 2, stride 2": ({"dilation": 2, "stride": 2}, (2, 2, 2)),
    "dilated": ({"dilated": True}, (1, 2, 3)),
    "dilated, stride 2": ({"dilated": True, "stride": 2}, (1, 1, 1)),
}
for name, (options, steps) in cases.items():
    layer = MixConv2d(3, (3, 5, 7), dtype=torch.double, **options)
    down, across = layer.stride

    def from_loops(x, *w, steps=steps, down=down, across=across):
        spread = [spread_out(*pair) for pair in zip(w, steps, strict=True)]
        return mixconv_loops(x, spread)[:, ::down, ::across]

    inputs = [torch.randn(3, 5, 6).double(), *weights_of(layer)]
    check_rewrite(from_loops, as_function(layer), *inputs, what=f"loops and layer, {name}")

# %% [markdown]
# ## Dilated: seeing far with nine weights
#
# A 3×3 kernel with dilation 3 touches nine pixels of a 7×7 window. Side by side, the taps:

# %% tags=["drawing"]
# fold: The code that draws this
figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.3))
places = [(i, j) for i in range(-4, 5) for j in range(-4, 5)]
for column, k in enumerate((3, 5, 7, 9)):
    for row, step in enumerate((1, (k - 1) // 2)):
        axis = axes[row, column]
        for i, j in places:
            inside = max(abs(i), abs(j)) <= k // 2
            tap = inside and i % step == 0 and j % step == 0
            shade = kernel_color(k) if tap else "#e8e8e8" if inside else "white"
            axis.add_patch(plt.Rectangle((j - 0.42, i - 0.42), 0.84, 0.84, color=shade, lw=0))
        axis.set(xlim=(-4.6, 4.6), ylim=(-4.6, 4.6), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_xlabel(f"{9 if row else k * k} weights", fontsize=9)
        axis.set_title("" if row else f"{k}×{k}")
axes[0, 0].set_ylabel("full")
axes[1, 0].set_ylabel("dilated")
show(
    figure,
    "dilated_taps.png",
    "Kernels of size 3, 5, 7 and 9. Above, full kernels with 9, 25, 49 and 81 weights. Below, "
    "dilated 3×3 kernels whose nine weights are spread over the same windows.",
    caption="Dilated, every kernel has nine weights and keeps its window; what lies between the "
    "taps is skipped.",
)

# %%
dilated = MixConv2d(32, (3, 5, 7, 9), dilated=True)
full = MixConv2d(32, (3, 5, 7, 9))
strided = MixConv2d(32, (3, 5, 7, 9), stride=2, dilated=True)
for layer in (full, dilated, strided):
    taps = [(conv.kernel_size[0], conv.dilation[0]) for conv in layer.convs]
    print("kernel, dilation:", taps, "weights:", count_parameters(layer))


# %% [markdown]
# With stride 2 the flag changes nothing: the third line has the kernels of the first.

# %% [markdown]
# **3.2** ★★ *10 minutes, two lines.* A dilated kernel skips pixels. Stack `layers` dilated 3×3 kernels of one dilation $d$: does the second layer see what the first one skipped? Return, along one axis, the offsets from the middle that lie inside the window and are *never* seen, sorted.
#
# <details><summary>Hint: the idea</summary>
#
# One layer steps by −d, 0 or d. Where can you be after several such steps?
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# After $L$ layers the window reaches from $-L \cdot d$ to $L \cdot d$. All sums of steps are multiples of $d$.
#
# </details>

# %%
def never_seen(dilation: int, layers: int) -> list[int]:
    raise NotImplementedError


def test_never_seen(answer) -> None:
    expect(answer, 1, 3, gives=[], why="without dilation nothing is skipped")
    expect(answer, 2, 1, gives=[-1, 1], why="the taps are at −2, 0 and 2")
    for d, layers in ((2, 3), (3, 2)):
        stack = [nn.Conv1d(1, 1, 3, dilation=d, bias=False) for _ in range(layers)]
        row = torch.zeros(1, 1, 2 * d * layers + 1, requires_grad=True)
        nn.Sequential(*stack)(row).backward()
        dark = (row.grad[0, 0] == 0).nonzero().flatten() - d * layers
        expect(answer, d, layers, gives=dark.tolist(), why="no gradient arrives there")


attempt(never_seen, test_never_seen)


# %% tags=["solution"]
# fold: Solution
def never_seen_solution(dilation: int, layers: int) -> list[int]:
    reach = dilation * layers
    return [offset for offset in range(-reach, reach + 1) if offset % dilation]


def odd_ones(dilation: int, layers: int) -> list[int]:
    """take every other pixel, which is right for dilation 2 only"""
    reach = dilation * layers
    return [offset for offset in range(-reach, reach + 1) if offset % 2 and dilation > 1]


def filled_later(dilation: int, layers: int) -> list[int]:
    """hope that the second layer fills the gaps of the first"""
    return never_seen_solution(dilation, 1) if layers == 1 else []


attempt(never_seen_solution, test_never_seen, wrong=[odd_ones, filled_later])


# %% [markdown]
# ## The merged form
#
# Exercise 1.2 had it: a 3×3 kernel is a 7×7 kernel with a border of zeros. So a MixConv layer is *one* depthwise convolution whose kernels are mostly zeros for the small groups.
# It computes the same, with more multiplications, but in one call in place of g, without split and concatenation.
#
# A kernel with dilation $d$ is embedded with its taps $d$ apart.

# %%
#| export layer.py
def embed_kernel(weight: Tensor, size: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
    """Kernels in the middle of larger ones that are zero elsewhere; gradients flow through.

    Args:
        weight: kernels of odd size k.
        size: odd, at least `dilation * (k - 1) + 1`.
        dilation: steps to put between the taps, rows and columns.

    Shape:
        weight `(C, 1, k, k)`, output `(C, 1, size, size)`.
    """
    rows, columns = (d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    top, left = (size - rows) // 2, (size - columns) // 2
    larger = weight.new_zeros(*weight.shape[:2], size, size)
    larger[:, :, top : top + rows : dilation[0], left : left + columns : dilation[1]] = weight
    return larger


# %%
embed_kernel(torch.arange(1.0, 10).view(1, 1, 3, 3), 5, dilation=(2, 2))[0, 0]


# %% [markdown]
# Does padding survive? Symmetric padding centres every window on the pixels 0, s, 2s, …, whatever k is: a small kernel in the middle of a large one stays where it was.
# Under 'SAME', write $u = (H - 1) \bmod s$. There are $(k - 1) \cdot d / 2 - \lceil u / 2 \rceil$ zeros in front, so the first window is centred on pixel $\lceil u / 2 \rceil$: again, k has dropped out.
# The exception is a kernel that would need fewer than no zeros: 1×1 at stride 2, or 3×3 at stride 4. On some image sizes its windows are centred elsewhere, so it cannot be merged with larger ones.
#
# The merge takes any depthwise convolutions that stand side by side, not only those of our layer. Kernels that share a dilation keep it; otherwise each is written out with its gaps. Then all are embedded in windows of the largest span and stacked.

# %%
#| export layer.py
@torch.no_grad()
def merge_depthwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Depthwise convolutions side by side as one, with zero-embedded kernels.

    Args:
        convs: `nn.Conv2d` or `Conv2dSame`, one for each group of channels, in channel order.

    Returns:
        A new convolution of all channels, with copies of the weights.

    Raises:
        ValueError: saying why one convolution cannot do it: another class; another padding than
            "symmetric" or "same"; layers that differ in stride, multiplier, bias, dtype or device;
            with "same", a kernel too small for the stride.

    Source: ours. Chapter 3.
    """
    _check_mergeable(convs)
    first, spreads = convs[0], cast("list[tuple[int, int]]", [c.dilation for c in convs])
    dilation = spreads[0] if len(set(spreads)) == 1 else (1, 1)
    pairs = [(c, (1, 1) if s == dilation else s) for c, s in zip(convs, spreads, strict=True)]
    size = max(d * (k - 1) + 1 for c, s in pairs for k, d in zip(c.kernel_size, s, strict=True))
    channels, outputs = sum(c.in_channels for c in convs), sum(c.out_channels for c in convs)
    merged = make_conv2d(
        channels, outputs, size, cast("tuple[int, int]", first.stride), dilation=dilation,
        groups=channels, bias=first.bias is not None, padding=PADDINGS[type(first) is Conv2dSame],
    ).to(first.weight)  # fmt: skip
    merged.weight.copy_(torch.cat([embed_kernel(c.weight, size, s) for c, s in pairs]))
    if merged.bias is not None:
        merged.bias.copy_(torch.cat([c.bias for c in convs if c.bias is not None]))
    return merged.train(first.training)


# %% [markdown]
# What it cannot prove to be one convolution, it refuses: a class of somebody's own may compute anything.

# %% tags=["plumbing"]
# fold: Is each of them a depthwise convolution with its usual padding?
#| export layer.py
def _check_depthwise(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError unless there are layers, all depthwise and padded as `MixConv2d` pads."""
    if not convs:
        raise ValueError("convs must hold at least one convolution, got none")
    for c in convs:
        if type(c) not in (nn.Conv2d, Conv2dSame):
            raise ValueError(f"a {type(c).__name__} may compute more than a convolution")
        if c.groups != c.in_channels or not all(k % 2 for k in c.kernel_size):
            raise ValueError(f"{c} is not depthwise with an odd kernel")
        zeros = tuple(d * (k // 2) for k, d in zip(c.kernel_size, c.dilation, strict=True))
        symmetric = c.padding in (zeros, "same") and c.padding_mode == "zeros"
        if type(c) is nn.Conv2d and not symmetric:
            raise ValueError(f"{c} is not padded by {zeros} zeros")


# %% tags=["plumbing"]
# fold: Can one convolution do the work of all?
#| export layer.py
def _check_mergeable(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError, saying why, unless one depthwise convolution can do the work of all."""
    _check_depthwise(convs)
    settings = {
        (type(c).__name__, c.stride, c.out_channels // c.in_channels, c.bias is None,
         c.weight.dtype, c.weight.device) for c in convs
    }  # fmt: skip
    if len(settings) > 1:
        what = "class, stride, outputs per channel, bias, dtype or device"
        raise ValueError(f"convs differ in {what}: {settings}")
    if type(convs[0]) is Conv2dSame and len({(c.kernel_size, c.dilation) for c in convs}) > 1:
        _check_centres(convs)


def _check_centres(convs: Sequence[nn.Conv2d]) -> None:
    """Raise ValueError if 'SAME' would centre the windows of a kernel elsewhere."""
    for c in convs:
        axes = zip(c.kernel_size, c.dilation, c.stride, strict=True)
        if any(d * (k - 1) < s - 1 for k, d, s in axes):
            why = "(k - 1) * dilation must be at least stride - 1 for padding 'same'"
            raise ValueError(f"cannot merge {c}: {why}")


# %%
#| export layer.py
class MixConv2d(MixConv2d):
    def merged(self) -> nn.Conv2d:
        """The same operation as one depthwise convolution, with copies of the weights.

        Raises:
            ValueError: if one convolution cannot do it; see `merge_depthwise`.
        """
        return merge_depthwise(self._convolutions()).train(self.training)


# %%
layer = MixConv2d(32, (3, 5, 7, 9))
print(layer.merged())
print("weights:", count_parameters(layer), "split,", count_parameters(layer.merged()), "merged")


# %% [markdown]
# Twice the weights here, half of them zeros. The rewrite, checked with gradients: full and dilated kernels at stride 1, and stride 2 with 'SAME'.

# %%
def merged_as_function(layer):
    """The merged layer as a function of its input and of the split layer's weights."""
    merged, spreads = layer.merged(), [conv.dilation for conv in layer.convs]

    def run(x, *weights):
        size, pairs = merged.kernel_size[0], zip(weights, spreads, strict=True)
        kernel = torch.cat([embed_kernel(w, size, spread) for w, spread in pairs])
        return functional_call(merged, {"weight": kernel}, x)

    return run


for options in ({}, {"dilated": True}, {"stride": 2, "padding": "same"}):
    layer = MixConv2d(8, (3, 5, 7, 9), dtype=torch.double, **options)
    inputs = [torch.randn(2, 8, 10, 11).double(), *weights_of(layer)]
    pair = as_function(layer), merged_as_function(layer)
    check_rewrite(*pair, *inputs, what=f"split and merged, {options}")

# %% [markdown]
# And the case that cannot be merged:

# %%
try:
    MixConv2d(8, (1, 3), stride=2, padding="same").merged()
except ValueError as error:
    print(error)

# %% [markdown]
# **3.3** ★★★ *20 minutes, six lines.* Unmerge. You get the weights `(C, 1, K, K)` of a merged layer. Read its mix off the zeros: return `(channels, kernel size)` for each run of neighbouring channels of one size. Zeros may stand anywhere in a trained kernel, as long as its outermost ring is not all zero.
#
# <details><summary>Hint: the idea</summary>
#
# The size of a kernel is that of the smallest centred square *outside of which* all is zero. A zero inside says nothing.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `far = torch.maximum(rows.abs(), columns.abs())` is each tap's distance from the middle, counted in squares; the largest distance with a weight gives the side.
#
# </details>

# %%
from itertools import groupby


def unmerge(weight: torch.Tensor) -> list[tuple[int, int]]:
    raise NotImplementedError


def test_unmerge(answer) -> None:
    for mix in ([(2, 3)], [(1, 3), (2, 5)], [(2, 3), (1, 7), (3, 5)]):
        partition, sizes = zip(*mix, strict=True)
        weight = MixConv2d(sum(partition), sizes, partition=partition).merged().weight.detach()
        expect(answer, weight, gives=mix, why="so it was merged")
        middle = weight.shape[-1] // 2
        weight[:, :, middle] = 0  # a row of zeros that training left there
        expect(answer, weight, gives=mix, why="zeros in its middle make no kernel smaller")


attempt(unmerge, test_unmerge)


# %% tags=["solution"]
# fold: Solution
def unmerge_solution(weight: torch.Tensor) -> list[tuple[int, int]]:
    axis = (torch.arange(weight.shape[-1]) - weight.shape[-1] // 2).abs()
    far = torch.maximum(axis[:, None], axis[None, :])
    sides = [2 * int(far[kernel[0] != 0].max()) + 1 for kernel in weight]
    return [(len(list(run)), side) for side, run in groupby(sides)]


def by_count(weight: torch.Tensor) -> list[tuple[int, int]]:
    """count the weights that are not zero, and take the root"""
    sides = [round(int((kernel != 0).sum()) ** 0.5) for kernel in weight]
    return [(len(list(run)), side) for side, run in groupby(sides)]


def by_middle_row(weight: torch.Tensor) -> list[tuple[int, int]]:
    """look along the middle row only"""
    sides = [int((kernel[0, weight.shape[-1] // 2] != 0).sum()) for kernel in weight]
    return [(len(list(run)), side) for side, run in groupby(sides)]


attempt(unmerge_solution, test_unmerge, wrong=[by_count, by_middle_row])

# %% [markdown]
# ## At home in PyTorch
#
# What works on modules works on it, with one exception. `torch.jit.script` is refused, in words that say what to use instead:

# %%
layer = MixConv2d(8, (3, 5))
x = torch.randn(2, 8, 6, 6)
print(list(layer.state_dict()))
print(layer.double()(x.double()).dtype, layer.float()(x).dtype)
last = {"memory_format": torch.channels_last}
print("channels_last kept:", layer.to(**last)(x.to(**last)).is_contiguous(**last))
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(layer(x).dtype)
try:
    torch.jit.script(layer)
except NotImplementedError as error:
    print(error)


# %% [markdown]
# ## Beside it: 1×1
#
# The *pointwise* 1×1 convolution that stands beside every depthwise layer needs no padding, and chapter 4 will ask for it in groups. The package makes a 1×1 in this one way:

# %% tags=["plumbing"]
# fold: A 1×1 convolution, with its arguments checked
#| export layer.py
def make_pointwise(
    in_channels: int, out_channels: int, groups: int = 1, *, bias: bool = False
) -> nn.Conv2d:
    """A 1×1 convolution, on all channels or on equal groups of them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        groups: how many groups; must divide both.
        bias: whether to add a bias; off, since a batch norm mostly follows.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, H, W)`; weight `(C_out, C_in / groups, 1, 1)`.

    Raises:
        TypeError: for a number that is not an integer.
        ValueError: if a number is below 1 or `groups` does not divide the channels.

    Source: `GroupedConv2D` in the official `custom_layers.py`. Chapter 3.
    """
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    check_positive("groups", groups)
    if in_channels % groups or out_channels % groups:
        numbers = f"{groups} groups for {in_channels} and {out_channels} channels"
        raise ValueError(f"groups must divide in_channels and out_channels, got {numbers}")
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias)


# %%
make_pointwise(6, 8, groups=2)

# %% [markdown]
# ## What each group sees
#
# Give four channels the same photograph, and each group a filter of its own size: bright in the middle, dark around it, zero on the whole. It answers where the picture has a spot or a line about as wide as its middle. Below, a part of the photograph with the stars of the flag.

# %%
from mixconv.teaching import photograph


def spot_filter(k: int) -> torch.Tensor:
    """A difference of two Gaussians that fills a k×k window and sums to zero."""
    axis = torch.arange(k) - k // 2
    distance = axis[:, None] ** 2 + axis[None, :] ** 2
    narrow, wide = (torch.exp(-distance / (2 * s**2)) for s in (k / 8, k / 4))
    return narrow / narrow.sum() - wide / wide.sum()


layer = MixConv2d(4, (3, 5, 7, 9))
with torch.no_grad():
    for conv, k in zip(layer.convs, layer.kernel_sizes, strict=True):
        conv.weight[0, 0] = spot_filter(k)
assert all(abs(conv.weight.sum()) < 1e-6 for conv in layer.convs)
picture = photograph(96).mean(dim=1, keepdim=True)
with torch.no_grad():
    responses = layer(picture.expand(1, 4, 96, 96))[0]
tuple(responses.shape)

# %% tags=["drawing"]
# fold: The code that draws this
figure, axes = plt.subplots(1, 5, figsize=(9, 2.2))
part = (slice(8, 52), slice(0, 44))  # rows and columns
axes[0].imshow(picture[0, 0][part], cmap="gray")
axes[0].set_title("input")
for axis, k, response in zip(axes[1:], (3, 5, 7, 9), responses, strict=True):
    axis.imshow(response[part], cmap="gray", vmin=-0.12, vmax=0.12)
    axis.add_patch(plt.Rectangle((42.5 - k, 42.5 - k), k, k, color=kernel_color(k), linewidth=0))
    axis.set_title(f"{k}×{k}")
    axis.spines[:].set(color=kernel_color(k), linewidth=3, visible=True)
for axis in axes:
    axis.set(xticks=[], yticks=[])
axes[0].spines[:].set_visible(False)
show(
    figure,
    "what_groups_see.png",
    "Part of the photograph, a flag and a face, and the four groups' responses to it, framed in "
    "the colours of their kernels, with a square of the kernel's size. The 3×3 group shows the "
    "stars of the flag as thin outlines, the 9×9 group as filled, blurred spots.",
    caption="The larger the kernel, the thicker what it draws: 3×3 outlines the stars, 9×9 fills "
    "them. (The square in a corner is the kernel's window, to scale.)",
)


# %% [markdown]
# One layer, four scales, at 9 + 25 + 49 + 81 = 164 weights. A plain 9×9 layer could hold the same four filters, zeros around the small ones (that is `merged`), with 4 · 81 = 324. These filters are ours; training would find its own.

# %% [markdown]
# ## Exercises
#
# **3.4** ★ *5 minutes, two lines.* What does merging cost in multiply-adds? Return the ratio of the merged form's to the split form's, for equal groups.
#
# <details><summary>Hint: the idea</summary>
#
# Merged, every channel has the largest kernel. Split, a channel has the mean of the squares.
#
# </details>

# %%
def merging_ratio(kernel_sizes: tuple[int, ...]) -> float:
    raise NotImplementedError


def test_ratio(answer) -> None:
    expect(answer, (5,), gives=1.0, why="one group has nothing to merge with")
    expect(answer, (3, 5, 7, 9), gives=81 / 41, why="81 against the mean of 9, 25, 49 and 81")
    expect(answer, (3, 9), gives=1.8, why="81 against the mean of 9 and 81")


attempt(merging_ratio, test_ratio)


# %% tags=["solution"]
# fold: Solution
def merging_ratio_solution(kernel_sizes: tuple[int, ...]) -> float:
    squares = [k * k for k in kernel_sizes]
    return max(squares) * len(squares) / sum(squares)


def mean_size(kernel_sizes: tuple[int, ...]) -> float:
    """square the mean size: the mean of the squares is larger"""
    return max(kernel_sizes) ** 2 / (sum(kernel_sizes) / len(kernel_sizes)) ** 2


def all_groups(kernel_sizes: tuple[int, ...]) -> float:
    """count one channel of each group in the split form, and one channel in all in the merged"""
    return max(kernel_sizes) ** 2 / sum(k * k for k in kernel_sizes)


attempt(merging_ratio_solution, test_ratio, wrong=[mean_size, all_groups])

# %% [markdown]
# ## Takeaways
# - `MixConv2d` is split, convolve, concatenate, with PyTorch's manners.
# - TensorFlow's 'SAME' at stride 2 looks one pixel further on if the image has an even number of pixels. Weights belong to a padding.
# - `dilated` keeps nine weights and the wide window, at stride 1.
# - `merged()` is the same operation as one `nn.Conv2d`.
#
# **Further reading**: `MixConv` in [`custom_layers.py`](https://github.com/tensorflow/tpu/blob/master/models/official/mnasnet/mixnet/custom_layers.py). What stacked dilated layers do not see: [Wang and others, section 3.2](https://arxiv.org/abs/1702.08502). Kernels of several sizes merged into one after training: [RepVGG](https://arxiv.org/abs/2101.03697).
#
# Previous: [2 · Partitioning](02_partitioning.ipynb) · Next: [4 · Blocks](04_blocks.ipynb)
