"""Figures that answer back: their settings, and their arithmetic against the package's."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
import torch

from mixconv import MixConv2d
from mixconv._readable import CONTRAST, _contrast
from mixconv.formulation import (
    count_costs,
    mixconv_multiply_adds,
    mixconv_parameters,
    receptive_field,
)
from mixconv.layer import make_conv2d, make_pointwise, same_padding
from mixconv.mixnet import MIXNET_L, MIXNET_M, MIXNET_S, MixNet, unroll
from mixconv.partition import partition_channels
from mixconv.teaching import KERNEL_COLORS, live
from mixconv.widgets import Blocks, Convolution, Mix

HERE = Path(__file__).parent
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the path")


def answers(calls):
    """What the JavaScript functions return: one result for each (module, function, arguments)."""
    done = subprocess.run(
        ["node", HERE / "answers.mjs"],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_javascript_passes_its_own_tests(path):
    done = subprocess.run(["node", "--test", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "# pass 0" not in done.stdout


@needs_node
def test_a_colour_means_the_same_size_in_every_figure():
    sizes = [*KERNEL_COLORS, 15]
    colors = answers([["parts", "kernelColor", [k]] for k in sizes])
    assert colors == [*KERNEL_COLORS.values(), "#777777"]


def settings_of(widget):
    return {name: getattr(widget, name) for name in widget.choices}


def drawn(settings):
    """The layer that a Convolution shows, and its image."""
    size, sizes = settings["size"], settings["kernel_sizes"]
    options = {"padding": settings["padding"], "dilation": settings["dilation"]}
    kernels = sizes if settings["layer"] == "MixConv" else sizes[:1] * 2
    if settings["layer"] == "convolution":
        convs = [make_conv2d(2, 2, sizes[0], settings["stride"], **options)]
    else:
        convs = MixConv2d(2, kernels, settings["stride"], **options)._convolutions()
    for channel, k in enumerate(kernels):
        counted = torch.arange(1.0, k * k + 1).view(k, k)
        counted = counted.flip(0, 1) if channel else counted
        values = torch.ones(k, k) if settings["weights"] == "ones" else counted
        own = convs[0].weight[channel] if len(convs) == 1 else convs[channel].weight[0]
        own.data.copy_(values.expand_as(own))
    image = torch.stack([torch.arange(float(size * size)).view(size, size), torch.ones(size, size)])
    outputs = convs[0](image) if len(convs) == 1 else torch.cat(
        [conv(image[i : i + 1]) for i, conv in enumerate(convs)]
    )  # fmt: skip
    weights = sum(conv.weight.numel() for conv in convs)
    return outputs.detach(), weights


def all_settings():
    choices = Convolution().choices
    names = ["layer", "size", "stride", "padding", "dilation", "weights"]
    for values in itertools.product(*(choices[name] for name in names)):
        for kernel_sizes in ([3, 5], [7, 1]):
            yield {**dict(zip(names, values, strict=True)), "kernel_sizes": kernel_sizes}


@needs_node
def test_the_convolution_computes_what_the_layers_do():
    cases = [(settings, *drawn(settings)) for settings in all_settings()]
    calls: list[object] = []
    wanted: list[object] = []
    for settings, outputs, weights in cases:
        _, rows, columns = outputs.shape
        places = [(0, 0, 0), (1, 0, columns - 1), (0, rows // 2, 0), (1, rows - 1, columns // 2)]
        calls += [["convolution", "output", [settings, *place]] for place in places]
        wanted += [int(outputs[place]) for place in places]
        calls.append(["convolution", "cost", [settings]])
        wanted.append({"weights": weights, "multiplyAdds": weights * rows * columns})
        k = settings["kernel_sizes"][0]
        calls.append(["convolution", "outputSize", [settings, k]])
        wanted.append(rows)
    assert len(cases) == 576
    assert answers(calls) == wanted
    settings, outputs, _ = cases[0]
    every = [
        ["convolution", "output", [settings, *i]]
        for i in itertools.product(*map(range, outputs.shape))
    ]
    assert answers(every) == outputs.flatten().int().tolist()


@needs_node
def test_the_convolution_pads_and_counts_as_the_package_does():
    axes = list(itertools.product((5, 6, 7, 8), (1, 3, 5, 7), (1, 2, 3), (1, 2)))
    names = ("size", "stride", "dilation", "padding")
    calls = [
        ["convolution", "zeros", [dict(zip(names, (n, s, d, "same"), strict=True)), k]]
        for n, k, s, d in axes
    ]
    assert answers(calls) == [list(same_padding(*axis)) for axis in axes]
    settings = settings_of(Convolution())
    (cost,) = answers([["convolution", "cost", [settings]]])
    assert cost["weights"] == mixconv_parameters((1, 1), (3, 5))
    assert cost["multiplyAdds"] == mixconv_multiply_adds((1, 1), (3, 5), 5, 5)


def split(channels, sizes, method):
    try:
        return list(partition_channels(channels, sizes, method))
    except ValueError:
        return None


@needs_node
def test_the_mix_is_split_as_the_package_splits_it():
    sizes = [s for n in range(1, 7) for s in itertools.combinations(KERNEL_COLORS, n)]
    methods = ("equal", "exponential", "logarithmic")
    cases = list(itertools.product((*range(1, 20), 32, 37, 120, 240, 384), sizes, methods))
    found = answers([["mix", "partition", list(case)] for case in cases])
    assert found == [split(*case) for case in cases]
    assert found.count(None) > 100
    splits = [(p, case[1]) for p, case in zip(found, cases, strict=True) if p]
    costs = answers([["mix", "cost", [*one, 14]] for one in splits])
    assert [cost["weights"] for cost in costs] == [mixconv_parameters(*one) for one in splits]
    assert [c["multiplyAdds"] for c in costs] == [
        mixconv_multiply_adds(*one, 14, 14) for one in splits
    ]
    stacks = [(k, n) for k in sizes for n in (1, 2, 5)]
    fields = answers([["mix", "field", list(stack)] for stack in stacks])
    assert fields == [receptive_field([max(k)] * n) for k, n in stacks]


NETWORKS = {"S": MIXNET_S, "M": MIXNET_M, "L": MIXNET_L}


@needs_node
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [224, 160])
def test_the_blocks_cost_what_the_network_costs(name, size):
    with torch.device("meta"):
        model = MixNet(NETWORKS[name])
        costs = count_costs(model, torch.zeros(1, 3, size, size))
    blocks = [asdict(block) for block in unroll(NETWORKS[name])]
    (sides,) = answers([["blocks", "sides", [blocks, size]]])
    calls = list(zip(blocks, sides, strict=False))
    found = answers([["blocks", "layers", list(call)] for call in calls])
    for index, layers in enumerate(found):
        wanted = [cost for cost in costs if cost.name.startswith(f"blocks.{index}.")]
        assert [
            (one["parameters"], one["multiplyAdds"], one["to"], one["side"]) for one in layers
        ] == [(c.parameters, c.multiply_adds, c.output_shape[1], c.output_shape[2]) for c in wanted]
        convs = [cast("torch.nn.Conv2d", model.get_submodule(cost.name)) for cost in wanted]
        assert [(one["groups"], one["kernel"]) for one in layers] == [
            (conv.groups, conv.kernel_size[0]) for conv in convs
        ]
    shortcuts = answers([["blocks", "residual", [block]] for block in blocks])
    assert shortcuts == [block.has_residual for block in model.blocks]


@needs_node
def test_the_wires_of_a_grouped_layer_are_those_drawn():
    layer = make_pointwise(12, 24, groups=3)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: layer(v.view(1, 12, 1, 1)).flatten(), torch.ones(12)
    )
    drawn = torch.zeros(24, 12, dtype=torch.bool)
    (wires,) = answers([["blocks", "wires", [12, 24, 3]]])
    for one in wires:
        (left, right), (low, high) = one["from"], one["to"]
        drawn[low : high + 1, left : right + 1] = True
    assert torch.equal(jacobian != 0, drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": {}}, r"^networks must hold a network, and each a block, got \{\}$"),
        ({"networks": {"S": []}}, "^networks must hold a network, and each a block"),
        ({"network": "XL"}, r"^network must be one of \['S'\], got 'XL'$"),
        ({"block": 16}, r"^block must be one of \[0, 1, .*, 15\], got 16$"),
        ({"size": 200}, "^size must be one of "),
    ],
)
def test_a_wrong_block_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Blocks(**{"networks": {"S": unroll(MIXNET_S)}, **settings})


def test_another_network_keeps_to_its_own_blocks():
    widget = Blocks({name: unroll(config) for name, config in NETWORKS.items()}, block=2)
    assert (widget.network, widget.block) == ("S", 2)
    widget.set_state({"network": "M", "block": 18})  # one message: S has no block 18
    assert (widget.network, widget.block) == ("M", 18)
    with pytest.raises(ValueError, match="got 19"):
        widget.block = 19


@needs_node
def test_ink_can_be_read_on_every_colour():
    inks = answers([["parts", "kernelInk", [k]] for k in KERNEL_COLORS])
    for color, ink in zip(KERNEL_COLORS.values(), inks, strict=True):
        on_white = _contrast(color)
        assert (on_white if ink == "white" else 21 / on_white) >= CONTRAST, color


def test_the_mix_offers_the_sides_of_mixnets_maps():
    """Of 224×224 pixels, at each of the five strides."""
    assert Mix.side.choices == tuple(224 // stride for stride in (32, 16, 8, 4, 2))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kernel_sizes": ()}, ValueError, "^kernel_sizes must be of .*, at least one, "),
        ({"kernel_sizes": (5, 3)}, ValueError, r"in this order, got \(5, 3\)$"),
        ({"kernel_sizes": (3, 3)}, ValueError, "each once"),
        ({"kernel_sizes": (3, 4)}, ValueError, "got 4$"),
        ({"kernel_sizes": "357"}, TypeError, "kernel_sizes must be a sequence"),
        ({"channels": 0}, ValueError, "channels must be one of "),
        ({"channels": 32.0}, TypeError, "channels must be one of "),
    ],
)
def test_a_wrong_mix_is_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        Mix(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stride": 4}, ValueError, r"^stride must be one of \(1, 2, 3\), got 4$"),
        ({"stride": True}, TypeError, r"^stride must be one of \(1, 2, 3\), got True$"),
        ({"stride": "1"}, TypeError, "got '1'"),
        ({"padding": "valid"}, ValueError, r"^padding must be one of \('symmetric', 'same'\)"),
        ({"kernel_sizes": (3,)}, ValueError, r"^kernel_sizes must be 2 numbers, got \(3,\)$"),
        (
            {"kernel_sizes": (3, 4)},
            ValueError,
            r"^kernel_sizes must be one of \(1, 3, 5",
        ),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence"),
        ({"strid": 1}, TypeError, r"^Convolution has .*stride, weights, not strid$"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        Convolution(**settings)
    with pytest.raises(error):
        live("Convolution", **settings)
    if "strid" not in settings:
        widget = Convolution()
        for name, value in settings.items():
            with pytest.raises(error, match=message):
                setattr(widget, name, value)
        assert settings_of(widget) == settings_of(Convolution())


def test_settings_are_told_to_the_browser_and_come_back():
    widget = live("Convolution", kernel_sizes=(5, 1), stride=2)
    state = widget.get_state()
    assert (state["kernel_sizes"], state["stride"], state["layer"]) == ((5, 1), 2, "MixConv")
    assert state["choices"]["padding"] == ["symmetric", "same"]
    widget.set_state({"kernel_sizes": [7, 3], "row": 4})  # a message from the browser
    assert (widget.kernel_sizes, widget.row) == ((7, 3), 4)
    assert repr(widget).startswith(
        "Convolution(channel=0, column=0, dilation=1, kernel_sizes=(7, 3)"
    )


def test_the_browser_gets_one_module_that_imports_nothing():
    blocks = Blocks({"S": unroll(MIXNET_S)})
    for module in (blocks._esm, Convolution()._esm, Mix()._esm):
        assert "import" not in module
        assert "http" not in module.replace("http://www.w3.org/2000/svg", "")  # a name, no address
        assert module.count("export default") == 1
        assert "function element(" in module


def test_without_anywidget_the_figure_stands_still(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mixconv.widgets")
    monkeypatch.setitem(sys.modules, "anywidget", None)
    assert live("Convolution") is None
    words = "This figure stands still: anywidget is not installed (pip install anywidget).\n"
    assert capsys.readouterr().out == words


def test_the_package_and_its_tools_do_not_import_it():
    program = "import sys, mixconv, mixconv.teaching; print('anywidget' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"
