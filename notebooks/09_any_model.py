# %% [markdown]
# # 9 · Any model
#
# You have a network that works, perhaps trained. Can its kernels grow without the network forgetting what it knows?
#
# They can: the picture below puts an old 3×3 kernel into the middle of larger ones, with zeros around it.
#
# **You will be able to**
# - put MixConv in place of the depthwise layers of any model;
# - say when the network computes afterwards what it computed before, and when it cannot;
# - name four ways in which swapping a layer goes wrong without an error.
#
# **Know first:** [chapter 3](03_layer.ipynb) and [chapter 5](05_mobilenets.ipynb).
#
# **Time:** 20 minutes to read. Runs in under 30 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
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
            ink = "white" if kept and k == 3 else "black"
            axis.text(j + 0.46, i + 0.48, f"{new[i, j]:.0f}", ha="center", va="center",
                      color=ink, fontsize=9)  # fmt: skip
    middle = k / 2
    axis.set(xlim=(middle - 3.6, middle + 3.6), ylim=(middle + 3.6, middle - 3.6))
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
axes[0].set_title("old, 3×3")
for group, (axis, k) in enumerate(zip(axes[1:], (3, 5, 7), strict=True)):
    axis.set_title(f"new, {k}×{k}\n(group {group})", color="black")
show(
    figure,
    "kernels_that_grow.png",
    "An old 3×3 kernel, and the same nine numbers in the middle of new 3×3, 5×5 and 7×7 kernels "
    "whose other weights are zero: the layer's output does not change.",
    caption="A kernel grows by zeros around it, and the layer computes what it did.",
)

# %% [markdown]
# By hand, in one dimension: the kernel 1 2 1 over the pixels 3 5 4 gives 3 + 10 + 4 = 17. The kernel 0 1 2 1 0 over 9 3 5 4 7 gives 0 + 3 + 10 + 4 + 0 = 17.
#
# Are the zeros dead weight? No. A weight that is zero has a gradient all the same: it is the sum of the errors times the pixels under that weight, and neither asks what the weight is. The first step of training moves them.

# %%
from mixconv.layer import MixConv2d

layer = MixConv2d(1, 7)
with torch.no_grad():
    layer.convs[0].weight.copy_(embed_kernel(old, 7))
layer(torch.randn(4, 1, 16, 16)).square().sum().backward()
border = layer.convs[0].weight == 0
print(
    int(border.sum()),
    "zeros;",
    int((layer.convs[0].weight.grad[border] != 0).sum()),
    "have a gradient",
)


# %% [markdown]
# ## Ten lines
#
# So: find the depthwise layers, build a MixConv for each, move the weights in, put it in its place.

# %%
def swap(model: nn.Module, kernel_sizes: tuple[int, ...]) -> None:
    for parent in list(model.modules()):
        for name, old in parent.named_children():
            if not isinstance(old, nn.Conv2d) or not old.groups == old.in_channels > 1:
                continue
            new = MixConv2d(old.in_channels, kernel_sizes, old.stride, bias=old.bias is not None)
            weights = old.weight.detach().split(new.partition)
            for conv, weight in zip(new.convs, weights, strict=True):
                conv.weight.data = embed_kernel(weight, conv.kernel_size[0])
            setattr(parent, name, new)


# %% [markdown]
# On MobileNetV2 it works. The network is deeper than any hand calculation, so compare what it gives before and after:

# %%
import copy

from mixconv.mobilenet import mobilenet_v2
from mixconv.teaching import check

torch.manual_seed(0)
plain = mobilenet_v2(num_classes=10).eval()
mixed = copy.deepcopy(plain)
swap(mixed, (3, 5, 7))
x = torch.randn(2, 3, 64, 64)
check(mixed(x), plain(x), "MobileNetV2 before and after")

# %% [markdown]
# ## Four ways to break it
#
# Three now; the fourth has a section of its own, when there is something to train.
#
# **Padding.** A network that came from TensorFlow pads by its rule (chapter 3). The ten lines do not look, and give every layer symmetric padding. No error; another function:

# %%
ported = mobilenet_v2(num_classes=10, padding="same").eval()
swapped = copy.deepcopy(ported)
swap(swapped, (3, 5, 7))
print("the same:", torch.allclose(swapped(x), ported(x), atol=1e-3))

# %% [markdown]
# **A layer in two places.** Some networks use one layer twice; its weights are learnt from both places. PyTorch lists such a layer once, so the ten lines replace it once:

# %%
shared = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
twice = nn.Sequential(shared, nn.ReLU(), shared)
pixels = torch.randn(1, 6, 8, 8)
before = twice(pixels)
swap(twice, (3, 5, 7))
print("the same:", torch.allclose(twice(pixels), before, atol=1e-5))
print("still one layer:", twice[0] is twice[2])

# %% [markdown]
# It computes the same, until the first step of training pulls the two apart.
#
# **A layer that is more than it seems.** PyTorch's pruning keeps chosen weights at zero by a *hook*, a function that runs before each call of the layer. The ten lines copy the weights and leave the hook behind:

# %%
from torch.nn.utils import prune

pruned = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False))
prune.random_unstructured(pruned[0], "weight", amount=27)
swap(pruned, (3,))
optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
pruned(pixels).square().sum().backward()
optimizer.step()
print("still zero after one step:", int((pruned[0].convs[0].weight == 0).sum()), "of 27 pruned")

# %% [markdown]
# There are more: a dilation is forgotten, frozen weights thaw, a subclass of `nn.Conv2d` that does something else is taken for a convolution, a bias is left at random (these layers have none, so nothing shows). None of these raises an error. (Half precision with a bias does raise one, and so does a layer with more outputs than inputs.)
#
# ## What the real one promises
#
# `replace_depthwise` is the ten lines and this rule: *what cannot be kept is left alone, and the caller is told.* Each depthwise layer gets a line in a report.

# %% tags=["plumbing"]
# fold: The report
#| export surgery.py
"""MixConv in place of the depthwise layers of any model (chapter 9)."""

from collections.abc import Callable
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
        other = sum(not layer.exact for layer in self.changed)
        told = f", {other} of them NOT computing the same" if other else ", all computing the same"
        told = told if self.changed else ""
        lines = [f"{len(self.changed)} replaced{told}; {len(self.skipped)} skipped"]
        for layer in self.layers:
            what = layer.after or f"skipped: {layer.reason}"
            note = "" if layer.exact or not layer.after else f" (not the same: {layer.reason})"
            lines.append(f"{layer.name}: {what}{note}")
        return "\n".join(lines)


# %% [markdown]
# **Padding** is looked up, not assumed. A tuple of (k − 1) / 2 · d zeros is symmetric. Ports of TensorFlow networks pad in classes called `Conv2dSame`. Anything else, such as no padding at all, MixConv cannot imitate.
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
    if conv.padding not in (wanted, "same"):  # PyTorch's "same" is symmetric for odd kernels
        raise ValueError(f"padding {conv.padding}, not {wanted}")
    return "symmetric"


# %% [markdown]
# **A layer that is more than it seems** is one with hooks, with a `forward` of its own, or whose weight is computed (PyTorch calls that a parametrisation) or shared with another layer. The reasons go into the report.

# %%
#| export surgery.py
import torch
from torch import nn
from torch.nn.utils import parametrize

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module does what its class does not show.

    That is: hooks forward or backward, a `forward` of this one module, a parametrisation.
    """
    hooks = any(getattr(module, name) for name in _HOOKS)
    return hooks or "forward" in vars(module) or parametrize.is_parametrized(module)


# %%
#| export surgery.py
def _check_plain(layer: nn.Conv2d, shared: set[torch.Tensor]) -> None:
    """Raise ValueError, saying why, for a layer that a new one could not stand in for."""
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.kernel_size[0] % 2 == 0:
        raise ValueError(f"kernel {layer.kernel_size} is not square and odd")
    if has_hooks(layer):
        raise ValueError("it has hooks or is parametrized, which would be lost")
    if type(layer) is not nn.Conv2d and not _pads_as_tensorflow(layer):
        raise ValueError(f"a {type(layer).__name__}, which may compute something else")
    if any(parameter in shared for parameter in layer.parameters()):
        raise ValueError("it shares its weights with another layer")
    if type(layer.weight) is not nn.Parameter:
        raise ValueError(f"its weight is a {type(layer.weight).__name__}")
    axes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    if _pads_as_tensorflow(layer) and any(d * (k - 1) < s - 1 for k, d, s in axes):
        raise ValueError("'SAME' with a stride wider than the kernel centres windows elsewhere")


# %% [markdown]
# **One layer at a time.** Build the new one as the old one was, down to device, dtype, training mode and what is frozen; then move the weights in. A kernel that grows is embedded. One that would lose its border is left alone, unless the caller asks for `crop`; then it keeps its middle, and the report says that the layer is not the same.

# %% tags=["plumbing"]
# fold: A new layer made as the old one was
#| export surgery.py
from functools import partial
from typing import Any, cast

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
# **The walk over the model.** `remove_duplicate=False` lists a layer once for each place, and `swapped` remembers what stands for it: a layer in two places stays one layer.

# %%
#| export surgery.py
from collections.abc import Callable, Sequence


def replace_depthwise(
    model: nn.Module,
    kernel_sizes: int | Sequence[int] | Callable[[str, nn.Conv2d], int | Sequence[int] | None],
    *,
    partition: str = "equal",
    dilated: bool = False,
    padding: str | None = None,
    keep_center_weights: bool = True,
    crop: bool = False,
) -> ReplacementReport:
    """Swap every depthwise `nn.Conv2d` of a model for a `MixConv2d`, in place.

    Stride, dilation, bias, device, dtype, memory format, training mode and `requires_grad` are
    kept, and so is the function that the model computes, unless an argument asks for a change. A
    layer used in two places stays one. What cannot be kept is left alone and reported: layers
    with hooks, parametrisations or weights shared with another layer, subclasses, other
    paddings, and kernels that would lose their border. An optimizer that was built before holds
    the old weights, and would never move the new ones: build it afterwards.

    Args:
        model: any module that contains depthwise layers; it is changed.
        kernel_sizes: one odd size for each group; or a function of a layer's name and the layer
            that returns them, or None to leave the layer alone.
        partition: "equal", "exponential" or "logarithmic".
        dilated: see `MixConv2d`; changes what the model computes.
        padding: "symmetric" or "same"; detected for each layer if left out.
        keep_center_weights: put the old kernels in the middle of the new ones. Otherwise the new
            layers start with fresh weights.
        crop: let a larger kernel lose its border where a group has a smaller size; the model
            then computes something else.

    Returns:
        What was changed, what was skipped, and why.

    Raises:
        TypeError: if the model is itself a depthwise layer, which cannot be swapped in place.
        ValueError: for kernel sizes, partition or padding that no layer could have.

    Source: paper, abstract ("drop-in replacement"). Chapter 9.
    """
    read = partial(_read_request, partition=partition, dilated=dilated, padding=padding)
    found = _find_layers(model)
    makes = _read_all(found, kernel_sizes, read)
    report, swapped = ReplacementReport(), dict[nn.Module, MixConv2d | None]()
    crop, shared = crop or not keep_center_weights, _shared(model)
    for name, layer in found:
        if layer not in swapped:
            swapped[layer], line = _replace(
                name, layer, shared=shared, make=makes[layer], padding=padding,
                keep=keep_center_weights, crop=crop,
            )  # fmt: skip
            report.layers.append(line)
        if (mixed := swapped[layer]) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, mixed)
    return report


# %% tags=["plumbing"]
# fold: What is asked for, read and checked before anything changes
#| export surgery.py
from collections import Counter

from mixconv._checks import check_kernel_sizes


def _find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Depthwise layers and MixConvs by name; a layer used twice has two names.

    Raises:
        TypeError: if the model is no module, or itself a depthwise layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _is_depthwise(model):
        raise TypeError("model is itself a depthwise layer; wrap it in nn.Sequential first")
    inside = {part for m in model.modules() if isinstance(m, MixConv2d) for part in m.convs}
    return [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if layer not in inside and (_is_depthwise(layer) or isinstance(layer, MixConv2d))
    ]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _shared(model: nn.Module) -> set[torch.Tensor]:
    """Parameters that more than one layer of a model holds."""
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    return {p for p, times in Counter(held).items() if times > 1}


def _read_request(
    kernel_sizes: int | Sequence[int], partition: str, dilated: bool, padding: str | None
) -> partial[MixConv2d]:
    """What makes the new layers; raises for arguments that no layer could satisfy."""
    if not isinstance(partition, str):
        raise TypeError("partition must be a method's name, since layers differ in channels")
    sizes = check_kernel_sizes(kernel_sizes)
    make = partial(MixConv2d, kernel_sizes=sizes, partition=partition, dilated=dilated)
    make(10_000, padding=padding or "symmetric", device="meta")  # channels enough for any mix
    return make


def _read_all(
    found: list[tuple[str, nn.Module]], sizes: Any, read: Callable[..., Any]
) -> dict[nn.Module, Any]:
    """What makes the new layer for each old one; raises before anything is changed."""
    if not callable(sizes):
        return dict.fromkeys((layer for _, layer in found), read(sizes))
    read((3,))  # a wrong partition or padding
    chosen = {layer: sizes(name, layer) for name, layer in reversed(found)}  # by its first name
    return {layer: None if own is None else read(own) for layer, own in chosen.items()}


# %% tags=["plumbing"]
# fold: The decisions: skip, grow, crop, and what the report says
#| export surgery.py
def _other_padding(conv: nn.Conv2d, padding: str) -> bool:
    try:
        return find_padding(conv) != padding and conv.stride != (1, 1)
    except ValueError:
        return True


def _replace(
    name: str, layer: nn.Module, *, shared: set[torch.Tensor], make: partial[MixConv2d] | None,
    padding: str | None, keep: bool, crop: bool,
) -> tuple[MixConv2d | None, Replacement]:  # fmt: skip
    """The new layer, or None where there can be none, and the line for the report."""
    if not isinstance(layer, nn.Conv2d):
        return None, Replacement(name, str(layer), reason="it is a MixConv2d already")
    if make is None:
        return None, Replacement(name, str(layer), reason="no kernel sizes were given for it")
    try:
        _check_plain(layer, shared)
        smallest, k = min(make.keywords["kernel_sizes"]), layer.kernel_size[0]
        if smallest < k and not crop:
            raise ValueError(f"{k}×{k} kernels would be cropped to {smallest}×{smallest}; see crop")
        mixed = _convert(layer, make, padding)
    except ValueError as error:
        return None, Replacement(name, str(layer), reason=str(error))
    reason = _move_weights(layer, mixed) if keep else "fresh weights"
    if padding is not None and not reason and _other_padding(layer, padding):
        reason = "another padding"
    return mixed, Replacement(name, str(layer), str(mixed), not reason, reason)


# %% [markdown]
# ## The same networks again
#
# MobileNetV2 again, and its port from TensorFlow:

# %%
mixed = copy.deepcopy(plain)
report = replace_depthwise(mixed, (3, 5, 7))
print("\n".join(str(report).splitlines()[:3]), "\n…")
check(mixed(x), plain(x), "MobileNetV2 before and after")

swapped = copy.deepcopy(ported)
assert all(layer.exact for layer in replace_depthwise(swapped, (3, 5, 7)).layers)
check(swapped(x), ported(x), "the port before and after")

# %% [markdown]
# A layer in two places, and one with a hook:

# %%
twice = nn.Sequential(shared, nn.ReLU(), shared)
print(replace_depthwise(twice, (3, 5, 7)))
print("still one layer:", twice[0] is twice[2])
pruned = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False))
prune.random_unstructured(pruned[0], "weight", amount=27)
print(replace_depthwise(pruned, (3,)))

# %% [markdown]
# `mixed` has the names and shapes of the network that `mobilenet_v2((3, 5, 7))` builds. What do its kernels cost? (What they cost in *time* is chapter 11's question.)

# %%
from mixconv.formulation import count_costs, count_parameters

assert list(mixed.state_dict()) == list(mobilenet_v2((3, 5, 7), num_classes=10).state_dict())
for name, model in (("plain", plain), ("mixed", mixed)):
    costs = count_costs(model, torch.zeros(1, 3, 224, 224))
    work = sum(cost.multiply_adds for cost in costs) / 1e6
    print(f"{name}: {count_parameters(model):,} parameters, {work:.0f}M multiply-adds at 224×224")


# %% [markdown]
# ## The fourth way: an optimizer built too early
#
# `mixed` is ready to train. One thing is left to you, since no report can see it: an optimizer that was built *before* the swap holds the old weights. It raises no error, and the new kernels never move. One step of each:

# %%
def kernels_moved(early: bool) -> int:
    """How many of the 17 layers' first kernels one step of training moves."""
    model = copy.deepcopy(plain).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    replace_depthwise(model, (3, 5, 7))
    if not early:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kernels = [layer.convs[0].weight for layer in model.modules() if isinstance(layer, MixConv2d)]
    before = [kernel.detach().clone() for kernel in kernels]
    model(x).square().sum().backward()
    optimizer.step()
    return sum(not torch.equal(a, b) for a, b in zip(before, kernels, strict=True))


print("built before the swap:", kernels_moved(early=True), "· after:", kernels_moved(early=False))
assert kernels_moved(early=True) == 0

# %% [markdown]
# What else it leaves alone or changes, and what it says:

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
# **9.1** ★ *5 minutes, three lines.* The paper's Figure 5 changes *one* depthwise layer of MobileNetV2 at a time, and finds that layers with stride 2 gain most from large kernels. Build the network whose block `index` has a 9×9 kernel, and all others 3×3, with the same function as `model`. Leave `model` as it is.
#
# <details><summary>Hint: the idea</summary>
#
# `replace_depthwise` changes any module in place, and a block of `model.blocks` is a module.
#
# </details>

# %%
from mixconv.network import ConvNet
from mixconv.teaching import attempt


def one_large_kernel(model: ConvNet, index: int) -> ConvNet:
    raise NotImplementedError


def sizes_in(model: nn.Module) -> list[tuple[int, ...]]:
    return [m.kernel_sizes for m in model.modules() if isinstance(m, MixConv2d)]


def test_one(answer) -> None:
    model = mobilenet_v2(num_classes=10).eval()
    changed, x = answer(model, 3), torch.randn(1, 3, 64, 64)
    assert sizes_in(changed) == [(9,)], f"MixConv layers of sizes {sizes_in(changed)}, wanted (9,)"
    assert sizes_in(changed.blocks[3]) == [(9,)], "the large kernel is in another block"
    assert not sizes_in(model), "the model that was given has changed"
    torch.testing.assert_close(changed(x), model(x))


attempt(one_large_kernel, test_one)


# %% tags=["solution"]
# fold: Solution
def one_large_kernel_solution(model: ConvNet, index: int) -> ConvNet:
    changed = copy.deepcopy(model)
    replace_depthwise(changed.blocks[index], 9)
    return changed


def everywhere(model: ConvNet, index: int) -> ConvNet:
    """replace in the whole model, not in one block"""
    changed = copy.deepcopy(model)
    replace_depthwise(changed, 9)
    return changed


def in_place(model: ConvNet, index: int) -> ConvNet:
    """change the model itself instead of a copy"""
    replace_depthwise(model.blocks[index], 9)
    return model


attempt(one_large_kernel_solution, test_one, wrong=[everywhere, in_place])


# %% [markdown]
# **9.2** ★★ *10 minutes, five lines.* The way back: a `MixConv2d` whose kernels grew from 3×3, and whose borders are still zero. Return the weight of the plain 3×3 depthwise layer that computes the same, shape `(C, 1, 3, 3)`.
#
# <details><summary>Hint: the idea</summary>
#
# Crop each kernel to its middle; then stack the groups in the order of the channels.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# A k×k kernel loses (k − 3) / 2 rows and columns on each side.
#
# </details>

# %%
def shrink(mixed: MixConv2d) -> torch.Tensor:
    raise NotImplementedError


def test_shrink(answer) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    model = nn.Sequential(copy.deepcopy(conv))
    replace_depthwise(model, (3, 5, 7))
    found = answer(model[0])
    assert found.shape == (6, 1, 3, 3), f"shape {tuple(found.shape)}, wanted (6, 1, 3, 3)"
    assert torch.equal(found, conv.weight), "not the kernels it grew from"


attempt(shrink, test_shrink)


# %% tags=["solution"]
# fold: Solution
def shrink_solution(mixed: MixConv2d) -> torch.Tensor:
    kernels = []
    for conv, k in zip(mixed.convs, mixed.kernel_sizes, strict=True):
        cut = (k - 3) // 2
        kernels.append(conv.weight[:, :, cut : cut + 3, cut : cut + 3])
    return torch.cat(kernels)


def corner(mixed: MixConv2d) -> torch.Tensor:
    """cut at the corner: the middle is where the old kernel lies"""
    return torch.cat([conv.weight[:, :, :3, :3] for conv in mixed.convs])


def uncut(mixed: MixConv2d) -> torch.Tensor:
    """merge without cutting: that is 7×7"""
    return mixed.merged().weight


attempt(shrink_solution, test_shrink, wrong=[corner, uncut])

# %% [markdown]
# ## Takeaways
# - Kernels that grow around their old values leave the network as it was, and the zeros around them have a gradient: they learn.
# - A swap goes wrong without an error: paddings, layers in two places, hooks, an optimizer built too early.
# - `replace_depthwise` puts MixConv into any model, keeps its function where kernels grow, and reports what it did.
#
# **Further reading**: [Net2Net](https://arxiv.org/abs/1511.05641) (Chen and others) is the source of the idea: change a trained network in a way that keeps its function, then go on training.
#
# Previous: [8 · Weights](08_weights.ipynb) · Next: [9 · A trained network](09_trained_network.ipynb)
