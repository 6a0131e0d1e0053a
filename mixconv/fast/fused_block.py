# Generated from notebooks/15_block_bytes.ipynb by `make book`. Edit the notebook, not this file.

"""A whole inverted residual block as one operation: meaning, rules, module (ours; chapter 15)."""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from mixconv.fast.costs import block_costs, block_flops
from mixconv.fast.forms import Call, Forms, Runner, check_memory, is_plain, must_dispatch
from mixconv.fast.fused_layer import FusedModule
from mixconv.fast.operation import meet_exporters, run_operation
from mixconv.fast.spec import ACTIVATIONS, MixSpec, activate, check_spec, output_size
from mixconv.formulation import LayerCost

__all__ = [
    "BLOCK_FORMS",
    "PANEL",
    "POINT_ACTIVATIONS",
    "BlockSpec",
    "FusedBlock",
    "PointwiseSpec",
    "block_form",
    "check_block",
    "check_block_call",
    "describe_block_call",
    "inverted_residual",
    "pack_pointwise",
    "unpack_pointwise",
]


class PointwiseSpec(NamedTuple):
    """A 1×1 convolution in equal groups, and the activation behind it."""

    inputs: int
    outputs: int
    groups: int
    activation: str


class BlockSpec(NamedTuple):
    """An inverted residual block; what is None is left out.

    `str` writes it down, and `BlockSpec.parse` reads that. Weights and biases go with it in the
    order expand, depthwise, squeeze, excite, project: 1×1 weights from `pack_pointwise`, the
    depthwise ones from `pack_weights`, empty where left out.
    """

    mix: MixSpec
    expand: PointwiseSpec | None
    squeeze: PointwiseSpec | None
    excite: PointwiseSpec | None
    project: PointwiseSpec
    residual: bool

    @staticmethod
    def parse(text: str) -> "BlockSpec":
        """A spec from what `str` made of it.

        Raises:
            ValueError: for any other text.
        """
        return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> BlockSpec:
    try:
        spec = _build(ast.parse(text, mode="eval").body)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"not a block: {text!r} ({error!r})") from error
    if not isinstance(spec, BlockSpec) or str(spec) != text:
        raise ValueError(f"not a block as str writes it: {text!r}")
    return spec


def _build(node: Any) -> Any:
    """A literal, or one of the three specs with named entries; nothing else is evaluated."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    known: dict[str, Any] = {kind.__name__: kind for kind in (MixSpec, PointwiseSpec, BlockSpec)}
    entries = {str(entry.arg): _build(entry.value) for entry in node.keywords}
    return known[ast.unparse(node.func)](**entries)


PANEL = 16  # outputs side by side; the kernel of the next page has the same number


def pack_pointwise(weight: Tensor, groups: int) -> Tensor:
    """A 1×1 convolution's weight `(outputs, inputs / groups, 1, 1)` as panels, one axis."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows = F.pad(weight.reshape(groups, outputs, inputs), (0, 0, 0, -outputs % PANEL))
    return rows.view(groups, -1, PANEL, inputs).transpose(2, 3).reshape(-1)


def unpack_pointwise(packed: Tensor, point: PointwiseSpec) -> Tensor:
    """`pack_pointwise` undone."""
    inputs, outputs = point.inputs // point.groups, point.outputs // point.groups
    rows = packed.view(point.groups, -1, inputs, PANEL).transpose(2, 3).flatten(1, 2)
    return rows[:, :outputs].reshape(point.outputs, inputs, 1, 1)


def block_form(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """The block as separate operations: the reference, all PyTorch's own in double precision.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.
    """

    def pointwise(y: Tensor, index: int, point: PointwiseSpec) -> Tensor:
        weight = unpack_pointwise(weights[index], point)
        return activate(F.conv2d(y, weight, biases[index], groups=point.groups), point.activation)

    with torch.autocast(x.device.type, enabled=False):  # all in the type of the weights
        y = x if spec.expand is None else pointwise(x, 0, spec.expand)
        y = run_operation(y, weights[1], biases[1], spec.mix)
        if spec.squeeze is not None and spec.excite is not None:
            means = y.mean((2, 3), keepdim=True)
            y = y * pointwise(pointwise(means, 2, spec.squeeze), 3, spec.excite)
        y = pointwise(y, 4, spec.project)
        return x + y if spec.residual else y


POINT_ACTIVATIONS = (*ACTIVATIONS, "sigmoid")  # in the order of the kernel's enum


def _count_point(point: PointwiseSpec | None) -> tuple[int, int]:
    """How many packed weights and biases a 1×1 layer has."""
    if point is None:
        return 0, 0
    inputs, outputs, groups, activation = point
    if min(inputs, outputs, groups) < 1 or inputs % groups or outputs % groups:
        raise ValueError(f"groups must divide inputs and outputs, got {point}")
    if activation not in POINT_ACTIVATIONS:
        raise ValueError(f"activation must be one of {POINT_ACTIVATIONS}, got {activation!r}")
    return groups * -(-outputs // groups // PANEL) * PANEL * (inputs // groups), outputs


def _check_fit(spec: BlockSpec, wide: int) -> None:
    """Raise unless each layer takes what the one before it gives."""
    pairs = [("project takes", spec.project.inputs, "the depthwise layer gives", wide)]
    if spec.expand:
        pairs += [("the depthwise layer takes", wide, "expand gives", spec.expand.outputs)]
    if spec.squeeze and spec.excite:
        pairs += [("squeeze takes", spec.squeeze.inputs, "the depthwise layer gives", wide),
                  ("excite takes", spec.excite.inputs, "squeeze gives", spec.squeeze.outputs),
                  ("the gate gives", spec.excite.outputs, "the depthwise layer", wide)]  # fmt: skip
    for one, taken, other, given in pairs:
        if taken != given:
            raise ValueError(f"layers do not fit together: {one} {taken} channels, {other} {given}")


@functools.lru_cache(maxsize=1024)
def check_block(spec: BlockSpec) -> tuple[int, list[int], list[int]]:
    """Channels of the input, and how many weights and biases each layer has.

    Raises:
        ValueError: for layers that cannot be, or do not take what the layer before gives.
    """
    mix, expand, squeeze, excite, project, residual = spec
    count, packed = check_spec(mix)
    points = [_count_point(point) for point in (expand, squeeze, excite, project)]
    inputs = expand.inputs if expand else count
    if (squeeze is None) != (excite is None):
        raise ValueError("layers do not fit together: a gate has both, squeeze and excite")
    _check_fit(spec, count)
    if residual and (mix.stride > 1 or inputs != project.outputs):
        raise ValueError(f"layers do not fit together: input and result cannot be added in {spec}")
    weights, biases = zip(points[0], (packed, count), *points[1:], strict=True)
    return inputs, list(weights), list(biases)


def check_block_call(call: Call) -> None:
    """Raise unless the sizes of the tensors fit the block.

    Raises:
        ValueError: naming the tensors, their sizes and what they must be.
    """
    inputs, *expected = check_block(call.spec)
    if len(call.sizes) != 4 or call.sizes[1] != inputs:
        raise ValueError(f"x must be (N, {inputs}, H, W), got {tuple(call.sizes)}")
    for name, found, wanted in zip(("weights", "biases"), call.parameters, expected, strict=True):
        if list(found) != wanted:
            raise ValueError(f"{name} must hold {wanted} numbers, got {list(found)}")


def describe_block_call(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Call:
    """The call that these tensors make.

    Raises:
        ValueError: if they differ in dtype or device. (Sizes: see `check_block_call`.)
    """
    dtype, device = x.dtype, x.device
    for tensor in (*weights, *biases):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"weights and biases must have the dtype and device of x, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    parameters = tuple([t.numel() for t in weights]), tuple([t.numel() for t in biases])
    return Call(spec, x.shape, dtype, device.type, True, torch.get_num_threads(), parameters)


def _prepare_block_form(call: Call) -> Runner:
    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        y = block_form(x, weights, biases, call.spec)
        return y.contiguous(memory_format=torch.channels_last)

    return run


BLOCK_FORMS = Forms("inverted_residual", _prepare_block_form, check_block_call)


@torch.library.custom_op(
    "mixconv::inverted_residual", mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, str spec) -> Tensor",
)  # fmt: skip
def _operation(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    call = describe_block_call(x, weights, biases, BlockSpec.parse(spec))
    if x.is_cpu and not all(is_plain(t) for t in (x, *weights, *biases)):
        check_block_call(call)
        check_memory(x, *weights, *biases)
        return BLOCK_FORMS.fallback(call)(x, weights, biases)
    return BLOCK_FORMS.choose(call)(x, weights, biases)


@_operation.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
    meet_exporters()
    block = BlockSpec.parse(spec)
    check_block_call(describe_block_call(x, weights, biases, block))
    rows, columns = (output_size(size, block.mix.stride) for size in x.shape[2:])
    size = x.shape[0], block.project.outputs, rows, columns
    return x.new_empty(size).to(memory_format=torch.channels_last)


def _count_flops(x: list[int], weights: Any, biases: Any, spec: str, **_: Any) -> int:
    return block_flops(BlockSpec.parse(spec), x)


flop_registry[torch.ops.mixconv.inverted_residual] = shape_wrapper(_count_flops)


def _under_autocast(key: str) -> Callable[..., Tensor]:
    """The operation where autocast rules: in the type of the weights, whatever x comes in."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: str) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y = torch.ops.mixconv.inverted_residual(x.to(weights[1].dtype), weights, biases, spec)
            return cast("Tensor", y)

    return run


_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

for _key in _AUTOCAST.values():
    _operation._lib.impl("inverted_residual", _under_autocast(_key), _key)


def _needs_formulas(*tensors: Tensor) -> bool:
    """Whether somebody differentiates or transforms: then the block is its separate steps."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


def inverted_residual(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], spec: BlockSpec
) -> Tensor:
    """An inverted residual block, from its input to its output, in one operation.

    Args:
        x: best in channels_last; anything else is copied to it first.
        weights: of the five layers of `spec`, packed; see `BlockSpec`.
        biases: of the five layers.
        spec: the block.

    Shape:
        Input `(N, C_in, H, W)`, output `(N, C_out, ceil(H / stride), ceil(W / stride))`.

    Raises:
        ValueError: for sizes and dtypes that do not fit together.

    Source: ours; the block is the paper's (section 4, Figure 8). Chapter 15.
    """
    if not must_dispatch(x, *weights, *biases):
        call = describe_block_call(x, weights, biases, spec)
        return BLOCK_FORMS.choose(call)(x, weights, biases)
    if x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type):
        x = x.to(weights[1].dtype)
    if _needs_formulas(x, *weights, *biases):
        if not torch.compiler.is_compiling():
            check_block_call(describe_block_call(x, weights, biases, spec))
        return block_form(x, weights, biases, spec)
    operation = torch.ops.mixconv.inverted_residual
    return cast("Tensor", operation(x, weights, biases, str(spec)))


class FusedBlock(FusedModule):
    """An inverted residual block, or a depthwise separable one, as one operation.

    Args:
        spec: the block.
        weights: packed, as `inverted_residual` takes them.
        biases: of the five layers.

    Shape:
        Input `(N, C, H, W)` or `(C, H, W)`, output as from the block it replaces.
    """

    def __init__(
        self, spec: BlockSpec, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.spec = spec
        for index, pair in enumerate(zip(weights, biases, strict=True)):
            for name, tensor in zip(("weight", "bias"), pair, strict=True):
                self.register_buffer(f"{name}{index}", tensor.detach().clone())
        super().train(False)

    def compute(self, x: Tensor) -> Tensor:
        """The block, in the type of its weights."""
        # By name: counters of other packages register buffers of their own.
        weights: list[Tensor] = [getattr(self, f"weight{index}") for index in range(5)]
        biases: list[Tensor] = [getattr(self, f"bias{index}") for index in range(5)]
        if isinstance(x, torch.fx.Proxy):
            operation = torch.ops.mixconv.inverted_residual
            return cast("Tensor", operation(x, weights, biases, str(self.spec)))
        return inverted_residual(x.to(weights[1].dtype), weights, biases, self.spec)

    def layer_costs(self, name: str, x: Tensor, output: Tensor) -> list[LayerCost]:
        """What `count_costs` counts: the layers inside."""
        return block_costs(self.spec, name, x.shape, output.shape)
