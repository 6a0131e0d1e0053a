# %% [markdown]
# # 16 · A model, read
#
# A layer is known, and so is its faster form. May it be put in? That depends on who else reads its output, and in the end on numbers. Below are rewrites of one small layer, green for right and orange for wrong: how far is the result from the original's, on a random image (dot) and on the same image 20 times as loud (ring)?
#
# **You will be able to**
# - check a rewrite without trusting the rules that made it, and say what such a check cannot see;
# - trace a model without running it, and find its layers with the norms and activations that only they feed;
# - say of any layer in any model what keeps it from being fused.
#
# **Know first:** [chapter 11](11_why_slow.ipynb) and [chapter 12](12_operation.ipynb), and the page before this one.
#
# **Time:** 20 minutes to read. Runs in under 30 seconds on two cores. It is the second of three pages, after [A model, in pieces](16_model_pieces.ipynb).

# %% tags=["drawing"]
# fold: The code that draws this
import copy

import matplotlib.pyplot as plt
import torch
from torch import nn

from mixconv import MixConv2d
from mixconv.fast.rewrite import fuse_chain
from mixconv.teaching import show, use_style


def change(position: int, new) -> nn.Sequential:
    """The row with another module at one position."""
    changed = copy.deepcopy(row)
    changed[position] = new(changed[position])
    return changed


def other_eps(norm):
    norm.eps = 1e-4
    return norm


torch.manual_seed(0)
row = nn.Sequential(MixConv2d(24, (3, 5), 2), nn.BatchNorm2d(24), nn.ReLU()).eval()
row[1].running_mean.normal_(), row[1].running_var.uniform_(0.5, 2)
shifted = MixConv2d(24, (3, 5), 2, padding="same")
shifted.load_state_dict(row[0].state_dict())
rewrites = {
    "as one operation": nn.Sequential(*fuse_chain(list(row), "kernel")),
    "as one convolution": nn.Sequential(*fuse_chain(list(row), "merged")),
    "ReLU6 for ReLU": change(2, lambda _: nn.ReLU6()),
    "epsilon 1e-4 for 1e-5": change(1, other_eps),
    "norm forgotten": change(1, lambda _: nn.Identity()),
    "windows one pixel off": change(0, lambda _: shifted),
    "SiLU for ReLU": change(2, lambda _: nn.SiLU()),
}


# %%
@torch.no_grad()
def off_by(other, image) -> float:
    """The largest difference from the row, over the largest value."""
    wanted = row(image)
    return float((other.eval()(image) - wanted).abs().max() / wanted.abs().max())


x = torch.randn(2, 24, 16, 16)
found = [(off_by(other, x), off_by(other, 20 * x)) for other in rewrites.values()]
for name, pair in zip(rewrites, found, strict=True):
    print(f"{name:24}", *(f"{off:6.0e}" if off > 1e-5 else "<=1e-5" for off in pair))

# %% tags=["drawing"]
# fold: The code that draws this
assert [quiet > 1e-3 for quiet, _ in found] == [False] * 4 + [True] * 3
assert [loud > 1e-3 for _, loud in found] == [False, False, True, False, True, True, True]
use_style()
figure, axis = plt.subplots(figsize=(7.8, 3.1))
for place, (quiet, loud) in enumerate(found):
    if place < 2:  # rounding is not the same on every machine
        assert max(quiet, loud) < 1e-6
        axis.plot([1e-9, 1e-6], [-place] * 2, color="#009E73", linewidth=6)
        axis.text(1.6e-6, -place, "at most 1e-6 in both", va="center", fontsize=9)
    else:
        dot = axis.plot(max(quiet, 1e-9), -place, "o", color="#D55E00")
        ring = axis.plot(max(loud, 1e-9), -place, "o", ms=11, mfc="none", color="#D55E00")
axis.axvline(1e-3, color="black", linewidth=0.9, linestyle="--")
axis.text(8e-4, 0.7, "passes", fontsize=9, ha="right")
axis.text(1.3e-3, 0.7, "is put back", fontsize=9)
axis.legend([*dot, *ring], ["image", "20 times as loud"], loc=(0.14, 0.02), fontsize=9)
axis.set_yticks(range(0, -len(rewrites), -1), list(rewrites))
for place, label in enumerate(axis.get_yticklabels()):
    label.set_color("#006b4f" if place < 2 else "#a34600")
axis.set(xscale="log", xlim=(5e-10, 5), ylim=(-6.5, 1.2))
axis.set(xlabel="largest difference, over the largest value")
axis.set_xticks([1e-9, 1e-6, 1e-3, 1], ["0", "1e-6", "1e-3", "1"])
axis.text(1e-8, -6.5, "//", ha="center", va="center", weight="bold")  # from here on: powers of ten
show(
    figure,
    "right_and_wrong_rewrites.png",
    "Differences of seven rewrites from the original, on a logarithmic axis, for an image and one "
    "20 times as loud. The two right ones are below a millionth. Of five wrong ones three are "
    "above the tolerance with either image. ReLU6 for ReLU differs only where the image is loud, "
    "and another epsilon stays below the tolerance in both.",
    caption="In float32 two images find four of five wrong rewrites; another epsilon passes both.",
)

# %% [markdown]
# The dashed line is the tolerance, 1/1000. Right rewrites lie a thousand times below. Of the wrong ones, one image alone misses two: random numbers of this size never reach the 6 of ReLU6, and another epsilon changes less than the tolerance. A louder image finds the first. Nothing finds the second but the rules. So a trial does not replace the rules of the page before. It catches most of what they forgot.

# %% [markdown]
# ## One check for every rewrite
#
# Rules have gaps, and a gap here means a network that is quietly wrong. So nothing is believed. Whatever is rewritten is run beside its original on a random image:
#
# - both on the CPU and in float32 (a GPU's or half-precision model is copied for it);
# - on *twins*: copies of all but the parameters, without hooks, so that nobody's counters and lists are touched;
# - with *different* random seeds: a piece that draws random numbers does not compute the same as itself;
# - and the image is compared as well: a piece may change it in place.
#
# The tolerance is 1/1000 of the largest value. Sums in another order differ by a few millionths at most, even in a whole network; the wrong rewrites that a trial sees lie a few times above the tolerance, and mostly hundreds of times. Weights of half precision were rounded after folding, so more must be allowed there: 16 of their units in the last place. That is much, as we shall see.

# %%
#| export fast/trial.py
"""One numeric check for every rewrite (chapter 16)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# Of the largest value. Sums in another order differ by some 1e-6, what is wrong mostly by 0.01 up.
TOLERANCE = 1e-3
ROUNDED = 16  # so many units in the last place, if those of the weights are larger
LOUD = 20  # so many times the usual image: beyond the bend of a ReLU6, or of a clamp


class CannotTryError(Exception):
    """The original gives nothing to compare with."""


def twin(module: nn.Module) -> nn.Module:
    """A copy to try things on: it shares the parameters, and has no hooks."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            getattr(part, f"_{kind}_hooks").clear()
    return copied


# %%
#| export fast/trial.py
def make_image(channels: int, height: int, width: int, batch: int = 1) -> Tensor:
    """A random image, the same every time."""
    size, generator = (batch, channels, height, width), torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def find_tolerance(module: nn.Module) -> float:
    """How far from its original a rewritten module may be: more, if its weights are rounded."""
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max([TOLERANCE, *(ROUNDED * torch.finfo(dtype).eps for dtype in dtypes)])


def in_float32(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float32, or the module itself where it is so already."""
    tensors = [*module.parameters(), *module.buffers()]
    exact = [t.dtype == torch.float32 or not t.is_floating_point() for t in tensors]
    there = all(exact) and all(tensor.is_cpu for tensor in tensors)
    return module if there else copy.deepcopy(module).cpu().float()


# %%
#| export fast/trial.py
from torch.utils._pytree import tree_leaves


def _run(module: nn.Module, image: Tensor, seed: int) -> list[Tensor]:
    """All tensors that come out, and the image as it is afterwards."""
    image = image.clone()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(seed)
        found = [*tree_leaves(module(image)), image]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _compare(wanted: list[Tensor], found: list[Tensor], tolerance: float) -> str:
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return "tried, and gave other shapes"
    pairs = [pair for pair in zip(wanted, found, strict=True) if pair[0].numel()]
    for one, other in pairs:
        largest, worst = float(one.abs().max()), float((one.double() - other).abs().max())
        if not worst <= tolerance * largest:  # NaN is not
            return f"tried, and not the same: off by up to {worst:.2g}, values up to {largest:.2g}"
    return ""


# %% [markdown]
# If the original itself fails on the image, or gives NaN, nothing can be said. For a piece that means: left alone.

# %%
#| export fast/trial.py
@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, image: Tensor, *, random: bool = False) -> str:
    """What keeps `after` from standing in for `before`, as text; empty if they compute the same.

    Args:
        before: the original. Copies are run, on the CPU in float32, without hooks.
        after: the rewritten one. What is allowed depends on its weights: 1/1000 of the largest
            value in float32, 1/64 in float16, 1/8 in bfloat16.
        image: given to both.
        random: give both the same random numbers, if they draw any.

    Raises:
        CannotTryError: if the original fails, or its values are not finite.
    """
    try:
        wanted = _run(twin(in_float32(before)), image, 0)
    except Exception as error:  # anything may go wrong in a stranger's forward
        raise CannotTryError(f"it does not run on a random image: {error}") from error
    if not all(tensor.isfinite().all() for tensor in wanted):
        raise CannotTryError("it gives NaN or infinity on a random image")
    try:
        found = _run(twin(in_float32(after)), image, 0 if random else 1)
    except Exception as error:
        return f"tried, and failed: {error}"
    return _compare(wanted, found, find_tolerance(after))


# %% [markdown]
# A layer or a block is tried a second time, on the image 20 times as loud. A model as a whole is not: its own layers are not in question any more, only how they hang together.

# %%
#| export fast/trial.py
def piece_difference(before: nn.Module, after: nn.Module, image: Tensor) -> str:
    """`difference` for a layer or a block, on an image and on the same one `LOUD` times as loud.

    Raises:
        CannotTryError: as `difference`.
    """
    return difference(before, after, image) or difference(before, after, LOUD * image)


# %% [markdown]
# Five ways to be found out:

# %%
image = make_image(3, 4, 4)
print("other values:   ", difference(nn.ReLU(), nn.Hardtanh(0, 1), image))
print("changes x:      ", difference(nn.ReLU(), nn.ReLU(inplace=True), image))
print("draws numbers:  ", difference(nn.Dropout(), nn.Dropout(), image))  # in training mode
print("only when loud: ", piece_difference(nn.ReLU(), nn.ReLU6(), image))
try:
    difference(nn.Threshold(0, float("nan")), nn.ReLU(), image)
except CannotTryError as error:
    print("gives NaN:      ", error)

# %% [markdown]
# ## Half precision
#
# In bfloat16 a unit in the last place of 1 is 1/128, and 16 / 128 = 0.125 of the largest value is allowed. Does a trial still see SiLU for ReLU? The first row of the page in three types, with its norm folded in:

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    before = copy.deepcopy(row).to(dtype)
    folded = fuse_chain(list(before)[:2], "merged")
    image = make_image(24, 9, 8)
    for activation in (nn.ReLU(), nn.SiLU()):
        reason = piece_difference(before, nn.Sequential(*folded, activation), image)
        verdict = "is put back" if reason else "passes"
        print(f"{str(dtype)[6:]:9}{type(activation).__name__:5}{verdict}")

# %% [markdown]
# In bfloat16 it passes. So one trial of rounded weights is not enough: for a layer of half precision, the next page makes the same rewrite in float32 as well, and holds that one to 1/1000. What is true of both is said by the exact one; the rounded one is only asked for gross errors. (A model as a whole is tried once, as it is. In bfloat16 that trial sees only what is off by an eighth.)

# %% [markdown]
# ## What follows what
#
# Outside of known blocks the question is who feeds whom. `torch.fx` runs a model's `forward` once with a stand-in for the tensor and writes down each call. Our tracer looks into blocks, but not into layers, nor into what has hooks: that keeps its own borders.
#
# While it traces, `torch.fx` changes `nn.Module` itself, for the whole process. Another thread that serves requests at that moment would have its calls written down, too. So ours passes them through.

# %%
#| export fast/chains.py
"""What follows what in a model, and whether it may be changed (chapter 16)."""

import threading
from collections.abc import Callable
from typing import Any

import torch.fx
from torch import nn

from mixconv.fast.describe import NORMS, describe_layer, is_one_of


class _Tracer(torch.fx.Tracer):
    """Looks into blocks, not into layers.

    Other threads call their modules as ever, and so does a model what is no part of it.
    """

    def __init__(self, hooked: set[str], parts: set[nn.Module]) -> None:
        super().__init__()
        self.hooked, self.parts, self.thread = hooked, parts, threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_one_of(m, NORMS) or _is_layer(m) or not m._modules:
            return True
        return module_qualified_name in self.hooked or super().is_leaf_module(m, "")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or m not in self.parts:  # one activation for all
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _is_layer(module: nn.Module) -> bool:
    return type(module) in describe_layer.registry


# %% [markdown]
# Not every model can be traced: one that looks at the numbers cannot. That is no fault; its parts are then fused one by one.

# %%
#| export fast/chains.py
class CannotTraceError(Exception):
    """The model's forward does something that torch.fx cannot follow."""


def _trace(model: nn.Module, hooked: set[str]) -> torch.fx.Graph:
    if _is_layer(model):  # is called, and not looked into
        graph = torch.fx.Graph()
        graph.create_node("call_module", "", (graph.placeholder("x"),))
        return graph
    try:
        if "forward" in vars(model):
            raise ValueError("it has a forward of its own")
        return _Tracer(hooked, set(model.modules())).trace(model)
    except Exception as error:  # anything may go wrong in a stranger's forward
        raise CannotTraceError(str(error)) from error


# %% [markdown]
# A trace runs the model's Python, which may count its calls or keep tensors in a list. So a twin is traced.

# %%
#| export fast/chains.py
from collections.abc import Iterator

from torch.utils._pytree import tree_leaves


def _held(model: nn.Module) -> Iterator[Any]:
    """All that modules hold outside their lists of parts, in lists and dictionaries too."""
    for module in model.modules():
        others = {key: value for key, value in vars(module).items() if key != "_modules"}
        yield from tree_leaves(others)


# %% [markdown]
# Now the rules "alone" and "untouched". A layer may not be changed if it is called twice, if somebody reads its weight directly (`F.conv2d(x, self.conv.weight)`), if it has two names or also lies in a plain list, or if it has hooks.

# %%
#| export fast/chains.py
from collections import Counter


def _find_twice_held(model: nn.Module) -> set[nn.Module]:
    """Modules that one change in one place would not change everywhere."""
    names = Counter(part for _, part in model.named_modules(remove_duplicate=False))
    twice = {part for part, count in names.items() if count > 1}
    twice.update(held for held in _held(model) if isinstance(held, nn.Module))
    return {part for module in twice for part in module.modules()}


# %%
#| export fast/chains.py
def _find_obstacles(
    model: nn.Module, graph: torch.fx.Graph, hooked: set[str]
) -> dict[nn.Module, str]:
    """Why modules of a traced model may not be changed."""
    parts = dict(model.named_modules())
    called = [parts[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    calls = Counter(part for module in called for part in module.modules())
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    tensors = {id(tensor) for name, tensor in model.named_parameters() if name in reads}
    found = dict.fromkeys(_find_twice_held(model), "is reached in more than one way")
    for name, part in parts.items():
        if calls[part] > 1 or any(id(p) in tensors for p in part._parameters.values()):
            found[part] = "is used more than once"
        if name in hooked:
            found[part] = "has hooks, or a forward or weight of its own"
    return found


# %% [markdown]
# And the chains. Each begins with a layer and goes on while the output has one reader, and that reader is a norm (once) or an activation (last). Tensors that the model keeps in an attribute have a reader that no graph shows.

# %%
#| export fast/chains.py
from torch.fx import Node, Proxy

from mixconv.fast.trial import twin
from mixconv.surgery import has_hooks


class Chains:
    """The layers of a model, each with the norm and the activation that only it feeds.

    Args:
        model: is traced, not run.

    Attributes:
        found: names, a list for each layer.
        left: why a layer or norm is in none of them, by name.
        closed: names of modules that were not looked into.

    Raises:
        CannotTraceError: with torch.fx's words.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: list[list[str]] = []
        self.left: dict[str, str] = {}
        self.closed: list[str] = []
        hooked = {name for name, part in model.named_modules() if has_hooks(part)}
        copied = twin(model)
        graph = _trace(copied, hooked)
        self._layers: dict[str, nn.Module] = dict(copied.named_modules())
        self._obstacles = _find_obstacles(copied, graph, hooked)
        self._kept = {held.node for held in _held(copied) if isinstance(held, Proxy)}
        for node in graph.nodes:
            if node.op == "call_module" and _is_layer(self._layer(node)):
                self.found += filter(None, [self._follow(node)])
            elif node.op == "call_module":
                self._pass(node)


# %%
#| export fast/chains.py
class Chains(Chains):
    def _pass(self, node: Node) -> None:
        """Look at what is no layer."""
        norm, reason = is_one_of(self._layer(node), NORMS), self._obstacle(node)
        if norm and reason:
            self.left[str(node.target)] = reason
        elif not norm and self._layer(node)._modules:
            self.closed.append(str(node.target))

    def _layer(self, node: Node) -> nn.Module:
        return self._layers[str(node.target)]

    def _obstacle(self, node: Node) -> str:
        parts = self._layer(node).modules()
        return next((self._obstacles[part] for part in parts if part in self._obstacles), "")


# %%
#| export fast/chains.py
from mixconv.fast.describe import activation_name, is_idle, steps
from mixconv.fast.spec import ACTIVATIONS


class Chains(Chains):
    def _follow(self, node: Node) -> list[str]:
        """The chain that begins with a layer; empty if the layer may not be changed."""
        chain: list[str] = []
        while not (reason := self._obstacle(node)):
            if not is_idle(self._layer(node)):
                chain.append(str(node.target))
            if len(node.users) != 1 or node in self._kept:
                return chain
            before, node = node, next(iter(node.users))
            if not self._continues(chain, before, node):
                return chain
        if not chain or is_one_of(self._layer(node), NORMS):
            self.left[str(node.target)] = reason
        return chain


# %%
#| export fast/chains.py
class Chains(Chains):
    def _continues(self, chain: list[str], before: Node, node: Node) -> bool:
        """Whether a node takes part: a norm first, then an activation, nothing between."""
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return False
        step, last = self._layer(node), self._layers[chain[-1]]
        if is_idle(step) or (is_one_of(step, NORMS) and len(chain) == 1):
            return True
        # Over, if the last one was an activation, or timm's norm, which brings one of its own.
        ended = activation_name(last) or list(steps([last])) != [last]
        return activation_name(step) in ACTIVATIONS[1:] and not ended


# %% [markdown]
# By hand, for the row of the page before:
#
# 1. Node 0 is a layer: the chain is 0. One node reads it, 1. That is a norm, and the chain has one name yet: go on.
# 2. Node 1: the chain is 0, 1. One node reads it, 2. That is an activation, and the chain has had none: go on.
# 3. Node 2: the chain is 0, 1, 2. One node reads it, 3, a convolution: neither norm nor activation. The chain is over.
# 4. Node 3 is a layer: the chain is 3. Its reader is the model's output, which is no module. Over.
#
# And with a hook on the norm: step 1 is as before, and leads to node 1. That has an obstacle, so the loop ends before its name is added. The chain is 0. Since node 1 is a norm, its obstacle is noted in `left`.
#
# The same row in its four cases:

# %%
from mixconv.teaching import table


class Doubling(MixConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Adding(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[3](y + self[2](self[1](y)))


layers = [MixConv2d(8, (3, 5)), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
hooked = copy.deepcopy(nn.Sequential(*layers))
hooked[1].register_forward_hook(print)
cases = {
    "alone": nn.Sequential(*layers),
    "read twice": Adding(*layers),
    "a hook": hooked,
    "a class of its own": nn.Sequential(Doubling(8, (3, 5)), *layers[1:]),
}

# %%
rows = []
for name, case in cases.items():
    chains = Chains(case.eval())
    left = [f"{place}: {reason}" for place, reason in chains.left.items()]
    found = ", ".join(" + ".join(chain) for chain in chains.found)
    rows.append([name, found, "; ".join(left) or "nothing"])
table(["case", "chains, each one piece", "left, and why"], rows)


# %% [markdown]
# Read twice, or with a hook on the norm, the layer is a chain of its own: it becomes one operation, and the norm stays. The hooked norm is named as left, since something keeps it from being folded. The norm of "read twice" has nothing against it, only no chain that would take it: that one is named by the next page's report. A `Doubling` is looked into, as blocks are, and one finds two convolutions in it that are known: those may be made faster by themselves, and the doubling stays.

# %% [markdown]
# ## Exercises
#
# What does a trial not see? A module from a function, and numbers of all sizes to look at:

# %%
class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


sizes = torch.logspace(-12, 12, 1000)

# %% [markdown]
# **16.2** ★★ *5 minutes, one line.* Write a function that differs from a ReLU, and that `piece_difference` takes for one. It is enough that some image exists for which it gives something else.
#
# <details><summary>Hint: the idea</summary>
#
# Both images are finite: the louder one has numbers of up to 100 or so. What happens beyond?
#
# </details>

# %%
from torch import Tensor

from mixconv.fast.trial import piece_difference
from mixconv.teaching import attempt


def not_quite_relu(x: Tensor) -> Tensor:
    raise NotImplementedError


def test_fooled(answer) -> None:
    answer(torch.ones(1))
    seen = piece_difference(nn.ReLU(), Call(answer), make_image(8, 16, 16))
    assert not seen, f"the trial has seen it: {seen}"
    numbers = torch.cat([sizes, -sizes])
    same = torch.allclose(answer(numbers), numbers.relu(), rtol=1e-3)
    assert not same, "it gives what a ReLU gives, wherever this test has looked"


attempt(not_quite_relu, test_fooled)


# %% tags=["solution"]
# fold: Solution
def not_quite_relu_solution(x: Tensor) -> Tensor:
    return x.clamp(0, 1000)  # an image of these numbers would have to be 1000 times as loud


def six(x: Tensor) -> Tensor:
    """take ReLU6: the louder image reaches 6"""
    return x.clamp(0, 6)


def same_thing(x: Tensor) -> Tensor:
    """write a ReLU in another way: it differs nowhere"""
    return (x + x.abs()) / 2


def leaky(x: Tensor) -> Tensor:
    """let a hundredth of what is negative through: more than the tolerance"""
    return torch.where(x < 0, x / 100, x)


attempt(not_quite_relu_solution, test_fooled, wrong=[six, same_thing, leaky])

# %% [markdown]
# ## Takeaways
# - Every rewrite is tried beside its original, pieces also on a louder image, and in float32 where their own weights are rounded. That catches most of what the rules forgot; it does not replace them.
# - What is folded must feed nothing else, be called from one place, and have no hooks.
# - `torch.fx` shows who reads what, without a number computed. What it cannot show: values that a model keeps, or reads while nobody traces.
#
# Previous: [16 · A model, in pieces](16_model_pieces.ipynb) · Next: [16 · A model, rewritten](16_model_rewritten.ipynb)
