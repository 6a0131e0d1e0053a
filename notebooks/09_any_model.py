# %% [markdown]
# # 9 · Any model
#
# You have a network that works, perhaps trained. What would MixConv do to it? Can its kernels grow without the network forgetting what it knows?
#
# **You will be able to**
# - put MixConv in place of the depthwise layers of any model;
# - say when the network computes afterwards what it computed before, and when it cannot;
# - name three ways in which swapping a layer goes wrong without an error.
#
# **Know first:** [chapter 3](03_layer.ipynb) and [chapter 5](05_mobilenets.ipynb).
#
# **Time:** 20 minutes to read. Runs in under 20 seconds on two cores.

# %% [markdown]
# ## The idea, by hand
#
# A kernel 1 2 1 does what 0 0 1 2 1 0 0 does: same sums. So an old 3×3 kernel can go into the middle of a new 7×7 kernel, zeros around it, and the network computes what it computed before. Training then starts from there.

# %% tags=["drawing"]
import matplotlib.pyplot as plt
import torch
from torch import nn

from mixconv.layer import embed_kernel
from mixconv.teaching import kernel_color, show, use_style

use_style()
torch.manual_seed(0)
old = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3)
figure, axes = plt.subplots(1, 4, figsize=(7.5, 2.3))
for axis, k in zip(axes, (3, 3, 5, 7), strict=True):
    new = embed_kernel(old, k)[0, 0]
    for i in range(k):
        for j in range(k):
            kept = new[i, j] != 0
            color = kernel_color(k) if kept else "#ededed"
            axis.add_patch(plt.Rectangle((j, i), 0.92, 0.92, color=color, lw=0))
            ink = "black" if not kept or k == 5 else "white"
            axis.text(j + 0.46, i + 0.48, f"{new[i, j]:.0f}", ha="center", va="center",
                      color=ink, fontsize=9)  # fmt: skip
    middle = k / 2
    axis.set(xlim=(middle - 3.6, middle + 3.6), ylim=(middle + 3.6, middle - 3.6))
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
axes[0].set_title("old, 3×3")
for axis, k in zip(axes[1:], (3, 5, 7), strict=True):
    axis.set_title(f"new, {k}×{k}", color="black")
show(
    figure,
    "kernels_that_grow.png",
    "An old 3×3 kernel, and the same nine numbers in the middle of new 3×3, 5×5 and 7×7 kernels "
    "whose other weights are zero: the layer's output does not change.",
)

# %% [markdown]
# ## The report
#
# A layer that is not what it seems must be left alone, and the caller must be told. Each layer gets a line in a report.

# %%
#| export surgery.py
"""MixConv in place of the depthwise layers of any model (chapter 9)."""

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
#
# A class is known by what it *is*, not by its name: anybody may call a class `Conv2dSame`. timm's and geffnet's are looked up among the modules that the program has imported; if it has not, the layer cannot be theirs.

# %%
#| export surgery.py
import sys

from mixconv.layer import Conv2dSame

_PEERS = {"timm.layers.conv2d_same": "Conv2dSame", "geffnet.conv2d_layers": "Conv2dSame"}


def _pads_as_tensorflow(conv: nn.Conv2d) -> bool:
    """Whether a layer is of a class that is known to pad by TensorFlow's rule."""
    peers = [getattr(sys.modules.get(module), name, None) for module, name in _PEERS.items()]
    return type(conv) in (Conv2dSame, *peers)


# %%
#| export surgery.py
def find_padding(conv: nn.Conv2d) -> str:
    """The padding of a convolution with an odd kernel in our terms: "symmetric" or "same".

    Exact types only: a subclass of `nn.Conv2d` may compute something else. TensorFlow's rule is
    known of our `Conv2dSame` and of timm's and geffnet's.

    Raises:
        ValueError: saying why it has none.

    Source: ours. Chapter 9.
    """
    if any(k % 2 == 0 for k in conv.kernel_size):
        raise ValueError(f"kernel {conv.kernel_size} is not odd")
    if _pads_as_tensorflow(conv):
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
#| export surgery.py
from functools import partial
from typing import cast

import torch
from torch import nn

from mixconv.layer import MixConv2d, embed_kernel


def _convert(conv: nn.Conv2d, make: partial[MixConv2d], padding: str | None) -> MixConv2d:
    """A MixConv layer in place of a depthwise one, with fresh weights.

    Raises:
        ValueError: saying why it cannot be done.
    """
    mixed = make(
        conv.in_channels, stride=cast("tuple[int, int]", conv.stride),
        padding=find_padding(conv) if padding is None else padding,
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
#| export surgery.py
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
#| export surgery.py
from collections.abc import Sequence

from mixconv._checks import check_kernel_sizes


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

    Source: paper, section 3 ("drop-in replacement"). Chapter 9.
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
#| export surgery.py
def _check_request(model: nn.Module, make: partial[MixConv2d], padding: str | None) -> None:
    """Raise for arguments that no layer could satisfy, before anything is changed."""
    if not isinstance(make.keywords["partition"], str):
        raise TypeError("partition must be a method's name, since layers differ in channels")
    make(10_000, padding=padding or "symmetric", device="meta")  # channels enough for any mix
    if _is_depthwise(model):
        raise TypeError("model is itself a depthwise layer; wrap it in nn.Sequential first")


# %%
#| export surgery.py
def _other_padding(conv: nn.Conv2d, padding: str) -> bool:
    try:
        return find_padding(conv) != padding and conv.stride != (1, 1)
    except ValueError:
        return True


# %%
#| export surgery.py
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
#| export surgery.py
def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _checked(layer: nn.Module) -> nn.Conv2d:
    """The layer, if it is one that can be replaced; ValueError says why it is not."""
    if not isinstance(layer, nn.Conv2d):
        raise ValueError("it is a MixConv2d already")
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.kernel_size[0] % 2 == 0:
        raise ValueError(f"kernel {layer.kernel_size} is not square and odd")
    if torch.nn.utils.parametrize.is_parametrized(layer):
        raise ValueError("its weight is parametrized")
    if has_hooks(layer):
        raise ValueError("it has hooks, which would be lost")
    axes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    if _pads_as_tensorflow(layer) and any(d * (k - 1) < s - 1 for k, d, s in axes):
        raise ValueError("'SAME' with a stride wider than the kernel centres windows elsewhere")
    return layer


# %%
#| export surgery.py
def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`: hooks, or one of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)


# %% [markdown]
# MobileNetV2, before and after:

# %%
import copy

from mixconv.formulation import count_parameters
from mixconv.mobilenet import mobilenet_v2
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
count_parameters(plain), count_parameters(mixed)

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
# **9.1** The paper's Figure 5 changes *one* depthwise layer of MobileNetV2 at a time, and finds that layers with stride 2 gain most from large kernels. Build the network whose block `index` has a 9×9 kernel, and all others 3×3, with the same function as `model`.

# %%
from mixconv.network import ConvNet
from mixconv.teaching import attempt


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
# - Kernels that grow around their old values leave the network as it was.
# - `replace_depthwise` puts MixConv into any model, keeps its function where kernels grow, and reports what it did.
#
# Previous: [8 · Weights](08_weights.ipynb) · Next: [11 · Why it is slow](11_why_slow.ipynb)
