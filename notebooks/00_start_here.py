# %% [markdown]
# # 0 · Start here
#
# MixConv is one idea: in a depthwise convolution, give different channels kernels of different sizes.
# This book takes the paper apart (Tan and Le, *MixConv: Mixed Depthwise Convolutional Kernels*, BMVC 2019), from the formula of its section 3.1 to the networks of its section 4, and builds a package, `mixconv`, on the way.
#
# ![Sixteen channels are split into four groups; each passes through a depthwise convolution with its own kernel size, 3×3 to 9×9, and the results are concatenated.](../figures/mixconv_overview.png)
#
# Sixteen channels, four groups, four kernel sizes: 656 weights, where 9×9 kernels everywhere would have 1,296.
#
# **You will be able to**
# - read, run and change every chapter;
# - name each symbol of the paper and find it in the code;
# - use the five tools that every chapter uses: `check`, `check_rewrite`, `attempt`, `table` and `show`.
#
# **Know first:** Python, and what `torch.nn.Conv2d` does. No more.
#
# **Time:** 10 minutes to read. Runs in under 10 seconds on two cores.

# %% [markdown]
# ## The way through
#
# | | chapter | you build |
# |---|---|---|
# | 1 | [Formulation](01_formulation.ipynb) | the operation as loops and as tensor operations; its cost |
# | 2 | [Partitioning](02_partitioning.ipynb) | who gets which kernel size |
# | 3 | [The layer](03_layer.ipynb) | `MixConv2d`, where a depthwise `nn.Conv2d` was |
# | 4 | [Blocks](04_blocks.ipynb) | what stands around it in a network |
# | 5 | [MobileNets](05_mobilenets.ipynb) | the paper's first networks, and MixConv for any model |
# | 6 | [MixNet](06_mixnet.ipynb) | the networks that the search found, equal to the official ones |
# | 8 | [Fast](08_fast.ipynb) | why few multiply-adds are not fast, and a kernel that is |
# | 9 | [Using it](09_using_it.ipynb) | command line, weights, features, export |
#
# ## Three ways to use this book
#
# | you want to | do this |
# |---|---|
# | read | open the `.md` pages on GitHub; they hold every output and figure |
# | run | clone the repository, then `make lab` in it. Needs Python 3.11 or newer. The first time it installs what the notebooks need: over 1 GB, mostly PyTorch |
# | change | edit a notebook in JupyterLab (or its `.py` text), then `make book` |
#
# A chapter is one notebook. Its cells that begin with `#| export layer.py` are the source of `mixconv/layer.py`: the package is made from the book, so what you read is what runs.
# `make book` runs the notebooks again and remakes the package, the pages and the figures. `make test` fails when any of them is out of date.
#
# Each chapter imports what the chapters before it built. Once installed, nothing is downloaded: no weights, no data.

# %% [markdown]
# ## Three voices
#
# Where a statement comes from matters, because the paper and its code do not always agree. Three labels tell you:
#
# > 📄 **Paper.** What Tan and Le wrote, with its section.
#
# > ⚙️ **Official code.** What the authors' TensorFlow code does: the folder `models/official/mnasnet/mixnet` of the `tensorflow/tpu` repository. Where it differs from the paper, this book follows the code, since the published numbers came from it.
#
# > ✏️ **Ours.** A choice or an addition of this book.
#
# Nothing here is trained. Accuracies need ImageNet, so they are always cited, and said to be cited.

# %% [markdown]
# ## Notation
#
# The paper stores images as (height, width, channels). PyTorch stores them as (channels, height, width). The book uses PyTorch's order.
#
# | symbol | name in the code | shape or value | meaning |
# |---|---|---|---|
# | $X$ | `x` | `(N, C, H, W)` | input: images, channels, rows, columns |
# | $Y$ | `y` | `(N, m·C, H', W')` | output |
# | $c$ | `channels` | integer | input channels of a layer |
# | $m$ | `channel_multiplier` | integer, mostly 1 | outputs computed from each input channel |
# | $g$ | `len(kernel_sizes)` | 1 to 5 in MixNets, up to 6 in the paper's MobileNets | number of groups |
# | $c_t$ | `partition[t]` | sums to $c$ | channels of group $t$ |
# | $k_t$ | `kernel_sizes[t]` | odd: 3, 5, 7, … | kernel size of group $t$ |
# | $W^t$ | `weights[t]` | `(m·c_t, 1, k_t, k_t)` | kernels of group $t$ |
# | $s$ | `stride` | 1 or 2 | step between two outputs |
# | $d$ | `dilation` | 1, 2, … | step between two taps of a kernel |
# | $r$ | `receptive_field(…)` | pixels | side of the window that an output sees |
# | | `dilated` | true or false | spread a 3×3 kernel over a k×k window |
# | | `expand_ratio` | 1, 3, 6 | how much a block widens before its depthwise layer |
# | | `squeeze_ratio` | 0.25, 0.5 | how much squeeze-and-excitation narrows |
#
# Shapes are written as PyTorch's documentation writes them: `C` is $c$, and `W` beside `H` is a width, not a weight.
#
# The paper's "FLOPS" are multiply-adds: one multiplication and one addition count as one. So do ours.

# %% [markdown]
# ## Tool 1: `check`
#
# A faster or shorter version of a computation is worth nothing until it is shown to be equal.
# `check` compares two tensors and stops the notebook when they differ.

# %%
#| export teaching.py
"""What every chapter uses: checks, exercises, tables, figures, the photograph (chapter 0).

The only module that needs more than torch: install `mixconv[tutorial]`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


# %%
ones = torch.ones(2, 3)
check(ones + ones, 2 * ones, "adding and doubling")

# %% [markdown]
# A difference is an error with numbers in it:

# %%
try:
    check(ones * 1.01, ones, "one and a bit")
except AssertionError as error:
    print(error)


# %% [markdown]
# ## Tool 2: `check_rewrite`
#
# A layer is trained through its gradient, so equal outputs are half of the proof.
# `check_rewrite` takes two functions of the same tensors. It compares what they return, and the gradient with respect to every tensor.
# It differentiates `(output * ramp).sum()`, with a fixed ramp from −1 to 1: a constant in its place would hide errors that cancel in a sum.

# %%
#| export teaching.py
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
        ramp = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        results.append([output, *torch.autograd.grad(output, leaves, ramp)])
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, expected, actual in zip(names, *results, strict=True):
        try:
            torch.testing.assert_close(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from None
    print(f"equal: {what}, output {tuple(output.shape)}, gradients: {len(tensors)}")


# %%
x = torch.arange(6.0).view(2, 3)
check_rewrite(lambda t: t * t, lambda t: t**2, x, what="product and power")

# %% [markdown]
# Two functions with equal values and different slopes do not pass:

# %%
try:
    check_rewrite(lambda t: t, lambda t: t.detach() + 0 * t, x, what="a cut gradient")
except AssertionError as error:
    print(str(error).splitlines()[0])


# %% [markdown]
# ## Tool 3: `attempt`
#
# Exercises come as a stub to fill in and a test to pass. The solution is folded below, and it runs in the same test as yours, each time the book is tested.

# %%
#| export teaching.py
def attempt(answer: Callable[..., object], test: Callable[..., None]) -> None:
    """Try an exercise: run `test(answer)` and say whether it is to do or solved.

    Raises:
        AssertionError: from the test, if the answer is wrong.
    """
    try:
        test(answer)
    except NotImplementedError:
        print(f"to do: {answer.__name__}")
    else:
        print(f"solved: {answer.__name__}")


# %% [markdown]
# **Exercise 0.** A depthwise layer has one k×k kernel for each channel. How many weights is that?
# Replace the `raise` with your answer and run the cell.

# %%
def weights_of_depthwise(channels: int, kernel_size: int) -> int:
    raise NotImplementedError


def test_weights(answer) -> None:
    assert answer(32, 3) == 288
    assert answer(32, 5) == 800


attempt(weights_of_depthwise, test_weights)


# %% tags=["solution"]
def weights_of_depthwise_solution(channels: int, kernel_size: int) -> int:
    return channels * kernel_size**2


attempt(weights_of_depthwise_solution, test_weights)


# %% [markdown]
# ## Tool 4: `table`
#
# Tables are drawn as tables in JupyterLab and on the pages, and as plain text in a terminal.

# %%
#| export teaching.py
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


# %% [markdown]
# The class goes on in the next cell. `class Table(Table)` reads oddly in plain Python; here it means "add these methods", and in the package both pieces are one class.

# %%
#| export teaching.py
class Table(Table):
    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def _repr_markdown_(self) -> str:
        columns = zip(*self.rows, strict=True)
        right = [all(c.strip("+-")[:1].isdigit() for c in column) for column in columns]
        rule = ["---:" if numbers else "---" for numbers in right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.header, rule, *self.rows])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table to end a cell with."""
    return Table(header, rows)


# %%
table(["kernel", "weights per channel"], [[f"{k}×{k}", k * k] for k in (3, 5, 7, 9, 11, 13)])

# %% [markdown]
# ## Tool 5: `show`, and one colour per kernel size
#
# A colour means the same kernel size in every figure of the book. The six colours are told apart by readers with any common colour blindness (the palette is by Okabe and Ito).

# %%
#| export teaching.py
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

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


# %% [markdown]
# The figures share one style, and `show` draws each under a name, with a sentence that says what it shows to those who cannot see it.

# %%
#| export teaching.py
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


# %%
#| export teaching.py
def show(figure: Figure, filename: str, alt: str) -> None:
    """Draw a figure at the end of a cell.

    Args:
        figure: a matplotlib figure; it is closed afterwards.
        filename: its name in `figures/`, such as `partition_bars.png`.
        alt: one or two sentences that state what the picture shows.
    """
    width = round(figure.get_figwidth() * 100)
    metadata = {"filename": filename, "alt": alt, "image/png": {"width": width}}
    display(figure, metadata=metadata)
    plt.close(figure)


# %% tags=["drawing"]
use_style()
figure, axes = plt.subplots(1, 6, figsize=(7.5, 1.9))
for axis, (k, color) in zip(axes, KERNEL_COLORS.items(), strict=True):
    axis.add_patch(plt.Rectangle((-k / 2, -k / 2), k, k, color=color, alpha=0.85))
    axis.add_patch(plt.Rectangle((-0.5, -0.5), 1, 1, color="white"))
    axis.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal", title=f"{k}×{k}")
    axis.set_xlabel(f"{k * k} weights")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
show(
    figure,
    "kernel_colors.png",
    "Six squares to scale, one for each kernel size from 3×3 to 13×13, each in its own colour: "
    "9, 25, 49, 81, 121 and 169 weights. The white dot is the output position.",
)

# %% [markdown]
# The area is the cost: a 13×13 kernel has 169 weights where a 3×3 has 9. Most of this book is about who gets the large ones.

# %% [markdown]
# ## The photograph
#
# Some pictures need a picture. matplotlib ships one that is in the public domain: Grace Hopper, US Navy.
# `photograph` crops the upper square and returns it as a batch of one.

# %%
#| export teaching.py
import matplotlib.cbook
import numpy as np


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


# %%
image = photograph()
print(tuple(image.shape), f"values {image.min():.2f} to {image.max():.2f}")

# %% tags=["drawing"]
figure, axis = plt.subplots(figsize=(2.6, 2.6))
axis.imshow(image[0].permute(1, 2, 0))
axis.axis("off")
show(figure, "photograph.png", "The photograph: Grace Hopper in uniform, head and shoulders.")

# %% [markdown]
# ## Takeaways
# - Every chapter is a notebook, and its exported cells are the package.
# - Paper, official code and our own choices are told apart.
# - Every rewrite is proved equal, forward and gradient.
# - One colour means one kernel size.
#
# Next: [1 · Formulation](01_formulation.ipynb)
