# %% [markdown]
# # 16 · A model, rewritten
#
# Norms folded, layers merged, blocks as one operation: how much of it arrives in a whole network, and how sure can one be that the network still computes the same? The bars are one image through MixNet-S.
#
# **You will be able to**
# - make a network faster with one line, and read from the report what was done;
# - change a model piece by piece so that every step can be undone;
# - say where the time goes that is left.
#
# **Know first:** [chapter 11](11_why_slow.ipynb), [chapter 12](12_operation.ipynb) and [chapter 15](15_block_in_one_pass.ipynb), and the two pages before this one.
#
# **Time:** 30 minutes to read. Runs in under 90 seconds on two cores. It is the last of three pages, after [A model, in pieces](16_model_pieces.ipynb) and [A model, read](16_model_read.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
import json
from pathlib import Path

import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

bench = json.loads(Path("../figures/bench.json").read_text())
seconds = next(
    row["seconds"] for row in bench["networks"] if (row["network"], row["batch"]) == ("MixNet-S", 1)
)
bars = {
    "timm, eager": "timm, as it is",
    "split": "this book's, as it is",
    "fused, merged": "folded and merged",
    "fused, layers": "layers as one operation",
    "fused": "blocks as one operation",
    "timm, fused": "timm's, given to fuse_for_inference",
    "timm, ONNX Runtime": "timm's, in ONNX Runtime",
    "ours, ONNX Runtime": "folded and merged, in ONNX Runtime",
}

# %% tags=["drawing"]
# fold: The code that draws this
use_style()
names = [name for name in bars if name in seconds]
times = [1e3 * seconds[name] for name in names]
places = [place + ("ONNX" in name) / 2 for place, name in enumerate(names)]
rewritten = ["fused" in name or "ours" in name for name in names]
colors = ["#0072B2" if new else "#aaaaaa" for new in rewritten]
figure, axis = plt.subplots(figsize=(7.8, 3.5))
axis.barh(places, times, color=colors)
axis.set_yticks(places, [bars[name] for name in names])
axis.invert_yaxis()
axis.bar_label(axis.containers[0], fmt="%.1f", padding=3, fontsize=9)
axis.axhline(places[-2] - 0.75, color="#767676", linewidth=0.8)
axis.text(max(times), places[-2] - 0.6, "in another program", ha="right", va="top", fontsize=9)
for color, label in (("#aaaaaa", "not rewritten"), ("#0072B2", "rewritten")):
    axis.barh(0, 0, color=color, label=label)
axis.legend(loc=(0.72, 0.42), fontsize=9)
axis.set(xlabel="milliseconds, MixNet-S, one image", xlim=(0, 1.1 * max(times)))
gain = seconds["split"] / seconds["fused"]
show(
    figure,
    "network_speeds.png",
    "Bars of milliseconds for one image through MixNet-S: timm's and this book's network as they "
    "are, after each step of rewriting, and their exports in ONNX Runtime. Folding and merging "
    "is one large step, whole blocks as one operation the other; single layers between them gain "
    "less.",
    caption=f"Rewritten to whole blocks, MixNet-S is {gain:.1f} times as fast as it is.",
)

# %% [markdown]
# ## The report
#
# What was done is worth little if nobody can see it. "It is as slow as before" must have an answer other than reading this chapter. So the fused model carries a report: a line for each piece, fused or left, and if left, why.

# %%
#| export fast/report.py
"""What `fuse_for_inference` did, in words (chapter 16)."""

from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """What became of one layer, norm or block.

    Attributes:
        name: in the model; empty for the model itself.
        before: the classes that were there.
        after: the class that is there now; empty if nothing was changed.
        reason: why nothing was changed.
    """

    name: str
    before: str
    after: str = ""
    reason: str = ""


_HINT = (
    "nothing was fused. Layers and blocks of your own are known once describe_layer and "
    "describe_block have a rule for them (mixconv.fast.describe)"
)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# %% tags=["plumbing"]
# fold: The report, and how it is written
#| export fast/report.py
@dataclass(frozen=True)
class FusionReport:
    """What `fuse_for_inference` did; `str` gives a line for each piece.

    Attributes:
        pieces: layers and blocks that were fused, and what was left.
        notes: what holds for more than one of them.
    """

    pieces: list[Piece]
    notes: list[str]

    @property
    def fused(self) -> list[Piece]:
        """What was changed."""
        return [piece for piece in self.pieces if piece.after]

    @property
    def left(self) -> list[Piece]:
        """What was not, for the reason given."""
        return [piece for piece in self.pieces if not piece.after]

    def __str__(self) -> str:
        blocks = sum(piece.after == "FusedBlock" for piece in self.pieces)
        fused = f"{_count(blocks, 'block')} and {_count(len(self.fused) - blocks, 'layer')} fused"
        lines = [f"{fused}, {len(self.left)} left", *self.notes]
        lines += [] if self.fused else [_HINT]
        reasons = *self.notes, *(piece.reason for piece in self.pieces)
        lines += [_VIEWS] if any("view size" in reason for reason in reasons) else []
        for name, before, after, reason in self.pieces:
            end = f"-> {after}" if after else f"left: {reason}"
            lines.append(f"{name or '(the model)'}: {before} {end}")
        return "\n".join(lines)


# %% [markdown]
# Many write MixConv themselves: a list of depthwise convolutions, a split, a `cat`. The report cannot know that it is one, but where it looks like one, it says what to tell.

# %% tags=["plumbing"]
# fold: The report of a rewrite, piece by piece
#| export fast/report.py
from torch import nn

_VIEWS = (
    "a map is viewed, which channels_last does not allow: "
    "memory_format=torch.preserve_format keeps maps as they were"
)
_PLAIN_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_rule(module: nn.Module) -> str:
    """What to tell of a layer that may be a MixConv of somebody's own; else empty."""
    parts = [part for part in module.modules() if not part._modules]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    depthwise = all(conv.groups == conv.in_channels for conv in convs)
    sizes = {conv.kernel_size for conv in convs}
    if type(module) in _PLAIN_LISTS or len(convs) < len(parts) or len(sizes) < 2 or not depthwise:
        return ""
    name = next((name for name, child in module.named_children() if child._modules), "children()")
    kind = type(module).__name__
    return f". If it is a MixConv: describe_layer.register({kind}, lambda mix: list(mix.{name}))"


# %% [markdown]
# ## Piece by piece, and back
#
# `_Rewriter` holds the copy, and remembers each module that it takes out. Since the new ones are new and the old ones were not changed, putting back is putting back.

# %%
#| export fast/fuse.py
"""Models rewritten for inference: `fuse_for_inference` (chapter 16)."""

from torch import nn

from mixconv.fast.report import Piece, find_rule


class _Rewriter:
    """Changes a model piece by piece, and can put back what it took out."""

    def __init__(self, model: nn.Module, backend: str, preserve: bool) -> None:
        self.root, self.backend, self.preserve = nn.Sequential(model), backend, preserve
        self.pieces: dict[str, Piece] = {}
        self.notes: list[str] = []
        self.taken: list[tuple[nn.Module, str, nn.Module]] = []
        self.rules = {name: find_rule(part) for name, part in self.root.named_modules()}

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def put(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of another, under all its names."""
        old = self.root.get_submodule(name)
        for key, value in vars(old).items():  # that others may read, such as the stride
            plain = isinstance(value, int | float | str | tuple)
            if plain and not key.startswith("_") and not hasattr(new, key):
                setattr(new, key, value)
        for module in list(self.root.modules()):
            for key in [key for key, child in module._modules.items() if child is old]:
                self.taken.append((module, key, old))
                module._modules[key] = new


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def put_back(self, mark: int, known: dict[str, Piece], reason: str) -> None:
        """Undo all but the first `mark` changes; what is not among the known pieces is left."""
        while len(self.taken) > mark:
            module, key, old = self.taken.pop()
            module._modules[key] = old
        for name, piece in self.pieces.items():
            if piece.after and known.get(name) is not piece:
                self.pieces[name] = piece._replace(after="", reason=reason)


# %% [markdown]
# One piece: make the new one, try it, put it in place. Whatever goes wrong on the way is a reason to leave the piece, and is reported. That holds for a fault of this library's own, too: the model is then right and slow, and only the report says so. One more reason to read it.

# %%
#| export fast/fuse.py
from collections.abc import Callable

from torch import Tensor

from mixconv.fast.fused_layer import FusedMixConv2d, FusedModule
from mixconv.fast.trial import piece_difference


def _say(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check(before: nn.Module, after: nn.Module, image: Tensor) -> None:
    if reason := piece_difference(before, after, image):
        raise ValueError(reason)


class _Rewriter(_Rewriter):
    def record(self, piece: Piece, rewrite: Callable[[], dict[str, nn.Module]]) -> None:
        """Put what a function makes in place of a piece; or say why not, if it raises."""
        try:
            new = rewrite()
        except Exception as error:  # anything may go wrong in a stranger's forward
            self.pieces[piece.name] = piece._replace(reason=_say(error))
            return
        for name, module in new.items():
            if isinstance(module, FusedModule):
                module.preserves_format = self.preserve
            self.put(name, module)
        if new:
            self.pieces[piece.name] = piece._replace(after=type(new[piece.name]).__name__)


# %% [markdown]
# A chain is tried on an image a little larger than its kernels reach: small, so that it costs little. Where its weights are rounded, the same rewrite is made and tried in float32, too: the page before has shown what bfloat16 hides. To fuse all of MixNet-S, with each piece tried on both images and the whole on one, took 0.8 seconds. <!-- measured: time of fuse_for_inference(mixnet_s()), two cores, 2026-11 -->

# %%
#| export fast/fuse.py
from functools import partial

from mixconv.fast.describe import ask, describe_layer
from mixconv.fast.rewrite import fuse_chain
from mixconv.fast.trial import TOLERANCE, find_tolerance, in_float32, make_image


def _check_chain(old: list[nn.Module], new: list[nn.Module], image: Tensor) -> None:
    before, after = nn.Sequential(*old), nn.Sequential(*new)
    _check(before, after, image)
    if find_tolerance(after) > TOLERANCE:  # rounding hides much: so once more, not rounded
        exact = in_float32(before)
        backend = "kernel" if isinstance(new[0], FusedMixConv2d) else "merged"
        _check(exact, nn.Sequential(*fuse_chain(list(exact.children()), backend)), image)


class _Rewriter(_Rewriter):
    def fuse_chain(self, names: list[str]) -> None:
        """A layer, norm and activation."""
        old = [self.root.get_submodule(name) for name in names]
        classes = " + ".join(type(module).__name__ for module in old)
        self.record(Piece(names[0], classes), partial(self._rewrite_chain, names, old))


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def _rewrite_chain(self, names: list[str], old: list[nn.Module]) -> dict[str, nn.Module]:
        new = fuse_chain(old, self.backend)
        if len(old) == 1 and type(new[0]) is type(old[0]):
            return {}  # no gain
        convs: list[nn.Conv2d] = ask(describe_layer, old[0])
        reach = max(
            d * (k - 1) for c in convs for d, k in zip(c.dilation, c.kernel_size, strict=True)
        )
        image = make_image(sum(c.in_channels for c in convs), reach + 5, reach + 4)
        _check_chain(old, new, image)
        return dict(zip(names, new, strict=True))


# %% [markdown]
# Blocks, if a form takes them. The kernel for blocks computes in float32 on a CPU; elsewhere their layers are fused one by one.

# %%
#| export fast/fuse.py
import torch

from mixconv.fast.describe import describe_block
from mixconv.fast.fused_block import BLOCK_FORMS
from mixconv.fast.rewrite import fuse_block, why_no_form


class _Rewriter(_Rewriter):
    def fuse_blocks(self, name: str) -> None:
        """All blocks of known classes, if the backend has such an operation."""
        gone: set[nn.Module] = set()
        for inner, block in list(self.root.get_submodule(name).named_modules()):
            known = type(block) in describe_block.registry and block not in gone
            if known and self.backend != "merged":
                at = _join(name, inner)
                rewrite = partial(self._rewrite_block, at, block)
                self.record(Piece(at, type(block).__name__), rewrite)
                if at in self.pieces and self.pieces[at].after:
                    gone.update(block.modules())


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def _rewrite_block(self, name: str, block: nn.Module) -> dict[str, nn.Module]:
        fused = fuse_block(block)
        like, spec = next(fused.buffers()), fused.spec
        channels = spec.expand.inputs if spec.expand else sum(spec.mix.channels)
        why = "" if self.backend == "kernel" else why_no_form(BLOCK_FORMS, spec, channels, like)
        if like.dtype != torch.float32 or not like.is_cpu:
            why = "as a whole they are computed in float32 on a CPU only"
        if why:
            self.note(f"some blocks were fused layer by layer: {why}")
            return {}
        _check(block, fused, make_image(channels, 12, 11, batch=2))
        return {name: fused}


# %% [markdown]
# ## The whole, and its parts
#
# Even when every piece computes the same, the whole may not: a forward can look at the type of its input and do something that no trace shows, or read a weight in a place where no trace went. So the whole is tried, too. If it is not the same, everything goes back, and the model's parts are fused one by one, each tried as a whole in turn. The same is done where a forward cannot be traced at all.

# %%
#| export fast/fuse.py
from mixconv.fast.chains import CannotTraceError, Chains
from mixconv.fast.trial import twin


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


def _label(name: str) -> str:
    return name[2:] or "the model"


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def fuse(self, name: str) -> None:
        """Fuse what lies under a name; keep it if the whole of it still computes the same."""
        before = twin(self.root.get_submodule(name))
        mark, known = len(self.taken), dict(self.pieces)
        for fuse in (self.fuse_whole, self.fuse_children):
            fuse(name)
            if len(self.taken) == mark or not (reason := self.try_whole(before, name)):
                return
            self.put_back(mark, known, reason)

    def fuse_children(self, name: str) -> None:
        """Each part by itself."""
        for child, module in list(self.root.get_submodule(name).named_children()):
            if module._modules or type(module) in describe_layer.registry:
                self.fuse(_join(name, child))


# %%
#| export fast/fuse.py
class _Rewriter(_Rewriter):
    def fuse_whole(self, name: str) -> None:
        """Whole blocks, then the layers that are left."""
        self.fuse_blocks(name)
        try:
            chains = Chains(self.root.get_submodule(name))
        except CannotTraceError as error:
            self.note(f"{_label(name)} is fused part by part: it cannot be traced ({_say(error)})")
            self.fuse_children(name)
            return
        for chain in chains.found:
            self.fuse_chain([_join(name, at) for at in chain])
        for at, reason in chains.left.items():
            place = _join(name, at)
            kind = type(self.root.get_submodule(place)).__name__
            self.pieces[place] = Piece(place, kind, "", reason)
        for at in chains.closed:
            self.fuse(_join(name, at))


# %% [markdown]
# Which image fits a stranger's model? The channels of its first layer, at 64×64 or 224×224 pixels, are a good guess. Where the original does not run on either, the report says that only the pieces were tried.

# %%
#| export fast/fuse.py
from mixconv.fast.trial import CannotTryError, difference


class _Rewriter(_Rewriter):
    def try_whole(self, before: nn.Module, name: str) -> str:
        """Why the changes under a name cannot stay; empty if they can, or nothing tells."""
        counts = [getattr(module, "in_channels", None) for module in before.modules()]
        channels = next((count for count in counts if isinstance(count, int)), 3)
        for size in (64, 224):
            try:
                after, image = self.root.get_submodule(name), make_image(channels, size, size)
                reason = difference(before, after, image, random=True)
                return reason and f"{_label(name)}, as a whole, was {reason}"
            except CannotTryError as error:
                why = _say(error)
        if name == "0":
            self.note(f"each piece was tried, but not the model as a whole: {why}")
        return ""


# %% [markdown]
# At the end the weights are laid out for channels_last, unless the caller wants maps as they were. That changes no number, but a `view` of a map can fail with it, so it is tried, too.

# %% tags=["plumbing"]
# fold: How the weights are put in channels last
#| export fast/fuse.py
from typing import cast


class _Rewriter(_Rewriter):
    def lay_out(self) -> None:
        """Put the weights of all convolutions in channels_last, as the kernels want images."""
        if self.preserve:
            return
        before = twin(self.root.get_submodule("0"))
        layers = [m for m in self.root.modules() if type(m) in describe_layer.registry]
        convs = [m for m in layers if type(getattr(m, "weight", None)) is nn.Parameter]
        weights = [cast("nn.Parameter", conv.weight) for conv in convs]
        for conv, weight in zip(convs, weights, strict=True):
            laid = weight.detach().contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(laid, requires_grad=False)
        if reason := self.try_whole(before, "0"):
            self.note(f"weights are not in channels_last: {reason}")
            for conv, weight in zip(convs, weights, strict=True):
                conv.weight = weight


# %% tags=["plumbing"]
# fold: How the report finds what is left
#| export fast/fuse.py
from torch.nn.modules.batchnorm import _BatchNorm

from mixconv.fast.describe import NORMS, is_one_of
from mixconv.fast.report import FusionReport
from mixconv.layer import MixConv2d


class _Rewriter(_Rewriter):
    def report(self) -> FusionReport:
        """All pieces in the model's order, and the norms and layers that are left besides."""
        places = {name: place for place, (name, _) in enumerate(self.root.named_modules())}
        for name, module in self.root.named_modules():
            kind, reason = type(module), "no layer that feeds it alone comes before it"
            layer = isinstance(module, nn.Conv2d | MixConv2d)
            rule = self.rules.get(name, "")
            unknown = (layer or rule) and kind not in describe_layer.registry
            if unknown or not is_one_of(module, NORMS):
                reason = f"{kind.__name__} is not a class that is known{rule}"
            if unknown or isinstance(module, _BatchNorm):
                self.pieces.setdefault(name, Piece(name, kind.__name__, "", reason))
        pieces = sorted(self.pieces.values(), key=lambda piece: places.get(piece.name, 0))
        return FusionReport([p._replace(name=p.name[2:]) for p in pieces], self.notes)


# %% [markdown]
# ## All together
#
# A fused model cannot be trained. Its `train` says so before anything is changed: otherwise the refusal would come from somewhere in the middle, with dropout already on. The same holds for each part with something new in it.

# %% tags=["plumbing"]
# fold: How a fused model refuses to be trained
#| export fast/fuse.py
from mixconv.fast.folding import refuse_training


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a fused model and of its parts."""
    refuse_training(mode)
    return type(model).train(model, mode)


class _Rewriter(_Rewriter):
    def refuse_training(self) -> None:
        """Let the copy, and all in it that holds something new, stay in evaluation."""
        new = {module._modules[key] for module, key, _ in self.taken}
        fused = self.root[0]
        for part in fused.modules():
            if part is fused or (part._modules and not new.isdisjoint(part.modules())):
                cast("Any", part).train = partial(_train, part)


# %%
#| export fast/fuse.py
import copy
import threading
from typing import Any

from mixconv.fast.describe import register_peers

BACKENDS = ("auto", "kernel", "merged")
_FORMATS = (torch.channels_last, torch.preserve_format)
_ONE_AT_A_TIME = threading.RLock()  # torch.fx changes nn.Module itself while it traces


def fuse_for_inference(
    model: nn.Module, *, backend: str = "auto",
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:  # fmt: skip
    """A copy of a model that computes the same in evaluation, and faster.

    Batch norms are folded, mixed depthwise layers and whole blocks become one operation each,
    grouped 1×1 convolutions one convolution; weights are put in channels_last. Each change is
    tried on a random image, on the CPU in float32, and undone if the result is another (of a
    model in half precision each layer, and the whole for gross errors only). What is not known,
    or has hooks, is left as it is. The copy's `fusion_report` tells all of it.

    Args:
        model: any module; it is not changed. What its `forward` does is kept; another method that
            reads a layer between a convolution and its norm would see something else.
        backend: "kernel" for `mixconv::mixed_depthwise2d` and `mixconv::inverted_residual`;
            "merged" for ordinary convolutions only, as ONNX needs; "auto" for the operations
            where a kernel would run, which may compile it.
        memory_format: `torch.channels_last` gives maps in that format, which `view` may refuse;
            `torch.preserve_format` as the model itself gives them, at the price of copies.

    Returns:
        The copy. It cannot be trained, unless nothing was fused.

    Raises:
        TypeError: if `model` is not a module, or a scripted one.
        ValueError: for an unknown backend or format, or a model that cannot be copied.

    Source: ours. Chapter 16.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module in Python, got {model!r:.100}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if memory_format not in _FORMATS:
        names = " or ".join(map(str, _FORMATS))
        raise ValueError(f"memory_format must be {names}, got {memory_format!r}")
    with _ONE_AT_A_TIME:
        register_peers()
        preserve = memory_format == torch.preserve_format
        return _fuse_copy(_Rewriter(_copy(model), backend, preserve))


# %% tags=["plumbing"]
# fold: How a model is copied
#| export fast/fuse.py
def _copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation; of what a `DistributedDataParallel` trains, not of that itself."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    try:
        return copy.deepcopy(cast("nn.Module", inner)).eval().requires_grad_(False)
    except Exception as error:  # anything may be in a stranger's model
        raise ValueError(f"model must be one that copy.deepcopy copies: {error}") from error


# %%
#| export fast/fuse.py
def _fuse_copy(rewriter: _Rewriter) -> nn.Module:
    if any(t.is_meta for t in (*rewriter.root.parameters(), *rewriter.root.buffers())):
        rewriter.note("on the meta device there are no numbers to try a change with")
    else:
        rewriter.fuse("0")
    fused = cast("Any", rewriter.root[0])
    if rewriter.taken:
        rewriter.lay_out()
        rewriter.refuse_training()
    fused.fusion_report = rewriter.report()
    return cast("nn.Module", fused)


# %% [markdown]
# The layer, the block and the networks of this book, with the operations ("kernel") and with ordinary convolutions only ("merged"). "auto", the default, takes the operations where a kernel would run, and the convolutions elsewhere.

# %%
from mixconv import MixConvBlock, mixnet_s, mobilenet_v1, mobilenet_v2

torch.manual_seed(0)
cases = {
    "layer": MixConv2d(24, (3, 5, 7), stride=2, padding="same"),
    "block": MixConvBlock(24, 24, (3, 5, 7), squeeze_ratio=0.5, activation="swish"),
    "MobileNetV1 357": mobilenet_v1((3, 5, 7), num_classes=10),
    "MobileNetV2 357": mobilenet_v2((3, 5, 7), num_classes=10),
    "MixNet-S": mixnet_s(num_classes=10),
}
for norm in nn.ModuleList(cases.values()).modules():
    if isinstance(norm, nn.BatchNorm2d):  # as after training, or a lost norm would not show
        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0, 0.1)

# %%
from mixconv.teaching import table

rows = []
for name, model in cases.items():
    x = make_image(24 if name in ("layer", "block") else 3, 64, 48, batch=2)
    with torch.no_grad():
        wanted = model.eval()(x)
        for backend in ("kernel", "merged"):
            fused = fuse_for_inference(model, backend=backend)
            same = float((fused(x) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
            report = fused.fusion_report
            blocks = sum(piece.after == "FusedBlock" for piece in report.fused)
            counts = [blocks, len(report.fused) - blocks, len(report.left)]
            rows.append([name, backend, *counts, same])
table(["model", "backend", "blocks fused", "layers fused", "left", "the same"], rows)


# %% [markdown]
# The layer with padding "same" and stride 2 has a 3×3 kernel and up, so one convolution can do it. With a 1×1 kernel in the mix, where its one weight would stand in a larger kernel depends on the image's size, so no one kernel does for all images. The operation has no such trouble.
#
# Now a model that does what the pages before warned of:

# %%
class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = MixConv2d(8, (3, 5)), nn.BatchNorm2d(8)
        self.twice, self.seen, self.good = (
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.seen[1].register_forward_hook(print)

    def forward(self, x):
        y = self.mix(x)
        y = y + self.norm(y)
        return self.good(self.seen(self.twice(self.twice(y))))


fused = fuse_for_inference(Stubborn(), backend="kernel")
print(fused.fusion_report)


# %% [markdown]
# And one with a forward that no trace shows: it looks at the class of its own layer.

# %%
class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.act = MixConv2d(8, (3, 5)), nn.ReLU()

    def forward(self, x):
        y = self.act(self.mix(x))
        return y if type(self.mix) is MixConv2d else -y


plain = nn.Sequential(MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU())
print(fuse_for_inference(nn.Sequential(Moody(), plain), backend="kernel").fusion_report)


# %% [markdown]
# By hand, what `fuse` did there:
#
# 1. The whole: both layers become operations, each the same as its original. The whole is tried, and is not the same. Both go back.
# 2. The first part, `Moody`, by itself: its layer is fused, `Moody` is tried, not the same, back.
# 3. The parts of that part: the layer again, alone it is right. `Moody` is tried once more: not the same, back. It has no smaller parts; it stays as it was.
# 4. The second part: fused, tried, the same. It stays.
# 5. The whole is tried with what is left of the changes, and is the same.
#
# How far does a trial protect from a rule that is wrong? Here is a layer that cuts off what is large, and somebody's rule that forgets it:

# %%
class Cutting(MixConv2d):
    def forward(self, x):
        return super().forward(x).clamp(max=self.limit)


describe_layer.register(Cutting, lambda layer: list(layer.convs))
for limit in (6, 1000):
    layer = Cutting(8, (3, 5))
    layer.limit = limit
    report = fuse_for_inference(nn.Sequential(layer), backend="kernel").fusion_report
    print(limit, "→", "fused" if report.fused else report.left[0].reason.split(":")[0])

# %% [markdown]
# The cut at 6 shows on the louder image. The one at 1000 shows on neither: the fused layer is wrong for images with such numbers, and nobody says so. A trial catches most wrong rules; yours should still be right.
#
# And what is refused:

# %%
for wrong in (
    lambda: fused.train(),
    lambda: fuse_for_inference(None),
    lambda: fuse_for_inference(Stubborn(), backend="fastest"),
):
    try:
        wrong()
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
fused.training, any(module.training for module in fused.modules())

# %% [markdown]
# ## On trained weights
#
# Random weights forgive: an error of a few percent moves random scores to other random scores. Chapter 9's network knows what it sees. Rewritten, it must see the same, in the same order, with the same shares:

# %%
from mixconv.efficientnet_lite import (
    class_names,
    efficientnet_lite0,
    find_weights,
    preprocess_lite,
)
from mixconv.teaching import photograph

trained = efficientnet_lite0(find_weights()).eval()
fast = fuse_for_inference(trained)
x = preprocess_lite(photograph(256)[:, :, 16:240, 16:240])
with torch.no_grad():
    before, after = (model(x).softmax(dim=1)[0] for model in (trained, fast))
torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
five = [[class_names()[i] for i in scores.topk(5).indices.tolist()] for scores in (before, after)]
assert five[0] == five[1]
print(str(fast.fusion_report).splitlines()[0])
five[1]

# %% [markdown]
# And how much faster? It has no gate, and one kernel size in each layer. By the stored times (`make bench`, 224×224 pixels):

# %%
for row in bench["trained"]["rows"]:
    ways = ("split", "fused", "fused, merged")
    before, after, ordinary = (1e3 * row["seconds"][way] for way in ways)
    print(f"{row['batch']} at once: {before:.0f} ms, rewritten {after:.1f} ms, ", end="")
    print(f"{before / after:.0f} times as fast; ", end="")
    print(f"with ordinary convolutions only, {before / ordinary:.1f} times")

# %% [markdown]
# ## What came of it
#
# Milliseconds for 224×224 pixels. All times in this chapter come from `figures/bench.json`, which `make bench` writes; it was measured on this machine:

# %%
machine = bench["machine"]
print(machine["cpu"], "·", machine["threads"], "threads ·", machine["vectors"])


networks = bench["networks"]


def show_times(names: list[str]):
    """A table of milliseconds: a row for each network and number of images."""
    rows = []
    for row in networks:
        times = [f"{1e3 * row['seconds'][n]:.1f}" if n in row["seconds"] else "–" for n in names]
        rows.append([f"{row['network']}, {row['batch']}", *times])
    return table(["network, images", *names], rows)


show_times(["timm, eager", "timm, compiled", "split",
            "fused, merged", "fused, layers", "fused", "timm, fused"])  # fmt: skip

# %% [markdown]
# - `split`: this book's network as it is. `fused, merged`: with the backend "merged". `fused, layers`: with the kernel, but layer by layer. `fused`: whole blocks.
# - `timm, fused`: timm's network given to `fuse_for_inference`. A dash: not measured.
#
# And in other programs, beside the whole blocks; `ours, …` is the merged copy, exported to ONNX:

# %%
show_times(
    ["fused", "timm, ONNX Runtime", "ours, ONNX Runtime", "timm, OpenVINO", "ours, OpenVINO"]
)


# %% [markdown]
# How far can one trust such a table? Each time is the shortest of several rounds in which all take turns. Two pairs in it do nearly the same work, and tell:

# %%
def apart(one: str, other: str) -> str:
    """How far two contenders differ at most, in percent of the faster."""
    pairs = [(s[one], s[other]) for s in (row["seconds"] for row in networks) if other in s]
    return f"up to {100 * max(max(a / b, b / a) - 1 for a, b in pairs):.0f}% apart"


print("shortest of", bench["rounds"], "rounds")
print("fused, ours and timm's:", apart("fused", "timm, fused"))
print("as they are, ours and timm's:", apart("split", "timm, eager"))


# %% [markdown]
# Rewritten, the two networks agree closely. As they are, they do not: with many images they live on fresh memory from the system, and we think that its price varies. (timm's MixNet-L seems hardly slower there than its MixNet-M.) Of an eager time at 16 images, believe the first digit; the next table shows no more.
#
# How far do the steps go, and where is somebody else faster? The steps are held against the faster of the two networks as they are, timm's and ours. The lower half has TensorFlow's padding, which the official weights need. It is compared with exports of the same networks.

# %%
def gains_of(row) -> list[str]:
    """How many times as fast each step makes a network; one digit where no more can be trusted."""
    s = row["seconds"]
    as_it_is = min(s[name] for name in ("split", "timm, eager") if name in s)
    digits = 1 if row["batch"] == 1 else 0
    return [f"{as_it_is / s[n]:.{digits}f}" for n in ("fused, merged", "fused, layers", "fused")]


rows = []
for padding in ("", ", same padding"):
    for row in networks:
        s = row["seconds"]
        rivals = [n for n in s if "fused" not in n and ("same padding" in n) == bool(padding)]
        best = min(rivals, key=s.get)
        who, gains = f"{row['network']}, {row['batch']}{padding}", gains_of(row)
        over = f"{s[best] / s['fused' + padding]:.2f}"
        rows.append([who, *(["–"] * 3 if padding else gains), best, over])
table(["network, images", "merged", "layers", "blocks", "best other", "blocks over it"], rows)

# %% [markdown]
# A number below 1 in the last column is a miss: there somebody else is faster. A network without gates and with plain ReLUs is what other engines fuse well. And MixNet-S with TensorFlow's padding, one image, is hardly faster than in ONNX Runtime.
#
# What do single layers bring, beyond folding and merging, and what do whole blocks bring beyond those?

# %%
for one, other in (("fused, merged", "fused, layers"), ("fused, layers", "fused")):
    saved = [100 * (1 - row["seconds"][other] / row["seconds"][one]) for row in networks]
    print(f"{one} → {other}: {min(saved):.0f} to {max(saved):.0f}% less time")

# %% [markdown]
# Whole blocks are the large step, because that is where the wide tensors go away (chapter 15).
#
# Against the goals that were set before anything was written:

# %%
table(["goal", "wanted", "measured", "met"],
      [[g["goal"], g["wanted"], g["measured"], "yes" if g["met"] else "no"]
       for g in bench["goals"]])  # fmt: skip

# %% [markdown]
# What limits it where a goal is missed?
#
# - A small layer at one image is over in tens of microseconds. Some of these are Python and the start of a second thread, which no kernel makes shorter, and of which the roofline knows nothing. That is in both goals for mixed layers at one image.
# - The roof itself is high there: a small layer's bytes never leave the cache.
# - With many images the limit is memory that the system hands out page by page.
# - Our export over timm's: the goal named MixNet-S at one image. That is the one case in which the merged network gains next to nothing in ONNX Runtime; we have not found out why.

# %%
for s, name in ((row["seconds"], f"{row['network']}, {row['batch']}") for row in networks):
    if "timm, ONNX Runtime" in s:
        print(name, "→", f"{s['timm, ONNX Runtime'] / s['ours, ONNX Runtime']:.1f}")


# %% [markdown]
# ## Exercises
#
# Here is a model that halves its image and treats both halves alike. Nothing in it is folded:

# %%
class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        left, right = x.chunk(2, dim=3)
        return torch.cat([self.norm(self.conv(left)), self.norm(self.conv(right))], 3)


print(fuse_for_inference(Halves()).fusion_report)

# %% [markdown]
# **16.3** ★★ *10 minutes, one line.* The report says why. Write a forward with the same result in which everything is folded.
#
# <details><summary>Hint: the idea</summary>
#
# The layers may be called once only. What does a 1×1 convolution, and a norm in evaluation, know of a pixel's neighbours?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# There is only one, and `chunk` and `cat` are not in it.
#
# </details>

# %%
from mixconv.teaching import attempt


def my_forward(self, x):
    raise NotImplementedError


def test_forward(answer) -> None:
    class Mine(Halves):
        forward = answer

    model, x = Mine().eval(), make_image(4, 6, 8)
    model.norm.running_mean.fill_(0.5)
    with torch.no_grad():
        same = torch.allclose(model(x), Halves.forward(model, x), atol=1e-5)
    assert same, "another result than that of Halves"
    report = fuse_for_inference(model).fusion_report
    assert len(report.fused) == 1, str(report).splitlines()[-1]


attempt(my_forward, test_forward)


# %% tags=["solution"]
# fold: Solution
def my_forward_solution(self, x):
    return self.norm(self.conv(x))  # a 1×1 convolution does not care where the image is cut


def as_before(self, x):
    """call the layers twice: a norm that is called twice is not folded"""
    return Halves.forward(self, x)


def without_norm(self, x):
    """leave the norm out"""
    return self.conv(x)


attempt(my_forward_solution, test_forward, wrong=[as_before, without_norm])

# %% [markdown]
# ## Takeaways
# - `fuse_for_inference(model)` rewrites a copy; its `fusion_report` says what was done, and why not more.
# - Every rewrite is tried beside its original, the model as a whole too, and put back if it differs. So most gaps in the rules cost speed and not correctness. What only rare numbers show (a cut far out, another epsilon) is not caught.
# - Old modules are never changed, only replaced: putting back is simple.
# - A network is as fast as its wide tensors are few: folding and merging, then whole blocks.
#
# **Further reading**: [torch.fx](https://arxiv.org/abs/2112.08429) (Reed and others), on what a traced graph can say and what it cannot.
#
# Previous: [16 · A model, read](16_model_read.ipynb) · Next: [17 · On a GPU](17_gpu.ipynb)
