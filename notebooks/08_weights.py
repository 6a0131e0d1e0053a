# %% [markdown]
# # 8 · Weights
#
# **How do we know that this is the official network, and not one that looks like it?** By its numbers. In the picture below each dot is one of 1,000 class scores: horizontally what the unmodified official code computed in TensorFlow, vertically how far ours is from it, with the same weights and the same image. As built, there is no difference to see. With one detail changed, of the kind that no shape and no parameter count gives away, there is.
#
# So this chapter compares first. Then it tells how weights get across: from TensorFlow, from timm, from files.
#
# **You will be able to**
# - show that two networks are the same network, in different frameworks and under different names;
# - load the official TensorFlow variables, in order or by name;
# - load timm's weights and files, and send weights back to timm;
# - call `mixnet_s(weights=…)` and know what padding and epsilon you get.
#
# **Know first:** [chapter 7](07_mixnet.ipynb).
#
# **Time:** 25 minutes to read. Runs in under 60 seconds on two cores.

# %% [markdown]
# The repository holds no trained weights. It holds what the official code computed with weights made from a recipe: variable $i$ is drawn by NumPy from seed $1000 + i$, scaled by what it is for. Anyone can make them again; a digest says that they are the same.

# %%
import json
import runpy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mixconv.mixnet import MIXNET_M, MIXNET_S, MixNet
from mixconv.official import load_official  # told below

data = Path("../tests/data")
recipe = runpy.run_path(str(data / "recipe.py"))
truth = np.load(data / "official.npz")
specification = json.loads((data / "variables.json").read_text())


def official_weights(name: str) -> list[np.ndarray]:
    roles = specification[name]["variables"]
    arrays = [recipe["value"](i, role, tuple(shape)) for i, (role, shape, _) in enumerate(roles)]
    assert recipe["digest"](arrays) == specification[name]["weights_sha256"]
    return arrays


# %%
from warnings import catch_warnings


def official_image(height: int, width: int) -> Tensor:
    return torch.from_numpy(recipe["make_input"](height, width)).permute(0, 3, 1, 2)


scores = {}
for title, options in {"as built": {}, "epsilon 1e-5": {"norm_eps": 1e-5},
                       "symmetric padding": {"padding": "symmetric"}}.items():  # fmt: skip
    network = MixNet(MIXNET_S, **options).eval()
    with catch_warnings(action="ignore"):  # two of them are wrong on purpose
        load_official(network, official_weights("mixnet-s"))
    with torch.no_grad():
        scores[title] = network(official_image(224, 224))[0].numpy()
official_scores = truth["mixnet-s_224x224|logits"][0]
[(title, bool(np.allclose(ours, official_scores, atol=1e-5))) for title, ours in scores.items()]

# %% tags=["drawing"]
import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

use_style()
figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), sharey=True)
for axis, (title, ours) in zip(axes, scores.items(), strict=True):
    color = "#0072B2" if title == "as built" else "#D55E00"
    axis.scatter(official_scores, ours - official_scores, s=4, color=color)
    axis.set(title=title, xlabel="class score, official")
axes[0].set_ylabel("ours − official")
show(
    figure,
    "official_scores.png",
    "Three scatter plots of 1,000 class scores of MixNet-S: the official TensorFlow code's score "
    "against the difference of ours. As built, a flat line at zero. With batch-norm epsilon 1e-5 "
    "the differences grow with the score; with symmetric padding they scatter.",
)


# %% [markdown]
# ## Endpoint by endpoint
#
# One image and its scores may not show every difference. So the repository holds more of what TensorFlow computed: for S and M, at two image sizes, values after the stem, after each block, and at each change of size also before the projection. Of each of these endpoints the mean, the standard deviation, the first 16 and the last 16 values were kept; of the scores, all.
#
# Our endpoints, under the official names:

# %%
def endpoints(model: MixNet, images: Tensor) -> dict[str, Tensor]:
    found, ends = {}, {str(info["module"]): i for i, info in enumerate(model.feature_info, 1)}
    x = found["stem"] = model.stem(images)
    for index, block in enumerate(model.blocks):
        inside = block.squeeze_excite(block.depthwise(block.expand(x)))
        x = found[f"block_{index}"] = block(x)
        if (number := ends.get(f"blocks.{index}")) is not None:
            found[f"reduction_{number}"] = x
            found[f"reduction_{number}.expansion_output"] = inside
    found["logits"] = model(images)
    return found


# %%
def compare(name: str, model: MixNet, height: int, width: int) -> tuple[int, bool]:
    key = f"{name}_{height}x{width}|"
    with torch.no_grad():
        found = endpoints(model, official_image(height, width))
    close = [np.allclose(found["logits"], truth[key + "logits"], atol=1e-5, rtol=1e-5)]
    for i, endpoint in enumerate(truth[key + "names"]):
        values = found[str(endpoint)].permute(0, 2, 3, 1).flatten().numpy()
        summary = [values.mean(), values.std(), *values[:16], *values[-16:]]
        kept = [truth[key + part][i] for part in ("mean_std", "first16", "last16")]
        expected = np.concatenate(kept)
        close.append(np.allclose(summary, expected, atol=1e-5, rtol=1e-5))
    return len(close), all(close)


# %%
from mixconv.teaching import table

results = {}
for name, config in (("mixnet-s", MIXNET_S), ("mixnet-m", MIXNET_M)):
    network = MixNet(config).eval()
    load_official(network, official_weights(name))
    for height, width in ((224, 224), (131, 170)):
        results[name, height, width] = compare(name, network, height, width)
assert all(equal for _, equal in results.values())
table(
    ["network", "size", "endpoints compared", "all within 1e-5"],
    [[name, f"{h}×{w}", *result] for (name, h, w), result in results.items()],
)

# %% [markdown]
# The second size is not square, and odd and even on its way down: there 'SAME' padding must put its extra zero on the right side. That the comparison can fail, the picture shows.

# %% [markdown]
# **8.1** ★★ *10 minutes, three lines.* Somebody broke parity, in one place. Given two MixNets and images, return the name of the first endpoint where they differ, in the order in which they are computed; None if there is none.
#
# <details><summary>Hint: the idea</summary>
#
# `endpoints` gives a dictionary in the order of computation. After the first difference all others differ, too.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `ours, theirs = endpoints(model, images), endpoints(reference, images)`
#
# </details>

# %%
import copy

from mixconv.teaching import attempt, expect


def first_difference(model: MixNet, reference: MixNet, images: Tensor) -> str | None:
    raise NotImplementedError


@torch.no_grad()
def test_first_difference(answer) -> None:
    reference, images = MixNet(MIXNET_S).eval(), torch.randn(1, 3, 64, 64)
    expect(answer, reference, reference, images, gives=None, why="they are the same")
    for place in ("stem.norm", "blocks.5.depthwise.norm", "head.norm"):
        model = copy.deepcopy(reference)
        model.get_submodule(place).eps = 0.1
        name = {"stem.norm": "stem", "head.norm": "logits"}.get(place, "block_5")
        expect(answer, model, reference, images, gives=name, why=f"the epsilon of {place}")


attempt(first_difference, test_first_difference)


# %% tags=["solution"]
def first_difference_solution(model: MixNet, reference: MixNet, images: Tensor) -> str | None:
    ours, theirs = endpoints(model, images), endpoints(reference, images)
    differing = [name for name in ours if not torch.allclose(ours[name], theirs[name], atol=1e-6)]
    return differing[0] if differing else None


def last_one(model: MixNet, reference: MixNet, images: Tensor) -> str | None:
    """name the last endpoint that differs: that is always the scores"""
    ours, theirs = endpoints(model, images), endpoints(reference, images)
    differing = [name for name in ours if not torch.allclose(ours[name], theirs[name], atol=1e-6)]
    return differing[-1] if differing else None


def shapes_only(model: MixNet, reference: MixNet, images: Tensor) -> str | None:
    """compare shapes, which a wrong epsilon does not change"""
    ours, theirs = endpoints(model, images), endpoints(reference, images)
    return next((name for name in ours if ours[name].shape != theirs[name].shape), None)


attempt(first_difference_solution, test_first_difference, wrong=[last_one, shapes_only])

# %% [markdown]
# ## Across from TensorFlow
#
# How did the weights get across? They come in TensorFlow's layout. By hand, for 3×3 kernels, one of a convolution and one of a depthwise layer:
#
# | | TensorFlow | PyTorch | order of axes |
# |---|---|---|---|
# | convolution | `(3, 3, 16, 24)`: rows, columns, in, out | `(24, 16, 3, 3)`: out, in, rows, columns | 3, 2, 0, 1 |
# | depthwise | `(3, 3, 16, 1)`: rows, columns, channels, multiplier | `(16, 1, 3, 3)` | 2, 3, 0, 1 |
# | dense | `(1536, 1000)`: in, out | `(1000, 1536)`: out, in | 1, 0 |
#
# A grouped layer is one tensor here and several there. So a *slot* says where one official variable belongs: a tensor or a part of one, its layout, and the TensorFlow names it goes by.

# %%
#| export official.py
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


# %%
#| export official.py
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


# %% [markdown]
# The slots of a convolution: one kernel for each group, then a bias if there is one. Whether a kernel is depthwise is told by where it stands, not by its shape: a 1×1 with as many groups as channels has the shape of one. Then the slots of a normalisation: scale, shift, running mean, running variance.

# %%
#| export official.py
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


# %% [markdown]
# The slots of the network, in the order in which the official code creates its variables: stem; for each block expand, depthwise, gate, project; head, classifier.

# %%
#| export official.py
def _unit_slots(unit: nn.Module, scope: str, depthwise: bool = False) -> Iterator[_Slot]:
    if isinstance(unit, ConvNormActivation):
        conv = cast("nn.Conv2d", unit.get_submodule("conv"))
        yield from _depthwise_slots(conv, scope) if depthwise else _conv_slots(conv, scope)
        yield from _norm_slots(unit.get_submodule("norm"), scope)
    elif isinstance(unit, SqueezeExcite):
        yield from _conv_slots(unit.squeeze, scope, "se/conv2d")
        yield from _conv_slots(unit.excite, scope, "se/conv2d")


# %%
#| export official.py
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


# %%
model = MixNet(MIXNET_S).eval()
variables = specification["mixnet-s"]["variables"]
print(len(_slots(model)), "slots,", len(variables), "official variables")
(_, shape, name), slot = variables[5], _slots(model)[5]
print(name, tuple(shape), "→", tuple(slot.target.shape))


# %% [markdown]
# Loading checks everything before it changes anything.

# %%
#| export official.py
def load_official(model: MixNet, variables: Sequence[Any] | Mapping[str, Any]) -> None:
    """Load the official TensorFlow variables into a MixNet.

    A model with another padding or epsilon than the official ones gets them, too, with a warning.

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


# %% [markdown]
# ## Checkpoints by name
#
# A checkpoint knows names, and no order. Names say enough:
#
# | TensorFlow name | scope | kind | number |
# |---|---|---|---|
# | `mixnet-s/mixnet_model/blocks_4/conv2d_13/kernel` | blocks_4 | conv2d | `13` |
# | `mixnet-s/mixnet_model/blocks_4/conv2d_14/kernel` | blocks_4 | conv2d | `14` |
# | `mixnet-s/mixnet_model/blocks_4/se/conv2d_15/bias` | blocks_4 | se/conv2d | `15` |
# | `mixnet-s/blocks_4/batch_normalization_1/gamma` | blocks_4 | batch_normalization | `1` |
#
# Keras numbers the layers of a kind as they are created. So let the variables of each scope and kind stand in line by number, and let each slot take the next one from its line.
#
# Training leaves more in a checkpoint: step counters and optimiser slots, which are passed over, and moving averages of the weights, which are preferred, as in the official evaluation.

# %% tags=["plumbing"]
#| export official.py
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


# %% [markdown]
# Each slot takes the next in its line. Too few or too many is an error that says where.

# %%
#| export official.py
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


# %%
checkpoint = dict(zip([name for *_, name in variables], official_weights("mixnet-s"), strict=True))
by_name = MixNet(MIXNET_S).eval()
load_official(by_name, {name: checkpoint[name] for name in sorted(checkpoint)})
compare("mixnet-s", by_name, 224, 224)

# %% [markdown]
# ## Weights from timm
#
# Trained weights are published for timm. Its network is the same; its names are not. The table of names goes both ways: for each of our tensors, the timm tensors whose concatenation it is.
#
# timm groups blocks into stages, and a stage ends where the number of channels changes in the block strings (before any width multiplier).

# %%
#| export weights.py
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

from mixconv.mixnet import MixNet, unroll


def _block_names(model: MixNet) -> list[str]:
    """The name of each block in timm: stage and position."""
    plain = unroll(replace(model.config, width_multiplier=1.0))
    stages = [list(run) for _, run in groupby(plain, key=lambda block: block.out_channels)]
    return [f"blocks.{stage}.{i}" for stage, run in enumerate(stages) for i in range(len(run))]


# %%
" ".join(_block_names(model))

# %% [markdown]
# Inside a block, timm numbers batch normalisations, and a block without expansion has one fewer:
#
# | ours | timm | timm, no expansion |
# |---|---|---|
# | `expand.conv`, `expand.norm` | `conv_pw`, `bn1` | |
# | `depthwise.conv`, `depthwise.norm` | `conv_dw`, `bn2` | `conv_dw`, `bn1` |
# | `squeeze_excite.squeeze`, `.excite` | `se.conv_reduce`, `se.conv_expand` | the same |
# | `project.conv`, `project.norm` | `conv_pwl`, `bn3` | `conv_pw`, `bn2` |

# %%
#| export weights.py
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


# %%
#| export weights.py
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


# %%
#| export weights.py
def _cut(state: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """A state dict of ours cut into the tensors that other names stand for; they are views."""
    result: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensors = state[key].chunk(len(parts)) if len(parts) > 1 else (state[key],)
        result |= zip(parts, tensors, strict=True)
    return result


# %% tags=["plumbing"]
#| export weights.py
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


# %%
#| export weights.py
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


# %%
renamed = to_timm(model)
[name for name in renamed if name.startswith("blocks.1.0.conv")]

# %% [markdown]
# ## Files, state dicts, hub names
#
# Weights come as a file, as a state dict, or as a name on the Hugging Face hub. `checkpoint.py` turns each into tensors by name, and knows nothing of networks. A file is read as data: PyTorch's older habit, to run whatever a pickle asks for, is switched off.

# %%
#| export checkpoint.py
"""Tensors by name from a file, a hub name or a state dict, read as data only (chapter 8)."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Checkpoint(NamedTuple):
    """Tensors by name, and what is known of where they come from."""

    tensors: dict[str, Tensor]
    names: tuple[str, ...]  # of network, file, folders: whatever may tell, the surest first
    settings: Mapping[str, Any] | None  # as `MixNet.settings` wrote them


def read_state_dict(weights: Any) -> dict[str, Tensor]:
    """Tensors by name from a file, a folder, a hub name, or a state dict.

    Arguments and errors are those of `read_checkpoint`.
    """
    return read_checkpoint(weights).tensors


# %%
#| export checkpoint.py
def read_checkpoint(weights: Any) -> Checkpoint:
    """What a file, a folder, a hub name, or a state dict holds.

    Files are read as data only: nothing in them is executed.

    Args:
        weights: a path to a file, or to a folder with one; `"timm/tf_mixnet_s.in1k"` or another
            hub name with "mixnet" in it, or any with `hf-hub:` before it; or a state dict.

    Raises:
        TypeError: for another kind of thing.
        ValueError: if the file is damaged or holds something else.
        FileNotFoundError: if there is no such file.
        ImportError: naming the extra to install, for `.safetensors` files and hub names.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the state dict", ())
    if not isinstance(weights, str | os.PathLike):
        kind = type(weights).__name__
        raise TypeError(f"weights must be a path, a name or a state dict, got {kind}")
    path = _find_file(weights)
    data = _read_file(path)
    given = (str(weights),) if isinstance(weights, str) and not Path(weights).exists() else ()
    return _unwrap(data, str(path), (*given, path.name, *_names_beside(path)))


# %% [markdown]
# A checkpoint of a training script holds more than tensors: the optimiser, the epoch, the options. The tensors may be wrapped twice, carry prefixes, and stand beside counters that other tools left there.

# %% tags=["plumbing"]
#| export checkpoint.py
_WRAPPINGS = (
    "state_dict_ema", "model_ema", "params_ema", "ema", "state_dict", "model_state_dict", "model",
    "net", "network", "params", "weights",
)  # fmt: skip
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|model\.|net\.|backbone\.)+")
_LEFT_THERE = re.compile(r"(^|\.)(n_averaged|total_ops|total_params)$")  # by averaging, by thop


def _unwrap(data: Any, where: str, names: tuple[str, ...]) -> Checkpoint:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    told = names
    while isinstance(data, Mapping):
        options = data.get("args", data.get("hyper_parameters"))
        held = [data.get("arch"), getattr(options, "model", None)]
        held += [options.get("model")] if isinstance(options, Mapping) else []
        told = (*(name for name in held if isinstance(name, str)), *told)
        inside = [data[k] for k in _WRAPPINGS if isinstance(data.get(k), Mapping)]
        if not inside:
            break
        data = inside[0]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        keys = ", ".join(map(repr, list(data)[:6])) if isinstance(data, Mapping) else ""
        found = f"its keys: {keys}" if keys else f"but a {type(data).__name__}"
        raise ValueError(f"{where} holds no state dict of tensors, {found}")
    tensors = {_PREFIX.sub("", str(key)): value for key, value in data.items()}
    tensors = {key: value for key, value in tensors.items() if not _LEFT_THERE.search(key)}
    records = dict(getattr(data, "_metadata", None) or {}).values()
    settings = [r["settings"] for r in records if isinstance(r, Mapping) and "settings" in r]
    return Checkpoint(tensors, told, settings[0] if settings else None)


# %% tags=["plumbing"]
#| export checkpoint.py
import argparse
import json
import zipfile


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        _refuse_inflation(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's options: only values
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ImportError(".safetensors needs safetensors: pip install 'mixconv[hub]'") from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {error}") from error


def _refuse_inflation(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to far more than it takes; torch's do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 2 * path.stat().st_size + (1 << 20):
            raise ValueError(f"it would unpack to {size >> 20} MB")


# %% tags=["plumbing"]
#| export checkpoint.py
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model_best.pth.tar")


def _find_file(weights: str | os.PathLike[str]) -> Path:
    """The file that a path, a folder or a hub name means.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(weights)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"no weights file in {str(path)!r}: none of {', '.join(_FILES)}"
            )
        return found[0]
    hub = _HUB_NAME.match(weights) if isinstance(weights, str) and not path.exists() else None
    if hub and (hub["said"] or _looks_like_a_hub_name(hub["repository"])):
        return _download(hub["repository"])
    if not path.is_file():
        hint = "" if path.suffix else "; a hub name looks like 'timm/tf_mixnet_s.in1k'"
        raise FileNotFoundError(f"no weights file {str(path)!r}{hint}")
    return path


def _looks_like_a_hub_name(name: str) -> bool:
    """Not a file that is missing: asking the hub for that would take half a minute offline."""
    file = name.endswith((".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt"))
    return "mixnet" in name.lower() and not file and not Path(name).parent.is_dir()


def _names_beside(path: Path) -> list[str]:
    """What the folders around a file are called, and what a `config.json` beside it says."""
    names: list[str] = []
    try:
        described = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        names += [str(described[key]) for key in ("architecture", "model") if key in described]
    except (OSError, ValueError, TypeError):
        pass
    return [*names, *(folder.name for folder in path.absolute().parents[:3])]


# %% tags=["plumbing"]
#| export checkpoint.py
_HUB_NAME = re.compile(r"^(?P<said>hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)$")


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        message = "hub names need huggingface_hub: pip install 'mixconv[hub]'"
        raise ImportError(message) from None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # offline, unknown name, no permission
        message = f"cannot get {repository!r} from the hub or its cache here: {error}"
        raise ValueError(message) from error


# %% [markdown]
# Then the tensors go into the network. `load_weights` recognises timm's names (the old gen-efficientnet names are the same) and our own, compares all names and shapes, and only then changes the model.

# %%
#| export weights.py
from mixconv.checkpoint import Checkpoint, read_checkpoint


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


# %%
#| export weights.py
OFFICIAL = {"padding": "same", "norm_eps": 1e-3, "norm_momentum": 0.01}
PYTORCH = {"padding": "symmetric", "norm_eps": 1e-5, "norm_momentum": 0.1}
_FAMILY = re.compile(r"(?:^|[^a-z0-9])(tf_)?mixnet_(?:s|m|l|xl|xxl)(?![a-z])")


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


# %% [markdown]
# What does not fit is said before anything is changed; what fits is copied.

# %%
#| export weights.py
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


# %%
#| export weights.py
def _other_colors(weight: Tensor, channels: int) -> Tensor:
    """A stem's weights for RGB images, for another number of channels; others as they are.

    Source: `adapt_input_conv` of timm.
    """
    if weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


# %% tags=["plumbing"]
#| export weights.py
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


# %% tags=["plumbing"]
#| export weights.py
def _is_dense(given: Tensor, expected: Tensor) -> bool:
    """Whether a tensor's numbers can be copied: real, of a kind that fits, and in memory."""
    real = given.is_floating_point() or not expected.is_floating_point()
    return given.layout == torch.strided and not (given.is_meta or given.is_complex()) and real


def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError with what is missing, unexpected, or of another shape."""
    shapes = {n: (tuple(given[n].shape), tuple(expected[n].shape)) for n in expected if n in given}
    problems = {
        "missing": [n for n in expected if n not in given and not n.endswith("_batches_tracked")],
        "unexpected": [n for n in given if n not in expected],
        "of another shape": [f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b],
        "no dense numbers": [n for n in shapes if not _is_dense(given[n], expected[n])],
    }
    parts = [
        f"{kind}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"these weights do not fit; {'; '.join(parts)}")


# %% [markdown]
# Out to timm's names and in again, into a network that started with other weights:

# %%
from mixconv.teaching import check

load_official(model, official_weights("mixnet-s"))
again, image = MixNet(MIXNET_S).eval(), official_image(224, 224)
load_weights(again, to_timm(model))
with torch.no_grad():
    check(again(image), model(image), "scores after a round trip through timm's names")

# %% [markdown]
# What does that prove? Less than it seems. A round trip accepts any table that undoes itself: swap two names in `_WIDE`, and the way out and the way in are wrong in the same way. So `tests/peers/test_timm.py` loads `to_timm` into timm's *own* networks and compares scores, gradients and running statistics, for all three sizes and both families, and the other way round; `tests/peers/test_geffnet.py` does it with gen-efficientnet.
#
# ## The zoo
#
# Now the three functions that most people call. They stand above all the rest: a network from chapter 7, weights from this one.
#
# One thing is left to decide. timm's two families want different networks. Its `tf_mixnet_*` are the official weights: TensorFlow padding, epsilon 1e-3. Its `mixnet_*` were trained in PyTorch: symmetric padding, epsilon 1e-5. Both have the same names and shapes, so the wrong choice loads without an error and computes something else. (That is the picture at the top.) What tells? Our own state dicts say it themselves (chapter 7). For weights under timm's names, it is the name of the network in a training checkpoint, of the file, of a folder around it, or in the `config.json` beside it.

# %%
#| export zoo.py
"""`mixnet_s`, `mixnet_m`, `mixnet_l`, `mixnet_xl`: networks by name, with weights (chapter 8)."""

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, ParamSpec

from torch import Tensor

from mixconv.checkpoint import read_checkpoint
from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, MIXNET_XL, MixNet, MixNetConfig
from mixconv.network import refuse_in_chans
from mixconv.weights import OFFICIAL, fill, settings_of


# %% [markdown]
# What the caller says wins over what the weights say. Where neither says anything, the official settings are taken, and not in silence. The numbers of classes and of image channels are those of the weights, unless the caller wants others.

# %%
#| export zoo.py
def _build(config: MixNetConfig, weights: Any, **options: Any) -> MixNet:
    """A MixNet, with weights if there are any; they fill in what is None."""
    read = None if weights is None else read_checkpoint(weights)
    usual = OFFICIAL if read is None else settings_of(read)
    if usual is None and None in (options["padding"], options["norm_eps"]):
        warnings.warn(_UNTOLD, stacklevel=4)
    found = {} if read is None else _sizes_of(read.tensors)
    for name, value in {**(usual or OFFICIAL), **_USUAL_SIZES, **found}.items():
        if options[name] is None:
            options[name] = value
    model = MixNet(config, **options)
    if read is not None:
        fill(model, read.tensors, calls=4)
    return model


# %% tags=["plumbing"]
#| export zoo.py
_USUAL_SIZES = {"num_classes": 1000, "in_channels": 3}
_UNTOLD = (
    "nothing tells which settings these weights want; taken: padding='same', norm_eps=1e-3 "
    "(official, timm's tf_mixnet_*). timm's mixnet_* and others trained in PyTorch want "
    "padding='symmetric', norm_eps=1e-5. Say which"
)


def _sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Classes and image channels of weights, where they can be read off."""
    classifier = tensors.get("classifier.weight")
    stem = tensors.get("conv_stem.weight", tensors.get("stem.conv.weight"))
    found = {"num_classes": classifier.shape[0]} if classifier is not None else {}
    return found | ({"in_channels": stem.shape[1]} if stem is not None and stem.ndim == 4 else {})


# %%
#| export zoo.py
@refuse_in_chans
def mixnet_s(
    weights: Any = None, *, num_classes: int | None = None, in_channels: int | None = None,
    width_multiplier: float = 1.0, drop_rate: float | None = None, drop_path_rate: float = 0.0,
    padding: str | None = None, norm_eps: float | None = None, norm_momentum: float | None = None,
    output_stride: int = 32,
) -> MixNet:  # fmt: skip
    """MixNet-S, 4.1 million parameters.

    Args:
        weights: None for untrained; or a path to `.safetensors` or `.pth`, a folder, a state
            dict, or a hub name such as `"timm/tf_mixnet_s.in1k"`. See `load_weights`.
        num_classes: outputs; 0 for features; None for as many as the weights have, else 1000.
        in_channels: channels of the images; None for those of the weights, else 3.
        width_multiplier: scales channels.
        drop_rate: dropout before the classifier; None for the network's own.
        drop_path_rate: stochastic depth; block i of n gets `drop_path_rate * i / n`, i from 0.
        padding: "same" or "symmetric"; None for what the weights want, else "same".
        norm_eps: batch-norm epsilon; None for what the weights want, else 1e-3.
        norm_momentum: share of a new batch in the running statistics; None as for the others.
        output_stride: 8 or 16 for larger maps, with spread kernels after them, as in timm.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, num_classes)`.

    Raises:
        TypeError: for weights of no known kind, or timm's `in_chans`, naming `in_channels`.
        ValueError: naming the argument, or what does not fit in the weights.
        FileNotFoundError: if there is no such weights file.
        ImportError: naming the extra that reading the weights needs.

    Source: paper, section 4.2; `mixnet_s` in the official `mixnet_builder.py`. Chapter 8.
    """
    return _build(
        MIXNET_S, weights, num_classes=num_classes, in_channels=in_channels, padding=padding,
        width_multiplier=width_multiplier, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        norm_eps=norm_eps, norm_momentum=norm_momentum, output_stride=output_stride,
    )  # fmt: skip


# %% [markdown]
# The others take the same arguments. A decorator gives them the signature, which an editor and Jupyter's Shift-Tab show, and the text about it.

# %% tags=["plumbing"]
#| export zoo.py
_P = ParamSpec("_P")


def _like(model: Callable[_P, MixNet]) -> Callable[[Callable[..., MixNet]], Callable[_P, MixNet]]:
    """Decorator: the signature of `model`, and what follows the first line of its docstring."""

    def decorate(function: Callable[..., MixNet]) -> Callable[_P, MixNet]:
        function.__doc__ = f"{function.__doc__}\n{str(model.__doc__).partition(chr(10))[2]}"
        function.__signature__ = signature(model)  # type: ignore[attr-defined]
        return function

    return decorate


_UNSAID = {name: given.default for name, given in signature(mixnet_s).parameters.items()}
del _UNSAID["weights"]


@refuse_in_chans
@_like(mixnet_s)
def mixnet_m(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-M, 5.0 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_M, weights, **_UNSAID | options)


@refuse_in_chans
@_like(mixnet_s)
def mixnet_l(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-L, 7.3 million parameters: M, 1.3 times as wide. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_L, weights, **_UNSAID | options)


@refuse_in_chans
@_like(mixnet_s)
def mixnet_xl(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-XL, timm's, 11.9 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_XL, weights, **_UNSAID | options)


# %% [markdown]
# ## Exercises
#
# **8.2** ★ *5 minutes, one line.* On images of even size, how many convolutions of a MixNet compute something else with symmetric padding than with 'SAME'? Count them for a configuration.
#
# <details><summary>Hint: the idea</summary>
#
# At stride 1 both rules put the same zeros on both sides. Chapter 3 says where they differ.
#
# </details>

# %%
def shifted_layers(config: MixNetConfig) -> int:
    raise NotImplementedError


def test_shifted(answer) -> None:
    for config in (MIXNET_S, MIXNET_M, MixNetConfig(("r2_k3_a1_p1_s11_e1_i8_o8",), 8)):
        halving = sum(run.stride == 2 for run in unroll(config))
        expect(answer, config, gives=1 + halving, why=f"the stem and {halving} blocks halve")


attempt(shifted_layers, test_shifted)


# %% tags=["solution"]
def shifted_layers_solution(config: MixNetConfig) -> int:
    return 1 + sum(run.stride == 2 for run in unroll(config))


def no_stem(config: MixNetConfig) -> int:
    """forget that the stem has stride 2"""
    return sum(run.stride == 2 for run in unroll(config))


def all_depthwise(config: MixNetConfig) -> int:
    """count every depthwise layer, those of stride 1, too"""
    return 1 + len(unroll(config))


attempt(shifted_layers_solution, test_shifted, wrong=[no_stem, all_depthwise])


# %% [markdown]
# **8.3** ★★ *5 minutes, two lines.* TensorFlow's depthwise kernels may give several outputs for each channel: (k, k, channels, multiplier). Return PyTorch's weight, (channels · multiplier, 1, k, k). In both, output z belongs to input channel z // multiplier.
#
# <details><summary>Hint: the idea</summary>
#
# The last axis in PyTorch's order varies fastest. Which of channels and multiplier must that be?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `kernel.permute(2, 3, 0, 1)`
#
# </details>

# %%
def depthwise_weight(kernel: Tensor) -> Tensor:
    raise NotImplementedError


def test_depthwise(answer) -> None:
    one = torch.arange(18.0).view(3, 3, 2, 1)
    expect(answer, one, gives=torch.stack([one[:, :, :1, 0], one[:, :, 1:, 0]]).permute(0, 3, 1, 2),
           why="one kernel for each channel")  # fmt: skip
    two = torch.tensor([[[[1.0, 2], [3, 4], [5, 6]]]])  # 1×1, three channels, two outputs each
    expect(answer, two, gives=torch.tensor([1.0, 2, 3, 4, 5, 6]).view(6, 1, 1, 1),
           why="outputs 0 and 1 belong to channel 0")  # fmt: skip


attempt(depthwise_weight, test_depthwise)


# %% tags=["solution"]
def depthwise_weight_solution(kernel: Tensor) -> Tensor:
    k, _, channels, multiplier = kernel.shape
    return kernel.permute(2, 3, 0, 1).reshape(channels * multiplier, 1, k, k)


def multiplier_first(kernel: Tensor) -> Tensor:
    """bring the multiplier before the channels: output z would belong to channel z % channels"""
    k, _, channels, multiplier = kernel.shape
    return kernel.permute(3, 2, 0, 1).reshape(channels * multiplier, 1, k, k)


def reshaped(kernel: Tensor) -> Tensor:
    """reshape without moving axes: rows and columns end up among the channels"""
    k, _, channels, multiplier = kernel.shape
    return kernel.reshape(channels * multiplier, 1, k, k)


attempt(depthwise_weight_solution, test_depthwise, wrong=[multiplier_first, reshaped])


# %% [markdown]
# **8.4** ★ *5 minutes, two lines.* Which padding do weights of this name want? "same" for timm's `tf_mixnet_*`, "symmetric" for its `mixnet_*`, None for any other name. Names may have an owner and a slash before them.
#
# <details><summary>Hint: the idea</summary>
#
# One name is the end of the other. Ask for the longer one first, at the beginning of what follows the slash.
#
# </details>

# %%
def padding_of(name: str) -> str | None:
    raise NotImplementedError


def test_padding_of(answer) -> None:
    names = {"tf_mixnet_s": "same", "timm/tf_mixnet_l.in1k": "same", "mixnet_m": "symmetric",
             "timm/mixnet_xl.ra_in1k": "symmetric", "last.pth": None, "my_mixnet_s": None,
             "timm/efficientnet_b0": None}  # fmt: skip
    for name, padding in names.items():
        expect(answer, name, gives=padding, why="what its family was trained with")


attempt(padding_of, test_padding_of)


# %% tags=["solution"]
def padding_of_solution(name: str) -> str | None:
    own = name.rpartition("/")[2]
    families = {"tf_mixnet_": "same", "mixnet_": "symmetric"}
    return next((padding for start, padding in families.items() if own.startswith(start)), None)


def anywhere(name: str) -> str | None:
    """look for the word anywhere: tf_mixnet_s holds mixnet_s, and so does my_mixnet_s"""
    return "symmetric" if "mixnet_" in name else None


def whole_name(name: str) -> str | None:
    """forget the owner before the slash"""
    families = {"tf_mixnet_": "same", "mixnet_": "symmetric"}
    return next((padding for start, padding in families.items() if name.startswith(start)), None)


attempt(padding_of_solution, test_padding_of, wrong=[anywhere, whole_name])

# %% [markdown]
# ## Takeaways
# - With the official weights, S and M give the official scores, and every endpoint agrees in all that was kept of it, within 1e-5.
# - Padding and epsilon change what a network computes and neither its shapes nor its parameters: only numbers show them.
# - Weights go in from TensorFlow (in order or by name), timm and files, and out to timm. All is checked before anything changes.
# - A round trip accepts any table that undoes itself; another implementation does not.
#
# **Further reading**: [`mixnet_model.py`](https://github.com/tensorflow/tpu/blob/master/models/official/mnasnet/mixnet/mixnet_model.py); timm's [model file](https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/efficientnet.py), which builds MixNets among others; the [safetensors format](https://github.com/huggingface/safetensors), which can be read without running anything.
#
# Previous: [7 · MixNet](07_mixnet.ipynb) · Next: [9 · Any model](09_any_model.ipynb)
