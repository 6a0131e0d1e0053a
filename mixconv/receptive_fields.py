# Generated from notebooks/06_receptive_fields.ipynb by `make book`.
# Edit the notebook, not this file.

"""What an output can see, and what it looks at, for any model (Luo et al., 2016; chapter 6).

For a plain list of kernel sizes, `mixconv.receptive_field` of chapter 1 is enough. That function
is why this module's name is plural: a module of its name would take its place in the package.
"""

import copy
from bisect import bisect_left
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixconv._checks import as_pair, check_positive
from mixconv.formulation import evaluating

__all__ = [
    "Window",
    "effective_receptive_field",
    "energy_curve",
    "energy_pixels",
    "energy_sigma",
    "energy_square",
    "read_middle",
    "theoretical_receptive_field",
]


class Window(NamedTuple):
    """The rectangle of input pixels that an output can see."""

    top: int
    left: int
    height: int
    width: int
    touches_border: bool  # of the image, which may have cut it


@torch.no_grad()
def theoretical_receptive_field(
    model: nn.Module,
    layer: str = "",
    size: int | tuple[int, int] = 224,
    *,
    channels: slice | None = None,
) -> Window:
    """The window of input pixels that the middle output of a layer can see, in any model.

    Arguments and errors are those of `effective_receptive_field`. Refused, too, is a model that
    hides NaN or makes it. A copy runs in double precision, on the CPU. A gate or a mean over all
    pixels sees the whole image, and so does all that follows it. For a plain list of layers,
    `receptive_field` gives the side by arithmetic.

    Source: ours. Chapter 6.
    """
    twin = copy.deepcopy(model).to("cpu", torch.double).eval()
    clean = _noise(model, size, 1, seed=0)

    def sees(image: Tensor) -> bool:
        return bool(read_middle(twin, layer, image, channels).isnan().any())

    def hidden(turns: int, length: int) -> int:
        """Lines at an edge that the output cannot see; quarter turns bring the edge up."""

        def notices(lines: int) -> bool:
            image = clean.rot90(turns, (2, 3)).clone()
            image[:, :, :lines] = torch.nan
            return sees(image.rot90(-turns, (2, 3)))

        return bisect_left(range(1, length), True, key=notices)

    if sees(clean) or not sees(torch.full_like(clean, torch.nan)):
        raise ValueError(f"layer {layer!r} must give NaN for an image of NaN and for no other")
    height, width = clean.shape[2:]
    top, right, bottom, left = map(hidden, range(4), (height, width) * 2)
    edges = min(top, right, bottom, left)
    return Window(top, left, height - top - bottom, width - left - right, edges == 0)


def read_middle(model: nn.Module, layer: str, images: Tensor, channels: slice | None) -> Tensor:
    """Run a model and return what a layer holds at its middle position: `(N, channels)`."""
    layers = dict(model.named_modules(remove_duplicate=False))
    if layer not in layers:
        close = ", ".join(map(repr, get_close_matches(str(layer), layers, cutoff=0.3))) or "none"
        raise ValueError(f"layer must be in model.named_modules(), got {layer!r}; close: {close}")
    seen: list[Tensor] = []
    hook = layers[layer].register_forward_hook(
        lambda _layer, _inputs, output: seen.append(_middle(output, layer, channels))
    )
    try:
        model(images)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(f"layer {layer!r} must run once in a pass, it ran {len(seen)} times")
    return seen[0]


def _noise(model: nn.Module, size: int | tuple[int, int], count: int, seed: int) -> Tensor:
    """Images of mean 0 and variance 1, with the channels of the model's first layer."""
    known = (getattr(module, "in_channels", None) for module in model.modules())
    channels = next((number for number in known if isinstance(number, int)), None)
    if channels is None:
        raise ValueError("model must have a layer with in_channels, as nn.Conv2d has")
    check_positive("images", count)
    shape, generator = (count, channels, *as_pair("size", size)), torch.Generator()
    return torch.randn(shape, generator=generator.manual_seed(seed), dtype=torch.double)


def _middle(output: object, layer: str, channels: slice | None) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 4:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {layer!r} must return (N, C, H, W), got {got}")
    chosen, count = channels or slice(None), output.shape[1]
    if not range(count)[chosen] or (chosen.stop or 0) > count:
        raise ValueError(f"channels must lie in the {count} of layer {layer!r}, got {channels}")
    return output[:, chosen, output.shape[2] // 2, output.shape[3] // 2].clone()


def effective_receptive_field(
    model: nn.Module,
    layer: str = "",
    size: int | tuple[int, int] | None = None,
    *,
    images: int | Tensor = 8,
    seed: int = 0,
    channels: slice | None = None,
) -> Tensor:
    """How strongly the middle output of a layer reacts to each input pixel, in any model.

    The energy of a pixel: the squared gradient, summed over the image's channels, for a random
    sign of each output channel. The model runs in evaluation mode and is left as it was. Where
    the window is larger than the image (ask `theoretical_receptive_field`), it is cut.

    Args:
        model: takes images.
        layer: a name from `model.named_modules()`; the model's own output if left out.
        size: of random images, one number or height and width; 224 if left out.
        images: how many random images (mean 0, variance 1), or the images, without `size`.
        seed: of the random images and signs.
        channels: which output channels to ask; all if left out.

    Shape:
        Output `(N, H, W)`, float64: one map for each image; the mean map has sum 1.

    Raises:
        ValueError: for an unknown layer, one whose output is not `(N, C, H, W)` or that does
            not run once, channels out of range, or where no finite gradient arrives.

    Source: Luo et al., 2016, for the gradient; the energy and the signs are ours. Chapter 6.
    """
    if not isinstance(images, Tensor):
        images = _noise(model, 224 if size is None else size, images, seed)
    elif size is not None:
        raise ValueError(f"size must be left out when images are given, got {size}")
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x = images.detach().to(like.device, like.dtype, copy=True).requires_grad_()
        outputs = read_middle(model, layer, x, channels)
        coins = torch.randint(2, outputs.shape, generator=torch.Generator().manual_seed(seed))
        score = (outputs * (2 * coins - 1).to(outputs)).sum()
        return _energy(score, x, layer)


def _energy(score: Tensor, x: Tensor, layer: str) -> Tensor:
    """The squared gradient, summed over channels, divided by the mean of the images' sums."""
    gradient = None
    if score.requires_grad:
        (gradient,) = torch.autograd.grad(score, x, allow_unused=True)
    peak = torch.zeros(()) if gradient is None else gradient.abs().max()
    if gradient is None or not (peak.isfinite() and peak > 0):
        raise ValueError(f"a finite gradient that is not zero must reach the image from {layer!r}")
    energy = (gradient.double() / peak.double()).square().sum(dim=1)  # no square underflows
    return energy / energy.sum(dim=(1, 2)).mean()


def energy_square(energy: Tensor, share: float, centre: tuple[int, int] | None = None) -> int:
    """Side of the smallest square around a pixel that holds a share of a map's energy.

    Args:
        energy: a map `(H, W)`, nowhere negative; its scale does not matter.
        share: more than 0, at most 1.
        centre: the pixel, row and column; `(H // 2, W // 2)` if left out.

    Raises:
        ValueError: for what is no map, a share outside 0 to 1 or a pixel outside the map.

    Source: ours. Chapter 6.
    """
    _shares(energy, share)
    return 2 * int((energy_curve(energy, centre) < share - 1e-9).sum()) + 1  # up to rounding


def energy_pixels(energy: Tensor, share: float) -> int:
    """How many pixels, strongest first, hold a share of a map's energy; see `energy_square`."""
    strongest = _shares(energy, share).flatten().sort(descending=True).values
    return int((strongest.cumsum(0) < share - 1e-9).sum()) + 1


def energy_curve(energy: Tensor, centre: tuple[int, int] | None = None) -> Tensor:
    """Shares of a map's energy within the squares of side 1, 3, 5, … around a pixel."""
    shares = _shares(energy)
    height, width = shares.shape
    row, column = (height // 2, width // 2) if centre is None else centre
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"centre must be a pixel of {height}×{width}, got {centre}")
    rows, columns = (torch.arange(height) - row).abs(), (torch.arange(width) - column).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])  # 0 in the middle, then 1, 2, …
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.double)
    return sums.index_add(0, ring.flatten(), shares.flatten()).cumsum(0)


def energy_sigma(energy: Tensor) -> float:
    """Standard deviation of a map along one axis, in pixels: the mean over both axes."""
    variances = []
    for axis, length in enumerate(energy.shape):
        line, places = _shares(energy).sum(dim=1 - axis), torch.arange(length).double()
        variances.append(float(line @ (places - line @ places).square()))
    return float((sum(variances) / 2) ** 0.5)


def _shares(energy: Tensor, share: float = 1.0) -> Tensor:
    """A map with sum 1, in double precision, on the CPU."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be more than 0 and at most 1, got {share}")
    total = energy.double().sum()
    if energy.ndim != 2 or not (total.isfinite() and total > 0 and (energy >= 0).all()):
        raise ValueError("energy must be one map (H, W), finite, not negative, not all zero")
    return energy.detach().double().cpu() / total.cpu()
