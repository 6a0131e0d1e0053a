# %% [markdown]
# # 3 · The layer
#
# `MixConv2d`: a layer that goes where a depthwise `nn.Conv2d` went.
#
# **You will be able to**
# - use `MixConv2d` with any kernel sizes, split, stride, padding and dilation;
# - say what TensorFlow's 'SAME' padding does where PyTorch's habit does something else;
# - prove the layer equal to the loops of chapter 1, and to *one* depthwise convolution.
#
# **Know first:** [chapter 1](01_formulation.ipynb) and [chapter 2](02_partitioning.ipynb).
#
# **Time:** 25 minutes to read. Runs in under 15 seconds on two cores.

# %% [markdown]
# ## Padding, by hand
#
# With stride 1 everybody agrees: put (k − 1) / 2 zeros on each side, and the output is as large as the input.
# With stride 2 there are two habits. Take a row of six pixels and a kernel of size 3.
#
# **Symmetric** (PyTorch's habit): one zero on each side. Windows are centred on pixels 0, 2 and 4.
#
# **'SAME'** (TensorFlow): there must be ⌈6 / 2⌉ = 3 outputs, so the windows span (3 − 1) · 2 + 3 = 7 pixels. That is one more than there are. One zero is needed, and TensorFlow puts the odd one at the *end*. Windows are centred on pixels 1, 3 and 5.
#
# Both give three outputs. They look at different pixels. Weights trained with one are wrong with the other.

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(2, 2, figsize=(7.2, 3.4), sharex=True)
cases = [("symmetric", 6, 0), ("'SAME'", 6, 1), ("symmetric", 7, 0), ("'SAME'", 7, 0)]
for axis, (habit, size, first) in zip(axes.flat, cases, strict=True):
    for pixel in range(first - 1, size + 1):
        inside = 0 <= pixel < size
        face = "#dddddd" if inside else "white"
        box = plt.Rectangle((pixel - 0.45, 0), 0.9, 0.9, facecolor=face, edgecolor="#999999")
        axis.add_patch(box)
        axis.text(pixel, 0.45, str(pixel) if inside else "0", ha="center", va="center",
                  color="black" if inside else "#bbbbbb")  # fmt: skip
    for number, centre in enumerate(range(first, size, 2)):
        height = 1.2 + 0.3 * (number % 2)
        axis.plot([centre - 1.4, centre + 1.4], [height] * 2, lw=4, color=kernel_color(3))
        axis.plot(centre, height, "o", color="white", markersize=3)
    axis.set(xlim=(-1.8, 7.8), ylim=(-0.1, 1.9), yticks=[], xticks=[])
    axis.set_title(f"{size} pixels, {habit}", fontsize=10)
    axis.spines[:].set_visible(False)
show(
    figure,
    "same_padding.png",
    "Rows of six and seven pixels with the windows of a 3-kernel at stride 2. On six pixels, "
    "symmetric padding centres them on pixels 0, 2, 4 and TensorFlow's on 1, 3, 5. On seven "
    "pixels both centre on 0, 2, 4, 6.",
)

# %% [markdown]
# On an odd number of pixels the two agree. On an even number, 'SAME' is shifted by one pixel. MixNet's 224×224 input is even all the way down to 14.
#
# As formulas: the output has $\lceil H / s \rceil$ rows. The windows need $(\lceil H/s \rceil - 1) \cdot s + (k - 1) \cdot d + 1$ pixels. What is missing is added, the smaller half first.
# Since $(\lceil H/s \rceil - 1) \cdot s = H - 1 - ((H - 1) \bmod s)$, the total shrinks to
#
# $$
# \mathrm{total} = \max\left((k - 1) \cdot d - ((H - 1) \bmod s),\ 0\right)
# $$

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
# The first two are the rows of the figure: (0, 1) and (1, 1).
#
# `Conv2dSame` is `nn.Conv2d` with that rule. The zeros depend on the input size, so they are added in `forward`.

# %%
#| export layer.py
class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's 'SAME' padding, for any input size and stride.

    Takes the arguments of `nn.Conv2d` except `padding` and `padding_mode`.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's name for it
        """Pad by TensorFlow's rule, then convolve."""
        rows = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0], self.dilation[0])
        columns = same_padding(
            input.shape[-1], self.kernel_size[1], self.stride[1], self.dilation[1]
        )
        return super().forward(F.pad(input, [*columns, *rows]))


# %% [markdown]
# Check it without TensorFlow. Stride 2 is stride 1 with every other output thrown away. By the figure, 'SAME' keeps the odd ones of an even axis and the even ones of an odd axis:

# %%
from mixconv.teaching import check

torch.manual_seed(0)
kernel = torch.randn(4, 4, 5, 5)
strided = Conv2dSame(4, 4, 5, stride=2, bias=False)
strided.weight = nn.Parameter(kernel)
x = torch.randn(1, 4, 6, 7)
everywhere = F.conv2d(x, kernel, padding=2)
check(strided(x), everywhere[:, :, 1::2, 0::2], "'SAME' on 6×7 pixels")

# %% [markdown]
# (That the official code agrees is tested against its own numbers in chapter 6.)
#
# At stride 1 and odd k the rule asks for (k − 1) / 2 zeros on each side, always. `nn.Conv2d` does that by itself, and faster. So one function picks the right class:

# %%
#| export layer.py
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

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd.
        stride: step between outputs, for both axes or each.
        dilation: step between taps, for both axes or each.
        groups: as in `nn.Conv2d`.
        bias: whether to add a bias; off, since a batch norm mostly follows.
        padding: "symmetric" (k // 2 on each side, PyTorch's habit) or "same" (TensorFlow's rule).
        device: where the weights live.
        dtype: their type.

    Raises:
        ValueError: for an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    spread = (dilation, dilation) if isinstance(dilation, int) else dilation
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
# ## The layer
#
# The constructor checks its arguments, splits the channels as in chapter 2, and makes one depthwise convolution for each group.
#
# > **Paper.** Section 3.2: a large kernel may be replaced by a dilated 3×3 kernel.
#
# > **Official code.** With `dilated`, a k×k kernel becomes 3×3 with dilation (k − 1) / 2, in layers of stride 1 only. Layers with a stride keep their full kernels. We follow the code.

# %%
#| export layer.py
from collections.abc import Sequence
from typing import cast

from mixconv.partition import check_kernel_sizes, check_positive, resolve_partition


class MixConv2d(nn.Module):
    """Mixed depthwise convolution: groups of channels with kernel sizes of their own.

    A drop-in for a depthwise `nn.Conv2d(channels, channels, k, groups=channels)`.

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
        self.kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.partition = resolve_partition(channels, self.kernel_sizes, partition)
        self.in_channels = channels
        self.out_channels = channels * channel_multiplier
        self.stride = _pair("stride", stride)
        self.dilation = _pair("dilation", dilation)
        self.padding = padding
        self.channel_multiplier = channel_multiplier
        self.dilated = dilated
        self.convs = nn.ModuleList(
            make_conv2d(
                count, count * channel_multiplier, size, self.stride, dilation=spread,
                groups=count, bias=bias, padding=padding, device=device, dtype=dtype,
            )
            for count, (size, spread) in zip(self.partition, self._kernels(), strict=True)
        )  # fmt: skip


# %%
#| export layer.py
def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    for number in pair:
        check_positive(name, number)
    return pair


# %% [markdown]
# Which kernel does each group really get? Its size, and the step between its taps:

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


# %% [markdown]
# `forward` is the definition: split, convolve, concatenate. It counts dimensions from the end, so that a single image without batch works, as with `nn.Conv2d`.

# %%
#| export layer.py
class MixConv2d(MixConv2d):
    def forward(self, x: Tensor) -> Tensor:
        """Convolve each group with its own kernel size.

        Raises:
            ValueError: if `x` is not an image or batch with the layer's channels.
        """
        # Tracers pass stand-ins for tensors; those cannot be compared.
        if isinstance(x, Tensor) and (x.dim() not in (3, 4) or x.shape[-3] != self.in_channels):
            raise ValueError(
                f"x must be (N, {self.in_channels}, H, W) or ({self.in_channels}, H, W), "
                f"got {tuple(x.shape)}"
            )
        groups = x.split(self.partition, dim=-3)
        outputs = [conv(group) for conv, group in zip(self.convs, groups, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-3)


# %%
layer = MixConv2d(6, (3, 5, 7))
tuple(layer(torch.zeros(2, 6, 10, 12)).shape)


# %% [markdown]
# Two courtesies that `nn.Conv2d` users expect: a readable `repr`, and `reset_parameters`.

# %%
#| export layer.py
class MixConv2d(MixConv2d):
    def reset_parameters(self) -> None:
        """Draw new weights, as each `nn.Conv2d` does."""
        for conv in self._convolutions():
            conv.reset_parameters()

    def _convolutions(self) -> list[nn.Conv2d]:
        return cast("list[nn.Conv2d]", list(self.convs))

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
layer

# %% [markdown]
# ## Proof: the layer is the loops
#
# Same weights, same input: output and every gradient must agree with chapter 1's loops.
# `functional_call` runs a layer with weights given from outside.

# %%
from torch.func import functional_call

from mixconv.formulation import mixconv_loops, mixconv_reference
from mixconv.teaching import check_rewrite

layer = MixConv2d(3, (3, 5, 7), dtype=torch.double)
names = [name for name, _ in layer.named_parameters()]
weights = [parameter.detach() for parameter in layer.parameters()]


def by_layer(x, *weights):
    return functional_call(layer, dict(zip(names, weights, strict=True)), x)


image = torch.randn(3, 4, 5, dtype=torch.double)
check_rewrite(lambda x, *w: mixconv_loops(x, w), by_layer, image, *weights, what="loops and layer")

# %% [markdown]
# Larger, where the loops would take too long: chapter 1's shifted images, with two outputs a channel.

# %%
layer = MixConv2d(20, (3, 5, 7), channel_multiplier=2, partition="logarithmic", dtype=torch.double)
names = [name for name, _ in layer.named_parameters()]
weights = [parameter.detach() for parameter in layer.parameters()]
check_rewrite(
    lambda x, *w: mixconv_reference(x, w, channel_multiplier=2),
    by_layer,
    torch.randn(2, 20, 14, 14, dtype=torch.double),
    *weights,
    what="shifted images and layer",
)

# %% [markdown]
# ## Dilated: seeing far with nine weights
#
# A 3×3 kernel with dilation 3 touches nine pixels of a 7×7 window. Side by side, the taps:

# %% tags=["drawing"]
figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.3))
for column, k in enumerate((3, 5, 7, 9)):
    for row, step in enumerate((1, (k - 1) // 2)):
        axis, reach = axes[row, column], k // 2
        for i in range(-4, 5):
            for j in range(-4, 5):
                inside = max(abs(i), abs(j)) <= reach
                tap = inside and i % step == 0 and j % step == 0
                shade = kernel_color(k) if tap else "#e8e8e8" if inside else "white"
                axis.add_patch(plt.Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, color=shade))
        axis.set(xlim=(-4.6, 4.6), ylim=(-4.6, 4.6), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_xlabel(f"{9 if row else k * k} weights", fontsize=9)
        if row == 0:
            axis.set_title(f"{k}×{k}")
axes[0, 0].set_ylabel("full")
axes[1, 0].set_ylabel("dilated")
show(
    figure,
    "dilated_taps.png",
    "Kernels of size 3, 5, 7 and 9. Above, full kernels with 9, 25, 49 and 81 weights. Below, "
    "dilated 3×3 kernels whose nine weights are spread over the same windows.",
)

# %%
dilated = MixConv2d(32, (3, 5, 7, 9), dilated=True)
full = MixConv2d(32, (3, 5, 7, 9))
strided = MixConv2d(32, (3, 5, 7, 9), stride=2, dilated=True)
for layer in (full, dilated, strided):
    kernels = [conv.kernel_size[0] for conv in layer.convs]
    print(
        kernels,
        [conv.dilation[0] for conv in layer.convs],
        sum(p.numel() for p in layer.parameters()),
    )


# %% [markdown]
# With stride 2 the flag changes nothing: the third line has the kernels of the first.

# %% [markdown]
# ## The merged form
#
# Exercise 1.2 had it: a 3×3 kernel is a 7×7 kernel with a border of zeros. So a MixConv layer is *one* depthwise convolution whose kernels are mostly zeros for the small groups.
# It computes the same. It does more multiplications. Chapter 8 shows why it is often faster all the same: one call in place of g, and no split and concatenation.
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
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    top, left = ((size - r) // 2 for r in reach)
    larger = weight.new_zeros(*weight.shape[:2], size, size)
    larger[:, :, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]] = weight
    return larger


# %%
embed_kernel(torch.arange(1.0, 10).view(1, 1, 3, 3), 5, dilation=(2, 2))[0, 0]


# %% [markdown]
# Does padding survive? With 'SAME' and stride 2 the window of *every* odd kernel is shifted by the same pixel (the figure above), so a small kernel in the middle of a large one stays where it was. The merged layer uses the padding of its largest kernel.

# %%
#| export layer.py
class MixConv2d(MixConv2d):
    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The same operation as one depthwise convolution with zero-embedded kernels.

        Returns:
            A new `nn.Conv2d` with copies of the weights; the layer is not changed.
        """
        convs, size = self._convolutions(), max(self.kernel_sizes)
        merged = make_conv2d(
            self.in_channels, self.out_channels, size, self.stride, dilation=self.dilation,
            groups=self.in_channels, bias=convs[0].bias is not None, padding=self.padding,
            device=convs[0].weight.device, dtype=convs[0].weight.dtype,
        )  # fmt: skip
        spreads = [(1, 1) if spread == self.dilation else spread for _, spread in self._kernels()]
        pairs = zip(convs, spreads, strict=True)
        merged.weight.copy_(torch.cat([embed_kernel(c.weight, size, s) for c, s in pairs]))
        if merged.bias is not None:
            biases = [conv.bias for conv in convs if conv.bias is not None]
            merged.bias.copy_(torch.cat(biases))
        return merged.train(self.training)


# %%
layer = MixConv2d(32, (3, 5, 7, 9), stride=2, padding="same")
merged = layer.merged()
x = torch.randn(2, 32, 15, 20)
check(merged(x), layer(x), "layer and merged layer")
sum(p.numel() for p in layer.parameters()), sum(p.numel() for p in merged.parameters())

# %% [markdown]
# Twice the weights here, half of them zeros. The rewrite, proved with gradients, for full and for dilated kernels:

# %%
for dilated in (False, True):
    layer = MixConv2d(8, (3, 5, 7, 9), dilated=dilated, dtype=torch.double)
    names = [name for name, _ in layer.named_parameters()]
    spreads = [conv.dilation for conv in layer.convs]

    def by_merging(x, *weights, spreads=spreads):
        embedded = [embed_kernel(w, 9, s) for w, s in zip(weights, spreads, strict=True)]
        return F.conv2d(x, torch.cat(embedded), padding=4, groups=8)

    inputs = [torch.randn(2, 8, 10, 11).double(), *(p.detach() for p in layer.parameters())]
    check_rewrite(by_layer, by_merging, *inputs, what=f"layer and merged, dilated={dilated}")

# %% [markdown]
# ## At home in PyTorch
#
# Nothing about the layer is special, so everything that works on modules works on it:

# %%
layer = MixConv2d(8, (3, 5))
x = torch.randn(2, 8, 6, 6)
print(list(layer.state_dict()))
print(layer.double()(x.double()).dtype, layer.float()(x).dtype)
print(MixConv2d(8, (3, 5), device="meta")(x.to("meta")).shape)
last = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
print("channels_last kept:", last.is_contiguous(memory_format=torch.channels_last))
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(layer(x).dtype)

# %% [markdown]
# Bad arguments say what would be right:

# %%
attempts = [
    lambda: MixConv2d(32, (3, 5), partition=(20, 10)),
    lambda: MixConv2d(32, (3, 5), padding="valid"),
    lambda: MixConv2d(4, (3, 5, 7, 9, 11)),
    lambda: MixConv2d(32, (3, 5))(torch.zeros(1, 16, 8, 8)),
]
for attempt_ in attempts:
    try:
        attempt_()
    except ValueError as error:
        print(error)


# %% [markdown]
# ## What each group sees
#
# Give four channels the same photograph, and each group a filter of its own size: bright in the middle, dark around it, zero on the whole. It answers where the picture has a spot or a line about as wide as its middle.

# %%
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
spot_filter(3)

# %%
from mixconv.teaching import photograph

picture = photograph(96).mean(dim=1, keepdim=True)
with torch.no_grad():
    responses = layer(picture.expand(1, 4, 96, 96))[0]
[f"{k}×{k}: {r.abs().mean():.3f}" for k, r in zip(layer.kernel_sizes, responses, strict=True)]

# %% tags=["drawing"]
figure, axes = plt.subplots(1, 5, figsize=(8, 2.1))
axes[0].imshow(picture[0, 0], cmap="gray")
axes[0].set_title("input")
for k in (9, 7, 5, 3):
    corner = (42 - k / 2, 43 - k / 2)
    axes[0].add_patch(plt.Rectangle(corner, k, k, fill=False, color=kernel_color(k), linewidth=1.5))
for axis, k, response in zip(axes[1:], (3, 5, 7, 9), responses, strict=True):
    axis.imshow(response, cmap="gray", vmin=-0.12, vmax=0.12)
    axis.set_title(f"{k}×{k}", color=kernel_color(k))
for axis in axes:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
show(
    figure,
    "what_groups_see.png",
    "The photograph at 96×96 pixels with nested 3×3 to 9×9 windows on one eye, and the four "
    "groups' responses. The 3×3 group answers to thin edges such as the glasses; the 9×9 group "
    "to eyes, mouth and the stars of the flag as whole spots.",
)

# %% [markdown]
# One layer, four scales. A single kernel size would have to choose.

# %% [markdown]
# ## Exercises
#
# **3.1** An axis of 224 pixels, kernel 5, stride 2. How many zeros does TensorFlow put before and after it? Answer without `same_padding`, then compare.

# %%
from mixconv.teaching import attempt


def zeros_by_hand() -> tuple[int, int]:
    raise NotImplementedError


def test_zeros(answer) -> None:
    assert answer() == same_padding(224, 5, 2)


attempt(zeros_by_hand, test_zeros)


# %% tags=["solution"]
def zeros_by_hand_solution() -> tuple[int, int]:
    # 112 outputs span 111 · 2 + 5 = 227 pixels; 3 are missing: 1 before, 2 after.
    return (1, 2)


attempt(zeros_by_hand_solution, test_zeros)


# %% [markdown]
# **3.2** What does merging cost in multiply-adds? Return the ratio of the merged form's to the split form's, for equal groups.

# %%
def merging_ratio(kernel_sizes: tuple[int, ...]) -> float:
    raise NotImplementedError


def test_ratio(answer) -> None:
    assert abs(answer((3, 5, 7, 9)) - 81 / 41) < 1e-9
    assert answer((5,)) == 1


attempt(merging_ratio, test_ratio)


# %% tags=["solution"]
def merging_ratio_solution(kernel_sizes: tuple[int, ...]) -> float:
    squares = [k * k for k in kernel_sizes]
    return max(squares) * len(squares) / sum(squares)


attempt(merging_ratio_solution, test_ratio)

# %% [markdown]
# ## Takeaways
# - `MixConv2d` is split, convolve, concatenate, with PyTorch's manners.
# - TensorFlow's 'SAME' at stride 2 looks one pixel further on even sizes. Weights belong to a padding.
# - `dilated` keeps nine weights and the wide window, at stride 1.
# - `merged()` is the same operation as one `nn.Conv2d`.
#
# Previous: [2 · Partitioning](02_partitioning.ipynb) · Next: [4 · Blocks](04_blocks.ipynb)
