import copy
import io
import pickle
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixconv import Conv2dSame, MixConv2d, mixconv_reference
from mixconv.formulation import mixconv_loops
from mixconv.layer import (
    embed_kernel,
    make_conv2d,
    make_pointwise,
    merge_depthwise,
    same_padding,
)

from .common import noise

SIZES = [(8, 8), (7, 9), (6, 5), (1, 1), (2, 3), (1, 12)]  # some smaller than the kernels
STRIDES = [1, 2, 3, (1, 2), (3, 2)]


def kernels_of(layer: MixConv2d) -> list[Tensor]:
    return [conv.weight for conv in layer.convs]  # type: ignore[misc]


def assert_same_gradients(ours: Tensor, wanted: Tensor, parameters: list[Tensor]) -> None:
    upstream = noise(*ours.shape, seed=1, dtype=ours.dtype)
    pairs = zip(
        torch.autograd.grad(ours, parameters, upstream),
        torch.autograd.grad(wanted, parameters, upstream),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def brute_force_same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's rule: ceil(size / stride) windows, no more zeros than that needs."""
    outputs = -(-size // stride)
    window = (kernel - 1) * dilation + 1
    needed = 0
    while (size + needed - window) // stride + 1 < outputs or size + needed < window:
        needed += 1
    return needed // 2, needed - needed // 2


def test_same_padding_is_tensorflows_rule():
    for case in product(range(1, 41), range(1, 14), range(1, 5), range(1, 4)):
        zeros = same_padding(*case)
        assert zeros == brute_force_same(*case), case
        assert all(type(count) is int for count in zeros)


def test_stride_1_equals_the_loops_forward_and_gradient():
    layer = MixConv2d(6, (3, 5, 7), channel_multiplier=2, dtype=torch.double)
    x = noise(6, 5, 6, dtype=torch.double).requires_grad_()
    ours, loops = layer(x), mixconv_loops(x, kernels_of(layer), 2)
    torch.testing.assert_close(ours, loops)
    assert_same_gradients(ours, loops, [x, *layer.parameters()])


def by_taps(layer: MixConv2d, x: Tensor) -> Tensor:
    """The layer as a sum over kernel taps of shifted images, every stride-th pixel of each."""
    parts = []
    for conv, group in zip(layer.convs, x.split(layer.partition, 1), strict=True):
        assert isinstance(conv, nn.Conv2d)
        outputs, margin = [], 12
        for axis in (0, 1):
            k, s, d = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
            before = d * (k // 2)
            if layer.padding == "same":
                before = brute_force_same(x.shape[2 + axis], k, s, d)[0]
            count = -(-x.shape[2 + axis] // s)
            first = [margin - before + tap * d for tap in range(k)]
            outputs.append([slice(start, start + (count - 1) * s + 1, s) for start in first])
        wide = F.pad(group.repeat_interleave(layer.channel_multiplier, 1), [margin] * 4)
        y = sum(
            wide[:, :, rows, columns] * conv.weight[:, 0, i, j].view(-1, 1, 1)
            for i, rows in enumerate(outputs[0])
            for j, columns in enumerate(outputs[1])
        )
        assert isinstance(y, Tensor)
        parts.append(y if conv.bias is None else y + conv.bias.view(-1, 1, 1))
    return torch.cat(parts, 1)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"partition": "exponential", "bias": True},
    {"partition": "logarithmic", "channel_multiplier": 2},
    {"partition": (1, 2, 9), "channel_multiplier": 3, "bias": True},
    {"dilated": True, "bias": True},
    {"dilation": 2},
    {"dilation": (1, 3), "channel_multiplier": 2},
]


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_gradient_and_merged(options, stride, padding):
    layer = MixConv2d(12, (3, 5, 7), stride, padding=padding, dtype=torch.double, **options)
    merged = layer.merged()
    for size in SIZES:
        x = noise(2, 12, *size, dtype=torch.double).requires_grad_()
        ours, wanted = layer(x), by_taps(layer, x)
        assert ours.shape == wanted.shape
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(merged(x), wanted)
        if size in SIZES[1:3]:
            assert_same_gradients(ours, wanted, [x, *layer.parameters()])


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", SIZES)
def test_symmetric_strides_take_every_nth_output_of_the_reference(size, stride):
    layer = MixConv2d(6, (3, 5, 7), stride, channel_multiplier=2, dtype=torch.double)
    x = noise(2, 6, *size, dtype=torch.double).requires_grad_()
    dense = mixconv_reference(x, kernels_of(layer), 2)
    wanted = dense[:, :, :: layer.stride[0], :: layer.stride[1]]
    ours = layer(x)
    torch.testing.assert_close(ours, wanted)
    assert_same_gradients(ours, wanted, [x, *layer.parameters()])


def test_same_and_symmetric_differ_where_they_should():
    same = MixConv2d(4, (3, 5), 2, padding="same")
    symmetric = MixConv2d(4, (3, 5), 2)
    symmetric.load_state_dict(same.state_dict())
    even, odd = noise(1, 4, 8, 8), noise(1, 4, 9, 9)
    assert not torch.allclose(same(even), symmetric(even))
    torch.testing.assert_close(same(odd), symmetric(odd))


def test_dilated_is_the_official_rule():
    layer = MixConv2d(12, (3, 5, 9), dilated=True)
    convs = [conv for conv in layer.convs if isinstance(conv, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * 3
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2), (4, 4)]
    strided = MixConv2d(12, (3, 5, 9), 2, dilated=True)
    assert [c.kernel_size for c in strided.convs] == [(3, 3), (5, 5), (9, 9)]
    assert all(c.dilation == (1, 1) for c in strided.convs)


def test_merged_is_a_copy_in_the_same_mode_type_and_place():
    layer = MixConv2d(4, (3, 5), dtype=torch.double).eval()
    merged = layer.merged()
    assert isinstance(merged, nn.Conv2d)
    assert merged.weight.dtype == torch.double
    assert not merged.training
    assert merged.weight.requires_grad
    assert merged.bias is None
    assert merged.kernel_size == (5, 5)
    with torch.no_grad():
        merged.weight.zero_()
    assert all(weight.abs().sum() > 0 for weight in kernels_of(layer))
    assert MixConv2d(4, (3, 5), device="meta").merged().weight.is_meta


def test_one_kernel_size_is_the_depthwise_layer():
    ours = MixConv2d(4, 5, 2, bias=True)
    theirs = nn.Conv2d(4, 4, 5, 2, 2, groups=4)
    theirs.load_state_dict(ours.convs[0].state_dict())
    x = noise(2, 4, 9, 8)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_conv2d_same_and_make_conv2d(padding):
    for kernel, stride, dilation, groups in product((1, 3, 5), (1, 2, 3), (1, 2), (1, 2)):
        conv = make_conv2d(
            4, 6, kernel, stride, dilation=dilation, groups=groups, bias=True, padding=padding
        )
        for size in (1, 4, 9):
            x = noise(1, 4, size, size + 1)
            zeros = [dilation * (kernel // 2)] * 4
            if padding == "same":
                rows, columns = (
                    brute_force_same(s, kernel, stride, dilation) for s in (size, size + 1)
                )
                zeros = [*columns, *rows]
            wanted = F.conv2d(F.pad(x, zeros), conv.weight, conv.bias, stride, 0, dilation, groups)
            torch.testing.assert_close(conv(x), wanted)


def test_conv2d_same_takes_even_and_oblong_kernels():
    conv = Conv2dSame(2, 3, (2, 5), stride=(2, 1), dilation=(1, 2))
    for size in ((5, 4), (6, 9), (1, 1)):
        x = noise(1, 2, *size)
        rows, columns = brute_force_same(size[0], 2, 2, 1), brute_force_same(size[1], 5, 1, 2)
        padded = F.pad(x, [*columns, *rows])
        wanted = F.conv2d(padded, conv.weight, conv.bias, (2, 1), 0, (1, 2))
        torch.testing.assert_close(conv(x), wanted)


def test_pointwise_is_a_convolution_on_each_slice():
    layer = make_pointwise(6, 4, 2)
    x = noise(2, 6, 3, 3)
    halves = [
        nn.functional.conv2d(part, weight)
        for part, weight in zip(x.chunk(2, 1), layer.weight.chunk(2), strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(halves, 1))
    assert layer.bias is None
    assert type(layer) is nn.Conv2d
    assert make_pointwise(6, 4, 2, bias=True).bias is not None


@pytest.mark.parametrize("channels", [(5, 4, 2), (4, 5, 2), (4, 6, 4)])
def test_groups_must_divide(channels):
    with pytest.raises(ValueError, match=rf"groups must divide.*{channels[2]} groups"):
        make_pointwise(*channels)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((4, 4, 0), ValueError, "groups.*0"),
        ((4, 4, -1), ValueError, "groups.*-1"),
        ((4, 4, 2.0), TypeError, "groups.*2.0"),
        ((0, 4), ValueError, "in_channels.*0"),
        ((4, "8"), TypeError, "out_channels.*'8'"),
    ],
)
def test_pointwise_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        make_pointwise(*arguments)


def side_by_side(**options: Any) -> list[nn.Conv2d]:
    """Two depthwise layers of 2 and 3 channels; `second` overrides the options of the latter."""
    second = options | options.pop("second", {})
    return [
        make_conv2d(c, c * o.pop("multiplier", 1), o.pop("k", 3), groups=c, **o)
        for c, o in ((2, dict(options)), (3, second))
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"second": {"k": 7}, "bias": True},
        {"stride": (1, 2), "second": {"k": 5}, "padding": "same"},
        {"k": 1, "stride": 2, "padding": "same"},  # equal kernels: no centre is lost
        {"dilation": 3, "second": {"k": 5}},
        {"dilation": 2, "second": {"dilation": 3}},
        {"dilation": (1, 2), "second": {"dilation": (3, 1), "k": 5}, "stride": 2},
    ],
    ids=str,
)
def test_merge_depthwise_of_any_layers(options):
    convs = side_by_side(dtype=torch.double, **options)
    merged = merge_depthwise(convs)
    if len({conv.dilation for conv in convs}) == 1:
        assert merged.dilation == convs[0].dilation  # no zeros written out in vain
    for size in SIZES:
        x = noise(1, 5, *size, dtype=torch.double)
        parts = [conv(part) for conv, part in zip(convs, x.split([2, 3], 1), strict=True)]
        torch.testing.assert_close(merged(x), torch.cat(parts, 1))


class OddConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


UNMERGEABLE: list[tuple[list[nn.Conv2d], str]] = [
    ([], "none"),
    ([OddConv(2, 2, 3, padding=1, groups=2)], "OddConv"),
    ([nn.utils.parametrizations.weight_norm(side_by_side()[0])], "Parametrized"),
    ([nn.Conv2d(2, 2, 3, padding=1)], "not depthwise"),
    ([nn.Conv2d(2, 2, 4, padding=2, groups=2)], "odd kernel"),
    ([nn.Conv2d(2, 2, (3, 2), padding=1, groups=2)], "odd kernel"),
    ([nn.Conv2d(2, 2, 3, groups=2)], "not padded"),
    ([nn.Conv2d(2, 2, 3, padding=1, groups=2, padding_mode="reflect")], "not padded"),
    (side_by_side(stride=2, second={"stride": 1}), "stride"),
    (side_by_side(second={"bias": True}), "bias"),
    (side_by_side(second={"multiplier": 2}), "outputs per channel"),
    (side_by_side(second={"dtype": torch.double}), "dtype"),
    (side_by_side(stride=2, second={"padding": "same"}), "class"),
    (side_by_side(k=1, stride=2, padding="same", second={"k": 3}), "at least stride - 1"),
]


@pytest.mark.parametrize(("convs", "words"), UNMERGEABLE, ids=lambda value: str(value)[:20])
def test_what_cannot_be_merged_is_refused(convs, words):
    with pytest.raises(ValueError, match=words):
        merge_depthwise(convs)


def test_repr():
    assert repr(MixConv2d(32, (3, 5, 7))) == (
        "MixConv2d(32, 32, kernel_sizes=(3, 5, 7), partition=(12, 10, 10), stride=(1, 1), "
        "padding='symmetric', bias=False)"
    )
    text = repr(
        MixConv2d(8, (3, 5), padding="same", channel_multiplier=2, bias=True, dilation=(1, 2))
    )
    assert "8, 16" in text
    assert "padding='same'" in text
    assert "dilation=(1, 2)" in text
    assert "bias" not in text
    assert "dilated=True" in repr(MixConv2d(8, (3, 5), dilated=True))


def test_reset_parameters_draws_as_conv2d_does():
    layer = MixConv2d(64, (3, 5), bias=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9)
    layer.reset_parameters()
    for conv in layer.convs:
        assert isinstance(conv, nn.Conv2d)
        bound = conv.kernel_size[0] ** -1.0
        for parameter in conv.parameters():
            assert bound * 0.8 < float(parameter.detach().abs().max()) <= bound


def copies(layer: MixConv2d) -> dict[str, MixConv2d]:
    """The layer copied in each way a program copies layers."""
    loaded = MixConv2d(9, (3, 5), 2, padding="same", bias=True)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    pickled = pickle.loads(pickle.dumps(layer))
    return {"state_dict": loaded, "deepcopy": copy.deepcopy(layer), "pickle": pickled}


def test_copies_compute_the_same_and_share_nothing():
    layer = MixConv2d(9, (3, 5), 2, padding="same", bias=True)
    x = noise(1, 9, 6, 6)
    wanted = layer(x)
    for name, twin in copies(layer).items():
        assert torch.equal(twin(x), wanted), name
        assert repr(twin) == repr(layer)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(layer(x), wanted)
    assert list(layer.state_dict()) == [
        "convs.0.weight", "convs.0.bias", "convs.1.weight", "convs.1.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", [1, 2])
def test_types_formats_and_shapes(stride, padding):
    layer = MixConv2d(8, (3, 5), stride, padding=padding)
    x = noise(2, 8, 6, 7)
    wanted = layer(x)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    assert layer(x[:0]).shape == (0, *wanted.shape[1:])
    double = copy.deepcopy(layer).double()(x.double())
    assert double.dtype == torch.double
    torch.testing.assert_close(double.float(), wanted)
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), wanted, atol=0.05, rtol=0.05)
    nhwc = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = nhwc(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.contiguous(), wanted)


def test_device_and_dtype_arguments():
    layer = MixConv2d(8, (3, 5), 2, bias=True, device="meta", dtype=torch.double)
    assert all(p.is_meta and p.dtype == torch.double for p in layer.parameters())
    assert layer(torch.empty(2, 8, 5, 5, device="meta", dtype=torch.double)).shape == (2, 8, 3, 3)
    filled = layer.to_empty(device="cpu")
    filled.reset_parameters()
    assert filled(noise(1, 8, 5, 5, dtype=torch.double)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"channels": 0}, ValueError, ["channels", "0"]),
        ({"channels": 2}, ValueError, ["equal", "2 channels", "(3, 5, 7)"]),
        ({"channels": 12.0}, TypeError, ["channels", "12.0"]),
        ({"kernel_sizes": (3, 4)}, ValueError, ["kernel_sizes", "4"]),
        ({"kernel_sizes": ()}, ValueError, ["kernel_sizes"]),
        ({"stride": 0}, ValueError, ["stride", "0"]),
        ({"stride": (1, 2, 3)}, ValueError, ["stride", "(1, 2, 3)"]),
        ({"stride": (2, True)}, TypeError, ["stride", "True"]),
        ({"stride": 2.0}, TypeError, ["stride", "2.0"]),
        ({"dilation": 0}, ValueError, ["dilation", "0"]),
        ({"dilation": "2"}, TypeError, ["dilation", "'2'"]),
        ({"dilation": 2, "dilated": True}, ValueError, ["dilated", "dilation=(2, 2)"]),
        ({"kernel_sizes": (1, 3), "dilated": True}, ValueError, ["dilated", "(1, 3)"]),
        ({"padding": "SAME"}, ValueError, ["padding", "'SAME'", "'same'"]),
        ({"padding": 1}, ValueError, ["padding", "1", "'symmetric'"]),
        ({"channel_multiplier": 0}, ValueError, ["channel_multiplier", "0"]),
        ({"channel_multiplier": 1.5}, TypeError, ["channel_multiplier", "1.5"]),
        ({"partition": "thirds"}, ValueError, ["'thirds'"]),
        ({"partition": (4, 4, 5)}, ValueError, ["(4, 4, 5)", "12", "13"]),
    ],
    ids=str,
)
def test_errors_name_the_argument_and_the_value(options, error, words):
    with pytest.raises(error) as caught:
        MixConv2d(**({"channels": 12, "kernel_sizes": (3, 5, 7)} | options))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


@pytest.mark.parametrize("shape", [(2, 9, 5, 5), (9, 5, 5), (5, 5), (1, 2, 8, 5, 5), (8,)])
def test_wrong_inputs(shape):
    with pytest.raises(ValueError, match=r"x must be \(N, 8, H, W\)") as caught:
        MixConv2d(8, (3, 5))(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(("size", "dilation"), [(7, (1, 1)), (7, (3, 3)), (9, (1, 2)), (3, (1, 1))])
def test_embedded_kernels_compute_the_same(size, dilation):
    kernel = noise(4, 1, 3, 3).requires_grad_()
    x = noise(2, 4, 10, 11, seed=1)
    large = F.conv2d(x, embed_kernel(kernel, size, dilation), padding=size // 2, groups=4)
    plain = F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=4)
    torch.testing.assert_close(large, plain)
    (gradient,) = torch.autograd.grad(large.square().sum(), kernel, retain_graph=True)
    (wanted,) = torch.autograd.grad(plain.square().sum(), kernel)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": "same"}, {"dilated": True}])
def test_gradcheck(options):
    layer = MixConv2d(4, (3, 5), bias=True, dtype=torch.double, **options)
    x = noise(1, 4, 4, 3, dtype=torch.double).requires_grad_()
    names = dict(layer.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        result: Tensor = torch.func.functional_call(layer, state, (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, *names.values()))


WAYS = [(1, "symmetric"), (2, "symmetric"), (2, "same")]


@pytest.mark.parametrize(("stride", "padding"), WAYS)
def test_export_keeps_batch_and_size_free(stride, padding):
    layer = MixConv2d(8, (3, 5), stride, padding=padding)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (noise(2, 8, 10, 12),), dynamic_shapes=(free,))
    for shape in ((2, 8, 10, 12), (1, 8, 7, 5), (3, 8, 9, 20)):
        x = noise(*shape)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize(("stride", "padding"), WAYS)
def test_fx_graphs_run_at_any_size(stride, padding):
    layer = MixConv2d(8, (3, 5), stride, padding=padding)
    graph = torch.fx.symbolic_trace(layer)
    for shape in ((2, 8, 10, 12), (1, 8, 7, 5)):
        x = noise(*shape)
        assert torch.equal(graph(x), layer(x))


@pytest.mark.parametrize(("stride", "padding"), WAYS)
def test_jit_trace(stride, padding):
    layer = MixConv2d(8, (3, 5), stride, padding=padding)
    x = noise(2, 8, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about tracing
        traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(x), layer(x))


def test_compile_has_no_graph_breaks():
    torch._dynamo.reset()
    layer = MixConv2d(8, (3, 5), 2, padding="same")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = noise(2, 8, 6, 7)
    torch.testing.assert_close(compiled(x), layer(x))


def test_vmap_over_images():
    layer, x = MixConv2d(8, (3, 5)), noise(3, 2, 8, 5, 5)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x.flatten(0, 1)).view(3, 2, 8, 5, 5))
