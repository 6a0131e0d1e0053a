# %% [markdown]
# # 8 · Fast: MixConv as one operation
#
# MixNet needs few multiply-adds, and the usual programs run it slowly all the same. Why, and what to do about it: fold, merge, and write the operation as one.
#
# **You will be able to**
# - tell from a layer's multiply-adds and bytes how fast it can be, and draw the roofline;
# - fold a batch norm and merge kernels, on paper and in code;
# - read a vectorised C++ kernel, built here in five steps, and call it as a PyTorch operation;
# - compute a whole network block as one operation, and say what that saves;
# - make any MixNet or MixConv model faster with one call.
#
# **Know first:** [chapter 3](03_layer.ipynb) and [chapter 4](04_blocks.ipynb). [Chapter 6](06_mixnet.ipynb) for the networks. C++: loops. From "The whole kernel" on there are templates, too; read the prose and skim the code.
#
# **Time:** 90 minutes to read. Runs in under 60 seconds on two cores, after the kernel has been compiled once.

# %% [markdown]
# Every time in this chapter comes from one file, `figures/bench.json`. `make bench` writes it. No cell here measures anything, so a slow day cannot change the book. Which machine that was:

# %%
import json
import logging
from pathlib import Path

from mixconv.teaching import table

logging.getLogger("mixconv").setLevel(logging.ERROR)  # this chapter also runs without a compiler
bench = json.loads(Path("../figures/bench.json").read_text())
machine, versions = bench["machine"], bench["versions"]
print(f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}")
print(", ".join(f"{name} {version}" for name, version in versions.items()))
print(f"load of the machine before the run: {machine['load_before']}")
print(f"multiply-adds: {machine['multiply_adds_per_second'] / 1e9:.0f} billion a second at most")
print(f"copying: {machine['copy_bytes_per_second'] / 1e9:.0f} GB a second (read plus written)")

# %% [markdown]
# A load above the number of cores means that other programs took their share. Then trust ratios more than times, and layers more than whole networks.
#
# ## Bytes, by hand
#
# One layer of MixNet-M: 14×14 pixels, 360 channels, kernels 3, 5, 7, 9 on 90 channels each, batch 1.
#
# **Multiply-adds.** Every output takes k² of them: 14 · 14 · 90 · (9 + 25 + 49 + 81) = 2,892,960.
#
# **Bytes.** Read the input once, write the output once, four bytes per number: 2 · 14 · 14 · 360 · 4 = 564,480.
#
# **Intensity.** 2,892,960 / 564,480 = 5.1 multiply-adds for each byte.
#
# So for one channel at stride 1 it is k² / 8, whatever the size of the image:
#
# | kernel | 3×3 | 5×5 | 7×7 | 9×9 | 11×11 |
# |---|---:|---:|---:|---:|---:|
# | multiply-adds per byte | 1.1 | 3.1 | 6.1 | 10.1 | 15.1 |
#
# A machine has such a number too: the multiply-adds it can do in the time it moves one byte. A layer with less than that waits for memory, and its multiply-adds are free.

# %%
peak, copying = machine["multiply_adds_per_second"], machine["copy_bytes_per_second"]
layer_work, layer_bytes = 14 * 14 * 90 * (9 + 25 + 49 + 81), 2 * 14 * 14 * 360 * 4
assert (layer_work, layer_bytes) == (2_892_960, 564_480)
print(f"this machine: {peak / copying:.0f} multiply-adds in the time of one byte")
print(f"this layer: {layer_work / layer_bytes:.1f}")

# %% [markdown]
# ## The roofline
#
# Time is at least the larger of work / peak and bytes / bandwidth. As a speed, against intensity:
#
# $$
# \mathrm{speed} \le \min\left(\mathrm{peak},\ \mathrm{bandwidth} \times \mathrm{intensity}\right)
# $$
#
# That is a slope and a flat part: a roof. Here it is, with every distinct depthwise layer of MixNet-S, M and L, at batch 8. Bandwidth is that of a copy between two large arrays. A small array stays in the cache, and may rise above the slope.

# %% tags=["drawing"]
import matplotlib.pyplot as plt
import numpy as np

from mixconv.teaching import kernel_color, show, use_style

use_style()
layers = [layer for layer in bench["layers"] if "fused" in layer["seconds"]]
BATCH = 8
figure, axis = plt.subplots(figsize=(7.2, 4.2))
intensity = np.geomspace(0.3, 40, 100)
axis.plot(intensity, np.minimum(peak, copying * intensity) / 1e9, color="black")
for row in (row for row in layers if row["batch"] == BATCH):
    x = row["multiply_adds"] / row["bytes"]
    before, after = (
        row["multiply_adds"] / row["seconds"][form] / 1e9 for form in ("timm", "fused")
    )
    color = kernel_color(max(row["kernel_sizes"]))
    axis.plot([x, x], [before, after], color=color, alpha=0.35, linewidth=1)
    axis.plot(x, before, "o", color="white", markeredgecolor=color, markersize=5)
    axis.plot(x, after, "o", color=color, markersize=5)
for k in (3, 5, 7, 9, 11):
    axis.plot([], [], "o", color=kernel_color(k), label=f"up to {k}×{k}")
axis.plot([], [], "o", color="white", markeredgecolor="black", label="split (timm)")
axis.plot([], [], "o", color="black", label="one operation")
axis.legend(loc="lower right", fontsize=8)
axis.set(xscale="log", yscale="log", xlabel="multiply-adds per byte",
         ylabel="billion multiply-adds per second")  # fmt: skip
axis.annotate("bandwidth", (0.5, copying * 0.62 / 1e9), rotation=32, fontsize=9)
axis.annotate("peak", (25, peak * 1.1 / 1e9), fontsize=9)
show(
    figure,
    "roofline.png",
    "Speed against intensity for MixNet's depthwise layers at batch 8, with the machine's roof. "
    "The single operation lies above the split form for every layer, and mostly near the roof.",
)

# %% [markdown]
# Hollow: split, convolve, concatenate. Full: what this chapter builds. Nothing about the arithmetic keeps the hollow ones down.
#
# ## Why split, convolve, concatenate is slow
#
# Follow the bytes of one layer with g groups.
#
# - **Copies.** The convolutions read C channels and write C channels. Then the concatenation reads those and writes them again. Twice the traffic, for nothing.
# - **Calls.** g convolutions and one concatenation, each some microseconds to start. A small layer is over in ten.
# - **Layout.** In memory order (N, C, H, W) neighbours are pixels of one channel. A vector of 16 numbers does not fit a row of 14 or 7 pixels, and every shift by one pixel is misaligned. With channels last, (N, H, W, C), neighbours are *channels* of one pixel: a depthwise convolution does the same to all of them. But then split gives views with gaps.
# - **Cache.** Between two calls, what was in the cache may be gone.
#
# The same operation in four forms, as ratios to the first (geometric means over MixNet's layers with two or more groups; more is better):

# %%
from statistics import geometric_mean

FORMS = {
    "split (timm)": "timm",
    "split, channels last": "timm_channels_last",
    "merged, channels last": "merged",
    "one operation": "fused",
}


def speedup(form: str, batch: int, groups: int = 2) -> float:
    """How many times as fast as timm's split form, over layers with at least so many groups."""
    rows = [r for r in layers if r["batch"] == batch and len(r["channels"]) >= groups]
    return geometric_mean(r["seconds"]["timm"] / r["seconds"][form] for r in rows)


batches = sorted({row["batch"] for row in layers})
table(
    ["form", *(f"batch {batch}" for batch in batches)],
    [[name, *(f"{speedup(f, b):.1f}" for b in batches)] for name, f in FORMS.items()],
)

# %% [markdown]
# ## The operation
#
# Before making it fast, say what it is. One operation holds several groups, each with kernel size and dilation of its own, and a stride and padding they share. It also adds a bias and applies an activation, since the output is at hand.

# %%
#| export fast.py
"""MixConv as one operation, and models rewritten for inference (chapter 8).

`mixed_depthwise2d` runs a C++ kernel, compiled at first use; without a compiler, one merged
convolution. `inverted_residual` does the same for a whole network block. `fuse_for_inference`
rewrites a model to use them.
"""

from typing import NamedTuple

from mixconv.layer import PADDINGS, same_padding

ACTIVATIONS = ("none", "relu", "silu", "relu6")  # in the order of the kernel's enum


class Mix(NamedTuple):
    """What the operation computes: an entry for each group, and what the groups share.

    Attributes:
        channels: of each group.
        kernel_sizes: odd, one a group.
        stride: of rows and columns.
        dilations: one a group.
        padding: "symmetric" or "same".
        activation: "none", "relu", "silu" or "relu6".
    """

    channels: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    stride: int
    dilations: tuple[int, ...]
    padding: str
    activation: str


class Pad(NamedTuple):
    """Zeros around one group's input, in pixels; `reach` is what its kernel spans."""

    top: int
    bottom: int
    left: int
    right: int
    reach: int


# %%
#| export fast.py
def pads(mix: Mix, height: int, width: int) -> list[Pad]:
    """The zeros that each group of the operation needs on an image of this size."""
    result = []
    for k, dilation in zip(mix.kernel_sizes, mix.dilations, strict=True):
        half = dilation * (k // 2)
        rows = columns = (half, half)
        if mix.padding == "same":
            rows = same_padding(height, k, mix.stride, dilation)
            columns = same_padding(width, k, mix.stride, dilation)
        result.append(Pad(*rows, *columns, 2 * half + 1))
    return result


# %% [markdown]
# All weights lie in one flat tensor, group after group, as (k, k, channels): channels innermost, as a channels-last kernel wants to read them. Packing is plain PyTorch, so gradients flow through it.

# %%
#| export fast.py
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """One flat tensor from the groups' kernels; gradients flow through.

    Shape:
        weights `(c, 1, k, k)` each, output one axis: `(k, k, c)` of each group in turn.
    """
    return torch.cat([weight.squeeze(1).permute(1, 2, 0).reshape(-1) for weight in weights])


def unpack_weights(weight: Tensor, mix: Mix) -> list[Tensor]:
    """The groups' kernels from `pack_weights`'s flat tensor.

    Shape:
        weight as `pack_weights` gives it, outputs `(c, 1, k, k)`.
    """
    shapes = list(zip(mix.kernel_sizes, mix.kernel_sizes, mix.channels, strict=True))
    parts = torch.split(weight, [a * b * c for a, b, c in shapes])
    return [
        part.view(shape).permute(2, 0, 1).unsqueeze(1)
        for part, shape in zip(parts, shapes, strict=True)
    ]


# %%
kernels = [torch.arange(18.0).view(2, 1, 3, 3), torch.full((1, 1, 1, 1), 99.0)]
pack_weights(kernels)


# %% [markdown]
# The two kernels of the first group alternate, weight by weight; the 1×1 kernel of the second group comes last.
#
# The definition again is split, convolve, concatenate. It is what everything below is checked against.

# %%
#| export fast.py
def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name in `ACTIVATIONS`, or "sigmoid"."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu, "silu": F.silu, "relu6": F.relu6, "sigmoid": torch.sigmoid,
    }  # fmt: skip
    return functions[activation](x) if activation != "none" else x


def split_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation as a convolution for each group, concatenated: the reference.

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`.
    """
    outputs = []
    groups = zip(x.split(mix.channels, 1), unpack_weights(weight, mix), mix.dilations, strict=True)
    around = pads(mix, x.shape[2], x.shape[3])
    for (part, kernel, dilation), pad in zip(groups, around, strict=True):
        padded = F.pad(part, (pad.left, pad.right, pad.top, pad.bottom))
        outputs.append(
            F.conv2d(padded, kernel, None, mix.stride, dilation=dilation, groups=len(kernel))
        )
    y = torch.cat(outputs, 1)
    return activate(y if bias is None else y + bias.view(-1, 1, 1), mix.activation)


# %% [markdown]
# It is the layer of chapter 3:

# %%
from mixconv import MixConv2d
from mixconv.teaching import check, check_rewrite

torch.manual_seed(0)
layer = MixConv2d(40, (3, 5, 7, 9), stride=2, padding="same", bias=True)
mix = Mix((10, 10, 10, 10), (3, 5, 7, 9), 2, (1, 1, 1, 1), "same", "none")
x = torch.randn(2, 40, 14, 15)
weight = pack_weights([conv.weight for conv in layer.convs])
bias = torch.cat([conv.bias for conv in layer.convs])
check(split_form(x, weight, bias, mix), layer(x), "layer and split form")


# %% [markdown]
# ## Merging, as algebra
#
# Call $w$ a kernel and $E w$ the same kernel with zeros around it. Adding zeros adds nothing:
#
# $$
# \sum_{i,j \in \mathrm{large}} (E w)_{i,j} \  x_{t+i,\ u+j} = \sum_{i,j \in \mathrm{small}} w_{i,j} \  x_{t+i,\ u+j}
# $$
#
# So g convolutions are one, with kernels of the largest size (chapter 3's `merged`). It buys fewer calls and no concatenation, and pays with multiplications by zero.
#
# Where does the small kernel sit in the large one? In the middle, nearly always. But take a 1×1 kernel at stride 2 with 'SAME' padding on six pixels. It needs no padding and looks at pixels 0, 2, 4. A 3×3 kernel there is centred on 1, 3, 5 (chapter 3). The 1×1 kernel must sit *left* of the middle. So compute the place from the paddings: tap 0 of a group that is padded by `top` belongs to row `most_top - top` of the large window.

# %%
#| export fast.py
def merge_kernels(weight: Tensor, mix: Mix, around: Sequence[Pad]) -> Tensor:
    """All kernels in windows of one size, each where its padding puts it.

    Shape:
        weight as `pack_weights` gives it, output `(C, 1, rows, columns)`.
    """
    top, left = max(pad.top for pad in around), max(pad.left for pad in around)
    rows = max(top - pad.top + pad.reach for pad in around)
    columns = max(left - pad.left + pad.reach for pad in around)
    merged = []
    groups = zip(unpack_weights(weight, mix), mix.dilations, around, strict=True)
    for kernel, d, pad in groups:
        larger = kernel.new_zeros(len(kernel), 1, rows, columns)
        i, j = top - pad.top, left - pad.left
        larger[:, :, i : i + pad.reach : d, j : j + pad.reach : d] = kernel
        merged.append(larger)
    return torch.cat(merged)


# %%
#| export fast.py
def merged_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation as one depthwise convolution with zeros in its kernels."""
    around = pads(mix, x.shape[2], x.shape[3])
    kernels = merge_kernels(weight, mix, around)
    ends = []
    for size, window, before in (
        (x.shape[3], kernels.shape[3], max(pad.left for pad in around)),
        (x.shape[2], kernels.shape[2], max(pad.top for pad in around)),
    ):
        spanned = (output_size(size, mix.stride) - 1) * mix.stride + window
        ends += [before, spanned - size - before]
    y = F.conv2d(F.pad(x, ends), kernels, bias, mix.stride, groups=x.shape[1])
    return activate(y, mix.activation)


def output_size(size: int, stride: int) -> int:
    """Rows or columns of the output: the same for both paddings and every odd kernel."""
    return (size + stride - 1) // stride


# %%
check(merged_form(x, weight, bias, mix), split_form(x, weight, bias, mix), "merged and split")
odd_one = Mix((20, 20), (1, 3), 2, (1, 1), "same", "none")
even, small = torch.randn(1, 40, 6, 6), pack_weights([torch.randn(20, 1, k, k) for k in (1, 3)])
check(
    merged_form(even, small, None, odd_one),
    split_form(even, small, None, odd_one),
    "merged and split, a 1×1 kernel at stride 2",
)
check_rewrite(
    lambda x, w, b: split_form(x, w, b, mix._replace(activation="silu")),
    lambda x, w, b: merged_form(x, w, b, mix._replace(activation="silu")),
    *(t.double() for t in (x, weight, bias)),
    what="split and merged",
)


# %% [markdown]
# ## Folding a batch norm
#
# In evaluation a batch norm is a line for each channel: it knows its mean $\mu$ and variance $v$, and computes $\gamma (y - \mu) / \sqrt{v + \epsilon} + \beta$. Collect:
#
# $$
# \mathrm{scale} = \frac{\gamma}{\sqrt{v + \epsilon}}, \qquad \mathrm{shift} = \beta - \mu \cdot \mathrm{scale}
# $$
#
# A convolution before it is linear. So scale its weights, and let the shift be its bias.
#
# **By hand.** Let a channel have weights (2, −4), bias 1, and μ = 3, v + ε = 4, γ = 6, β = 5. Then scale = 6 / 2 = 3 and shift = 5 − 3 · 3 = −4. Folded: weights (6, −12), bias 3 · 1 − 4 = −1. Try the input (1, 1): convolution 2 − 4 + 1 = −1, batch norm 6 · (−1 − 3) / 2 + 5 = −7. Folded: 6 − 12 − 1 = −7.

# %%
#| export fast.py
def norm_as_line(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that a batch norm in evaluation amounts to.

    Raises:
        ValueError: if the norm keeps no running statistics.

    Shape:
        Outputs `(C,)` each, float64.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def fold_line(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Put a scale and a shift of each output channel into a convolution, in place."""
    weight, dtype = conv.weight, conv.weight.dtype
    bias = 0 if conv.bias is None else conv.bias.double()
    conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), False)
    conv.bias = nn.Parameter((bias * scale + shift).to(dtype), False)


# %%
conv, norm = nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1, eps=0).eval()
with torch.no_grad():
    conv.weight.copy_(torch.tensor([2.0, -4.0]).view(1, 2, 1, 1))
    for value, number in ((conv.bias, 1), (norm.weight, 6), (norm.bias, 5)):
        value.fill_(number)
    norm.running_mean.fill_(3), norm.running_var.fill_(4)
    by_norm = norm(conv(torch.ones(1, 2, 1, 1)))
    fold_line(conv, *norm_as_line(norm))
    folded = conv(torch.ones(1, 2, 1, 1))
[t.flatten().tolist() for t in (conv.weight, conv.bias, by_norm, folded)]

# %% [markdown]
# ## Compiled at first use
#
# The C++ below lies in the package as text, beside the Python files. At first use the system's compiler turns it into a library, in the user's cache folder. Its name there holds a digest of source, compiler, flags and processor: each kind of machine gets its own, and a changed source a new one. What can go wrong: no compiler, no OpenMP, a read-only home, a damaged file, two processes at once, a process that forks.

# %%
#| export fast.py
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

log = logging.getLogger("mixconv")

# The first that compiles is taken: not every compiler has OpenMP or knows -march=native.
FLAGS = [
    ("-march=native", "-fopenmp"), ("-march=native", "-pthread"),
    ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-pthread"), ("-pthread",),
]  # fmt: skip
_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-ignored-attributes")


def compilers() -> list[list[str]]:
    """Compiler commands to try: `$CXX` alone where it is set, else the usual names."""
    if chosen := os.environ.get("CXX"):
        return [shlex.split(chosen)]
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return [[path] for path in found if path]


def _cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


# %%
#| export fast.py
def _cache_folder() -> Path:
    """The user's cache folder, or a private temporary one where that cannot be written."""
    default = os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(os.environ.get("XDG_CACHE_HOME") or default) / "mixconv"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="mixconv-"))


# %% [markdown]
# The compiler writes to a temporary name, and the result moves into place in one step. Two processes may race; both make the same file.

# %%
#| export fast.py
def _compile(command: Sequence[str], source: str, target: Path) -> str:
    """Compile to `target` in one step; returns the compiler's complaint, or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        full = [*command, *_COMMON_FLAGS, "-x", "c++", "-", "-o", name]
        done = subprocess.run(full, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip() or f"exit status {done.returncode}"
        os.chmod(name, 0o700)
        os.replace(name, target)
    except OSError as error:
        return str(error)
    finally:
        Path(name).unlink(missing_ok=True)
    return ""


# %%
#| export fast.py
def _version(command: Sequence[str]) -> str:
    """What a compiler says it is; nothing if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def _recipes(source: str) -> list[tuple[list[str], Path]]:
    """Commands to try, each with the file in the cache that it would make."""
    folder, cpu, recipes = _cache_folder(), _cpu_identity(), []
    for command in compilers():
        if not (version := _version(command)):
            continue
        for flags in FLAGS:
            parts = "\0".join((source, *command, version, *_COMMON_FLAGS, *flags, cpu))
            digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
            recipes.append(([*command, *flags], folder / f"mixconv-{digest}.so"))
    return recipes


# %%
#| export fast.py
def _find_or_build(name: str) -> ctypes.CDLL | None:
    """The library of one C++ file of the package; None, and a log line, if none can be made."""
    source, told = files("mixconv").joinpath(name).read_text(), False
    reason = "no C++ compiler found"
    for command, target in _recipes(source):
        if target.exists():
            with contextlib.suppress(OSError):  # a damaged file: make it again
                return ctypes.CDLL(str(target))
        if not told:
            log.warning("compiling %s, once on this machine: some seconds", name)
            told = True
        complaint = _compile(command, source, target)
        if not complaint:
            return ctypes.CDLL(str(target))
        reason = complaint.splitlines()[0]
    log.warning("%s not compiled (%s); the merged form is used", name, reason)
    return None


# %%
#| export fast.py
class _Libraries:
    """What this process has loaded. A forked child gets a fresh lock, and stays on one thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: dict[str, ctypes.CDLL | None] = {}
        self.forked = False

    def after_fork(self) -> None:
        # OpenMP's threads do not survive a fork, and GNU's would be waited for without end.
        self.lock, self.forked = threading.Lock(), True


_libraries = _Libraries()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _libraries.after_fork())


def load_library(name: str) -> ctypes.CDLL | None:
    """A C++ file of the package as a library, compiled at first use; any thread may call.

    Args:
        name: such as "mixed_depthwise2d.cpp".

    Returns:
        The library, or None where it cannot be compiled; one log line says why.
    """
    if name not in _libraries.loaded:
        with _libraries.lock:
            if name not in _libraries.loaded:
                _libraries.loaded[name] = _find_or_build(name)
    return _libraries.loaded[name]


# %% [markdown]
# ## The kernel, step by step
#
# Now the loops themselves, in C++, on channels last. First one group, stride 1, one image, channels a multiple of 16. Every step is checked against the one before, and timed by `make bench` on one thread.
#
# **Step 0: loops.** Chapter 1's loops, in another language. `x` and `y` are (height, width, channels).
#
# ```cpp
# //| export depthwise_steps.cpp
# // Steps towards mixed_depthwise2d.cpp: one group, stride 1, channels a multiple of 16.
# #include <cstdint>
# #include <vector>
#
# using Int = int64_t;
#
# extern "C" void step0_loops(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; ++c)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         float sum = 0;
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += w[(ky * k + kx) * channels + c] * x[(iy * width + ix) * channels + c];
#           }
#         y[(oy * width + ox) * channels + c] = sum;
#       }
# }
# ```
#
# **Step 1: sixteen channels at once.** A vector type holds 16 neighbouring channels. The compiler turns each `+` and `*` on it into one instruction (or a few, where vectors are shorter). The program stays the same; its numbers got wider.
#
# ```cpp
# //| export depthwise_steps.cpp
# constexpr int kLanes = 16;
# typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
#
# static Vec at(const float* p) { return *(const Vec*)p; }
#
# extern "C" void step1_lanes(const float* x, const float* w, float* y, Int height, Int width,
#                             Int channels, Int k) {
#   for (Int c = 0; c < channels; c += kLanes)
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx) {
#             const Int iy = oy + ky - k / 2, ix = ox + kx - k / 2;
#             if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
#             sum += at(w + (ky * k + kx) * channels + c) * at(x + (iy * width + ix) * channels + c);
#           }
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
# }
# ```
#
# **Step 2: no question in the inner loop.** Copy the plane of these 16 channels into a scratch with zeros around it. Then the border test goes.
#
# ```cpp
# //| export depthwise_steps.cpp
# static void copy_plane(const float* x, Int height, Int width, Int channels, Int c, Int pad,
#                        Vec* plane) {
#   const Int pitch = width + 2 * pad;
#   for (Int i = 0; i < (height + 2 * pad) * pitch; ++i) plane[i] = Vec{};
#   for (Int iy = 0; iy < height; ++iy)
#     for (Int ix = 0; ix < width; ++ix)
#       plane[(iy + pad) * pitch + ix + pad] = at(x + (iy * width + ix) * channels + c);
# }
#
# extern "C" void step2_scratch(const float* x, const float* w, float* y, Int height, Int width,
#                               Int channels, Int k) {
#   const Int pitch = width + k - 1;
#   std::vector<float> memory((height + k - 1) * pitch * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     for (Int oy = 0; oy < height; ++oy)
#       for (Int ox = 0; ox < width; ++ox) {
#         Vec sum{};
#         for (Int ky = 0; ky < k; ++ky)
#           for (Int kx = 0; kx < k; ++kx)
#             sum += at(w + (ky * k + kx) * channels + c) * plane[(oy + ky) * pitch + ox + kx];
#         *(Vec*)(y + (oy * width + ox) * channels + c) = sum;
#       }
#   }
# }
# ```
#
# **Step 3: rows in registers.** A multiply-add takes about four clock ticks, and a core can start two in every tick. But `sum += …` must wait for the sum before it. So compute 14 outputs of a row side by side: 14 sums that do not wait for one another, all in registers. Each weight is loaded once for all 14. The kernel size becomes a template parameter, so that the compiler writes the taps out.
#
# ```cpp
# //| export depthwise_steps.cpp
# template <int K>
# static void rows(const Vec* plane, const float* w, float* y, Int height, Int width,
#                  Int channels, Int c) {
#   constexpr int kTile = 14;  // the width must be a multiple of 14 in this step
#   const Int pitch = width + K - 1;
#   for (Int oy = 0; oy < height; ++oy)
#     for (Int ox = 0; ox < width; ox += kTile) {
#       Vec sums[kTile] = {};
#       for (int ky = 0; ky < K; ++ky)
# #pragma GCC unroll 16
#         for (int kx = 0; kx < K; ++kx) {
#           const Vec tap = at(w + (ky * K + kx) * channels + c);
# #pragma GCC unroll 16
#           for (int t = 0; t < kTile; ++t) sums[t] += tap * plane[(oy + ky) * pitch + ox + kx + t];
#         }
# #pragma GCC unroll 16
#       for (int t = 0; t < kTile; ++t) *(Vec*)(y + (oy * width + ox + t) * channels + c) = sums[t];
#     }
# }
#
# extern "C" void step3_rows(const float* x, const float* w, float* y, Int height, Int width,
#                            Int channels, Int k) {
#   std::vector<float> memory((height + k - 1) * (width + k - 1) * kLanes);
#   Vec* plane = (Vec*)memory.data();
#   for (Int c = 0; c < channels; c += kLanes) {
#     copy_plane(x, height, width, channels, c, k / 2, plane);
#     if (k == 3) rows<3>(plane, w, y, height, width, channels, c);
#     if (k == 5) rows<5>(plane, w, y, height, width, channels, c);
#     if (k == 7) rows<7>(plane, w, y, height, width, channels, c);
#     if (k == 9) rows<9>(plane, w, y, height, width, channels, c);
#   }
# }
# ```

# %% [markdown]
# Are the steps right? Each is compared with the one before, the first with PyTorch. (Where there is no compiler, there is nothing to compare.)

# %%
steps = load_library("depthwise_steps.cpp")


def run_step(name: str, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """One step on `(H, W, C)` with a `(C, 1, k, k)` kernel."""
    y, packed = torch.full_like(x, torch.nan), pack_weights([kernel])
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, packed, y)]
    getattr(steps, name)(*pointers, *map(ctypes.c_int64, (*x.shape, kernel.shape[-1])))
    return y


for k in (3, 5, 7, 9):
    image, kernel = torch.randn(13, 28, 32), torch.randn(32, 1, k, k)
    planes = image.permute(2, 0, 1)[None]
    before = F.conv2d(planes, kernel, padding=k // 2, groups=32)[0].permute(1, 2, 0)
    for name in ("step0_loops", "step1_lanes", "step2_scratch", "step3_rows") if steps else ():
        after = run_step(name, image, kernel)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        before = after
print("every step equals the one before it, for kernels 3, 5, 7 and 9")

# %% [markdown]
# And what did each step buy? Microseconds, one image, on one thread unless said. The last lines are the whole kernel of the next section.

# %%
rows = bench["steps"]
titles = [f"{r['size']}² × {r['channels']}, {r['kernel_size']}×{r['kernel_size']}" for r in rows]
table(
    ["step", *titles],
    [[name, *(f"{1e6 * r['seconds'][name]:.0f}" for r in rows)] for name in rows[0]["seconds"]],
)


# %% [markdown]
# Read it from top to bottom.
#
# - Step 1 gains about as much as the vector is wide. The loop was the problem, not the arithmetic.
# - Step 2 alone gains nothing: processors guess border tests well. It is what makes step 3 possible.
# - Step 3 breaks the wait of each sum for itself.
# - On 56×56 with 3×3, steps 2 and 3 cost more than they gain: the padded plane no longer fits the first-level cache. The whole kernel mends that.

# %% [markdown]
# ## The whole kernel
#
# Step 4 is the real one: any number of groups and channels, strides, dilations, both paddings, bias, activation, threads. It is below from its first line to its last, and `mixconv/mixed_depthwise2d.cpp` is extracted from these blocks. Four ideas are new.
#
# 1. **A ring of k rows.** The whole padded plane of a 56×56 layer does not fit the first-level cache. The k rows in use do. When the window moves down a row, the new row overwrites the oldest.
# 2. **Any channel count.** The last block of a group has fewer than 16 channels. Reading a full vector anyway is faster than a loop over the rest. It only must not leave the tensor, and of the results only the block's own are written.
# 3. **Neighbours on one thread.** Groups of 90 or 120 channels do not start on a cache line. Two threads that write to one line slow each other down, so a thread takes neighbouring blocks.
# 4. **Bands.** Rows are worked on a band at a time: few enough for the second-level cache, and enough bands to keep all threads busy.
#
# The vector is as wide as the machine's:
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# // Mixed depthwise convolution as one operation, float32, channels last.
# //
# //   y[n, oy, ox, c] = act(bias[c] + sum over ky, kx of w[ky, kx, c] *
# //       x[n, oy * stride + ky * dilation - top, ox * stride + kx * dilation - left, c])
# //
# // Channels come in groups, each with its own kernel size, dilation and padding (top, left).
# // The weights lie as (k, k, channels of the group), one group after another.
# #include <algorithm>
# #include <atomic>
# #include <cstdint>
# #include <cstring>
# #include <memory>
# #include <thread>
# #include <vector>
# #ifdef _OPENMP
# #include <omp.h>
# #endif
# #ifdef __linux__
# #include <sys/mman.h>
# #endif
#
# namespace {
#
# #if defined(__AVX512F__)
# constexpr int kLanes = 16, kTile = 14;  // 32 registers: 14 sums, a weight, room for inputs
# #elif defined(__AVX__)
# constexpr int kLanes = 8, kTile = 7;  // 16 registers
# #elif defined(__aarch64__)
# constexpr int kLanes = 4, kTile = 14;
# #else
# constexpr int kLanes = 4, kTile = 7;
# #endif
# constexpr int kShortTile = 7;            // MixNet's last layers are 7 pixels wide
# constexpr int64_t kBandBytes = 1 << 20;  // rows worked on: half of a common second-level cache
# constexpr uintptr_t kHugePage = 2 << 20, kFreshBytes = 32 << 20;
# constexpr int64_t kKeptBytes = 16 << 20;  // memory that a thread keeps from call to call
# constexpr int kChunksPerThread = 4;
# constexpr int64_t kCopyCost = 16;  // of reading a pixel and writing an output, in multiply-adds
# constexpr int64_t kSerialWork = 20000;  // vector multiply-adds: below, waking threads costs more
#
# typedef float Vec __attribute__((vector_size(kLanes * 4)));
# typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
# typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
# ```
#
# Loading and storing. `lanes` is less than a vector where there are fewer channels than that.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# template <int Size = kLanes>
# inline void copy_lanes(float* to, const float* from, int lanes) {  // kLanes, kLanes / 2, ..., 1
#   if (lanes & Size) std::memcpy(to, from, Size * sizeof(float));
#   if constexpr (Size > 1)
#     copy_lanes<Size / 2>(to + (lanes & Size), from + (lanes & Size), lanes);
# }
#
# inline Vec load(const float* from, int lanes) {
#   if (lanes == kLanes) return *reinterpret_cast<const LooseVec*>(from);
#   Vec v{};
#   copy_lanes(reinterpret_cast<float*>(&v), from, lanes);
#   return v;
# }
#
# // By value: taking an address would drive the sums out of their registers.
# inline void store(float* to, Vec v, int skip, int lanes) {
#   if (lanes == kLanes) *reinterpret_cast<LooseVec*>(to) = v;
#   else copy_lanes(to, reinterpret_cast<const float*>(&v) + skip, lanes);
# }
# ```
#
# SiLU is $x / (1 + e^{-x})$, and C++ has no exponential of a vector. Write $e^x = 2^n e^r$ with a small rest $r$. The power of two goes straight into the exponent bits of a float; $e^r$ is a short polynomial. Below $x = -80$ the result counts as zero. Left as it is, less than $10^{-32}$, it would soon be multiplied into *denormal* numbers, which take a processor many times as long as others.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# enum Activation { kNone = 0, kRelu = 1, kSilu = 2, kRelu6 = 3, kSigmoid = 4 };
# constexpr float kLowest = -80;  // below, a sigmoid counts as zero
#
# // n is the nearest integer to x / ln 2, so |r| <= ln 2 / 2.
# inline Vec exp_vec(Vec x) {
#   x = x < 87.0f ? x : Vec{} + 87.0f;  // a NaN becomes 87
#   x = x > -87.0f ? x : Vec{} - 87.0f;
#   const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
#   Vec shifted = x * 1.44269504f + kRound;
#   Vec n = shifted - kRound;
#   Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
#   Vec p = Vec{} + 1.0f / 5040;
#   for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
#     p = p * r + term;
#   IntVec power = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
#   return p * reinterpret_cast<Vec>(power);
# }
#
# template <int T>
# inline __attribute__((always_inline)) void activate(Vec (&sums)[T], int64_t activation) {
# #pragma GCC unroll 16
#   for (int t = 0; t < T; ++t) {
#     if (activation == kRelu || activation == kRelu6)
#       sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];  // written so that a NaN stays
#     if (activation == kRelu6) sums[t] = sums[t] > 6.0f ? Vec{} + 6.0f : sums[t];
#     if (activation == kSilu || activation == kSigmoid) {
#       const Vec above = activation == kSilu ? sums[t] : Vec{} + 1.0f;
#       const Vec value = above / (1.0f + exp_vec(-sums[t]));
#       const Vec kept = sums[t] == sums[t] ? value : sums[t];  // a NaN stays
#       sums[t] = sums[t] < kLowest ? Vec{} : kept;
#     }
#   }
# }
# ```
#
# What a call is, and what it is cut into. A *block* is up to 16 neighbouring channels of one group. Its *window* is the full vector that is read for it. (A network's blocks are something else; they come later, and share this code. What they add: a 1×1 convolution, `Pointwise`, computed on the way in, `Layer::expand`; where its weights begin, `Block::panel`; sums over pixels, `Task::sums`. Until then, skip `if (l.expand)` and `if (task.sums)`.)
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# struct Group {
#   int64_t channels, kernel, dilation, top, left;
# };
#
# constexpr int kPanel = 16;  // outputs of a 1x1 convolution whose weights lie together
#
# // A 1x1 convolution in equal groups of channels. Weights: for each group, for each kPanel of its
# // outputs, (inputs of the group, kPanel), with zeros for outputs that are not there.
# struct Pointwise {
#   const float *weight, *bias;
#   int64_t inputs, outputs, groups, activation;
#   int64_t group_inputs() const { return inputs / groups; }
#   int64_t group_outputs() const { return outputs / groups; }
#   int64_t panel(int64_t group, int64_t c) const {  // where the group's outputs from c on begin
#     const int64_t panels = (group_outputs() + kPanel - 1) / kPanel;
#     return (group * panels + c / kPanel) * group_inputs() * kPanel + c % kPanel;
#   }
# };
#
# struct Sizes {
#   int64_t batch, height, width, channels, out_height, out_width, stride, activation;
# };
#
# struct Layer : Sizes {
#   const float *x, *weight, *bias;
#   float* y;
#   const Pointwise* expand;  // what makes `channels` of fewer, on the way in; or null
#   int64_t pixel() const { return expand ? expand->inputs : channels; }  // numbers in x
# };
#
# struct Task {
#   int64_t image, row_begin, row_end;
#   float* sums;  // of each channel over these rows of one image, to be added to; or null
#   Vec* scratch;
# };
#
# struct Block {
#   Group group;
#   int64_t window;         // the vector's first channel in the tensor
#   int read, skip, lanes;  // lanes read of parameters; first lane to write, and how many
#   int64_t input;          // the first number to read of a pixel of x
#   int64_t weight;         // of the first channel to write; the next tap is group.channels on
#   int64_t panel;          // of the weights of `expand`, for the window
#   void (*convolve)(const Layer&, const Block&, const Task&);
# };
#
# // A vector of a parameter; what comes into lanes that are not written does not matter.
# inline Vec load_own(const float* first, const Block& b) {
#   if (b.read == kLanes) return load(first - b.skip, kLanes);
#   Vec v{};
#   copy_lanes(reinterpret_cast<float*>(&v) + b.skip, first, b.lanes);
#   return v;
# }
# ```
#
# Step 3's inner loop, with a stride. `K = 0` means that size, stride and dilation are known at run time only.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# // sums[t] += w[kx] * in[t * stride + kx * dilation]
# template <int K, int S, int T>
# inline __attribute__((always_inline)) void add_row(Vec (&sums)[T], const Vec* in, const Vec* w,
#                                                    const Block& b, int64_t stride) {
#   if constexpr (K > 0) {
# #pragma GCC unroll 16
#     for (int kx = 0; kx < K; ++kx) {
#       const Vec tap = w[kx];
# #pragma GCC unroll 16
#       for (int t = 0; t < T; ++t) sums[t] += tap * in[t * S + kx];
#     }
#   } else {
#     for (int64_t kx = 0; kx < b.group.kernel; ++kx) {
#       const Vec tap = w[kx];
# #pragma GCC unroll 16
#       for (int t = 0; t < T; ++t) sums[t] += tap * in[t * stride + kx * b.group.dilation];
#     }
#   }
# }
# ```
#
# The ring, in three functions. The weights lie behind it in the scratch. Rows above and below the image are skipped, not multiplied by zero: at 7×7 with a 9×9 kernel that saves a third of the work.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# struct Ring {
#   Vec* rows;                     // `reach` rows of `pitch` vectors, then the weights
#   int64_t reach, pitch;          // rows the kernel spans; vectors of a row, whole tiles
#   int64_t begin, end, next = 0;  // the image's columns; the first input row not yet inside
#   Vec* row(int64_t iy) const { return rows + iy % reach * pitch; }
#   Vec* taps() const { return rows + reach * pitch; }
# };
#
# inline Ring open_ring(const Layer& l, const Block& b, int64_t k, int64_t stride, int64_t dilation,
#                       int64_t tile, Vec* scratch) {
#   const Group& g = b.group;
#   const int64_t reach = (k - 1) * dilation + 1;
#   const int64_t pitch = ((l.out_width + tile - 1) / tile * tile - 1) * stride + reach;
#   Ring ring{scratch, reach, pitch, std::min(g.left, pitch), std::min(g.left + l.width, pitch)};
#   const float* weight = l.weight + b.weight;
#   for (int64_t i = 0; i < k * k; ++i) ring.taps()[i] = load_own(weight + i * g.channels, b);
#   for (int64_t i = 0; i < reach; ++i) {  // zeros left and right of the image
#     std::fill(ring.row(i), ring.row(i) + ring.begin, Vec{});
#     std::fill(ring.row(i) + ring.end, ring.row(i) + pitch, Vec{});
#   }
#   return ring;
# }
#
# inline void copy_row(const float* from, int64_t count, int64_t pixel, int64_t line, int lanes,
#                      Vec* to) {
#   if (lanes == kLanes) {
#     for (int64_t i = 0; i < count; ++i, from += pixel) {
#       __builtin_prefetch(from + line);  // the row below: a hint, harmless past the last row
#       to[i] = load(from, kLanes);
#     }
#   } else {
#     for (int64_t i = 0; i < count; ++i, from += pixel) to[i] = load(from, lanes);
#   }
# }
#
# void expand_row(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to);
#
# inline void fetch_rows(Ring& ring, const Layer& l, const Block& b, int64_t image, int64_t y0) {
#   const int64_t line = l.width * l.pixel(), count = ring.end - ring.begin;
#   for (ring.next = std::max(ring.next, y0); ring.next < std::min(l.height, y0 + ring.reach);
#        ++ring.next) {
#     const float* from = l.x + (image * l.height + ring.next) * line + b.input;
#     Vec* to = ring.row(ring.next) + ring.begin;
#     if (l.expand) expand_row(*l.expand, b, from, count, to);
#     else copy_row(from, count, l.channels, line, b.read, to);
#   }
# }
# ```
#
# One task: some output rows of one block of one image.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# template <int T>
# inline __attribute__((always_inline)) void store_row(const Vec (&sums)[T], const Layer& l,
#                                                      const Block& b, float* to, int64_t ox) {
#   if (ox + T <= l.out_width && b.lanes == kLanes) {
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t)
#       *reinterpret_cast<LooseVec*>(to + (ox + t) * l.channels) = sums[t];
#   } else {
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t)
#       if (ox + t < l.out_width) store(to + (ox + t) * l.channels, sums[t], b.skip, b.lanes);
#   }
# }
#
# inline void add_row_to_sums(const Layer& l, const Block& b, const float* row, float* sums) {
#   Vec total = load(sums, b.lanes);
#   for (int64_t ox = 0; ox < l.out_width; ++ox) total += load(row + ox * l.channels, b.lanes);
#   store(sums, total, 0, b.lanes);
# }
#
# template <int K, int S, int T>
# void convolve_rows(const Layer& l, const Block& b, const Task& task) {
#   const int64_t k = K ? K : b.group.kernel, stride = S ? S : l.stride;
#   const int64_t dilation = K ? 1 : b.group.dilation;
#   const int64_t first = b.window + b.skip, size = l.out_width * l.channels;
#   Ring ring = open_ring(l, b, k, stride, dilation, T, task.scratch);
#   const Vec bias = l.bias ? load_own(l.bias + first, b) : Vec{};
#   for (int64_t oy = task.row_begin; oy < task.row_end; ++oy) {
#     const int64_t y0 = oy * stride - b.group.top;
#     fetch_rows(ring, l, b, task.image, y0);
#     float* to = l.y + (task.image * l.out_height + oy) * size + first;
#     for (int64_t ox = 0; ox < l.out_width; ox += T) {
#       Vec sums[T];
# #pragma GCC unroll 16
#       for (int t = 0; t < T; ++t) {
#         sums[t] = bias;
#         __builtin_prefetch(to + (ox + t) * l.channels, 1);  // will be written: fetch it meanwhile
#       }
#       for (int64_t ky = 0; ky < k; ++ky) {
#         const int64_t iy = y0 + ky * dilation;
#         if (iy < 0 || iy >= l.height) continue;
#         add_row<K, S, T>(sums, ring.row(iy) + ox * stride, ring.taps() + ky * k, b, stride);
#       }
#       if (l.activation != kNone) activate(sums, l.activation);
#       store_row(sums, l, b, to, ox);
#     }
#     if (task.sums) add_row_to_sums(l, b, to, task.sums + first);
#   }
# }
# ```
#
# One compiled version for each common kernel size, stride and tile, and one for all the rest:
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# using ConvolveRows = decltype(Block::convolve);
#
# int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
#
# int tile_width(int64_t out_width) {  // the one with fewer outputs beyond the row's end
#   return round_up(out_width, kTile) <= round_up(out_width, kShortTile) ? kTile : kShortTile;
# }
#
# template <int K, int S>
# ConvolveRows for_tile(int64_t out_width) {
#   return tile_width(out_width) == kTile ? convolve_rows<K, S, kTile>
#                                         : convolve_rows<K, S, kShortTile>;
# }
#
# template <int K>
# ConvolveRows for_stride(const Layer& l) {
#   if (l.stride == 1) return for_tile<K, 1>(l.out_width);
#   if (l.stride == 2) return for_tile<K, 2>(l.out_width);
#   return for_tile<0, 0>(l.out_width);
# }
#
# ConvolveRows version_for(const Layer& l, const Group& g) {
#   switch (g.dilation == 1 ? g.kernel : 0) {
#     case 3: return for_stride<3>(l);
#     case 5: return for_stride<5>(l);
#     case 7: return for_stride<7>(l);
#     case 9: return for_stride<9>(l);
#     case 11: return for_stride<11>(l);
#     case 13: return for_stride<13>(l);
#     default: return for_tile<0, 0>(l.out_width);
#   }
# }
# ```
#
# Cutting a call into blocks. They end where the group ends, and at whole vectors of the *tensor*, so that stores stay on whole cache lines. (With an expansion, at whole vectors of its own weights.)
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# struct Plan {
#   Layer layer{};  // x, weight, bias and y are filled in at each call
#   Pointwise expand{};
#   int threads = 1;
#   std::vector<Block> blocks;
#   std::vector<int64_t> cost{0};  // cost[i]: of all blocks before block i, for one output pixel
#   int64_t scratch = 0;           // vectors that the largest ring and its weights take
#   int64_t band = 1, bands = 0;   // rows of a band, and how many bands
# };
#
# Block make_block(const Layer& l, const Group& g, int64_t channel, int64_t left) {
#   Block b{};
#   b.group = g;
#   b.convolve = version_for(l, g);
#   b.read = int(std::min<int64_t>(kLanes, l.channels));
#   b.lanes = int(std::min(left, kLanes - channel % kLanes));
#   b.window = b.input = std::min(channel, std::max<int64_t>(0, l.channels - kLanes));
#   b.skip = int(channel - b.window);
#   if (l.expand) {  // here the vectors are those of the 1x1 convolution's panels
#     const Pointwise& p = *l.expand;
#     const int64_t group = channel / p.group_outputs(), at = channel % p.group_outputs();
#     b.skip = int(at % kLanes);
#     b.read = b.lanes = int(std::min({left, kLanes - at % kLanes, p.group_outputs() - at}));
#     b.window = channel - b.skip;
#     b.input = group * p.group_inputs();
#     b.panel = p.panel(group, at - b.skip);
#   }
#   return b;
# }
#
# void cut_blocks(Plan& plan, const Group* groups, int64_t group_count) {
#   const Layer& l = plan.layer;
#   // For one output, the expansion makes stride x stride pixels.
#   const int64_t before = l.expand ? l.expand->group_inputs() * l.stride * l.stride : 0;
#   int64_t first = 0, weight = 0;
#   for (const Group* g = groups; g != groups + group_count; ++g) {
#     const int64_t reach = (g->kernel - 1) * g->dilation + 1;
#     const int64_t pitch = (round_up(l.out_width, tile_width(l.out_width)) - 1) * l.stride + reach;
#     plan.scratch = std::max(plan.scratch, reach * pitch + g->kernel * g->kernel);
#     for (int64_t c = 0; c < g->channels; c += plan.blocks.back().lanes) {
#       plan.blocks.push_back(make_block(l, *g, first + c, g->channels - c));
#       plan.blocks.back().weight = weight + c;
#       plan.cost.push_back(plan.cost.back() + g->kernel * g->kernel + kCopyCost + before);
#     }
#     first += g->channels;
#     weight += g->channels * g->kernel * g->kernel;
#   }
# }
#
# void cut_bands(Plan& plan) {
#   const Layer& l = plan.layer;
#   const int64_t tasks = std::max<int64_t>(1, l.batch * int64_t(plan.blocks.size()));
#   const int64_t wanted = std::max<int64_t>(1, kChunksPerThread * plan.threads / tasks);
#   const int64_t row_bytes =
#       (l.stride * l.width * l.pixel() + l.out_width * l.channels) * int64_t(sizeof(float));
#   const int64_t fit = kBandBytes / std::max<int64_t>(1, row_bytes);
#   // Not too few: neighbouring bands read, or expand, the rows they share twice.
#   const int64_t rows = std::max<int64_t>(4, std::min(round_up(l.out_height, wanted) / wanted, fit));
#   plan.band = std::max<int64_t>(1, std::min(l.out_height, rows));
#   plan.bands = (l.out_height + plan.band - 1) / plan.band;
# }
# ```
#
# The window never leaves its buffers. In the tensor it lies between channel 0 and C − 16. In the weights, each group has at least one weight for each channel before and after it, so stepping back by `skip` stays inside. Otherwise only the block's own lanes are read.
#
# Threads. Where the compiler has OpenMP, that is torch's own pool of threads. Each thread owns some chunks of equal *cost*; when done, it takes what others have left.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# template <typename Work>
# void in_parallel(int threads, const Work& work) {
#   if (threads <= 1) return work(0, 1);
# #ifdef _OPENMP
# #pragma omp parallel num_threads(threads)
#   work(omp_get_thread_num(), omp_get_num_threads());  // perhaps fewer than were asked for
# #else
#   std::vector<std::thread> others;
#   for (int i = 1; i < threads; ++i) others.emplace_back(work, i, threads);
#   work(0, threads);
#   for (std::thread& other : others) other.join();
# #endif
# }
#
# // Fresh memory costs more than the work done in it: a thread keeps what is not too large. `Use`
# // tells apart the pieces of memory that a thread uses at the same time.
# template <int Use>
# class Workspace {
#  public:
#   explicit Workspace(int64_t vectors) {
#     if (kept().size() < size_t(vectors + 1) * kLanes) kept().resize(size_t(vectors + 1) * kLanes);
#     const uintptr_t at = reinterpret_cast<uintptr_t>(kept().data());
#     vectors_ = reinterpret_cast<Vec*>((at + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
#   }
#   ~Workspace() {
#     if (kept().size() * sizeof(float) > kKeptBytes) std::vector<float>().swap(kept());
#   }
#   Workspace(const Workspace&) = delete;
#   Workspace& operator=(const Workspace&) = delete;
#   Vec* vectors() const { return vectors_; }
#   float* floats() const { return reinterpret_cast<float*>(vectors_); }
#
#  private:
#   static std::vector<float>& kept() {
#     static thread_local std::vector<float> memory;
#     return memory;
#   }
#   Vec* vectors_;
# };
#
# // Large tensors come as untouched memory; asking for large pages makes touching it cheaper.
# void advise(const Layer& l) {
# #ifdef __linux__
#   const int64_t size = l.batch * l.out_height * l.out_width * l.channels;
#   const uintptr_t begin = reinterpret_cast<uintptr_t>(l.y), end = begin + size * sizeof(float);
#   const uintptr_t from = (begin + kHugePage - 1) / kHugePage * kHugePage;
#   const uintptr_t to = end / kHugePage * kHugePage;
#   if (from < to && end - begin >= kFreshBytes)
#     madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
# #endif
# }
# ```
#
# The work. A task is one block on one band of one image.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# void run(const Layer& l, const Plan& plan, float* sums) {
#   const int64_t block_count = int64_t(plan.blocks.size()), band_cost = plan.cost.back();
#   const int64_t total = l.batch * plan.bands * band_cost;
#   const int threads = total * plan.band * l.out_width < kSerialWork ? 1 : plan.threads;
#   const int64_t chunks = int64_t(threads) * kChunksPerThread;
#   const auto task_at = [&](int64_t chunk) {  // the first task of a chunk: equal cost, not count
#     const int64_t at = total / chunks * chunk + total % chunks * chunk / chunks;
#     const auto block = std::lower_bound(plan.cost.begin(), plan.cost.end(), at % band_cost);
#     return at / band_cost * block_count + (block - plan.cost.begin());
#   };
#   std::vector<std::atomic<int64_t>> taken(threads);
#   in_parallel(threads, [&](int me, int) {
#     const Workspace<0> scratch(plan.scratch);
#     for (int i = 0; i < threads; ++i) {  // this thread's own chunks, then what others have left
#       const int owner = (me + i) % threads;
#       for (int64_t turn = taken[owner]++; turn < kChunksPerThread; turn = taken[owner]++) {
#         const int64_t chunk = owner * kChunksPerThread + turn;
#         for (int64_t task = task_at(chunk), end = task_at(chunk + 1); task < end; ++task) {
#           const Block& b = plan.blocks[size_t(task % block_count)];
#           const int64_t band = task / block_count % plan.bands, row = band * plan.band;
#           b.convolve(l, b, {task / block_count / plan.bands, row,
#                             std::min(l.out_height, row + plan.band),
#                             sums ? sums + band * l.channels : nullptr, scratch.vectors()});
#         }
#       }
#     }
#   });
# }
#
# }  // namespace
# ```
#
# And the functions that others call. A plan depends on sizes and the number of threads (and on where an expansion's weights lie), so it is made once and kept. Making it would be quick enough; but then it would lie in one core's cache, freshly written, and the other cores would wait for every line of it, in every call.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# extern "C" Plan* new_plan(const Sizes* sizes, const Pointwise* expand, const Group* groups,
#                           int64_t group_count, int threads) {
#   Plan* plan = new Plan;
#   static_cast<Sizes&>(plan->layer) = *sizes;
#   if (expand) {
#     plan->expand = *expand;
#     plan->layer.expand = &plan->expand;
#   }
#   plan->threads = threads;
#   cut_blocks(*plan, groups, group_count);
#   cut_bands(*plan);
#   return plan;
# }
#
# extern "C" void delete_plan(Plan* plan) { delete plan; }
#
# extern "C" void mixed_depthwise2d(const Plan* plan, const float* x, const float* weight,
#                                   const float* bias, float* y) {
#   Layer l = plan->layer;
#   l.x = x, l.weight = weight, l.bias = bias, l.y = y;
#   if (l.batch * l.out_height * l.out_width == 0) return;
#   advise(l);
#   run(l, *plan, nullptr);
# }
# ```

# %% [markdown]
# ## Called from Python
#
# `ctypes` needs `Sizes` and `Group` once more. It also lets go of Python's lock while the kernel runs. (`inverted_residual` is the kernel for whole network blocks; `expand` is for it, too.)

# %%
#| export fast.py
class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in (
            "batch", "height", "width", "channels", "out_height", "out_width", "stride",
            "activation",
        )
    ]  # fmt: skip


class _Group(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("channels", "kernel", "dilation", "top", "left")
    ]


@functools.cache
def load_kernel() -> Any:
    """The compiled kernel's library, or None where there is no compiler."""
    library = load_library("mixed_depthwise2d.cpp")
    if library is not None:
        pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.new_plan.argtypes = [pointer, pointer, pointer, size, count]
        library.new_plan.restype = pointer
        library.delete_plan.argtypes = [pointer]
        library.mixed_depthwise2d.argtypes = library.inverted_residual.argtypes = [pointer] * 5
        library.mixed_depthwise2d.restype = library.inverted_residual.restype = None
    return library


# %% [markdown]
# Who gives the kernel pointers must have checked the sizes first:

# %%
#| export fast.py
@functools.lru_cache(maxsize=1024)
def _check_mix(mix: Mix) -> tuple[int, int]:
    """How many channels and packed weights the operation has."""
    channels, sizes, stride, dilations, padding, activation = mix
    if not len(channels) == len(sizes) == len(dilations) > 0:
        raise ValueError("channels, kernel_sizes and dilations need an entry for each group")
    if min(channels) < 1 or any(k < 1 or k % 2 == 0 for k in sizes):
        raise ValueError(f"groups need channels and odd kernels, got {channels} and {sizes}")
    if stride < 1 or min(dilations) < 1:
        raise ValueError(f"stride and dilations must be positive, got {stride} and {dilations}")
    if padding not in PADDINGS or activation not in ACTIVATIONS:
        raise ValueError(
            f"padding must be one of {PADDINGS} and activation one of {ACTIVATIONS}, "
            f"got {padding!r} and {activation!r}"
        )
    return sum(channels), sum(c * k * k for c, k in zip(channels, sizes, strict=True))


# %%
#| export fast.py
def _check_sizes(mix: Mix, x: torch.Size, weight: torch.Size, bias: torch.Size | None) -> None:
    count, packed = _check_mix(mix)
    if len(x) != 4 or x[1] != count:
        raise ValueError(f"x must be (N, {count}, H, W), got {tuple(x)}")
    if len(weight) != 1 or weight[0] != packed:
        raise ValueError(f"weight must hold {packed} packed numbers, got {tuple(weight)}")
    if bias is not None and (len(bias) != 1 or bias[0] != count):
        raise ValueError(f"bias must be ({count},), got {tuple(bias)}")


def _check_kinds(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for other in (weight,) if bias is None else (weight, bias):
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError("x, weight and bias must agree in dtype and device")


# %% [markdown]
# Plans are kept for the last thousand combinations of layer, sizes and number of threads, so a call that repeats an earlier one checks no sizes and plans nothing. A plan that is no longer kept lives until the last call that uses it is over.

# %%
#| export fast.py
class _Plan:
    """A call's sizes, cut into blocks for so many threads; any thread may use it."""

    def __init__(self, library: Any, sizes: _Sizes, expand: Any, groups: Any, threads: int) -> None:
        self.delete = library.delete_plan
        point = None if expand is None else ctypes.byref(expand)
        self.handle = library.new_plan(ctypes.byref(sizes), point, groups, len(groups), threads)

    def __del__(self) -> None:
        self.delete(self.handle)


def _groups(mix: Mix, height: int, width: int) -> "ctypes.Array[_Group]":
    groups = zip(mix.channels, mix.kernel_sizes, mix.dilations, strict=True)
    entries = [
        _Group(*group, pad.top, pad.left)
        for group, pad in zip(groups, pads(mix, height, width), strict=True)
    ]
    return (_Group * len(entries))(*entries)


def _sizes(mix: Mix, size: torch.Size) -> _Sizes:
    out = output_size(size[2], mix.stride), output_size(size[3], mix.stride)
    activation = ACTIVATIONS.index(mix.activation)
    return _Sizes(size[0], *size[2:], sum(mix.channels), *out, mix.stride, activation)


# %%
#| export fast.py
@functools.lru_cache(maxsize=1024)
def _plan(
    library: Any, mix: Mix, x: torch.Size, weight: torch.Size, bias: torch.Size | None, threads: int
) -> tuple[_Plan | None, tuple[int, ...]]:
    """The plan for tensors of these sizes (None: rings too large), and the output's shape."""
    _check_sizes(mix, x, weight, bias)
    sizes = _sizes(mix, x)
    out = x[0], x[1], sizes.out_height, sizes.out_width
    if _ring_size(mix, x[3]) > _LARGEST_RING:
        return None, out
    return _Plan(library, sizes, None, _groups(mix, x[2], x[3]), threads), out


_LARGEST_RING = 1 << 22  # vectors; only extreme dilations need more, and then the split form runs


def _ring_size(mix: Mix, width: int) -> int:
    spans = (1 + d * (k - 1) for k, d in zip(mix.kernel_sizes, mix.dilations, strict=True))
    return max(span * (width + 16 * mix.stride + 2 * span) for span in spans)


def _threads() -> int:
    return 1 if _libraries.forked else torch.get_num_threads()


# %%
#| export fast.py
def kernel_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the compiled kernel: float32 on a CPU, output in channels_last.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    library, bias_size = load_kernel(), None if bias is None else bias.shape
    plan, size = _plan(library, mix, x.shape, weight.shape, bias_size, _threads())
    if plan is None:
        return split_form(x, weight, bias, mix).contiguous(memory_format=torch.channels_last)
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if mix.stride == 1:
        y = torch.empty_like(x)
    else:
        y = torch.empty(size, memory_format=torch.channels_last, dtype=x.dtype, device=x.device)
    bias_at = None if bias is None else bias.data_ptr()
    library.mixed_depthwise2d(plan.handle, x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr())
    return y


# %% [markdown]
# Now the operation in PyTorch's sense. Registered with `torch.library`, it appears in exported and compiled programs under its name. It needs three things: what it computes, the *fake* (the shape of the result, for tracers), and its gradient.
#
# It computes with the best form at hand: the kernel, Triton on a GPU, else the merged form. Dilated groups would merge into windows that are nearly all zeros, so those stay split.

# %%
#| export fast.py
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation in the fastest form that this machine, device and dtype allow."""
    _check_kinds(x, weight, bias)
    if x.dtype == torch.float32 and x.is_cpu and load_kernel() is not None:
        return kernel_form(x, weight, bias, mix)
    _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
    if x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None:
        return triton_form(x, weight, bias, mix)
    form = merged_form if set(mix.dilations) == {1} and not x.is_cuda else split_form
    return form(x, weight, bias, mix).clone(memory_format=torch.channels_last)


@torch.library.custom_op("mixconv::mixed_depthwise2d", mutates_args=())
def _operation(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int], padding: str,
    activation: str,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    return _forward(x, weight, bias, mix)


@_operation.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int], padding: str,
    activation: str,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    _check_kinds(x, weight, bias)
    _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
    size = (*x.shape[:2], output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# %% [markdown]
# The gradient is that of the split form, group by group: PyTorch's own `convolution_backward`. For the activation the sums before it are needed. They are computed again, which costs less than keeping them.

# %%
#| export fast.py
def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    channels, sizes, stride, dilations, padding, activation = inputs[3:]
    ctx.mix = Mix(tuple(channels), tuple(sizes), stride, tuple(dilations), padding, activation)


def _before_activation(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of the sums, from that of the activated result."""
    if ctx.mix.activation == "none":
        return grad
    plain = ctx.mix._replace(activation="none")
    sums: Tensor = torch.ops.mixconv.mixed_depthwise2d(*ctx.saved_tensors, *map(_as_list, plain))
    if ctx.mix.activation == "silu":
        gate = torch.sigmoid(sums)
        return grad * gate * (1 + sums * (1 - gate))
    ceiling = 6 if ctx.mix.activation == "relu6" else torch.inf
    return grad * ((sums > 0) & (sums < ceiling))


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# %%
#| export fast.py
def _group_gradients(
    x: Tensor, grad: Tensor, kernel: Tensor, pad: Pad, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of one group's input and kernel."""
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom))
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, padded, kernel, None, [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0],
        len(kernel), [True, True, False],
    )  # fmt: skip
    rows, columns = pad.top + x.shape[2], pad.left + x.shape[3]
    return x_grad[:, :, pad.top : rows, pad.left : columns], weight_grad


# %%
#| export fast.py
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    mix: Mix = ctx.mix
    grad = _before_activation(ctx, grad)
    groups = zip(
        x.split(mix.channels, 1), grad.split(mix.channels, 1), unpack_weights(weight, mix),
        pads(mix, x.shape[2], x.shape[3]), mix.dilations, strict=True,
    )  # fmt: skip
    pairs = [_group_gradients(part, g, w, pad, mix.stride, d) for part, g, w, pad, d in groups]
    x_grads, weight_grads = zip(*pairs, strict=True)
    bias_grad = None if bias is None else grad.sum((0, 2, 3))
    return torch.cat(x_grads, 1), pack_weights(weight_grads), bias_grad, *[None] * 6


_operation.register_autograd(_backward, setup_context=_remember)


# %% [markdown]
# PyTorch's dispatcher takes some 15 microseconds for an operation written in Python. That is as long as a small layer. Where nobody watches (no gradient, no tracer, no compiler), call the kernel directly.

# %%
#| export fast.py
def _is_watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient, tracer, mode or tensor subclass must see the operation."""
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        return True
    wants = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch._C._get_tracing_state() is not None or (wants and torch.is_grad_enabled())


# %%
#| export fast.py
def mixed_depthwise2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    channels: Sequence[int],
    kernel_sizes: Sequence[int],
    stride: int = 1,
    dilations: Sequence[int] | None = None,
    padding: str = "symmetric",
    activation: str = "none",
) -> Tensor:
    """Mixed depthwise convolution, bias and activation in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weight: packed by `pack_weights`. Pack once for inference; in every forward for training.
        bias: one number for each channel.
        channels: of each group; they add up to C.
        kernel_sizes: odd, one a group.
        stride: of rows and columns.
        dilations: one a group; 1 if left out.
        padding: "symmetric" or "same".
        activation: "none", "relu", "silu" or "relu6".

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`, channels_last.

    Raises:
        ValueError: for sizes, dtypes or names that do not fit together.

    Source: ours; the paper (section 3) says that MixConv "could be implemented as a single op".
    Chapter 8.
    """
    steps = (1,) * len(kernel_sizes) if dilations is None else tuple(dilations)
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, steps, padding, activation)
    return _call(x, weight, bias, mix)


# %%
#| export fast.py
def _call(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the shortest way that everybody who watches allows."""
    if not torch.compiler.is_compiling():
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if forward_mode or torch._C._are_functorch_transforms_active():  # they need its formulas
            _check_kinds(x, weight, bias)
            _check_sizes(mix, x.shape, weight.shape, None if bias is None else bias.shape)
            return split_form(x, weight, bias, mix)
        if not _is_watched(x, weight, bias):
            return _forward(x, weight, bias, mix)
    operation = torch.ops.mixconv.mixed_depthwise2d
    return cast("Tensor", operation(x, weight, bias, *map(_as_list, mix)))


# %% [markdown]
# Proof, in float32, so that it is the kernel that runs, with every activation, output and all gradients:

# %%
x, weight, bias = (t.detach() for t in (x, weight, bias))
for activation in ACTIVATIONS:
    mix = mix._replace(activation=activation)
    arguments = dict(mix._asdict())
    with torch.no_grad():
        result = mixed_depthwise2d(x, weight, bias, **arguments)
        torch.testing.assert_close(result, split_form(x, weight, bias, mix), rtol=1e-4, atol=1e-5)
    check_rewrite(
        lambda x, w, b, mix=mix: split_form(x, w, b, mix),
        lambda x, w, b, arguments=arguments: mixed_depthwise2d(x, w, b, **arguments),
        x.double(), weight.double(), bias.double(), what=f"split form and operation, {activation}",
    )  # fmt: skip

# %% [markdown]
# (The gradients are compared in float64, where rounding cannot hide a mistake; that runs the operation's merged form. `tests/package/test_fast.py` holds the kernel's own gradients to the split form's.)
#
# PyTorch has a checker of its own for registered operations: schema, fake, autograd, and tracing with unknown sizes.

# %%
inputs = [t.requires_grad_() for t in (x.clone(), weight.clone(), bias.clone())]
torch.library.opcheck(torch.ops.mixconv.mixed_depthwise2d.default, (*inputs, *map(_as_list, mix)))

# %% [markdown]
# ## The same on a GPU, in Triton
#
# Triton compiles a Python-like function for the GPU. One *program* computes a small tile: some rows and columns of 32 neighbouring channels of one group. All groups run in one launch: a table tells each program its group. The package does not need Triton; without it this section defines functions that nobody calls. Without a GPU, Triton can interpret its kernels on the CPU if asked before it is imported:
#
# Channels last again, for the same reason: neighbouring lanes read neighbouring addresses, whatever the width, stride or padding.

# %%
import os

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# %%
#| export triton_kernel.py
"""MixConv in Triton: all groups in one launch, channels last, forward (chapter 8).

Without Triton the module still imports; `AVAILABLE` says whether it can be used.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AVAILABLE = importlib.util.find_spec("triton") is not None
_triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None
constexpr: Any = tl.constexpr if AVAILABLE else int  # known when the kernel is compiled
_jit: Callable[[Callable[..., Any]], Any] = _triton.jit if AVAILABLE else lambda f: f


# %% [markdown]
# The taps: for each, one row of weights and one tile of inputs, with zeros outside the image. What looks like a number here is what Triton calls a block: a small array, worked on as a whole. (Triton does not understand type hints; hence none.)

# %%
#| export triton_kernel.py
@_jit
def _sum_taps(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, group, oy, ox, lanes, height, width, channels, stride, sums
):
    count, size, dilation, top, left, step = group
    used = lanes < count
    for ky in range(0, size):
        iy = oy * stride + ky * dilation - top
        for kx in range(0, size):
            ix = ox * stride + kx * dilation - left
            inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            tap = tl.load(weight_ptr + (ky * size + kx) * step + lanes, mask=used, other=0.0)
            at = x_ptr + (iy * width + ix)[:, None] * channels + lanes[None, :]
            value = tl.load(at, mask=inside[:, None] & used[None, :], other=0.0)
            sums += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return sums


# %%
#| export triton_kernel.py
@_jit
def _activate(sums, activation):  # type: ignore[no-untyped-def]
    if activation == 1:
        sums = tl.where(sums < 0, 0.0, sums)  # written so that a NaN stays
    elif activation == 2:
        sums = sums / (1.0 + tl.exp(-sums))
    elif activation == 3:
        sums = tl.where(sums < 0, 0.0, tl.where(sums > 6, 6.0, sums))
    return sums


# %% [markdown]
# A program: find the group in the table, find the tile, sum, add the bias, store.

# %%
#| export triton_kernel.py
@_jit
def _read_group(entry):  # type: ignore[no-untyped-def]
    first, count, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    dilation, top, left = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    return first, tl.load(entry + 6), (count, size, dilation, top, left, tl.load(entry + 7))


# %%
#| export triton_kernel.py
@_jit
def _mixed_depthwise(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr, table_ptr,
    height, width, channels, out_height, out_width, tiles,
    stride: constexpr, has_bias: constexpr, activation: constexpr,
    rows: constexpr, columns: constexpr, block: constexpr,
):  # fmt: skip
    first, start, group = _read_group(table_ptr + tl.program_id(1) * 8)
    image, lanes, tile = tl.program_id(2).to(tl.int64), tl.arange(0, block), tl.program_id(0)
    pixels, used = tl.arange(0, rows * columns), lanes < group[0]
    oy = tile // tiles * rows + pixels // columns
    ox = tile % tiles * columns + pixels % columns
    sums = tl.zeros((rows * columns, block), dtype=tl.float32)
    x_ptr += image * height * width * channels + first
    sums = _sum_taps(
        x_ptr, weight_ptr + start, group, oy, ox, lanes, height, width, channels, stride, sums
    )  # fmt: skip
    if has_bias:
        sums += tl.load(bias_ptr + first + lanes, mask=used, other=0.0)[None, :]
    at = (image * out_height + oy) * out_width + ox
    to = y_ptr + at[:, None] * channels + first + lanes[None, :]
    written = ((oy < out_height) & (ox < out_width))[:, None] & used[None, :]
    tl.store(to, _activate(sums, activation).to(y_ptr.dtype.element_ty), mask=written)


# %%
#| export triton_kernel.py
LANES = 32
Group = tuple[int, int, int, int, int]  # channels, kernel size, dilation, top, left


@functools.lru_cache(maxsize=256)
def _table(groups: tuple[Group, ...], device: torch.device) -> Tensor:
    """A row for each block of channels; large kernels first, since they take longest."""
    rows, first, weight = [], 0, 0
    for channels, size, *rest in groups:
        for start in range(0, channels, LANES):
            count = min(LANES, channels - start)
            rows.append([first + start, count, size, *rest, weight + start, channels])
        first, weight = first + channels, weight + channels * size * size
    return torch.tensor(sorted(rows, key=lambda row: -row[2]), dtype=torch.int32, device=device)


# %%
#| export triton_kernel.py
def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, groups: tuple[Group, ...],
    stride: int, activation: int,
) -> None:  # fmt: skip
    """Compute the operation into `y`; `x` and `y` are in channels_last, sums are float32."""
    height, width = y.shape[2:]
    table = _table(groups, x.device)
    columns, rows = (min(n, _triton.next_power_of_2(s)) for n, s in ((8, width), (4, height)))
    tiles = _triton.cdiv(width, columns)
    _mixed_depthwise[tiles * _triton.cdiv(height, rows), table.shape[0], x.shape[0]](
        x, weight, x if bias is None else bias, y, table, *x.shape[2:], x.shape[1],
        height, width, tiles, stride=stride, has_bias=bias is not None,
        activation=activation, rows=rows, columns=columns, block=LANES,
    )  # fmt: skip


# %% [markdown]
# In `fast.py`, the form that calls it:

# %%
#| export fast.py
def triton_form(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
    """The operation by the Triton kernel, summed in float32; output in channels_last."""
    from mixconv.triton_kernel import launch  # imports Triton: only for those who use it

    x = x.contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2:]
    size = (*x.shape[:2], output_size(height, mix.stride), output_size(width, mix.stride))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    groups = tuple(
        (c, k, d, pad.top, pad.left)
        for c, k, d, pad in zip(*mix[:2], mix.dilations, pads(mix, height, width), strict=True)
    )
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        launch(x, weight.contiguous(), bias, y, groups, mix.stride,
               ACTIVATIONS.index(mix.activation))  # fmt: skip
    return y


# %% [markdown]
# Triton can interpret its kernels on the CPU, slowly. Where Triton is installed, that is checked here:

# %%
if AVAILABLE:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for activation in ACTIVATIONS:
        case = mix._replace(activation=activation)
        with torch.no_grad():
            result = triton_form(*(t.to(device) for t in (x, weight, bias)), case).cpu()
            expected = split_form(x, weight, bias, case)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
print("Triton's kernel agrees wherever Triton is installed")

# %% [markdown]
# No GPU was at hand when this was written. The interpreter has checked what it computes, and the compiler has made GPU code of it. Nothing here says how fast that is.

# %% [markdown]
# ## A whole model, rewritten for inference
#
# `fuse_for_inference(model)` gives a copy in which
#
# - every batch norm that follows a convolution is folded into it;
# - mixed depthwise layers, and plain ones from 5×5 up, are one operation, with bias and activation inside (plain 3×3 layers stay with PyTorch: neither kernel is faster everywhere);
# - groups of 1×1 convolutions are one grouped convolution;
# - activations work in place, and weights lie in channels_last;
# - and then whole blocks become one operation.
#
# It must find out what follows what. `torch.fx` traces the model once, without running it. Layers are not looked into.

# %%
#| export fast.py
import copy
from collections import Counter

import torch.fx

from mixconv.blocks import DropPath, GroupedPointwise
from mixconv.layer import Conv2dSame, MixConv2d, embed_kernel, make_conv2d
from mixconv.mobilenet import _find_padding


def _is_mixed(module: nn.Module) -> bool:
    """Ours, or the `MixedConv2d` of timm and its relatives: a dictionary of convolutions."""
    if isinstance(module, MixConv2d):
        return True
    parts = list(module.children())
    split = isinstance(module, nn.ModuleDict) and hasattr(module, "splits")
    return split and bool(parts) and all(isinstance(part, nn.Conv2d) for part in parts)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that a layer consists of; none for a layer of another kind."""
    if _is_mixed(module):
        return [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    known = type(module) in (nn.Conv2d, Conv2dSame, GroupedPointwise)
    same = isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame"
    return [cast("nn.Conv2d", module)] if known or same else []


class _Tracer(torch.fx.Tracer):
    """Looks into blocks, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = _is_mixed(m) or isinstance(m, nn.modules.batchnorm._BatchNorm)
        return layer or not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


# %% [markdown]
# A *chain* is a convolution and the layers behind it, as long as each feeds the next and nothing else. What cannot be traced as a whole (a loop that depends on numbers) is taken part by part.

# %%
#| export fast.py
def find_chains(model: nn.Module) -> list[list[str]]:
    """Names of layers that feed each other and nothing else, each list from a convolution on."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # anything may go wrong in a stranger's forward
        parts = [(f"{name}.", find_chains(child)) for name, child in model.named_children()]
        return [[prefix + name for name in chain] for prefix, found in parts for chain in found]
    layers = dict(model.named_modules())
    calls = Counter(layers[str(n.target)] for n in graph.nodes if n.op == "call_module")
    read = [str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"]
    calls.update(layers[name] for name in read)  # whose weights are also used directly
    called = [node for node in graph.nodes if node.op == "call_module"]
    starts = [node for node in called if _convolutions(layers[str(node.target)])]
    chains = [_follow(node, layers) for node in starts]  # what is used twice is left alone:
    return [chain for chain in chains if all(calls[layers[name]] == 1 for name in chain)]


# %%
#| export fast.py
def _aliased(model: nn.Module) -> set[nn.Module]:
    """Modules that can be reached under several names: replacing one would not replace all."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in names.items() if count > 1}


# %%
#| export fast.py
def _follow(node: torch.fx.Node, layers: dict[str, nn.Module]) -> list[str]:
    """The layers that a node feeds, one after another; identities are passed over."""
    chain = [str(node.target)]
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            break
        layer = layers[str(node.target)]
        if layer._forward_hooks or layer._forward_pre_hooks or _convolutions(layer):
            break
        if type(layer) is not nn.Identity:
            chain.append(str(node.target))
    return chain


# %%
from mixconv import mixnet_s

model = mixnet_s(num_classes=10).eval()
[chain for chain in find_chains(model) if "blocks.5" in chain[0]]


# %% [markdown]
# Fold along a chain. timm's batch norms carry their activation inside; it takes the norm's place.

# %%
#| export fast.py
def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class FoldedNorm(nn.Identity):
    """Where a batch norm was that is part of the convolution before it now."""

    def train(self, mode: bool = True) -> "FoldedNorm":
        """Refuse training mode: there is no norm left to train.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)


def _refuse(mode: bool) -> None:
    if mode:
        raise RuntimeError(
            "this model was fused for inference and cannot be trained: batch norms and weights "
            "are merged. Train the model you gave to fuse_for_inference, and fuse it again."
        )


# %%
#| export fast.py
def _fold_norm(model: nn.Module, chain: list[str]) -> list[str]:
    """Fold the norm that follows a convolution; returns the chain without it."""
    convs, norm = _convolutions(model.get_submodule(chain[0])), model.get_submodule(chain[1])
    known = type(norm).__name__ in ("BatchNorm2d", "SyncBatchNorm", "BatchNormAct2d")
    drop = getattr(norm, "drop", None)
    if not known or norm.running_mean is None or type(drop) not in (type(None), nn.Identity):
        return chain
    sizes = [conv.out_channels for conv in convs]
    scale, shift = (line.split(sizes) for line in norm_as_line(cast("nn.BatchNorm2d", norm)))
    for conv, *line in zip(convs, scale, shift, strict=True):
        fold_line(conv, *line)
    inner = getattr(norm, "act", nn.Identity())
    _replace(model, chain[1], FoldedNorm() if type(inner) is nn.Identity else inner)
    return chain if type(inner) is not nn.Identity else [chain[0], *chain[2:]]


# %% [markdown]
# Can the operation stand in for a layer? Its convolutions must be depthwise with one output a channel, square, odd, and agree in stride and padding.

# %%
#| export fast.py
def describe_mix(convs: Sequence[nn.Conv2d], activation: str = "none") -> Mix | None:
    """Depthwise convolutions side by side as one operation; None where it cannot express them."""
    try:
        paddings = {_find_padding(conv) for conv in convs}
    except ValueError:
        return None
    squares = [(*conv.kernel_size, *conv.dilation) for conv in convs]
    strides = {stride for conv in convs for stride in conv.stride}
    depthwise = all(c.groups == c.in_channels == c.out_channels for c in convs)
    even = any(k != h or k % 2 == 0 or d != e for k, h, d, e in squares)
    mixed_up = len(paddings) != 1 or len(strides) != 1
    if not depthwise or even or mixed_up or len({c.bias is None for c in convs}) != 1:
        return None
    channels = tuple(conv.out_channels for conv in convs)
    sizes, dilations = tuple(k for k, *_ in squares), tuple(square[2] for square in squares)
    return Mix(channels, sizes, strides.pop(), dilations, paddings.pop(), activation)


# %%
#| export fast.py
class FusedMixConv2d(nn.Module):
    """Depthwise convolutions, their bias and the activation behind them as one operation.

    Args:
        convs: the convolutions of the groups.
        mix: what `describe_mix` says of them.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the layer it replaces.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convs: Sequence[nn.Conv2d], mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.register_buffer("weight", pack_weights([conv.weight.detach() for conv in convs]))
        self.register_buffer("bias", torch.cat(biases) if biases else None)


# %%
#| export fast.py
class FusedMixConv2d(FusedMixConv2d):
    def forward(self, x: Tensor) -> Tensor:
        """Convolve, add the bias, activate."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        x = x.to(self.weight.dtype)  # under autocast the layers around may give another
        return _call(x, self.weight, self.bias, self.mix)

    def train(self, mode: bool = True) -> "FusedMixConv2d":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ", ".join(f"{name}={value}" for name, value in self.mix._asdict().items())


# %% [markdown]
# Without the kernel, or for a program that only knows convolutions (ONNX), the layer is one merged `nn.Conv2d`. That works wherever the window of every kernel has the same centre, which the 1×1 kernels above had not. Then it stays split.

# %%
#| export fast.py
def _merge_convolutions(convs: Sequence[nn.Conv2d], mix: Mix) -> nn.Conv2d | None:
    """The depthwise convolutions as one, or None where one cannot do."""
    size, count = max(mix.kernel_sizes), sum(mix.channels)
    if set(mix.dilations) != {1} or (mix.padding == "same" and min(mix.kernel_sizes) < mix.stride):
        return None
    like = convs[0].weight
    merged = make_conv2d(
        count, count, size, mix.stride, groups=count, bias=convs[0].bias is not None,
        padding=mix.padding, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    weight = torch.cat([embed_kernel(conv.weight.detach(), size) for conv in convs])
    merged.weight = nn.Parameter(weight, requires_grad=False)
    biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
    merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return merged.eval()


# %%
#| export fast.py
def _merge_pointwise(convs: Sequence[nn.Conv2d]) -> nn.Conv2d | None:
    """Equal 1×1 convolutions side by side as one grouped convolution, or None."""
    kinds = {
        (c.in_channels, c.out_channels, c.kernel_size, c.groups, c.bias is None) for c in convs
    }
    first = convs[0]
    plain = first.kernel_size == (1, 1) == first.stride and first.groups == 1 < first.in_channels
    if len(kinds) != 1 or not plain or any(c.padding not in (0, (0, 0)) for c in convs):
        return None
    n, like = len(convs), first.weight
    merged = nn.Conv2d(
        n * first.in_channels, n * first.out_channels, 1, groups=n, bias=first.bias is not None,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    merged.weight = nn.Parameter(torch.cat([c.weight.detach() for c in convs]), False)
    biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
    merged.bias = nn.Parameter(torch.cat(biases), False) if biases else None
    return merged.eval()


# %%
#| export fast.py
BACKENDS = ("auto", "kernel", "merged")
_ACTIVATIONS_OF_TORCH = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}
_ACTIVATIONS_OF_PEERS = {"Swish": "silu", "SwishMe": "silu", "Sigmoid": "sigmoid"}


def _is_of_peer(module: nn.Module) -> bool:
    """A class of a library whose names mean what we think they mean."""
    return type(module).__module__.partition(".")[0] in ("timm", "geffnet", "torchvision")


def _activation_name(module: nn.Module, known: Sequence[str] = ACTIVATIONS) -> str | None:
    """What a module applies to each number, by its name; None if it is not among the known."""
    peers = _ACTIVATIONS_OF_PEERS if _is_of_peer(module) else {}
    found = _ACTIVATIONS_OF_TORCH.get(type(module), peers.get(type(module).__name__))
    return found if found in known and not _is_touched(module) else None


_SMALLEST_PLAIN_KERNEL = 5  # plain 3×3 layers: neither kernel is faster everywhere


# %%
#| export fast.py
def _fuse_layer(model: nn.Module, chain: list[str], backend: str) -> None:
    """Put the fast form of a layer in its place, with the activation behind it if it can."""
    layer = model.get_submodule(chain[0])
    convs = _convolutions(layer)
    behind: Any = model.get_submodule(chain[1]) if len(chain) > 1 else nn.Identity()
    activation = _activation_name(behind) or "none"
    mix = describe_mix(convs, activation)
    worth = _is_mixed(layer) or convs[0].kernel_size[0] >= _SMALLEST_PLAIN_KERNEL
    if mix is not None and worth and backend == "kernel":
        _replace(model, chain[0], FusedMixConv2d(convs, mix).eval())
        if activation != "none":
            _replace(model, chain[1], nn.Identity())
    elif _is_mixed(layer):
        merged = _merge_convolutions(convs, mix) if mix else _merge_pointwise(convs)
        _replace(model, chain[0], merged or layer)
    if activation != "none" and hasattr(behind, "inplace"):
        behind.inplace = True


# %% [markdown]
# ## The whole block as one operation
#
# With every layer rewritten, how much of a network's time do its depthwise layers still take? Add up their times in `bench.json`, each as one operation, and compare with all of MixNet-S, rewritten layer by layer.

# %%
from mixconv.layer import MixConv2d

single = [row for row in layers if row["batch"] == 1]
found = {
    (r["size"], tuple(r["channels"]), tuple(r["kernel_sizes"])): r["seconds"]["fused"]
    for r in single
}
size, total = 112, 0.0
for block in mixnet_s().blocks:
    layer = block.depthwise.conv
    convs = list(layer.convs) if isinstance(layer, MixConv2d) else [layer]
    channels = tuple(conv.in_channels for conv in convs)
    total += found[size, channels, tuple(conv.kernel_size[0] for conv in convs)]
    size //= block.stride
network = next(r["seconds"] for r in bench["networks"] if r["batch"] == 1)
print(f"depthwise layers: {1e3 * total:.1f} of {1e3 * network['fused, layers']:.1f} ms")

# %% [markdown]
# The rest is 1×1 convolutions, activations and gates. Follow the bytes again, through one of MixNet-S's blocks: 28×28 pixels, 40 channels expanded to 240, kernels 3 and 5, gate, back to 40. The input has 28 · 28 · 40 · 4 = 125,440 bytes, the expanded tensor six times as many, 752,640. Who reads and writes what? (Weights, and the addition of the input, are left out.)

# %% tags=["drawing"]
small, wide = 28 * 28 * 40 * 4, 28 * 28 * 240 * 4
assert (small, wide) == (125_440, 752_640)
PASSES = ["expand 1×1", "activation", "depthwise, activation", "means", "times gate", "project 1×1"]
separate = [(small, wide), (wide, wide), (wide, wide), (wide, 0), (wide, wide), (wide, small)]
fused_passes = [(small, 0), (0, 0), (0, wide), (0, 0), (0, 0), (wide, small)]
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharex=True, sharey=True)
for axis, title, passes in zip(
    panels,
    ("one operation after another", "as one operation"),
    (separate, fused_passes),
    strict=True,
):
    places = range(len(passes))
    read, written = ([p[i] / 1e6 for p in passes] for i in (0, 1))
    axis.barh(places, read, color="#5b8db8", label="read")
    axis.barh(places, written, left=read, color="#d98b4a", label="written")
    axis.set(title=f"{title}: {sum(read) + sum(written):.1f} MB", xlabel="MB")
panels[0].set_yticks(list(places), PASSES)
panels[0].invert_yaxis()
panels[1].legend(fontsize=8)
show(
    figure,
    "block_bytes.png",
    "Bytes read and written by the six steps of a MixNet block. As separate operations each step "
    "reads or writes the wide tensor, three of them both; as one operation it is written once by "
    "the depthwise step and read once by the projection.",
)

# %% [markdown]
# The right side does without the expanded tensor. The depthwise kernel reads 16 channels of a few rows into its ring. It can as well *compute* them there, from the input: a 1×1 convolution of a row for 16 outputs is a small matrix product. The expanded tensor never exists. (Every 16 channels read the input again; it stays in the cache.) The depthwise layer's output must exist, because the gate needs its means before the projection can start. But the means are summed up on the way, and the gate is multiplied into the projection's weights as they are loaded. (Without a gate that tensor could go, too; the kernel does not bother.)
#
# The matrix product needs its weights in another order: *panels* of 16 outputs, and within a panel all 16 weights of one input side by side. Where a group has no multiple of 16 outputs, the last panel is filled up with zeros.

# %%
#| export fast.py
PANEL = 16  # the kernel's kPanel
_POINT_ACTIVATIONS = (*ACTIVATIONS, "sigmoid")


class Point(NamedTuple):
    """A 1×1 convolution in equal groups, and the activation behind it."""

    inputs: int
    outputs: int
    groups: int
    activation: str


def pack_pointwise(weight: Tensor, groups: int) -> Tensor:
    """A 1×1 convolution's weight `(outputs, inputs / groups, 1, 1)` as panels, one axis."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows = F.pad(weight.reshape(groups, outputs, inputs), (0, 0, 0, -outputs % PANEL))
    return rows.view(groups, -1, PANEL, inputs).transpose(2, 3).reshape(-1)


def unpack_pointwise(packed: Tensor, point: Point) -> Tensor:
    """`pack_pointwise` undone."""
    inputs, outputs = point.inputs // point.groups, point.outputs // point.groups
    rows = packed.view(point.groups, -1, inputs, PANEL).transpose(2, 3).flatten(1, 2)
    return rows[:, :outputs].reshape(point.outputs, inputs, 1, 1)


# %% [markdown]
# Two groups of 3 inputs and 2 outputs each. Every panel has 3 rows of 16 places; 2 of them are in use:

# %%
weight = torch.arange(1.0, 13).view(4, 3, 1, 1)
packed = pack_pointwise(weight, groups=2)
assert torch.equal(unpack_pointwise(packed, Point(6, 4, 2, "none")), weight)
packed.view(2, 3, PANEL)[:, :, :4].int()


# %% [markdown]
# A block in one value, and what it computes, one PyTorch operation after another. This is the form that the fast one is held to; it also serves where there is no compiler, and where gradients are wanted.

# %%
#| export fast.py
class BlockSpec(NamedTuple):
    """An inverted residual block; what is None is left out.

    Weights and biases go with it in the order expand, depthwise, squeeze, excite, project: 1×1
    weights from `pack_pointwise`, the depthwise ones from `pack_weights`, empty where left out.
    """

    mix: Mix
    expand: Point | None
    squeeze: Point | None
    excite: Point | None
    project: Point
    residual: bool


# %%
#| export fast.py
def block_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block as separate operations: the reference.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    def pointwise(y: Tensor, index: int, point: Point) -> Tensor:
        weight = unpack_pointwise(weights[index], point)
        return activate(F.conv2d(y, weight, biases[index], groups=point.groups), point.activation)

    with torch.autocast(x.device.type, enabled=False):  # all in the type of the weights
        y = x if spec.expand is None else pointwise(x, 0, spec.expand)
        y = _call(y, weights[1], biases[1], spec.mix)
        if spec.squeeze is not None and spec.excite is not None:
            means = y.mean((2, 3), keepdim=True)
            y = y * pointwise(pointwise(means, 2, spec.squeeze), 3, spec.excite)
        y = pointwise(y, 4, spec.project)
        return x + y if spec.residual else y


# %% [markdown]
# Now in C++. The inner loop: one vector of weights, several pixels' inputs, several sums that do not wait for one another. It is step 3's idea again, with `i` running over inputs instead of taps. With `V = 2`, two vectors of outputs share each input. The gate is multiplied into each vector of weights as it is loaded: `V` products, where the inputs would take `T`.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# // Whole network blocks: a 1x1 convolution computed into the ring, and one after the gate.
# namespace {
#
# constexpr int kVectors = kTile == 14 ? 2 : 1;  // vectors of outputs in the inner loop
# constexpr int64_t kPointTile = 7, kPointChunk = 14 * kPointTile;  // pixels
#
# // sums[v * T + t] += weights of vector v * x[t * pixel + i], over i
# template <int V, int T>
# inline __attribute__((always_inline)) void multiply(Vec (&sums)[V * T], const float* x,
#                                                     int64_t pixel, const float* panel, int64_t n,
#                                                     const float* gate) {
#   for (int64_t i = 0; i < n; ++i, panel += kPanel) {
#     Vec weight[V];
# #pragma GCC unroll 16
#     for (int v = 0; v < V; ++v) {
#       const int64_t next_panels = v * kLanes / kPanel * n * kPanel;
#       weight[v] = load(panel + next_panels + v * kLanes % kPanel, kLanes);
#       if (gate) weight[v] *= gate[i];
#     }
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) {
#       const float input = x[t * pixel + i];
# #pragma GCC unroll 16
#       for (int v = 0; v < V; ++v) sums[v * T + t] += weight[v] * input;
#     }
#   }
# }
# ```
#
# Into the ring: one row of pixels, 16 expanded channels. The last tile of a row moves back so as to end where the row ends; some pixels are then computed twice, with the same result.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# template <int T>
# void expand_pixels(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to) {
#   const float* panel = p.weight + b.panel;
#   const Vec bias = load_own(p.bias + b.window + b.skip, b);
#   for (int64_t at = 0; at < count; at += T) {
#     const int64_t from = std::min(at, count - T);
#     Vec sums[T];
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) sums[t] = bias;
#     multiply<1, T>(sums, x + from * p.inputs, p.inputs, panel, p.group_inputs(), nullptr);
#     if (p.activation != kNone) activate(sums, p.activation);
# #pragma GCC unroll 16
#     for (int t = 0; t < T; ++t) to[from + t] = sums[t];
#   }
# }
#
# void expand_row(const Pointwise& p, const Block& b, const float* x, int64_t count, Vec* to) {
#   if (count >= kTile) expand_pixels<kTile>(p, b, x, count, to);
#   else if (count >= kShortTile) expand_pixels<kShortTile>(p, b, x, count, to);
#   else expand_pixels<1>(p, b, x, count, to);
# }
# ```
#
# Any other 1×1 convolution of the block: the gate's two (on one "pixel", the means) and the projection. Threads share the pixels in chunks, and where these are few, the outputs.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# template <int V, int T>
# void point_tile(const Pointwise& p, const float* x, const float* gate, const float* residual,
#                 float* y, int64_t group, int64_t c) {
#   const int64_t first = group * p.group_outputs() + c, n = p.group_inputs();
#   const auto lanes = [&](int v) {
#     return int(std::min<int64_t>(kLanes, p.group_outputs() - c - v * kLanes));
#   };
#   Vec sums[V * T];
# #pragma GCC unroll 16
#   for (int i = 0; i < V * T; ++i) sums[i] = load(p.bias + first + i / T * kLanes, lanes(i / T));
#   const float* panel = p.weight + p.panel(group, c);
#   if (gate) multiply<V, T>(sums, x + group * n, p.inputs, panel, n, gate + group * n);
#   else multiply<V, T>(sums, x + group * n, p.inputs, panel, n, nullptr);
#   if (p.activation != kNone) activate(sums, p.activation);
# #pragma GCC unroll 16
#   for (int i = 0; i < V * T; ++i) {
#     const int64_t at = i % T * p.outputs + first + i / T * kLanes;
#     if (residual) sums[i] += load(residual + at, lanes(i / T));
#     store(y + at, sums[i], 0, lanes(i / T));
#   }
# }
#
# template <int V, int T>
# void point_pixels(const Pointwise& p, const float* x, int64_t begin, int64_t end,
#                   const float* gate, const float* residual, float* y, int64_t group, int64_t c) {
#   for (int64_t pixel = begin; pixel < end; pixel += T) {
#     const int64_t from = std::min(pixel, end - T), out = from * p.outputs;
#     point_tile<V, T>(p, x + from * p.inputs, gate, residual ? residual + out : nullptr, y + out,
#                      group, c);
#   }
# }
#
# // Part `part` of `parts` of a 1x1 convolution, its activation, and the addition of `residual`.
# void pointwise(const Pointwise& p, const float* x, int64_t pixels, const float* gate,
#                const float* residual, float* y, int part, int parts) {
#   const int64_t step = kVectors * kLanes, columns = (p.group_outputs() + step - 1) / step;
#   const int64_t each = columns * p.groups, chunks = (pixels + kPointChunk - 1) / kPointChunk;
#   const int64_t tasks = chunks * each;
#   for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
#     const int64_t begin = task / each * kPointChunk, end = std::min(pixels, begin + kPointChunk);
#     const int64_t group = task % each / columns, c = task % columns * step;
#     const bool several = p.group_outputs() - c > (kVectors - 1) * kLanes;
#     const auto compute = end - begin >= kPointTile
#         ? (several ? point_pixels<kVectors, kPointTile> : point_pixels<1, kPointTile>)
#         : (several ? point_pixels<kVectors, 1> : point_pixels<1, 1>);
#     compute(p, x, begin, end, gate, residual, y, group, c);
#   }
# }
# ```
#
# One image: the depthwise layer with its expansion and its sums, the gate, the projection. The gate's two products are so small that every thread computes them for itself.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# struct InvertedResidual {
#   const float *weight, *bias;          // of the depthwise layer
#   Pointwise squeeze, excite, project;  // 0 inputs: not there
#   int64_t residual, batch;
# };
#
# void find_gate(const InvertedResidual& b, const Layer& l, const float* sums, int64_t bands,
#                float* gate) {
#   float *means = gate + l.channels, *squeezed = means + l.channels;
#   for (int64_t c = 0; c < l.channels; ++c) {
#     float sum = 0;
#     for (int64_t band = 0; band < bands; ++band) sum += sums[band * l.channels + c];
#     means[c] = sum / float(l.out_height * l.out_width);
#   }
#   pointwise(b.squeeze, means, 1, nullptr, nullptr, squeezed, 0, 1);
#   pointwise(b.excite, squeezed, 1, nullptr, nullptr, gate, 0, 1);
# }
#
# void run_image(const InvertedResidual& b, const Plan& plan, const float* x, float* y) {
#   Layer l = plan.layer;
#   const int64_t pixels = l.out_height * l.out_width;
#   const Workspace<1> wide((pixels + plan.bands) * l.channels / kLanes + 1);
#   l.x = x, l.weight = b.weight, l.bias = b.bias, l.y = wide.floats();
#   float* sums = b.squeeze.inputs ? l.y + pixels * l.channels : nullptr;
#   if (sums) std::fill(sums, sums + plan.bands * l.channels, 0.0f);
#   run(l, plan, sums);
#   in_parallel(plan.threads, [&](int me, int count) {
#     const Workspace<2> memory((2 * l.channels + b.squeeze.outputs) / kLanes + 1);
#     float* gate = sums ? memory.floats() : nullptr;
#     if (gate) find_gate(b, l, sums, plan.bands, gate);
#     pointwise(b.project, l.y, pixels, gate, b.residual ? x : nullptr, y, me, count);
#   });
# }
# ```
#
# And all images. While at least as many images are left as threads, each thread takes whole images: nobody waits, and the wide tensor stays in that core's own cache. On each of the rest all threads work together. Hence two plans.
#
# ```cpp
# //| export mixed_depthwise2d.cpp
# }  // namespace
#
# extern "C" void inverted_residual(const InvertedResidual* block, const Plan* alone,
#                                   const Plan* together, const float* x, float* y) {
#   const Layer& l = together->layer;
#   const int64_t in = l.height * l.width * l.pixel();
#   const int64_t out = l.out_height * l.out_width * block->project.outputs;
#   if (block->batch * out == 0) return;
#   const int threads = together->threads;
#   const int64_t apart = block->batch / threads * threads;
#   in_parallel(apart ? threads : 1, [&](int me, int count) {
#     for (int64_t image = apart * me / count; image < apart * (me + 1) / count; ++image)
#       run_image(*block, *alone, x + image * in, y + image * out);
#   });
#   for (int64_t image = apart; image < block->batch; ++image)
#     run_image(*block, *together, x + image * in, y + image * out);
# }
# ```

# %% [markdown]
# For Python, the structures once more, filled once for each block, image size and number of threads.

# %%
#| export fast.py
class _Point(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")] + [
        (name, ctypes.c_int64) for name in ("inputs", "outputs", "groups", "activation")
    ]


class _InvertedResidual(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("squeeze", _Point),
        ("excite", _Point), ("project", _Point), ("residual", ctypes.c_int64),
        ("batch", ctypes.c_int64),
    ]  # fmt: skip


def _points(spec: BlockSpec, pointers: tuple[int, ...]) -> list[_Point]:
    """The 1×1 layers; weights and biases lie at even and odd places, depthwise at 2 and 3."""
    return [
        _Point(*pointers[i : i + 2], *point[:3], _POINT_ACTIVATIONS.index(point.activation))
        if point is not None else _Point()
        for i, point in zip((0, 4, 6, 8), spec[1:5], strict=True)
    ]  # fmt: skip


# %%
#| export fast.py
@functools.lru_cache(maxsize=1024)
def _block(
    library: Any, spec: BlockSpec, size: torch.Size, pointers: tuple[int, ...], threads: int
) -> tuple[_InvertedResidual, _Plan, _Plan, tuple[int, ...]]:
    """A block as the kernel takes it, its plans, and the shape of its output.

    The pointers are those of all weights and biases in turn.
    """
    expand, *points = _points(spec, pointers)
    sizes, groups = _sizes(spec.mix, size), _groups(spec.mix, size[2], size[3])
    sizes.batch = 1
    first = expand if spec.expand is not None else None
    plans = [_Plan(library, sizes, first, groups, n) for n in (1, threads)]
    block = _InvertedResidual(*pointers[2:4], *points, spec.residual, size[0])
    out = size[0], spec.project.outputs, sizes.out_height, sizes.out_width
    return block, plans[0], plans[1], out


# %%
#| export fast.py
def block_kernel_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block by the compiled kernel: float32 on a CPU, output in channels_last."""
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    pairs = zip(weights, biases, strict=True)
    kept = [tensor.contiguous() for pair in pairs for tensor in pair]
    library, pointers = load_kernel(), tuple([tensor.data_ptr() for tensor in kept])
    block, alone, together, size = _block(library, spec, x.shape, pointers, _threads())
    y = torch.empty(size, memory_format=torch.channels_last, dtype=x.dtype, device=x.device)
    library.inverted_residual(
        ctypes.byref(block), alone.handle, together.handle, x.data_ptr(), y.data_ptr()
    )
    return y


# %% [markdown]
# Sizes are checked before pointers are given away, and the block becomes an operation of PyTorch's, like the layer before. It has no gradient of its own: it is for inference, and where any gradient is wanted, the separate operations run.

# %%
#| export fast.py
def _fits(spec: BlockSpec, count: int, inputs: int) -> bool:
    """Whether each layer of a block takes what the one before gives."""
    mix, expand, squeeze, excite, project, residual = spec
    ends = [project.inputs, count if expand is None else expand.outputs]
    gate = squeeze is None and excite is None
    if squeeze is not None and excite is not None:
        ends += [squeeze.inputs, excite.outputs]
        gate = squeeze.outputs == excite.inputs
    same = not residual or (mix.stride == 1 and inputs == project.outputs)
    return gate and same and set(ends) == {count}


# %%
#| export fast.py
@functools.lru_cache(maxsize=1024)
def _check_spec(spec: BlockSpec) -> tuple[int, list[int], list[int]]:
    """Channels of the input, and how many weights and biases each layer has."""
    count, packed = _check_mix(spec.mix)
    inputs = count if spec.expand is None else spec.expand.inputs
    if not _fits(spec, count, inputs):
        raise ValueError(f"the block's layers do not fit together: {spec}")
    weights, biases = [0, packed, 0, 0, 0], [0, count, 0, 0, 0]
    for index, point in zip((0, 2, 3, 4), spec[1:5], strict=True):
        if point is not None:
            if point.groups < 1 or point.inputs % point.groups or point.outputs % point.groups:
                raise ValueError(f"groups must divide inputs and outputs, got {point}")
            panels = point.groups * -(-point.outputs // point.groups // PANEL)
            weights[index] = panels * PANEL * (point.inputs // point.groups)
            biases[index] = point.outputs
    return inputs, weights, biases


# %%
#| export fast.py
def _check_block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> None:
    inputs, *expected = _check_spec(spec)
    if x.dim() != 4 or x.shape[1] != inputs:
        raise ValueError(f"x must be (N, {inputs}, H, W), got {tuple(x.shape)}")
    for name, tensors, sizes in zip(
        ("weights", "biases"), (weights, biases), expected, strict=True
    ):
        if [t.numel() for t in tensors] != sizes:
            raise ValueError(
                f"{name} must hold {sizes} numbers, got {[t.numel() for t in tensors]}"
            )
        if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
            raise ValueError(f"x and {name} must agree in dtype and device")


# %%
#| export fast.py
_LARGEST_WIDE = 1 << 30  # numbers in one image's wide tensor; for more, PyTorch finds the memory


def _block_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    _check_block(x, weights, biases, spec)
    pixels = output_size(x.shape[2], spec.mix.stride) * output_size(x.shape[3], spec.mix.stride)
    small = pixels * sum(spec.mix.channels) < _LARGEST_WIDE
    small = small and _ring_size(spec.mix, x.shape[3]) <= _LARGEST_RING
    if small and x.dtype == torch.float32 and x.is_cpu and load_kernel() is not None:
        return block_kernel_form(x, weights, biases, spec)
    y = block_form(x, weights, biases, spec)
    return y.contiguous(memory_format=torch.channels_last)


# %%
#| export fast.py
def _as_numbers(spec: BlockSpec) -> list[int]:
    """The 1×1 layers as `torch.library` can take them; zeros for what is left out."""
    return [
        number
        for p in spec[1:5]
        for number in ((*p[:3], _POINT_ACTIVATIONS.index(p.activation)) if p else (0, 0, 0, 0))
    ]


def _as_spec(points: Sequence[int], mix: Mix, residual: bool) -> BlockSpec:
    rows = [points[i : i + 4] for i in range(0, 16, 4)]
    found = [Point(i, o, g, _POINT_ACTIVATIONS[a]) if i else None for i, o, g, a in rows]
    return BlockSpec(mix, found[0], found[1], found[2], cast("Point", found[3]), residual)


# %%
#| export fast.py
@torch.library.custom_op("mixconv::inverted_residual", mutates_args=())
def _block_operation(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], points: Sequence[int],
    channels: Sequence[int], kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int],
    padding: str, activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    mix = Mix(tuple(channels), tuple(kernel_sizes), stride, tuple(dilations), padding, activation)
    return _block_forward(x, weights, biases, _as_spec(points, mix, residual))


@_block_operation.register_fake
def _block_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], points: Sequence[int],
    channels: Sequence[int], kernel_sizes: Sequence[int], stride: int, dilations: Sequence[int],
    padding: str, activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    size = output_size(x.shape[2], stride), output_size(x.shape[3], stride)
    project = points[12:]  # inputs, outputs, groups, activation
    shape = (x.shape[0], project[1], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# %%
#| export fast.py
def inverted_residual(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """An inverted residual block, from its input to its output, in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weights: of the five layers of `spec`, packed; see `BlockSpec`.
        biases: of the five layers.
        spec: the block.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: for sizes and dtypes that do not fit together.

    Source: ours; the block is the paper's (section 4, Figure 8). Chapter 8.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases)):
        return block_form(x, weights, biases, spec)
    if not torch.compiler.is_compiling():
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if forward_mode or torch._C._are_functorch_transforms_active():
            return block_form(x, weights, biases, spec)
        if not _is_watched(x, weights[1], biases[1]):
            return _block_forward(x, weights, biases, spec)
    lists = [*map(_as_list, spec.mix)]
    operation = torch.ops.mixconv.inverted_residual
    numbers = _as_numbers(spec)
    return cast("Tensor", operation(x, weights, biases, numbers, *lists, spec.residual))


# %%
#| export fast.py
class FusedBlock(nn.Module):
    """An inverted residual block, or a depthwise separable one, as one operation.

    Args:
        spec: the block.
        weights: packed, as `inverted_residual` takes them.
        biases: of the five layers.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the block it replaces.
    """

    def __init__(
        self, spec: BlockSpec, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.spec = spec
        for index, pair in enumerate(zip(weights, biases, strict=True)):
            for name, tensor in zip(("weight", "bias"), pair, strict=True):
                self.register_buffer(f"{name}{index}", tensor.detach().clone())


# %%
#| export fast.py
class FusedBlock(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        buffers = [*self._buffers.values()]
        weights, biases = cast("list[Tensor]", buffers[0::2]), cast("list[Tensor]", buffers[1::2])
        return inverted_residual(x.to(weights[1].dtype), weights, biases, self.spec)

    def train(self, mode: bool = True) -> "FusedBlock":
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        _refuse(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ",\n".join(f"{name}={value}" for name, value in self.spec._asdict().items())


# %% [markdown]
# Proof: a block with everything in it, by the kernel and by separate operations in float64.

# %%
def point(inputs: int, outputs: int, groups: int, activation: str):
    """A random 1×1 convolution: weight, bias and description."""
    weight = torch.randn(outputs, inputs // groups, 1, 1) / (inputs // groups) ** 0.5
    return (
        pack_pointwise(weight, groups),
        torch.randn(outputs),
        Point(inputs, outputs, groups, activation),
    )


mix = Mix((40, 37, 23), (3, 5, 9), 1, (1, 1, 1), "same", "silu")
parts = [
    point(20, 100, 2, "silu"), (torch.randn(40 * 9 + 37 * 25 + 23 * 81) / 5, torch.randn(100)),
    point(100, 6, 1, "silu"), point(6, 100, 1, "sigmoid"), point(100, 20, 2, "none"),
]  # fmt: skip
weights, biases = [part[0] for part in parts], [part[1] for part in parts]
spec = BlockSpec(mix, *(parts[i][2] for i in (0, 2, 3, 4)), residual=True)

# %%
for height, width in ((28, 28), (9, 17), (3, 5), (1, 1)):
    x = torch.randn(3, 20, height, width)
    with torch.no_grad():
        result = inverted_residual(x, weights, biases, spec)
        expected = block_form(x.double(), [w.double() for w in weights],
                              [b.double() for b in biases], spec)  # fmt: skip
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
print("the kernel computes what the separate operations compute")

# %% [markdown]
# Which modules are such blocks? Trace one, and read the program backwards from its result: perhaps an addition of the input; a 1×1 convolution; perhaps a product with a gate; a depthwise layer; perhaps another 1×1 convolution; the input. Between them activations, and layers that do nothing in evaluation. Anything else is left as it is.

# %%
#| export fast.py
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath, FoldedNorm)  # in evaluation
_IDLE_OF_PEERS = ("DropPath", "StochasticDepth")


def _is_idle(layer: nn.Module | None) -> bool:
    """Whether a module does nothing in evaluation."""
    if layer is None or _is_touched(layer):
        return False
    named = type(layer).__name__ in _IDLE_OF_PEERS and _is_of_peer(layer)
    return type(layer) in _IDLE or named


class _Unit(NamedTuple):
    """A convolution, the activation behind it, and the node that it takes."""

    layer: nn.Module
    activation: str
    source: Any


# %%
#| export fast.py
class _Reader:
    """Reads a traced module from its output to its input."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = dict(module.named_modules())
        self.graph = _Tracer().trace(module)
        self.inputs = [node for node in self.graph.nodes if node.op == "placeholder"]

    def layer(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        called = isinstance(node, torch.fx.Node) and node.op == "call_module"
        return self.layers[str(node.target)] if called else None

    def name(self, node: Any) -> str:
        """What a node calls, whether module, method or function."""
        if not isinstance(node, torch.fx.Node):
            return ""
        target = node.target if isinstance(node.target, str) else type(node.target).__name__
        function = getattr(node.target, "__name__", target)
        return type(self.layer(node)).__name__ if node.op == "call_module" else function


# %%
#| export fast.py
class _Reader(_Reader):
    def skip(self, node: Any) -> Any:
        """The node, or the first one before it that does something."""
        while _is_idle(self.layer(node)):
            node = node.args[0]
        return node

    def activation(self, node: Any) -> str | None:
        """What a node applies to each number; None if it does something else."""
        if (layer := self.layer(node)) is not None:
            return _activation_name(layer, _POINT_ACTIVATIONS)
        name = self.name(node).rstrip("_")
        return name if name in _POINT_ACTIVATIONS[1:] else None


# %%
#| export fast.py
class _Reader(_Reader):
    def unit(self, node: Any) -> _Unit | None:
        """The convolution whose activated output a node is; None if it is something else."""
        node, activation = self.skip(node), "none"
        if (found := self.activation(node)) in ACTIVATIONS:
            activation, node = found, self.skip(node.args[0])
        layer = self.layer(node)
        if layer is None or not (isinstance(layer, FusedMixConv2d) or _convolutions(layer)):
            return None
        return _Unit(layer, activation, node.args[0])


# %%
#| export fast.py
class _Reader(_Reader):
    def all_used(self) -> bool:
        """Whether the output depends on every step; the others may change something in place."""
        used, waiting = set(), [node for node in self.graph.nodes if node.op == "output"]
        while waiting:
            if (node := waiting.pop()) not in used:
                used.add(node)
                waiting += node.all_input_nodes
        return len(used) == len(self.graph.nodes)


# %%
#| export fast.py
class _Reader(_Reader):
    def pooled(self, node: Any) -> Any:
        """What a node takes the mean of, over all pixels; None if it does something else."""
        node = self.skip(node)
        if (layer := self.layer(node)) is not None:
            whole = type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1))
        elif self.name(node) == "adaptive_avg_pool2d":
            whole = node.args[1:] in ((1,), ((1, 1),))
        else:
            values = [*node.args[1:], *node.kwargs.values()] if self.name(node) == "mean" else []
            axes, keep = values if len(values) == 2 else ((), False)
            whole = keep is True and axes in ((2, 3), [2, 3], (-2, -1), [-2, -1])
        return self.skip(node.args[0]) if whole else None


# %%
#| export fast.py
def _read_point(unit: _Unit | None) -> tuple[nn.Conv2d, Point] | None:
    """A 1×1 convolution and its description."""
    if unit is None or not isinstance(conv := unit.layer, nn.Conv2d):
        return None
    plain = conv.kernel_size == (1, 1) == conv.stride and conv.padding in (0, (0, 0), "same")
    point = Point(conv.in_channels, conv.out_channels, conv.groups, unit.activation)
    return (conv, point) if plain else None


def _read_mix(unit: _Unit) -> tuple[Mix, Tensor, Tensor | None] | None:
    """A depthwise layer as one operation: what, weight and bias."""
    layer, activation, _ = unit
    if isinstance(layer, FusedMixConv2d):
        mix = layer.mix if activation == "none" else layer.mix._replace(activation=activation)
        once = activation == "none" or layer.mix.activation == "none"
        return (mix, layer.weight, layer.bias) if once else None
    conv = cast("nn.Conv2d", layer)
    if (found := describe_mix([conv], activation)) is None:
        return None
    return found, pack_weights([conv.weight]), conv.bias


# %% [markdown]
# The gate, like the addition, is a branch: the product's two factors both come from the depthwise layer.

# %%
#| export fast.py
def _read_gate(reader: _Reader, node: Any) -> tuple[Any, list[Any]] | None:
    """What a gate scales, and its two 1×1 convolutions; (node, two Nones) without a gate."""
    node = reader.skip(node)
    if reader.name(node) not in ("mul", "imul", "mul_"):
        return node, [None, None]
    factors = [reader.skip(factor) for factor in node.args]
    gates = [f for f in factors if reader.activation(f) == "sigmoid"]
    if len(factors) != 2 or len(gates) != 1:
        return None
    (scaled,) = (f for f in factors if f is not gates[0])
    outer = reader.unit(gates[0].args[0])
    inner = reader.unit(outer.source) if outer is not None else None
    excite, squeeze = _read_point(outer), _read_point(inner)
    if inner is None or squeeze is None or excite is None or excite[1].activation != "none":
        return None
    gate = [squeeze, (excite[0], excite[1]._replace(activation="sigmoid"))]
    return (scaled, gate) if reader.pooled(inner.source) is scaled else None


# %%
#| export fast.py
def _read_addition(reader: _Reader) -> tuple[Any, bool]:
    """What the output is without the addition of the input, and whether that is added."""
    (x,), (output,) = reader.inputs, (n for n in reader.graph.nodes if n.op == "output")
    node = reader.skip(output.args[0])
    if reader.name(node) in ("add", "iadd", "add_") and not node.kwargs and len(node.args) == 2:
        others = [part for part in node.args if reader.skip(part) is not x]
        if len(others) == 1:
            return others[0], True
    return node, False


# %%
#| export fast.py
def _read_block(reader: _Reader) -> tuple[list[Any], Any, bool] | None:
    """The 1×1 convolutions (None where left out), the depthwise layer, and the addition."""
    node, residual = _read_addition(reader)
    last = reader.unit(node)
    project = _read_point(last)
    if last is None or project is None or (gated := _read_gate(reader, last.source)) is None:
        return None
    node, gate = gated
    middle = reader.unit(node)
    if middle is None or (mix := _read_mix(middle)) is None:
        return None
    (x,), expand, node = reader.inputs, None, reader.skip(middle.source)
    if node is not x and (first := reader.unit(node)) is not None:
        if (expand := _read_point(first)) is None:
            return None
        node = reader.skip(first.source)
    return ([expand, *gate, project], mix, residual) if node is x else None


# %%
#| export fast.py
def _pack_block(
    points: list[Any], mix: tuple[Mix, Tensor, Tensor | None], residual: bool
) -> FusedBlock:
    expand, squeeze, excite, project = (pair and pair[1] for pair in points)
    spec = BlockSpec(mix[0], expand, squeeze, excite, project, residual)
    none = mix[1].new_zeros(0)
    weights = [pack_pointwise(pair[0].weight, pair[1].groups) if pair else none for pair in points]
    given = [pair[0].bias if pair else none for pair in points]
    weights.insert(1, mix[1])
    given.insert(1, mix[2])
    counts = _check_spec(spec)[2]
    biases = [none.new_zeros(n) if b is None else b for b, n in zip(given, counts, strict=True)]
    return FusedBlock(spec, weights, biases).eval()


def _keep_attributes(fused: FusedBlock, block: nn.Module) -> FusedBlock:
    """Numbers and names that others may read from the block, such as its stride."""
    for name, value in vars(block).items():
        plain = isinstance(value, int | float | str | tuple)
        if plain and not name.startswith("_") and not hasattr(fused, name):
            setattr(fused, name, value)
    return fused


# %% [markdown]
# A trace does not show everything: a condition that sees a tracer instead of a tensor, a change in place whose result nobody takes. So try the copy on a small random image before it takes the block's place.

# %%
#| export fast.py
@torch.no_grad()
def _computes_the_same(fused: FusedBlock, block: nn.Module) -> bool:
    channels = _check_spec(fused.spec)[0]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, channels, 12, 11, generator=generator, dtype=torch.float32, device="cpu")
    given = x.clone()
    wanted, found = block(given), fused(x)
    same = isinstance(wanted, Tensor) and wanted.shape == found.shape and torch.equal(given, x)
    return same and bool((wanted - found).abs().max() <= 1e-3 * wanted.abs().max())


# %%
#| export fast.py
def fuse_block(block: nn.Module) -> FusedBlock | None:
    """The block as one operation; None if the operation cannot stand in for it.

    Args:
        block: without batch norms, in evaluation mode, float32 on a CPU.
    """
    if any(_is_touched(part) for part in block.modules()):
        return None
    try:
        reader = _Reader(block)
        found = _read_block(reader) if len(reader.inputs) == 1 else None
        fused = _pack_block(*found) if found is not None and reader.all_used() else None
        return fused if fused is not None and _computes_the_same(fused, block) else None
    except Exception as error:  # anything may go wrong in a stranger's forward
        log.debug("%s left as it is: %s", type(block).__name__, error)
        return None


# %%
#| export fast.py
def _fuse_blocks(model: nn.Module) -> None:
    """Put `FusedBlock`s in place of all blocks that are such."""
    for name, child in model.named_children():
        parts = [_is_depthwise(part) for part in child.modules()]
        wrapper = type(child) is nn.Sequential and len(child) == 1
        once = sum(parts) == 1 and len(parts) > 1 and not wrapper
        if once and (fused := fuse_block(child)) is not None:
            setattr(model, name, _keep_attributes(fused, child))
        elif any(parts):
            _fuse_blocks(child)


def _is_depthwise(layer: nn.Module) -> bool:
    convs = _convolutions(layer)
    plain = bool(convs) and all(c.groups == c.in_channels > 1 for c in convs)
    return plain or isinstance(layer, FusedMixConv2d)


# %% [markdown]
# ## All together
#
# A layer or block with hooks or parametrisations is left alone: what they do cannot be seen.

# %%
#| export fast.py
def fuse_for_inference(model: nn.Module, *, backend: str = "auto") -> nn.Module:
    """A copy of a model that computes the same in evaluation, and faster.

    Batch norms are folded, mixed depthwise layers become one operation, grouped 1×1 convolutions
    one convolution; weights are put in channels_last. With the kernel, whole inverted residual
    and depthwise separable blocks become one operation. The copy cannot be trained. Works on
    this package's layers and networks, on timm's MixNets, and on what else is built like them.

    Args:
        model: any module; it is not changed.
        backend: "kernel" for `mixconv::mixed_depthwise2d` and `mixconv::inverted_residual`;
            "merged" for ordinary convolutions only, as ONNX needs; "auto" for the kernel where
            it can be compiled (or Triton is there for a model on a GPU), else merged.

    Raises:
        ValueError: for an unknown backend.

    Source: ours. Chapter 8.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    root = nn.Sequential(copy.deepcopy(model)).eval().requires_grad_(False)
    if backend == "auto":
        backend = "kernel" if _kernel_at_hand(root) else "merged"
    _fuse_layers(root, backend)
    weight = next(root.parameters(), torch.empty(0))
    if backend == "kernel" and weight.dtype == torch.float32 and weight.device.type == "cpu":
        _fuse_blocks(root)
    return root[0]


# %%
#| export fast.py
def _fuse_layers(root: nn.Module, backend: str) -> None:
    """Fold what can be folded, and put the fast form of each layer in its place."""
    aliased = _aliased(root)
    for chain in find_chains(root):
        layer = root.get_submodule(chain[0])
        members = {root.get_submodule(name) for name in chain}
        if not members & aliased and not any(_is_touched(part) for part in layer.modules()):
            if len(chain) > 1:
                chain = _fold_norm(root, chain)
            _fuse_layer(root, chain, backend)
    for conv in root.modules():
        if isinstance(conv, nn.Conv2d):
            conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# %%
#| export fast.py
def _kernel_at_hand(model: nn.Module) -> bool:
    weight = next(model.parameters(), torch.empty(0))
    if weight.is_cuda:
        return find_spec("triton") is not None
    return weight.dtype == torch.float32 and load_kernel() is not None


def _is_touched(module: nn.Module) -> bool:
    """Whether hooks, parametrisations or a forward of its own do what cannot be seen."""
    hooks = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    return hooks or torch.nn.utils.parametrize.is_parametrized(module)


# %% [markdown]
# Same outputs, for the layer, the block and the networks of this book, with every backend:

# %%
from mixconv import MixConvBlock, mobilenet_v1, mobilenet_v2

cases = {
    "layer": MixConv2d(24, (3, 5, 7), stride=2, padding="same"),
    "block": MixConvBlock(24, 24, (3, 5, 7), squeeze_ratio=0.5, activation="swish"),
    "MobileNetV1 357": mobilenet_v1((3, 5, 7), num_classes=10),
    "MobileNetV2 357": mobilenet_v2((3, 5, 7), num_classes=10),
    "MixNet-S": mixnet_s(num_classes=10),
}


def randomise_norms(model: nn.Module) -> nn.Module:
    """Statistics as after training, so that a norm forgotten in folding would show."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# %%
for name, model in cases.items():
    channels = 24 if name in ("layer", "block") else 3
    x = torch.randn(2, channels, 64, 48)
    with torch.no_grad():
        expected = randomise_norms(model)(x)
        worst = max(difference(fuse_for_inference(model, backend=b)(x), expected) for b in BACKENDS)
    print(f"{name}: equal within 1e-4, {worst < 1e-4}")

# %% [markdown]
# Training is refused, and says what to do. The original is as it was.

# %%
model = cases["MixNet-S"]
fused = fuse_for_inference(model)
try:
    fused.train()
except RuntimeError as error:
    print(error)
print("the original trains:", model.train().training)
try:
    fuse_for_inference(model, backend="fastest")
except ValueError as error:
    print(error)

# %% [markdown]
# The fused copy goes through `torch.export` with free sizes. With the kernel the program holds our operation:

# %%
from torch.export import Dim, export

free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
small = fuse_for_inference(cases["block"].eval(), backend="kernel")
program = export(small, (torch.randn(2, 24, 16, 16),), dynamic_shapes=(free,))
x = torch.randn(3, 24, 11, 20)
with torch.no_grad():
    print("equal at another size:", torch.allclose(program.module()(x), small(x), atol=1e-6))
sum("inverted_residual" in str(node.target) for node in program.graph.nodes)

# %% [markdown]
# ## What came of it
#
# Layers first: times the speed of timm's split form, layer by layer of MixNet-S, M and L.

# %% tags=["drawing"]
figure, panels = plt.subplots(1, len(batches), figsize=(8, 3.2), sharey=True)
for axis, batch in zip(panels, batches, strict=True):
    rows = [row for row in layers if row["batch"] == batch and len(row["channels"]) > 1]
    rows.sort(key=lambda row: (-row["size"], sum(row["channels"])))
    for place, row in enumerate(rows):
        times = row["seconds"]
        ratio = times["timm"] / times["fused"]
        axis.plot([place, place], [1, ratio], color=kernel_color(max(row["kernel_sizes"])))
        axis.plot(place, ratio, "o", color=kernel_color(max(row["kernel_sizes"])), markersize=4)
        axis.plot(place, times["timm"] / times["merged"], "_", color="#555555", markersize=7)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(title=f"batch {batch}", xticks=[], yscale="log", yticks=[1, 2, 5, 10, 20])
    axis.set_yticklabels(["1", "2", "5", "10", "20"])
    axis.set_xlabel("112×112  →  7×7", fontsize=9)
panels[0].set_ylabel("times as fast as split")
show(
    figure,
    "layer_speedups.png",
    "For each mixed layer of the MixNets, from large images to small: how many times as fast as "
    "timm's split form one operation is (dots) and one merged convolution (dashes), for each "
    "batch size.",
)

# %% [markdown]
# Dots: one operation, coloured by the largest kernel. Dashes: one merged convolution.
#
# How the time grows, for a layer with kernels 3, 5, 7, 9 on 28×28 pixels and 240 channels, batch 1, when one of these changes:

# %% tags=["drawing"]
titles = {"batch": "batch", "channels": "channels", "size": "height = width", "groups": "groups"}
looks = {"split": ("split", "o:"), "merged": ("merged", "s--"), "fused": ("one operation", "o-")}
figure, panels = plt.subplots(1, 4, figsize=(8, 2.9), sharey=True)
for axis, (name, title) in zip(panels, titles.items(), strict=True):
    rows = [row for row in bench["growth"] if row["axis"] == name]
    for form, (label, look) in looks.items():
        times = [1e6 * row["seconds"][form] for row in rows]
        color = "black" if form == "fused" else "#888888"
        axis.plot([row["value"] for row in rows], times, look, color=color, ms=3.5, label=label)
    log = name != "groups"
    axis.set(xlabel=title, yscale="log", xscale="log" if log else "linear")
    axis.set_xticks([row["value"] for row in rows], [str(row["value"]) for row in rows], fontsize=7)
    axis.minorticks_off()
panels[0].set_ylabel("microseconds")
panels[0].legend(fontsize=8)
show(
    figure,
    "speed_growth.png",
    "Time of one mixed layer against batch, channels, image size and number of groups, for the "
    "split form, the merged form and one operation.",
)


# %% [markdown]
# Then whole networks, in milliseconds, 224×224 pixels:

# %%
def network_table(batch: int):
    """Milliseconds of every contender on every network, for one batch size."""
    networks = [row for row in bench["networks"] if row["batch"] == batch]
    names = list(dict.fromkeys(name for row in networks for name in row["seconds"]))
    cells = [
        [f"{1e3 * row['seconds'][name]:.1f}" if name in row["seconds"] else "–" for row in networks]
        for name in names
    ]
    return table(
        [f"batch {batch}", *(row["network"] for row in networks)],
        [[name, *line] for name, line in zip(names, cells, strict=True)],
    )


network_table(1)

# %%
network_table(16)


# %% [markdown]
# - `split`: this book's network as it is. All networks here have symmetric padding, as timm's of these names.
# - `fused, merged`: with the backend "merged". `fused, layers`: with the kernel, but layer by layer. `fused`: whole blocks.
# - `timm, fused`: timm's network given to `fuse_for_inference`.
# - `ours, …`: the merged copy, exported to ONNX. `same padding`: as the official MixNets have it. Which zeros that needs depends on the image's size, so the exported program pads in a step of its own; the kernel pads on the way.
# - A dash: not measured.

# %%
def gain(network: str, batch: int, over: str, form: str = "fused") -> str:
    row = next(r for r in bench["networks"] if (r["network"], r["batch"]) == (network, batch))
    return f"{row['seconds'][over] / row['seconds'][form]:.1f}"


print("MixNet-S, one image, times as fast as timm in eager mode:", ", ".join(
    f"{form} {gain('MixNet-S', 1, 'timm, eager', form)}"
    for form in ("fused, merged", "fused, layers", "fused")
))  # fmt: skip
print("MobileNetV2-357 in ONNX Runtime, our export, over fused, one image:",
      gain("MobileNetV2-357", 1, "fused", "ours, ONNX Runtime"))  # fmt: skip

# %% [markdown]
# So a fast depthwise layer alone does little for a network: folding and merging take it half the way, and whole blocks the other half. And it does not win everywhere. MobileNetV2 has no gates and plain ReLUs; there ONNX Runtime, which fuses those well, is faster at one image.
#
# Against the goals that were set before anything was written. (The roofline's bandwidth is here that of a copy as large as the layer, which for small layers runs in the cache. That is a higher roof than the one drawn above.)

# %%
table(["goal", "wanted", "measured", "met"],
      [[g["goal"], g["wanted"], g["measured"], "yes" if g["met"] else "no"]
       for g in bench["goals"]])  # fmt: skip

# %%
missing = bench.get("missing", {})
print(*(f"not measured: {name} ({why})" for name, why in missing.items()), sep="\n")

# %% [markdown]
# Where a goal is missed, what limits it?
#
# - At batch 1 a small layer is over in tens of microseconds. Several of these are Python and the start of a second thread, and the input is copied into the ring, pixel by pixel. The roofline knows none of this.
# - At 112×112 with stride 2, blocks of 16 channels read 64 bytes of each pixel and skip the rest. That is bound by how many cache lines a core may wait for at a time.
# - At batch 32 the limit is memory that the system hands out page by page.
#
# Tried, and not worth it:
#
# - `torch.compile` on a single split layer: no gain. A sum of shifted products through it: slower, and over a minute to compile.
# - oneDNN's convolutions with weights packed in advance and activations inside, for the 1×1 layers: a few percent. The time is in the passes, not in the products.
# - Reading several neighbouring blocks in one pass at 112×112: better where pixels are a multiple of 256 bytes apart, worse elsewhere, since the rings no longer fit the cache.
# - Stores that go around the cache; tiles of 28 outputs (registers run out); waking threads for single blocks (two threads writing to one cache line: half the speed).
# - An approximate division for SiLU: no gain, the multiply-adds around it hide it.
#
# ## Exercises
#
# **8.1** How many multiply-adds per byte has a depthwise layer with a k×k kernel at stride 2? Count float32 numbers read and written, for large images.

# %%
from mixconv.teaching import attempt


def intensity_at_stride_2(k: int) -> float:
    raise NotImplementedError


def test_intensity(answer) -> None:
    size, channels = 224, 64
    outputs = channels * (size // 2) ** 2
    moved = 4 * (channels * size**2 + outputs)
    assert abs(answer(5) - outputs * 25 / moved) < 1e-9


attempt(intensity_at_stride_2, test_intensity)


# %% tags=["solution"]
def intensity_at_stride_2_solution(k: int) -> float:
    # For each output: k² multiply-adds, four numbers read, one written.
    return k * k / (4 * 5)


attempt(intensity_at_stride_2_solution, test_intensity)


# %% [markdown]
# **8.2** A batch norm may also come *before* a 1×1 convolution. Fold its scale and shift (one number for each input channel) into weight `(out, in, 1, 1)` and bias. Why would this fail for a 3×3 convolution with padding?

# %%
def fold_before(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def test_fold(answer) -> None:
    weight, bias = torch.randn(6, 4, 1, 1).double(), torch.randn(6).double()
    scale, shift = torch.randn(2, 4).double()
    x = torch.randn(2, 4, 3, 3).double()
    line = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(
        F.conv2d(x, *answer(weight, bias, scale, shift)), F.conv2d(line, weight, bias)
    )


attempt(fold_before, test_fold)


# %% tags=["solution"]
def fold_before_solution(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # With padding, the zeros come after the shift: at the border it must not be added.
    return weight * scale.view(1, -1, 1, 1), bias + weight[:, :, 0, 0] @ shift


attempt(fold_before_solution, test_fold)


# %% [markdown]
# **8.3** The kernel cuts channels into blocks: a block ends where its group ends, and at every multiple of 16 channels of the tensor. Into how many blocks are these groups cut?

# %%
def count_blocks(channels: tuple[int, ...]) -> int:
    raise NotImplementedError


def test_blocks(answer) -> None:
    assert answer((16, 16)) == 2
    assert answer((8, 8)) == 2
    assert answer((90, 90, 90, 90)) == 26
    assert answer((300, 300, 300, 300)) == 78


attempt(count_blocks, test_blocks)


# %% tags=["solution"]
def count_blocks_solution(channels: tuple[int, ...]) -> int:
    ends = {sum(channels[:i]) for i in range(1, len(channels) + 1)}
    return len(ends | set(range(16, sum(channels), 16)))


attempt(count_blocks_solution, test_blocks)

# %% [markdown]
# ## Takeaways
# - Depthwise layers have few multiply-adds *and* few multiply-adds per byte. Time goes where the bytes go.
# - Merging and folding are algebra: same outputs, fewer passes over memory.
# - A fast kernel is a layout, a vector, some sums that do not wait, and a cache that fits.
# - The best pass over memory is the one not made: compute what is needed where it is needed.
# - `fuse_for_inference(model)` does all of it. Time your own machine with `make bench`.
#
# Previous: [6 · MixNet](06_mixnet.ipynb) · Next: [9 · Using it](09_using_it.ipynb)
