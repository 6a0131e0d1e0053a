"""Whole blocks as one operation: values, the spec as text, PyTorch's rules, sizes, bad input."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixconv.fast import block_kernel, kernel, plan
from mixconv.fast.block_kernel import cut_block
from mixconv.fast.forms import Call
from mixconv.fast.fused_block import (
    BLOCK_FORMS,
    BlockSpec,
    FusedBlock,
    PointwiseSpec,
    block_form,
    check_block,
    describe_block_call,
    inverted_residual,
    pack_pointwise,
    unpack_pointwise,
)
from mixconv.fast.spec import MixSpec
from tests.package.cases import Block, find_block, needs_kernel

FULL = find_block(lambda b: b.squeeze and b.expand and len(b.x) > 1)


def reasons(call: Call) -> list[str]:
    return BLOCK_FORMS.reasons(call)["kernel"]


def call_of(block: Block) -> Call:
    return describe_block_call(block.x, *block.packed(), block.spec())


# Values


@needs_kernel
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("threads", [1, 2])
def test_random_blocks(part: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for seed in range(30 * part, 30 * part + 30):
        block = Block(seed)
        assert reasons(call_of(block)) == []
        block.check()


@needs_kernel
def test_blocks_on_more_threads_than_bands_images_and_strips() -> None:
    for seed in range(40):
        torch.set_num_threads(3 + seed % 14)
        Block(seed).check()


def test_random_blocks_whoever_computes() -> None:
    """With dilation the kernel declines."""
    for seed in range(40):
        Block(seed, rare=True).check()


def test_random_blocks_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (block_kernel, kernel):
        monkeypatch.setattr(module, "why_not", lambda *arguments: ["not today"])
    BLOCK_FORMS.forget()
    for seed in range(30):
        Block(1000 + seed).check()
    BLOCK_FORMS.forget()


@needs_kernel
def test_the_gate_sees_every_band_and_large_images_too() -> None:
    """More bands than one, and a wide tensor larger than what a thread keeps."""
    block = find_block(lambda b: b.squeeze and b.expand and b.mix.stride == 1 and len(b.x))
    block.x = torch.randn(3, block.x.shape[1], 230, 231)
    table, needed, _ = block_kernel.plan_block(call_of(block), 16)
    bands = table[len(block_kernel.BlockSizes._fields) + 16 + plan.Layer._fields.index("bands")]
    assert bands > 2
    assert needed > kernel.KEPT_NUMBERS // 4
    for threads in (1, 2):
        torch.set_num_threads(threads)
        block.check()


@needs_kernel
def test_a_gate_that_is_shut_is_zero_not_almost() -> None:
    """Denormal numbers would make everything after it many times slower."""
    block = find_block(lambda b: b.squeeze and b.x.numel() and not b.residual)
    assert block.excite is not None
    block.excite[1].fill_(-85.0)
    block.excite[0].zero_()
    weights, biases = block.packed()
    biases[4].zero_()
    y = inverted_residual(block.x, weights, biases, block.spec())
    assert y.abs().max() == 0


def test_a_nan_is_not_lost_in_the_gate() -> None:
    block = find_block(lambda b: b.squeeze and len(b.x) > 1 and min(b.x.shape[2:]) > 3)
    block.x[0, 0, 1, 1] = torch.nan
    y = block.compute()
    assert torch.equal(y.isnan(), block.reference().isnan())
    assert y[0].isnan().any()
    assert not y[1:].isnan().any()


def test_input_in_any_layout() -> None:
    block = find_block(lambda b: b.squeeze and len(b.x) > 1)
    wide = torch.randn(2, 2 * block.x.shape[1], 9, 20)
    for x in (wide[:, ::2, :, 3:17], wide[:1, 1::2].expand(3, -1, -1, -1)):
        block.x = x
        block.check()


def test_parameters_in_any_layout() -> None:
    """With gaps between their numbers: the kernel is given copies without."""
    wanted = FULL.compute()
    weights, biases = ([t.repeat_interleave(2)[::2] for t in line] for line in FULL.packed())
    assert not all(t.is_contiguous() for t in (*weights, *biases))
    torch.testing.assert_close(inverted_residual(FULL.x, weights, biases, FULL.spec()), wanted)


def test_many_python_threads() -> None:
    cases = [Block(seed) for seed in range(12)]
    wanted, failures = [case.compute() for case in cases], []

    def work(offset: int) -> None:
        for turn in range(24):
            index = (turn + offset) % len(cases)
            if not torch.equal(cases[index].compute(), wanted[index]):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# Specs, weights and plans


def test_packing_is_undone() -> None:
    for outputs, inputs, groups in ((5, 3, 1), (16, 4, 1), (34, 6, 2), (96, 15, 3)):
        weight = torch.randn(outputs, inputs // groups, 1, 1)
        packed = pack_pointwise(weight, groups)
        point = PointwiseSpec(inputs, outputs, groups, "none")
        assert torch.equal(unpack_pointwise(packed, point), weight)


def test_a_spec_is_read_as_it_was_written() -> None:
    for seed in range(50):
        spec = Block(seed, rare=True).spec()
        again = BlockSpec.parse(str(spec))
        assert again == spec
        assert type(again.mix) is MixSpec


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "None", "print('hello')", "__import__('os').getcwd()", "BlockSpec()",
        "PointwiseSpec(inputs=1, outputs=1, groups=1, activation='none')",
        "BlockSpec(mix=1, expand=None, squeeze=None, excite=None, project=open('/'), residual=0)",
        str(FULL.spec()) + " ", str(FULL.spec()).replace("expand=", "expanded="),
        str(FULL.spec()).replace("residual=", "**{}, residual="), "(" * 500,
    ],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a block"):
        BlockSpec.parse(text)


def test_strips_of_an_expansion_stay_inside_its_panels() -> None:
    for seed in range(60):
        spec = Block(seed).spec()
        if spec.expand is None:
            continue
        outputs = spec.expand.outputs // spec.expand.groups
        for lanes in (4, 8, 16):
            strips, costs, sources = cut_block(spec, 9, 9, lanes)
            written = [s.window + s.skip + i for s in strips for i in range(s.lanes)]
            assert written == list(range(spec.expand.outputs))
            assert len(costs) == len(sources) == len(strips)
            for s, source in zip(strips, sources, strict=True):
                first = s.window + s.skip
                assert first // outputs == (first + s.lanes - 1) // outputs
                assert s.skip + s.lanes <= lanes
                assert source.panel + lanes <= check_block(spec)[1][0]
                assert source.input == first // outputs * (spec.expand.inputs // spec.expand.groups)


@needs_kernel
def test_tables_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BlockSizes", "Source"):
        with monkeypatch.context() as patch:
            patch.setattr(block_kernel, name, plan.Strip)
            with pytest.raises(RuntimeError, match="disagree"):
                block_kernel.load_block_kernel()


@needs_kernel
def test_the_plan_says_how_much_memory_the_kernel_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers behind what was asked for stay as they are."""
    margin, given = 64, []

    def watched(count: int, parts: int) -> Tensor:
        given.append(torch.full((count + margin,), 7.0))
        return given[-1]

    monkeypatch.setattr(block_kernel, "scratch", watched)
    BLOCK_FORMS.forget()
    for seed in range(40):
        torch.set_num_threads(1 + seed % 4)
        Block(seed).check()
    assert len(given) == 40
    assert all(bool((memory[-margin:] == 7).all()) for memory in given)
    BLOCK_FORMS.forget()


@needs_kernel
def test_extreme_sizes_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings and wide tensors too large for the kernel's memory: it is not asked."""
    block = find_block(lambda b: b.expand and b.squeeze and len(b.x) == 2)
    call = call_of(block)
    for size in ((1, 30_000_000), (30_000, 30_000)):
        assert "MB of scratch" in reasons(call._replace(sizes=(1, *call.sizes[1:2], *size)))[0]
    planned: list[Call] = []
    prepare = block_kernel.BlockForm.prepare

    def note(self: Any, call: Call) -> Any:
        planned.append(call)
        return prepare(self, call)

    monkeypatch.setattr(block_kernel.BlockForm, "prepare", note)
    BLOCK_FORMS.forget()
    block.check()
    assert len(planned) == 1
    monkeypatch.setattr(kernel, "MOST_NUMBERS", 10)
    BLOCK_FORMS.forget()
    block.check()
    assert len(planned) == 1
    BLOCK_FORMS.forget()


@needs_kernel
def test_images_are_shared_out_only_where_their_memory_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = find_block(lambda b: b.expand and b.squeeze and len(b.x) == 5)
    block.x = torch.randn(5, block.x.shape[1], 30, 31)
    torch.set_num_threads(2)
    call = call_of(block)
    _, needed, workers = block_kernel.plan_block(call, 16)
    assert workers == 2
    monkeypatch.setattr(block_kernel, "MOST_NUMBERS", needed - 1)
    _, less, workers = block_kernel.plan_block(call, 16)
    assert workers == 1
    assert less < needed
    BLOCK_FORMS.forget()
    block.check()
    BLOCK_FORMS.forget()


def test_nothing_is_compiled_for_what_is_declined_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise AssertionError("asked for the library")

    monkeypatch.setattr(block_kernel, "load_block_kernel", load)
    call = call_of(find_block(lambda b: b.mix.stride == 1))
    dilated = call.spec.mix._replace(dilations=(2,) * len(call.spec.mix.channels))
    assert len(reasons(call._replace(spec=call.spec._replace(mix=dilated)))) == 1
    assert len(reasons(call._replace(dtype=torch.float64))) == 1
    with pytest.raises(AssertionError, match="asked"):
        reasons(call)


# As an operation of PyTorch's


def test_opcheck() -> None:
    for seed in (1, 3, 8, 11):
        block = Block(seed)
        operation: Any = torch.ops.mixconv.inverted_residual.default
        torch.library.opcheck(operation, (block.x, *block.packed(), str(block.spec())))


class Watch(TorchDispatchMode):
    """Notes the names of what passes PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operation() -> None:
    with torch.no_grad(), Watch() as watch:
        FULL.compute()
    assert "mixconv.inverted_residual.default" in watch.seen
    with torch.profiler.profile() as profile:
        FULL.compute()
    assert any("inverted_residual" in event.key for event in profile.key_averages())


class Wrapped(Tensor):
    """A tensor that holds another: it has no numbers of its own."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapped":
        make: Any = Tensor._make_wrapper_subclass
        wrapped: Wrapped = make(cls, held.shape, held.stride(), dtype=held.dtype)
        wrapped.__dict__["held"] = held
        return wrapped

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrap(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(unwrap, value))
            return value.__dict__["held"] if isinstance(value, Wrapped) else value

        return func(*unwrap(args), **(kwargs or {}))


@pytest.mark.parametrize("place", ["x", "weights", "biases"])
def test_a_wrapper_without_numbers_is_dispatched(place: str) -> None:
    """`data_ptr()` of such a tensor is 0: the kernel must not see it."""
    wanted = FULL.compute()
    weights, biases = FULL.packed()
    for index in range(5) if place != "x" else (0,):
        x, w, b = FULL.x, [*weights], [*biases]
        if place == "x":
            x = Wrapped(x)
        else:
            chosen = w if place == "weights" else b
            chosen[index] = Wrapped(chosen[index])
        with torch.no_grad():
            torch.testing.assert_close(inverted_residual(x, w, b, FULL.spec()), wanted)


@pytest.mark.parametrize("place", ["x", "weights", "biases"])
def test_memory_that_was_given_back_is_not_read(place: str) -> None:
    weights, biases = FULL.packed()
    x = FULL.x.clone()
    given = {"x": x, "weights": weights[1], "biases": biases[4]}
    given[place].untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
        inverted_residual(x, weights, biases, FULL.spec())


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, as a contiguous view that PyTorch has still to negate."""
    view: Tensor = torch._neg_view(-tensor)
    assert view.is_neg()
    assert view.is_contiguous() == tensor.is_contiguous()
    return view


@pytest.mark.parametrize("place", ["x", "weights", "biases"])
def test_a_negated_view_is_negated(place: str) -> None:
    wanted = FULL.compute()
    weights, biases = FULL.packed()
    for index in range(5) if place != "x" else (0,):
        x, w, b = FULL.x, [*weights], [*biases]
        if place == "x":
            x = negated(x)
        else:
            chosen = w if place == "weights" else b
            chosen[index] = negated(chosen[index])
        with torch.no_grad():
            y = inverted_residual(x, w, b, FULL.spec())
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_input_and_function_transforms() -> None:
    weights, biases = FULL.packed()
    spec, leaf = FULL.spec(), FULL.x.clone().requires_grad_()
    inverted_residual(leaf, weights, biases, spec).square().sum().backward()
    other = FULL.x.clone().requires_grad_()
    block_form(other, weights, biases, spec).square().sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad)
    each = torch.func.vmap(lambda image: inverted_residual(image[None], weights, biases, spec))
    with torch.no_grad():
        torch.testing.assert_close(each(FULL.x)[:, 0], FULL.compute(), rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: inverted_residual(x, weights, biases, spec).square().sum())
    torch.testing.assert_close(gradient(FULL.x), other.grad, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_parameter_takes_the_separate_operations() -> None:
    for index in range(5):
        for place in (0, 1):
            packed = FULL.packed()
            packed[place][index].requires_grad_()
            inverted_residual(FULL.x, *packed, FULL.spec()).sum().backward()
            assert packed[place][index].grad is not None


def test_forward_mode() -> None:
    weights, biases = FULL.packed()
    tangents = []
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(FULL.x, torch.ones_like(FULL.x))
        for function in (inverted_residual, block_form):
            y = function(x, weights, biases, FULL.spec())
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(tangents[1], tangents[0])
    assert tangents[0].abs().max() > 0


def fused_block(block: Block) -> FusedBlock:
    return FusedBlock(block.spec(), *block.packed())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    compiled = torch.compile(fused_block(FULL), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(FULL.x), FULL.compute(), rtol=1e-4, atol=1e-4)
    leaf = FULL.x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    assert leaf.grad is not None


def test_autocast_computes_in_the_type_of_the_weights() -> None:
    wanted = FULL.compute()
    fused = fused_block(FULL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (FULL.x, FULL.x.bfloat16()):
            with torch.no_grad():
                y = fused(x)
            assert y.dtype == torch.float32
            tolerance = 1e-4 if x.dtype == torch.float32 else 0.1
            torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
            leaf = x.clone().requires_grad_()
            inverted_residual(leaf, *FULL.packed(), FULL.spec()).sum().backward()
            assert leaf.grad is not None
            y = torch.ops.mixconv.inverted_residual(x, *FULL.packed(), str(FULL.spec()))
            torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
        leaf = FULL.x.clone().requires_grad_()
        fused(leaf).sum().backward()
    assert leaf.grad is not None


def test_the_default_type_does_not_matter() -> None:
    wanted, packed = FULL.compute(), FULL.packed()
    for dtype in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(dtype)
            BLOCK_FORMS.forget()
            y = inverted_residual(FULL.x, *packed, FULL.spec())
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(y, wanted)


# The module


def test_a_fused_block_takes_one_image_and_follows_to() -> None:
    fused = fused_block(FULL)
    with torch.no_grad():
        torch.testing.assert_close(fused(FULL.x[0]), FULL.compute()[0], rtol=1e-4, atol=1e-4)
        double = fused.double()(FULL.x.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, FULL.reference())


def test_training_is_refused() -> None:
    fused = fused_block(FULL)
    assert not fused.training
    assert fused.eval() is fused
    with pytest.raises(RuntimeError, match="fuse it again"):
        fused.train()


# Bad input


MISFITS: dict[str, dict[str, int | None]] = {
    "no excite": {"excite": None},
    "no squeeze": {"squeeze": None},
    "squeezed to other numbers": {"squeeze.outputs": 7},
    "squeezed from others": {"squeeze.inputs": 4},
    "excited to others": {"excite.outputs": 4},
    "projected from others": {"project.inputs": 4},
    "expanded to others": {"expand.outputs": 4},
    "another size to add to": {"project.outputs": 8},
    "another stride to add to": {"mix.stride": 2},
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_layers_that_do_not_fit_together(what: str) -> None:
    """By the spec alone: tensors of sizes to match would not be refused later."""
    gate = PointwiseSpec(12, 3, 1, "relu"), PointwiseSpec(3, 12, 1, "sigmoid")
    mix = MixSpec((4, 8), (3, 5), 1, (1, 1), "same", "relu")
    whole = PointwiseSpec(6, 12, 1, "relu"), *gate, PointwiseSpec(12, 6, 1, "none")
    spec = BlockSpec(mix, *whole, residual=True)
    assert check_block(spec)[0] == 6
    for place, value in MISFITS[what].items():
        layer, _, entry = place.partition(".")
        changed: Any = getattr(spec, layer)._replace(**{entry: value}) if entry else value
        with pytest.raises(ValueError, match="do not fit together"):
            check_block(spec._replace(**{layer: changed}))


def bad(change: str) -> tuple[Any, ...]:
    (weights, biases), spec, x = FULL.packed(), FULL.spec(), FULL.x
    expand = spec.expand
    assert expand is not None
    changes: dict[str, Callable[[], tuple[Any, ...]]] = {
        "x has channels too many": lambda: (F.pad(x, (0, 0, 0, 0, 0, 1)), weights, biases, spec),
        "x has three axes": lambda: (x[:, 0], weights, biases, spec),
        "x is double": lambda: (x.double(), weights, biases, spec),
        "a weight is missing": lambda: (x, weights[1:], biases, spec),
        "a weight is short": lambda: (x, [weights[0][1:], *weights[1:]], biases, spec),
        "a bias is short": lambda: (x, weights, [*biases[:4], biases[4][1:]], spec),
        "half a gate": lambda: (x, weights, biases, spec._replace(excite=None)),
        "groups do not divide": lambda: (
            x, weights, biases, spec._replace(expand=expand._replace(groups=97)),
        ),
        "no groups": lambda: (x, weights, biases, spec._replace(expand=expand._replace(groups=0))),
        "expansion too narrow": lambda: (
            x, weights, biases, spec._replace(expand=expand._replace(outputs=1)),
        ),
        "nothing to add to": lambda: (
            x, weights, biases,
            spec._replace(residual=True, mix=spec.mix._replace(stride=2)),
        ),
        "unknown activation": lambda: (
            x, weights, biases, spec._replace(expand=expand._replace(activation="gelu")),
        ),
    }  # fmt: skip
    return changes[change]()


@pytest.mark.parametrize(
    "change",
    ["x has channels too many", "x has three axes", "x is double", "a weight is missing",
     "a weight is short", "a bias is short", "half a gate", "groups do not divide", "no groups",
     "expansion too narrow", "nothing to add to", "unknown activation"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["function", "operation", "gradient"])
def test_bad_input_is_refused(change: str, way: str) -> None:
    x, weights, biases, spec = bad(change)
    leaf = x.clone().requires_grad_()
    operation: Any = torch.ops.mixconv.inverted_residual
    ways = {
        "function": lambda: inverted_residual(x, weights, biases, spec),
        "operation": lambda: operation(x, weights, biases, str(spec)),
        "gradient": lambda: inverted_residual(leaf, weights, biases, spec),
    }
    with pytest.raises(ValueError, match=r"must|fit"):
        ways[way]()
