# %% [markdown]
# # 8 · The official code
#
# **How do we know that this is the official network, and not one that looks like it?** By its numbers. In the picture below each dot is one of 1,000 class scores: horizontally what the unmodified official code computed in TensorFlow, vertically how far ours is from it, with the same weights, made up, and the same image. As built, there is no difference to see. With one detail changed, of the kind that no shape and no parameter count gives away, there is.
#
# So this page compares first. Then it tells how the weights get across from TensorFlow.
#
# **You will be able to**
# - show that two networks are the same network, in different frameworks and under different names;
# - find the first place where two networks differ;
# - load the official TensorFlow variables, in order or by name.
#
# **Know first:** [chapter 7](07_mixnet.ipynb).
#
# **Time:** 15 minutes to read. Runs in under 60 seconds on two cores. It is the first of two pages; the second, [Weights](08_weights.ipynb), has timm's names, files, and `mixnet_s(weights=…)`.

# %% [markdown]
# The repository holds no trained weights, and the comparison needs none: any weights will do, as long as both sides have the same. So they are made up, from a recipe: variable $i$ is drawn by NumPy from seed $1000 + i$, scaled by what it is for. Anyone can make them again; a digest says that they are the same.
#
# > ⚙️ **Official code.** The numbers were computed once, by the unmodified files of `mixnet/` in TensorFlow 2.15.1 on a CPU, in inference mode, for S and M. Which commit was not noted down, and for S and M it does not matter: from the folder's [first version](https://github.com/tensorflow/tpu/commit/d8e5492) of July 2019 to its [last change](https://github.com/tensorflow/tpu/commit/8969fbf) of October 2020 only names, imports, a helper for shapes and the definition of L have changed. (L is M with a multiplier, which became smaller four days after the first version.)

# %% tags=["plumbing"]
# fold: The recipe's weights, and what TensorFlow computed with them
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


def recipe_weights(name: str) -> list[np.ndarray]:
    roles = specification[name]["variables"]
    arrays = [recipe["value"](i, role, tuple(shape)) for i, (role, shape, _) in enumerate(roles)]
    assert recipe["digest"](arrays) == specification[name]["weights_sha256"]
    return arrays


# %% [markdown]
# Now three networks with these weights and one image. One is as built; two are wrong on purpose, each in one detail. For each: are all scores within 1e-5 of the official ones, and which class has the highest?

# %%
from warnings import catch_warnings


def official_image(height: int, width: int) -> Tensor:
    return torch.from_numpy(recipe["make_input"](height, width)).permute(0, 3, 1, 2)


scores = {}
for title, options in {"as built": {}, "epsilon 1e-5": {"norm_eps": 1e-5},
                       "symmetric padding": {"padding": "symmetric"}}.items():  # fmt: skip
    network = MixNet(MIXNET_S, **options).eval()
    with catch_warnings(action="ignore"):  # load_official sees which two are wrong, and says so
        load_official(network, recipe_weights("mixnet-s"))
    with torch.no_grad():
        scores[title] = network(official_image(224, 224))[0].numpy()
official_scores = truth["mixnet-s_224x224|logits"][0]
for title, ours in scores.items():
    close = np.allclose(ours, official_scores, atol=1e-5)
    print(f"{title:18} equal: {close!s:5} highest: class {ours.argmax()}")

# %% [markdown]
# The highest class is the same in all three: a look at the answer would have shown nothing. The scores do:

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

use_style()
figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), sharey=True)
for axis, (title, ours) in zip(axes, scores.items(), strict=True):
    color = "#0072B2" if title == "as built" else "#D55E00"
    axis.scatter(official_scores, ours - official_scores, s=4, color=color)
    axis.set(title=title, xlabel="class score, official")
    largest = float(abs(ours - official_scores).max())
    said = "all below 1e-5" if largest < 1e-5 else f"up to {largest:.2f}"
    axis.text(0.04, 0.04, said, transform=axis.transAxes)
axes[0].set_ylabel("ours − official")
show(
    figure,
    "official_scores.png",
    "Three scatter plots of 1,000 class scores of MixNet-S: the official TensorFlow code's score "
    "against the difference of ours. As built, a flat line at zero. With batch-norm epsilon 1e-5 "
    "the differences grow with the score; with symmetric padding they scatter.",
    caption="As built, no difference but rounding; with a detail wrong, nearly every score moves.",
)


# %% [markdown]
# ## Endpoint by endpoint
#
# One image and its scores may not show every difference. So the repository holds more of what TensorFlow computed: for S and M, at two image sizes, values after the stem, after each block, and at each change of size also before the projection. Of each of these endpoints the mean, the standard deviation, the first 16 and the last 16 values were kept; of the scores, all.
#
# Our endpoints, under the official names and in the order in which they are computed. A `reduction_n` is the last block of its size under a second name.

# %%
def endpoints(model: MixNet, images: Tensor) -> dict[str, Tensor]:
    found, ends = {}, {str(info["module"]): i for i, info in enumerate(model.feature_info, 1)}
    x = found["stem"] = model.stem(images)
    for index, block in enumerate(model.blocks):
        number = ends.get(f"blocks.{index}")
        if number:
            inside = block.squeeze_excite(block.depthwise(block.expand(x)))
            found[f"reduction_{number}.expansion_output"] = inside
        x = found[f"block_{index}"] = block(x)
        if number:
            found[f"reduction_{number}"] = x
    found["logits"] = model(images)
    return found


# %%
def compare(name: str, model: MixNet, height: int, width: int) -> tuple[int, int, bool]:
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
    return len(close), len({id(tensor) for tensor in found.values()}), all(close)


# %%
from mixconv.teaching import table

results = {}
for name, config in (("mixnet-s", MIXNET_S), ("mixnet-m", MIXNET_M)):
    network = MixNet(config).eval()
    load_official(network, recipe_weights(name))
    for height, width in ((224, 224), (131, 170)):
        results[name, height, width] = compare(name, network, height, width)
assert all(equal for *_, equal in results.values())
table(
    ["network", "size", "names compared", "distinct tensors", "all within 1e-5"],
    [[name, f"{h}×{w}", *result] for (name, h, w), result in results.items()],
)

# %% [markdown]
# The second size is not square, and its height and width are odd and even by turns on their way down. Where a side is even, a 3×3 kernel of stride 2 under 'SAME' has one zero below or to the right and none above or to the left; where it is odd, one on each side. A padding that does not look at the size is wrong on one of the two. That the comparison can fail, the picture shows.
#
# What it leaves out: L, of which there are no official numbers here, and all that happens in training. `tests/peers/test_timm.py` compares all three sizes with timm's networks, in scores, gradients and running statistics.

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
    places = {"stem": "stem.norm", "block_5": "blocks.5.depthwise.norm", "logits": "head.norm",
              "reduction_3.expansion_output": "blocks.6.depthwise.norm",
              "block_6": "blocks.6.project.norm"}  # fmt: skip
    for name, place in places.items():
        model = copy.deepcopy(reference)
        model.get_submodule(place).eps = 0.1
        expect(answer, model, reference, images, gives=name, why=f"the epsilon of {place}")


attempt(first_difference, test_first_difference)


# %% tags=["solution"]
# fold: Solution
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


def blocks_only(model: MixNet, reference: MixNet, images: Tensor) -> str | None:
    """compare the blocks alone: stem, head and the inside of a block can differ, too"""
    ours, theirs = endpoints(model, images), endpoints(reference, images)
    blocks = [name for name in ours if name.startswith("block")]
    return next((name for name in blocks if not torch.allclose(ours[name], theirs[name])), None)


attempt(first_difference_solution, test_first_difference,
        wrong=[last_one, shapes_only, blocks_only])  # fmt: skip

# %% [markdown]
# ## Across from TensorFlow
#
# How did the weights get across? TensorFlow has the axes of a kernel in another order. For 3×3 kernels, one of a convolution and one of a depthwise layer, and for the classifier:
#
# | | TensorFlow | PyTorch | order of axes |
# |---|---|---|---|
# | convolution | `(3, 3, 16, 24)`: rows, columns, in, out | `(24, 16, 3, 3)`: out, in, rows, columns | 3, 2, 0, 1 |
# | depthwise | `(3, 3, 16, 1)`: rows, columns, channels, multiplier | `(16, 1, 3, 3)` | 2, 3, 0, 1 |
# | dense | `(1536, 1000)`: in, out | `(1000, 1536)`: out, in | 1, 0 |
#
# By hand: the entry [0, 2, 5, 7] of the convolution is row 0, column 2, from input 5 to output 7. In PyTorch the same number is at [7, 5, 0, 2]. And entry [0, 2, 5, 0] of the depthwise kernel, channel 5, is at [5, 0, 0, 2]:

# %%
conv, depthwise = torch.randn(3, 3, 16, 24), torch.randn(3, 3, 16, 1)
bool(conv.permute(3, 2, 0, 1)[7, 5, 0, 2] == conv[0, 2, 5, 7]
     and depthwise.permute(2, 3, 0, 1)[5, 0, 0, 2] == depthwise[0, 2, 5, 0])  # fmt: skip

# %% [markdown]
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

# %% tags=["plumbing"]
# fold: The slots of a convolution, of depthwise kernels, of a normalisation
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

# %% tags=["plumbing"]
# fold: The slots of a unit: convolution and normalisation, or a gate
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
# Loading fits all of them to their slots first, and changes the model only then: a wrong shape in the last variable must not leave a network that is half new.

# %%
#| export official.py
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


# %% [markdown]
# ## Checkpoints by name
#
# A real checkpoint of the official code is a file of names and values, in no order. Reading it takes TensorFlow; after that it is arrays. (Not run here, for want of both.)
#
# ```python
# reader = tf.train.load_checkpoint("path/to/model.ckpt")
# variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
# load_official(model, variables)
# ```
#
# Where do they go without an order? Names say enough:
#
# | TensorFlow name | scope | kind | number |
# |---|---|---|---|
# | `mixnet-s/mixnet_model/blocks_4/conv2d_13/kernel` | blocks_4 | conv2d | `13` |
# | `mixnet-s/mixnet_model/blocks_4/conv2d_14/kernel` | blocks_4 | conv2d | `14` |
# | `mixnet-s/mixnet_model/blocks_4/se/conv2d_15/bias` | blocks_4 | se/conv2d | `15` |
# | `mixnet-s/blocks_4/batch_normalization_1/gamma` | blocks_4 | batch_normalization | `1` |
#
# (Why has the last name no `mixnet_model`? The official code makes its batch normalisations with `tf.layers` and the rest with `tf.keras.layers`, and these two build names differently. We read a name from its scope on, so it makes no difference.) Keras numbers the layers of a kind as they are created. So let the variables of each scope and kind stand in line by number, and let each slot take the next one from its line.
#
# Training leaves more in a checkpoint: step counters and optimiser slots, which are passed over, and moving averages of the weights, which are preferred, as in the official evaluation.

# %% tags=["plumbing"]
# fold: How variables stand in line by their names
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
checkpoint = dict(zip([name for *_, name in variables], recipe_weights("mixnet-s"), strict=True))
by_name = MixNet(MIXNET_S).eval()
load_official(by_name, {name: checkpoint[name] for name in sorted(checkpoint)})
compare("mixnet-s", by_name, 224, 224)

# %% [markdown]
# ## Exercises
#
# **8.2** ★★ *10 minutes, five lines.* Wrong padding is hard to see, because it is not always wrong. `strides` lists the stride of the stem and of each block's depthwise layer, in order; kernels are odd, images are squares of `size` pixels. How many of these layers compute something else with symmetric padding than with 'SAME'?
#
# <details><summary>Hint: the idea</summary>
#
# At stride 1 both rules put as many zeros on the left as on the right. At stride 2 it depends on whether the image there is even or odd: chapter 3.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# Under 'SAME' a layer of stride 2 makes ⌈h / 2⌉ pixels of h: `-(-size // 2)`.
#
# </details>

# %%
from mixconv.layer import same_padding

S_STRIDES = [2, *(block.stride for block in MixNet(MIXNET_S).blocks)]


def shifted_layers(strides: list[int], size: int) -> int:
    raise NotImplementedError


def test_shifted(answer) -> None:
    assert [len(set(same_padding(size, 3, 2))) for size in (8, 9)] == [2, 1]  # even ones shift
    expect(answer, [2, 1, 1], 8, gives=1, why="only the layer of stride 2")
    expect(answer, [2, 2], 9, gives=0, why="9 is odd, and so is 5")
    expect(answer, [2, 2], 7, gives=1, why="7 is odd, but 4 is even")
    for size, count in {224: 5, 226: 1, 228: 2, 225: 0, 240: 4}.items():
        expect(answer, S_STRIDES, size, gives=count, why="MixNet-S")


attempt(shifted_layers, test_shifted)


# %% tags=["solution"]
# fold: Solution
def shifted_layers_solution(strides: list[int], size: int) -> int:
    count = 0
    for stride in strides:
        count += stride == 2 and size % 2 == 0
        size = -(-size // stride)
    return count


def every_halving(strides: list[int], size: int) -> int:
    """count every layer of stride 2: where the image is odd, both rules agree"""
    return strides.count(2)


def rounded_down(strides: list[int], size: int) -> int:
    """round half of an odd size down: 'SAME' keeps the last pixel"""
    count = 0
    for stride in strides:
        count += stride == 2 and size % 2 == 0
        size //= stride
    return count


def by_the_image(strides: list[int], size: int) -> int:
    """ask the image's size once: on the way down it changes"""
    return strides.count(2) if size % 2 == 0 else 0


attempt(shifted_layers_solution, test_shifted, wrong=[every_halving, rounded_down, by_the_image])


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
# fold: Solution
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
# ## Takeaways
# - With the same made-up weights, S and M give the official code's scores, and every endpoint agrees in all that was kept of it, within 1e-5. L was not compared here.
# - Padding and epsilon change what a network computes and neither its shapes nor its parameters: only numbers show them, and padding on some image sizes only.
# - Weights go in from TensorFlow in order or by name. All is checked before anything changes.
#
# **Further reading**: [`mixnet_model.py`](https://github.com/tensorflow/tpu/blob/master/models/official/mnasnet/mixnet/mixnet_model.py), the official network.
#
# Previous: [7 · MixNet](07_mixnet.ipynb) · Next: [8 · Weights](08_weights.ipynb)
