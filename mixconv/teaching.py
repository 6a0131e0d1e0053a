# Generated from notebooks/00_start_here.ipynb by `make book`. Edit the notebook, not this file.

"""What every chapter uses: checks, tables, figures, the photograph (chapter 0).

The only module that needs more than torch: install `mixconv[tutorial]`.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.core.formatters import format_display_data
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from mixconv._readable import compare_figure, hard_to_read
from mixconv.exercises import WrongAnswerError as WrongAnswerError
from mixconv.exercises import attempt as attempt
from mixconv.exercises import expect as expect

__all__ = [
    "KERNEL_COLORS",
    "Table",
    "check",
    "check_rewrite",
    "kernel_color",
    "live",
    "photograph",
    "show",
    "table",
    "use_style",
]


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    """Assert that two tensors are equal up to rounding, and say so.

    Args:
        actual: the new result.
        expected: the result to trust, of the same shape and dtype.
        what: a name for the comparison, used in the message.

    Raises:
        AssertionError: if shape, dtype or a value differs (tolerances of `torch.testing`).
    """
    torch.testing.assert_close(actual, expected, msg=lambda details: f"{what}: {details}")
    print(f"equal: {what}, shape {tuple(actual.shape)}")


def _uneven(like: Tensor) -> Tensor:
    """Numbers from 1 to 2, all different, with no pattern for an error to hide in."""
    golden = 0.6180339887498949  # its multiples never come back to where they were
    steps = torch.arange(like.numel(), dtype=torch.float64) * golden
    return (1 + steps % 1).to(like.dtype).view(like.shape)


def check_rewrite(
    before: Callable[..., Tensor], after: Callable[..., Tensor], *tensors: Tensor, what: str
) -> None:
    """Assert that two functions agree in their output and in the gradient of every argument.

    Args:
        before: the function to trust.
        after: its rewrite.
        tensors: arguments for both, floating point.
        what: a name for the rewrite, used in the message.

    Raises:
        AssertionError: naming the output or the argument whose gradient differs.
    """
    results = []
    for function in (before, after):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, _uneven(output))])
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, expected, actual in zip(names, *results, strict=True):
        try:
            torch.testing.assert_close(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from None
    print(f"equal: {what}, output {tuple(output.shape)}, gradients: {len(tensors)}")


class Table:
    """Rows under a header; the last line of a notebook cell draws it.

    Args:
        header: the column names.
        rows: one sequence a row; integers are shown with thousands separators.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.header = list(header)
        self.rows = [[self._cell(value) for value in row] for row in rows]

    @staticmethod
    def _cell(value: object) -> str:
        number = isinstance(value, int) and not isinstance(value, bool)
        return f"{value:,}" if number else str(value)

    @staticmethod
    def _is_number(cell: str) -> bool:
        return cell == "–" or cell.strip("+-")[:1].isdigit()

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def _repr_markdown_(self) -> str:
        columns = zip(*self.rows, strict=True)
        right = [all(map(self._is_number, column)) for column in columns]
        rule = ["---:" if numbers else "---" for numbers in right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.header, rule, *self.rows])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table to end a cell with."""
    return Table(header, rows)


KERNEL_COLORS = {
    3: "#0072B2",
    5: "#E69F00",
    7: "#009E73",
    9: "#CC79A7",
    11: "#D55E00",
    13: "#56B4E9",
}


def kernel_color(kernel_size: int) -> str:
    """The colour that means this kernel size in every figure; grey for an unusual one."""
    return KERNEL_COLORS.get(kernel_size, "#777777")


def use_style() -> None:
    """Set the figure style of the book: sparse axes, readable text, no chart junk."""
    plt.rcParams.update(
        {
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "legend.frameon": False,
        }
    )


_VIEW = "application/vnd.jupyter.widget-view+json"


def live(name: str, **settings: Any) -> Any:
    """A figure of `mixconv.widgets` that answers back, for `show`; None without anywidget.

    Args:
        name: its class, such as `Convolution`.
        settings: what it shows first.
    """
    try:
        widgets = importlib.import_module("mixconv.widgets")
    except ModuleNotFoundError as missing:
        print(f"This figure stands still: {missing.name} is not installed (pip install anywidget).")
        return None
    return getattr(widgets, name)(**settings)


def show(figure: Figure, filename: str, alt: str, caption: str = "", live: Any = None) -> None:
    """Draw a figure at the end of a cell.

    Args:
        figure: a matplotlib figure; it is closed afterwards.
        filename: its name in `figures/`, such as `partition_bars.png`.
        alt: one or two sentences that state what the picture shows, for who cannot see it. The
            pages carry it; JupyterLab's own renderer of images has no place for it.
        caption: a sentence that states what to see; without it, the first of `alt`.
        live: what stands in its place in JupyterLab, once the cell has run.

    Raises:
        AssertionError: in `make test`, if it is not the picture that is stored.
        ValueError: for text that is too small or too pale.
    """
    if hard := hard_to_read(figure):
        raise ValueError(f"{filename}: " + "; ".join(hard))
    if folder := os.environ.get("FIGURES"):  # `make test` sets it: nbval compares no pictures
        compare_figure(figure, Path(folder) / filename)
    width = round(figure.get_figwidth() * 100)
    metadata = {"filename": filename, "alt": alt, "image/png": {"width": width}}
    if caption:
        metadata["caption"] = caption
    if live is None:
        display(figure, metadata=metadata)
    else:
        bundle, _ = format_display_data(figure)
        bundle[_VIEW] = live._repr_mimebundle_()[0][_VIEW]
        display(bundle, raw=True, metadata=metadata)
    plt.close(figure)


def photograph(size: int = 224) -> Tensor:
    """The book's photograph: Grace Hopper, public domain, shipped with matplotlib.

    Args:
        size: height and width in pixels, at most 512.

    Shape:
        Output: `(1, 3, size, size)`, float32, values 0 to 1, red-green-blue.
    """
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = torch.from_numpy(np.array(plt.imread(path)))
    image = pixels.permute(2, 0, 1)[None].float() / 255
    image = image[..., :512, :]  # 600 rows, 512 columns; the face is above the middle
    small = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return small.clamp(0, 1)  # antialiasing overshoots by a rounding error
