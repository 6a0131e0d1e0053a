# %% [markdown]
# # 12 · The operation
#
# A fast kernel for MixConv will be written in the next two chapters. What must it compute, what may it refuse, and how does PyTorch (gradients, `vmap`, autocast, the compiler, the profiler) come to know of it? The picture shows the way of a call.
#
# **You will be able to**
# - say what the operation computes, and by which way a call gets there;
# - write a form of it that says why it declines a call;
# - register an operation with PyTorch: shapes, gradient, `vmap`, autocast.
#
# **Know first:** [chapter 3](03_layer.ipynb) and [chapter 11](11_why_slow.ipynb), above all its section "The layer as one task": `MixSpec`, packed weights and `split_form` come from there.
#
# **Time:** 35 minutes to read. Runs in under 60 seconds on two cores.

# %% tags=["drawing"]
# fold: The code that draws this
import logging

import matplotlib.pyplot as plt

from mixconv.teaching import show, use_style

logging.getLogger("mixconv").setLevel(logging.ERROR)  # a later chapter may compile something
GREY = "#e4e4e4"
BOXES = [
    (0, 2.0, 1.9, "mixed_depthwise2d\n(x, weight, bias, …)", GREY),
    (2.9, 3.2, 2.6, "PyTorch's dispatcher:\ngradient, vmap, autocast,\nprofiler …", "#F3D9E8"),
    (6.5, 2.0, 1.9, "first form with\nno reason to decline", GREY),
    (9.4, 3.2, 1.9, "a fast form", "#CCE3F0"),
    (9.4, 0.8, 1.9, "split_form:\nalways can", "#D5EFE6"),
]
ARROWS = [
    ((1.9, 2.2), (2.9, 3.0), "somebody\nwatches", (2.25, 2.95)),
    ((5.5, 3.0), (6.5, 2.3), "", (0, 0)),
    ((1.9, 1.8), (6.5, 1.8), "nobody watches: straight on", (4.2, 1.62)),
    ((8.4, 2.3), (9.4, 3.0), "it takes the call", (8.55, 2.95)),
    ((8.4, 1.7), (9.4, 1.0), "all decline", (8.65, 1.12)),
    (
        (0.95, 1.4),
        (9.4, 0.45),
        "forward mode or torch.func.grad watches: step by step",
        (4.2, 0.62),
    ),
]

# %% tags=["drawing"]
# fold: The code that draws this
use_style()
figure, axis = plt.subplots(figsize=(7.6, 3.3))
for x, y, width, text, color in BOXES:
    axis.add_patch(plt.Rectangle((x, y - 0.55), width, 1.1, facecolor=color, edgecolor="#555555"))
    axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)
for start, end, label, at in ARROWS:
    bend = "angle,angleA=-90,angleB=180" if end[1] < 0.5 else "arc3"
    arrow = {"arrowstyle": "->", "color": "#333333", "connectionstyle": bend}
    axis.annotate("", end, start, arrowprops=arrow)
    axis.text(*at, label, ha="center", va="center", fontsize=8)
axis.set(xlim=(-0.1, 11.4), ylim=(0.1, 3.9))
axis.axis("off")
show(
    figure,
    "way_of_a_call.png",
    "Boxes and arrows. A call goes through PyTorch's dispatcher if somebody watches, else straight "
    "on; then the first form that has no reason to decline computes, and if all decline the split "
    "form does. Forward mode and torch.func.grad lead to the split form's steps at once.",
    caption="A call goes straight to the first form that does not decline, unless somebody "
    "watches; the split form is behind every way.",
)

# %% [markdown]
# Three promises are in this picture, and the chapter keeps them one by one.
#
# 1. The operation has *one* meaning: chapter 11's `split_form` of a `MixSpec`, with packed weights. It is slow and always works. All else is compared with it.
# 2. A fast form may decline, and says why. It never guesses.
# 3. A shortcut is taken only when nobody would notice.
#
# ## Forms, and why they decline
#
# The kernel of chapter 14 will want 32-bit floats on a CPU, and a compiler. The kernel of chapter 17 will want a GPU. Each is a **form** of the operation: `declines` lists its reasons, and if there are none, `prepare` plans the work once (it chooses a compiled loop, say, and cuts the image for the threads) and returns the function that runs. (A `Protocol` is a list of what a class must have; a form need not inherit from it.)
#
# A form decides by everything about a call except the numbers in it and how they lie in memory (a form that wants channels last copies what lies otherwise). So its decision can be remembered:

# %%
#| export fast/forms.py
"""Who computes: the forms of an operation, each with its reasons to decline (chapter 12).

And who must see a call: `must_dispatch`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """What forms decide by: all of a call but the numbers, and how they lie in memory.

    Attributes:
        spec: what to compute.
        sizes: of x.
        dtype: of all tensors.
        device: its type, such as "cpu".
        has_bias: whether there is one.
        threads: how many a form may use.
        parameters: sizes of the weights and biases.
    """

    spec: Any
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str
    has_bias: bool
    threads: int
    parameters: tuple[tuple[int, ...], ...] = ()


Runner = Callable[..., Tensor]


class Form(Protocol):
    """A way to compute an operation."""

    name: str

    def declines(self, call: Call) -> list[str]:
        """Why this form cannot take the call; nothing if it can."""

    def prepare(self, call: Call) -> Runner:
        """What computes such calls, planned once: a function of the operation's tensors."""


# %% [markdown]
# `Forms` holds the forms of one operation. It asks one after another. If all decline, the fallback computes.

# %%
#| export fast/forms.py
class Forms:
    """The forms of one operation, by device; the first that does not decline computes.

    `choose` remembers its choices, so that a call which repeats an earlier one plans nothing.

    Args:
        operation: its name, for messages.
        fallback: prepares what computes when all decline.
        check: raises if the sizes of a call do not fit; asked once for calls that are alike.
    """

    def __init__(
        self, operation: str, fallback: Callable[[Call], Runner],
        check: Callable[[Call], None] = lambda call: None,
    ) -> None:  # fmt: skip
        self.operation = operation
        self.fallback = fallback
        self.check = check
        self.forms: dict[str, list[Form]] = {}
        self.choose = functools.lru_cache(maxsize=1024)(self._choose)  # the only memory of plans

    def add(self, device: str, form: Form) -> None:
        """Let a form compute on a device; one of the same name is replaced."""
        others = [other for other in self.forms.get(device, []) if other.name != form.name]
        self.forms[device] = [*others, form]
        self.forget()

    def forget(self) -> None:
        """Choose anew from now on: what the forms decided by has changed."""
        self.choose.cache_clear()

    def reasons(self, call: Call) -> dict[str, list[str]]:
        """Why each form of the call's device declines it; an empty list: it does not."""
        return {form.name: form.declines(call) for form in self.forms.get(call.device, [])}

    def _choose(self, call: Call) -> Runner:
        self.check(call)
        for form in self.forms.get(call.device, []):
            if not form.declines(call):
                return form.prepare(call)
        return self.fallback(call)


# %% [markdown]
# What goes into it for this operation: the split form as the fallback, its output in channels-last memory order as every form's must be, and a check of the sizes. (`must_dispatch` and `needs_steps` are imported here and written further down.)

# %%
#| export fast/operation.py
"""MixConv as one operation: how it is called, and which form computes it (chapter 12).

`FORMS` holds the faster ways to compute chapter 11's `split_form`; later chapters add them. PyTorch
knows the operation as `mixconv::mixed_depthwise2d`.
"""

import torch
from torch import Tensor

from mixconv.fast.forms import Call, Forms, Runner, must_dispatch, needs_steps
from mixconv.fast.spec import MixSpec, check_spec, split_form


def _prepare_split(call: Call) -> Runner:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = split_form(x, weight, bias, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


def check_call(call: Call) -> None:
    """Raise a ValueError unless the sizes of the tensors fit the operation."""
    count, packed = check_spec(call.spec)
    if len(call.sizes) != 4 or call.sizes[1] != count:
        raise ValueError(f"x must be (N, {count}, H, W), got {tuple(call.sizes)}")
    weight, *bias = map(tuple, call.parameters)
    if weight != (packed,):
        raise ValueError(f"weight must hold {packed} packed numbers, got {weight}")
    if bias and bias[0] != (count,):
        raise ValueError(f"bias must be ({count},), got {bias[0]}")


FORMS = Forms("mixed_depthwise2d", _prepare_split, check_call)

# %% [markdown]
# As far as this chapter goes, `FORMS` is empty. But importing the package imports chapters 14 and 17, whose forms add themselves: on your machine they may compute what is called below. To see how forms are chosen, here is one in ten lines, for a shop of its own. Where all groups have the same kernel, one convolution will do, without split and concatenation:

# %%
from mixconv.fast.spec import pack_weights, unpack_weights


class OneConvolution:
    name = "one convolution"

    def declines(self, call: Call) -> list[str]:
        sizes = sorted(set(call.spec.kernel_sizes))
        reasons = [f"kernel sizes {sizes}: one is possible"] if len(sizes) > 1 else []
        return reasons + (["dilation"] if max(call.spec.dilations) > 1 else [])

    def prepare(self, call: Call) -> Runner:
        one = {"channels": (call.sizes[1],), "kernel_sizes": call.spec.kernel_sizes[:1]}
        whole = call.spec._replace(**one, dilations=(1,))

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            kernels = torch.cat(unpack_weights(weight, call.spec))
            return split_form(x, pack_weights([kernels]), bias, whole)

        return run


# %% [markdown]
# Reasons serve everybody. `choose` only asks whether there are any. A person asks which: *why did my layer not take the fast way?* Whichever way is taken, it gives what `split_form` gives:

# %%
from mixconv.teaching import check_rewrite

shop = Forms("for this page", _prepare_split, check_call)
shop.add("cpu", OneConvolution())
equal = MixSpec((2, 3), (3, 3), 1, (1, 1), "symmetric", "none")
for case in (equal, equal._replace(kernel_sizes=(3, 5), dilations=(2, 1))):
    x, weight = torch.randn(2, 5, 8, 8), torch.randn(check_spec(case)[1])
    call = Call(case, x.shape, x.dtype, "cpu", False, 1, (weight.shape,))
    print(shop.reasons(call))
    check_rewrite(
        lambda x, w, case=case: split_form(x, w, None, case),
        lambda x, w, call=call: shop.choose(call)(x, w, None),
        x, weight, what=f"kernels {case.kernel_sizes}",
    )  # fmt: skip

# %% [markdown]
# **12.1** ★★ *10 minutes, four lines.* A kernel was compiled for kernel sizes 3, 5 and 7 in float32. Write its `declines`: a reason that names each other kernel size (once, ascending), and a reason that names the dtype.
#
# <details><summary>Hint: the idea</summary>
#
# Collect *all* reasons: who asks why wants to mend everything at once. A set knows each size once.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# `others = sorted(set(call.spec.kernel_sizes) - {3, 5, 7})`
#
# </details>

# %%
from mixconv.teaching import attempt


def declines(call: Call) -> list[str]:
    raise NotImplementedError


def test_declines(answer) -> None:
    def ask(sizes, dtype):
        spec = MixSpec((1,) * len(sizes), sizes, 1, (1,) * len(sizes), "same", "none")
        return answer(Call(spec, (1, len(sizes), 8, 8), dtype, "cpu", False, 1))

    assert ask((3, 7), torch.float32) == [], "3×3 and 7×7 in float32 are taken: no reason"
    reasons = ask((1,), torch.bfloat16)
    assert len(reasons) == 2, f"1×1 in bfloat16 is wrong in two ways, and the reasons are {reasons}"
    (reason,) = ask((11, 9, 11, 3), torch.float32)
    found = [reason.count("11"), reason.index("9") < reason.index("11")]
    assert found == [1, True], f"9, then 11, each once; the reason is {reason!r}"


attempt(declines, test_declines)


# %% tags=["solution"]
# fold: Solution
def declines_solution(call: Call) -> list[str]:
    reasons = [] if call.dtype == torch.float32 else [f"dtype {call.dtype}, not float32"]
    if others := sorted(set(call.spec.kernel_sizes) - {3, 5, 7}):
        reasons.append(f"kernel sizes {', '.join(map(str, others))} were not compiled")
    return reasons


def first_only(call: Call) -> list[str]:
    """stop at the first reason"""
    return declines_solution(call)[:1]


def as_they_come(call: Call) -> list[str]:
    """name the sizes group by group, as they come"""
    others = [str(k) for k in call.spec.kernel_sizes if k not in (3, 5, 7)]
    reasons = [] if call.dtype == torch.float32 else [f"dtype {call.dtype}"]
    return reasons + ([f"kernel sizes {', '.join(others)}"] if others else [])


attempt(declines_solution, test_declines, wrong=[first_only, as_they_come])


# %% [markdown]
# A call is described by its tensors. That is also where tensors that do not belong together are refused. (Where their *sizes* do not fit, `check_call` says so.)

# %% tags=["plumbing"]
# fold: A call from its tensors
#| export fast/operation.py
def describe_call(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Call:
    """The call that these tensors make.

    Raises:
        ValueError: if they differ in dtype or device. (Sizes are the business of `check_call`.)
    """
    given, cpu, dtype = (weight,) if bias is None else (weight, bias), x.is_cpu, x.dtype
    for tensor in given:
        near = tensor.is_cpu if cpu else tensor.device == x.device  # the first is faster to ask
        if not near or tensor.dtype != dtype:
            raise ValueError(
                f"weight and bias must have the dtype and device of x, {x.dtype} on {x.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    parameters = (weight.shape,) if bias is None else (weight.shape, bias.shape)
    device, threads = "cpu" if cpu else x.device.type, torch.get_num_threads()
    return Call(spec, x.shape, dtype, device, bias is not None, threads, parameters)


# %% [markdown]
# ## Who must see a call
#
# The short way leads from Python straight to a C++ function, and nobody sees it. PyTorch's own way leads through its *dispatcher*: the part that looks, at each call, who wants to take part. With next to nothing to compute, a call took 4 µs by the short way, and more than three times that through the dispatcher. <!-- measured: run_operation and torch.ops.mixconv.mixed_depthwise2d on 8 channels of 2×2 pixels, no_grad, one thread, shortest of 3000: 4.4 and 14.7 µs, 2026-11-25 --> How long does a layer take?

# %%
import json
from pathlib import Path

rows = json.loads(Path("../figures/bench.json").read_bytes())["layers"]
times = sorted(1e6 * row["seconds"]["fused"] for row in rows if row["batch"] == 1)
print(f"MixNet's layers, one image: from {times[0]:.0f} µs on, half of them below "
      f"{times[len(times) // 2]:.0f} µs")  # fmt: skip

# %% [markdown]
# So take the short way, but only when nobody watches. Somebody watches if
#
# - a gradient is wanted, or a function transform (`vmap`, `torch.func.grad`) is at work;
# - a compiler or exporter traces, or a mode or the profiler records;
# - autocast rules over dtypes;
# - a tensor is a wrapper (a quantised or distributed tensor, say) and has no memory of its own: its address is 0;
# - a view is *still to be negated*: `z.conj().imag` shares its memory with `z.imag`, and that its sign is turned is only a mark on the tensor;
# - a weight's memory was given back, as some programs do between two forwards.
#
# Most of these questions have no public name in PyTorch: `torch._C._…` may change. They were tried with the versions that the README names. Should one go, the first call ends in an AttributeError, and not in a wrong result.

# %%
#| export fast/forms.py
from torch import nn

_CLASSES = frozenset({Tensor, nn.Parameter})


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in the CPU's memory, as they are.

    Not so for views that are still to be negated, for tensors without memory (on the device
    "meta", or known to be zero), and for what subclasses wrap.
    """
    known = type(tensor) in _CLASSES and tensor.is_cpu and not tensor.is_neg()
    return known and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def check_memory(*tensors: Tensor) -> None:
    """Raise a RuntimeError for a tensor whose storage was given back: reading it would crash."""
    for tensor in tensors:
        if type(tensor) in _CLASSES and tensor.numel() and tensor.data_ptr() == 0:
            raise RuntimeError(f"a tensor {tuple(tensor.shape)} has no memory: its storage is gone")


# %%
#| export fast/forms.py
def must_dispatch(*tensors: Tensor | None) -> bool:
    """Whether a call must go through PyTorch's dispatcher, so that others see or change it.

    Those are tracers, modes, function transforms, autocast, the profiler, a wanted gradient, and
    what tensors of other kinds do: subclasses, other devices, views that are to be negated.
    """
    if torch.compiler.is_compiling() or _is_watched():
        return True
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((gradients and tensor.requires_grad) or not is_plain(tensor)):
            return True
    return False


def _is_watched() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.autograd.forward_ad._current_level >= 0
    )


# %%
from contextlib import nullcontext

ordinary, weight = torch.ones(3), torch.ones(3, requires_grad=True)
negated = torch.complex(ordinary, ordinary).conj().imag
for name, context in {
    "nobody watches": nullcontext(),
    "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    "forward mode": torch.autograd.forward_ad.dual_level(),
}.items():
    with context:
        print(f"{name}:", *(must_dispatch(tensor) for tensor in (ordinary, weight, negated)))

# %% [markdown]
# Five more calls, and why each goes the way it goes:

# %%
SITUATIONS = {
    "a weight that wants a gradient": lambda: must_dispatch(weight),
    "the same, under no_grad": lambda: torch.no_grad()(must_dispatch)(weight),
    "every second number of a tensor": lambda: must_dispatch(torch.ones(6)[::2]),
    "the imaginary part of a conjugate": lambda: must_dispatch(negated),
    "a tensor on the meta device": lambda: must_dispatch(ordinary.to("meta")),
}
WHY = (
    "autograd must see the call",
    "no gradient is wanted there, whatever the weight asks for",
    "gaps are no obstacle: a copy has none",
    "its sign is only a mark, which C++ does not see",
    "it has no numbers",
)

# %% [markdown]
# **12.2** ★ *5 minutes, one line.* Which of these calls must go through the dispatcher? Decide for each before you run the test.
#
# <details><summary>Hint: the idea</summary>
#
# Ask of each: does anybody watch, and do the numbers lie in the CPU's memory as they are? Gaps between them are no obstacle: C++ can be handed a copy without gaps.
#
# </details>

# %%
from mixconv.teaching import expect


def is_dispatched(situation: str) -> bool:
    raise NotImplementedError


def test_dispatched(answer) -> None:
    for (situation, ask), why in zip(SITUATIONS.items(), WHY, strict=True):
        expect(answer, situation, gives=ask(), why=why)


attempt(is_dispatched, test_dispatched)


# %% tags=["solution"]
# fold: Solution
def is_dispatched_solution(situation: str) -> bool:
    return situation not in ("the same, under no_grad", "every second number of a tensor")


def by_the_flag(situation: str) -> bool:
    """go by the weight's requires_grad alone: under no_grad nobody wants it"""
    return situation != "every second number of a tensor"


def by_the_gaps(situation: str) -> bool:
    """take a view with gaps for one whose numbers are not there"""
    return situation != "the same, under no_grad"


attempt(is_dispatched_solution, test_dispatched, wrong=[by_the_flag, by_the_gaps])


# %% [markdown]
# Two kinds of derivative are not offered to registered operations by PyTorch: forward mode, and `torch.func`'s `grad` and its kin. For them the steps of `split_form` are taken, whose formulas PyTorch knows.

# %%
#| export fast/forms.py
def needs_steps() -> bool:
    """Whether a derivative is taken that PyTorch does not offer to registered operations.

    Forward mode, and `torch.func`'s transforms but `vmap`: they need the formulas of the steps.
    """
    if torch.compiler.is_compiling():
        return False
    layers = torch._C._functorch.get_interpreter_stack() or []
    vmap = torch._C._functorch.TransformType.Vmap
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or any(layer.key() != vmap for layer in layers)


# %% [markdown]
# Programs that read exported models do not know the operation. Who exports for them learns it from us, and not from their messages:

# %% tags=["plumbing"]
# fold: What exporters are told
#| export fast/operation.py
import warnings


def meet_exporters() -> None:
    """Raise for ONNX, and warn for a trace, with which OpenVINO for one begins.

    Raises:
        RuntimeError: saying what to export.
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ONNX does not know mixconv's operations: "
            'export fuse_for_inference(model, backend="merged")'
        )
    if torch._C._get_tracing_state() is not None:
        warnings.warn(
            "this trace calls mixconv's operations, which other programs, such as OpenVINO, do "
            'not know: for them, fuse with backend="merged"', stacklevel=4,
        )  # fmt: skip


# %% [markdown]
# So there are three ways, the three arrows that leave the first box of the picture. What fused modules call is this:

# %%
#| export fast/operation.py
from typing import Any, cast


def as_arguments(spec: MixSpec) -> list[Any]:
    """The spec's entries as PyTorch's dispatcher takes them, with lists for tuples."""
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def run_operation(x: Tensor, weight: Tensor, bias: Tensor | None, spec: MixSpec) -> Tensor:
    """The operation by the shortest way that everybody who watches allows."""
    if not must_dispatch(x, weight, bias):
        return FORMS.choose(describe_call(x, weight, bias, spec))(x, weight, bias)
    if needs_steps():
        check_call(describe_call(x, weight, bias, spec))
        return split_form(x, weight, bias, spec)
    operation = torch.ops.mixconv.mixed_depthwise2d
    return cast("Tensor", operation(x, weight, bias, *as_arguments(spec)))


# %% [markdown]
# And what a person calls:

# %%
#| export fast/operation.py
from collections.abc import Sequence


def mixed_depthwise2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, channels: Sequence[int],
    kernel_sizes: Sequence[int], stride: int = 1, dilations: Sequence[int] | None = None,
    padding: str = "symmetric", activation: str = "none",
) -> Tensor:  # fmt: skip
    """Mixed depthwise convolution, bias and activation in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weight: packed by `pack_weights`. Pack once for inference; in every forward for training.
        bias: one number for each channel.
        channels: of each group; they add up to C.
        kernel_sizes: odd, one a group.
        stride: of rows and columns.
        dilations: one a group; 1 if left out.
        padding: "symmetric" or "same".
        activation: "none", "relu", "silu" or "relu6".

    Shape:
        Input `(N, C, H, W)`, output `(N, C, ceil(H / stride), ceil(W / stride))`, channels_last.

    Raises:
        ValueError: for sizes, dtypes or names that do not fit together.

    Source: ours; the paper (section 3.1) says that MixConv "could be implemented as a single op".
    Chapter 12.
    """
    steps = (1,) * len(kernel_sizes) if dilations is None else tuple(dilations)
    spec = MixSpec(tuple(channels), tuple(kernel_sizes), stride, steps, padding, activation)
    return run_operation(x, weight, bias, spec)


# %% [markdown]
# ## Registered with PyTorch
#
# A registered operation has a name, a *schema* (its signature, in PyTorch's words) and an implementation. PyTorch then treats it as one of its own: the profiler names it, an exporter writes it as one node. The schema is written out, so that all versions of PyTorch read it alike.

# %%
#| export fast/rules.py
"""How PyTorch knows the operation: its shapes, gradient, `vmap` and autocast (chapter 12)."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixconv.fast.forms import check_memory, is_plain
from mixconv.fast.operation import FORMS, as_arguments, check_call, describe_call, meet_exporters
from mixconv.fast.spec import MixSpec, Pad, output_size, pack_weights, pads, unpack_weights


@torch.library.custom_op(
    "mixconv::mixed_depthwise2d", mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] channels, int[] kernel_sizes, "
    "int stride, int[] dilations, str padding, str activation) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    call = describe_call(x, weight, bias, _as_spec(entries))
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if x.is_cpu and not all(map(is_plain, given)):
        check_call(call)
        check_memory(*given)
        return FORMS.fallback(call)(x, weight, bias)  # its steps know what to do with them
    return FORMS.choose(call)(x, weight, bias)


def _as_spec(entries: Sequence[Any]) -> MixSpec:
    """The spec from the operation's arguments, where lists stand for tuples."""
    parts: list[Any] = [tuple(e) if isinstance(e, list | tuple) else e for e in entries]
    return MixSpec(*parts)


# %%
from mixconv.teaching import check

torch.manual_seed(0)
spec = MixSpec((4, 3), (3, 5), 2, (1, 1), "same", "silu")
tensors = torch.randn(2, 7, 6, 5), torch.randn(4 * 9 + 3 * 25), torch.randn(7)
operation = torch.ops.mixconv.mixed_depthwise2d
y = operation(*tensors, *as_arguments(spec))
check(y, split_form(*tensors, spec), "dispatched")

# %% [markdown]
# **Shapes.** A tracer has no numbers. It asks what the output would look like. The sizes also say how much work it is, for PyTorch's counter of floating point operations; without an entry it would count nothing, and say nothing. (A multiply-add counts as two.)

# %%
#| export fast/rules.py
from torch.utils.flop_counter import flop_registry, shape_wrapper


@_operation.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
    meet_exporters()
    spec = _as_spec(entries)
    check_call(describe_call(x, weight, bias, spec))
    rows, columns = (output_size(size, spec.stride) for size in x.shape[2:])
    size = (*x.shape[:2], rows, columns)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _count_flops(x: list[int], weight: list[int], bias: Any, *entries: Any, **_: Any) -> int:
    spec = _as_spec(entries)
    outputs = x[0] * output_size(x[2], spec.stride) * output_size(x[3], spec.stride)
    return 2 * outputs * weight[0]  # a weight meets every output pixel of its channel once


flop_registry[torch.ops.mixconv.mixed_depthwise2d] = shape_wrapper(_count_flops)

# %%
ghosts = [tensor.to("meta") for tensor in tensors]
y = operation(*ghosts, *as_arguments(spec))
y.device, tuple(y.shape), y.is_contiguous(memory_format=torch.channels_last)


# %% [markdown]
# **Gradient, by hand first.** Let a 1×1 kernel of weight 10 meet the input 3 with bias −12. The sum is 18. With ReLU the output is 18, and a change of the sum passes. So the gradient is 10 for the input, 3 for the weight, 1 for the bias. With bias −40 the sum is −10, ReLU cuts it off, and all three gradients are 0.
#
# The sums themselves are not kept from the forward. They are computed again, by the operation without its activation. That costs one more forward, and saves a tensor of memory. The derivatives of ReLU and ReLU6 are PyTorch's own, so that NaN behaves alike. SiLU's is written out: PyTorch's operation for it, `silu_backward`, cannot be differentiated again.

# %%
#| export fast/rules.py
def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.spec = _as_spec(inputs[3:])


def _before_activation(grad: Tensor, inputs: Sequence[Tensor | None], spec: MixSpec) -> Tensor:
    """The gradient of the sums, from that of the activated result."""
    if spec.activation == "none":
        return grad
    plain = as_arguments(spec._replace(activation="none"))
    sums: Tensor = torch.ops.mixconv.mixed_depthwise2d(*inputs, *plain)
    if spec.activation == "relu":
        return cast("Tensor", torch.ops.aten.threshold_backward(grad, sums, 0))
    if spec.activation == "relu6":
        return cast("Tensor", torch.ops.aten.hardtanh_backward(grad, sums, 0, 6))
    gate = torch.sigmoid(sums)  # SiLU, written out: PyTorch's own has no second derivative
    return grad * gate * (1 + sums * (1 - gate))


# %% [markdown]
# Then each group as a convolution of its own. PyTorch has that gradient as one operation, too. The zeros around the image are cut off from the gradient of the input. What nobody asked for is not computed.

# %%
#| export fast/rules.py
def _group_gradients(
    x: Tensor, grad: Tensor, kernel: Tensor, pad: Pad, stride: int, dilation: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of one group's input and kernel, as far as they are wanted."""
    padded = F.pad(x, (pad.left, pad.right, pad.top, pad.bottom))
    x_grad, kernel_grad, _ = torch.ops.aten.convolution_backward(
        grad, padded, kernel, None, [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0],
        kernel.shape[0], [*wanted, False],
    )  # fmt: skip
    if wanted[0]:
        x_grad = x_grad.narrow(2, pad.top, x.shape[2]).narrow(3, pad.left, x.shape[3])
    return x_grad, kernel_grad


# %%
#| export fast/rules.py
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, spec, wanted = ctx.saved_tensors, ctx.spec, ctx.needs_input_grad
    grad = _before_activation(grad, inputs, spec)
    x, weight = inputs[0].split(spec.channels, 1), unpack_weights(inputs[1], spec)
    around = pads(spec, *inputs[0].shape[2:])
    groups = zip(x, grad.split(spec.channels, 1), weight, around, spec.dilations, strict=True)
    pairs = [_group_gradients(*group[:4], spec.stride, group[4], wanted[:2]) for group in groups]
    x_grads, weight_grads = zip(*pairs, strict=True)
    return (
        torch.cat(x_grads, 1) if wanted[0] else None,
        pack_weights(weight_grads) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
        *[None] * len(spec),
    )


_operation.register_autograd(_backward, setup_context=_remember)

# %%
for bias in (-12.0, -40.0):
    leaves = [torch.tensor([v], requires_grad=True) for v in (3.0, 10.0, bias)]
    x, w, b = leaves
    y = mixed_depthwise2d(
        x.view(1, 1, 1, 1), w, b, channels=(1,), kernel_sizes=(1,), activation="relu"
    )
    print(f"output {y.item():.0f}, gradients", [g.item() for g in torch.autograd.grad(y, leaves)])

# %% [markdown]
# As by hand. With every activation, on random numbers, in double and single precision. (In single precision, whatever form this machine has runs the forward. The gradient is this chapter's in any case.)

# %%
from mixconv.fast.spec import ACTIVATIONS


def with_all_activations(form):
    cases = [spec._replace(activation=name, dilations=(2, 1)) for name in ACTIVATIONS]
    return lambda *tensors: torch.cat([form(*tensors, case) for case in cases])


for dtype in (torch.float64, torch.float32):
    check_rewrite(
        with_all_activations(split_form),
        with_all_activations(run_operation),
        *(tensor.to(dtype) for tensor in tensors),
        what=f"split form and operation, {dtype}",
    )


# %% [markdown]
# **`vmap`.** A function of one example, mapped over many. For this operation that is again one operation: put the copies side by side *as groups*. Three copies of an operation with groups (4, 3) are one operation with groups (4, 3, 4, 3, 4, 3), and its packed weights are the three packed tensors one after another. That holds whether the images differ, the weights, or both.

# %% [markdown]
# **12.3** ★★ *10 minutes, two lines.* `torch.vmap` maps an operation over n sets of weights. Describe the one operation that computes it. (The rule that uses it comes next.)
#
# <details><summary>Hint: the idea</summary>
#
# The packed weights of the copies lie one after another. So the copies' groups must come in that order, too.
#
# </details>
#
# <details><summary>Hint: the first line</summary>
#
# A tuple times n is the tuple n times in a row: `(4, 3) * 2 == (4, 3, 4, 3)`.
#
# </details>

# %%
def mapped_spec(spec: MixSpec, n: int) -> MixSpec:
    raise NotImplementedError


def test_mapped(answer) -> None:
    two = MixSpec((4, 3), (3, 5), 2, (1, 2), "same", "silu")
    four = MixSpec((4, 3, 4, 3), (3, 5, 3, 5), 2, (1, 2, 1, 2), "same", "silu")
    expect(answer, two, 2, gives=four, why="the whole row of groups, twice")
    weights, x = torch.randn(3, check_spec(two)[1]), torch.randn(1, 7, 5, 5)
    one = split_form(x.repeat(1, 3, 1, 1), weights.flatten(), None, answer(two, 3))
    torch.testing.assert_close(one, torch.cat([split_form(x, w, None, two) for w in weights], 1))


attempt(mapped_spec, test_mapped)


# %% tags=["solution"]
# fold: Solution
def mapped_spec_solution(spec: MixSpec, n: int) -> MixSpec:
    groups = {name: getattr(spec, name) * n for name in ("channels", "kernel_sizes", "dilations")}
    return spec._replace(**groups)


def each_group(spec: MixSpec, n: int) -> MixSpec:
    """repeat each group, instead of the whole row of groups"""
    three = spec.channels, spec.kernel_sizes, spec.dilations
    channels, sizes, dilations = (tuple(v for v in line for _ in range(n)) for line in three)
    return spec._replace(channels=channels, kernel_sizes=sizes, dilations=dilations)


def wider(spec: MixSpec, n: int) -> MixSpec:
    """make each group n times as wide: its packed weights would lie mixed"""
    return spec._replace(channels=tuple(n * c for c in spec.channels))


attempt(mapped_spec_solution, test_mapped, wrong=[each_group, wider])


# %% [markdown]
# And the rule, which repeats the groups as the exercise does. What is not mapped is the same for all copies:

# %% tags=["plumbing"]
# fold: The rule for vmap
#| export fast/rules.py
def _vmap(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None,
    *entries: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """Many operations at once are one with more groups: copies lie side by side as channels."""
    spec, n = _as_spec(entries), info.batch_size
    tensors: list[Tensor | None] = []
    for tensor, axis, at in ((x, in_dims[0], 1), (weight, in_dims[1], 0), (bias, in_dims[2], 0)):
        if tensor is not None:
            whole = tensor.expand(n, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            tensors.append(whole.movedim(0, at).flatten(at, at + 1))
        else:
            tensors.append(None)
    groups = {name: getattr(spec, name) * n for name in ("channels", "kernel_sizes", "dilations")}
    y = torch.ops.mixconv.mixed_depthwise2d(*tensors, *as_arguments(spec._replace(**groups)))
    return y.unflatten(1, (n, -1)), 1


_operation.register_vmap(_vmap)

# %%
x, weight, bias = tensors
images, weights = torch.randn(3, *x.shape), torch.randn(3, *weight.shape)
mapped = torch.vmap(lambda x, w: run_operation(x, w, bias, spec))(images, weights)
wanted = [split_form(x, w, bias, spec) for x, w in zip(images, weights, strict=True)]
check(mapped, torch.stack(wanted), "vmap over images and weights")


# %% [markdown]
# **Autocast.** Under `torch.autocast` the layer before hands over bfloat16, and the weights are float32. Without a rule, that is an error: the tensors differ. The rule: on a CPU all becomes float32, since that is what the kernel computes; on a GPU, the type that autocast was asked for. Double precision stays, as everywhere in PyTorch.

# %%
#| export fast/rules.py
def _under_autocast(device: str) -> Callable[..., Tensor]:
    """The operation where autocast rules: float32 on a CPU, else autocast's own type."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *entries: Any) -> Tensor:
        dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
        tensors = [
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.double
            else t for t in (x, weight, bias)
        ]  # fmt: skip
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y: Tensor = torch.ops.mixconv.mixed_depthwise2d(*tensors, *entries)
            return y

    return run


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _operation._lib.impl("mixed_depthwise2d", _under_autocast(_device), _key)

# %%
with torch.autocast("cpu", dtype=torch.bfloat16):
    y = run_operation(x.bfloat16(), weight, bias, spec)
check(y, split_form(x.bfloat16().float(), weight, bias, spec), f"autocast, {y.dtype}")

# %% [markdown]
# PyTorch has a checker of its own for registered operations: schema, shapes, gradient, and tracing with unknown sizes.

# %%
inputs = [tensor.clone().requires_grad_() for tensor in tensors]
torch.library.opcheck(operation.default, (*inputs, *as_arguments(spec)))

# %% [markdown]
# ## A layer that is the operation
#
# `describe_mix` reads the convolutions of a mixed layer and says what operation they are, or `None`: a kernel that is not square, padding that the operation does not know, a class that may compute something else. Then they stay as they are.

# %% tags=["plumbing"]
# fold: A layer, read as an operation
#| export fast/fused_layer.py
"""A mixed layer, its bias and the activation behind it as one operation (chapter 12)."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mixconv.fast.folding import refuse_training
from mixconv.fast.operation import as_arguments, meet_exporters, run_operation
from mixconv.fast.spec import MixSpec, pack_weights
from mixconv.formulation import LayerCost
from mixconv.surgery import find_padding


def describe_mix(convs: Sequence[nn.Conv2d], activation: str = "none") -> MixSpec | None:
    """Depthwise convolutions side by side as one operation; None where it cannot express them."""
    try:
        paddings = {find_padding(conv) for conv in convs}
    except ValueError:
        return None
    squares = [(*conv.kernel_size, *conv.dilation) for conv in convs]
    strides = {stride for conv in convs for stride in conv.stride}
    depthwise = all(c.groups == c.in_channels == c.out_channels for c in convs)
    crooked = any(k != h or d != e for k, h, d, e in squares)
    mixed_up = len(paddings) != 1 or len(strides) != 1
    if not depthwise or crooked or mixed_up or len({c.bias is None for c in convs}) != 1:
        return None
    channels = tuple(conv.out_channels for conv in convs)
    sizes, dilations = tuple(k for k, *_ in squares), tuple(square[2] for square in squares)
    return MixSpec(channels, sizes, strides.pop(), dilations, paddings.pop(), activation)


# %% [markdown]
# One case is worth a look. At stride 2 with 'SAME' padding, a 1×1 kernel looks at pixels 0, 2, 4 of six and a 3×3 kernel is centred on 1, 3, 5 (chapter 3's figure). Where would the 1×1 weight stand in the one large kernel? That depends on the image: for six pixels at the upper left tap of the 3×3 kernel, for seven at its centre. So no one kernel does, and merging declines. The operation pads each group by itself, so it can:

# %%
from mixconv.layer import MixConv2d, merge_depthwise

layer = MixConv2d(20, (1, 3, 5, 7), stride=2, padding="same").eval()
try:
    merge_depthwise(list(layer.convs))
except ValueError as error:
    print("merged:", error)
others = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (3, 5), 1, (1, 2), groups=4), nn.Conv2d(4, 8, 3, 1, 1)
assert [describe_mix([conv]) for conv in others] == [None] * 3  # padding, shape, not depthwise
describe_mix(list(layer.convs))

# %% [markdown]
# This layer, and chapter 15's block, stand in a model where something else was. What they share is how they behave there: one image or many, no training, and where the numbers of the output lie.

# %% tags=["plumbing"]
# fold: What fused modules share
#| export fast/fused_layer.py
from mixconv._checks import refuse_script


class FusedModule(nn.Module):
    """What stands in a fused model: one operation, for inference only.

    Attributes:
        spec: what to compute.
        preserves_format: whether the output lies in memory as the input does. If not, it is in
            channels_last, as the kernels write it.
    """

    spec: Any
    preserves_format = False
    __prepare_scriptable__ = refuse_script

    def compute(self, x: Tensor) -> Tensor:
        """The operation itself, on a batch; a graph of torch.fx gets it as one call."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The operation, on one image or many."""
        meet_exporters()
        if isinstance(x, torch.fx.Proxy):
            y = self.compute(x)
            kept = self.preserves_format
            return x.tracer.create_proxy("call_function", lie_as, (y, x), {}) if kept else y
        if x.dim() == 3:
            return cast("Tensor", self(x[None]))[0]
        return lie_as(self.compute(x), x) if self.preserves_format else self.compute(x)

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode.

        Raises:
            RuntimeError: if `mode` is true.
        """
        refuse_training(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ",\n".join(f"{name}={value}" for name, value in self.spec._asdict().items())


def lie_as(y: Tensor, x: Tensor) -> Tensor:
    """`y` in channels_last if the channels of `x` lie side by side, else contiguous."""
    last = x.stride(1) == 1
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# %% [markdown]
# The layer keeps the packed weights, and nothing to train. (Its class goes on in the cell after, as [chapter 0](00_start_here.ipynb) explains for `class Table(Table)`.)

# %%
#| export fast/fused_layer.py
class FusedMixConv2d(FusedModule):
    """Depthwise convolutions, their bias and the activation behind them as one operation.

    Args:
        convs: the convolutions of the groups.
        spec: what `describe_mix` says of them.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the layer it replaces.

    Source: ours. Chapter 12.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convs: Sequence[nn.Conv2d], spec: MixSpec) -> None:
        super().__init__()
        self.spec = spec
        biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
        self.register_buffer("weight", pack_weights([conv.weight.detach() for conv in convs]))
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        super().train(False)

    def compute(self, x: Tensor) -> Tensor:
        """Convolve, add the bias, activate."""
        if isinstance(x, torch.fx.Proxy):
            operation = torch.ops.mixconv.mixed_depthwise2d
            return cast("Tensor", operation(x, self.weight, self.bias, *as_arguments(self.spec)))
        return run_operation(x, self.weight, self.bias, self.spec)


# %% tags=["plumbing"]
# fold: What it costs
#| export fast/fused_layer.py
class FusedMixConv2d(FusedMixConv2d):
    def layer_costs(self, name: str, x: Tensor, output: Tensor) -> list[LayerCost]:
        """What `count_costs` counts: one depthwise layer."""
        weights, bias = self.weight.numel(), 0 if self.bias is None else self.bias.numel()
        pixels = output.numel() // sum(self.spec.channels)
        shape = tuple(output.shape)
        return [LayerCost(name, "depthwise", shape, weights + bias, pixels * weights)]


# %%
fused = FusedMixConv2d(list(layer.convs), describe_mix(list(layer.convs)))
with torch.no_grad():
    x = torch.randn(2, 20, 6, 7)
    check(fused(x), layer(x), "layer and fused layer")
    layouts = [fused(x).stride()]
    fused.preserves_format = True
    layouts.append(fused(x).stride())
layouts  # channels side by side, and pixels

# %% [markdown]
# ## Takeaways
# - The operation has one meaning, `split_form`. Every form is compared with it.
# - A form declines with reasons; when all decline, the split form computes. Nothing is guessed.
# - The short way is for plain tensors that nobody watches. All else goes through PyTorch's dispatcher.
# - Gradient, `vmap`, autocast and shapes are rules of the operation. No kernel needs to know of them.
#
# **Further reading**: PyTorch's manual on [custom operators](https://docs.pytorch.org/tutorials/advanced/custom_ops_landing_page.html), and on [`torch.library`](https://docs.pytorch.org/docs/stable/library.html).
#
# Previous: [11 · Why it is slow](11_why_slow.ipynb) · Next: [13 · A kernel in steps](13_kernel_in_steps.ipynb)
