# Generated from notebooks/08_weights.ipynb by `make book`. Edit the notebook, not this file.

"""Weights into a MixNet under our names or timm's, and out to timm (chapter 8)."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixconv.checkpoint import Checkpoint, read_checkpoint
from mixconv.mixnet import MixNet, unroll

__all__ = ["OFFICIAL", "PYTORCH", "fill", "load_weights", "settings_of", "to_timm"]


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
        numbers = [part] if part else []
        if base.endswith(("expand.conv", "project.conv")):
            groups = cast("nn.Conv2d", model.get_submodule(layer)).groups
            numbers = [str(group) for group in range(groups)] if groups > 1 else []
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


def _unwrap_model(model: nn.Module) -> MixNet:
    """The MixNet inside of what compiling and data parallelism put around it.

    Raises:
        TypeError: if there is none.
    """
    inside = model
    while not isinstance(inside, MixNet):
        found = getattr(inside, "_orig_mod", getattr(inside, "module", None))
        if not isinstance(found, nn.Module):
            raise TypeError(f"model must be a MixNet, got {type(model).__name__}")
        inside = found
    return inside


def to_timm(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under timm's names, for `load_state_dict` of timm's MixNets.

    What the model's padding and epsilon are goes along, as in our own state dicts.

    Raises:
        TypeError: if the model is not a MixNet, perhaps compiled or data parallel.

    Source: `EfficientNet` of timm 1.0. Chapter 8.
    """
    network = _unwrap_model(model)
    parts = _cut(network.state_dict(), _timm_names(network))
    renamed = OrderedDict((name, tensor.clone()) for name, tensor in parts.items())
    renamed._metadata = {"": {"settings": network.settings()}}  # type: ignore[attr-defined]
    return renamed


OFFICIAL = {"padding": "same", "norm_eps": 1e-3, "norm_momentum": 0.01}

PYTORCH = {"padding": "symmetric", "norm_eps": 1e-5, "norm_momentum": 0.1}

_FAMILY = re.compile(r"(?<!\w)(tf_)?mixnet_(?:s|m|l|xl|xxl)(?![a-z])")


def settings_of(read: Checkpoint) -> Mapping[str, Any] | None:
    """Padding, epsilon and momentum that weights were trained with; None if nothing tells.

    Our own state dicts say it themselves. Weights under timm's names come from one of its two
    families; the name of the network, the file or a folder tells which.

    Source: `tf_mixnet_s`, `mixnet_s` in timm's `efficientnet.py`. Chapter 8.
    """
    if read.settings is not None or "conv_stem.weight" not in read.tensors:
        return read.settings
    found = [match for name in read.names if (match := _FAMILY.search(name))]
    return (OFFICIAL if found[0][1] else PYTORCH) if found else None


def load_weights(model: nn.Module, weights: Any) -> None:
    """Load weights into a MixNet; everything is checked before anything changes.

    A classifier of another size is left out, with a warning. A stem of three channels is made to
    fit another number, as timm does it: summed for one, repeated and scaled for others. Where the
    weights tell that they want another padding or epsilon than the model has, a warning says so.

    Args:
        model: a MixNet of the configuration that the weights belong to; it may be compiled or
            wrapped as data parallel.
        weights: a path to `.safetensors` or `.pth`, a folder, a hub name, or a state dict, under
            our names or timm's; see `read_checkpoint`.

    Raises:
        TypeError: if the model is not a MixNet.
        ValueError: listing what is missing, unexpected, of another shape or no dense numbers.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra that is needed.
    """
    network, read = _unwrap_model(model), read_checkpoint(weights)
    wanted = settings_of(read)
    own, differ = network.settings(), []
    for name in ("padding", "norm_eps") if wanted else ():
        if own[name] != wanted[name]:  # type: ignore[index]
            differ.append(f"{name}={wanted[name]!r}, the model has {own[name]!r}")  # type: ignore[index]
    if differ:
        warnings.warn(f"these weights want {'; '.join(differ)}", stacklevel=2)
    fill(network, read.tensors)


def fill(model: MixNet, tensors: Mapping[str, Tensor], calls: int = 2) -> None:
    """Copy tensors into a model, under our names or timm's; see `load_weights`.

    A warning points to where the caller is, `calls` calls up from here.
    """
    given, own = dict(tensors), model.state_dict()
    names = _timm_names(model) if "conv_stem.weight" in given else {key: [key] for key in own}
    expected = _cut(own, names)
    for name in _other_classifier(given, model.num_classes, calls + 2):
        given.pop(name, None)
        expected.pop(name, None)
    (stem,) = names["stem.conv.weight"]
    if stem in given:
        given[stem] = _other_colors(given[stem], expected[stem].shape[1])
    _check_fit(given, expected)
    with torch.no_grad():
        for name in given:
            expected[name].copy_(given[name])


def _other_colors(weight: Tensor, channels: int) -> Tensor:
    """A stem's weights for RGB images, for another number of channels; others as they are.

    Source: `adapt_input_conv` of timm.
    """
    if weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def _other_classifier(
    given: Mapping[str, Tensor], num_classes: int, stacklevel: int
) -> tuple[str, ...]:
    """The classifier's names, if the weights have one for another number of classes."""
    weight = given.get("classifier.weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] == num_classes:
        return ()
    if num_classes:
        warnings.warn(
            f"the weights are for {weight.shape[0]} classes, the model has {num_classes}: "
            "its classifier keeps its own weights",
            stacklevel=stacklevel,
        )
    return ("classifier.weight", "classifier.bias")


def _is_dense(given: Tensor, expected: Tensor) -> bool:
    """Whether a tensor's numbers can be copied: real, of a kind that fits, and in memory."""
    real = given.is_floating_point() or not expected.is_floating_point()
    plain = given.layout == torch.strided and not given.is_nested
    return plain and not (given.is_meta or given.is_complex()) and real


def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError with what is missing, unexpected, or of another shape."""
    here = [name for name in expected if name in given]
    dense = [name for name in here if _is_dense(given[name], expected[name])]
    shapes = {n: (tuple(given[n].shape), tuple(expected[n].shape)) for n in dense}
    problems = {
        "missing": [n for n in expected if n not in given and not n.endswith("_batches_tracked")],
        "unexpected": [n for n in given if n not in expected],
        "of another shape": [f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b],
        "no dense numbers": [name for name in here if name not in dense],
    }
    parts = [
        f"{kind}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for kind, names in problems.items()
        if names
    ]
    folded = any(name.endswith("running_var") for name in problems["missing"])
    if folded and any(re.search(r"bias\d?$", name) for name in problems["unexpected"]):
        parts.append("norms are folded in them: save the model before it is fused")
    if parts:
        raise ValueError(f"these weights do not fit; {'; '.join(parts)}")
