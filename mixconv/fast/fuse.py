# Generated from notebooks/16_model_rewritten.ipynb by `make book`.
# Edit the notebook, not this file.

"""Models rewritten for inference: `fuse_for_inference` (chapter 16)."""

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixconv.fast.chains import CannotTraceError, Chains
from mixconv.fast.describe import (
    NORMS,
    ask,
    describe_block,
    describe_layer,
    is_one_of,
    register_peers,
)
from mixconv.fast.folding import refuse_training
from mixconv.fast.fused_block import BLOCK_FORMS
from mixconv.fast.fused_layer import FusedMixConv2d, FusedModule
from mixconv.fast.report import FusionReport, Piece, find_rule
from mixconv.fast.rewrite import fuse_block, fuse_chain, why_no_form
from mixconv.fast.trial import (
    TOLERANCE,
    CannotTryError,
    difference,
    find_tolerance,
    in_float32,
    make_image,
    piece_difference,
    twin,
)
from mixconv.layer import MixConv2d

__all__ = ["BACKENDS", "fuse_for_inference"]


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

    def put_back(self, mark: int, known: dict[str, Piece], reason: str) -> None:
        """Undo all but the first `mark` changes; what is not among the known pieces is left."""
        while len(self.taken) > mark:
            module, key, old = self.taken.pop()
            module._modules[key] = old
        for name, piece in self.pieces.items():
            if piece.after and known.get(name) is not piece:
                self.pieces[name] = piece._replace(after="", reason=reason)

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

    def fuse_chain(self, names: list[str]) -> None:
        """A layer, norm and activation."""
        old = [self.root.get_submodule(name) for name in names]
        classes = " + ".join(type(module).__name__ for module in old)
        self.record(Piece(names[0], classes), partial(self._rewrite_chain, names, old))

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

    def refuse_training(self) -> None:
        """Let the copy, and all in it that holds something new, stay in evaluation."""
        new = {module._modules[key] for module, key, _ in self.taken}
        fused = self.root[0]
        for part in fused.modules():
            if part is fused or (part._modules and not new.isdisjoint(part.modules())):
                cast("Any", part).train = partial(_train, part)


def _say(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check(before: nn.Module, after: nn.Module, image: Tensor) -> None:
    if reason := piece_difference(before, after, image):
        raise ValueError(reason)


def _check_chain(old: list[nn.Module], new: list[nn.Module], image: Tensor) -> None:
    before, after = nn.Sequential(*old), nn.Sequential(*new)
    _check(before, after, image)
    if find_tolerance(after) > TOLERANCE:  # rounding hides much: so once more, not rounded
        exact = in_float32(before)
        backend = "kernel" if isinstance(new[0], FusedMixConv2d) else "merged"
        _check(exact, nn.Sequential(*fuse_chain(list(exact.children()), backend)), image)


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


def _label(name: str) -> str:
    return name[2:] or "the model"


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a fused model and of its parts."""
    refuse_training(mode)
    return type(model).train(model, mode)


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


def _copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation; of what a `DistributedDataParallel` trains, not of that itself."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    try:
        return copy.deepcopy(cast("nn.Module", inner)).eval().requires_grad_(False)
    except Exception as error:  # anything may be in a stranger's model
        raise ValueError(f"model must be one that copy.deepcopy copies: {error}") from error


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
