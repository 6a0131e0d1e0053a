"""Figures that answer back, in JupyterLab: what they hold; `NAME.mjs` draws it (by hand, both).

Needs anywidget, which `mixconv[tutorial]` brings. A chapter asks for one by
`mixconv.teaching.live`, and shows it in the place of a picture that says the same standing still.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from mixconv._checks import as_tuple

__all__ = ["Blocks", "Convolution", "Mix"]

_HERE = Path(__file__).parent
_SHARED = 'from "./parts.mjs";'


def _module(name: str) -> str:
    """A widget's JavaScript as one module: a browser cannot import what lies beside it."""
    imports, _, rest = (_HERE / f"{name}.mjs").read_text(encoding="utf-8").partition(_SHARED)
    comment, _, _ = imports.rpartition("import {")
    return comment + (_HERE / "parts.mjs").read_text(encoding="utf-8") + rest


class OneOf(traitlets.TraitType[Any, Any]):
    """A trait with a few allowed values, by default `first`, or the first of them."""

    def __init__(self, *choices: int | str, first: Any = None) -> None:
        super().__init__(choices[0] if first is None else first)
        self.choices = choices
        self.tag(sync=True)

    def validate(self, obj: Any, value: Any) -> Any:
        """Raise TypeError or ValueError, naming trait, value and choices, for any other."""
        if type(value) is not type(self.choices[0]):
            raise TypeError(f"{self.name} must be one of {self.choices}, got {value!r}")
        if value not in self.choices:
            raise ValueError(f"{self.name} must be one of {self.choices}, got {value!r}")
        return value


class SomeOf(OneOf):
    """A trait that holds as many of the allowed values as `first`, its default, does."""

    def validate(self, obj: Any, value: Any) -> Any:
        """Raise TypeError or ValueError, naming trait, value and choices, for any other."""
        values = as_tuple(self.name or "values", value)
        if len(values) != len(self.default_value):
            raise ValueError(
                f"{self.name} must be {len(self.default_value)} numbers, got {value!r}"
            )
        check = super().validate
        return tuple(check(obj, one) for one in values)


class AnyOf(OneOf):
    """A trait that holds some of the allowed values, at least one, in their order."""

    def validate(self, obj: Any, value: Any) -> Any:
        """Raise TypeError or ValueError, naming trait, value and choices, for any other."""
        check = super().validate
        values = [check(obj, one) for one in as_tuple(self.name or "values", value)]
        if not values or values != [one for one in self.choices if one in values]:
            order = "at least one, each once and in this order"
            raise ValueError(f"{self.name} must be of {self.choices}, {order}, got {value!r}")
        return tuple(values)


class _Live(anywidget.AnyWidget):
    """A widget that tells its JavaScript what each setting may be."""

    choices = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        if unknown := set(settings) - set(self.trait_names()):
            known = ", ".join(self._settings())
            raise TypeError(f"{type(self).__name__} has {known}, not {', '.join(sorted(unknown))}")
        super().__init__(choices=self._settings(), **settings)

    @classmethod
    def _settings(cls) -> dict[str, list[int | str]]:
        traits = cls.class_traits()
        return {name: list(t.choices) for name, t in traits.items() if isinstance(t, OneOf)}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._settings())
        return f"{type(self).__name__}({values})"


class Convolution(_Live):
    """One output at a time: its window, its weights, its sum (chapters 1 and 3).

    Two channels: the first counts its pixels from 0, the second is all ones.

    Attributes:
        layer: "convolution" reads both channels; the others one each.
        kernel_sizes: for the two channels; all layers but MixConv use the first for both.
        size: rows and columns of the image.
        stride: step between outputs.
        padding: "symmetric" or "same", as in `MixConv2d`.
        dilation: step between the taps of a kernel.
        weights: "ones", or "counting": 1, 2, 3 … in channel 0, and down to 1 in channel 1.
        channel: of the output that is looked at.
        row: of that output.
        column: of that output.
    """

    _esm = _module("convolution")
    layer = OneOf("convolution", "depthwise", "MixConv", first="MixConv")
    kernel_sizes = SomeOf(1, 3, 5, 7, first=(3, 5))
    size = OneOf(5, 6, 7, 8)
    stride = OneOf(1, 2, 3)
    padding = OneOf("symmetric", "same")
    dilation = OneOf(1, 2)
    weights = OneOf("ones", "counting")
    channel = OneOf(0, 1)
    row = OneOf(*range(8))
    column = OneOf(*range(8))


class Mix(_Live):
    """A mix of kernel sizes, split three ways: channels, weights, multiply-adds (chapter 2).

    Attributes:
        kernel_sizes: one for each group.
        channels: to split.
        side: rows and columns of the output, for the multiply-adds.
        layers: of this mix, one after the other, for what an output sees.
    """

    _esm = _module("mix")
    kernel_sizes = AnyOf(3, 5, 7, 9, 11, 13, first=(3, 5, 7, 9))
    channels = OneOf(*range(1, 385), first=32)
    side = OneOf(7, 14, 28, 56, 112, first=14)
    layers = OneOf(1, 2, 3, 4, 5)


class Blocks(_Live):
    """The blocks of some networks: choose one, see its layers and their cost (chapter 7).

    Args:
        networks: a name for each, and its blocks, as `mixconv.mixnet.unroll` gives them.
        settings: the attributes to begin with.

    Attributes:
        network: the name of the one that is looked at; the first if left out.
        block: the number of its block that is looked at.
        size: rows and columns of the image.
    """

    _esm = _module("blocks")
    networks = traitlets.Dict().tag(sync=True)
    network = traitlets.Unicode().tag(sync=True)
    block = traitlets.Int().tag(sync=True)
    size = OneOf(128, 160, 192, 224, 256, 288, 320, first=224)

    def __init__(self, networks: Mapping[str, Sequence[Any]], **settings: Any) -> None:
        if not networks or not all(networks.values()):
            raise ValueError(f"networks must hold a network, and each a block, got {networks!r}")
        plain = {name: [asdict(block) for block in blocks] for name, blocks in networks.items()}
        super().__init__(networks=plain, **{"network": next(iter(plain)), **settings})

    @traitlets.validate("network", "block")
    def _known(self, proposal: Any) -> Any:
        """Raise ValueError, naming trait, value and choices, for what no network has."""
        name, value = proposal["trait"].name, proposal["value"]
        known = list(self.networks) if name == "network" else range(len(self._blocks()))
        if value not in known:
            raise ValueError(f"{name} must be one of {[*known]}, got {value!r}")
        return value

    def _blocks(self) -> list[Any]:
        blocks: list[Any] = self.networks.get(self.network, [])
        return blocks
