import copy
import math
import pickle
import re
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixconv import (
    MIXNET_L,
    MIXNET_M,
    MIXNET_S,
    BlockConfig,
    MixConv2d,
    MixNet,
    MixNetConfig,
    count_costs,
    decode_block,
    encode_block,
    mixnet_l,
    mixnet_m,
    mixnet_s,
    preprocess,
)
from mixconv.blocks import DropPath, SqueezeExcite
from mixconv.counting import paper_flops
from mixconv.mixnet import unroll

from .common import DATA, TINY, VARIABLES, noise, randomize

MAKERS = {"s": mixnet_s, "m": mixnet_m, "l": mixnet_l}
CONFIGS = {"s": MIXNET_S, "m": MIXNET_M, "l": MIXNET_L}
OFFICIAL = sorted({str(block) for config in (MIXNET_S, MIXNET_M) for block in config.blocks})


def meta(name: str, **options: Any) -> MixNet:
    with torch.device("meta"):
        return MAKERS[name](**options)


@pytest.fixture(scope="module")
def small() -> MixNet:
    """A MixNet-S whose outputs are neither zero nor alike; tests must not change it."""
    model = mixnet_s(num_classes=10)
    randomize(model).eval()
    return model


@pytest.mark.parametrize(("name", "count"), [("s", 4_134_606), ("m", 5_014_382), ("l", 7_329_252)])
def test_parameter_counts(name, count):
    assert sum(p.numel() for p in meta(name).parameters()) == count
    if name != "l":  # the official variables of S and M are at hand
        variables = VARIABLES[f"mixnet-{name}"]["variables"]
        trained = [math.prod(shape) for role, shape, _ in variables if "moving" not in role]
        assert sum(trained) == count


def official_multiply_adds(name: str) -> dict[str, int]:
    """From the official side alone: shapes of its kernels, times pixels of its outputs.

    Kernels stand in order of creation. A depthwise kernel and what follows it in its block work
    on the block's output, what comes before it on the output before, a gate on one pixel.
    """
    truth, key = np.load(DATA / "official.npz"), f"{name}_224x224|"
    sides = dict(zip(truth[key + "names"], truth[key + "shape"][:, 1], strict=True))
    sums, side = {"pointwise": 0, "depthwise": 0, "gate": 0, "linear": 0}, int(sides["stem"])
    for _, shape, tf_name in VARIABLES[name]["variables"]:
        if "kernel" not in tf_name:
            continue
        kinds = {"/se/": "gate", "/dense/": "linear", "/depthwise": "depthwise"}
        kind = next((k for word, k in kinds.items() if word in tf_name), "pointwise")
        if match := re.search(r"blocks_(\d+)/depthwise", tf_name):
            side = int(sides[f"block_{match[1]}"])
        pixels = side**2 if kind in ("pointwise", "depthwise") else 1
        sums[kind] += math.prod(shape) * pixels
    return sums


@pytest.mark.parametrize("name", ["s", "m"])
def test_multiply_adds_of_the_official_graph(name):
    costs = count_costs(meta(name), torch.empty(1, 3, 224, 224, device="meta"))
    sums = {"pointwise": 0, "depthwise": 0, "gate": 0, "linear": 0}
    for cost in costs:
        kind = "pointwise" if cost.kind == "convolution" else cost.kind
        sums["gate" if "squeeze_excite" in cost.name else kind] += cost.multiply_adds
    assert sums == official_multiply_adds(f"mixnet-{name}")
    assert sum(sums.values()) == {"s": 239_173_360, "m": 339_172_672}[name]


@pytest.mark.parametrize(
    ("name", "classes", "decays", "rule", "printed"),
    [("s", 1000, 2, 256.46, 256), ("m", 1000, 2, 360.00, 360), ("m", 10, 2, 352.39, 352),
     ("l", 1000, 0, 565.08, 565)],
)  # fmt: skip
def test_what_the_paper_prints_as_flops(name, classes, decays, rule, printed):
    flops = paper_flops(meta(name, num_classes=classes), decays) / 1e6
    assert round(flops, 2) == rule
    assert abs(flops - printed) < 0.5


def test_torch_counts_alike(small):
    x = noise(1, 3, 64, 64)
    counted = sum(cost.multiply_adds for cost in count_costs(small, x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x)
    assert counter.get_total_flops() == 2 * counted


@pytest.mark.parametrize(("name", "rate"), [("s", 0.2), ("m", 0.25), ("l", 0.25)])
def test_official_defaults(name, rate):
    model = meta(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert model.drop_rate == rate
    assert model.num_classes == 1000
    assert model.num_features == 1536
    assert all(path.rate == 0 for path in model.modules() if isinstance(path, DropPath))
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert {type(conv).__name__ for conv in strided} == {"Conv2dSame"}
    assert isinstance(model.stem.activation, nn.ReLU)
    assert isinstance(model.head.activation, nn.ReLU)


def test_initial_distributions():
    torch.manual_seed(0)
    for name, layer in mixnet_m().named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
            ratio = float(layer.weight.detach().square().mean()) * fan_out / 2
            assert abs(ratio - 1) < 6 * (2 / layer.weight.numel()) ** 0.5, name
            assert layer.bias is None or not layer.bias.any(), name
        elif isinstance(layer, nn.Linear):
            largest = float(layer.weight.detach().abs().max())
            assert 0.999 * 1000**-0.5 < largest <= 1000**-0.5
            assert not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == 1).all())
            assert not layer.bias.any()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4, 2.0])
def test_widths(name, width):
    model: Any = meta(name, width_multiplier=width, num_classes=3)
    x = torch.empty(2, 3, 97, 130, device="meta")
    assert model(x).shape == (2, 3)
    assert model.num_features == 1536
    shapes = [(f.shape[1], *f.shape[2:]) for f in model.features(x)]
    assert shapes == [
        (info["num_chs"], -(-97 // int(info["reduction"])), -(-130 // int(info["reduction"])))
        for info in model.feature_info
    ]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    total = width * (1.3 if name == "l" else 1)
    config = MIXNET_S if name == "s" else MIXNET_M
    for block, run in zip(model.blocks, unroll(config), strict=True):
        exact = run.out_channels * total
        assert block.out_channels % 8 == 0
        assert 0.9 * exact <= int(block.out_channels) <= max(8, exact + 4 + 8)


def test_l_is_m_1_3_times_as_wide():
    assert replace(MIXNET_M, width_multiplier=1.3) == MIXNET_L
    assert [info["num_chs"] for info in meta("l").feature_info] == [32, 40, 56, 160, 264]


def test_api(small):
    x = noise(2, 3, 65, 50)
    with torch.no_grad():
        features = small.forward_features(x)
        assert features.shape == (2, 1536, 3, 2)
        pooled = small.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        torch.testing.assert_close(small(x), small.classifier(pooled))
        torch.testing.assert_close(small.forward_head(features), small(x))
        outputs = small.features(x)
        assert len(outputs) == len(small.feature_info)
        torch.testing.assert_close(small.head(outputs[-1]), features)
        bare = copy.deepcopy(small)
        bare.reset_classifier(0)
        torch.testing.assert_close(bare(x), pooled)
        bare.reset_classifier(4)
        assert bare(x).shape == (2, 4)
        assert mixnet_s(in_channels=5, num_classes=0)(noise(2, 5, 40, 40)).shape == (2, 1536)


def test_stochastic_depth_grows_and_dropout_follows_the_argument():
    model: Any = MixNet(TINY, drop_path_rate=0.4, drop_rate=0.1)
    assert [float(block.drop_path.rate) for block in model.blocks] == pytest.approx(
        [0.4 * i / 4 for i in range(4)]
    )
    assert model.drop_rate == 0.1
    assert MixNet(TINY).drop_rate == TINY.drop_rate
    assert MixNet(TINY, drop_rate=0.0).drop_rate == 0


def test_options_reach_every_layer():
    model = MixNet(TINY, padding="symmetric", norm_eps=1e-5, norm_momentum=0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    assert not any(type(m).__name__ == "Conv2dSame" for m in model.modules())


@pytest.mark.parametrize("config", [MIXNET_S, MIXNET_M], ids=["s", "m"])
def test_blocks_are_what_their_strings_say(config):
    runs = [decode_block(str(block)) for block in config.blocks]
    wanted = []
    for run in runs:
        wanted += [(run, run.in_channels, run.stride)]
        wanted += [(run, run.out_channels, 1)] * (run.repeats - 1)
    with torch.device("meta"):
        model = MixNet(config)
    for block, (run, channels, stride) in zip(model.blocks, wanted, strict=True):
        layers = dict(block.named_modules())
        mixed = layers["depthwise.conv"]
        assert isinstance(mixed, nn.Conv2d | MixConv2d)
        assert mixed.in_channels == channels * run.expand_ratio
        kernels = mixed.kernel_sizes if isinstance(mixed, MixConv2d) else mixed.kernel_size[:1]
        assert kernels == run.kernel_sizes
        assert mixed.stride == (stride, stride)
        project, expand = layers["project.conv"], layers.get("expand.conv")
        assert isinstance(project, nn.Conv2d)
        assert (project.out_channels, project.groups) == (run.out_channels, run.project_groups)
        assert (expand is None) == (run.expand_ratio == 1)
        assert not isinstance(expand, nn.Conv2d) or expand.groups == run.expand_groups
        gate = layers["squeeze_excite"]
        assert isinstance(gate, SqueezeExcite) == bool(run.squeeze_ratio)
        if isinstance(gate, SqueezeExcite):
            assert gate.squeeze.out_channels == int(channels * run.squeeze_ratio)
        kind = nn.SiLU if run.activation == "swish" else nn.ReLU
        assert isinstance(layers["depthwise.activation"], kind)


@pytest.mark.parametrize("name", MAKERS)
def test_halves_that_never_meet(name):
    """Gate aside, one half of blocks 4 to 6 does not reach the other; with it, it does."""
    model: Any = MAKERS[name]().double().eval()
    rows = nn.Sequential(*model.blocks[4:7])
    channels = unroll(CONFIGS[name])[4].in_channels
    x = noise(1, channels, 9, 9, dtype=torch.float64).requires_grad_()

    def reached(half: int) -> list[bool]:
        """Whether each half of the input reaches one half of the output."""
        output = rows(x).split(channels // 2, dim=1)[half]
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        return [bool(part.any()) for part in gradient.split(channels // 2, dim=1)]

    assert reached(0) == reached(1) == [True, True]
    for block in rows:
        block.squeeze_excite = nn.Identity()
    assert reached(0) == [True, False]
    assert reached(1) == [False, True]


# --- block strings ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", OFFICIAL)
def test_official_strings_round_trip(text):
    assert encode_block(decode_block(text)) == text


def test_a_string_by_hand():
    text = "r3_k3.5_a1.1_p1.1.1_s22_e4_i40_o80_se0.25_sw_noskip_dilated"
    assert decode_block(text) == BlockConfig(
        40, 80, (3, 5), 2, 4, 3, 2, 3, 0.25, "swish", False, True
    )  # fmt: skip


def test_generated_configurations_round_trip():
    choices = product(
        ((3,), (3, 5, 7, 9, 11)), (1, 2), (1, 6), (1, 12), (1, 2), (1, 3), (0.0, 0.25, 1.0),
        ("relu", "swish"), (True, False), (True, False),
    )  # fmt: skip
    for k, s, e, r, a, p, se, activation, skip, dilated in choices:
        config = BlockConfig(24, 40, k, s, e, r, a, p, se, activation, skip, dilated)
        assert decode_block(encode_block(config)) == config


def test_order_does_not_matter():
    words = ["r2", "k3.5", "a1", "p1", "s11", "e6", "i80", "o80", "se0.25", "sw", "noskip"]
    assert decode_block("_".join(reversed(words))) == decode_block("_".join(words))


GOOD = "r1_k3_a1_p1_s11_e1_i16_o16"


@pytest.mark.parametrize(
    ("text", "word", "right"),
    [
        ("", "''", "words begin with r, k"), (GOOD + "_zz", "'zz'", "words begin with r, k"),
        (GOOD + "_q3", "'q3'", "sw, noskip, dilated"), (GOOD + "_3", "'3'", "words begin"),
        (GOOD + "_", "''", "words begin"), (GOOD.upper(), "'R1'", "words begin"),
        (GOOD + "_r2", "'r2'", "r stands once"), (GOOD + "_sw_sw", "'sw'", "sw stands once"),
        (GOOD + "_sw1", "'sw1'", "followed by nothing"), (GOOD + " ", "'o16 '", "output channels"),
        (GOOD.replace("k3", "k3..5"), "'k3..5'", "odd kernel sizes"),
        (GOOD.replace("k3", "k3.x"), "'k3.x'", "odd kernel sizes"),
        (GOOD.replace("k3", "k"), "'k'", "odd kernel sizes"),
        (GOOD.replace("k3", "k3.4"), "'k3.4'", "odd kernel sizes"),
        (GOOD.replace("k3", "k³"), "'k³'", "odd kernel sizes"),
        (GOOD.replace("s11", "s12"), "'s12'", "the stride twice"),
        (GOOD.replace("s11", "s1"), "'s1'", "as in s22"),
        (GOOD.replace("s11", "s"), "'s'", "as in s22"),
        (GOOD.replace("s11", "s111"), "'s111'", "as in s22"),
        (GOOD.replace("s11", "s1.1"), "'s1.1'", "as in s22"),
        (GOOD.replace("s11", "s00"), "'s00'", "1 to 9"),
        (GOOD.replace("a1", "a3"), "'a3'", "a 1 for each group of the expansion"),
        (GOOD.replace("a1", "a11"), "'a11'", "as in a1 or a1.1"),
        (GOOD.replace("p1", "p1.3"), "'p1.3'", "a 1 for each group of the projection"),
        (GOOD.replace("r1", "r0"), "'r0'", "at least 1"), (GOOD.replace("r1", "r"), "'r'", "r2"),
        (GOOD.replace("r1", "r-1"), "'r-1'", "at least 1"),
        (GOOD.replace("e1", "e1.5"), "'e1.5'", "a whole number"),
        (GOOD.replace("e1", "e0"), "'e0'", "at least 1"),
        (GOOD.replace("i16", "i0"), "'i0'", "input channels, at least 1"),
        (GOOD.replace("o16", "o16.5"), "'o16.5'", "output channels, at least 1"),
        (GOOD + "_se0.5.5", "'se0.5.5'", "the squeeze ratio, 0 to 1"),
        (GOOD + "_se2", "'se2'", "0 to 1"), (GOOD + "_se1.5", "'se1.5'", "0 to 1"),
        (GOOD + "_se", "'se'", "as in se0.25"),
        ("r1_k3_a1_p1_s11_e1_i16", "has no o", "output channels"),
        ("k3_a1_p1_s11_e1_i16_o16", "has no r", "how many blocks"),
        ("r1_k3", "has no a (", "no p ("),
    ],
)  # fmt: skip
def test_bad_strings(text, word, right):
    """Each error quotes the string and the word, and says what would be right."""
    with pytest.raises(ValueError, match="block string") as caught:
        decode_block(text)
    for words in (repr(text), word, right):
        assert words in str(caught.value)


@pytest.mark.parametrize("other", [None, 3, b"r1_k3"])
def test_what_is_no_string_is_said_to_be_none(other):
    with pytest.raises(TypeError, match="block string is text"):
        decode_block(other)
    with pytest.raises(TypeError, match="block string is text"):
        unroll(MixNetConfig((other,), 16))


@pytest.mark.parametrize(
    "changes",
    [{"stride": 10}, {"stride": 0}, {"squeeze_ratio": 1e-5}, {"squeeze_ratio": 1.5},
     {"activation": "relu6"}, {"kernel_sizes": (3, 4)}, {"kernel_sizes": ()}, {"repeats": 0},
     {"expand_groups": 0}, {"in_channels": -1}, {"expand_ratio": 1.5}],
)  # fmt: skip
def test_what_would_not_read_back_is_not_written(changes):
    with pytest.raises(ValueError, match=r"block string|no words for"):
        encode_block(replace(BlockConfig(16, 16), **changes))


def test_lists_are_written_as_tuples_are():
    config = BlockConfig(16, 16, kernel_sizes=[3, 5])  # type: ignore[arg-type]
    assert decode_block(encode_block(config)).kernel_sizes == (3, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": (GOOD, "r1_k3_a1_p1_s11_e1_i24_o24")}, "follows.* 16 channels"),
        ({"blocks": (GOOD.replace("k3", "k4"),)}, "'k4'.*odd"),
        ({"blocks": (BlockConfig(16, 16, (4,)),)}, "kernel_sizes.*4"),
        ({"blocks": (BlockConfig(16, 16, squeeze_ratio=2),)}, "squeeze_ratio.*2"),
        ({"blocks": (BlockConfig(16, 16, repeats=0),)}, "repeats.*0"),
        ({"blocks": ()}, "number of blocks.*0"),
        ({"width_multiplier": 0}, "width_multiplier.*0"),
        ({"width_multiplier": -1.0}, "width_multiplier.*-1"),
        ({"drop_rate": 1.0}, "drop_rate.*1"),
    ],
)
def test_bad_configurations(changes, words):
    with pytest.raises(ValueError, match=words):
        MixNet(replace(MixNetConfig((GOOD,), 16), **changes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": -1}, "num_classes.*-1"),
        ({"drop_rate": -0.1}, "drop_rate.*-0.1"),
        ({"padding": "valid"}, "padding.*'valid'"),
        ({"drop_path_rate": 1.5}, "rate"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        MixNet(TINY, **options)


def test_timms_in_chans_is_an_error_that_names_ours():
    with pytest.raises(TypeError, match="in_channels=1"):
        MixNet(TINY, in_chans=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("rate", [-0.1, 1.05])
def test_a_bad_drop_path_rate_is_named_as_given(rate):
    with pytest.raises(ValueError, match=rf"drop_path_rate.*{rate}"):
        MixNet(TINY, drop_path_rate=rate)


@pytest.mark.parametrize("strides", [(1, 4), (2, 1), (3,), (2, 2), (1,)])
def test_feature_info_follows_any_strides(strides):
    blocks = tuple(GOOD.replace("s11", f"s{s}{s}").replace("r1", "r2") for s in strides)
    model = MixNet(MixNetConfig(blocks, 16))
    assert [block.stride for block in model.blocks] == [n for s in strides for n in (s, 1)]
    x = noise(1, 3, 96, 96)
    for output, info in zip(model.features(x), model.feature_info, strict=True):
        assert output.shape[1:3] == (info["num_chs"], 96 // int(info["reduction"]))


# --- what programs do to models ---------------------------------------------------------------


def test_any_size_down_to_one_pixel(small):
    with torch.no_grad():
        for size in ((1, 1), (31, 33), (32, 7)):
            assert small(noise(1, 3, *size)).shape == (1, 10)


def test_copies_compute_the_same(small):
    x = noise(2, 3, 48, 33)
    other = mixnet_s(num_classes=10).eval()
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        for twin in (other, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(x), small(x))
            assert twin.feature_info == small.feature_info


def test_types_and_formats(small):
    x = noise(2, 3, 64, 48)
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    half = copy.deepcopy(small).bfloat16()
    with torch.no_grad():
        wanted = small(x)
        scale = float(wanted.std())
        torch.testing.assert_close(
            last(x.to(memory_format=torch.channels_last)), wanted, atol=1e-5, rtol=1e-4
        )
        features = last.features(x.to(memory_format=torch.channels_last))
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = small(x)
        assert cast.dtype == torch.bfloat16
        assert float((cast.float() - wanted).abs().max()) < 0.2 * scale
        low = half(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert float((low.float() - wanted).abs().max()) < 0.3 * scale


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_fx_graph_runs_at_any_size(padding):
    model = MixNet(TINY, padding=padding, drop_path_rate=0.2).eval()
    graph = torch.fx.symbolic_trace(model)
    for size in ((32, 32), (17, 50)):
        x = noise(2, 3, *size)
        torch.testing.assert_close(graph(x), model(x))


def test_export_keeps_batch_and_size_free(small):
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(small, (noise(2, 3, 64, 96),), dynamic_shapes=(free,))
    with torch.no_grad():
        for shape in ((1, 3, 65, 90), (3, 3, 75, 64)):
            x = noise(*shape)
            torch.testing.assert_close(program.module()(x), small(x), atol=1e-5, rtol=1e-5)


def test_compile_has_no_graph_breaks(small):
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    x = noise(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x))


def test_one_step_of_training_reaches_every_parameter():
    model = MixNet(TINY, num_classes=5, drop_path_rate=0.1)
    model(noise(4, 3, 32, 32)).logsumexp(1).sum().backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None]
    assert not lost


# --- preprocessing ----------------------------------------------------------------------------


def test_preprocess_by_hand():
    image = torch.tensor([0.485, 0.456 + 0.224, 1.0]).view(1, 3, 1, 1)
    wanted = torch.tensor([0, 1, (1 - 0.406) / 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(preprocess(image), wanted)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 3), (1, 1, 4, 4)])
def test_preprocess_wants_rgb_batches(shape):
    with pytest.raises(ValueError, match=r"image must be \(N, 3, H, W\)"):
        preprocess(torch.zeros(shape))


def test_preprocess_refuses_integers():
    with pytest.raises((TypeError, ValueError), match="uint8"):
        preprocess(torch.full((1, 3, 2, 2), 128, dtype=torch.uint8))
