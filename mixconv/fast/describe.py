# Generated from notebooks/16_model_pieces.ipynb by `make book`. Edit the notebook, not this file.

"""What layers and blocks consist of, by their exact types (chapter 16).

`describe_layer` and `describe_block` are open: register classes of your own.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from mixconv.blocks import DepthwiseSeparableBlock, MixConvBlock, SqueezeExcite
from mixconv.fast.folding import fold_line, norm_as_line
from mixconv.layer import Conv2dSame, MixConv2d
from mixconv.surgery import has_hooks

__all__ = [
    "ACTIVATION_NAMES",
    "GATES",
    "IDLE",
    "NORMS",
    "NORM_ACT",
    "ROWS",
    "BlockParts",
    "Step",
    "Unit",
    "activation_name",
    "ask",
    "describe_block",
    "describe_gate",
    "describe_layer",
    "is_idle",
    "is_one_of",
    "loaded",
    "read_block",
    "read_unit",
    "register_peers",
    "steps",
]


Step = nn.Module | Callable[[Tensor], Tensor]


def loaded(path: str) -> Any:
    """A class or function by its full name, if its library is imported already; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def is_one_of(step: Step, paths: Iterable[str]) -> bool:
    """Whether a module is of exactly one of these classes, or a function is one of these."""
    kind = type(step) if isinstance(step, nn.Module) else step
    return any(kind is loaded(path) for path in paths)


ROWS = ("torch.nn.Sequential", "mixconv.blocks.ConvNormActivation")

IDLE = (
    "torch.nn.Identity", "torch.nn.Dropout", "torch.nn.Dropout2d", "mixconv.blocks.DropPath",
    "mixconv.fast.folding.FoldedNorm", "timm.layers.drop.DropPath",
)  # fmt: skip

NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"  # norm, dropout and activation in one module

NORMS = ("torch.nn.BatchNorm2d", "torch.nn.SyncBatchNorm", NORM_ACT)

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


def activation_name(step: Step) -> str:
    """What a module or function of a known class applies to each number; else empty."""
    return next((name for path, name in ACTIVATION_NAMES.items() if is_one_of(step, [path])), "")


def is_idle(step: Step) -> bool:
    """Whether a module does nothing, as it is."""
    return is_one_of(step, IDLE) and not cast("nn.Module", step).training


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


def _fold(convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d) -> None:
    sizes = [conv.out_channels for conv in convs]
    if norm.training or norm.num_features != sum(sizes):
        raise ValueError("the norm is in training mode, or has other channels than the layer")
    scale, shift = (line.split(sizes) for line in norm_as_line(norm))
    for conv, *line in zip(convs, scale, shift, strict=True):
        fold_line(conv, *line)


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


@describe_block.register
def _separable_of_ours(block: DepthwiseSeparableBlock) -> BlockParts:
    return BlockParts([block.depthwise], [block.pointwise])


@describe_block.register
def _inverted_of_ours(block: MixConvBlock) -> BlockParts:
    gate = describe_gate(block.squeeze_excite)
    project = [block.project, block.drop_path]
    return BlockParts([block.depthwise], project, [block.expand], *gate, block.has_residual)


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


def register_peers() -> None:
    """Register the classes of timm and geffnet, where those are imported already."""
    for describe, rule, paths in _RULES:
        for kind in map(loaded, paths):
            if isinstance(kind, type) and kind not in describe.registry:
                describe.register(kind, rule)


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
