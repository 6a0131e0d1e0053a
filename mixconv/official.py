# Generated from notebooks/08_official.ipynb by `make book`. Edit the notebook, not this file.

"""The official TensorFlow variables in a MixNet, by order or by name (chapter 8)."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixconv.blocks import ConvNormActivation, SqueezeExcite
from mixconv.layer import MixConv2d
from mixconv.mixnet import MixNet

__all__ = ["load_official"]


_AXES = {"conv": (3, 2, 0, 1), "depthwise": (2, 3, 0, 1), "dense": (1, 0), "vector": (0,)}


@dataclass
class _Slot:
    """Where one official variable goes.

    Attributes:
        target: our tensor, or the part of it that holds this variable.
        layout: "conv", "depthwise", "dense" or "vector".
        scope: TensorFlow's name scope, such as "blocks_3".
        kind: the Keras layer, such as "conv2d"; "se/conv2d" inside a gate.
    """

    target: Tensor
    layout: str
    scope: str
    kind: str


def _to_torch(value: Tensor, slot: _Slot) -> Tensor:
    """An official variable in PyTorch's layout.

    Raises:
        ValueError: if its shape does not fit the slot.
    """
    axes = _AXES[slot.layout]
    turned = value.permute(axes) if value.dim() == len(axes) else value
    if slot.layout == "depthwise" and value.dim() == 4:
        turned = turned.reshape(-1, 1, *turned.shape[2:])
    if turned.shape != slot.target.shape:
        wanted = tuple(slot.target.shape)
        raise ValueError(f"{slot.scope}/{slot.kind}: {tuple(value.shape)} does not fit {wanted}")
    return turned


def _conv_slots(conv: nn.Conv2d, scope: str, kind: str = "conv2d") -> Iterator[_Slot]:
    for kernel in conv.weight.detach().chunk(conv.groups):
        yield _Slot(kernel, "conv", scope, kind)
    if conv.bias is not None:
        yield _Slot(conv.bias.detach(), "vector", scope, kind)


def _depthwise_slots(layer: nn.Module, scope: str) -> Iterator[_Slot]:
    parts = list(layer.convs) if isinstance(layer, MixConv2d) else [layer]
    for conv in cast("list[nn.Conv2d]", parts):
        yield _Slot(conv.weight.detach(), "depthwise", scope, "depthwise_conv2d")


def _norm_slots(norm: nn.Module, scope: str) -> Iterator[_Slot]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = cast("Tensor", getattr(norm, name)).detach()
        yield _Slot(tensor, "vector", scope, "batch_normalization")


def _unit_slots(unit: nn.Module, scope: str, depthwise: bool = False) -> Iterator[_Slot]:
    if isinstance(unit, ConvNormActivation):
        conv = cast("nn.Conv2d", unit.get_submodule("conv"))
        yield from _depthwise_slots(conv, scope) if depthwise else _conv_slots(conv, scope)
        yield from _norm_slots(unit.get_submodule("norm"), scope)
    elif isinstance(unit, SqueezeExcite):
        yield from _conv_slots(unit.squeeze, scope, "se/conv2d")
        yield from _conv_slots(unit.excite, scope, "se/conv2d")


def _slots(model: MixNet) -> list[_Slot]:
    """Every official variable's place, in the official order of creation."""
    slots = list(_unit_slots(model.stem, "stem"))
    for index, block in enumerate(model.blocks):
        for name in ("expand", "depthwise", "squeeze_excite", "project"):
            unit = block.get_submodule(name)
            slots += _unit_slots(unit, f"blocks_{index}", depthwise=name == "depthwise")
    slots += _unit_slots(model.head, "head")
    if isinstance(model.classifier, nn.Linear):
        slots.append(_Slot(model.classifier.weight.detach(), "dense", "head", "dense"))
        slots.append(_Slot(model.classifier.bias.detach(), "vector", "head", "dense"))
    return slots


def load_official(model: MixNet, variables: Sequence[Any] | Mapping[str, Any]) -> None:
    """Load the official TensorFlow variables into a MixNet.

    A model with another padding or epsilon than the official ones is filled all the same, with a
    warning, and keeps its own.

    Args:
        model: a MixNet of the same configuration.
        variables: NumPy arrays (or tensors) in TensorFlow's layout, either in order of creation
            or by TensorFlow name: `{n: reader.get_tensor(n) for n in
            reader.get_variable_to_shape_map()}` of a `tf.train.load_checkpoint` reader. Moving
            averages of the weights are preferred; optimiser slots and counters are passed over.

    Raises:
        ValueError: if the number of variables, a name or a shape differs; the model is then
            unchanged.

    Source: order of creation in the official `mixnet_model.py`. Chapter 8.
    """
    own = model.settings()
    if (own["padding"], own["norm_eps"]) != ("same", 1e-3):
        warnings.warn(
            "the official weights want padding='same', norm_eps=0.001; the model has "
            f"padding={own['padding']!r}, norm_eps={own['norm_eps']}",
            stacklevel=2,
        )
    slots = _slots(model)
    named = isinstance(variables, Mapping)
    values = _in_creation_order(variables, slots) if named else list(variables)  # type: ignore[arg-type]
    if len(values) != len(slots):
        raise ValueError(f"the model has {len(slots)} official variables, got {len(values)}")
    turned = [_to_torch(torch.as_tensor(v), slot) for v, slot in zip(values, slots, strict=True)]
    for slot, value in zip(slots, turned, strict=True):
        slot.target.copy_(value)


_VARIABLE = re.compile(
    r"(?:^|/)(?P<scope>stem|blocks_\d+|head)/"
    r"(?P<kind>(?:se/)?(?:depthwise_conv2d|conv2d|batch_normalization|dense))(?:_(?P<number>\d+))?/"
    r"(?P<name>kernel|depthwise_kernel|bias|gamma|beta|moving_mean|moving_variance)$"
)

_NAMES = ["kernel", "depthwise_kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]

_AVERAGE = "/ExponentialMovingAverage"


_Lines = dict[tuple[str, str], list[tuple[tuple[int, int], Any]]]


def _stand_in_line(variables: Mapping[str, Any]) -> _Lines:
    """The variables of each scope and kind, in order of creation, with what they sort by."""
    plain = {name.removesuffix(":0"): value for name, value in variables.items()}
    averages = {n.removesuffix(_AVERAGE): v for n, v in plain.items() if n.endswith(_AVERAGE)}
    lines: _Lines = {}
    for name, value in (plain | averages).items():
        if match := _VARIABLE.search(name):
            place = (int(match["number"] or 0), _NAMES.index(match["name"]))
            lines.setdefault((match["scope"], match["kind"]), []).append((place, value))
    return {key: sorted(line, key=lambda item: item[0]) for key, line in lines.items()}


def _in_creation_order(variables: Mapping[str, Any], slots: Sequence[_Slot]) -> list[Any]:
    """The variables of a checkpoint in the order of the slots.

    Raises:
        ValueError: naming the scope and kind where variables are missing or left over.
    """
    lines = _stand_in_line(variables)
    ordered = []
    for slot in slots:
        line = lines.get((slot.scope, slot.kind))
        if not line:
            raise ValueError(f"no variable left for {slot.scope}/{slot.kind}")
        ordered.append(line.pop(0)[1])
    surplus = sorted("/".join(key) for key, line in lines.items() if line)
    if surplus:
        raise ValueError(f"more variables than the model has in {', '.join(surplus)}")
    return ordered
