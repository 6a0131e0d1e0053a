# mypy: disable-error-code="call-arg, arg-type, assignment, override, redundant-cast, unused-ignore"
"""The operation: values, dispatch, gradients, tracers, and what must not reach a form."""

import ctypes
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mixconv import mixed_depthwise2d
from mixconv.fast.forms import Call, Form, Forms, Runner, must_dispatch
from mixconv.fast.operation import FORMS, as_arguments, check_call, describe_call, run_operation
from mixconv.fast.spec import (
    ACTIVATIONS,
    MixSpec,
    check_spec,
    pack_weights,
    pads,
    split_form,
    unpack_weights,
)
from tests.package.mixes import agrees, compute, make_case

OPERATION = torch.ops.mixconv.mixed_depthwise2d.default
SPEC = MixSpec((4, 3), (3, 5), 2, (1, 1), "same", "silu")


def tensors(dtype: torch.dtype = torch.float32) -> Any:
    x = torch.randn(2, 7, 6, 5, dtype=dtype)
    return [x, torch.randn(4 * 9 + 3 * 25, dtype=dtype), torch.randn(7, dtype=dtype)]


class FromMemory:
    """A form that reads its tensors as C++ would: from their addresses."""

    name = "from memory"

    def __init__(self) -> None:
        self.runs = 0

    def declines(self, call: Call) -> list[str]:
        return [] if call.dtype == torch.float32 else [f"dtype {call.dtype}"]

    def prepare(self, call: Call) -> Runner:
        def run(*given: Tensor | None) -> Tensor:
            self.runs += 1
            x, weight, bias = (None if t is None else read(t) for t in given)
            assert x is not None
            assert weight is not None
            y = split_form(x, weight, bias, call.spec)
            return y.contiguous(memory_format=torch.channels_last)

        return run


def read(tensor: Tensor) -> Tensor:
    assert tensor.data_ptr(), "C++ would read address 0"
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = sum((size - 1) * step for size, step in pairs) + 1
    numbers = (ctypes.c_float * span).from_address(tensor.data_ptr())
    flat = torch.frombuffer(numbers, dtype=torch.float32)
    return flat.as_strided(tensor.shape, tensor.stride()).clone()


@pytest.fixture
def from_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[FromMemory]:
    """The only form on a CPU is one that reads memory."""
    form = FromMemory()
    monkeypatch.setattr(FORMS, "forms", {"cpu": [form]})
    FORMS.forget()
    yield form
    FORMS.forget()


# Values


@pytest.mark.parametrize("part", range(4))
def test_random_shapes(part: int) -> None:
    rng = random.Random(part)
    for _ in range(40):
        agrees(make_case(rng))


def test_random_shapes_by_the_split_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMS, "forms", {})
    FORMS.forget()
    rng = random.Random(9)
    for _ in range(40):
        agrees(make_case(rng, torch.float64), 1e-9)
    FORMS.forget()


def test_input_in_any_layout() -> None:
    spec = MixSpec((10, 9), (3, 5), 1, (1, 1), "symmetric", "none")
    weights = [torch.randn(10, 1, 3, 3), torch.randn(9, 1, 5, 5)]
    base = torch.randn(2, 40, 24, 26)
    views = (base[:, 3:41:2][:, :19, 2:20, ::2], base.transpose(2, 3)[:, :19], base[:1, :19])
    for x in (*views, views[2].expand(4, -1, -1, -1)):
        agrees((x, weights, None, spec), 1e-4)


def test_every_channel_count() -> None:
    for count in range(1, 50):
        channels = (count,) if count < 3 else (count // 3, count - count // 3)
        kernels = (3, 5)[: len(channels)]
        spec = MixSpec(channels, kernels, 1 + count % 2, (1,) * len(channels), "same", "none")
        weights = [torch.randn(c, 1, k, k) for c, k in zip(channels, kernels, strict=True)]
        agrees((torch.randn(1, count, 9, 10), weights, torch.randn(count), spec), 1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = torch.randn(1, 20, 8, 8), torch.randn(20 * 9) / 3
    wanted = mixed_depthwise2d(x, weight, channels=(20,), kernel_sizes=(3,))
    y = mixed_depthwise2d(x.to(dtype), weight.to(dtype), channels=(20,), kernel_sizes=(3,))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), wanted, rtol=tolerance, atol=tolerance)


def test_the_result_is_nobody_elses_memory() -> None:
    x = torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last)
    for kernel, activation in ((1, "none"), (1, "relu"), (3, "none")):
        before, weight = x.clone(), torch.ones(4 * kernel**2)
        y = mixed_depthwise2d(
            x, weight, channels=(4,), kernel_sizes=(kernel,), activation=activation
        )
        y.fill_(7)
        assert torch.equal(x, before)
        assert weight.sum() == weight.numel()


def test_packing_by_hand() -> None:
    kernels = [torch.arange(18.0).view(2, 1, 3, 3), torch.full((1, 1, 1, 1), 99.0)]
    packed = pack_weights(kernels)
    assert packed.tolist() == [n for i in range(9) for n in (i, 9 + i)] + [99]
    spec = MixSpec((2, 1), (3, 1), 1, (1, 1), "same", "none")
    for part, kernel in zip(unpack_weights(packed, spec), kernels, strict=True):
        assert torch.equal(part, kernel)


def test_pads_by_hand() -> None:
    spec = MixSpec((1, 1, 1), (1, 3, 3), 2, (1, 1, 2), "same", "none")
    assert pads(spec, 6, 7) == [(0, 0, 0, 0, 1), (0, 1, 1, 1, 3), (1, 2, 2, 2, 5)]
    assert pads(spec._replace(padding="symmetric"), 6, 7)[2] == (2, 2, 2, 2, 5)


BAD: list[dict[str, Any]] = [
    {"channels": (5,)}, {"kernel_sizes": (5,)}, {"kernel_sizes": (2,)}, {"channels": (2, 2)},
    {"stride": 0}, {"padding": "valid"}, {"activation": "gelu"}, {"dilations": (0,)},
    {"channels": (0, 4), "kernel_sizes": (3, 3)}, {"x": torch.randn(4, 5, 5)},
    {"weight": torch.randn(36).double()}, {"bias": torch.ones(3)}, {"weight": torch.ones(1, 36)},
    {"bias": torch.ones(4).half()}, {"weight": torch.randn(36, device="meta")},
    {"channels": (), "kernel_sizes": ()},
]  # fmt: skip


@pytest.mark.parametrize("wanted", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("change", BAD, ids=lambda change: "-".join(change))
def test_bad_input_is_refused(change: dict[str, Any], wanted: bool) -> None:
    good: dict[str, Any] = {
        "x": torch.randn(1, 4, 5, 5), "weight": torch.randn(36), "channels": (4,),
        "kernel_sizes": (3,),
    }  # fmt: skip
    mixed_depthwise2d(**good)
    given = {**good, **change}
    given["x"] = given["x"].clone().requires_grad_(wanted)
    with pytest.raises(ValueError, match=r"must|need"):
        mixed_depthwise2d(**given)


# Forms


class Toy:
    """A form that counts, and declines what it is told to."""

    def __init__(self, name: str, *reasons: str) -> None:
        self.name, self.reasons, self.prepared = name, list(reasons), 0

    def declines(self, call: Call) -> list[str]:
        return self.reasons

    def prepare(self, call: Call) -> Runner:
        self.prepared += 1
        assert not self.reasons, "a form that declined was asked to prepare"
        return lambda *given: torch.zeros(()) + int(self.name)


CALL = Call(SPEC, (2, 7, 6, 5), torch.float32, "cpu", False, 1, ((111,),))


def fallback(call: Call) -> Runner:
    return lambda *given: torch.full((), -1)


def answer(forms: Forms, call: Call = CALL) -> float:
    return forms.choose(call)().item()


def test_the_first_form_that_does_not_decline_computes() -> None:
    forms = Forms("test", fallback)
    assert answer(forms) == -1
    declining, first, second = Toy("1", "it is Tuesday", "too wide"), Toy("2"), Toy("3")
    for form in (declining, first, second):
        forms.add("cpu", form)
    assert forms.reasons(CALL) == {"1": ["it is Tuesday", "too wide"], "2": [], "3": []}
    assert [answer(forms) for _ in range(3)] == [2, 2, 2]
    assert (declining.prepared, first.prepared, second.prepared) == (0, 1, 0)  # and planned once
    assert answer(forms, CALL._replace(device="cuda")) == -1
    assert answer(forms, CALL._replace(threads=2)) == 2
    assert first.prepared == 2


def test_a_new_form_and_a_forgotten_choice() -> None:
    forms, old, new = Forms("test", fallback), Toy("2"), Toy("2")
    forms.add("cpu", old)
    assert answer(forms) == 2
    forms.add("cpu", new)  # of the same name: in the old one's place
    assert answer(forms) == 2
    assert (old.prepared, new.prepared) == (1, 1)
    assert len(forms.reasons(CALL)) == 1
    new.reasons.append("no longer")
    assert answer(forms) == 2
    forms.forget()
    assert answer(forms) == -1


def test_sizes_are_checked_before_a_form_sees_them() -> None:
    form = Toy("1")
    forms = Forms("test", fallback, check_call)
    forms.add("cpu", form)
    assert answer(forms) == 1
    for change in ({"sizes": (2, 8, 6, 5)}, {"parameters": ((110,),)}, {"sizes": (7, 6, 5)}):
        with pytest.raises(ValueError, match="must"):
            forms.choose(CALL._replace(**change))
    assert form.prepared == 1


def test_a_call_holds_all_that_forms_decide_by() -> None:
    x, weight, bias = tensors()
    call = describe_call(x, weight, bias, SPEC)
    assert call == CALL._replace(has_bias=True, parameters=((111,), (7,)))
    assert hash(call) == hash(CALL._replace(has_bias=True, parameters=((111,), (7,))))
    assert check_spec(SPEC) == (7, 111)


# Who must see a call


class Wrapper(torch.Tensor):
    """A tensor that holds another and has no memory itself."""

    inner: Tensor
    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return cast("Wrapper", wrapper)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        plain = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        result = func(*plain, **(kwargs or {}))
        return Wrapper(result) if func is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "weight", "bias"])
def test_a_tensor_without_memory_of_its_own_is_unwrapped(
    place: int, from_memory: FromMemory
) -> None:
    given = tensors()
    wanted = split_form(*given, SPEC)
    given[place] = Wrapper(given[place])
    assert given[place].data_ptr() == 0
    Wrapper.seen.clear()
    torch.testing.assert_close(run_operation(*given, SPEC), wanted)
    assert "mixconv.mixed_depthwise2d.default" in Wrapper.seen
    assert from_memory.runs == 1


def test_a_parameter_that_is_a_wrapper_is_unwrapped(from_memory: FromMemory) -> None:
    x, weight, bias = tensors()
    wanted = split_form(x, weight, bias, SPEC)
    parameter = nn.Parameter(Wrapper(weight), requires_grad=False)
    torch.testing.assert_close(run_operation(x, parameter, bias, SPEC), wanted)
    assert from_memory.runs == 1


def test_a_known_zero_has_no_memory(from_memory: FromMemory) -> None:
    x, weight, bias = tensors()
    zero = torch._efficientzerotensor(weight.shape)  # type: ignore[attr-defined]
    for y in (run_operation(x, zero, bias, SPEC), OPERATION(x, zero, bias, *as_arguments(SPEC))):
        torch.testing.assert_close(y, split_form(x, torch.zeros_like(weight), bias, SPEC))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "weight", "bias"])
def test_memory_that_was_given_back_is_not_read(place: int, from_memory: FromMemory) -> None:
    """As FSDP leaves its weights between two forwards: sizes, and address 0."""
    given = tensors()
    given[place].untyped_storage().resize_(0)
    assert given[place].data_ptr() == 0
    words = rf"a tensor {re.escape(str(tuple(given[place].shape)))} has no memory: its storage"
    for call in (
        lambda: run_operation(*given, SPEC),
        lambda: OPERATION(*given, *as_arguments(SPEC)),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    assert from_memory.runs == 0


def negate(tensor: Tensor, contiguous: bool) -> Tensor:
    """The same numbers, kept as their negatives and a mark."""
    if contiguous:
        view: Tensor = torch._neg_view(-tensor)  # type: ignore[attr-defined]
        assert view.is_contiguous()
    else:
        view = torch.complex(tensor, -tensor).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "weight", "bias"])
def test_a_negated_view_is_negated(place: int, contiguous: bool, from_memory: FromMemory) -> None:
    given = tensors()
    wanted = split_form(*given, SPEC)
    given[place] = negate(given[place], contiguous)
    torch.testing.assert_close(run_operation(*given, SPEC), wanted)
    torch.testing.assert_close(OPERATION(*given, *as_arguments(SPEC)), wanted)
    assert from_memory.runs == 2


class Subclass(torch.Tensor):
    """Has memory, and a class of its own."""


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_only_plain_calls_that_nobody_watches_go_straight_on() -> None:
    x, wanting = torch.ones(3), torch.ones(3, requires_grad=True)
    assert not must_dispatch(x, None, nn.Parameter(x, requires_grad=False), torch.ones(0))
    with torch.inference_mode():
        assert not must_dispatch(x, torch.ones(3))
    assert must_dispatch(x, wanting)
    with torch.no_grad():
        assert not must_dispatch(x, wanting)
    assert must_dispatch(x, x.as_subclass(Subclass))
    assert must_dispatch(x.to("meta"))


@pytest.mark.parametrize(
    "watcher",
    [
        SeesFunctions, SeesOperations, torch.autograd.forward_ad.dual_level,
        torch.profiler.profile, lambda: torch.autocast("cpu"),
    ],
    ids=["function mode", "dispatch mode", "forward mode", "profiler", "autocast"],
)  # fmt: skip
def test_watchers_see_a_call(watcher: Callable[[], Any]) -> None:
    x = torch.ones(3)
    with watcher():
        assert must_dispatch(x)
    assert not must_dispatch(x)


def test_the_profiler_and_modes_name_the_operation() -> None:
    given = tensors()
    with torch.profiler.profile() as profile:
        run_operation(*given, SPEC)
    assert "mixconv::mixed_depthwise2d" in [event.key for event in profile.key_averages()]
    with SeesOperations() as mode:
        run_operation(*given, SPEC)
    assert mode.seen[0] == "mixconv.mixed_depthwise2d.default"


def test_multiply_adds_are_counted() -> None:
    given, counts = tensors(), []
    for function in (split_form, run_operation):
        with FlopCounterMode(display=False) as counter:
            function(*given, SPEC)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 3 * 3 * (4 * 9 + 3 * 25)] * 2


# Autocast


@pytest.mark.parametrize("outer", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(outer: torch.dtype) -> None:
    given = tensors()
    for place in (0, 1, 2):
        mixed = [t.to(outer) if i == place else t for i, t in enumerate(given)]
        with torch.autocast("cpu", dtype=outer):
            y = run_operation(*mixed, SPEC)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, split_form(*(t.float() for t in mixed), SPEC))
        with pytest.raises(ValueError, match="must have the dtype"):
            run_operation(*mixed, SPEC)


def test_autocast_leaves_double_precision() -> None:
    given = tensors(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_operation(*given, SPEC)
    torch.testing.assert_close(y, split_form(*given, SPEC))


def test_autocast_passes_gradients_in_the_types_of_the_inputs() -> None:
    x, weight, bias = tensors()
    leaves = [x.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_operation(*leaves, SPEC)
    found = torch.autograd.grad(y.sum(), leaves)
    copies = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(split_form(*copies, SPEC).sum(), copies)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(found[0], wanted[0].bfloat16(), rtol=0.02, atol=0.02)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("stride", "padding", "size"), [(1, "symmetric", 5), (2, "same", 6)])
def test_gradients(activation: str, stride: int, padding: str, size: int) -> None:
    spec = MixSpec((3, 2, 2), (3, 5, 1), stride, (2, 1, 1), padding, activation)
    shapes = [(2, 7, size, size + 1), (7,), (3, 1, 3, 3), (2, 1, 5, 5), (2, 1, 1, 1)]
    inputs = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes]

    def operation(x: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        return compute(x, list(weights), bias, spec)

    assert torch.autograd.gradcheck(operation, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_float32(activation: str) -> None:
    """The forward may be a kernel's: its gradients are those of the split form."""
    spec = MixSpec((20, 17), (3, 7), 2, (1, 1), "same", activation)
    start = [torch.randn(2, 37, 14, 14), torch.randn(20 * 9 + 17 * 49) / 5, torch.randn(37)]
    results = []
    for form in (split_form, run_operation):
        x, w, b = leaves = [tensor.clone().requires_grad_() for tensor in start]
        y = form(x, w, b, spec)
        ramp = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, ramp)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    results = []
    torch.manual_seed(1)
    start = tensors(torch.float64)
    for form in (split_form, run_operation):
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(start)]
        y = form(*given, SPEC)
        ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        results.append(torch.autograd.grad(y, [given[i] for i in wanted], ramp))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_at_the_edges(activation: str) -> None:
    """NaN, infinities and the corners of ReLU6 give what PyTorch's activations give."""
    values = [torch.nan, torch.inf, -torch.inf, 0.0, 6.0, -1.0, 1e30]
    start = torch.tensor(values).view(7, 1, 1, 1)
    spec, weight = MixSpec((1,), (1,), 1, (1,), "same", activation), torch.ones(1)
    grads: list[Tensor] = []
    for form in (split_form, run_operation):
        x = start.clone().requires_grad_()
        ramp = torch.tensor([1, 2, 3, 4, 5, torch.inf, 7.0]).view(7, 1, 1, 1)
        grads += torch.autograd.grad(form(x, weight, None, spec), x, ramp)
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True)


# Tracers


def dense(order: tuple[int, ...]) -> Tensor:
    """A tensor whose axes lie in memory in another order, without gaps."""
    back = [order.index(axis) for axis in range(4)]
    return torch.randn(2, 7, 6, 5).permute(order).contiguous().permute(back)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_opcheck_on_dense_layouts(order: tuple[int, ...]) -> None:
    _, weight, bias = tensors()
    inputs = [t.requires_grad_() for t in (dense(order), weight, bias)]
    torch.library.opcheck(OPERATION, (*inputs, *as_arguments(SPEC)))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 1, 5, 4), MixSpec((1,), (3,), 1, (1,), "symmetric", "none")),
        ((2, 3, 1, 1), MixSpec((3,), (3,), 1, (1,), "same", "relu")),
        ((0, 3, 5, 4), MixSpec((1, 2), (3, 1), 2, (2, 1), "same", "relu6")),
    ],
)
def test_opcheck_on_thin_images(shape: tuple[int, ...], spec: MixSpec) -> None:
    inputs = (torch.randn(shape), torch.randn(check_spec(spec)[1]), None)
    torch.library.opcheck(OPERATION, (*inputs, *as_arguments(spec)))


IN_DIMS: list[tuple[int | None, int | None, int | None]] = [
    (0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (4, 1, 1), (2, None, 0),
]  # fmt: skip


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    given = [
        t if axis is None else torch.stack([t, t - 1, 2 * t], axis)
        for t, axis in zip(tensors(), in_dims, strict=True)
    ]
    one_by_one = [
        [t if axis is None else t.select(axis, i) for t, axis in zip(given, in_dims, strict=True)]
        for i in range(3)
    ]
    wanted = torch.stack([split_form(*each, SPEC) for each in one_by_one])
    mapped = torch.vmap(lambda *t: run_operation(*t, SPEC), in_dims)(*given)
    torch.testing.assert_close(mapped, wanted, rtol=1e-4, atol=1e-5)
    with SeesOperations() as mode:
        torch.vmap(lambda *t: run_operation(*t, SPEC), in_dims)(*given)
    assert mode.seen.count("mixconv.mixed_depthwise2d.default") == 1  # not a loop


def test_vmap_without_bias_nested_and_with_a_gradient() -> None:
    x, weight, _ = tensors(torch.float64)
    xs, ws = torch.stack([x, 2 * x]).requires_grad_(), torch.stack([weight, -weight, weight + 1])

    def f(x: Tensor, w: Tensor) -> Tensor:
        return run_operation(x, w, None, SPEC)

    table = torch.vmap(lambda x: torch.vmap(lambda w: f(x, w))(ws))(xs)
    wanted = torch.stack([torch.stack([split_form(x, w, None, SPEC) for w in ws]) for x in xs])
    torch.testing.assert_close(table, wanted)
    ramp = torch.linspace(-1, 1, table.numel(), dtype=torch.float64).view(table.shape)
    found, expected = (torch.autograd.grad(y, xs, ramp)[0] for y in (table, wanted))
    torch.testing.assert_close(found, expected)


def test_function_transforms() -> None:
    given = tensors(torch.float64)
    for transform in (
        torch.func.grad,
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: torch.vmap(torch.func.grad(f)),
    ):
        results = []
        for form in (split_form, run_operation):
            bias = given[2].expand(3, -1) if "<lambda>" in transform.__qualname__ else given[2]
            f = transform(lambda b, form=form: form(*given[:2], b, SPEC).sin().sum())
            results.append(f(bias))
        torch.testing.assert_close(results[1], results[0])


def test_forward_mode() -> None:
    x, weight, bias = tensors(torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        results = [
            torch.autograd.forward_ad.unpack_dual(form(x, dual, bias, SPEC)).tangent
            for form in (split_form, run_operation)
        ]
    torch.testing.assert_close(results[1], results[0])


def test_traced_it_is_one_node() -> None:
    given = tensors()
    graph = make_fx(lambda *t: run_operation(*t, SPEC))(*given)
    assert "mixconv.mixed_depthwise2d" in graph.code
    traced = torch.jit.trace(lambda *t: run_operation(*t, SPEC), tuple(given), check_trace=False)
    assert "mixconv::mixed_depthwise2d" in str(traced.graph)
    for function in (graph, traced):
        torch.testing.assert_close(function(*given), split_form(*given, SPEC))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, bias = tensors()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return run_operation(x.sin(), self.weight, self.bias, SPEC).cos()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_gradient(backend: str) -> None:
    net, x = Net(), torch.randn(2, 7, 6, 5, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    results = []
    for function in (net, compiled):
        y = function(x)
        ramp = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad(y, [x, *net.parameters()], ramp)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    torch._dynamo.reset()


def test_exported_with_free_sizes() -> None:
    net = Net().eval()
    free = torch.export.Dim.AUTO
    program = torch.export.export(
        net, (torch.randn(2, 7, 16, 16),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    assert "mixed_depthwise2d" in str(program.graph)
    for shape in ((2, 7, 16, 16), (3, 7, 11, 22)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x))


def test_forms_are_those_of_the_protocol(from_memory: FromMemory) -> None:
    form: Form = from_memory
    assert form.declines(CALL) == []
    assert form.declines(CALL._replace(dtype=torch.float64)) == ["dtype torch.float64"]
