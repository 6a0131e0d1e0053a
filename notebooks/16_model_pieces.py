# %% [markdown]
# # 16 · A model, in pieces
#
# `fuse_for_inference(model)` takes a network apart and puts faster pieces in. What must it know of a piece, so that no result can change? The same four layers in four cases: only in the first may three of them become one.
#
# **You will be able to**
# - rewrite a small model by hand, and name three ways in which that goes wrong;
# - tell the fast code of a layer or block of your own;
# - say what goes in the place of a layer, and of a block.
#
# **Know first:** [chapter 4](04_blocks.ipynb), [chapter 11](11_why_slow.ipynb), [chapter 12](12_operation.ipynb) and [chapter 15](15_block_in_one_pass.ipynb).
#
# **Time:** 30 minutes to read. Runs in under 30 seconds on two cores. It is the first of three pages; [A model, read](16_model_read.ipynb) and [A model, rewritten](16_model_rewritten.ipynb) follow.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

rows = [
    ("MixConv2d", "", "three as one operation"),
    ("MixConv2d", "also read here", "the layer alone: read twice"),
    ("MixConv2d", "a hook on the norm", "the layer alone: a hook looks"),
    ("Doubling", "", "only its two convolutions"),
]
half = (1.05, 1.3, 0.65, 1.2)  # widths of the boxes
arrow = {"arrowstyle": "->"}

# %% tags=["drawing"]
# fold: The code that draws this
use_style()
figure, axis = plt.subplots(figsize=(8, 3.2))
for row, (layer, between, verdict) in enumerate(rows):
    y, fused = -row, (3, 1, 1, 0)[row]  # so many boxes are replaced
    for place, text in enumerate((layer, "BatchNorm2d", "ReLU", "Conv2d 1×1")):
        face, ink = ("#006b4f", "white") if place < fused else ("#dddddd", "black")
        edge = {"lw": 2.5, "edgecolor": "#006b4f"} if row == 3 and not place else {"lw": 0}
        box = {"boxstyle": "round", "facecolor": face, **edge}
        axis.text(3 * place, y, text, color=ink, bbox=box, ha="center", va="center")
        if place < 3:
            ends = (3 * place + 3 - half[place + 1], y), (3 * place + half[place], y)
            axis.annotate("", *ends, arrowprops=arrow)
    axis.text(10.6, y, verdict, va="center", color="#006b4f", weight="bold", fontsize=9.5)
    if between:
        at = 4.8 if row == 2 else 1.35  # behind the norm, or behind the layer
        axis.annotate("", (at, y + 0.55), (at, y + 0.03), arrowprops={**arrow, "color": "#D55E00"})
        axis.text(at + 0.2, y + 0.38, between, color="#a34600", fontsize=9)
axis.set(xlim=(-1.2, 16.3), ylim=(-3.4, 0.4)), axis.axis("off")
show(
    figure,
    "what_may_be_fused.png",
    "The same row of four layers in four cases; what is replaced is green. Alone, the mixed layer, "
    "the norm and the ReLU become one operation. Where the first output is read twice, or a hook "
    "looks at the norm's output, the mixed layer is replaced by itself, and the norm and the ReLU "
    "stay. Of a "
    "class of its own only the convolutions inside may be replaced.",
    caption="Three layers become one only where nobody reads or looks between them, and each is "
    "what its class says.",
)

# %% [markdown]
# ## Four layers, by hand
#
# A mixed layer, a batch norm, a ReLU, a 1×1 convolution. Chapters 11 and 12 have all that it takes: fold the norm into the convolutions of the layer, and make these, with the ReLU, one operation. The norm and the ReLU are then idle.

# %%
import copy

import torch
from torch import nn

from mixconv import MixConv2d
from mixconv.fast.folding import fold_line, norm_as_line
from mixconv.fast.fused_layer import FusedMixConv2d, describe_mix


def rewrite_by_hand(model: nn.Sequential) -> nn.Sequential:
    model = copy.deepcopy(model)
    mix, norm = model[0], model[1]
    convs = list(mix.convs)
    sizes = [conv.out_channels for conv in convs]
    scales, shifts = (line.split(sizes) for line in norm_as_line(norm))
    for conv, scale, shift in zip(convs, scales, shifts, strict=True):
        fold_line(conv, scale, shift)
    model[0] = FusedMixConv2d(convs, describe_mix(convs, "relu"))
    model[1] = model[2] = nn.Identity()
    return model


# %% [markdown]
# It works. (The norm's statistics are made up, or it would do nothing and nobody would miss it.)

# %%
from mixconv.teaching import check


def make_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -1, 1)
    return norm


torch.manual_seed(0)
x = torch.randn(2, 8, 9, 9)
layers = [MixConv2d(8, (3, 5)), make_norm(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
model = nn.Sequential(*layers).eval()
with torch.no_grad():
    check(rewrite_by_hand(model)(x), model(x), "four layers, by hand")


# %% [markdown]
# ## Three ways to go wrong
#
# **A class of its own.** `isinstance` says that a `Doubling` is a `MixConv2d`, and it has all the right attributes. Its forward does something else. The same holds for a class that is merely *called* `BatchNorm2d`: a name proves nothing.

# %%
class Doubling(MixConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def compare(model: nn.Sequential, what: str) -> None:
    with torch.no_grad():
        wanted, found = model.eval()(x), rewrite_by_hand(model)(x)
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    print(
        f"{what}: {'equal' if worst < 1e-4 else f'off by {100 * worst:.0f}% of the largest value'}"
    )


compare(nn.Sequential(Doubling(8, (3, 5)), *layers[1:]), "a class of its own")


# %% [markdown]
# **Somebody else reads.** Here the first output is also added later. After the rewrite it is another tensor: normalised and activated.

# %%
class Adding(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[3](y + self[2](self[1](y)))


compare(Adding(*layers), "read twice")

# %% [markdown]
# **A hook looks between.** Hooks are how people read features, count operations, prune, and normalise weights. The rewritten model has the same output, and does not call this hook any more.

# %%
calls = []
hooked = copy.deepcopy(model)
hooked[1].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
with torch.no_grad():
    for name, one in (("original", hooked), ("rewritten", rewrite_by_hand(hooked))):
        calls.clear()
        one(x)
        print(f"{name}: the hook was called {len(calls)} times")

# %% [markdown]
# Hence four rules, of which this chapter is made:
#
# 1. **Exact types.** A layer is what it is by its class, and not by a name, an attribute or a base class.
# 2. **Alone.** What is folded together feeds nothing else, and is called from one place.
# 3. **Untouched.** No hooks, no `forward` of a single object, no parametrised weight.
# 4. **Tried.** Rules are written by people. So every rewrite is run beside its original on a random image, and put back if the result is another.
#
# What breaks a rule is left as it is, and named in a report, with the rule. As much as does not break one is still done: in the second and third case the mixed layer by itself. In the fourth, the `Doubling` stays, and the two convolutions that its forward calls may each be made faster. This page has the first rule, and what is put in; the second page has the others; the third puts all together.
#
# ## Exact types, without importing anybody
#
# timm has a `MixedConv2d`, too. To ask `type(layer) is MixedConv2d` one would have to import timm. But whoever has such a layer has imported timm already: it is in `sys.modules`.

# %%
#| export fast/describe.py
"""What layers and blocks consist of, by their exact types (chapter 16).

`describe_layer` and `describe_block` are open: register classes of your own.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

Step = nn.Module | Callable[[Tensor], Tensor]


def loaded(path: str) -> Any:
    """A class or function by its full name, if its library is imported already; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def is_one_of(step: Step, paths: Iterable[str]) -> bool:
    """Whether a module is of exactly one of these classes, or a function is one of these."""
    kind = type(step) if isinstance(step, nn.Module) else step
    return any(kind is loaded(path) for path in paths)


# %% [markdown]
# So a class is known by where it was defined. These are the ones with nothing to learn about them but the name: rows of modules, modules that do nothing in evaluation, norms, activations.

# %%
#| export fast/describe.py
ROWS = ("torch.nn.Sequential", "mixconv.blocks.ConvNormActivation")
IDLE = (
    "torch.nn.Identity", "torch.nn.Dropout", "torch.nn.Dropout2d", "mixconv.blocks.DropPath",
    "mixconv.fast.folding.FoldedNorm", "timm.layers.drop.DropPath",
)  # fmt: skip
NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"  # norm, dropout and activation in one module
NORMS = ("torch.nn.BatchNorm2d", "torch.nn.SyncBatchNorm", NORM_ACT)

# %%
#| export fast/describe.py
ACTIVATION_NAMES = {
    "torch.nn.ReLU": "relu",
    "torch.nn.ReLU6": "relu6",
    "torch.nn.SiLU": "silu",
    "torch.nn.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "geffnet.activations.activations.Swish": "silu",
    "geffnet.activations.activations_jit.SwishJit": "silu",
    "geffnet.activations.activations_me.SwishMe": "silu",
    "geffnet.activations.activations.sigmoid": "sigmoid",
}


# %%
#| export fast/describe.py
def activation_name(step: Step) -> str:
    """What a module or function of a known class applies to each number; else empty."""
    return next((name for path, name in ACTIVATION_NAMES.items() if is_one_of(step, [path])), "")


def is_idle(step: Step) -> bool:
    """Whether a module does nothing, as it is."""
    return is_one_of(step, IDLE) and not cast("nn.Module", step).training


# %%
class ReLU(nn.Module):
    """Called like PyTorch's."""


dropout = nn.Dropout()
[activation_name(nn.ReLU()), activation_name(ReLU()), is_idle(dropout), is_idle(dropout.eval())]

# %% [markdown]
# ## Layers: a function with a rule for each class
#
# What are the convolutions of a layer? `functools.singledispatch` keeps a rule for each class, and anybody may add one. By itself it would take a rule for subclasses, too. `ask` does not: it looks the exact type up.

# %%
#| export fast/describe.py
import functools

from mixconv.layer import Conv2dSame, MixConv2d


@functools.singledispatch
def describe_layer(layer: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a layer, each for its share of the channels, in their order.

    Register your own: `@describe_layer.register(MyMix)`.

    Raises:
        ValueError: for a class that is not known.
    """
    raise ValueError(f"{type(layer).__name__} is not a class that is known")


@describe_layer.register(nn.Conv2d)
@describe_layer.register(Conv2dSame)
def _plain(layer: nn.Conv2d) -> list[nn.Conv2d]:
    return [layer]


@describe_layer.register
def _mixed(layer: MixConv2d) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(layer.convs))


def ask(describe: Any, module: nn.Module) -> Any:
    """What `describe_layer` or `describe_block` says of a module of exactly a registered class.

    Raises:
        ValueError: if the class is not registered, or the module is not as it should be.
    """
    rule = describe.registry.get(type(module), describe.registry[object])
    return rule(module)


# %%
for layer in (nn.Conv2d(4, 4, 3), MixConv2d(4, (3, 5)), Doubling(4, (3, 5))):
    try:
        print(type(layer).__name__, len(ask(describe_layer, layer)))
    except ValueError as error:
        print(error)


# %% [markdown]
# ## A layer with its norm and its activation
#
# A *row* is a list of modules that run one after another. Rows may lie in rows, idle modules drop out, and timm's norm is taken apart into the three things that it is.

# %%
#| export fast/describe.py
def steps(row: Iterable[Step]) -> list[Step]:
    """The modules of a row one after another, without those that do nothing."""
    flat: list[Step] = []
    for step in row:
        if is_one_of(step, ROWS):
            flat += steps(cast("nn.Sequential", step))
        elif is_one_of(step, [NORM_ACT]):
            norm = cast("Any", step)
            flat += [norm, *steps([norm.drop, norm.act])]
        elif not is_idle(step):
            flat.append(step)
    return flat


# %% [markdown]
# From the head of a row, take a layer, a norm, an activation. The folding happens in a *copy*: the original is never changed, so whoever else holds it still has what they had. Values are checked, too: a norm may be in training mode even in an evaluated model, or keep no statistics; a weight may be of a class that computes for itself.

# %%
#| export fast/describe.py
import copy

from mixconv.fast.folding import fold_line, norm_as_line


class Unit(NamedTuple):
    """A layer with the norm behind it folded in.

    Attributes:
        layer: a copy of its own.
        convs: the convolutions in it.
        activation: what comes next, by name, or "none".
        rest: what comes after that.
    """

    layer: nn.Module
    convs: list[nn.Conv2d]
    activation: str
    rest: list[Step]


# %%
#| export fast/describe.py
def read_unit(row: Iterable[Step]) -> Unit:
    """Take a layer, the norm and the activation from the head of a row of modules.

    Raises:
        ValueError: if the row does not begin with a layer that is known, or a value is one that
            cannot be kept.
    """
    first, *rest = steps(row)
    layer = copy.deepcopy(cast("nn.Module", first))
    convs: list[nn.Conv2d] = ask(describe_layer, layer)
    for conv in convs:
        if ask(describe_layer, conv) != [conv] or type(conv.weight) is not nn.Parameter:
            raise ValueError(f"a {type(conv).__name__} with a {type(conv.weight).__name__}")
    if rest and is_one_of(rest[0], NORMS):
        _fold(convs, cast("nn.BatchNorm2d", rest.pop(0)))
    activation = activation_name(rest[0]) if rest else ""
    return Unit(layer, convs, activation or "none", rest[1:] if activation else rest)


# %%
#| export fast/describe.py
def _fold(convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d) -> None:
    sizes = [conv.out_channels for conv in convs]
    if norm.training or norm.num_features != sum(sizes):
        raise ValueError("the norm is in training mode, or has other channels than the layer")
    scale, shift = (line.split(sizes) for line in norm_as_line(norm))
    for conv, *line in zip(convs, scale, shift, strict=True):
        fold_line(conv, *line)


# %%
unit = read_unit([model[0], nn.Sequential(model[1], nn.Dropout().eval()), model[2], nn.Tanh()])
with torch.no_grad():
    check(unit.layer(x), model[1](model[0](x)), "a layer with its norm folded in")
unit.activation, unit.rest


# %% [markdown]
# ## Blocks: described, not guessed
#
# A whole block can be one operation (chapter 15), if it is an inverted residual or a depthwise separable one. Reading that off a traced graph takes a pattern for each way of writing a block, and a pattern that fits by chance is a silent mistake. Writing it down takes a few lines for each class: which parts run in which of five rows, and whether the input is added.

# %%
#| export fast/describe.py
class BlockParts(NamedTuple):
    """An inverted residual or depthwise separable block: rows of modules in running order.

    Attributes:
        depthwise: the depthwise layer, its norm and its activation.
        project: the last 1×1 convolution, with what follows it.
        expand: the first 1×1 convolution; empty if there is none.
        squeeze: of the gate, from the means of all channels to a few; empty without a gate.
        excite: of the gate, back to all channels, and its sigmoid.
        residual: whether the input is added to the result.
    """

    depthwise: Sequence[Step]
    project: Sequence[Step]
    expand: Sequence[Step] = ()
    squeeze: Sequence[Step] = ()
    excite: Sequence[Step] = ()
    residual: bool = False


@functools.singledispatch
def describe_block(block: nn.Module) -> BlockParts:
    """The parts of a block. Register your own: `@describe_block.register(MyBlock)`.

    Only exact types are asked for: a subclass is another block, with a forward of its own.

    Raises:
        ValueError: for a class that is not known, or a block that is not what it should be.
    """
    raise ValueError(f"{type(block).__name__} is not a class that is known")


# %% [markdown]
# The two blocks of chapter 4:

# %%
#| export fast/describe.py
from mixconv.blocks import DepthwiseSeparableBlock, MixConvBlock, SqueezeExcite


@describe_block.register
def _separable_of_ours(block: DepthwiseSeparableBlock) -> BlockParts:
    return BlockParts([block.depthwise], [block.pointwise])


@describe_block.register
def _inverted_of_ours(block: MixConvBlock) -> BlockParts:
    gate = describe_gate(block.squeeze_excite)
    project = [block.project, block.drop_path]
    return BlockParts([block.depthwise], project, [block.expand], *gate, block.has_residual)


# %% [markdown]
# A gate is a part of a block with a class of its own: ours, timm's, geffnet's. (geffnet's sigmoid is a function.)

# %%
#| export fast/describe.py
GATES = (
    "timm.models._efficientnet_blocks.SqueezeExcite",
    "geffnet.efficientnet_builder.SqueezeExcite",
)


def describe_gate(gate: Any) -> tuple[list[Step], list[Step]]:
    """Squeeze and excite of a gate; both empty for an `nn.Identity`.

    Raises:
        ValueError: for a class that is not known.
    """
    if type(gate) is nn.Identity:
        return [], []
    if type(gate) is SqueezeExcite:
        return [gate.squeeze, gate.activation], [gate.excite, nn.Sigmoid()]
    if is_one_of(gate, GATES):
        sigmoid = gate.gate if hasattr(gate, "gate") else gate.gate_fn
        return [gate.conv_reduce, gate.act1], [gate.conv_expand, sigmoid]
    raise ValueError(f"{type(gate).__name__} is not a gate that is known")


# %% [markdown]
# timm's and geffnet's blocks name their parts alike. In geffnet the activations are parts of their own, in timm they lie in the norms.

# %%
#| export fast/describe.py
def _take(block: nn.Module, names: str) -> list[Step]:
    """The parts of these names, as far as a block has them."""
    return [getattr(block, name) for name in names.split() if hasattr(block, name)]


def _inverted_of_peers(block: Any) -> BlockParts:
    """The `InvertedResidual` of timm and of geffnet."""
    adds = block.has_skip if hasattr(block, "has_skip") else block.has_residual
    return BlockParts(
        _take(block, "conv_dw bn2 act2"), _take(block, "conv_pwl bn3 drop_path"),
        _take(block, "conv_pw bn1 act1"), *describe_gate(block.se), adds,
    )  # fmt: skip


def _separable_of_peers(block: Any) -> BlockParts:
    """The `DepthwiseSeparableConv` of timm and of geffnet."""
    adds = block.has_skip if hasattr(block, "has_skip") else block.has_residual
    return BlockParts(
        _take(block, "conv_dw bn1 act1"), _take(block, "conv_pw bn2 act2 drop_path"),
        (), *describe_gate(block.se), adds,
    )  # fmt: skip


# %% [markdown]
# The rules of peers are registered when a model is about to be read, for the classes that are there by then.

# %%
#| export fast/describe.py
_RULES: list[tuple[Any, Callable[[Any], Any], list[str]]] = [
    (describe_layer, lambda conv: [conv],
     ["timm.layers.conv2d_same.Conv2dSame", "geffnet.conv2d_layers.Conv2dSame"]),
    (describe_layer, lambda mix: list(mix.values()),
     ["timm.layers.mixed_conv2d.MixedConv2d", "geffnet.conv2d_layers.MixedConv2d"]),
    (describe_block, _inverted_of_peers,
     ["timm.models._efficientnet_blocks.InvertedResidual",
      "geffnet.efficientnet_builder.InvertedResidual"]),
    (describe_block, _separable_of_peers,
     ["timm.models._efficientnet_blocks.DepthwiseSeparableConv",
      "geffnet.efficientnet_builder.DepthwiseSeparableConv"]),
]  # fmt: skip


# %%
#| export fast/describe.py
def register_peers() -> None:
    """Register the classes of timm and geffnet, where those are imported already."""
    for describe, rule, paths in _RULES:
        for kind in map(loaded, paths):
            if isinstance(kind, type) and kind not in describe.registry:
                describe.register(kind, rule)


# %% [markdown]
# ## Nothing may be left over
#
# A description can be wrong in one way that is easy to see: it forgets a part. Next year's timm may put a new layer into its block. So all that a block holds must be in its rows, or be an `nn.Identity`, and none of it may have hooks.

# %%
#| export fast/describe.py
from mixconv.surgery import has_hooks


def _check_complete(block: nn.Module, rows: Iterable[Iterable[Step]]) -> None:
    """Raise unless all that a block holds is in the rows, and does what its class does."""
    named = [step for row in rows for step in row if isinstance(step, nn.Module)]
    described = {part for step in named for part in step.modules()}
    for name, part in block.named_modules():
        if has_hooks(part):
            raise ValueError(f"{name or 'it'} has hooks, or a forward or weight of its own")
        leaf = not part._modules and type(part) is not nn.Identity
        if part not in described and (leaf or part._parameters or part._buffers):
            raise ValueError(f"its part {name!r}, a {type(part).__name__}, is not described")


# %%
#| export fast/describe.py
def read_block(block: nn.Module) -> tuple[list[Unit | None], bool]:
    """Expand, depthwise, squeeze, excite and project of a block, and whether it adds its input.

    Raises:
        ValueError: saying what about the block is not known or cannot be kept.
    """
    parts: BlockParts = ask(describe_block, block)
    rows = [parts.expand, parts.depthwise, parts.squeeze, parts.excite, parts.project]
    _check_complete(block, rows)
    units = [read_unit(row) if steps(row) else None for row in rows]
    odd = [type(step).__name__ for unit in units if unit for step in unit.rest]
    if odd:
        raise ValueError(f"{odd[0]} in a place where it is not known")
    return units, parts.residual


# %% [markdown]
# A block of MixNet, the same with a hook, and the same with a part that nobody described:

# %%
def block_with(change) -> MixConvBlock:
    block = MixConvBlock(8, 8, (3, 5), squeeze_ratio=0.5, activation="swish").eval()
    change(block)
    return block


def add_hook(block):
    block.project.norm.register_forward_hook(print)


def add_part(block):
    block.attention = nn.Conv2d(8, 8, 7)


for change in (lambda block: None, add_hook, add_part):
    try:
        units, residual = read_block(block_with(change))
        print([unit and unit.activation for unit in units], residual)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## What goes in the place of a layer
#
# A mixed layer, or a plain one with kernels from 5×5 up, becomes one operation, if a form would compute it (chapter 12). So it is with the backend "auto"; "kernel" does not ask, and "merged" uses no operation at all. Otherwise a mixed layer becomes one convolution, if one can do it. The activation goes inside. For an ordinary convolution "inside" is `FusedConv`: it works in place, unless a hook may have the tensor in between.
#
# Plain 3×3 layers stay convolutions. With channels last, as a fused model has them, our kernel is faster than PyTorch's for some of them and slower for others. (In chapter 11's picture the gap is wide since those layers have channels first.)

# %%
#| export fast/rewrite.py
"""What goes in the place of a layer or block (chapter 16)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mixconv.fast.forms import Call, Forms
from mixconv.surgery import has_hooks

_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}
_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: torch.relu_,
    nn.ReLU6: functools.partial(F.relu6, inplace=True),
    nn.SiLU: functools.partial(F.silu, inplace=True),
    nn.Sigmoid: torch.sigmoid_,
}


# %%
#| export fast/rewrite.py
class FusedConv(nn.Sequential):
    """A layer, its norm folded in, and the activation behind it; in place if nobody looks."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Sequential's name for it
        """Convolve, then activate."""
        layer, activation = self
        watched = _has_any_global_hook() or has_hooks(layer) or has_hooks(activation)
        activate = activation if watched else _IN_PLACE.get(type(activation), activation)
        y: Tensor = activate(layer(input))
        return y

    def __prepare_scriptable__(self) -> nn.Sequential:
        return nn.Sequential(*self)  # what torch.jit.script can read


# %%
#| export fast/rewrite.py
def why_no_form(forms: Forms, spec: Any, channels: int, like: Tensor) -> str:
    """Why no form would compute an operation; empty if one does. May need the compiler."""
    size, threads = (1, channels, 28, 28), torch.get_num_threads()
    reasons = forms.reasons(Call(spec, size, like.dtype, like.device.type, True, threads))
    if not reasons:
        return f"there is no kernel for {like.device.type}"
    named = [f"{name}: {', '.join(why)}" for name, why in reasons.items()]
    return "; ".join(named) if all(reasons.values()) else ""


# %% [markdown]
# The forms are asked about an image of 28×28 pixels, a size from the middle of a MixNet: nobody knows yet what the model will be given. If a form then declines a real image (one so large that the scratch memory does not do), the split form computes it. That is right, and slower than one convolution would have been.
#
# The forms are asked only where there is something for them to do. A ResNet has nothing, so fusing one compiles nothing.

# %%
#| export fast/rewrite.py
from typing import cast

from mixconv.fast.folding import merge_pointwise
from mixconv.layer import Conv2dSame, make_conv2d, merge_depthwise
from mixconv.surgery import find_padding


def _as_ours(conv: nn.Conv2d) -> nn.Conv2d:
    """A peer's `Conv2dSame` as our own."""
    if type(conv) in (nn.Conv2d, Conv2dSame):
        return conv
    stride, dilation = cast("Any", conv.stride), cast("Any", conv.dilation)
    ours = make_conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], stride, dilation=dilation,
        groups=conv.groups, padding=find_padding(conv), device="meta",
    )  # fmt: skip
    ours.weight, ours.bias = conv.weight, conv.bias
    return ours


def _merge(convs: list[nn.Conv2d]) -> nn.Conv2d | None:
    """Convolutions side by side as one, or None where one cannot do, or would be slower."""
    if any(conv.dilation != (1, 1) for conv in convs):
        return None  # a kernel with holes: mostly multiplications by zero
    try:
        return merge_depthwise([_as_ours(conv) for conv in convs]).requires_grad_(False)
    except ValueError:
        return merge_pointwise(convs)


# %%
#| export fast/rewrite.py
from mixconv.fast.describe import Unit
from mixconv.fast.fused_layer import FusedMixConv2d, describe_mix
from mixconv.fast.operation import FORMS
from mixconv.fast.spec import ACTIVATIONS

_SMALLEST_PLAIN_KERNEL = 5  # plain 3×3 layers: neither kernel is faster everywhere


def _fuse_unit(unit: Unit, backend: str) -> nn.Module:
    """The fast form of a layer with its norm and activation."""
    convs, mixed = unit.convs, unit.convs != [unit.layer]
    spec = describe_mix(convs, unit.activation) if unit.activation in ACTIVATIONS else None
    if spec is not None and backend != "merged":
        worth = mixed or max(spec.kernel_sizes) >= _SMALLEST_PLAIN_KERNEL
        like, count = convs[0].weight, sum(spec.channels)
        if worth and backend == "auto":  # only where a kernel would run
            worth = not why_no_form(FORMS, spec, count, like)
        if worth:
            return FusedMixConv2d(convs, spec).eval()
    layer = (_merge(convs) if mixed else None) or unit.layer
    if unit.activation == "none":
        return layer
    return FusedConv(layer, _ACTIVATIONS[unit.activation]()).eval()


# %% [markdown]
# A row of layer, norm and activation goes in, a module for each of its places comes out. Where the norm and the activation were, something idle remains, so that rows keep their length and `model.row[2]` still finds the third.

# %%
#| export fast/rewrite.py
from mixconv.fast.describe import NORMS, is_one_of, read_unit
from mixconv.fast.folding import FoldedNorm


def fuse_chain(chain: list[nn.Module], backend: str) -> list[nn.Module]:
    """What goes in the places of a layer and of the norm and the activation behind it.

    Raises:
        ValueError: saying what cannot be kept.
    """
    unit = read_unit(chain)
    fused: list[nn.Module] = [_fuse_unit(unit, backend)]
    for step in chain[1:]:
        rest = cast("list[nn.Module]", unit.rest)  # a norm's own activation, if not known
        folded = nn.Sequential(*rest) if rest else FoldedNorm()
        fused.append((folded if is_one_of(step, NORMS) else nn.Identity()).eval())
    return fused


# %%
for backend in ("kernel", "merged"):
    new = fuse_chain(list(model)[:3], backend)
    print([type(module).__name__ for module in new])
    with torch.no_grad():
        check(nn.Sequential(*new)(x), model[:3](x), backend)

# %% [markdown]
# ## What goes in the place of a block
#
# `read_block` gave five units. Four of them must be 1×1 convolutions; the one in the middle must be a layer that the operation can express. Then they are packed as chapter 15 wants them.

# %%
#| export fast/rewrite.py
from mixconv.fast.fused_block import BlockSpec, FusedBlock, PointwiseSpec, pack_pointwise


def _read_pointwise(unit: Unit | None) -> tuple[nn.Conv2d, PointwiseSpec] | None:
    if unit is None:
        return None
    conv = unit.convs[0] if len(unit.convs) == 1 else merge_pointwise(unit.convs)
    if conv is None or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        raise ValueError("it expands, gates or projects by something else than a 1×1 convolution")
    if conv.padding not in (0, (0, 0), "same", "valid"):
        raise ValueError(f"a 1×1 convolution has padding {conv.padding}")
    return conv, PointwiseSpec(conv.in_channels, conv.out_channels, conv.groups, unit.activation)


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


# %%
#| export fast/rewrite.py
from mixconv.fast.describe import read_block
from mixconv.fast.spec import pack_weights


def fuse_block(block: nn.Module) -> FusedBlock:
    """A block that `describe_block` knows, as one operation.

    Raises:
        ValueError: saying what about the block is not known or cannot be kept.
    """
    (first, middle, *others), residual = read_block(block)
    if middle is None or (mix := describe_mix(middle.convs, middle.activation)) is None:
        raise ValueError("its depthwise layer is not one that the operation can express")
    points = [_read_pointwise(unit) for unit in (first, *others)]
    expand, squeeze, excite, project = (point and point[1] for point in points)
    if project is None:
        raise ValueError("it does not project")
    spec = BlockSpec(mix, expand, squeeze, excite, project, residual)
    none = middle.convs[0].weight.new_zeros(0)
    weights = [pack_pointwise(p[0].weight, p[1].groups) if p else none for p in points]
    weights.insert(1, pack_weights([conv.weight for conv in middle.convs]))
    biases = [_bias(point[0]) if point else none for point in points]
    biases.insert(1, torch.cat([_bias(conv) for conv in middle.convs]))
    return FusedBlock(spec, weights, biases).eval()


# %%
block = block_with(lambda block: None)
fused = fuse_block(block)
with torch.no_grad():
    check(fused(x), block(x), "a block as one operation")
fused

# %% [markdown]
# ## Exercises
#
# Here is a MixConv as people write it, with the largest kernel first in its list, but last in the channels:

# %%
from mixconv.fast.describe import describe_layer  # the package's: `fuse_chain` asks that one
from mixconv.teaching import attempt


class Pyramid(nn.Module):
    def __init__(self, channels: int = 8, kernel_sizes: tuple[int, ...] = (5, 3)) -> None:
        super().__init__()
        self.part = channels // len(kernel_sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(self.part, self.part, k, padding=k // 2, groups=self.part)
            for k in kernel_sizes
        )

    def forward(self, x):
        parts = x.split(self.part, 1)
        pairs = zip(self.convs[::-1], parts, strict=True)
        return torch.cat([conv(part) for conv, part in pairs], 1)


# %% [markdown]
# **16.1** ★ *5 minutes, one line.* Give the rule for `describe_layer`: the convolutions of a `Pyramid` in the order of the channels.
#
# <details><summary>Hint: the idea</summary>
#
# `describe_layer` wants the convolution of the first channels first. Read in `forward` which one that is.
#
# </details>

# %%
def my_rule(layer: Pyramid) -> list[nn.Conv2d]:
    raise NotImplementedError


def test_rule(answer) -> None:
    class Fresh(Pyramid):
        """A class that has no rule yet."""

    layer = Fresh().eval()
    convs = answer(layer)
    assert isinstance(convs, list), f"a list of convolutions is wanted, got {convs!r:.60}"
    count = sum(conv.in_channels for conv in convs)
    assert count == 8, f"the convolutions take {count} channels, the layer has 8"
    describe_layer.register(Fresh, answer)
    (fused,) = fuse_chain([layer], "kernel")
    with torch.no_grad():
        same = torch.allclose(fused(x), layer(x), atol=1e-5)
    assert same, "fused by this rule, the layer gives something else"


attempt(my_rule, test_rule)


# %% tags=["solution"]
# fold: Solution
def my_rule_solution(layer: Pyramid) -> list[nn.Conv2d]:
    return list(layer.convs)[::-1]


def as_stored(layer: Pyramid) -> list[nn.Conv2d]:
    """take the order of the list"""
    return list(layer.convs)


def only_one(layer: Pyramid) -> list[nn.Conv2d]:
    """name one convolution and forget the others"""
    return list(layer.convs)[-1:]


attempt(my_rule_solution, test_rule, wrong=[as_stored, only_one])

# %% [markdown]
# ## Takeaways
# - A layer is known by its class, by identity: names, attributes and base classes prove nothing.
# - Layers and blocks are described by rules of a few lines, open to everybody; a part that no row names is a reason to refuse.
# - Rewriting happens in copies: who holds the old layer still has it.
# - Where a norm or an activation was, something idle remains: a row keeps its length.
#
# Previous: [15 · A block in one pass](15_block_in_one_pass.ipynb) · Next: [16 · A model, read](16_model_read.ipynb)
