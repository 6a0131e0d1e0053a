# %% [markdown]
# # 0 · Start here
#
# Do larger kernels always make a network better?
#
# ![ImageNet accuracy against multiply-adds for MobileNetV1 and V2. With one kernel size in all layers, accuracy peaks at 7×7 or 9×9 and then falls; at the same cost, mixed sizes stay above.](../figures/figure_4_redrawn.png)
#
# *Chapter 5's plot of the paper's Figure 4: accuracies cited from there, costs computed in [chapter 5](05_mobilenets.ipynb).*
#
# Take a MobileNet, and make the kernels of its depthwise layers larger: 3×3, 5×5, 7×7 and on. At first accuracy rises. Then, along the dotted line, it falls, while the cost goes on growing.
#
# MixConv is the solid line. It gives *some* channels a 3×3 kernel, others a 5×5, others more: all sizes side by side in one layer. The fine pattern and the wide view are both at hand, and a part of the channels stays cheap. Tan and Le proposed it in [*MixConv: Mixed Depthwise Convolutional Kernels*](https://arxiv.org/abs/1907.09595) (BMVC 2019), let a search choose the mixes, and called the networks it found MixNets.
#
# ![Sixteen channels are split into four groups; each passes through a depthwise convolution with its own kernel size, 3×3 to 9×9, and the results are concatenated.](../figures/mixconv_overview.png)
#
# *MixConv is split, one depthwise convolution for each group, and concatenate: [chapter 1](01_formulation.ipynb).*
#
# This book takes that apart, from the formula to a kernel that computes it in one pass, and builds a package, `mixconv`, on the way.
#
# **You will be able to**
# - say what MixConv is, and what question it answers;
# - read, run and change every chapter, and try its exercises;
# - name each symbol of this book and find it in the code.
#
# **Know first:** Python, and what `torch.nn.Conv2d` does. No more.
#
# **Time:** 10 minutes to read. Runs in under 10 seconds on two cores.

# %% [markdown]
# ## The idea, in numbers
#
# A depthwise layer has one k×k kernel for each channel. Sixteen channels with 9×9 kernels have 16 · 81 weights. Give four of them 3×3, four 5×5, four 7×7 and four 9×9, and it is about half, though a quarter of the channels still look as far:

# %%
one_size = 16 * 9**2
mixed = 4 * 3**2 + 4 * 5**2 + 4 * 7**2 + 4 * 9**2
print(f"9×9 everywhere: {one_size} weights. Mixed: {mixed}, {mixed / one_size:.0%} of that.")
assert (one_size, mixed) == (1296, 656)

# %% [markdown]
# ## The way through
#
# | | chapter | you build |
# |---|---|---|
# | **I** | **Understand** | |
# | 1 | [Formulation](01_formulation.ipynb) | the operation as loops and as tensor operations; its cost |
# | 2 | [Partitioning](02_partitioning.ipynb) | who gets which kernel size |
# | 3 | [The layer](03_layer.ipynb) | `MixConv2d`, where a depthwise `nn.Conv2d` was |
# | 4 | [Blocks](04_blocks.ipynb) | what stands around it in a network |
# | 5 | [MobileNets](05_mobilenets.ipynb) | the paper's first networks, their costs, and what it found with them |
# | 6 | [Receptive fields](06_receptive_fields.ipynb) | what an output can see, and what it looks at |
# | 7 | [MixNet](07_mixnet.ipynb) | the networks that the search found |
# | 8 | [The official code](08_official.ipynb) | the same numbers as the official code |
# | | [Weights](08_weights.ipynb) | weights from timm, files and the hub; `mixnet_s(weights=…)` |
# | 9 | [Any model](09_any_model.ipynb) | MixConv in a network that is not ours |
# | | [A trained network](09_trained_network.ipynb) | our blocks recognise a photograph; which channels need large kernels |
# | 10 | [Heirs](10_heirs.ipynb) | what came after, over the same layer |
# | **II** | **Make it fast** | |
# | 11 | [Why it is slow](11_why_slow.ipynb) | folding and merging: what is gained without a compiler |
# | 12 | [The operation](12_operation.ipynb) | its meaning, before any kernel |
# | 13 | [A kernel in steps](13_kernel_in_steps.ipynb) | loops, lanes, registers |
# | | [A kernel, compiled](13_kernel_in_steps_compiled.ipynb) | the way from C++ text to a loaded library |
# | 14 | [The whole kernel](14_whole_kernel.ipynb) | rings, strips, bands, threads |
# | | [The kernel, called](14_whole_kernel_called.ipynb) | plans and memory, from Python |
# | 15 | [Bytes of a block](15_block_bytes.ipynb) | what a block moves, counted before it is made faster |
# | | [A block in one pass](15_block_in_one_pass.ipynb) | a network's block, computed at once |
# | 16 | [A model, in pieces](16_model_pieces.ipynb) | what can be rewritten in a model |
# | | [A model, read](16_model_read.ipynb) | how the pieces are found, and each rewrite tried |
# | | [A model, rewritten](16_model_rewritten.ipynb) | a whole model, rewritten and checked |
# | 17 | [On a GPU](17_gpu.ipynb) | the same operation, in tiles |
# | **III** | **Use it** | |
# | 18 | [Using it](18_using_it.ipynb) | command line, features, fine-tuning, export |
#
# You can stop after chapter 3 and know the layer; after chapter 7 you know the paper; after chapter 8 you have seen that the official code gives the same numbers as this book's networks. Part II asks why PyTorch runs the layer slowly, and ends with a kernel that is fast. Each chapter imports what those before it built. Once installed, nothing is downloaded.
#
# | you want to | do this |
# |---|---|
# | read | open the `.md` pages on GitHub; they hold every output and figure |
# | run | clone the repository, then `make lab` in it (the README says what that needs) |
# | change | edit a notebook in JupyterLab, or its `.py` text, then `make book` |
#
# A chapter is one notebook, or two or three. The cells that begin with `#| export layer.py` are the source of `mixconv/layer.py`: the package is made from the book, so what you read is what runs. `make test` fails when a page, a figure or a module is not what its notebook makes.

# %% [markdown]
# ## Three voices
#
# Where a statement comes from matters, because the paper and its code do not always agree. Three labels tell you:
#
# > 📄 **Paper.** What Tan and Le wrote, with its section.
#
# > ⚙️ **Official code.** What the authors' TensorFlow code does: the folder [`models/official/mnasnet/mixnet`](https://github.com/tensorflow/tpu/tree/master/models/official/mnasnet/mixnet) of the `tensorflow/tpu` repository. Where it differs from the paper, this book follows the code, since the published numbers came from it.
#
# > ✏️ **Ours.** A choice or an addition of this book.
#
# We train nothing. Accuracies need ImageNet, so they are always cited, and said to be cited. (One network with trained weights comes along, for chapter 9.)
#
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
# | $x, y$ | `row`, `column` | from 0 | as indices: a position in an image |
# | $z$ | `z` | 0 to $m \cdot c - 1$ | an output channel (the paper counts from 1) |
# | $i, j$ | `i`, `j` | from $-(k-1)/2$ to $(k-1)/2$ | a tap of a kernel: its row and column, from the centre |
# | $t$ | a place in `kernel_sizes` | from 0 | which group |
# | $g$ | `len(kernel_sizes)` | 1 to 5 in MixNets, up to 6 in the paper's MobileNets | number of groups |
# | $c_t$ | `partition[t]` | sums to $c$ | channels of group $t$ |
# | $k$, $k_t$ | `kernel_sizes[t]` | odd: 3, 5, 7, … | kernel size, of group $t$ |
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
#
# ## Words
#
# The terms of this book, each with the chapter that explains it. Come back when one has slipped your mind.
#
# <details>
# <summary>Glossary</summary>
#
# | word | meaning | chapter |
# |---|---|---|
# | band | neighbouring rows of the output that are computed in one go | [14](14_whole_kernel.ipynb) |
# | block | a few layers that a network repeats: widen, convolve, narrow | [4](04_blocks.ipynb) |
# | block string | one line such as `r2_k3.5_s22_e6_i16_o24` that defines a run of blocks | [7](07_mixnet.ipynb) |
# | depthwise convolution | each output channel is computed from one input channel | [1](01_formulation.ipynb) |
# | dilation | the taps of a kernel stand apart, with pixels between that it skips | [3](03_layer.ipynb) |
# | dispatch | PyTorch's choice of the function that runs for a tensor: by device, gradient, wrapper | [12](12_operation.ipynb) |
# | drop path | while training, a residual branch is now and then left out | [4](04_blocks.ipynb) |
# | effective receptive field | how strongly an output reacts to each pixel that it can see | [6](06_receptive_fields.ipynb) |
# | endpoint | a named place in a network whose values are compared | [8](08_official.ipynb) |
# | expansion | the 1×1 layer that widens a block before its depthwise layer | [4](04_blocks.ipynb) |
# | fake | the rule that gives an operation's output shape without computing it | [12](12_operation.ipynb) |
# | fold | take a batch norm into the weights of the layer before it | [11](11_why_slow.ipynb) |
# | form | one way to compute the operation, which says when it declines | [12](12_operation.ipynb) |
# | fuse | replace several layers by one that computes the same | [16](16_model_pieces.ipynb) |
# | gate | see squeeze-and-excitation | [4](04_blocks.ipynb) |
# | group | the channels of a mix that share a kernel size | [1](01_formulation.ipynb) |
# | inverted residual | a block that is wide inside and narrow at its ends | [4](04_blocks.ipynb) |
# | lane | one of the numbers that a processor's vector register holds | [13](13_kernel_in_steps.ipynb) |
# | linear end | a block's last layer has no activation | [4](04_blocks.ipynb) |
# | merge | write all groups as one depthwise convolution, kernels padded with zeros | [3](03_layer.ipynb) |
# | mix | a list of kernel sizes, one for each group | [1](01_formulation.ipynb) |
# | multiply-add | one multiplication and one addition; the book's unit of work | [1](01_formulation.ipynb) |
# | parity | the same weights give the same numbers in two programs | [8](08_official.ipynb) |
# | partition, split | how many channels each group has | [2](02_partitioning.ipynb) |
# | pointwise convolution, 1×1 | each output is a weighted sum of all channels at one pixel | [1](01_formulation.ipynb) |
# | projection | the 1×1 layer that narrows a block at its end | [4](04_blocks.ipynb) |
# | receptive field | the window of the input that one output sees | [1](01_formulation.ipynb) |
# | ring | a small buffer that holds the k input rows which the present output row needs; the newest row takes the place of the oldest | [14](14_whole_kernel.ipynb) |
# | roofline | the speed that arithmetic and memory allow at most | [11](11_why_slow.ipynb) |
# | 'SAME' padding | TensorFlow's rule: at stride 2 one side may get a zero more | [3](03_layer.ipynb) |
# | squeeze-and-excitation | each channel is scaled by a number computed from all channels' means | [4](04_blocks.ipynb) |
# | strip | up to 16 neighbouring channels of one group | [14](14_whole_kernel.ipynb) |
# | surgery | replacing layers of a model that exists | [9](09_any_model.ipynb) |
# | swish, SiLU | the activation $x \cdot \sigma(x)$ | [4](04_blocks.ipynb) |
# | tap | one position of a kernel | [1](01_formulation.ipynb) |
# | width multiplier | one number that scales all channels of a network | [5](05_mobilenets.ipynb) |
#
# </details>
#
# ## Where it comes from
#
# In one paragraph. Inception (2014) ran kernels of several sizes side by side, each over all channels. Xception and MobileNet (2017) split a convolution into a depthwise and a 1×1 layer, and kernels became small and of one size, 3×3. MnasNet (2018) let a search choose between 3×3 and 5×5 for each block. MixConv (2019) asked why a layer should have one size at all. Then transformers brought wide views back into fashion: ConvNeXt and RepLKNet (2022) answered with 7×7 and 31×31 depthwise kernels, again of one size in a layer, and others split the channels again. [Chapter 10](10_heirs.ipynb) tells that part.

# %% [markdown]
# ## Equal, or not
#
# A faster or shorter version of a computation is worth nothing until it is compared with the one you trust. `check` does that, and stops the notebook where two tensors differ:

# %%
import torch

from mixconv.teaching import check, check_rewrite

ones = torch.ones(2, 3)
check(ones + ones, 2 * ones, "adding and doubling")
try:
    check(ones * 1.01, ones, "one and a bit")
except AssertionError as error:
    print("\n".join(str(error).splitlines()[:4]))

# %% [markdown]
# A rewrite may give the right values and still train wrongly. So `check_rewrite` takes two functions, and compares their outputs *and* the gradient of every argument:

# %%
x = torch.arange(6.0).view(2, 3)
check_rewrite(lambda t: t * t, lambda t: t**2, x, what="product and power")


# %% [markdown]
# Two functions with equal values and different slopes do not pass. Here are two that return their argument. `cut` has lost the slope: `t.detach()` has no gradient, and `0 * t` brings only zeros. `haunted` has one slope too many: `t.sum() - t.sum().detach()` is zero as a value, but in the backward pass it adds the gradient of the sum, where a test of values cannot see it.

# %%
def haunted(t: torch.Tensor) -> torch.Tensor:
    return t + (t.sum() - t.sum().detach())


for name, function in {"cut": lambda t: t.detach() + 0 * t, "haunted": haunted}.items():
    check(function(x), x, f"values, {name}")
    try:
        check_rewrite(lambda t: t, function, x, what=name)
    except AssertionError as error:
        print(str(error).splitlines()[0])

# %% [markdown]
# Such a check tries one input, and is no proof. Where the book says "proof", there is algebra.
#
# ## Exercises
#
# An exercise is a stub to fill in and a test to pass. Some stand in the text, where their subject is, and the rest at a chapter's end; all can be skipped. Stars say how hard it is: ★ up to five minutes, ★★ up to fifteen, ★★★ more. Hints are folded; open one at a time. The solution is folded, too, and with it some *wrong answers*: each time the book is tested, the solution must pass and each wrong answer must be caught.
#
# **0.1** ★ *2 minutes, one line.* A depthwise layer has one k×k kernel for each channel. How many weights is that? Replace the `raise` with your answer and run the cell.
#
# <details><summary>Hint: the idea</summary>
#
# How many numbers does one kernel hold? How many kernels are there?
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def weights_of_depthwise(channels: int, kernel_size: int) -> int:
    raise NotImplementedError


def test_weights(answer) -> None:
    expect(answer, 1, 3, gives=9, why="one channel, one kernel of 3 · 3")
    expect(answer, 32, 3, gives=288, why="32 kernels of 3 · 3")
    expect(answer, 32, 5, gives=800, why="32 kernels of 5 · 5")


attempt(weights_of_depthwise, test_weights)


# %% tags=["solution"]
# fold: Solution
def weights_of_depthwise_solution(channels: int, kernel_size: int) -> int:
    return channels * kernel_size**2


def dense(channels: int, kernel_size: int) -> int:
    """count a dense layer: there, every output has a kernel for every input channel"""
    return channels * channels * kernel_size**2


def one_side(channels: int, kernel_size: int) -> int:
    """count one side of the kernel only"""
    return channels * kernel_size


attempt(weights_of_depthwise_solution, test_weights, wrong=[dense, one_side])

# %% [markdown]
# What do you see if your answer is one of those? Somebody counts a dense layer:

# %%
try:
    attempt(lambda channels, k: (channels * k) ** 2, test_weights)
except AssertionError as error:
    print(error)


# %% [markdown]
# **0.2** ★ *5 minutes, one line.* And a mix? The channels are split equally over the kernel sizes.
#
# <details><summary>Hint: the idea</summary>
#
# How many channels does each size get? Sum over the sizes.
#
# </details>

# %%
def weights_of_mix(channels: int, kernel_sizes: tuple[int, ...]) -> int:
    raise NotImplementedError


def test_mix(answer) -> None:
    expect(answer, 2, (1, 3), gives=10, why="one channel with 1 weight, one with 9")
    expect(answer, 16, (3, 5, 7, 9), gives=656, why="4 · (9 + 25 + 49 + 81)")


attempt(weights_of_mix, test_mix)


# %% tags=["solution"]
# fold: Solution
def weights_of_mix_solution(channels: int, kernel_sizes: tuple[int, ...]) -> int:
    return channels // len(kernel_sizes) * sum(k**2 for k in kernel_sizes)


def all_sizes_for_all(channels: int, kernel_sizes: tuple[int, ...]) -> int:
    """give every channel a kernel of every size: channels are split, not copied"""
    return channels * sum(k**2 for k in kernel_sizes)


def mean_size(channels: int, kernel_sizes: tuple[int, ...]) -> int:
    """square the mean size: the mean of the squares is larger"""
    return channels * (sum(kernel_sizes) // len(kernel_sizes)) ** 2


attempt(weights_of_mix_solution, test_mix, wrong=[all_sizes_for_all, mean_size])

# %% [markdown]
# **0.3** ★★ *5 minutes, one line.* Fool the check: write a function of `x` that returns exactly the values of `x * x` and has the gradient of `3 * x`.
#
# <details><summary>Hint: the idea</summary>
#
# `detach()` gives the same values without a gradient. Build the values from detached parts and let one part carry the slope.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# `3 * x - (3 * x).detach()` is zero everywhere, and has a gradient all the same.
#
# </details>

# %%
from torch import Tensor


def square_with_a_wrong_slope(x: Tensor) -> Tensor:
    raise NotImplementedError


def test_fool(answer) -> None:
    x = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    expect(answer, x, gives=x * x, why="the values are those of x * x")
    (slope,) = torch.autograd.grad(answer(x).sum(), x)
    assert slope.tolist() == [3, 3, 3], f"the gradient is {slope.tolist()}, wanted 3, 3, 3"


attempt(square_with_a_wrong_slope, test_fool)


# %% tags=["solution"]
# fold: Solution
def square_with_a_wrong_slope_solution(x: Tensor) -> Tensor:
    return (x * x).detach() + (3 * x - (3 * x).detach())


def plain_square(x: Tensor) -> Tensor:
    """leave the square its own gradient, 2x"""
    return x * x


def both(x: Tensor) -> Tensor:
    """add the slopes: without detach on the square its gradient stays"""
    return x * x + (3 * x - (3 * x).detach())


attempt(square_with_a_wrong_slope_solution, test_fool, wrong=[plain_square, both])

# %% [markdown]
# **0.4** ★★ *10 minutes, six lines.* Find the hidden fault. You get a function, several rewrites of it, and an input. Return the names of the rewrites that do not have the same values *and* gradients.
#
# <details><summary>Hint: the idea</summary>
#
# `check_rewrite` raises AssertionError where it finds a difference. Catch it.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `for name, rewrite in rewrites.items():` and in it `try: check_rewrite(function, rewrite, x, what=name)`
#
# </details>

# %%
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

Function = Callable[[Tensor], Tensor]


def wrong_rewrites(function: Function, rewrites: dict[str, Function], x: Tensor) -> list[str]:
    raise NotImplementedError


def test_wrong_rewrites(answer) -> None:
    product, power = (lambda t: t * t), (lambda t: t**2)
    cases = {"power": power, "double": lambda t: 2 * t, "cut": lambda t: t * t.detach()}
    with redirect_stdout(StringIO()):  # what check_rewrite prints
        expect(answer, product, {"power": power}, x, gives=[], why="t**2 is t * t")
        gives, why = ["double", "cut"], "one has other values, one another slope"
        expect(answer, product, cases, x, gives=gives, why=why)


attempt(wrong_rewrites, test_wrong_rewrites)


# %% tags=["solution"]
# fold: Solution
def wrong_rewrites_solution(
    function: Function, rewrites: dict[str, Function], x: Tensor
) -> list[str]:
    wrong = []
    for name, rewrite in rewrites.items():
        try:
            check_rewrite(function, rewrite, x, what=name)
        except AssertionError:
            wrong.append(name)
    return wrong


def values_only(function: Function, rewrites: dict[str, Function], x: Tensor) -> list[str]:
    """compare values and not gradients"""
    return [n for n, rewrite in rewrites.items() if not torch.equal(rewrite(x), function(x))]


def the_others(function: Function, rewrites: dict[str, Function], x: Tensor) -> list[str]:
    """return the rewrites that are right"""
    return [n for n, rewrite in rewrites.items() if torch.equal(rewrite(x), function(x))]


attempt(wrong_rewrites_solution, test_wrong_rewrites, wrong=[values_only, the_others])

# %% [markdown]
# That is why every rewrite that can be trained is compared in its gradient, too.
#
# ## Tables, figures, colours
#
# `table` draws a table in JupyterLab and on the pages, and plain text in a terminal:

# %%
from mixconv.teaching import table

table(["kernel", "weights per channel"], [[f"{k}×{k}", k * k] for k in (3, 5, 7, 9, 11, 13)])

# %% [markdown]
# `show` draws a figure. In figures that compare kernels, a colour means a kernel size, the same one throughout the book; where no kernels are compared, colours mean what the figure says. Readers with any common colour blindness can tell them apart (the palette is by Okabe and Ito).

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import KERNEL_COLORS, show, use_style

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
    "9, 25, 49, 81, 121 and 169 weights. A white square in the middle is the output's own pixel.",
    caption="One colour for each kernel size, wherever kernels are compared; the white square is "
    "the pixel whose output is computed.",
)

# %% [markdown]
# The area is the cost: a 13×13 kernel has 169 weights where a 3×3 has 9. Part I of this book is about who gets the large ones.
#
# Some pictures need a picture. matplotlib ships one that is in the public domain: Grace Hopper, US Navy.

# %% tags=["drawing"]
# fold: The code that draws this
from mixconv.teaching import photograph

figure, axis = plt.subplots(figsize=(2.6, 2.6))
axis.imshow(photograph()[0].permute(1, 2, 0))
axis.axis("off")
show(
    figure,
    "photograph.png",
    "The photograph: Grace Hopper in uniform, head and shoulders, before a flag with stars.",
    caption="A photograph holds what kernels of several sizes are for: thin lines, stars, and "
    "large smooth parts.",
)

# %% [markdown]
# ## How the tools are made
#
# You need not read these. They are the modules `mixconv/teaching.py`, `mixconv/exercises.py` and `mixconv/_readable.py`, whole, and the first example of how the package is made: a cell with the line `#| export teaching.py` at its head goes there.

# %% tags=["tool"]
# fold: check()
#| export teaching.py
"""What every chapter uses: checks, tables, figures, the photograph (chapter 0).

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


# %% tags=["tool"]
# fold: check_rewrite()
#| export teaching.py
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


# %% tags=["tool"]
# fold: The error of a wrong answer, and whether two answers are the same
#| export exercises.py
"""Exercises: a test that explains, an attempt that tests its own test (chapter 0)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class WrongAnswerError(AssertionError):
    """An answer that gave something else than was expected; says what, and why.

    Attributes:
        arguments: of the call.
        value: what it gave.
    """

    def __init__(self, message: str, arguments: tuple[object, ...], value: object) -> None:
        super().__init__(message)
        self.arguments, self.value = arguments, value


def _same(one: object, other: object) -> bool:
    """Whether two answers are equal: numbers and tensors up to rounding, the rest exactly."""
    if type(one) is not type(other) and not {type(one), type(other)} <= {int, float}:
        return False
    try:
        torch.testing.assert_close(one, other)
    except (AssertionError, TypeError, ValueError):
        return bool(type(one) is type(other) and not isinstance(one, Tensor) and one == other)
    return True


# %% tags=["tool"]
# fold: How an answer is shown in a message
#| export exercises.py
def _show(value: object) -> str:
    """In one short line, without addresses."""
    if isinstance(value, Tensor):
        numbers = _show(value.detach().squeeze().tolist()) if value.numel() <= 12 else "…"
        return f"{numbers} {tuple(value.shape)}" if value.ndim > 1 else numbers
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_show, value)) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__}(…)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_show(one)}" for key, one in value.items()) + "}"
    name = getattr(value, "__name__", "")
    return "a function" if name == "<lambda>" else f"the function {name}" if name else repr(value)


# %% tags=["tool"]
# fold: expect()
#| export exercises.py
def expect(answer: Callable[..., object], *arguments: object, gives: object, why: str) -> None:
    """Assert, inside the test of an exercise, that an answer gives what it should.

    Args:
        answer: the function under test.
        arguments: to call it with.
        gives: the right value; tensors and floats are compared up to rounding.
        why: the reason, in a few words; the reader is shown it.

    Raises:
        WrongAnswerError: with the call, what came back, what was expected, and why.
    """
    value = answer(*arguments)
    if not _same(value, gives):
        call = f"{answer.__name__}({', '.join(map(_show, arguments))})"
        message = f"{call} gave {_show(value)}, expected {_show(gives)}: {why}"
        raise WrongAnswerError(message, arguments, value)


# %% tags=["tool"]
# fold: What an answer and a test are
#| export exercises.py
Answer = Callable[..., object]
Test = Callable[[Answer], None]

_KNOWN_MISTAKES: dict[str, list[Answer]] = {}  # by the name of the test

# %% tags=["tool"]
# fold: The wrong answers that a solution stored
#| export exercises.py
import ast
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any


def _stored_mistakes(test: Test) -> list[Answer]:
    """The wrong answers in the solution cell of this notebook, if the reader has not run it."""
    try:
        notebook = json.loads(Path(os.environ["JPY_SESSION_NAME"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):  # not in Jupyter, or not from a file
        return []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "solution" in cell["metadata"].get("tags", []) and f", {test.__name__}," in source:
            return _run_definitions(ast.parse(source), vars(sys.modules[test.__module__]))
    return []


# %% tags=["tool"]
# fold: The same, from a cell's source
#| export exercises.py
def _run_definitions(tree: ast.Module, known: dict[str, Any]) -> list[Answer]:
    """Define what a solution cell defines, apart from the reader's names; its `wrong` list."""
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Expr)]
    assert isinstance(call, ast.Call)
    (wrong,) = [keyword.value for keyword in call.keywords if keyword.arg == "wrong"]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    scope = dict(known)
    exec(compile(tree, "solution", "exec"), scope)
    return list(eval(compile(ast.Expression(wrong), "solution", "eval"), scope))


# %% tags=["tool"]
# fold: What a reader is told whose answer fails
#| export exercises.py
def _explain(error: AssertionError, test: Test) -> str:
    """The message of a failed attempt; names the misconception if the value is a known one's."""
    if not isinstance(error, WrongAnswerError):
        return str(error)
    for mistake in _KNOWN_MISTAKES.get(test.__name__) or _stored_mistakes(test):
        if _same(mistake(*error.arguments), error.value):
            return f"{error}\nThis is what you get if you {mistake.__doc__}."
    return str(error)


# %% tags=["tool"]
# fold: attempt()
#| export exercises.py
def attempt(answer: Answer, test: Test, *, wrong: Sequence[Answer] = ()) -> None:
    """Try an exercise: run `test(answer)` and say whether it is to do or solved.

    Args:
        answer: the reader's function, or the solution.
        test: raises AssertionError for a wrong answer; see `expect`.
        wrong: wrong answers that the test must catch. The docstring of each names one
            misconception, and completes "this is what you get if you …".

    Raises:
        AssertionError: from the test, if the answer is wrong; or if a wrong answer passes.
    """
    try:
        test(answer)
    except NotImplementedError:
        print(f"to do: {answer.__name__}")
        return
    except AssertionError as error:
        raise AssertionError(_explain(error, test)) from None
    print(f"solved: {answer.__name__}")
    if wrong:
        _KNOWN_MISTAKES[test.__name__] = list(wrong)
        _try_wrong_answers(test, wrong)


# %% tags=["tool"]
# fold: Answers that no test may accept
#| export exercises.py
_WRONG_EVERYWHERE: dict[str, Answer] = {
    "return nothing": lambda *arguments: None,
    "return 1, whatever the question": lambda *arguments: 1,
    "return an empty list": lambda *arguments: [],
    "return the first argument as it came": lambda *arguments: arguments[0] if arguments else None,
}


# %% tags=["tool"]
# fold: Does a test refuse every wrong answer?
#| export exercises.py
def _try_wrong_answers(test: Test, wrong: Sequence[Answer]) -> None:
    """Assert that a test catches each wrong answer, and those that are wrong everywhere."""
    named = {str(answer.__doc__): answer for answer in wrong}
    for mistake, answer in (named | _WRONG_EVERYWHERE).items():
        try:
            test(answer)
        except AssertionError as error:
            if answer in wrong:
                line = f"caught: {mistake} → {str(error).splitlines()[0]}"
                print(textwrap.fill(line, 96, subsequent_indent="    "))
        except Exception as error:
            if answer in wrong:  # the others may fail in any way
                raise AssertionError(f"{answer.__name__} raised {error!r}") from error
        else:
            raise AssertionError(f"{test.__name__} accepts a wrong answer: {mistake}")


# %% tags=["tool"]
# fold: The class behind table()
#| export teaching.py
from mixconv.exercises import WrongAnswerError as WrongAnswerError
from mixconv.exercises import attempt as attempt
from mixconv.exercises import expect as expect


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


# %% [markdown]
# In the folds above and below, one class is written in two cells. The second begins with `class Table(Table)`. That reads oddly in plain Python; here it means "add these methods", and in the package both pieces are one class. So a class can be told in parts, with words between, and no cell is long.

# %% tags=["tool"]
# fold: table(), and how a table is shown
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
        right = [all(map(self._is_number, column)) for column in columns]
        rule = ["---:" if numbers else "---" for numbers in right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.header, rule, *self.rows])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table to end a cell with."""
    return Table(header, rows)


# %% tags=["tool"]
# fold: kernel_color()
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


# %% tags=["tool"]
# fold: use_style()
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


# %% tags=["tool"]
# fold: Contrast and size of what is written in a figure
#| export _readable.py
"""Whether what is written in a figure can be read (chapter 0)."""

from typing import Any

import matplotlib.colors
import matplotlib.text
import numpy as np
from matplotlib.figure import Figure

PAGE_WIDTH = 830  # pixels of a page on GitHub; wider figures are shrunk to it
SMALLEST, CONTRAST = 10, 4.5  # pixels of a letter's body; against white, as WCAG 2 asks


def _contrast(color: Any) -> float:
    """Of a colour against white: 1 to 21, as WCAG 2 defines it."""
    parts = np.array(matplotlib.colors.to_rgb(color), dtype=float)
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05))


# %% tags=["tool"]
# fold: What in a figure is hard to read?
#| export _readable.py
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


# %% tags=["tool"]
# fold: Is a figure still as it was drawn?
#| export _readable.py
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt


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


# %% tags=["tool"]
# fold: live(), for figures that answer back
#| export teaching.py
import importlib
import os
from pathlib import Path
from typing import Any

from IPython.core.formatters import format_display_data

from mixconv._readable import compare_figure, hard_to_read

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


# %% tags=["tool"]
# fold: show()
#| export teaching.py
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


# %% tags=["tool"]
# fold: photograph()
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

# %% [markdown]
# ## Takeaways
# - One kernel size for all channels has a best value, and past it more cost buys less. MixConv does not choose: it mixes.
# - Every chapter is a notebook, and its exported cells are the package.
# - Paper, official code and our own choices are told apart.
# - Every rewrite is compared with what it replaces, forward and gradient.
# - Where kernels are compared, one colour means one kernel size.
#
# **Further reading**: [the paper](https://arxiv.org/abs/1907.09595), sections 1 and 2, takes a quarter of an hour; the [official code](https://github.com/tensorflow/tpu/tree/master/models/official/mnasnet/mixnet) is five files.
#
# Next: [1 · Formulation](01_formulation.ipynb)
