# %% [markdown]
# # 8 · Weights
#
# Trained MixNets are published for timm, whose network is the same as ours under other names. **How do they get in, and who says which padding and epsilon they were trained with?** The picture shows the first half of it, for one block: on the left our kernels, on the right timm's. (The lines were found by filling each of our tensors with a number of its own and looking where the numbers came out.)
#
# **You will be able to**
# - rename tensors between two networks, and say what a round trip proves;
# - read weights from files, state dicts and hub names without running anything;
# - call `mixnet_s(weights=…)` and know what padding and epsilon you get.
#
# **Know first:** [chapter 7](07_mixnet.ipynb), and of the page before this one the picture.
#
# **Time:** 15 minutes to read. Runs in under 60 seconds on two cores. It is the second of two pages, after [The official code](08_official.ipynb); exercises and figures are numbered through both.

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from mixconv.mixnet import MIXNET_S, MixNet
from mixconv.teaching import show, use_style
from mixconv.weights import to_timm  # told below

use_style()
torch.manual_seed(0)
numbered = MixNet(MIXNET_S)
ours, theirs = "blocks.4.", "blocks.2.1."  # the same block
kernels = {n: t for n, t in numbered.state_dict().items() if n.startswith(ours) and t.ndim == 4}
for number, tensor in enumerate(kernels.values()):
    tensor.fill_(number)
parts = [(name, tensor) for name, tensor in to_timm(numbered).items()
         if name.startswith(theirs) and tensor.ndim == 4]  # fmt: skip
heights = [1.4 * number + 0.4 for number in range(len(kernels))]
figure, axis = plt.subplots(figsize=(8.4, 3.2))
for height, (name, kernel) in zip(heights, kernels.items(), strict=True):
    label = f"{name.removeprefix(ours)}  {tuple(kernel.shape)}"
    axis.text(-0.04, height, label, ha="right", va="center")
for place, (name, part) in enumerate(parts):
    found = heights[int(part.mean())]
    axis.plot([0, 1], [found, place + 0.4], "o-", color="#0072B2", markersize=4)
    axis.text(1.04, place + 0.4, f"{name.removeprefix(theirs)}  {tuple(part.shape)}", va="center")
axis.text(-0.04, -0.7, "ours", ha="right", weight="bold")
axis.text(1.04, -0.7, "timm", weight="bold")
axis.set(xlim=(-1.7, 2.5), ylim=(8, -1))
axis.axis("off")
show(
    figure,
    "names_of_a_block.png",
    "The kernels of block 4 of MixNet-S under our names and timm's, joined by lines. The "
    "expanding and the projecting 1×1 convolution are one tensor here and two there, one for "
    "each of their groups; the two depthwise kernels and the two of the gate are one each.",
    caption="Six tensors here are eight in timm: it keeps each group of a 1×1 layer by itself.",
)

# %% [markdown]
# ## Whose name is whose?
#
# What is block 4 called in timm, and where in it is our projection? A table of names answers for every tensor: of which timm tensors is it the concatenation? Read from left to right it says where to cut, read from right to left what to join. So one table goes both ways.
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
" ".join(_block_names(numbered))

# %% [markdown]
# Block 4 is `blocks.2.1`. Inside a block, timm numbers batch normalisations, and a block without expansion has one fewer:
#
# | ours | timm | timm, no expansion |
# |---|---|---|
# | `expand.conv`, `expand.norm` | `conv_pw`, `bn1` | there is none |
# | `depthwise.conv`, `depthwise.norm` | `conv_dw`, `bn2` | `conv_dw`, `bn1` |
# | `squeeze_excite.squeeze`, `.excite` | `se.conv_reduce`, `se.conv_expand` | the same |
# | `project.conv`, `project.norm` | `conv_pwl`, `bn3` | `conv_pw`, `bn2` |
#
# Careful: `conv_pw` is the expansion in one column and the projection in the other. Likewise `bn1` is two different normalisations, and `bn2`, too.

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


# %% tags=["plumbing"]
# fold: From layers to tensors: a part for each group of a 1×1 and each kernel size
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


# %% tags=["plumbing"]
# fold: Cutting a state dict along the table
#| export weights.py
def _cut(state: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """A state dict of ours cut into the tensors that other names stand for; they are views."""
    result: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensors = state[key].chunk(len(parts)) if len(parts) > 1 else (state[key],)
        result |= zip(parts, tensors, strict=True)
    return result


# %% tags=["plumbing"]
# fold: The MixNet inside of a compiled or data-parallel model
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
renamed = to_timm(numbered)
[(name, tuple(renamed[name].shape)) for name in renamed if name.startswith("blocks.1.0.conv")]

# %% [markdown]
# ## What may a file hold?
#
# Somebody sends you `gift.pth`. What can happen when you open it? A `.pth` file is a pickle, and a pickle may name any function and ask for it to be called. PyTorch's older habit was to do so:

# %%
import tempfile
from pathlib import Path

from mixconv.checkpoint import read_state_dict  # told below


class Gift:
    def __reduce__(self):
        return print, ("hello from inside the file; I could have deleted yours",)


with tempfile.TemporaryDirectory() as folder:
    gift = Path(folder) / "gift.pth"
    torch.save({"weight": Gift()}, gift)
    torch.load(gift, weights_only=False)
    try:
        read_state_dict(gift)
    except ValueError as error:
        print("read_state_dict:", str(error).partition(": ")[0].replace(str(gift), gift.name))

# %% [markdown]
# So a file is read as data: tensors, numbers, text, and no function is called but the few that put tensors together. One class of Python's own is let in, `argparse.Namespace`: timm's training script keeps its options in one, and it is a bag of values with no code to run. An archive that would unpack to far more than it takes is refused as well.
#
# Weights come as a file, as a folder, as a state dict, or as a name on the Hugging Face hub. `checkpoint.py` turns each into tensors by name, and knows nothing of networks.

# %% tags=["plumbing"]
# fold: What reading gives: tensors, names, settings
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
# Then four things in folds. A checkpoint of a training script holds more than tensors: the optimiser, the epoch, the options; the tensors may be wrapped twice, carry prefixes, and stand beside counters that other tools left there. From the hub, one file is asked for, `model.safetensors`; no other name is tried.

# %% tags=["plumbing"]
# fold: Unpacking the checkpoint of a training script
#| export checkpoint.py
_WRAPPINGS = (
    "state_dict_ema", "model_ema", "params_ema", "ema", "state_dict", "model_state_dict", "model",
    "net", "network", "params", "weights",
)  # fmt: skip
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|model\.|net\.|backbone\.)+")
_LEFT_THERE = re.compile(r"(^|\.)(n_averaged|total_ops|total_params)$")  # by averaging, by thop


def _unwrap(data: Any, where: str, names: tuple[str, ...]) -> Checkpoint:
    """The tensors of a checkpoint, out of the wrappings that training scripts put around."""
    told, seen = names, list[Any]()
    while isinstance(data, Mapping) and not any(data is one for one in seen):
        seen.append(data)
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
# fold: Reading a file as data, and nothing else
#| export checkpoint.py
import argparse
import json
import zipfile


def _read_file(path: Path) -> Any:
    try:
        begins = _begins(path)
        safetensors = path.suffix == ".safetensors" and not begins.startswith(b"PK")
        if safetensors or begins[8:9] == b"{":  # names lie
            from safetensors.torch import load_file

            return load_file(path)
        _refuse_inflation(path)
        allowed = torch.serialization.safe_globals([argparse.Namespace])  # timm's: only values
        with allowed, path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ImportError(".safetensors needs safetensors: pip install 'mixconv[hub]'") from None
    except Exception as error:  # damaged files fail in many ways; all mean the same
        raise ValueError(f"{path} holds no readable weights: {_why(path, error)}") from error


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _why(path: Path, error: Exception) -> str:
    """One line; torch's own are many, and advise to run what a file asks for."""
    if isinstance(error, OSError):
        return str(error)
    begins = _begins(path)
    if begins.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to them; `git lfs pull` gets the file"
    if begins.lstrip().startswith(b"<"):
        return "it is a web page; was the download refused?"
    if code := re.search(r"GLOBAL ([\w.]*\w)", str(error)):
        return f"it asks to run {code[1]}, which is refused; save a state_dict()"
    if "weights_only" in str(error):
        return "it is no state_dict() that torch.save wrote"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refuse_inflation(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to far more than it takes; torch's do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 2 * path.stat().st_size + (1 << 20):
            raise ValueError(f"it would unpack to {size >> 20} MB")


# %% tags=["plumbing"]
# fold: How a path, a folder or a hub name becomes a file
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
# fold: Asking the hub, or its cache here
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
# ## Which padding did they want?
#
# The tensors are here. Do they say with which network they compute what they should? They do not. timm's two families want different ones. Its `tf_mixnet_*` are the official weights: TensorFlow padding, epsilon 1e-3. Its `mixnet_*` were trained in PyTorch: symmetric padding, epsilon 1e-5. Both have the same names and shapes, so the wrong choice loads without an error and computes something else. (That is the picture of [the page before](08_official.ipynb).)
#
# What tells, then? Our own state dicts say it themselves (chapter 7). For weights under timm's names, it is the name of the network in a training checkpoint, of the file, of a folder around it, or in the `config.json` beside it. The family's name must stand where a word begins: `my_mixnet_s` is somebody's own, and tells nothing.

# %%
#| export weights.py
from mixconv.checkpoint import Checkpoint, read_checkpoint

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


# %%
for name in ("timm/tf_mixnet_s.in1k", "mixnet_s.pth", "my_mixnet_s.pth"):
    print(f"{name:22} {settings_of(Checkpoint(to_timm(numbered), (name,), None))}")

# %% [markdown]
# **8.4** ★ *5 minutes, two lines.* Which padding do weights of this name want? "same" for timm's `tf_mixnet_*`, "symmetric" for its `mixnet_*`, None for any other name. Names may have an owner and a slash before them. (That is `settings_of` without our own note, folders and files.)
#
# <details><summary>Hint: the idea</summary>
#
# One name is the end of the other. Ask for the longer one first, at the beginning of what follows the slash.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def padding_of(name: str) -> str | None:
    raise NotImplementedError


def test_padding_of(answer) -> None:
    names = {"tf_mixnet_s": "same", "timm/tf_mixnet_l.in1k": "same", "mixnet_m": "symmetric",
             "timm/mixnet_xl.ra_in1k": "symmetric", "last.pth": None, "my_mixnet_s": None,
             "timm/tf_efficientnet_b0": None}  # fmt: skip
    for name, padding in names.items():
        expect(answer, name, gives=padding, why="what its family was trained with")


attempt(padding_of, test_padding_of)


# %% tags=["solution"]
# fold: Solution
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


def by_tf(name: str) -> str | None:
    """take `tf_` alone for the sign: timm has other networks whose names begin with it"""
    own = name.rpartition("/")[2]
    return "same" if own.startswith("tf_") else "symmetric" if own.startswith("mixnet_") else None


attempt(padding_of_solution, test_padding_of, wrong=[anywhere, whole_name, by_tf])


# %% [markdown]
# ## Into the network
#
# What if the weights do not fit, and half of them are in already? So nothing may change before everything is known to fit. `load_weights` recognises timm's names (the old gen-efficientnet names are the same) and our own, compares all names and shapes, and only then copies.

# %%
#| export weights.py
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


# %% tags=["plumbing"]
# fold: Comparing everything, then copying
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


# %% tags=["plumbing"]
# fold: A stem for another number of image channels
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
# fold: A classifier for another number of classes
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
# fold: What does not fit, and how it is said
#| export weights.py
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


# %% [markdown]
# MixNet-S's weights, offered to a MixNet-M:

# %%
from textwrap import fill as wrap

from mixconv.mixnet import MIXNET_M

medium = MixNet(MIXNET_M)
before = medium.stem.conv.weight.clone()
try:
    load_weights(medium, to_timm(numbered))
except ValueError as error:
    print(wrap(str(error), 90))
print("changed:", not torch.equal(medium.stem.conv.weight, before))

# %% [markdown]
# Out to timm's names and in again, into a network that started with other weights. So that no two tensors are alike, the normalisations get numbers of their own first.

# %%
from mixconv.teaching import check

model, again = MixNet(MIXNET_S).eval(), MixNet(MIXNET_S).eval()
for tensor in model.state_dict().values():
    if tensor.ndim == 1:
        tensor.uniform_(0.5, 1.5)
load_weights(again, to_timm(model))
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    check(again(image), model(image), "scores after a round trip through timm's names")

# %% [markdown]
# What does that prove? Less than it seems. A round trip accepts any table that undoes itself. Swap two names in `_WIDE`, and the way out and the way in are wrong in the same way:

# %%
from unittest.mock import patch

right = to_timm(model)
with patch.dict(_WIDE, {"expand.norm": "bn2", "depthwise.norm": "bn1"}), torch.no_grad():
    swapped = to_timm(model)
    load_weights(again, swapped)
    print("round trip accepts it:", torch.equal(again(image), model(image)))
differing = [name for name in right if not torch.equal(right[name], swapped[name])]
print(f"{len(differing)} tensors lie under a wrong name, such as {differing[0]}")

# %% [markdown]
# Only another implementation can tell. So `tests/peers/test_timm.py` loads `to_timm` into timm's *own* networks and compares scores, gradients and running statistics, for all three sizes and both families, and the other way round; `tests/peers/test_geffnet.py` does it with gen-efficientnet.

# %% [markdown]
# **8.5** ★★ *10 minutes, three lines.* Fool the round trip. `names` has timm's name for each tensor of ours, `shapes` the shape of each. Return another table of the same names: a wrong one that a round trip accepts, and timm's loading, too, since every shape fits.
#
# <details><summary>Hint: the idea</summary>
#
# A round trip accepts every table that loses nothing. Loading looks at shapes. Which two tensors can change places?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `for one, other in itertools.combinations(names, 2):`
#
# </details>

# %%
import itertools

Shapes = dict[str, tuple[int, ...]]


def fooling(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    raise NotImplementedError


def test_fooling(answer) -> None:
    shapes = {"one.weight": (8, 4), "norm.weight": (8,), "two.weight": (4, 8), "norm.bias": (8,)}
    names = {name: f"timm.{name}" for name in shapes}
    found = answer(names, shapes)
    assert isinstance(found, dict), f"a table, got {found!r}"
    assert found.keys() == names.keys(), f"a name for each of {list(names)}"
    assert found != names, "that is the right table"
    out = {found[name]: name for name in shapes}  # what lies under each of timm's names
    assert out.keys() == set(names.values()), f"names lost or invented: {found}"
    misfits = [name for name in shapes if shapes[out[names[name]]] != shapes[name]]
    assert not misfits, f"loading sees another shape for {', '.join(misfits)}"


attempt(fooling, test_fooling)


# %% tags=["solution"]
# fold: Solution
def fooling_solution(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    for one, other in itertools.combinations(names, 2):
        if shapes[one] == shapes[other]:
            return names | {one: names[other], other: names[one]}
    return names


def next_name(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """move every name by one: shapes differ, and loading says so"""
    moved = [*list(names.values())[1:], next(iter(names.values()))]
    return dict(zip(names, moved, strict=True))


def one_name_twice(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """give two tensors one name: the second overwrites the first, and the round trip sees it"""
    return names | {"norm.bias": names["norm.weight"]}


attempt(fooling_solution, test_fooling, wrong=[next_name, one_name_twice])

# %% [markdown]
# ## The zoo
#
# What do most people want of all this? One line, with a network connection and `pip install 'mixconv[hub]'`. (Not run here; the book is built without a network.)
#
# ```python
# from mixconv import mixnet_s
#
# model = mixnet_s(weights="timm/tf_mixnet_s.in1k").eval()
# ```
#
# It has 'SAME' padding and epsilon 1e-3, read from the name. Four such functions, S, M, L and XL, stand above all the rest: a network from chapter 7, weights from this page.
#
# What the caller says wins over what the weights say. Where neither says anything, the official settings are taken, and not in silence. The numbers of classes and of image channels are those of the weights, unless the caller wants others.

# %% tags=["plumbing"]
# fold: What the networks are made of
#| export zoo.py
"""`mixnet_s`, `mixnet_m`, `mixnet_l`, `mixnet_xl`: networks by name, with weights (chapter 8)."""

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, ParamSpec

from torch import Tensor

from mixconv.checkpoint import read_checkpoint
from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, MIXNET_XL, MixNet, MixNetConfig
from mixconv.network import refuse_timm_names
from mixconv.weights import OFFICIAL, fill, settings_of


# %% tags=["plumbing"]
# fold: What the caller says, else the weights, else what is official
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
# fold: The warning, and the sizes that weights tell
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
@refuse_timm_names
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
# fold: MixNet-M, L and XL, with the signature of S
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


@refuse_timm_names
@_like(mixnet_s)
def mixnet_m(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-M, 5.0 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_M, weights, **_UNSAID | options)


@refuse_timm_names
@_like(mixnet_s)
def mixnet_l(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-L, 7.3 million parameters: M, 1.3 times as wide. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_L, weights, **_UNSAID | options)


@refuse_timm_names
@_like(mixnet_s)
def mixnet_xl(weights: Any = None, **options: Any) -> MixNet:
    """MixNet-XL, timm's, 11.9 million parameters. Arguments are those of `mixnet_s`."""
    return _build(MIXNET_XL, weights, **_UNSAID | options)


# %% [markdown]
# And what does one get without the hub? The weights of `model` under timm's names, in four files. A plain `dict` leaves out the note about settings that our own state dicts carry along; the last file has it.

# %%
from warnings import catch_warnings, simplefilter

files = {"tf_mixnet_s.pth": dict(to_timm(model)), "mixnet_s.pth": dict(to_timm(model)),
         "best.pth": dict(to_timm(model)), "with a note.pth": to_timm(model)}  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    for name, state in files.items():
        torch.save(state, Path(folder) / name)
        with catch_warnings(record=True) as said:
            simplefilter("always")
            found = mixnet_s(weights=Path(folder) / name).settings()
        print(f"{name:16} {found['padding']:10} {found['norm_eps']}")
        for warning in said:
            print(wrap(str(warning.message), 90, initial_indent="  ", subsequent_indent="  "))

# %% [markdown]
# The second file is where it goes wrong without a warning: these weights belong to a network with 'SAME' padding, and their name says otherwise. Names can lie. A note in the file is better, and `MixNet.state_dict` writes it.

# %% [markdown]
# ## Takeaways
# - Weights go in from timm's names, from files and from the hub, and out to timm. All is checked before anything changes. Opening a pickle runs what it asks for, unless one forbids it; here it is forbidden.
# - A round trip accepts any table that undoes itself; another implementation does not.
# - Padding and epsilon are part of trained weights, and their shapes do not show them. `mixnet_s(weights=…)` takes them from a note in the weights, else from their name, else it warns and takes the official ones.
#
# **Further reading**: timm's [model file](https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/efficientnet.py), which builds MixNets among others; the [safetensors format](https://github.com/huggingface/safetensors), which can be read without running anything.
#
# Previous: [8 · The official code](08_official.ipynb) · Next: [9 · Any model](09_any_model.ipynb)
