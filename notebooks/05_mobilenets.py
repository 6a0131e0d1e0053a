# %% [markdown]
# # 5 · MobileNets
#
# The paper tries MixConv first on MobileNetV1 and MobileNetV2: every depthwise layer gets a kernel mix. This chapter builds both networks, recomputes what the paper says they cost, and says what it found.
#
# ![ImageNet accuracy against multiply-adds for MobileNetV1 and V2. With one kernel size in all layers, accuracy peaks at 7×7 or 9×9 and then falls; with mixed sizes it stays above, at lower cost.](../figures/figure_4_redrawn.png)
#
# *What do the points cost, exactly? And why does the dotted line fall?*
#
# **You will be able to**
# - build MobileNetV1 and V2 with any kernel mix, and use them for classes, features or detection;
# - reproduce every cost in the paper's Figures 1, 4 and 6, and say what its "FLOPS" count;
# - say what larger and mixed kernels did for accuracy, and choose a mix.
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
# So they share one class. Most of its methods have the names that engineers know from timm: `forward_features`, `forward_head`, `get_classifier`, `reset_classifier`. Only `features` is ours.

# %%
#| export network.py
"""What MobileNets and MixNets share: `ConvNet`, first weights, channel rounding (chapter 5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv._checks import check_rate, refuse_script


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
        TypeError: for a number of classes that is not an integer.
        ValueError: for a negative number of classes or a rate outside 0 to 1.

    Source: ours; method names as in timm, but for `features`. Chapter 5.
    """

    __prepare_scriptable__ = refuse_script

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
        self.grad_checkpointing = False
        self.feature_info = describe_features(stem, blocks)
        self.reset_classifier(num_classes)


# %% [markdown]
# The forward pass in two halves: up to the head, pixels still apart, and from there to the classes. (`_run_block` calls the block, and under a switch saves memory; its fold is under "For those who build on it".)

# %%
#| export network.py
class ConvNet(ConvNet):
    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the mean over pixels: `(N, num_features, H / 32, W / 32)`."""
        x = self.stem(x)
        for block in self.blocks:
            x = self._run_block(block, x)
        y: Tensor = self.head(x)
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

# %% tags=["plumbing"]
# fold: Exchanging the classifier
#| export network.py
class ConvNet(ConvNet):
    def get_classifier(self) -> nn.Module:
        """The classifier; `nn.Identity` if there is none."""
        return self.classifier

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

# %% tags=["plumbing"]
# fold: Where each stride ends: `feature_info`
#| export network.py
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
#| export network.py
class ConvNet(ConvNet):
    def features(self, x: Tensor) -> list[Tensor]:
        """The last output at each stride, largest first; `feature_info` describes them."""
        wanted = {str(info["module"]) for info in self.feature_info}
        x = self.stem(x)
        outputs = [x] if "stem" in wanted else []
        for index, block in enumerate(self.blocks):
            x = self._run_block(block, x)
            if f"blocks.{index}" in wanted:
                outputs.append(x)
        return outputs


# %% [markdown]
# First weights. There is no training in this book, but the networks should be ready for it.
#
# > ⚙️ **Official code.** Convolution weights are drawn from a normal distribution of variance $2 / (k^2 \cdot o)$, where $o$ is the number of outputs *in the shape of the kernel*. For a depthwise kernel of shape (k, k, c, 1) that is 1, and for one of two 1×1 groups it is half of the layer's outputs. The classifier is uniform within $\pm 1/\sqrt{\mathrm{classes}}$. Biases are zero.

# %%
#| export network.py
@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as the official code does.

    Convolutions: normal, mean 0, variance `2 / (k · k · out_channels / groups)`. Linear layers:
    uniform within `1 / sqrt(out_features)` of 0. Their biases: 0. Other layers, normalisations
    among them, are left as they are.

    Source: `conv_kernel_initializer`, `dense_kernel_initializer` in `mixnet_model.py`. Chapter 5.
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
#| export network.py
from mixconv._checks import check_multiplier


def round_channels(channels: int, multiplier: float = 1.0, divisor: int = 8) -> int:
    """Scale a number of channels and round it to a multiple, losing at most a tenth.

    Args:
        channels: before scaling.
        multiplier: positive; 1 returns `channels` as they are.
        divisor: the multiple.

    Raises:
        ValueError: if the multiplier is not positive and finite.

    Source: `round_filters` in the official `mixnet_model.py`. Chapter 5.
    """
    check_multiplier("multiplier", multiplier)
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
# Thirteen depthwise-separable blocks, in five stages: output channels, repeats, stride of the first block.

# %%
#| export mobilenet.py
"""MobileNetV1 and V2 with any kernel mix (paper, section 3.3; chapter 5)."""

from typing import Any

from mixconv._checks import check_multiplier
from mixconv.network import round_channels

_V1_STAGES = [(64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)]


def _unroll(stages: list[tuple[int, int, int]], width_multiplier: float) -> list[dict[str, Any]]:
    """Channels and stride of each block, for a network whose stem has 32 channels."""
    check_multiplier("width_multiplier", width_multiplier)
    rows, channels = [], round_channels(32, width_multiplier)
    for out_channels, repeats, first_stride in stages:
        wider = round_channels(out_channels, width_multiplier)
        for stride in [first_stride] + [1] * (repeats - 1):
            rows.append({"in_channels": channels, "out_channels": wider, "stride": stride})
            channels = wider
    return rows


# %%
rows = _unroll(_V1_STAGES, 1.0)
print(len(rows), rows[1])

# %% [markdown]
# What V1 and V2 have in common besides: the stem of stride 2, and how the parts become a network. Only V2 has a head.

# %% tags=["plumbing"]
# fold: From stem, blocks and head to a network
#| export mobilenet.py
from collections.abc import Sequence

from torch import nn

from mixconv.blocks import ConvNormActivation
from mixconv.layer import make_conv2d, make_pointwise
from mixconv.network import ConvNet, initialize


def _assemble(
    in_channels: int,
    rows: list[dict[str, Any]],
    blocks: Sequence[nn.Module],
    head_channels: int | None,
    activation: str,
    padding: str,
    num_classes: int,
    drop_rate: float,
) -> ConvNet:
    """A network from its blocks, its weights drawn; `head_channels=None` leaves the head out."""
    first, last = rows[0]["in_channels"], rows[-1]["out_channels"]
    stem_conv = make_conv2d(in_channels, first, 3, stride=2, padding=padding)
    stem = ConvNormActivation(stem_conv, activation=activation)
    head: nn.Module = nn.Identity()
    if head_channels is not None:
        head = ConvNormActivation(make_pointwise(last, head_channels), activation=activation)
    model = ConvNet(
        stem, blocks, head, head_channels or last, num_classes=num_classes, drop_rate=drop_rate
    )
    initialize(model)
    return model


# %%
#| export mobilenet.py
from functools import partial

from mixconv.blocks import DepthwiseSeparableBlock
from mixconv.network import refuse_timm_names  # whoever writes timm's names is told ours


@refuse_timm_names
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
        TypeError: for a number that is not an integer.
        ValueError: naming the argument.

    Source: Howard et al., 2017, Table 1; paper, section 3.3. Chapter 5.
    """
    block = partial(
        DepthwiseSeparableBlock,
        kernel_sizes=kernel_sizes, partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    rows = _unroll(_V1_STAGES, width_multiplier)
    blocks = [block(**row) for row in rows]
    return _assemble(in_channels, rows, blocks, None, "relu", padding, num_classes, drop_rate)


# %%
from mixconv.formulation import count_parameters

assert count_parameters(mobilenet_v1()) == 4_231_976
added = count_parameters(mobilenet_v1((3, 5, 7))) - count_parameters(mobilenet_v1())
assert added == 92_176
count_parameters(mobilenet_v1()), added

# %% [markdown]
# 4,231,976 parameters are the published network: the paper's Table 2 prints 4.2M. MixConv 357 adds 92,176, or 2%.
#
# > ✏️ **Ours.** The paper's costs are those of TF-slim's MobileNets (below), which have 'SAME' padding, and ReLU6 also in V1. Here the default is symmetric padding, V1 has ReLU, and first weights are drawn as MixNet's are. Costs are the same; `padding="same"` gives slim's windows.

# %% [markdown]
# **5.1** ★ *5 minutes, one line.* By how many parameters does MobileNetV1 grow, from 3×3 to equal MixConv 3, 5, if `channels` lists the channels of its depthwise layers? (All are even.)
#
# <details><summary>Hint: the idea</summary>
#
# Half of the channels of each layer change, from 9 weights to 25.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def growth_35(channels: list[int]) -> int:
    raise NotImplementedError


def test_growth(answer) -> None:
    expect(answer, [2], gives=16, why="one of two channels has 25 weights instead of 9")
    channels = [row["in_channels"] for row in _unroll(_V1_STAGES, 1.0)]
    grown = count_parameters(mobilenet_v1((3, 5))) - count_parameters(mobilenet_v1())
    expect(answer, channels, gives=grown, why="counted in the networks")


attempt(growth_35, test_growth)


# %% tags=["solution"]
# fold: Solution
def growth_35_solution(channels: list[int]) -> int:
    return sum(channels) // 2 * (25 - 9)


def new_weights(channels: list[int]) -> int:
    """count the new 5×5 kernels and forget the 3×3 kernels that they replace"""
    return sum(channels) // 2 * 25


def everybody(channels: list[int]) -> int:
    """enlarge every channel"""
    return sum(channels) * (25 - 9)


attempt(growth_35_solution, test_growth, wrong=[new_weights, everybody])

# %% [markdown]
# ## MobileNetV2
#
# Seventeen inverted residuals, in seven stages. All blocks widen by 6, but for the first, which does not widen.
#
# > 📄 **Paper (Sandler et al., 2018).** Table 2 of MobileNetV2. Its activation is ReLU6, and its head widens to 1280 channels.

# %%
#| export mobilenet.py
from mixconv.blocks import MixConvBlock
from mixconv.network import drop_path_rates  # stochastic depth, milder for early blocks

_V2_STAGES = [
    (16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1),
]  # fmt: skip


@refuse_timm_names
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
        TypeError: for a number that is not an integer.
        ValueError: naming the argument.

    Source: Sandler et al., 2018, Table 2; paper, section 3.3. Chapter 5.
    """
    block = partial(
        MixConvBlock, kernel_sizes=kernel_sizes, activation="relu6",
        partition=partition, dilated=dilated, padding=padding,
    )  # fmt: skip
    rows = _unroll(_V2_STAGES, width_multiplier)
    rates = drop_path_rates(drop_path_rate, len(rows))
    blocks = [
        block(**row, expand_ratio=6 if index else 1, drop_path_rate=rate)
        for index, (row, rate) in enumerate(zip(rows, rates, strict=True))
    ]
    head = round_channels(1280, max(1.0, width_multiplier))
    return _assemble(in_channels, rows, blocks, head, "relu6", padding, num_classes, drop_rate)


# %%
assert count_parameters(mobilenet_v2()) == 3_504_872
norms = [layer for layer in mobilenet_v2().modules() if isinstance(layer, nn.BatchNorm2d)]
count_parameters(mobilenet_v2()), sum(map(count_parameters, norms))

# %% [markdown]
# 3,504,872 parameters, as in other implementations of MobileNetV2. The paper's Table 2 prints 3.4M, as MobileNetV2's authors do. That is not this number rounded. A guess: without the numbers of the batch norms it is 3,504,872 − 34,112 = 3,470,760, with the rest cut off 3.4M. (Only a guess: 4.2M for V1 fits with the batch norms and without them.)
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
# Accuracies take ImageNet and days of training. Costs take arithmetic. The paper plots a cost for every network it trains, so each can be recomputed. Its numbers, copied from its tables or read off its plots, are in `tests/data/paper.json`.
#
# On the meta device nothing is computed and no memory is taken, so all of them are counted in seconds.

# %%
import json
from functools import cache
from pathlib import Path

from mixconv.formulation import LayerCost, count_costs

paper = json.loads(Path("../tests/data/paper.json").read_bytes())
figure_4 = paper["figure_4"]


@cache
def costs_of(build, kernel_sizes, **options) -> list[LayerCost]:
    with torch.device("meta"):
        model = build(kernel_sizes, **options)
        return count_costs(model, torch.zeros(1, 3, 224, 224))


def millions(build, kernel_sizes, **options) -> float:
    return sum(cost.multiply_adds for cost in costs_of(build, kernel_sizes, **options)) / 1e6


[f"{millions(mobilenet_v1, (3,)):.1f}M", f"{millions(mobilenet_v2, (3,)):.1f}M"]

# %% [markdown]
# > 📄 **Paper.** Figure 4 starts at 579M and 309M (read off the plot, within 2M). Section 3.3. (Its Table 2 prints 575M and 300M for the same networks: the numbers of MobileNetV2's authors, who counted in their own way.)
#
# We count convolutions and the classifier, and are about 10M and 8M short. What else does the paper count?
#
# ### The clue
#
# Take the smallest and the largest network of each kind, and look at what is missing:

# %%
builders = {"V1": (mobilenet_v1, 0), "V2": (mobilenet_v2, 2)}  # and the paper's column
rows = []
for version, (build, column) in builders.items():
    for k in (3, 13):
        ours, printed = millions(build, (k,)), figure_4["depthwise"][str(k)][column]
        weights = count_parameters(build((k,))) / 1e6
        rows.append([f"{version}, {k}×{k}", f"{ours:.1f}", printed, f"{printed - ours:.1f}",
                     f"{weights:.2f}"])  # fmt: skip
table(["network", "ours, M", "paper, M", "missing, M", "weights, M"], rows)

# %% [markdown]
# Not the work on pixels: MobileNetV2 normalises and activates more numbers than V1, and less is missing. What is missing follows the *weights*, about two and a half operations for each. Where only depthwise weights are added, from 3×3 to 13×13, it grows by less than a million: less than one can read off a plot. So depthwise weights seem to count less, but the plot alone cannot tell.
#
# Who does something once for every weight, whatever the image? Nobody, while the network runs. But the graph of a TensorFlow program also holds what happens before and beside that:
#
# | in the graph | what it does to a weight | operations | for which weights |
# |---|---|---:|---|
# | initialiser | a random number, times a deviation, plus a mean | 2 | all |
# | weight decay | squares it, halves it, adds it up | 3 | all but depthwise ones (TF-slim's MobileNets set no decay on those) |
#
# TensorFlow's profiler counts the operations in a graph, without asking what they are for; and half of its count is what one would print as multiply-adds.
#
# By hand, for MobileNetV1, in millions: 568.74 for the multiply-adds; one (half of two) for each of its 4.21 million weights of convolutions and classifier; 1.5 (half of three) for each of the 4.164 million that are not depthwise, 1.5 · 4.164 = 6.25. Together 568.74 + 4.21 + 6.25 = 579.2. The plot says 579.
#
# ### The rule
#
# What remains is small change: additions and products that are one operation an element, such as residual sums. Normalisation and activations cost nothing in that profiler.

# %% tags=["plumbing"]
# fold: Counting what is one operation an element
#| export counting.py
"""What the paper's "FLOPS" count: a rule that gives every MobileNet it plots (chapter 5)."""

from math import ceil

import torch
from torch import Tensor, nn

from mixconv.blocks import MixConvBlock, SqueezeExcite
from mixconv.formulation import LayerCost, count_costs, evaluating
from mixconv.network import ConvNet


def elementwise_operations(model: ConvNet, x: Tensor) -> int:
    """Residual sums, a gate's means and products, the pool, biases: one operation an element."""
    total = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        gate = 2 * isinstance(layer, SqueezeExcite)
        sum_ = isinstance(layer, MixConvBlock) and layer.has_residual
        bias = isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
        total += (gate + sum_ + bias + (layer is model.head)) * output.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    with torch.no_grad(), evaluating(model):
        model(x)
    for hook in hooks:
        hook.remove()
    return total


# %% [markdown]
# One more habit of TensorFlow's. It computes a dilated convolution by *space to batch*: an H×H image is cut into $d^2$ smaller ones of $\lceil H/d \rceil$ pixels a side, padded where $d$ does not divide $H$. The profiler counts the padding, too. By hand, 7 pixels and dilation 6: six strips of ⌈7/6⌉ = 2 make 12, so 144 positions are counted, not 49.

# %%
#| export counting.py
def padded_multiply_adds(cost: LayerCost, dilation: int) -> int:
    """Multiply-adds of a layer of stride 1, with the padding that dilation brings in TensorFlow."""
    size = cost.output_shape[-1]
    padded = dilation * ceil(size / dilation)
    return cost.multiply_adds * padded**2 // size**2


def paper_flops(model: ConvNet, decays: int, size: int = 224) -> float:
    """The "FLOPS" that the paper would print for a network, as we found it to count them.

    Args:
        model: on the meta device nothing is computed.
        decays: how often the weight decay stands in the graph: 1 for the paper's MobileNets.
        size: height and width of the image.

    Source: ours. TensorFlow's profiler, halved, run on TF-slim's MobileNets and the official
    MixNets; published nowhere.
    """
    x = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    work, initialised, decayed = 0, 0, 0
    for cost in count_costs(model, x):
        layer = model.get_submodule(cost.name)
        dilation = layer.dilation[0] if isinstance(layer, nn.Conv2d) else 1
        work += padded_multiply_adds(cost, dilation)
        weights = layer.get_parameter("weight").numel()
        initialised += weights
        decayed += weights if cost.kind != "depthwise" else 0
    return work + elementwise_operations(model, x) / 2 + initialised + 1.5 * decays * decayed


# %%
with torch.device("meta"):
    model = mobilenet_v1()
    kinds = {"depthwise": 0, "other": 0}
    for cost in costs_of(mobilenet_v1, (3,)):
        weight = model.get_submodule(cost.name).weight
        kinds["depthwise" if cost.kind == "depthwise" else "other"] += weight.numel() / 1e6
    rule = paper_flops(model, decays=1) / 1e6
by_hand = millions(mobilenet_v1, (3,)) + sum(kinds.values()) + 1.5 * kinds["other"]
print(f"weights: {kinds['depthwise']:.3f}M depthwise, {kinds['other']:.3f}M other")
print(f"by hand {by_hand:.2f}M, by the rule {rule:.2f}M")


# %% [markdown]
# **5.2** ★ *5 minutes, two lines.* How many positions does TensorFlow's profiler count for a dilated layer of stride 1, given the side of its image and the dilation?
#
# <details><summary>Hint: the idea</summary>
#
# Along one axis: `dilation` strips, each as long as the longest of them must be.
#
# </details>

# %%
def counted_positions(size: int, dilation: int) -> int:
    raise NotImplementedError


def test_positions(answer) -> None:
    expect(answer, 7, 1, gives=49, why="nothing is cut")
    expect(answer, 7, 6, gives=144, why="six strips of two, on each axis")
    expect(answer, 14, 4, gives=256, why="four strips of four, on each axis")
    expect(answer, 28, 4, gives=784, why="4 divides 28")


attempt(counted_positions, test_positions)


# %% tags=["solution"]
# fold: Solution
def counted_positions_solution(size: int, dilation: int) -> int:
    strip = -(-size // dilation)
    return (dilation * strip) ** 2


def cut_off(size: int, dilation: int) -> int:
    """round the strips down: then pixels are lost"""
    return (dilation * (size // dilation)) ** 2


def unpadded(size: int, dilation: int) -> int:
    """count the pixels that are there, as anybody would"""
    return size**2


attempt(counted_positions_solution, test_positions, wrong=[cut_off, unpadded])

# %% [markdown]
# ### Every point
#
# Twenty-one points of each kind: Figures 1 and 4, and Figure 6 with its exponential and its dilated family, two to six groups. (With two groups the exponential split is the equal one, so one network is there twice.)

# %%
from mixconv.partition import default_kernel_sizes


def points() -> dict[str, tuple[tuple[int, ...], dict, list[float]]]:
    """Kernel sizes, options, and the paper's V1 and V2 numbers of every network it plots."""
    found = {}
    for family in ("depthwise", "mixconv"):
        for name, printed in figure_4[family].items():
            found[name] = (tuple(map(int, name.split())), {}, [printed[0], printed[2]])
    kinds = {"exponential": {"partition": "exponential"}, "dilated": {"dilated": True}}
    for family, options in kinds.items():
        for index, printed in enumerate(zip(*paper["figure_6"][family].values(), strict=True)):
            sizes = default_kernel_sizes(index + 2)
            found[f"{family}, {index + 2} groups"] = (sizes, options, list(printed))
    return found


# %%
rows, errors = [], {"V1": [], "V2": []}
for name, (sizes, options, printed) in points().items():
    row = [name]
    for (version, (build, _)), theirs in zip(builders.items(), printed, strict=True):
        with torch.device("meta"):
            ours = paper_flops(build(sizes, **options), decays=1) / 1e6
        row += [f"{ours:.1f}", theirs, f"{theirs - ours:+.1f}"]
        errors[version].append(theirs - ours)
    rows.append(row)
assert all(abs(error) < 0.94 for found in errors.values() for error in found)
table(["kernels", "V1 rule", "V1 paper", "difference", "V2 rule", "V2 paper", "difference"], rows)

# %%
for version, found in errors.items():
    mean, worst = sum(found) / len(found), max(map(abs, found))
    print(f"{version}: {len(found)} points, mean difference {mean:+.2f}M, largest {worst:.2f}M")

# %% [markdown]
# Absolute numbers, not growth, and every one within the accuracy of reading a plot.
#
# > ✏️ **Ours.** How sure is that? For MobileNets, as sure as one gets without asking the authors. The rule was found by running TF-slim's MobileNet definitions under TensorFlow 1's profiler, with slim's default weight decay. For MobileNets `decays=1` is that default, and not a fit to the plots; in chapter 7 it becomes one, for the MixNets, and stays open. The dilated points were predicted, not used.
#
# Everywhere else this book counts multiply-adds of convolutions and classifier, and nothing besides.
#
# ## What the paper found
#
# Costs are half of it. Here is the plot that this book began with: our multiply-adds on the horizontal axis, the paper's accuracies on the vertical one.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, show, use_style

use_style()
families = {
    "depthwise": ("one size\nfor all channels", ":", "s", -13),
    "mixconv": ("mixed, 3×3 up\nto this size", "-", "o", 7),
}
figure, axes = plt.subplots(1, 2, figsize=(8.3, 3.6))
for axis, (version, (build, column)) in zip(axes, builders.items(), strict=True):
    for family, (label, line, marker, offset) in families.items():
        drawn = {"3": figure_4["depthwise"]["3"], **figure_4[family]}
        cost = [millions(build, tuple(map(int, name.split()))) for name in drawn]
        accuracy = [value[column + 1] for value in drawn.values()]
        axis.plot(cost, accuracy, line, color="black", linewidth=1, zorder=1)
        for x, y, name in zip(cost, accuracy, drawn, strict=True):
            k = int(name.split()[-1])
            axis.plot(x, y, marker, color=kernel_color(k), markersize=8)
            if family == "mixconv" or k > 3:
                place = (-9, -4) if k == 3 else (0, offset)
                axis.annotate(f"{k}", (x, y), xytext=place, textcoords="offset points",
                              ha="center", fontsize=9)  # fmt: skip
        at, place, ha = (-2, (-6, -36), "right") if marker == "s" else (-1, (12, -6), "left")
        axis.annotate(label, (cost[at], accuracy[at]), xytext=place, textcoords="offset points",
                      ha=ha, fontsize=9)  # fmt: skip
    axis.set(title=f"MobileNet{version}", xlabel="multiply-adds, millions (ours)")
    axis.margins(0.08, 0.1)
axes[0].set_ylabel("ImageNet top-1, % (paper)")
show(
    figure,
    "figure_4_redrawn.png",
    "ImageNet accuracy, cited from the paper, against our multiply-adds for MobileNetV1 and V2. "
    "With one kernel size for all channels accuracy peaks at 7×7 on V1 and 9×9 on V2, then falls. "
    "Mixed sizes, from 3×3 up, lie above that line at every cost and do not fall.",
    caption="One size for all channels peaks at 7×7 (V1) or 9×9 (V2), then falls; at the same cost "
    "a mix stays above. (The vertical axes do not begin at zero, and differ.)",
)

# %% [markdown]
# > 📄 **Paper, section 3.3, Figure 4.** With one size for all channels, accuracy rises to 7×7 (V1) or 9×9 (V2) and then falls: at 13×13 MobileNetV1 is worse than with 3×3. A mix of the same largest kernel costs less, and does not fall. From 11 to 13 it rises by a tenth of a point on V1, and on V2 it stays where it is: 74.30 and 74.31, less apart than the plot can be read.
#
# Why should a larger kernel hurt? It contains the smaller one; with zeros around, it *is* the smaller one. But training has to find those zeros, in every channel. And at the end of these networks an image has 7×7 pixels: a 13×13 kernel covers all of it from any position, and is a dense layer in disguise (the paper's argument, in its introduction). In a mix, some channels always keep a small kernel.
#
# > 📄 **Paper, section 3.4, Figure 5.** One layer of MobileNetV2 at a time was given larger kernels. Most layers hardly care; those of stride 2 gain. There, MixConv 3, 5, 7, 9 does about as well as 9×9 in all channels, with half of the weights and multiply-adds of that layer.
#
# > ✏️ **Ours.** Why those? A layer of stride 2 drops three of four positions, and a wider window lets the one that stays know about the others. That is a reading, not a measurement.
#
# > 📄 **Paper, section 3.4, Figure 6.** The exponential split costs less than the equal one, and over both networks neither wins. Dilated 3×3 kernels are the cheapest. They do well in place of small kernels, and badly in place of large ones: a widely dilated kernel skips the pixels next to its centre.
#
# | you are choosing | take | who says so |
# |---|---|---|
# | how many groups | four is a safe choice in MobileNets: 3, 5, 7, 9 | 📄 3.2 |
# | the split | equal; exponential where every multiply-add counts | 📄 3.4 |
# | dilated or not | not for large kernels | 📄 3.4 |
# | where | layers of stride 2 first (in Figure 4 every depthwise layer is mixed) | 📄 3.4 |
# | MixConv or not | not in the very first block, where channels are few and images large: the search of chapter 7 put plain 3×3 there, in all MixNets | ✏️ |
#
# ### What came of it: Table 2
#
# Kernel sizes were one choice of many that a search could make. Given them to choose from, it found the MixNets of chapter 7. The paper's Table 2 compares them with the small networks of their time; here it is as a plot.

# %% tags=["drawing"]
# fold: The code that draws this
table_2 = {name: row for name, row in paper["table_2"].items() if name != "comment"}
left = {"MobileNetV3-L", "MnasNet-A1", "ProxylessNAS", "MixNet-S", "MixNet-M", "MixNet-L"}
figure, axis = plt.subplots(figsize=(8.2, 4))
ours = [row[1:3] for name, row in table_2.items() if name.startswith("MixNet")]
axis.plot(*zip(*ours, strict=True), "-", color="black", linewidth=1)
for name, (_, cost, accuracy, _) in table_2.items():
    mixed = name.startswith("MixNet")
    axis.plot(cost, accuracy, "o" if mixed else "s", color="black" if mixed else "#777777")
    place = (-7, 2 if mixed else -4) if name in left else (7, -4)
    axis.annotate(name, (cost, accuracy), xytext=place, textcoords="offset points", fontsize=9,
                  ha="right" if name in left else "left",
                  weight="bold" if mixed else "normal")  # fmt: skip
axis.set(xlabel="“FLOPS” as printed, millions", ylabel="ImageNet top-1, %", xlim=(140, 690))
show(
    figure,
    "table_2_drawn.png",
    "ImageNet accuracy against cost for fourteen networks of the paper's Table 2, both as printed. "
    "MixNet-S, M and L lie on a line above MobileNets, MnasNets, FBNets, ProxylessNAS and "
    "MobileNetV3; no other network is both cheaper and more accurate than one of the three.",
    caption="No network of Table 2 is both cheaper and more accurate than a MixNet (all numbers "
    "cited from the paper).",
)

# %% tags=["plumbing"]
# fold: Which other network is best up to the cost of each MixNet?
mixnets = {name: row for name, row in table_2.items() if name.startswith("MixNet")}
for name, (_, cost, accuracy, _) in mixnets.items():
    others = [
        n for n, row in table_2.items() if row[1] <= cost and row[2] >= accuracy and n != name
    ]
    best = max((row[2], n) for n, row in table_2.items() if row[1] <= cost and n not in mixnets)
    assert others == []
    print(f"{name}: {accuracy}%, the best other up to its cost: {best[1]}, {best[0]}%")


# %% [markdown]
# Read it with this chapter in mind. Costs in such a table come from many authors, each with their own way of counting, and MixNet's own count is above its multiply-adds. And a search, gates and swish came in beside the mixed kernels: the plot compares networks, and not MixConv alone. For that, look at Figure 4 above.
#
# > 📄 **Paper, section 4.4.** Transfer: MixNet-M, with ten classes, reaches 97.92% on CIFAR-10, with 3.49M parameters and 352M FLOPS.
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
    return count_parameters(model) / 1e6, sum(c.multiply_adds for c in costs) / 1e9


table_1, rows = paper["table_1"], []
for name in ("5", "3 5", "7", "3 5 7"):
    for version, (build, column) in builders.items():
        first = 3 if column else 0
        mine, base = totals(build, tuple(map(int, name.split()))), totals(build, (3,))
        ours = [a - b for a, b in zip(mine, base, strict=True)]
        theirs = [table_1[name][first + i] - table_1["3"][first + i] for i in (0, 1)]
        assert all(abs(a - b) <= 0.0101 for a, b in zip(ours, theirs, strict=True))
        rows.append([f"{version}, {name}", *(f"{v:.3f}" for v in (ours[0], theirs[0])),
                     *(f"{v:.3f}" for v in (ours[1], theirs[1]))])  # fmt: skip
table(["against 3×3", "parameters +M, ours", "paper", "multiply-adds +B, ours", "paper"], rows)

# %% [markdown]
# Every difference agrees within the rounding of the printed digits. The paper's are all a little above ours, perhaps since the rows of a network share one rounded baseline. The mAP that goes with them (cited from the paper's Table 1): MixConv 357 reaches 22.4 on V1 and 22.3 on V2, where 7×7 reaches 21.8 and 21.2.

# %% [markdown]
# ## For those who build on it
#
# What a larger program asks of a network, and this chapter's story does not need. Skip it until you do.
#
# *Memory.* `set_grad_checkpointing` computes the blocks a second time in the backward pass, and does not keep what is inside them. *Detectors.* `forward_intermediates` gives the last output and chosen maps at once. Both are timm's names.

# %% tags=["plumbing"]
# fold: Checkpoints, and chosen maps
#| export network.py
from torch.utils.checkpoint import checkpoint


class ConvNet(ConvNet):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep each block's input only, and compute the rest again when it is due."""
        self.grad_checkpointing = enable

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, x, use_reentrant=False)
            return again
        y: Tensor = block(x)
        return y

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The output of `forward_features`, and maps of `features`.

        Args:
            x: images.
            indices: which entries of `feature_info`; a number for the last so many; None for all.
            intermediates_only: leave the output out.
        """
        maps = self.features(x)
        if isinstance(indices, int):
            chosen = maps[len(maps) - indices :]
        else:
            chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (self.head(maps[-1]), chosen)


# %% [markdown]
# *Stochastic depth* (chapter 4) is milder for early blocks: of n blocks, block i is dropped with i / n of the rate, i from 0.
#
# > ✏️ **Ours.** That ramp is timm's; the official MixNet code has no stochastic depth.

# %% tags=["plumbing"]
# fold: A rate of stochastic depth for each block
#| export network.py
def drop_path_rates(drop_path_rate: float, blocks: int) -> list[float]:
    """The rate of stochastic depth for each of a row of blocks: `drop_path_rate * i / blocks`.

    Args:
        drop_path_rate: what the rates grow towards; the first block has 0.
        blocks: how many.

    Raises:
        ValueError: if the rate is not at least 0 and less than 1.
    """
    check_rate("drop_path_rate", drop_path_rate)
    return [drop_path_rate * index / blocks for index in range(blocks)]


# %%
[round(rate, 2) for rate in drop_path_rates(0.2, 5)]

# %% [markdown]
# *Names.* timm writes `in_chans` where PyTorch's layers, and this book, write `in_channels`, and has a few more words of its own. Whoever comes from timm is told:

# %% tags=["plumbing"]
# fold: What timm calls otherwise
#| export network.py
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TIMMS = {
    "in_chans": "is called in_channels here: write in_channels={value!r}",
    "pretrained": "is not known here: a MixNet takes weights='timm/tf_mixnet_s.in1k', or a path",
    "features_only": "is not known here: model.features(x) gives the maps of every stride",
    "drop_block_rate": "is not known here: there is drop_path_rate",
    "global_pool": "is not known here: model.forward_features(x) gives the maps before the pool",
}


def refuse_timm_names(build: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a maker of networks: an argument of timm's is an error that names ours."""

    @wraps(build)
    def checked(*args: _P.args, **options: _P.kwargs) -> _T:
        for name in _TIMMS.keys() & options.keys():
            raise TypeError(f"{name} {_TIMMS[name].format(value=options[name])}")
        return build(*args, **options)

    return checked


# %%
for timms in ({"in_chans": 1}, {"features_only": True}):
    try:
        refuse_timm_names(dict)(**timms)
    except TypeError as error:
        print(error)

# %% [markdown]
# ## Exercises
#
# **5.3** ★★ *10 minutes, one line.* A budget. What is the largest single kernel size, 3 to 13, with which a network costs at most `budget` million multiply-adds? (`millions` counts, and `build` is `mobilenet_v1` or `mobilenet_v2`.)
#
# <details><summary>Hint: the first line</summary>
#
# `range(3, 14, 2)` holds the sizes; `max` takes a generator.
#
# </details>

# %%
from collections.abc import Callable


def largest_kernel(build: Callable[..., ConvNet], budget: float) -> int:
    raise NotImplementedError


def test_largest(answer) -> None:
    for build in (mobilenet_v1, mobilenet_v2):
        five, seven = (millions(build, (k,)) for k in (5, 7))
        expect(answer, build, seven, gives=7, why=f"7×7 costs exactly {seven:.1f}")
        expect(answer, build, seven - 0.1, gives=5, why=f"7×7 costs {seven:.1f}, 5×5 {five:.1f}")
    expect(answer, mobilenet_v2, 1e6, gives=13, why="13×13 is the largest")


attempt(largest_kernel, test_largest)


# %% tags=["solution"]
# fold: Solution
def largest_kernel_solution(build: Callable[..., ConvNet], budget: float) -> int:
    return max(k for k in range(3, 14, 2) if millions(build, (k,)) <= budget)


def first_too_large(build: Callable[..., ConvNet], budget: float) -> int:
    """stop at the first size that is too expensive, and return that one"""
    return next((k for k in range(3, 14, 2) if millions(build, (k,)) >= budget), 13)


def one_below(build: Callable[..., ConvNet], budget: float) -> int:
    """refuse a network that costs exactly the budget"""
    return max(k for k in range(3, 14, 2) if millions(build, (k,)) < budget)


attempt(largest_kernel_solution, test_largest, wrong=[first_too_large, one_below])


# %% [markdown]
# **5.4** ★★ *10 minutes, two lines.* Where is a large kernel cheapest? A network's depthwise layers are given as (channels, side of the output). Return the index of the layer where going from 3×3 to 9×9 costs the fewest multiply-adds; of equal ones, the last.
#
# <details><summary>Hint: the idea</summary>
#
# Each output position of each channel costs 81 − 9 = 72 more, in whatever layer.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# $72 \cdot c \cdot h^2$
#
# </details>

# %%
def cheapest_place(layers: list[tuple[int, int]]) -> int:
    raise NotImplementedError


def test_cheapest(answer) -> None:
    expect(answer, [(32, 112), (64, 112), (160, 56)], gives=0, why="32 · 112² is the least")
    expect(answer, [(512, 14), (512, 7), (1024, 7)], gives=1, why="512 · 49 is the least")
    expect(answer, [(8, 28), (16, 14), (100, 7), (64, 7)], gives=3, why="3,136, as in layer 1")
    v1 = [(64, 112), (128, 56), (256, 28), (512, 14), (1024, 7)]
    expect(answer, v1, gives=4, why="each stage of MobileNetV1 costs half of the one before")


attempt(cheapest_place, test_cheapest)


# %% tags=["solution"]
# fold: Solution
def cheapest_place_solution(layers: list[tuple[int, int]]) -> int:
    costs = [channels * side**2 for channels, side in layers]
    return max(i for i, cost in enumerate(costs) if cost == min(costs))


def smallest_image(layers: list[tuple[int, int]]) -> int:
    """look at the image alone"""
    sides = [side for _, side in layers]
    return max(i for i, side in enumerate(sides) if side == min(sides))


def fewest_channels(layers: list[tuple[int, int]]) -> int:
    """look at the channels alone"""
    channels = [count for count, _ in layers]
    return max(i for i, count in enumerate(channels) if count == min(channels))


attempt(cheapest_place_solution, test_cheapest, wrong=[smallest_image, fewest_channels])

# %% [markdown]
# ## Takeaways
# - One class, `ConvNet`, holds MobileNetV1, V2 and, next, MixNet.
# - One kernel size for all channels has a best value, and the best mix beats it: 72.56 against 72.03% on V1, 74.31 against 74.13% on V2 (cited from the paper's Figure 4). At equal cost a mix is ahead. Layers of stride 2 gain most.
# - The paper's "FLOPS" are TensorFlow's profiler, halved: multiply-adds, and also what initialises and decays the weights. By that rule all 42 points of its Figures 1, 4 and 6 (two of them one network twice) agree within 1M.
#
# **Further reading**: [the paper](https://arxiv.org/abs/1907.09595), sections 3.3 and 3.4. How initial weights are scaled and why: [He and others](https://arxiv.org/abs/1502.01852).
#
# Previous: [4 · Blocks](04_blocks.ipynb) · Next: [6 · Receptive fields](06_receptive_fields.ipynb)
