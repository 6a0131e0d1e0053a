# Generated from notebooks/16_model_rewritten.ipynb by `make book`.
# Edit the notebook, not this file.

"""What `fuse_for_inference` did, in words (chapter 16)."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

__all__ = ["FusionReport", "Piece", "find_rule"]


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
