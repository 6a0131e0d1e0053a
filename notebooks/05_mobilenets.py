# %% [markdown]
# # 5 · MobileNets
#
# The paper tries MixConv first on MobileNetV1 and MobileNetV2: every depthwise layer gets a kernel mix. This chapter builds both networks, recomputes what the paper says they cost, and puts MixConv into networks that others wrote.
#
# **You will be able to**
# - build MobileNetV1 and V2 with any kernel mix, and use them for classes, features or detection;
# - reproduce the horizontal axes of the paper's Figures 1, 4 and 6, and the cost differences of its Table 1;
# - replace the depthwise layers of any model, without changing what it computes.
#
# **Know first:** [chapter 4](04_blocks.ipynb).
#
# **Time:** 30 minutes to read. Runs in under 60 seconds on two cores.

# %% [markdown]
# ## The common shape
#
# An image of 224 pixels is halved five times: 112, 56, 28, 14, 7. That is as far as these networks go, and it gives five sizes of feature maps.
#
# MobileNetV1, V2 and MixNet are all the same four things in a row: a **stem** convolution of stride 2, a row of **blocks**, a **head** (a last pointwise layer, or nothing) and, after the mean over all pixels, a **classifier**.
# So they share one class. Its methods have the names that engineers know from timm.

# %%
#| export mobilenet.py
"""MobileNetV1 and V2 with any kernel mix, and MixConv for any model (paper, 4; chapter 5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv.blocks import check_rate


class ConvNet(nn.Module):
    """A stem, a row of blocks, a head and a classifier: MobileNets and MixNets alike.

    Args:
        stem: the first convolution, of stride 2.
        blocks: modules with `stride` and `out_channels`.
        head: what follows the blocks and keeps the pixels apart.
        num_features: channels after the head.
        num_classes: outputs of the classifier; 0 leaves it out.
        drop_rate: dropout before the classifier.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`, or `(N, num_features)`
        without classes.

    Raises:
        ValueError: for a negative number of classes or a rate outside 0 to 1.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        num_features: int,
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_rate("drop_rate", drop_rate)
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.num_features, self.drop_rate = num_features, drop_rate
        self.feature_info = describe_features(stem, blocks)
        self.reset_classifier(num_classes)


# %% [markdown]
# The forward pass in two halves: up to the head, pixels still apart, and from there to the classes.

# %%
#| export mobilenet.py
class ConvNet(ConvNet):
    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the mean over pixels: `(N, num_features, H / 32, W / 32)`."""
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the output of `forward_features` to classes, or with `pre_logits` to features."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        logits: Tensor = x if pre_logits else self.classifier(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images to class scores."""
        return self.forward_head(self.forward_features(x))


# %% [markdown]
# The classifier can be exchanged, for a new task, or left out.

# %%
#| export mobilenet.py
class ConvNet(ConvNet):
    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new, untrained classifier; 0 classes leaves features."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            like, size = next(self.stem.parameters()), (self.num_features, num_classes)
            self.classifier = nn.Linear(*size, device=like.device, dtype=like.dtype)
            initialize(self.classifier)


# %% [markdown]
# Detection and segmentation want the picture at several sizes: the last output at each of the strides 2, 4, 8, 16 and 32.

# %%
#| export mobilenet.py
from typing import cast


def describe_features(stem: nn.Module, blocks: Sequence[nn.Module]) -> list[dict[str, int | str]]:
    """Where each stride ends: channels (`num_chs`), stride (`reduction`) and `module` name.

    The entries follow timm's `feature_info`.
    """
    reduction, module = 2, "stem"
    channels = int(next(stem.parameters()).shape[0])
    info: list[dict[str, int | str]] = []
    for index, block in enumerate(blocks):
        if block.stride != 1:
            info.append({"num_chs": channels, "reduction": reduction, "module": module})
            reduction *= cast("int", block.stride)
        channels, module = cast("int", block.out_channels), f"blocks.{index}"
    return [*info, {"num_chs": channels, "reduction": reduction, "module": module}]


# %%
#| export mobilenet.py
class ConvNet(ConvNet):
    def features(self, x: Tensor) -> list[Tensor]:
        """The last output at each stride, largest first; `feature_info` describes them."""
        wanted = {str(info["module"]) for info in self.feature_info}
        x = self.stem(x)
        outputs = [x] if "stem" in wanted else []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if f"blocks.{index}" in wanted:
                outputs.append(x)
        return outputs


# %% [markdown]
# First weights. There is no training in this book, but the networks should be ready for it.
#
# > ⚙️ **Official code.** Convolution weights are drawn from a normal distribution of variance $2 / (k^2 \cdot o)$, where $o$ is the number of outputs *in the shape of the kernel*. For a depthwise kernel of shape (k, k, c, 1) that is 1, and for one of two 1×1 groups it is half of the layer's outputs. The classifier is uniform within $\pm 1/\sqrt{\mathrm{classes}}$. Biases are zero.

# %%
#| export mobilenet.py
@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw all weights as the official code does.

    Convolutions: normal, mean 0, variance `2 / (k · k · out_channels / groups)`. Linear layers:
    uniform within `1 / sqrt(out_features)` of 0. Biases 0. Normalisations: scale 1, shift 0.

    Source: `conv_kernel_initializer`, `dense_kernel_initializer` in `mixnet_model.py`.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
            layer.weight.normal_(0, (2 / fan_out) ** 0.5)
        elif isinstance(layer, nn.Linear):
            reach = layer.out_features**-0.5
            layer.weight.uniform_(-reach, reach)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            layer.bias.zero_()


# %%
torch.manual_seed(0)
convolution = nn.Conv2d(64, 256, 3, groups=2, bias=False)
initialize(convolution)
print(f"variance {convolution.weight.var():.4f}, wanted {2 / (9 * 128):.4f}")


# %% [markdown]
# ## Wider and narrower
#
# A width multiplier scales every channel count. Counts are rounded to multiples of 8, and never fall below 90% of the exact value.
# By hand, for 40 channels at 0.7: exactly 28, halfway between 24 and 32; halves go up, so 32. For 16 at 0.7: 11.2, rounded 8; that is less than 90% of 11.2, so 16.

# %%
#| export mobilenet.py
def round_channels(channels: int, multiplier: float = 1.0, divisor: int = 8) -> int:
    """Scale a number of channels and round it to a multiple, losing at most a tenth.

    Args:
        channels: before scaling.
        multiplier: positive; 1 returns `channels` as they are.
        divisor: the multiple.

    Raises:
        ValueError: if the multiplier is not positive and finite.

    Source: `round_filters` in the official `mixnet_model.py`.
    """
    if not 0 < multiplier < float("inf"):
        raise ValueError(f"width_multiplier must be positive and finite, got {multiplier}")
    if multiplier == 1:
        return channels
    exact = channels * multiplier
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


# %%
[round_channels(40, 0.7), round_channels(16, 0.7), round_channels(24, 1.3)]

# %% [markdown]
# ## MobileNetV1
#
# Thirteen depthwise-separable blocks. The whole network is a list of (output channels, stride).

# %%
#| export mobilenet.py
from functools import partial

from mixconv.blocks import ConvNormActivation, DepthwiseSeparableBlock, MixConvBlock
from mixconv.layer import make_conv2d

_V1_BLOCKS = [
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
]  # fmt: skip


# %%
#| export mobilenet.py
def mobilenet_v1(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV1 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument.

    Source: Howard et al., 2017, Table 1; paper, section 4.1. Chapter 5.
    """
    block = partial(
        DepthwiseSeparableBlock,
        kernel_sizes=kernel_sizes, partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    channels = round_channels(32, width_multiplier)
    stem = ConvNormActivation(make_conv2d(in_channels, channels, 3, 2, padding=padding))
    blocks: list[nn.Module] = []
    for out_channels, stride in _V1_BLOCKS:
        wider = round_channels(out_channels, width_multiplier)
        blocks.append(block(channels, wider, stride=stride))
        channels = wider
    model = ConvNet(
        stem, blocks, nn.Identity(), channels, num_classes=num_classes, drop_rate=drop_rate
    )
    initialize(model)
    return model


# %%
def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


assert parameters(mobilenet_v1()) == 4_231_976
parameters(mobilenet_v1()), parameters(mobilenet_v1((3, 5, 7)))

# %% [markdown]
# 4,231,976 is the published network: the paper's Table 2 prints 4.2M. MixConv 357 adds 98 thousand.

# %% [markdown]
# ## MobileNetV2
#
# Seventeen inverted residuals. Each row: expansion, output channels, repeats, stride of the first.
#
# > 📄 **Paper (Sandler et al., 2018).** Table 2 of MobileNetV2. Its activation is ReLU6, and its head widens to 1280 channels.

# %%
#| export mobilenet.py
from typing import Any

_V2_BLOCKS = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip


def _v2_arguments(width_multiplier: float) -> list[dict[str, Any]]:
    """What each of the 17 blocks is made with."""
    blocks, channels = [], round_channels(32, width_multiplier)
    for expand_ratio, out_channels, repeats, first_stride in _V2_BLOCKS:
        wider = round_channels(out_channels, width_multiplier)
        for stride in [first_stride] + [1] * (repeats - 1):
            blocks.append({"in_channels": channels, "out_channels": wider, "stride": stride,
                           "expand_ratio": expand_ratio})  # fmt: skip
            channels = wider
    return blocks


# %%
#| export mobilenet.py
def mobilenet_v2(
    kernel_sizes: int | Sequence[int] = (3,),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_multiplier: float = 1.0,
    partition: str = "equal",
    dilated: bool = False,
    padding: str = "symmetric",
    drop_rate: float = 0.2,
    drop_path_rate: float = 0.0,
) -> ConvNet:
    """MobileNetV2 with MixConv in place of every depthwise layer.

    Args:
        kernel_sizes: `(3,)` is the plain network; `(3, 5, 7)` is the paper's "MixConv 357".
        num_classes: outputs; 0 for features.
        in_channels: channels of the images.
        width_multiplier: scales every channel count; the head never gets narrower than 1280.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`.
        padding: "symmetric" or "same".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument.

    Source: Sandler et al., 2018, Table 2; paper, section 4.1. Chapter 5.
    """
    block = partial(
        MixConvBlock, kernel_sizes=kernel_sizes, activation="relu6",
        partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    check_rate("drop_path_rate", drop_path_rate)
    rows = _v2_arguments(width_multiplier)
    first, last = rows[0]["in_channels"], rows[-1]["out_channels"]
    stem_conv = make_conv2d(in_channels, first, 3, 2, padding=padding)
    stem = ConvNormActivation(stem_conv, activation="relu6")
    rates = [drop_path_rate * index / len(rows) for index in range(len(rows))]
    blocks = [block(**row, drop_path_rate=p) for row, p in zip(rows, rates, strict=True)]
    width = round_channels(1280, max(1.0, width_multiplier))
    head = ConvNormActivation(make_conv2d(last, width, 1), activation="relu6")
    model = ConvNet(stem, blocks, head, width, num_classes=num_classes, drop_rate=drop_rate)
    initialize(model)
    return model


# %%
assert parameters(mobilenet_v2()) == 3_504_872
parameters(mobilenet_v2()), parameters(mobilenet_v2((3, 5, 7)))

# %% [markdown]
# 3,504,872 is the number that other implementations of MobileNetV2 have. The paper's Table 2 prints 3.4M, which is not this number rounded; we have not found how it was counted.
#
# ## Push something through
#
# A black image in, and the shapes on the way: what each network makes of 224×224 pixels at its five strides, and its classes.

# %%
from mixconv.teaching import table

rows = []
for name, build in (("MobileNetV1", mobilenet_v1), ("MobileNetV2", mobilenet_v2)):
    model = build((3, 5, 7)).eval()
    with torch.no_grad():
        x = torch.zeros(1, 3, 224, 224)
        shapes = [tuple(f.shape[1:]) for f in model.features(x)]
        rows.append([name, *shapes, tuple(model(x).shape)])
        last = model.head(model.features(x)[-1])
        assert torch.equal(last, model.forward_features(x))
table(["network", *(f"stride {info['reduction']}" for info in model.feature_info), "classes"], rows)

# %% [markdown]
# ## The paper's arithmetic
#
# Accuracies take ImageNet and days of training. Costs take arithmetic. The paper plots multiply-adds for every network it trains, so they can be recomputed. Its numbers, copied from its tables or read off its plots, are in `tests/data/paper.json`.
#
# On the meta device nothing is computed and no memory is taken, so forty networks are counted in seconds.

# %%
import json
from functools import cache
from pathlib import Path

from mixconv.formulation import LayerCost, count_costs

paper = json.loads(Path("../tests/data/paper.json").read_text())


@cache
def costs_of(build, kernel_sizes, **options) -> list[LayerCost]:
    with torch.device("meta"):
        model = build(kernel_sizes, **options)
        return count_costs(model, torch.zeros(1, 3, 224, 224))


def millions(build, kernel_sizes, **options) -> float:
    return sum(cost.multiply_adds for cost in costs_of(build, kernel_sizes, **options)) / 1e6


[f"{millions(mobilenet_v1, (3,)):.1f}M", f"{millions(mobilenet_v2, (3,)):.1f}M"]

# %% [markdown]
# > 📄 **Paper.** Figure 4 starts at 579M and 309M (read off the plot, within 2M).
#
# We count convolutions and the classifier. The paper's plots are higher, by about 10M for V1 and 8M for V2 in every point; we do not know what else they count. So the *growth* over the 3×3 baseline is what to compare.

# %%
builders = {"V1": (mobilenet_v1, 0), "V2": (mobilenet_v2, 2)}  # and the paper's column


def growth(points: dict, baseline: list) -> list[list]:
    rows = []
    for name, printed in points.items():
        sizes, row = tuple(map(int, name.split())), [name]
        for build, column in builders.values():
            ours = millions(build, sizes) - millions(build, (3,))
            theirs = printed[column] - baseline[column]
            row += [f"{ours:.1f}", theirs, f"{ours - theirs:+.1f}"]
        rows.append(row)
    return rows


# %%
figure_4 = paper["figure_4"]
baseline = figure_4["depthwise"]["3"]
rows = growth(figure_4["depthwise"], baseline) + growth(figure_4["mixconv"], baseline)
assert all(abs(float(row[i])) <= 1.5 for row in rows for i in (3, 6))
header = ["kernels", "V1 ours", "V1 paper", "difference", "V2 ours", "V2 paper", "difference"]
table(header, rows)

# %% [markdown]
# Growth in millions of multiply-adds. Every point of Figures 1 and 4 agrees within 1.5M, and they were read off a plot.
#
# Figure 6 has two more families, for two to six groups. First the exponential partition:

# %%
from mixconv.partition import default_kernel_sizes


def figure_6(family: str, extra=lambda build, groups: 0.0, **options) -> list[list]:
    rows = []
    for groups in range(2, 7):
        sizes, row = default_kernel_sizes(groups), [groups]
        for version, (build, column) in builders.items():
            ours = millions(build, sizes, **options) - millions(build, (3,)) + extra(build, groups)
            printed = paper["figure_6"][family][version.lower()][groups - 2]
            theirs = printed - baseline[column]
            row += [f"{ours:.1f}", theirs, f"{ours - theirs:+.1f}"]
        rows.append(row)
    return rows


# %%
rows = figure_6("exponential", partition="exponential")
assert all(abs(float(row[i])) <= 1.5 for row in rows for i in (3, 6))
table(["groups", *header[1:]], rows)

# %% [markdown]
# Within 1.5M again. Now dilated kernels, by the official code's rule: 3×3 where the stride is 1, full kernels where it is 2.

# %%
table(["groups", *header[1:]], figure_6("dilated", dilated=True))

# %% [markdown]
# Here the difference grows with the number of groups, to 3M. Something in the paper's count grows with the dilation.
#
# > ✏️ **Ours.** A guess that fits. TensorFlow computed dilated convolutions by *space to batch*: an H×H image is cut into $d^2$ smaller ones of $\lceil H/d \rceil$ pixels on each side, padded where $d$ does not divide $H$. A counter that looks at the graph counts the padding too: a factor of $(d \lceil H/d \rceil / H)^2$. By hand, 7 pixels and dilation 6: six strips of ⌈7/6⌉ = 2 make 12, so 144 pixels are counted, not 49.

# %%
from math import ceil


def padding_counted(build, groups: int) -> float:
    """Extra multiply-adds, in M, if space-to-batch padding were counted."""
    extra = 0.0
    for cost in costs_of(build, default_kernel_sizes(groups), dilated=True):
        _, found, group = cost.name.partition(".convs.")
        if not found or cost.parameters != 9 * cost.output_shape[1]:
            continue  # pointwise, or a full kernel in a layer of stride 2
        d, size = int(group) + 1, cost.output_shape[2]
        extra += cost.multiply_adds * ((d * ceil(size / d) / size) ** 2 - 1)
    return extra / 1e6


# %%
rows = figure_6("dilated", padding_counted, dilated=True)
assert all(abs(float(row[i])) <= 1.0 for row in rows for i in (3, 6))
table(["groups", *header[1:]], rows)

# %% [markdown]
# With that padding counted, all ten points agree within 1M. The paper does not say what its counter counted; this is the simplest account that fits.

# %% [markdown]
# ### Figure 4, redrawn
#
# Our multiply-adds on the horizontal axis. The accuracies are the paper's.

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=False)
for axis, (version, (build, column)) in zip(axes, builders.items(), strict=True):
    for family, style in (("depthwise", ":"), ("mixconv", "-")):
        points = figure_4[family] if family == "depthwise" else {"3": baseline, **figure_4[family]}
        cost = [millions(build, tuple(map(int, name.split()))) for name in points]
        accuracy = [value[column + 1] for value in points.values()]
        axis.plot(cost, accuracy, style, color="#999999", zorder=1)
        for x, y, name in zip(cost, accuracy, points, strict=True):
            marker = "o" if family == "mixconv" else "s"
            largest = int(name.split()[-1])
            axis.plot(x, y, marker, color=kernel_color(largest), markersize=6)
            above = family == "mixconv" and largest > 3
            axis.annotate(f"{largest}", (x, y), xytext=(0, 6 if above else -11), fontsize=7,
                          textcoords="offset points", ha="center")  # fmt: skip
        if family == "depthwise":
            axis.annotate("■ one kernel size", (cost[1], accuracy[1]), xytext=(6, -28),
                          textcoords="offset points")  # fmt: skip
            axis.margins(y=0.12)
    axis.set(title=f"MobileNet{version}", xlabel="multiply-adds in M (ours)")
    axis.text(cost[-1] + 8, accuracy[-1], "● 3×3 up to …", va="center")
axes[0].set_ylabel("ImageNet top-1 in % (paper)")
show(
    figure,
    "figure_4_redrawn.png",
    "ImageNet accuracy, cited from the paper, against our multiply-adds for MobileNetV1 and V2. "
    "With one kernel size, squares, accuracy peaks at 7×7 on V1 and 9×9 on V2 and then falls. "
    "MixConv, circles coloured by its largest kernel, keeps rising at lower cost.",
)


# %% [markdown]
# Squares are one kernel size, circles MixConv from 3×3 up; the number is the largest kernel. One large kernel everywhere gets expensive and, in the end, worse. A mix with the same largest kernel costs less and keeps rising (accuracies cited from the paper's Figure 4).
#
# ### Table 1
#
# > 📄 **Paper.** Table 1 puts these networks under a detector, on COCO. The rows differ by their backbones alone, so differences between rows are arithmetic again.
#
# > ✏️ **Ours.** We take 320×320 images, the usual size for that detector. The paper prints two decimals, so a difference of two of its numbers is good to ±0.01.

# %%
def totals(build, sizes) -> tuple[float, float]:
    with torch.device("meta"):
        model = build(sizes)
        costs = count_costs(model, torch.zeros(1, 3, 320, 320))
    return parameters(model) / 1e6, sum(c.multiply_adds for c in costs) / 1e9


table_1, rows = paper["table_1"], []
for name in ("5", "3 5", "7", "3 5 7"):
    for version, (build, column) in builders.items():
        first = 3 if column else 0
        mine, base = totals(build, tuple(map(int, name.split()))), totals(build, (3,))
        ours = [a - b for a, b in zip(mine, base, strict=True)]
        theirs = [table_1[name][first + i] - table_1["3"][first + i] for i in (0, 1)]
        assert abs(ours[0] - theirs[0]) <= 0.0101
        rows.append([f"{version}, {name}", *(f"{v:.3f}" for v in (ours[0], theirs[0])),
                     *(f"{v:.3f}" for v in (ours[1], theirs[1]))])  # fmt: skip
table(["against 3×3", "parameters +M, ours", "paper", "multiply-adds +B, ours", "paper"], rows)

# %% [markdown]
# Every parameter difference agrees within the rounding of the printed digits. The mAP that goes with them (cited): MixConv 357 reaches 22.4 on V1 and 22.3 on V2, where 7×7 reaches 21.8 and 21.2.

# %% [markdown]
# ## MixConv for any model
#
# You have a network that works, perhaps trained, and want to know what MixConv would do to it. `replace_depthwise` swaps its depthwise layers.
#
# Weights are kept. An old 3×3 kernel goes into the middle of a new 7×7 kernel, zeros around it, so the network computes what it computed before. Training then starts from there.
#
# By hand: a kernel 1 2 1 becomes 0 0 1 2 1 0 0. Same sums.
#
# What can go wrong decides the rest: a layer that is not what it seems must be left alone, and the caller must be told. Each layer gets a line in a report.

# %%
#| export mobilenet.py
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replacement:
    """What happened to one depthwise layer.

    Attributes:
        name: of the layer in the model.
        before: the old layer, as text.
        after: the new layer, as text; empty if it was skipped.
        exact: whether the layer computes what it did before.
        reason: why it was skipped, or why it is not exact.
    """

    name: str
    before: str
    after: str = ""
    exact: bool = False
    reason: str = ""


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_depthwise` did; `str` gives a line for each layer."""

    layers: list[Replacement] = field(default_factory=list)

    @property
    def changed(self) -> list[Replacement]:
        """Layers that are MixConv now."""
        return [layer for layer in self.layers if layer.after]

    @property
    def skipped(self) -> list[Replacement]:
        """Depthwise layers that were left as they were."""
        return [layer for layer in self.layers if not layer.after]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} replaced, {len(self.skipped)} skipped"]
        for layer in self.layers:
            what = layer.after or f"skipped: {layer.reason}"
            note = "" if layer.exact or not layer.after else f" (not the same: {layer.reason})"
            lines.append(f"{layer.name}: {what}{note}")
        return "\n".join(lines)


# %% [markdown]
# Which padding does the old layer use? A tuple of (k − 1) / 2 · d is symmetric. TensorFlow ports use classes called `Conv2dSame`. Anything else, such as no padding at all, MixConv cannot imitate.

# %%
#| export mobilenet.py
def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _find_padding(conv: nn.Conv2d) -> str:
    """The padding of a depthwise layer in our terms.

    Raises:
        ValueError: saying why it has none.
    """
    if type(conv).__name__.startswith("Conv2dSame"):
        parts = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
        if any(d * (k - 1) < s - 1 for k, d, s in parts):
            raise ValueError("'SAME' with a stride wider than the kernel centres windows elsewhere")
        return "same"
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"a {type(conv).__name__}, which may compute something else")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode {conv.padding_mode!r}")
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)
    wanted = tuple(d * (k // 2) for k, d in sizes)
    if conv.padding not in (wanted, "same"):
        raise ValueError(f"padding {conv.padding}, not {wanted}")
    return "symmetric"


# %% [markdown]
# One layer at a time: build the new one, move the weights in. A kernel that grows is embedded, one that shrinks is cropped to its middle, and then the layer is not exact.

# %%
#| export mobilenet.py
from mixconv.layer import MixConv2d, embed_kernel


def _convert(conv: nn.Conv2d, make: partial[MixConv2d], padding: str | None) -> MixConv2d:
    """A MixConv layer in place of a depthwise one, with fresh weights.

    Raises:
        ValueError: saying why it cannot be done.
    """
    mixed = make(
        conv.in_channels, stride=cast("tuple[int, int]", conv.stride),
        padding=_find_padding(conv) if padding is None else padding,
        channel_multiplier=conv.out_channels // conv.in_channels, bias=conv.bias is not None,
        dilation=cast("tuple[int, int]", conv.dilation),
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    for key, parameter in mixed.named_parameters():
        old = conv.bias if key.endswith("bias") else conv.weight
        parameter.requires_grad_(old is not None and old.requires_grad)
    if conv.weight.stride(1) == 1 and conv.kernel_size != (1, 1):  # channels last
        mixed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return mixed.train(conv.training)


# %%
#| export mobilenet.py
@torch.no_grad()
def _move_weights(conv: nn.Conv2d, mixed: MixConv2d) -> str:
    """Copy the weights of `conv` into `mixed`; returns why that is not exact, or nothing."""
    reason, start, size = "", 0, conv.kernel_size[0]
    for part in cast("list[nn.Conv2d]", list(mixed.convs)):
        stop = start + part.out_channels
        weight, k = conv.weight[start:stop], part.kernel_size[0]
        cut = max(0, (size - k) // 2)
        part.weight.copy_(embed_kernel(weight[:, :, cut : size - cut, cut : size - cut], k))
        if cut:
            reason = f"{size}×{size} kernels cropped to {k}×{k}"
        elif part.dilation != conv.dilation:
            reason = "dilated"
        if part.bias is not None and conv.bias is not None:
            part.bias.copy_(conv.bias[start:stop])
        start = stop
    return reason


# %% [markdown]
# And the walk over the model. A layer that is used in two places stays one layer.

# %%
#| export mobilenet.py
from mixconv.partition import check_kernel_sizes


def replace_depthwise(
    model: nn.Module,
    kernel_sizes: int | Sequence[int],
    *,
    partition: str = "equal",
    dilated: bool = False,
    padding: str | None = None,
    keep_center_weights: bool = True,
) -> ReplacementReport:
    """Swap every depthwise `nn.Conv2d` of a model for a `MixConv2d`, in place.

    Stride, dilation, bias, device, dtype, memory format, training mode and `requires_grad` are
    kept. Where every kernel grows or stays, so is the function that the model computes. Weights
    that two layers share are no longer shared afterwards; a layer used in two places stays one.

    Args:
        model: any module that contains depthwise layers; it is changed.
        kernel_sizes: one odd size for each group.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`; changes what the model computes.
        padding: "symmetric" or "same"; detected for each layer if left out.
        keep_center_weights: put the old kernels in the middle of the new ones. Otherwise the new
            layers start with fresh weights.

    Returns:
        What was changed, what was skipped, and why.

    Raises:
        TypeError: if the model is itself a depthwise layer, which cannot be swapped in place.
        ValueError: for kernel sizes, partition or padding that no layer could have.

    Source: paper, section 3 ("drop-in replacement"). Chapter 5.
    """
    sizes = check_kernel_sizes(kernel_sizes)
    make = partial(MixConv2d, kernel_sizes=sizes, partition=partition, dilated=dilated)
    _check_request(model, make, padding)
    report, swapped = ReplacementReport(), dict[nn.Module, MixConv2d | None]()
    inside = {part for m in model.modules() if isinstance(m, MixConv2d) for part in m.convs}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in inside or not (_is_depthwise(layer) or isinstance(layer, MixConv2d)):
            continue
        if layer not in swapped:
            swapped[layer], line = _replace(name, layer, make, padding, keep_center_weights)
            report.layers.append(line)
        if (mixed := swapped[layer]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, mixed)
    return report


# %%
#| export mobilenet.py
def _check_request(model: nn.Module, make: partial[MixConv2d], padding: str | None) -> None:
    """Raise for arguments that no layer could satisfy, before anything is changed."""
    if not isinstance(make.keywords["partition"], str):
        raise TypeError("partition must be a method's name, since layers differ in channels")
    make(10_000, padding=padding or "symmetric", device="meta")  # channels enough for any mix
    if _is_depthwise(model):
        raise TypeError("model is itself a depthwise layer; wrap it in nn.Sequential first")


# %%
#| export mobilenet.py
def _other_padding(conv: nn.Conv2d, padding: str) -> bool:
    try:
        return _find_padding(conv) != padding and conv.stride != (1, 1)
    except ValueError:
        return True


# %%
#| export mobilenet.py
def _replace(
    name: str, layer: nn.Module, make: partial[MixConv2d], padding: str | None, keep: bool
) -> tuple[MixConv2d | None, Replacement]:
    """The new layer, or None where there can be none, and the line for the report."""
    try:
        conv = _checked(layer)
        mixed = _convert(conv, make, padding)
    except ValueError as error:
        return None, Replacement(name, str(layer), reason=str(error))
    reason = _move_weights(conv, mixed) if keep else "fresh weights"
    if padding is not None and not reason and _other_padding(conv, padding):
        reason = "another padding"
    return mixed, Replacement(name, str(conv), str(mixed), not reason, reason)


# %%
#| export mobilenet.py
def _checked(layer: nn.Module) -> nn.Conv2d:
    """The layer, if it is one that can be replaced; ValueError says why it is not."""
    if not isinstance(layer, nn.Conv2d):
        raise ValueError("it is a MixConv2d already")
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.kernel_size[0] % 2 == 0:
        raise ValueError(f"kernel {layer.kernel_size} is not square and odd")
    if torch.nn.utils.parametrize.is_parametrized(layer):
        raise ValueError("its weight is parametrized")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise ValueError("it has hooks, which would be lost")
    return layer


# %% [markdown]
# MobileNetV2, before and after:

# %%
import copy

from mixconv.teaching import check

torch.manual_seed(0)
plain = mobilenet_v2(num_classes=10).eval()
mixed = copy.deepcopy(plain)
report = replace_depthwise(mixed, (3, 5, 7))
print("\n".join(str(report).splitlines()[:3]), "\n…")
x = torch.randn(2, 3, 64, 64)
check(mixed(x), plain(x), "MobileNetV2 before and after")

# %% [markdown]
# Same function, ready to train with kernels it did not have before. And it is the network that `mobilenet_v2((3, 5, 7))` builds:

# %%
assert list(mixed.state_dict()) == list(mobilenet_v2((3, 5, 7), num_classes=10).state_dict())
parameters(plain), parameters(mixed)

# %% [markdown]
# What it leaves alone, and what it says:

# %%
odd_ones = nn.Sequential(
    nn.Conv2d(8, 8, 3, groups=8),  # no padding
    nn.Conv2d(8, 8, (1, 7), padding=(0, 3), groups=8),
    nn.Conv2d(2, 2, 3, padding=1, groups=2),  # too few channels
    nn.Conv2d(8, 8, 7, padding=3, groups=8),  # larger than some of the new ones
)
print(replace_depthwise(odd_ones, (3, 5, 9)))

# %% [markdown]
# ## Exercises
#
# **5.1** By how many parameters does MobileNetV1 grow, from 3×3 to equal MixConv 3, 5, if `channels` lists the channels of its depthwise layers? (All are even.)

# %%
from mixconv.teaching import attempt


def growth_35(channels: list[int]) -> int:
    raise NotImplementedError


def test_growth(answer) -> None:
    channels = [32, *(out for out, _ in _V1_BLOCKS[:-1])]
    assert answer(channels) == parameters(mobilenet_v1((3, 5))) - parameters(mobilenet_v1())


attempt(growth_35, test_growth)


# %% tags=["solution"]
def growth_35_solution(channels: list[int]) -> int:
    return sum(channels) // 2 * (25 - 9)


attempt(growth_35_solution, test_growth)


# %% [markdown]
# **5.2** The paper's Figure 5 changes *one* depthwise layer of MobileNetV2 at a time, and finds that layers with stride 2 gain most from large kernels. Build the network whose block `index` has a 9×9 kernel, and all others 3×3, with the same function as `model`.

# %%
def one_large_kernel(model: ConvNet, index: int) -> ConvNet:
    raise NotImplementedError


def test_one(answer) -> None:
    model = mobilenet_v2(num_classes=10).eval()
    changed = answer(model, 3)
    sizes = [m.kernel_sizes for m in changed.modules() if isinstance(m, MixConv2d)]
    assert sizes == [(9,)]
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(changed(x), model(x))


attempt(one_large_kernel, test_one)


# %% tags=["solution"]
def one_large_kernel_solution(model: ConvNet, index: int) -> ConvNet:
    changed = copy.deepcopy(model)
    replace_depthwise(changed.blocks[index], (9,))
    return changed


attempt(one_large_kernel_solution, test_one)

# %% [markdown]
# ## Takeaways
# - One class, `ConvNet`, holds MobileNetV1, V2 and, next, MixNet.
# - The paper's costs are arithmetic. Ours agree within 1.5M with Figures 1 and 4 and with the exponential curve; with the dilated curve once padding is counted, which is our guess.
# - `replace_depthwise` puts MixConv into any model, keeps its function where kernels grow, and reports what it did.
#
# Previous: [4 · Blocks](04_blocks.ipynb) · Next: [6 · MixNet](06_mixnet.ipynb)
