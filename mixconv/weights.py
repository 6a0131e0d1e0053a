# Generated from notebooks/06_mixnet.ipynb by `make book`. Edit the notebook, not this file.

"""Weights in and out: the official TensorFlow variables, timm, files (chapter 6)."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixconv.blocks import ConvNormActivation, SqueezeExcite
from mixconv.layer import MixConv2d
from mixconv.mixnet import MixNet, MixNetOptions, unroll

__all__ = ["load_official", "load_weights", "matching_options", "read_state_dict", "to_timm"]


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


def _conv_slots(conv: nn.Module, scope: str, prefix: str = "") -> Iterator[_Slot]:
    parts = list(conv.convs) if isinstance(conv, MixConv2d) else [conv]
    for part in cast("list[nn.Conv2d]", parts):
        pointwise = part is conv and part.kernel_size == (1, 1)
        if not pointwise and part.groups == part.in_channels > 1:
            yield _Slot(part.weight.detach(), "depthwise", scope, "depthwise_conv2d")
        else:
            for kernel in part.weight.detach().chunk(part.groups):
                yield _Slot(kernel, "conv", scope, f"{prefix}conv2d")
        if part.bias is not None:
            yield _Slot(part.bias.detach(), "vector", scope, f"{prefix}conv2d")


def _norm_slots(norm: nn.Module, scope: str) -> Iterator[_Slot]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = cast("Tensor", getattr(norm, name)).detach()
        yield _Slot(tensor, "vector", scope, "batch_normalization")


def _unit_slots(unit: nn.Module, scope: str) -> Iterator[_Slot]:
    if isinstance(unit, ConvNormActivation):
        yield from _conv_slots(unit.get_submodule("conv"), scope)
        yield from _norm_slots(unit.get_submodule("norm"), scope)
    elif isinstance(unit, SqueezeExcite):
        yield from _conv_slots(unit.squeeze, scope, "se/")
        yield from _conv_slots(unit.excite, scope, "se/")


def _slots(model: MixNet) -> list[_Slot]:
    """Every official variable's place, in the official order of creation."""
    slots = list(_unit_slots(model.stem, "stem"))
    for index, block in enumerate(model.blocks):
        for name in ("expand", "depthwise", "squeeze_excite", "project"):
            slots += _unit_slots(block.get_submodule(name), f"blocks_{index}")
    slots += _unit_slots(model.head, "head")
    if isinstance(model.classifier, nn.Linear):
        slots.append(_Slot(model.classifier.weight.detach(), "dense", "head", "dense"))
        slots.append(_Slot(model.classifier.bias.detach(), "vector", "head", "dense"))
    return slots


def load_official(model: MixNet, variables: Sequence[Any] | Mapping[str, Any]) -> None:
    """Load the official TensorFlow variables into a MixNet.

    Args:
        model: a MixNet of the same configuration, with the official padding and epsilon.
        variables: NumPy arrays (or tensors) in TensorFlow's layout, either in order of creation
            or by TensorFlow name: `{n: reader.get_tensor(n) for n in
            reader.get_variable_to_shape_map()}` of a `tf.train.load_checkpoint` reader. Moving
            averages of the weights are preferred; optimiser slots and counters are passed over.

    Raises:
        ValueError: if the number of variables, a name or a shape differs; the model is then
            unchanged.

    Source: order of creation in the official `mixnet_model.py`. Chapter 6.
    """
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


def _block_names(model: MixNet) -> list[str]:
    """The name of each block in timm: stage and position."""
    plain = unroll(replace(model.config, width_multiplier=1.0))
    stages = [list(run) for _, run in groupby(plain, key=lambda block: block.out_channels)]
    return [f"blocks.{stage}.{i}" for stage, run in enumerate(stages) for i in range(len(run))]


_WIDE = {"expand.conv": "conv_pw", "expand.norm": "bn1", "depthwise.conv": "conv_dw",
         "depthwise.norm": "bn2", "project.conv": "conv_pwl", "project.norm": "bn3"}  # fmt: skip

_PLAIN = {"depthwise.conv": "conv_dw", "depthwise.norm": "bn1",
          "project.conv": "conv_pw", "project.norm": "bn2"}  # fmt: skip

_GATE = {"squeeze_excite.squeeze": "se.conv_reduce", "squeeze_excite.excite": "se.conv_expand"}

_ENDS = {"stem.conv": "conv_stem", "stem.norm": "bn1", "head.conv": "conv_head",
         "head.norm": "bn2", "classifier": "classifier"}  # fmt: skip


def _layer_names(model: MixNet) -> dict[str, str]:
    """The name in timm of each of our layers that holds tensors."""
    names = dict(_ENDS)
    for index, (block, prefix) in enumerate(zip(model.blocks, _block_names(model), strict=True)):
        inner = _PLAIN if isinstance(block.expand, nn.Identity) else _WIDE
        names |= {f"blocks.{index}.{k}": f"{prefix}.{v}" for k, v in (inner | _GATE).items()}
    return names


def _timm_names(model: MixNet) -> dict[str, list[str]]:
    """For each key of our state dict the timm keys whose concatenation it is."""
    layers = _layer_names(model)
    names: dict[str, list[str]] = {}
    for key in model.state_dict():
        layer, _, tensor = key.rpartition(".")
        base, _, part = layer.partition(".convs.")
        module = model.get_submodule(layer)
        numbers = [part] if part else []
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and not part:
            numbers = [str(group) for group in range(module.groups)] if module.groups > 1 else []
        stems = [f"{layers[base]}.{number}" for number in numbers] or [layers[base]]
        names[key] = [f"{stem}.{tensor}" for stem in stems]
    return names


def _cut(state: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """A state dict of ours cut into the tensors that other names stand for; they are views."""
    result: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensors = state[key].chunk(len(parts)) if len(parts) > 1 else (state[key],)
        result |= zip(parts, tensors, strict=True)
    return result


def to_timm(model: MixNet) -> dict[str, Tensor]:
    """The model's weights under timm's names, for `load_state_dict` of timm's MixNets.

    Source: `EfficientNet` of timm 1.0. Chapter 6.
    """
    return {
        name: tensor.clone()
        for name, tensor in _cut(model.state_dict(), _timm_names(model)).items()
    }


_HUB_NAME = re.compile(r"^(?:hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)$")

_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".npz", ".h5")


def read_state_dict(weights: Any) -> dict[str, Tensor]:
    """Tensors by name from a file, a hub name, or a state dict.

    Files are read as data only: nothing in them is executed.

    Raises:
        ValueError: if the file is damaged or holds something else, or the name is no hub name.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra to install, for `.safetensors` files and hub names.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the state dict")
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(
            f"weights must be a path, a name or a state dict, got {type(weights).__name__}"
        )
    path = Path(weights)
    if isinstance(weights, str) and not path.exists() and not weights.endswith(_FILE_ENDINGS):
        path = _download(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}")
    return _unwrap(_read_file(path), str(path))


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        message = "reading .safetensors needs safetensors: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {error}") from error


def _download(name: str) -> Path:
    match = _HUB_NAME.match(name)
    if match is None:
        example = "'timm/tf_mixnet_s.in1k'"
        raise ValueError(f"weights must be a file or a hub name such as {example}, got {name!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        message = "hub names need huggingface_hub: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    try:
        return Path(hf_hub_download(match["repository"], "model.safetensors"))
    except Exception as error:  # offline, unknown name, no permission
        message = f"cannot get {match['repository']!r} from the hub or its cache here: {error}"
        raise ValueError(message) from error


def _unwrap(data: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{where} holds no state dict of tensors")
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")  # of data-parallel and compiled models
    return {prefix.sub("", str(key)): value for key, value in data.items()}


def matching_options(weights: Any, state: Mapping[str, Tensor]) -> MixNetOptions:
    """The MixNet options that timm weights of this name were trained with; empty if unknown.

    `tf_mixnet_*` (the official weights) want TensorFlow's padding and epsilon 1e-3, plain
    `mixnet_*` symmetric padding and 1e-5. Weights under our own names want the defaults.

    Args:
        weights: what the caller gave: a path, a hub name, or a state dict.
        state: the tensors in it.
    """
    if not isinstance(weights, str | os.PathLike) or "conv_stem.weight" not in state:
        return {}
    name = Path(weights).name
    if name.startswith("tf_mixnet"):
        return {"padding": "same", "norm_eps": 1e-3, "norm_momentum": 0.01}
    if name.startswith("mixnet"):
        return {"padding": "symmetric", "norm_eps": 1e-5, "norm_momentum": 0.1}
    return {}


def load_weights(model: MixNet, weights: Any) -> None:
    """Load weights into a MixNet; everything is checked before anything changes.

    A classifier of another size is left out, with a warning.

    Args:
        model: a MixNet of the configuration that the weights belong to. Padding and epsilon are
            the model's own; `mixnet_s(weights=...)` picks them by the weights' name.
        weights: a path to `.safetensors` or `.pth`, a hub name, or a state dict, under our names
            or timm's.

    Raises:
        ValueError: listing what is missing, unexpected, or of another shape.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra that is needed.
    """
    given = read_state_dict(weights)
    own = model.state_dict()
    names = _timm_names(model) if "conv_stem.weight" in given else {key: [key] for key in own}
    expected = _cut(own, names)
    for name in _other_classifier(given, model.num_classes):
        given.pop(name, None)
        expected.pop(name, None)
    _check_fit(given, expected)
    with torch.no_grad():
        for name in given:
            expected[name].copy_(given[name])


def _other_classifier(given: Mapping[str, Tensor], num_classes: int) -> tuple[str, ...]:
    """The classifier's names, if the weights have one for another number of classes."""
    weight = given.get("classifier.weight")
    if weight is None or weight.shape[0] == num_classes:
        return ()
    if num_classes:
        warnings.warn(
            f"the weights are for {weight.shape[0]} classes, the model has {num_classes}: "
            "its classifier keeps its own weights",
            stacklevel=3,
        )
    return ("classifier.weight", "classifier.bias")


def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError with what is missing, unexpected, or of another shape."""
    shapes = {n: (tuple(given[n].shape), tuple(expected[n].shape)) for n in expected if n in given}
    problems = {
        "missing": [n for n in expected if n not in given and not n.endswith("_batches_tracked")],
        "unexpected": [n for n in given if n not in expected],
        "of another shape": [f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b],
    }
    parts = [
        f"{kind}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"these weights do not fit; {'; '.join(parts)}")
