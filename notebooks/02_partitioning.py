# %% [markdown]
# # 2 · Partitioning
#
# MixConv splits its channels into groups. Which kernel sizes, and how many channels for each?
#
# **You will be able to**
# - choose kernel sizes and a split as the paper does;
# - compute an equal, an exponential and a logarithmic split by hand, remainders included;
# - say what each choice does to parameters and multiply-adds.
#
# **Know first:** [chapter 1](01_formulation.ipynb).
#
# **Time:** 15 minutes to read. Runs in under 10 seconds on two cores.

# %% [markdown]
# ## Which kernel sizes
#
# > 📄 **Paper.** Section 3.2: kernel sizes start at 3 and grow by 2, so that group $i$ has size $2i + 1$. Two groups never share a size: they could be one group. Four groups are a safe choice for MobileNets. The MixNets that the search found use 1 to 5.
#
# > 📄 **Paper.** Section 3.2 also tries *dilated* kernels: in place of k×k, 3×3 taps spread over the same window, in layers of stride 1. [Chapter 3](03_layer.ipynb) has them.
#
# > ✏️ **Ours.** Two groups may share a size here: they compute what one group of both would. So a list of sizes that comes from elsewhere need not be tidied first.

# %%
#| export partition.py
"""How MixConv splits channels into groups of one kernel size (paper, section 3.2; chapter 2)."""

import math
from collections.abc import Sequence


def default_kernel_sizes(groups: int) -> tuple[int, ...]:
    """The paper's kernel sizes for a number of groups: 3, 5, 7, and so on.

    Args:
        groups: how many groups, at least 1.

    Raises:
        ValueError: if `groups` is less than 1.

    Source: paper, section 3.2, "Kernel Size Per Group".
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    return tuple(2 * i + 1 for i in range(1, groups + 1))


# %%
default_kernel_sizes(4)

# %% [markdown]
# ## By hand: 32 channels over 3, 5, 7, 9
#
# **Equal.** 32 / 4 = 8 channels each.
# With five groups 32 / 5 is 6 and a rest: five times 6 make 30, and two channels are left over. They go to the first group: 8, 6, 6, 6, 6.
#
# **Exponential.** Each group gets half of what the one before it got: 16, 8, 4. The last one gets as much as the one before it, so that the sum is right: 16, 8, 4, 4.
#
# > ✏️ **Ours.** How exponential is rounded: every share down, the last share repeated, and what is left over goes to the first group. The paper does not say, and the official code has no exponential split.
#
# **Logarithmic.** The share grows with the kernel: proportional to log k, to any base. The natural logarithms of 3, 5, 7, 9 are 1.10, 1.61, 1.95 and 2.20; together, with more digits, 6.85.
# 32 · 1.10 / 6.85 = 5.1, 32 · 1.61 / 6.85 = 7.5, 32 · 1.95 / 6.85 = 9.1, 32 · 2.20 / 6.85 = 10.3. Rounded down: 5, 7, 9, 10. One channel is left over, and it goes to the first group: 6, 7, 9, 10.

# %%
sizes = (3, 5, 7, 9)
splits = {"equal": (8, 8, 8, 8), "exponential": (16, 8, 4, 4), "logarithmic": (6, 7, 9, 10)}
[sum(split) for split in splits.values()]

# %% tags=["drawing"]
# fold: The code that draws this
import matplotlib.pyplot as plt

from mixconv.teaching import kernel_color, live, show, use_style

use_style()
figure, axis = plt.subplots(figsize=(7.2, 2.3))
for row, split in enumerate(splits.values()):
    left = 0
    for k, count in zip(sizes, split, strict=True):
        ink = "white" if k == 3 else "black"
        axis.barh(row, count, left=left, color=kernel_color(k), edgecolor="white", height=0.75)
        axis.text(left + count / 2, row - 0.12, f"{count}", ha="center", va="center", color=ink,
                  weight="bold")  # fmt: skip
        axis.text(left + count / 2, row + 0.2, f"{k}×{k}", ha="center", va="center", color=ink,
                  fontsize=8)  # fmt: skip
        left += count
axis.set_yticks(range(3), splits)
axis.set(ylim=(2.5, -0.5), xlabel="channels", xlim=(0, 32))
axis.spines["left"].set_visible(False)
axis.tick_params(axis="y", length=0)
show(
    figure,
    "partition_bars.png",
    "Three bars of 32 channels split over kernels 3×3, 5×5, 7×7 and 9×9. Equal: 8 each. "
    "Exponential: 16, 8, 4, 4. Logarithmic: 6, 7, 9, 10.",
    caption="Equal gives all sizes as many channels, exponential most to the small kernels, "
    "logarithmic most to the large.",
    live=live("Mix", kernel_sizes=sizes, channels=32),
)


# %% [markdown]
# In JupyterLab, run that cell and the bars answer back: choose the kernels, pull the channels, and read what each split costs.
#
# > 📄 **Paper.** Section 3.2 has *equal* and *exponential* (group $i$ gets about $2^{-i}$ of the channels). It finds neither better everywhere.
#
# > ⚙️ **Official code.** Splits equally, and gives the remainder to group 0. MixNets use nothing else.
#
# > ✏️ **Ours.** *Logarithmic* is an addition: more channels for larger kernels, the opposite of exponential. It is for who believes that wide views matter most. In proportion to their weights, 9×9 kernels would get 81 / 9 = 9 times as many channels as 3×3; the logarithm is a gentle slope, and before rounding gives them twice as many (10.3 and 5.1 above), since log 9 is 2 · log 3.

# %% [markdown]
# ## The three rules
#
# Each rule returns whole shares that sum to at most `channels`. What is left over goes to group 0, normally the smallest kernel, where a channel costs least.

# %%
#| export partition.py
def _equal(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    return [channels // len(kernel_sizes)] * len(kernel_sizes)


def _exponential(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    shares = [channels // 2**i for i in range(1, len(kernel_sizes))]
    return [*shares, shares[-1]] if shares else [channels]


def _logarithmic(channels: int, kernel_sizes: Sequence[int]) -> list[int]:
    total = sum(math.log(k) for k in kernel_sizes)
    tiny = 1e-9  # an exact share must not be rounded down for a rounding error
    return [math.floor(channels * math.log(k) / total + tiny) for k in kernel_sizes]


_METHODS = {"equal": _equal, "exponential": _exponential, "logarithmic": _logarithmic}

# %%
[_exponential(32, (3, 5, 7, 9)), _equal(32, (3, 5, 7, 9, 11)), _logarithmic(32, (3, 5, 7, 9))]

# %% [markdown]
# The last two are still short of 32: 30 and 31. The function that callers use checks its arguments, applies a rule, and hands out the remainder. An empty group would be a layer without output, so it is an error.
#
# The checks are manners, and the whole package shares them, so they have a private module. Look into one of the folds: a bad argument is named, with its value and what would be right. A kernel must be odd to have a centre.

# %% tags=["plumbing"]
# fold: Checks of numbers, rates and flags
#| export _checks.py
"""Checks of arguments that the whole package shares (chapter 2)."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any


def check_positive(name: str, value: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless `value` is an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError, naming the argument, unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_flags(**flags: bool) -> None:
    """Raise TypeError, naming the argument, unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_rate(name: str, rate: float) -> None:
    """Raise TypeError or ValueError, naming the argument, unless 0 <= rate < 1."""
    check_number(name, rate)
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {rate}")


def check_multiplier(name: str, value: float) -> None:
    """Raise TypeError or ValueError, naming the argument, unless positive and finite."""
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


# %% tags=["plumbing"]
# fold: Checks of sequences and pairs
#| export _checks.py
def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple; TypeError, naming the argument, if they are no sequence."""
    lost = isinstance(values, str | bytes | Set | Mapping)  # of these, order or numbers get lost
    if lost or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    return tuple(values)


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """One positive integer for both axes, or one for each, as a pair."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or two of them, got {value!r}")
    for number in pair:
        check_positive(name, number)
    return int(pair[0]), int(pair[1])


def as_stride(value: int | Sequence[int]) -> int:
    """One stride for both axes; ValueError if they differ."""
    pair = as_pair("stride", value)
    if pair[0] != pair[1]:
        raise ValueError(f"stride must be the same for both axes, got {value!r}")
    return pair[0]


# %% tags=["plumbing"]
# fold: Check of kernel sizes: odd, and at least one
#| export _checks.py
def check_kernel_sizes(kernel_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Kernel sizes as a tuple, one per group; a single integer means one group.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if there is no size, or one is not odd and positive.
    """
    single = isinstance(kernel_sizes, Integral)
    sizes = as_tuple("kernel_sizes", (kernel_sizes,) if single else kernel_sizes)
    if not sizes:
        raise ValueError("kernel_sizes must name at least one size, got none")
    for k in sizes:
        check_positive("each of kernel_sizes", k)
        if k % 2 == 0:
            raise ValueError(f"kernel_sizes must be odd, such as 3, 5 or 7, got {k} in {sizes}")
    return tuple(map(int, sizes))


# %% [markdown]
# One check is of a use, not of an argument. `torch.jit.script` compiles a module's source, and does not know the Python that these checks are made of. Chapter 3's layer refuses it in words:

# %% tags=["plumbing"]
# fold: What `torch.jit.script` is told
#| export _checks.py
def refuse_script(module: object) -> None:
    """Raise NotImplementedError: `torch.jit.script` asks by the name `__prepare_scriptable__`."""
    raise NotImplementedError(
        f"torch.jit.script cannot take a {type(module).__name__}, whose checks are Python that "
        "TorchScript does not know: use torch.export.export, or torch.jit.trace"
    )


# %%
#| export partition.py
from mixconv._checks import as_tuple, check_kernel_sizes, check_positive


def partition_channels(
    channels: int, kernel_sizes: int | Sequence[int], method: str = "equal"
) -> tuple[int, ...]:
    """Split channels into groups, one for each kernel size.

    Args:
        channels: how many channels to split.
        kernel_sizes: one odd size per group, such as `(3, 5, 7)`.
        method: "equal" (`channels // groups` each), "exponential" (half, a quarter, an eighth …,
            the last as much as the one before it) or "logarithmic" (proportional to log k).
            Shares are rounded down; what is left over goes to group 0.

    Returns:
        Channels of each group; they sum to `channels`, and none is 0.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, the method is unknown, or a group is empty.

    Source: paper, section 3.2; `_split_channels` in the official `custom_layers.py`;
    "logarithmic" is ours.
    """
    check_positive("channels", channels)
    sizes = check_kernel_sizes(kernel_sizes)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if method == "logarithmic" and 1 in sizes:
        raise ValueError(f"logarithmic gives kernel size 1 no channels (log 1 = 0), got {sizes}")
    shares = _METHODS[method](channels, sizes)
    shares[0] += channels - sum(shares)
    if 0 in shares:
        raise ValueError(
            f"{method} leaves a group empty: {channels} channels over {sizes} gives {shares}; "
            "use more channels or fewer kernel sizes"
        )
    return tuple(shares)


# %%
assert partition_channels(32, (3, 5, 7, 9)) == (8, 8, 8, 8)
assert partition_channels(32, (3, 5, 7, 9), "exponential") == (16, 8, 4, 4)
assert partition_channels(32, (3, 5, 7, 9), "logarithmic") == (6, 7, 9, 10)
partition_channels(32, default_kernel_sizes(5))

# %% [markdown]
# As by hand. A larger case, with remainders: 528 channels in 5 groups. (The published MixNets never need the remainder: each of their depthwise layers divides evenly. Other widths do.)

# %%
from mixconv.teaching import table

methods = ("equal", "exponential", "logarithmic")
sizes = default_kernel_sizes(5)
table(["method", *(f"{k}×{k}" for k in sizes)],
      [[m, *partition_channels(528, sizes, m)] for m in methods])  # fmt: skip

# %% [markdown]
# What it refuses, and how:

# %%
for arguments in [(8, (3, 5, 7, 9, 11), "exponential"), (32, (3, 4)), (32, (3, 5), "even")]:
    try:
        partition_channels(*arguments)
    except ValueError as error:
        print(error)

# %% [markdown]
# The function gives the bars of the figure above:

# %%
sizes = (3, 5, 7, 9)
computed = {method: partition_channels(32, sizes, method) for method in methods}
assert computed == splits
computed

# %% [markdown]
# **2.1** ★ *3 minutes, one line.* Before you run anything: 74 channels, kernels 3, 5, 7. What is the equal split, and what the exponential one? Return both.
#
# <details><summary>Hint: the idea</summary>
#
# Round every share down, and give what is left over to the first group.
#
# </details>

# %%
from mixconv.teaching import attempt, expect


def two_splits() -> tuple[tuple[int, ...], tuple[int, ...]]:
    raise NotImplementedError


def test_two_splits(answer) -> None:
    right = tuple(partition_channels(74, (3, 5, 7), m) for m in ("equal", "exponential"))
    expect(answer, gives=right, why="24 each and 2 left over; 37, 18, 18 and 1 left over")


attempt(two_splits, test_two_splits)


# %% tags=["solution"]
# fold: Solution
def two_splits_solution() -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (26, 24, 24), (38, 18, 18)


def remainder_last() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """give the remainder to the last group, where a channel costs most"""
    return (24, 24, 26), (37, 18, 19)


def halves_to_the_end() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """halve to the end: the last two exponential shares are equal"""
    return (26, 24, 24), (47, 18, 9)


attempt(two_splits_solution, test_two_splits, wrong=[remainder_last, halves_to_the_end])


# %% [markdown]
# **2.2** ★ *5 minutes, one line.* Write the exponential split the other way round: the *largest* kernel gets half of the channels. 32 in 4 groups becomes 4, 4, 8, 16. What is left over goes to the largest share.
#
# <details><summary>Hint: the idea</summary>
#
# The split does not look at the kernel sizes. Turn its result.
#
# </details>

# %%
def reversed_exponential(channels: int, groups: int) -> tuple[int, ...]:
    raise NotImplementedError


def test_reversed(answer) -> None:
    expect(answer, 32, 4, gives=(4, 4, 8, 16), why="16, 8, 4, 4 from the other end")
    expect(answer, 64, 3, gives=(16, 16, 32), why="32, 16, 16 from the other end")
    why = "16, 8, 4 and 4, and the channel that is left over stays with the largest share"
    expect(answer, 33, 4, gives=(4, 4, 8, 17), why=why)


attempt(reversed_exponential, test_reversed)


# %% tags=["solution"]
# fold: Solution
def reversed_exponential_solution(channels: int, groups: int) -> tuple[int, ...]:
    return partition_channels(channels, default_kernel_sizes(groups), "exponential")[::-1]


def sizes_turned(channels: int, groups: int) -> tuple[int, ...]:
    """turn the kernel sizes: the split does not look at them"""
    return partition_channels(channels, default_kernel_sizes(groups)[::-1], "exponential")


def doubled(channels: int, groups: int) -> tuple[int, ...]:
    """double from group to group, and lose the channels that the first two share"""
    return tuple(channels // 2 ** (groups - i) for i in range(groups))


def rest_lost(channels: int, groups: int) -> tuple[int, ...]:
    """round every share down, and forget what is left over"""
    shares = [channels // 2**i for i in range(1, groups)]
    return tuple([*shares, shares[-1]][::-1])


attempt(reversed_exponential_solution, test_reversed, wrong=[sizes_turned, doubled, rest_lost])

# %% [markdown]
# ## What each choice costs
#
# Chapter 1 gave the cost: $\sum_t c_t k_t^2$ weights, each used once for every output position. Only the split changes.

# %%
from mixconv.formulation import mixconv_multiply_adds, mixconv_parameters

table(
    ["method", "parameters", "multiply-adds at 14×14", "relative to equal"],
    [
        [m, mixconv_parameters(splits[m], sizes), mixconv_multiply_adds(splits[m], sizes, 14, 14),
         f"{mixconv_parameters(splits[m], sizes) / mixconv_parameters(splits['equal'], sizes):.2f}"]
        for m in methods
    ],
)  # fmt: skip

# %% [markdown]
# With more groups, and so with larger kernels, the costs of the three methods drift apart. Here is the mean number of weights for each channel, $\sum_t c_t k_t^2 / c$, for 384 channels:

# %%
cost = {
    method: [
        mixconv_parameters(partition_channels(384, default_kernel_sizes(g), method),
                           default_kernel_sizes(g)) / 384
        for g in range(1, 7)
    ]
    for method in methods
}  # fmt: skip
assert cost["equal"][4] == 56.5  # the mean of 9, 25, 49, 81 and 121 is 57
table(["groups", *map(str, range(1, 7))], [[m, *(f"{v:.1f}" for v in cost[m])] for m in methods])

# %% tags=["drawing"]
# fold: The code that draws this
figure, axis = plt.subplots(figsize=(6, 2.8))
largest = [(2 * g + 1) ** 2 for g in range(1, 7)]
axis.plot(range(1, 7), largest, color="#999999", linestyle=":", marker="o", markersize=4)
axis.text(6.12, largest[-1], "one kernel,\nthe largest", color="#555555", va="center")
for method, style in zip(methods, ("-", "--", "-."), strict=True):
    axis.plot(range(1, 7), cost[method], style, color="black", marker="o", markersize=4)
    nudge = {"equal": -6, "logarithmic": 4}.get(method, 0)
    axis.text(6.12, cost[method][-1] + nudge, method, va="center")
labels = [f"{g}\n3…{2 * g + 1}" if g > 1 else "1\n3" for g in range(1, 7)]
axis.set_xticks(range(1, 7), labels)
axis.set(xlabel="groups, and their kernel sizes", ylabel="weights per channel", xlim=(0.8, 7.2))
show(
    figure,
    "partition_cost.png",
    "Weights per channel against the number of groups, one to six. A single largest kernel "
    f"rises to {largest[-1]}, logarithmic to {cost['logarithmic'][-1]:.0f}, equal to "
    f"{cost['equal'][-1]:.0f}. Exponential levels off, at {cost['exponential'][-1]:.0f}.",
    caption="As groups are added, equal and logarithmic cost more and more; exponential levels "
    "off. (With two groups exponential is equal.)",
)


# %% [markdown]
# Exponential levels off. Each new kernel is larger but gets half as many channels: 9, 17, 23, 27, 29.5, 31, and so on, never reaching the full series $\sum_i 2^{-i} (2i + 1)^2 = 33$. Equal gives every kernel size the same number of channels, so its cost is the mean of all $k^2$, and grows without bound. (Nearly the mean, where a remainder goes to the 3×3 kernels: with 5 groups of 384 channels it is 56.5, not (9 + 25 + 49 + 81 + 121) / 5 = 57.)
#
# > 📄 **Paper.** Figures 4 and 6 compare equal and exponential on MobileNets: on MobileNetV1, MixConv 3 to 13 costs about 705M against 622M multiply-adds (read off the plots). Chapter 5 recomputes the costs; the accuracies are cited.

# %% [markdown]
# ## A split of one's own
#
# Layers also take an explicit tuple of group sizes. One function turns either into a tuple that is known to be right.

# %%
#| export partition.py
def resolve_partition(
    channels: int, kernel_sizes: int | Sequence[int], partition: str | Sequence[int] = "equal"
) -> tuple[int, ...]:
    """Group sizes from a method's name, or from explicit sizes after checking them.

    Args:
        channels: how many channels to split.
        kernel_sizes: one odd size per group.
        partition: a method of `partition_channels`, or the channels of each group.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if explicit sizes do not fit channels and kernel sizes, and as
            `partition_channels` does.
    """
    if isinstance(partition, str):
        return partition_channels(channels, kernel_sizes, partition)
    check_positive("channels", channels)
    sizes, groups = check_kernel_sizes(kernel_sizes), as_tuple("partition", partition)
    for count in groups:
        check_positive("each of partition", count)
    if len(groups) != len(sizes):
        raise ValueError(f"partition {groups} must have one entry for each kernel size of {sizes}")
    if sum(groups) != channels:
        raise ValueError(f"partition {groups} must sum to {channels} channels, not {sum(groups)}")
    return groups


# %%
resolve_partition(32, (3, 5, 7, 9), (20, 6, 4, 2))

# %% [markdown]
# ## Exercises
#
# **2.3** ★★★ *20 minutes, six lines.* Split so that every group has about the same number of *weights*: $c_t$ proportional to $1 / k_t^2$. Round by the *largest remainder*: round every share down, then give one channel more to the groups that lost the largest fractions, until none is left; of equal fractions, the earlier group first. Beware of floats.
#
# <details><summary>Hint: the idea</summary>
#
# The exact shares are fractions: $c \cdot (1 / k_t^2) / \sum_s 1 / k_s^2$. For 74 channels over 5 and 7 they are 49 and 25, exactly. Does your program agree?
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `from fractions import Fraction`, and `shares = [Fraction(channels, k * k) / total for k in kernel_sizes]`
#
# </details>

# %%
import math
from fractions import Fraction


def equal_weights(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    raise NotImplementedError


def test_equal_weights(answer) -> None:
    expect(answer, 74, (5, 7), gives=(49, 25), why="1/25 : 1/49 is 49 : 25, exactly")
    why = "165.8, 59.7 and 30.5: two channels are left, for the first two"
    expect(answer, 256, (3, 5, 7), gives=(166, 60, 30), why=why)
    expect(answer, 10, (3, 3, 3), gives=(4, 3, 3), why="of equal fractions the first")
    expect(answer, 45, (3, 9), gives=(41, 4), why="40.5 and 4.5, exactly: again the first")


attempt(equal_weights, test_equal_weights)


# %% tags=["solution"]
# fold: Solution
def equal_weights_solution(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    total = sum(Fraction(1, k * k) for k in kernel_sizes)
    shares = [Fraction(channels, k * k) / total for k in kernel_sizes]
    split = [math.floor(share) for share in shares]
    lost = sorted(range(len(shares)), key=lambda t: split[t] - shares[t])  # the most lost first
    for t in lost[: channels - sum(split)]:
        split[t] += 1
    return tuple(split)


def by_float(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """trust a float: 49 channels come out as 48.999…, and are cut to 48"""
    total = sum(1 / k**2 for k in kernel_sizes)
    split = [int(channels / k**2 / total) for k in kernel_sizes]
    return (split[0] + channels - sum(split), *split[1:])


def equal_in_floats(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """compare fractions in floats: of two that are equal, one comes out larger"""
    total = sum(1 / k**2 for k in kernel_sizes)
    shares = [channels / k**2 / total for k in kernel_sizes]
    split = [math.floor(share) for share in shares]
    lost = sorted(range(len(shares)), key=lambda t: split[t] - shares[t])
    for t in lost[: channels - sum(split)]:
        split[t] += 1
    return tuple(split)


def to_group_0(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """give all that is left over to group 0"""
    total = sum(Fraction(1, k * k) for k in kernel_sizes)
    split = [math.floor(Fraction(channels, k * k) / total) for k in kernel_sizes]
    return (split[0] + channels - sum(split), *split[1:])


def by_size(channels: int, kernel_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """give the shares in the opposite order"""
    return equal_weights_solution(channels, tuple(kernel_sizes[::-1]))


attempt(equal_weights_solution, test_equal_weights,
        wrong=[by_float, equal_in_floats, to_group_0, by_size])  # fmt: skip


# %% [markdown]
# **2.4** ★★ *10 minutes, two lines.* A budget. A layer has two kernel sizes, small and large, and may have `budget` weights. Give as many channels as you can to the large one. Return the partition, small first; neither group may be empty. (At least one large kernel can be paid.)
#
# <details><summary>Hint: the idea</summary>
#
# A channel that changes from the small kernel to the large one costs the *difference* of their weights.
#
# </details>
#
# <details><summary>Hint: the equation</summary>
#
# All channels small: $c \cdot k^2$ weights. With $n$ of them large: $c \cdot k^2 + n \cdot (K^2 - k^2)$.
#
# </details>

# %%
def most_large(channels: int, small: int, large: int, budget: int) -> tuple[int, int]:
    raise NotImplementedError


def test_most_large(answer) -> None:
    expect(answer, 2, 1, 3, 10, gives=(1, 1), why="1 + 9 weights")
    expect(answer, 32, 3, 9, 800, gives=(25, 7), why="288 for 3×3, and 7 · 72 more")
    expect(answer, 32, 3, 9, 5000, gives=(1, 31), why="the small group must not be empty")


attempt(most_large, test_most_large)


# %% tags=["solution"]
# fold: Solution
def most_large_solution(channels: int, small: int, large: int, budget: int) -> tuple[int, int]:
    affordable = (budget - channels * small**2) // (large**2 - small**2)
    return channels - min(affordable, channels - 1), min(affordable, channels - 1)


def full_price(channels: int, small: int, large: int, budget: int) -> tuple[int, int]:
    """pay the full price of a large kernel, though the small one it replaces was paid"""
    affordable = min((budget - channels * small**2) // large**2, channels - 1)
    return channels - affordable, affordable


def nobody_left(channels: int, small: int, large: int, budget: int) -> tuple[int, int]:
    """let the large kernels take all channels when there is money for them"""
    affordable = min((budget - channels * small**2) // (large**2 - small**2), channels)
    return channels - affordable, affordable


attempt(most_large_solution, test_most_large, wrong=[full_price, nobody_left])

# %% [markdown]
# ## Takeaways
# - ✏️ Our advice: start with equal, and with 3, 5, 7, 9. Take exponential where large kernels must stay cheap. Logarithmic is for experiments.
# - Kernel sizes: 3, 5, 7, …; one per group.
# - Equal is what the official MixNets use. The remainder goes to group 0.
# - Exponential levels off at 33 weights a channel as groups are added. Logarithmic favours large kernels and costs most.
# - No group is ever empty: that is an error, not a surprise.
#
# **Further reading**: [the paper](https://arxiv.org/abs/1907.09595), section 3.2; `_split_channels` in [`custom_layers.py`](https://github.com/tensorflow/tpu/blob/master/models/official/mnasnet/mixnet/custom_layers.py).
#
# Previous: [1 · Formulation](01_formulation.ipynb) · Next: [3 · The layer](03_layer.ipynb)
