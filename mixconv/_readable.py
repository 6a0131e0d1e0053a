# Generated from notebooks/00_start_here.ipynb by `make book`. Edit the notebook, not this file.

"""Whether what is written in a figure can be read (chapter 0)."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.pyplot as plt
import matplotlib.text
import numpy as np
from matplotlib.figure import Figure

__all__ = ["CONTRAST", "PAGE_WIDTH", "SMALLEST", "compare_figure", "hard_to_read"]


PAGE_WIDTH = 830  # pixels of a page on GitHub; wider figures are shrunk to it

SMALLEST, CONTRAST = 10, 4.5  # pixels of a letter's body; against white, as WCAG 2 asks


def _contrast(color: Any) -> float:
    """Of a colour against white: 1 to 21, as WCAG 2 defines it."""
    parts = np.array(matplotlib.colors.to_rgb(color), dtype=float)
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05))


def hard_to_read(figure: Figure) -> list[str]:
    """What is written too small or too pale in a figure; white ink is taken to lie on dark."""
    inch = min(PAGE_WIDTH / figure.get_figwidth(), 100)
    hard = []
    for text in figure.findobj(matplotlib.text.Text):
        words, contrast = text.get_text(), _contrast(text.get_color())
        size = float(text.get_fontsize()) / 72 * inch
        if words.strip() and text.get_visible():
            if size < SMALLEST:
                hard.append(f"{words!r} is {size:.1f} pixels high, not {SMALLEST}")
            if 1 < contrast < CONTRAST:
                hard.append(f"{words!r} in {text.get_color()} has too little contrast")
    return hard


def compare_figure(figure: Figure, path: Path) -> None:
    """Assert that a figure is the stored picture, but for a little noise.

    Raises:
        AssertionError: if its size differs, or its pixels by more than 0.02% on average.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight", facecolor="white")
    drawn.seek(0)
    new, old = plt.imread(drawn), plt.imread(path)
    near = max(abs(a - b) for a, b in zip(new.shape, old.shape, strict=True)) <= 2
    rows, columns = (min(sizes) for sizes in zip(new.shape[:2], old.shape[:2], strict=True))
    error = float(np.abs(new[:rows, :columns] - old[:rows, :columns]).mean())
    if not near or error > 2e-4:
        raise AssertionError(f"{path.name} is not what is drawn: {error:.2%} off, {new.shape[:2]}")
