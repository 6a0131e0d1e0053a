"""What the package promises without saying it again: defaults, and data that does not change."""

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import mixconv

# Each public function, class and method that has defaults. Whoever changes one changes what
# other people's code does: it is a change to say in the release, and here.
DEFAULTS = """
__main__.main: arguments=None
__main__.parse: arguments=None
__main__.read_image: normalise=preprocess
blocks.ConvNormActivation: norm_layer=BatchNorm2d, activation='relu'
blocks.DepthwiseSeparableBlock: kernel_sizes=(3,), stride=1, partition='equal', dilated=False,
    padding='symmetric', activation='relu', norm_layer=BatchNorm2d
blocks.DropPath: rate=0.0
blocks.MixConvBlock: kernel_sizes=(3,), stride=1, expand_ratio=6, expand_groups=1,
    project_groups=1, squeeze_ratio=0.0, partition='equal', dilated=False, padding='symmetric',
    activation='relu', norm_layer=BatchNorm2d, drop_path_rate=0.0, skip=True, dilation=1
blocks.SqueezeExcite: activation='relu'
blocks.make_depthwise: stride=1, partition='equal', dilated=False, padding='symmetric',
    dilation=1
counting.paper_flops: size=224
efficientnet_lite.efficientnet_lite0: weights=None, num_classes=1000
exercises.attempt: wrong=()
fast.describe.BlockParts: expand=(), squeeze=(), excite=(), residual=False
fast.folding.FoldedNorm.train: mode=True
fast.forms.Call: parameters=()
fast.forms.Forms: check=<lambda>
fast.fuse.fuse_for_inference: backend='auto', memory_format=torch.channels_last
fast.fused_layer.FusedModule.train: mode=True
fast.fused_layer.describe_mix: activation='none'
fast.operation.mixed_depthwise2d: bias=None, stride=1, dilations=None, padding='symmetric',
    activation='none'
fast.plan.cut_strips: part=0
fast.report.Piece: after='', reason=''
fast.trial.difference: random=False
fast.trial.make_image: batch=1
formulation.mixconv_loops: channel_multiplier=1
formulation.mixconv_multiply_adds: channel_multiplier=1
formulation.mixconv_parameters: channel_multiplier=1
formulation.mixconv_reference: channel_multiplier=1
formulation.receptive_field: strides=None, dilations=None
heirs.ConvRelPosEnc: heads=(2, 3, 3), sizes=(3, 5, 7)
heirs.InceptionDWConv2d: side=3, band=11, ratio=0.125
heirs.MultiHeadMixedConv: heads=4, expand_ratio=2
heirs.MultiOrderDWConv: split=(1, 3, 4)
heirs.PartialConv2d: divide=4
heirs.trace_wires: size=13
layer.Conv2dSame: stride=1, padding=0, dilation=1, groups=1, bias=True, padding_mode='zeros',
    device=None, dtype=None
layer.MixConv2d: stride=1, partition='equal', dilated=False, padding='symmetric',
    channel_multiplier=1, bias=False, dilation=1, device=None, dtype=None
layer.embed_kernel: dilation=(1, 1)
layer.make_conv2d: stride=1, dilation=1, groups=1, bias=False, padding='symmetric', device=None,
    dtype=None
layer.make_pointwise: groups=1, bias=False
layer.same_padding: stride=1, dilation=1
mixnet.BlockConfig: kernel_sizes=(3,), stride=1, expand_ratio=6, repeats=1, expand_groups=1,
    project_groups=1, squeeze_ratio=0.0, activation='relu', skip=True, dilated=False
mixnet.MixNet: num_classes=1000, in_channels=3, width_multiplier=1.0, drop_rate=None,
    drop_path_rate=0.0, padding='same', norm_eps=0.001, norm_momentum=0.01, output_stride=32
mixnet.MixNetConfig: head_channels=1536, drop_rate=0.2, width_multiplier=1.0, activation='relu'
mobilenet.mobilenet_v1: kernel_sizes=(3,), num_classes=1000, in_channels=3,
    width_multiplier=1.0, partition='equal', dilated=False, padding='symmetric', drop_rate=0.0
mobilenet.mobilenet_v2: kernel_sizes=(3,), num_classes=1000, in_channels=3,
    width_multiplier=1.0, partition='equal', dilated=False, padding='symmetric', drop_rate=0.2,
    drop_path_rate=0.0
network.ConvNet: num_classes=1000, drop_rate=0.0
network.ConvNet.forward_head: pre_logits=False
network.ConvNet.set_grad_checkpointing: enable=True
network.ConvNet.forward_intermediates: indices=None, intermediates_only=False
network.round_channels: multiplier=1.0, divisor=8
partition.partition_channels: method='equal'
partition.resolve_partition: partition='equal'
receptive_fields.effective_receptive_field: layer='', size=None, images=8, seed=0, channels=None
receptive_fields.energy_curve: centre=None
receptive_fields.energy_square: centre=None
receptive_fields.theoretical_receptive_field: layer='', size=224, channels=None
surgery.Replacement: after='', exact=False, reason=''
surgery.ReplacementReport: layers=<factory>
surgery.replace_depthwise: partition='equal', dilated=False, padding=None,
    keep_center_weights=True, crop=False
teaching.photograph: size=224
teaching.show: caption='', live=None
weights.fill: calls=2
zoo.mixnet_l: weights=None, num_classes=None, in_channels=None, width_multiplier=1.0,
    drop_rate=None, drop_path_rate=0.0, padding=None, norm_eps=None, norm_momentum=None,
    output_stride=32
zoo.mixnet_m: weights=None, num_classes=None, in_channels=None, width_multiplier=1.0,
    drop_rate=None, drop_path_rate=0.0, padding=None, norm_eps=None, norm_momentum=None,
    output_stride=32
zoo.mixnet_s: weights=None, num_classes=None, in_channels=None, width_multiplier=1.0,
    drop_rate=None, drop_path_rate=0.0, padding=None, norm_eps=None, norm_momentum=None,
    output_stride=32
zoo.mixnet_xl: weights=None, num_classes=None, in_channels=None, width_multiplier=1.0,
    drop_rate=None, drop_path_rate=0.0, padding=None, norm_eps=None, norm_momentum=None,
    output_stride=32
"""

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(mixconv.__path__, "mixconv.")
]


def public(module: ModuleType) -> list[tuple[str, object]]:
    """What a module defines under a public name, and the methods of its classes."""
    name = module.__name__.removeprefix("mixconv.")
    found = []
    for key in getattr(module, "__all__", []):
        value = getattr(module, key)
        if callable(value) and getattr(value, "__module__", "") == module.__name__:
            found.append((f"{name}.{key}", value))
            inside = vars(value).items() if inspect.isclass(value) else ()
            found += [
                (f"{name}.{key}.{method}", function)
                for method, function in inside
                if inspect.isfunction(function) and not method.startswith("_")
            ]
    return found


def defaults_of(function: object) -> str:
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    except ValueError:  # an exception's own is unknown
        return ""
    given = [p for p in parameters if p.default is not p.empty]
    return ", ".join(f"{p.name}={getattr(p.default, '__name__', repr(p.default))}" for p in given)


def test_defaults_are_as_promised():
    now = {name: told for m in MODULES for name, v in public(m) if (told := defaults_of(v))}
    lines = DEFAULTS.replace("\n    ", " ").strip().splitlines()
    assert now == {name: told for name, _, told in (line.partition(": ") for line in lines)}


def test_records_do_not_change():
    """A configuration may be a key, or shared by two networks."""
    kinds = {
        kind
        for module in MODULES
        for name, kind in public(module)
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind)
    }
    assert {kind.__name__ for kind in kinds} == {
        "BlockConfig", "FusionReport", "LayerCost", "MixNetConfig", "Replacement",
        "ReplacementReport",
    }  # fmt: skip
    for kind in kinds:
        fields = dataclasses.fields(kind)
        record = kind(**{field.name: () for field in fields})
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, fields[0].name, None)
