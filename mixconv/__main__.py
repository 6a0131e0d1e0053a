# Generated from notebooks/18_using_it.ipynb by `make book`. Edit the notebook, not this file.

"""`mixconv`, or `python -m mixconv`: what a network does, stage by stage (chapter 18)."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixconv.efficientnet_lite import (
    class_names,
    efficientnet_lite0,
    find_weights,
    preprocess_lite,
)
from mixconv.formulation import count_costs
from mixconv.mixnet import preprocess
from mixconv.mobilenet import mobilenet_v1, mobilenet_v2
from mixconv.network import ConvNet
from mixconv.zoo import mixnet_l, mixnet_m, mixnet_s

__all__ = [
    "StageRow",
    "as_shown",
    "build",
    "choose_trained",
    "main",
    "output_shapes",
    "parse",
    "predict",
    "print_stages",
    "read_image",
    "report",
    "stage_rows",
    "stages",
]


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


_MIXNETS = {"mixnet_s": mixnet_s, "mixnet_m": mixnet_m, "mixnet_l": mixnet_l}

_MOBILENETS = {"mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}


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
