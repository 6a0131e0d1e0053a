# %% [markdown]
# # 18 · Using it
#
# **You have pictures and a task. What do you call?** The picture below is the whole answer: one network, and the places where you can take something out of it. This chapter goes through them: scores, speed, features, fine-tuning, MixConv in a network of your own, export, and the command line last.
#
# **You will be able to**
# - get scores from a photograph, and load and save weights;
# - make a network several times as fast, with one line;
# - take features out, and set up fine-tuning;
# - export to `torch.export` and ONNX with free batch and image sizes;
# - swap MixConv into a model that is not from this book;
# - print what any of the networks does to an image, stage by stage, from a terminal.
#
# **Know first:** [chapter 3](03_layer.ipynb) for the layer, [chapter 7](07_mixnet.ipynb) for the networks, [chapter 8](08_weights.ipynb) for weights.
#
# **Time:** 20 minutes to read. Runs in under 90 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt
import torch

from mixconv import mixnet_s
from mixconv.teaching import show, use_style

torch.manual_seed(0)
model = mixnet_s().eval()
boxes = []  # text, half the height, colour
for step, info in enumerate(model.feature_info):
    side, channels = 224 // info["reduction"], info["num_chs"]
    boxes.append((f"{channels}\nchannels\n{side}×{side}", 0.5 + 0.4 * (4 - step), "#9ecae1"))
for text in ("head\n1536\n7×7", "mean\n1536", "classifier\n1000"):
    boxes.append((text, 0.6, "#c7e9c0"))
arrow, small = {"arrowstyle": "->"}, {"family": "monospace", "fontsize": 8.5, "va": "top"}
calls = {"forward_features(x)": (5, -2.5), "with num_classes=0:\nmodel(x)": (6, -1.55),
         "model(x)": (7, -0.95)}  # fmt: skip

# %% tags=["drawing"]
# fold: The code that draws this
use_style()
figure, axis = plt.subplots(figsize=(8.4, 3.6))
for step, (text, height, color) in enumerate(boxes):
    axis.add_patch(plt.Rectangle((step, -height), 0.8, 2 * height, color=color))
    axis.text(step + 0.4, 0, text, ha="center", va="center", fontsize=8)
    axis.annotate("", (step, 0), (step - 0.2, 0), arrowprops=arrow)
    if step < 5:
        axis.annotate("", (step + 0.4, -3.0), (step + 0.4, -height), arrowprops=arrow)
for text, (step, drop) in calls.items():
    axis.annotate("", (step + 0.4, drop), (step + 0.4, -0.6), arrowprops=arrow)
    axis.text(step + 0.3, drop - 0.1, text, **small)
axis.text(2.4, -3.1, "features(x)", ha="center", **small)
axis.text(7.4, 1.9, "reset_classifier(10)\nputs in another", ha="center", **small)
axis.annotate("", (7.4, 0.65), (7.4, 1.2), arrowprops=arrow)
axis.text(-0.25, 0, "image\n224×224", ha="right", va="center", fontsize=8)
axis.set(xlim=(-1.0, 8.9), ylim=(-3.6, 2.4), xticks=[], yticks=[])
axis.spines[:].set_visible(False)
show(
    figure,
    "what_to_call.png",
    "MixNet-S as a row of boxes from the image to the classifier: five stages from 112×112 to 7×7 "
    "pixels, head, mean, classifier. Arrows show what is taken out where: features after each of "
    "the five stages, forward_features after the head, the mean from model(x) with num_classes=0, "
    "scores at the end; reset_classifier changes the last box.",
    caption="There are four places to take something out, and one to put another classifier in.",
)

# %% [markdown]
# ## Install
#
# ```bash
# pip install .                # the package; needs torch, nothing else
# pip install ".[hub]"         # reads .safetensors files and hub names
# pip install ".[export]"      # ONNX export and ONNX Runtime
# ```
#
# ## Scores
#
# A network, an image between 0 and 1, the normalisation that it was trained with, and the highest scores. The book's environment holds one trained network, EfficientNet-Lite0 (chapter 9). It is called as a MixNet is, but normalises its images in its own way:

# %%
from mixconv.efficientnet_lite import (
    class_names,
    efficientnet_lite0,
    find_weights,
    preprocess_lite,
)
from mixconv.teaching import photograph

trained = efficientnet_lite0(find_weights()).eval()
with torch.no_grad():
    scores = trained(preprocess_lite(photograph(224))).softmax(dim=1)
top = scores[0].topk(5)
for index, score in zip(top.indices.tolist(), top.values.tolist(), strict=True):
    print(f"{score:4.0%} {class_names()[index]}")

# %% [markdown]
# The classes are ImageNet's 1,000. Chapter 9 had "suit" first, for the same photograph: it cut a part out of the middle. A network answers for the pixels that it is given.
#
# Save and load weights as with any module. The MixNet of this page is untrained: its scores would mean nothing. `mixnet_s` takes the file by itself, checks it, and says what is wrong if it does not fit.

# %%
import tempfile
from pathlib import Path

from mixconv import mixnet_m

folder = tempfile.TemporaryDirectory()
file = Path(folder.name) / "mine.pth"
torch.save(model.state_dict(), file)
again = mixnet_s(weights=file).eval()
x = torch.randn(1, 3, 96, 96)
with torch.no_grad():
    print("same logits:", torch.equal(model(x), again(x)))
try:
    mixnet_m(weights=file)
except ValueError as error:
    print(str(error)[:120], "…")

# %% [markdown]
# With the `hub` extra and a network connection, `mixnet_s(weights="timm/tf_mixnet_s.in1k")` downloads the official ImageNet weights once, in timm's conversion, and keeps them in a cache. The name decides padding and epsilon. It is not run here: nothing in this book is downloaded.
#
# ## Faster
#
# A network that only answers, and learns no more, should go through `fuse_for_inference`. It gives a copy that computes the same, with norms folded and whole blocks as one operation (chapter 16). The report says what was done.

# %%
from mixconv import fuse_for_inference

fast = fuse_for_inference(trained)
image = preprocess_lite(photograph(224))
with torch.no_grad():
    torch.testing.assert_close(fast(image).softmax(1), scores, rtol=1e-3, atol=1e-5)
print(str(fast.fusion_report).splitlines()[0])

# %%
import json

bench = json.loads(Path("../figures/bench.json").read_text())
for row in [*bench["networks"], *bench["trained"]["rows"]]:
    if row["batch"] == 1:
        gain = row["seconds"]["split"] / row["seconds"]["fused"]
        print(f"{row['network']}, one image: {gain:.1f} times as fast")

# %% [markdown]
# It is fastest with a C++ compiler at hand: at first use it compiles the kernels, once, and keeps them. Without one it still folds and merges. Train first, fuse then: a fused copy refuses to be trained. In a module of your own, the one operation is `mixed_depthwise2d` (chapter 12).
#
# ## Features
#
# Without classes the network ends with the mean over pixels. `features` gives the five sizes for a detector.

# %%
from mixconv import mobilenet_v2
from mixconv.teaching import table

backbone = mobilenet_v2((3, 5, 7), num_classes=0, in_channels=1).eval()
with torch.no_grad():
    gray = torch.zeros(2, 1, 128, 160)
    print("features for retrieval:", tuple(backbone(gray).shape))
    found = zip(backbone.feature_info, backbone.features(gray), strict=True)
    rows = [[info["module"], info["reduction"], *maps.shape[1:]] for info, maps in found]
table(["after", "stride", "channels", "height", "width"], rows)

# %% [markdown]
# What is not on the list of features, a hook can fetch. Watch block 3 of MixNet-S, the first with three kernel sizes. A hook keeps what its depthwise layer gives, and `layer.partition` tells which maps come from which kernel.

# %%
from mixconv import preprocess

seen = {}
image = preprocess(photograph(224))
layer = model.blocks[3].depthwise.conv
hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(maps=output))
with torch.no_grad():
    model(image)
hook.remove()
print(layer)
groups = seen["maps"].split(layer.partition, dim=1)
for k, maps in zip(layer.kernel_sizes, groups, strict=True):
    print(f"feature maps of {k}×{k}:", tuple(maps.shape))

# %% [markdown]
# ## Fine-tuning
#
# A new classifier, and a choice of what to train: here the classifier and the MixConv layers. A single backward pass shows that gradients arrive there and nowhere else. (This book trains nothing.)
#
# Frozen weights are not frozen statistics. In training mode a batch normalisation updates its running mean and variance even when its weights are frozen. Put the frozen ones into evaluation mode.

# %%
from mixconv import MixConv2d

model.reset_classifier(10)
model.requires_grad_(False)
for module in model.modules():
    if isinstance(module, MixConv2d) or module is model.classifier:
        module.requires_grad_(True)
model.train()
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()
before = model.stem.norm.running_mean.clone()
torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
assert torch.equal(before, model.stem.norm.running_mean)
trained = {name for name, p in model.named_parameters() if p.grad is not None}
print(len(trained), "of", len(list(model.parameters())), "tensors have a gradient")
assert all(".convs." in name or name.startswith("classifier") for name in trained)

# %% [markdown]
# A common choice is to leave normalisations and biases without weight decay. Two groups of parameters do it: exercise 18.2.
#
# ## MixConv in your own model
#
# Write it in, as a depthwise layer with several kernel sizes:

# %%
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = MixConv2d(channels, (3, 5, 7), bias=True)
        self.norm = nn.GroupNorm(1, channels)
        self.widen = nn.Conv2d(channels, 4 * channels, 1)
        self.narrow = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x):
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(self.mix(x)))))


tuple(Block(24)(torch.zeros(1, 24, 14, 14)).shape)

# %% [markdown]
# Or swap it into a model that exists and may be trained. Ask for kernels at least as large as the old ones, and the model computes what it did before. Read the report: it names what was left alone.

# %%
from mixconv import replace_depthwise

yours = nn.Sequential(
    nn.Conv2d(3, 24, 4, stride=4), nn.Conv2d(24, 24, 5, padding=2, groups=24), nn.ReLU(),
    nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24), nn.AdaptiveAvgPool2d(1),
)  # fmt: skip
x = torch.randn(1, 3, 64, 64)
before = yours(x)
print(replace_depthwise(yours, (5, 7, 9)))
torch.testing.assert_close(yours(x), before)

# %% [markdown]
# ## Export
#
# `torch.export` records the network once and leaves batch and image size free. That includes TensorFlow's padding, which depends on the size. The exported program is then tried on a size it never saw, odd in one direction.

# %%
from torch.export import Dim, export

free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
other = torch.randn(3, 3, 75, 128)
for padding in ("same", "symmetric"):
    model = mixnet_s(num_classes=10, padding=padding).eval()
    program = export(model, (torch.randn(2, 3, 96, 96),), dynamic_shapes=(free,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other))
    print(f"padding {padding!r}: exported once, equal at", tuple(other.shape))

# %% [markdown]
# The same for ONNX, for one layer with all that is difficult in it: four kernel sizes, stride 2, TensorFlow's padding. (`tests/peers` does it for the whole network.) ONNX knows nothing of our operations. The backend "merged" of `fuse_for_inference` makes do with ordinary convolutions: it goes in front of an export, and the four convolutions become one.

# %%
import warnings

import numpy as np
import onnxruntime

layer = MixConv2d(16, (3, 5, 7, 9), stride=2, padding="same").eval()
merged = fuse_for_inference(layer, backend="merged")
print(type(merged).__name__, merged.kernel_size)
path = str(Path(folder.name) / "layer.onnx")
sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
with warnings.catch_warnings(action="ignore"):  # the exporter warns of its own future
    torch.onnx.export(
        merged, (torch.randn(2, 16, 12, 14),), path,
        dynamo=True, dynamic_shapes=sizes, verbose=False,
    )  # fmt: skip
session = onnxruntime.InferenceSession(path)
x = torch.randn(1, 16, 9, 20)
with torch.no_grad():
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    print("equal in ONNX Runtime:", np.allclose(result, layer(x).numpy(), atol=1e-5), result.shape)
folder.cleanup()

# %% [markdown]
# ## From the terminal
#
# `mixconv` (or `python -m mixconv`) pushes a black image through a network and prints what comes out of each stage: shape, parameters and multiply-adds. A stage ends where the stride changes. Here is how that is put together.
#
# First, the stages of a network, as the modules that belong to each:

# %%
#| export __main__.py
"""`mixconv`, or `python -m mixconv`: what a network does, stage by stage (chapter 18)."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixconv.formulation import count_costs
from mixconv.network import ConvNet


def stages(model: ConvNet) -> list[tuple[str, list[str]]]:
    """The stages of a network: a title, and the names of the modules in it."""
    ends = [str(info["module"]) for info in model.feature_info]
    members: list[list[str]] = [["stem"]]
    for index in range(len(model.blocks)):
        if members[-1][-1] in ends:
            members.append([])
        members[-1].append(f"blocks.{index}")
    titles = [f"stride {info['reduction']}" for info in model.feature_info]
    named = list(zip(titles, members, strict=True))
    last = [name for name in ("head", "classifier") if list(model.get_submodule(name).parameters())]
    return named + [(name, [name]) for name in last]


# %%
torch.manual_seed(0)
model = mixnet_s().eval()
[(title, f"{modules[0]} to {modules[-1]}") for title, modules in stages(model)]


# %% [markdown]
# Then a row for each: shape of the output from a forward hook, costs from chapter 1's counter.

# %%
#| export __main__.py
def output_shapes(model: nn.Module, names: Sequence[str], x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what the named modules return when the model runs on `x`."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [shapes[name] for name in names]


# %%
output_shapes(model, ["stem", "blocks.15"], torch.zeros(1, 3, 64, 64))

# %%
#| export __main__.py
StageRow = tuple[str, str, str, int, int]


def stage_rows(model: ConvNet, x: Tensor) -> list[StageRow]:
    """Title, last module, output shape, parameters and multiply-adds of each stage, and a sum."""
    parts = stages(model)
    shapes = output_shapes(model, [members[-1] for _, members in parts], x)
    costs = count_costs(model, x)
    rows: list[StageRow] = []
    for (title, members), shape in zip(parts, shapes, strict=True):
        inside = tuple(f"{name}." for name in members)
        work = sum(c.multiply_adds for c in costs if f"{c.name}.".startswith(inside))
        weights = sum(p.numel() for name in members for p in model.get_submodule(name).parameters())
        rows.append((title, members[-1], "×".join(map(str, shape)), weights, work))
    total = sum(parameter.numel() for parameter in model.parameters())
    return [*rows, ("sum", "", "", total, sum(cost.multiply_adds for cost in costs))]


# %%
from mixconv.teaching import table

rows = stage_rows(model, torch.zeros(1, 3, 224, 224))
assert rows[-1][3:] == (4_134_606, 239_173_360)
table(["stage", "ends with", "output", "parameters", "multiply-adds"], rows)

# %% [markdown]
# A photograph instead of a black image: cut to the wanted shape, scaled, normalised. Reading the file needs Pillow, which is not a requirement of the package.
#
# The network should see what a viewer shows, and Pillow alone does not give that. Phones store a picture as the sensor lay and note the rotation beside it. Sixteen-bit gray values are clipped, not scaled, when converted. What is transparent has some colour underneath. Each of them gives a picture, no error, and wrong scores.

# %% tags=["plumbing"]
# fold: How a picture becomes what a viewer shows
#| export __main__.py
from collections.abc import Callable
from typing import Any

from mixconv.mixnet import preprocess


def as_shown(picture: Any) -> Any:
    """A Pillow picture as a viewer shows it: in RGB, turned upright, on white.

    Raises:
        ValueError: for pixels of 32 bits, which say nothing about what is black and what white.
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    sixteen = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")
    if sixteen:
        picture = picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {picture.mode}) have no known range; save as 8-bit")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


# %% tags=["plumbing"]
# fold: Three pictures that Pillow alone gets wrong
from PIL import Image

upright = Image.new("RGB", (3, 2), "red")
turned = upright.getexif()
turned[0x0112] = 6  # "turn me by 90 degrees": orientation, as a phone writes it
half = Image.new("I;16", (1, 1), 32896)

# %% tags=["plumbing"]
# fold: What comes of them
clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
print("turned:", as_shown(upright).size, "for", upright.size)
print(
    "half of 65535:",
    as_shown(half).getpixel((0, 0)),
    "and not",
    half.convert("RGB").getpixel((0, 0)),
)
print(
    "transparent black:",
    as_shown(clear).getpixel((0, 0)),
    "and not",
    clear.convert("RGB").getpixel((0, 0)),
)


# %%
#| export __main__.py
def read_image(
    path: str, height: int, width: int, normalise: Callable[[Tensor], Tensor] = preprocess
) -> Tensor:
    """An image file as a normalised batch of one: largest centred crop, scaled, normalised.

    Args:
        path: a file that Pillow can read.
        height: rows wanted.
        width: columns wanted.
        normalise: as the network's training did.

    Raises:
        ValueError: if the file cannot be read as an image, or is larger than Pillow allows.
        ImportError: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ImportError("pictures need Pillow: pip install pillow") from None
    try:
        with Image.open(path) as file:
            image = ImageOps.fit(as_shown(file), (width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"picture {path!r}: {error}") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return normalise(pixels.view(1, height, width, 3).permute(0, 3, 1, 2) / 255)


# %% [markdown]
# The rest is arguments.

# %%
#| export __main__.py
from mixconv.mobilenet import mobilenet_v1, mobilenet_v2
from mixconv.zoo import mixnet_l, mixnet_m, mixnet_s

_MIXNETS = {"mixnet_s": mixnet_s, "mixnet_m": mixnet_m, "mixnet_l": mixnet_l}
_MOBILENETS = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}


# %%
#| export __main__.py
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixconv",
        description="Push an image through a network; print shapes and costs stage by stage.",
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=[*_MOBILENETS, *_MIXNETS],
        help="one or more networks (mobilenet_v2 mixnet_s)")  # fmt: skip
    add("--size", nargs="+", type=int, default=[224], metavar="N",
        help="height and width, or one number for both (224)")  # fmt: skip
    add("--kernel-sizes", nargs="+", type=int, metavar="K",
        help="kernel mix of the MobileNets (3 5 7)")  # fmt: skip
    add("--partition", choices=["equal", "exponential", "logarithmic"],
        help="how the MobileNets split channels (equal)")  # fmt: skip
    add("--image", metavar="PATH", help="a picture to use in place of a black image")
    add("--weights", metavar="PATH_OR_NAME", help="weights of a MixNet; untrained without")
    return parser


# %% tags=["plumbing"]
# fold: Which options go together
#| export __main__.py
_LARGEST = 4096  # pixels a side: beyond, the maps fill the memory


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the program with a message if it makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    named = options.model or []
    if len(options.size) > 2 or not 1 <= min(options.size) <= max(options.size) <= _LARGEST:
        parser.error(f"--size takes one or two numbers from 1 to {_LARGEST}, got {options.size}")
    if options.weights is not None and not set(named) & set(_MIXNETS):
        parser.error("--weights are for MixNets; name one with --model")
    if options.weights is not None and len(named) > 1:
        parser.error(f"--weights belong to one network, got {len(named)}: {', '.join(named)}")
    for option in ("kernel_sizes", "partition"):
        if getattr(options, option) is not None and set(named) & set(_MIXNETS):
            flag = option.replace("_", "-")
            parser.error(f"--{flag} is for MobileNets; a MixNet's blocks have their own")
    options.model = named or ["mobilenet_v2", "mixnet_s"]
    options.kernel_sizes = options.kernel_sizes or [3, 5, 7]
    options.partition = options.partition or "equal"
    return options


# %%
#| export __main__.py
def build(name: str, options: argparse.Namespace) -> ConvNet:
    """The network of that name, in evaluation mode."""
    torch.manual_seed(0)
    if name in _MIXNETS:
        return _MIXNETS[name](options.weights).eval()
    make = _MOBILENETS[name]
    return make(tuple(options.kernel_sizes), partition=options.partition).eval()


def print_stages(model: ConvNet, x: Tensor) -> None:
    """Print the table of a network's stages, in columns."""
    lines = [("stage", "ends with", "output", "parameters", "multiply-adds")]
    lines += [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in stage_rows(model, x)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join(cells).rstrip())


# %%
#| export __main__.py
def report(name: str, model: ConvNet, x: Tensor, options: argparse.Namespace) -> None:
    """Print what a network does to an input and, for an image, its highest scores."""
    kernels = "" if name in _MIXNETS else f", kernels {tuple(options.kernel_sizes)}"
    print(f"\n{name}{kernels}, input {'×'.join(map(str, x.shape))}")
    print_stages(model, x)
    if options.image is not None and options.weights is None:
        print("the weights are random: no scores to show (give some with --weights)")
    elif options.image is not None:
        with torch.no_grad():
            top = model(x)[0].softmax(0).topk(5)
        scores = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        print("highest scores:", ", ".join(f"class {i} {score:.1%}" for i, score in scores))


# %% [markdown]
# `mixconv predict PHOTO` names what a photograph shows. A MixNet answers where its weights are given. Without, the answer comes from chapter 9's trained network, and the command says so.

# %%
#| export __main__.py
from mixconv.efficientnet_lite import (
    class_names,
    efficientnet_lite0,
    find_weights,
    preprocess_lite,
)


def choose_trained(
    options: argparse.Namespace,
) -> tuple[str, ConvNet, Callable[[Tensor], Tensor]]:
    """What to say of a network with trained weights, the network, and what it wants of images.

    Raises:
        ImportError: saying what to install, where there are no weights at all.
    """
    if options.weights:
        name = options.model or "mixnet_s"
        return f"{name} with {options.weights}", _MIXNETS[name](options.weights).eval(), preprocess
    told = "no --weights for a MixNet are given: EfficientNet-Lite0 answers (chapter 9)"
    return told, efficientnet_lite0(find_weights()).eval(), preprocess_lite


# %%
#| export __main__.py
def predict(arguments: Sequence[str]) -> None:
    """`mixconv predict PHOTO`: print the five highest classes by name."""
    parser = argparse.ArgumentParser(prog="mixconv predict", description=predict.__doc__)
    parser.add_argument("photo", metavar="PHOTO", help="a picture")
    parser.add_argument("--model", choices=[*_MIXNETS], help="whose weights they are (mixnet_s)")
    parser.add_argument("--weights", metavar="PATH_OR_NAME", help="trained weights of a MixNet")
    options = parser.parse_args(arguments)
    if options.model and not options.weights:
        parser.error(f"--model {options.model} needs --weights: it is untrained without")
    told, model, normalise = choose_trained(options)
    with torch.no_grad():
        top = model(read_image(options.photo, 224, 224, normalise))[0].softmax(0).topk(5)
    print(told)
    known = class_names() if model.num_classes == 1000 else None
    for index, score in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        print(f"{score:6.1%}  {known[index] if known else f'class {index}'}")


# %% tags=["plumbing"]
# fold: The command itself, and its exit status
#| export __main__.py
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["predict"]:
            predict(given[1:])
        else:
            options = parse(given)
            size = (options.size[0], options.size[-1])
            black = torch.zeros(1, 3, *size)
            x = black if options.image is None else read_image(options.image, *size)
            for name in options.model:
                report(name, build(name, options), x, options)
        print(end="", flush=True)  # where there is an output at all
        return 0
    except (ValueError, ImportError, OSError) as error:
        code = getattr(error, "errno", None)
        if code != errno.EPIPE:  # `mixconv | head` has seen enough; nothing is left to say
            print(f"mixconv: {error}", file=sys.stderr)
        if code in (errno.EPIPE, errno.ENOSPC):  # Python would try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__" and __package__:  # run as a command, not in the notebook
    sys.exit(main())

# %%
status = main(["--model", "mobilenet_v1", "--kernel-sizes", "3", "5", "7", "--size", "160"])

# %%
import matplotlib.cbook

photo = str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
status = main(["--model", "mixnet_s", "--image", photo, "--size", "96", "128"])

# %%
status = main(["predict", photo])

# %% [markdown]
# Here the largest square of the photograph is cut out and scaled. "Scores" above took a square from higher up; the shares differ.
#
# ## Exercises
#
# **18.1** ★ *3 minutes, two lines.* A detector wants maps of stride 8 and 16 from MixNet-M on pictures with one channel. Return the two maps.
#
# <details><summary>Hint: the idea</summary>
#
# `features` gives five maps, of strides 2, 4, 8, 16 and 32.
#
# </details>

# %%
from mixconv.teaching import attempt


def two_maps(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def test_maps(answer) -> None:
    with torch.no_grad():
        maps = answer(torch.zeros(1, 1, 64, 96))
    assert isinstance(maps, tuple), "two maps are wanted, as a tuple"
    eight, sixteen = maps
    shapes = tuple(eight.shape), tuple(sixteen.shape)
    wanted = (1, 40, 8, 12), (1, 120, 4, 6)
    assert shapes == wanted, f"maps of shapes {shapes}, wanted {wanted}"


attempt(two_maps, test_maps)


# %% tags=["solution"]
# fold: Solution
def two_maps_solution(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, eight, sixteen, _ = mixnet_m(in_channels=1).eval().features(pictures)
    return eight, sixteen


def one_early(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """count from 0: the first entry has stride 2, so stride 8 is the third"""
    maps = mixnet_m(in_channels=1).eval().features(pictures)
    return maps[1], maps[2]


def one_late(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """count from the end: the last entry has stride 32, so stride 16 is the one before"""
    maps = mixnet_m(in_channels=1).eval().features(pictures)
    return maps[-2], maps[-1]


attempt(two_maps_solution, test_maps, wrong=[one_early, one_late])


# %% [markdown]
# **18.2** ★★ *5 minutes, three lines.* Return two parameter groups for an optimiser: weights of convolutions and the classifier with `weight_decay` 1e-5, and everything with one dimension (normalisations, biases) with 0.
#
# <details><summary>Hint: the idea</summary>
#
# Weights of convolutions have four dimensions, the classifier's two, all others one. `p.dim()` tells.
#
# </details>

# %%
def groups(model: nn.Module) -> list[dict[str, object]]:
    raise NotImplementedError


def test_groups(answer) -> None:
    network = mixnet_s()
    given = answer(network)
    assert isinstance(given, list), "a list of two groups is wanted"
    decayed, free = given
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-5, 0), "decay first, then none"
    one_dimension = sum(p.dim() == 1 for p in decayed["params"])
    assert one_dimension == 0, f"{one_dimension} of the decayed have one dimension"
    more = sum(p.dim() > 1 for p in free["params"])
    assert more == 0, f"{more} of those without decay have more than one dimension"
    count = len(decayed["params"]) + len(free["params"])
    total = len(list(network.parameters()))
    assert count == total, f"{count} parameters in the groups, the network has {total}"


attempt(groups, test_groups)


# %% tags=["solution"]
# fold: Solution
def groups_solution(model: nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 1e-5}, {"params": free, "weight_decay": 0.0}]


def by_name(model: nn.Module) -> list[dict[str, object]]:
    """go by the name: normalisations have a `weight`, too"""
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
    free = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [{"params": decayed, "weight_decay": 1e-5}, {"params": free, "weight_decay": 0.0}]


def turned(model: nn.Module) -> list[dict[str, object]]:
    """decay the normalisations and leave the kernels free"""
    decayed, free = (group["params"] for group in groups_solution(model))
    return [{"params": free, "weight_decay": 1e-5}, {"params": decayed, "weight_decay": 0.0}]


def nothing_decayed(model: nn.Module) -> list[dict[str, object]]:
    """leave everything free: no rule is broken, and nothing decays"""
    free = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    return [{"params": [], "weight_decay": 1e-5}, *free]


attempt(groups_solution, test_groups, wrong=[by_name, turned, nothing_decayed])


# %% [markdown]
# **18.3** ★★ *10 minutes, four lines.* Freeze all of a MixNet but its classifier: no gradients, *and* no change of running statistics. The model is in training mode and stays there, so that dropout works. Change it in place.
#
# <details><summary>Hint: the idea</summary>
#
# `requires_grad` stops gradients. Running means are no parameters: they change in every forward pass of a normalisation that is in training mode.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `for parameter in model.parameters(): parameter.requires_grad_(False)`
#
# </details>

# %%
def freeze(model: nn.Module) -> None:
    raise NotImplementedError


def test_freeze(answer) -> None:
    model = mixnet_s(num_classes=3, width_multiplier=0.35).train()
    answer(model)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == {"classifier.weight", "classifier.bias"}, (
        f"with gradients: {sorted(wanted)[:4]}"
    )
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    moved = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
    assert not moved, f"{len(moved)} statistics have moved, the first is {moved[0]}"
    quiet = {type(part).__name__ for part in model.modules() if not part.training}
    assert not quiet & {"MixNet", "Dropout", "DropPath"}, "in evaluation mode there is no dropout"


attempt(freeze, test_freeze)


# %% tags=["solution"]
# fold: Solution
def freeze_solution(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def only_gradients(model: nn.Module) -> None:
    """stop the gradients and forget the statistics"""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))


def all_of_it(model: nn.Module) -> None:
    """put the whole model into evaluation mode, dropout included"""
    only_gradients(model)
    model.eval()


def one_norm(model: nn.Module) -> None:
    """put the first norm into evaluation mode and forget the other ones"""
    only_gradients(model)
    model.stem.norm.eval()


def all_inside(model: nn.Module) -> None:
    """put all parts into evaluation mode, with the dropout among them"""
    only_gradients(model)
    for part in model.children():
        part.eval()


attempt(freeze_solution, test_freeze, wrong=[only_gradients, all_of_it, one_norm, all_inside])

# %% [markdown]
# **18.4** ★★ *10 minutes, three lines.* Put mixes into a model that has kernels of several sizes, without changing what it computes: each depthwise layer of k×k gets k and k + 2. Return the report.
#
# <details><summary>Hint: the idea</summary>
#
# `replace_depthwise` takes a function of a layer's name and the layer, and asks it for each layer's sizes.
#
# </details>

# %%
from mixconv.surgery import ReplacementReport


def grow(model: nn.Module) -> ReplacementReport:
    raise NotImplementedError


def test_grow(answer) -> None:
    layers = [nn.Conv2d(8, 8, k, padding=k // 2, groups=8) for k in (3, 5, 7)]
    model, x = nn.Sequential(*layers), torch.randn(1, 8, 9, 9)
    before = model(x)
    report = answer(model)
    assert isinstance(report, ReplacementReport), f"the report, got {report!r}"
    sizes = [getattr(layer, "kernel_sizes", None) for layer in model]
    assert sizes == [(3, 5), (5, 7), (7, 9)], f"kernel sizes {sizes}"
    assert torch.allclose(model(x), before, atol=1e-5), "it computes something else now"


attempt(grow, test_grow)


# %% tags=["solution"]
# fold: Solution
def grow_solution(model: nn.Module) -> ReplacementReport:
    def wider(name: str, layer: nn.Conv2d) -> tuple[int, int]:
        return layer.kernel_size[0], layer.kernel_size[0] + 2

    return replace_depthwise(model, wider)


def one_mix(model: nn.Module) -> ReplacementReport:
    """give all layers one mix: larger kernels are then left alone"""
    return replace_depthwise(model, (3, 5))


def cropped(model: nn.Module) -> ReplacementReport:
    """crop what does not fit"""
    return replace_depthwise(model, (3, 5), crop=True)


attempt(grow_solution, test_grow, wrong=[one_mix, cropped])

# %% [markdown]
# ## Takeaways
# - To answer only: `fuse_for_inference(model)`, and `backend="merged"` before an export to ONNX.
# - `weights=`, `num_classes=0`, `features`, `reset_classifier`: the names you know.
# - Frozen weights are not frozen statistics.
# - Export keeps batch and size free, with either padding.
# - In your own model, write `MixConv2d` or call `replace_depthwise`, and read its report.
# - `mixconv` in a terminal shows what a network does, and what it costs, stage by stage.
#
# That is the end of the book. It began with a question, whether larger kernels always help, and the answer was: together with small ones, where they earn their cost. The second part made the mix about as cheap as it ought to be, and [chapter 16](16_model_rewritten.ipynb) lists which goals were missed. What is left to try: the GPU, which nobody here has timed, and your own network.
#
# Previous: [17 · On a GPU](17_gpu.ipynb)
