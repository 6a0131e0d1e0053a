"""What must hold for every layer, partition, block and file, on cases that nobody chose.

Hypothesis draws the cases; they are the same in every run, and the smallest failing one is told.
"""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixconv import (
    BlockConfig,
    MixConv2d,
    MixNet,
    count_costs,
    decode_block,
    encode_block,
    fuse_for_inference,
    mixconv_reference,
    partition_channels,
)
from mixconv.fast.fused_layer import describe_mix
from mixconv.fast.operation import mixed_depthwise2d
from mixconv.fast.spec import MixSpec, pack_weights
from mixconv.formulation import mixconv_loops, mixconv_multiply_adds, mixconv_parameters
from mixconv.weights import load_weights, to_timm

from .common import TINY, noise, randomize, same_state, snapshot

quietly = settings(max_examples=25, deadline=None, derandomize=True, database=None)
methods = st.sampled_from(["equal", "exponential", "logarithmic"])
odd = st.sampled_from([3, 5, 7, 9, 11])


@st.composite
def layers(draw: st.DrawFn, /, **fixed: object) -> tuple[MixConv2d, torch.Tensor]:
    """A layer in double precision and an input for it."""
    sizes = tuple(draw(st.lists(odd, min_size=1, max_size=4)))
    partition = tuple(draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))))
    options: dict[str, object] = {
        # Not (1, 2): torch 2.13 on a CPU then computes one channel in channels_last wrongly, where
        # the output is one pixel wide, with or without us.
        "stride": draw(st.sampled_from([1, 2, (2, 1)])),
        "padding": draw(st.sampled_from(["symmetric", "same"])),
        "channel_multiplier": draw(st.sampled_from([1, 1, 2])),
        "dilated": draw(st.booleans()), "bias": draw(st.booleans()), **fixed,
    }  # fmt: skip
    layer = MixConv2d(sum(partition), sizes, partition=partition, dtype=torch.double, **options)  # type: ignore[arg-type]
    randomize(layer.float()).double()
    shape = (
        draw(st.integers(1, 2)),
        sum(partition),
        draw(st.integers(1, 13)),
        draw(st.integers(1, 13)),
    )
    x = noise(*shape, seed=draw(st.integers(0, 99)), dtype=torch.double)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return layer, x


@quietly
@given(st.integers(1, 600), st.lists(odd, min_size=1, max_size=5), methods)
def test_a_partition_sums_and_has_no_empty_group(channels, sizes, method):
    if channels < 4 * 2 ** len(sizes):  # a group may be left empty: that is another test's
        return
    split = partition_channels(channels, sizes, method)
    assert sum(split) == channels
    assert len(split) == len(sizes)
    assert min(split) >= 1


@quietly
@given(layers(stride=1, padding="symmetric", dilated=False, bias=False))
def test_a_layer_is_the_loops(case):
    layer, x = case
    weights = [conv.weight.detach() for conv in layer.convs]
    m = layer.out_channels // layer.in_channels
    loops = torch.stack([mixconv_loops(one, weights, m) for one in x])
    torch.testing.assert_close(layer(x), loops)
    torch.testing.assert_close(layer(x), mixconv_reference(x, weights, m))


@quietly
@given(layers())
def test_merged_is_split_forward_and_backward(case):
    layer, x = case
    try:
        merged = layer.merged()
    except ValueError:
        return  # kernels that 'SAME' centres elsewhere
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = layer(ours), merged(theirs)
    torch.testing.assert_close(a, b)
    seed = noise(*a.shape, dtype=torch.double)
    for one, other in zip(torch.autograd.grad(a, ours, seed), torch.autograd.grad(b, theirs, seed),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


@quietly
@given(layers(channel_multiplier=1), st.sampled_from(["none", "relu", "relu6", "silu"]),
       st.integers(1, 3))  # fmt: skip
def test_the_operation_is_the_layer_with_any_threads(case, activation, threads):
    layer, x = case
    spec = describe_mix([*layer.convs], activation)
    if spec is None:
        return  # strides that differ
    x, layer = x.float(), layer.float()
    acts = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU()}
    wanted = acts[activation](layer(x))
    biases = [conv.bias for conv in layer.convs if conv.bias is not None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        got = mixed_depthwise2d(
            x, pack_weights([conv.weight for conv in layer.convs]),
            torch.cat(biases) if biases else None, **MixSpec(*spec)._asdict(),
        )  # fmt: skip
    torch.set_num_threads(before)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@quietly
@given(layers())
def test_fused_is_split(case):
    layer, x = case
    model = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()).float().eval()
    randomize(model)
    with torch.no_grad():
        wanted = model(x.float())
        got = fuse_for_inference(model)(x.float())
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@quietly
@given(layers(stride=1, channel_multiplier=1, dilated=False, bias=False))
def test_costs_by_formula_by_hook_and_by_torch(case):
    layer, x = case
    height, width = x.shape[2:]
    work = len(x) * mixconv_multiply_adds(layer.partition, layer.kernel_sizes, height, width)
    costs = count_costs(layer, x)
    assert sum(cost.multiply_adds for cost in costs) == work
    weights = mixconv_parameters(layer.partition, layer.kernel_sizes)
    assert sum(cost.parameters for cost in costs) == weights
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * work


configs = st.builds(
    BlockConfig,
    in_channels=st.integers(1, 640).map(lambda n: 2 * n),
    out_channels=st.integers(1, 640).map(lambda n: 2 * n),
    kernel_sizes=st.lists(odd, min_size=1, max_size=5).map(tuple), stride=st.integers(1, 2),
    expand_ratio=st.integers(1, 6), repeats=st.integers(1, 5),
    expand_groups=st.integers(1, 2), project_groups=st.integers(1, 2),
    squeeze_ratio=st.sampled_from([0, 0.25, 0.5, 0.3]),
    activation=st.sampled_from(["relu", "swish"]), skip=st.booleans(), dilated=st.booleans(),
)  # fmt: skip


@settings(quietly, max_examples=100)
@given(configs)
def test_a_block_string_says_all_of_a_block(config):
    assert decode_block(encode_block(config)) == config


@settings(quietly, max_examples=10)
@given(
    st.integers(0, 99), st.sampled_from(["ours", "timm", "file", "safetensors"]), st.integers(1, 9)
)
def test_what_is_saved_is_loaded(seed, kind, classes):
    source, model = MixNet(TINY, num_classes=classes), MixNet(TINY, num_classes=classes)
    randomize(source, seed)
    weights: object = source.state_dict() if kind == "ours" else to_timm(source)
    if kind == "file":
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        weights = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        weights = safetensors.load(safetensors.save(dict(source.state_dict())))
    load_weights(model, weights)
    assert same_state(model, snapshot(source))
