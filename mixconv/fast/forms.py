# Generated from notebooks/12_operation.ipynb by `make book`. Edit the notebook, not this file.

"""Who computes: the forms of an operation, each with its reasons to decline (chapter 12).

And who must see a call: `must_dispatch`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "Call",
    "Form",
    "Forms",
    "Runner",
    "check_memory",
    "is_plain",
    "must_dispatch",
    "needs_steps",
]


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
