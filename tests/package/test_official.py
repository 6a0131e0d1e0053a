import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixconv import MixNet, MixNetConfig, load_official, mixnet_l, mixnet_m, mixnet_s
from mixconv.mixnet import MIXNET_S

from .common import DATA, noise, official_images, official_variables, same_state, snapshot

MAKERS = {"mixnet-s": mixnet_s, "mixnet-m": mixnet_m}
TRUTH: Mapping[str, Any] = np.load(DATA / "official.npz")


def loaded(name: str) -> MixNet:
    model = MAKERS[name]().eval()
    load_official(model, list(official_variables(name).values()))
    return model


def endpoints(model: MixNet, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    x = found["stem"] = model.stem(images)
    last, number = len(model.blocks) - 1, 0
    for index, block in enumerate(model.blocks):
        x = found[f"block_{index}"] = block(x)
        if index == last or int(model.blocks[index + 1].stride) > 1:  # type: ignore[arg-type]
            number += 1
            found[f"reduction_{number}"] = x
    found["logits"] = model(images)
    return found


@pytest.mark.parametrize("size", [(224, 224), (131, 170)], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_logits_and_every_endpoint(name, size):
    model, inside = loaded(name), dict[str, Tensor]()
    for index, block in enumerate(model.blocks):
        block.get_submodule("project").register_forward_pre_hook(
            lambda _module, args, index=index: inside.__setitem__(f"block_{index}", args[0])
        )
    with torch.no_grad():
        found = endpoints(model, official_images(*size))
    reductions = [i for i, b in enumerate(model.blocks) if i and int(b.stride) > 1]  # type: ignore[arg-type]
    for number, index in enumerate([*reductions, len(model.blocks)], 1):
        found[f"reduction_{number}.expansion_output"] = inside[f"block_{index - 1}"]
    key = f"{name}_{size[0]}x{size[1]}|"
    truth = {k.removeprefix(key): TRUTH[k] for k in TRUTH if k.startswith(key)}
    torch.testing.assert_close(
        found["logits"], torch.from_numpy(truth["logits"]), atol=1e-5, rtol=0
    )
    names = [str(n) for n in np.atleast_1d(truth["names"])]
    assert len(names) > 20
    for place, end in enumerate(names):
        flat = found[end].permute(0, 2, 3, 1).contiguous()
        assert list(flat.shape) == [int(n) for n in truth["shape"][place]], end
        flat = flat.flatten().double()
        pairs = [
            (torch.stack([flat.mean(), flat.std(correction=0)]), truth["mean_std"][place]),
            (flat[:16], truth["first16"][place]),
            (flat[-16:], truth["last16"][place]),
        ]
        for ours, theirs in pairs:
            official = torch.as_tensor(theirs, dtype=torch.double)
            torch.testing.assert_close(ours, official, atol=1e-5, rtol=1e-6, msg=end)


# --- names ------------------------------------------------------------------------------------


def per_scope(name: str) -> str:
    """The name as `tf.layers` writes it: no model scope, convolutions counted in each scope."""
    return name.replace("/mixnet_model", "")


def checkpoint(name: str, *, suffix: str, noisy: bool, averages: bool) -> dict[str, np.ndarray]:
    """A shuffled checkpoint with what training leaves in one."""
    mapping: dict[str, np.ndarray] = {}
    for full, value in official_variables(name).items():
        plain = full.removesuffix(":0")
        mapping[plain + suffix] = value + 1 if averages else value
        if averages:
            mapping[f"{plain}/ExponentialMovingAverage{suffix}"] = value
        if noisy and "moving" not in plain:
            mapping[f"{plain}/RMSProp{suffix}"] = value * 0
            mapping[f"{plain}/RMSProp_1{suffix}"] = value * 0
            mapping[f"{plain}/Momentum{suffix}"] = value * 0
    if noisy:
        mapping["global_step" + suffix] = np.asarray(7)
    items = list(mapping.items())
    random.Random(3).shuffle(items)
    return dict(items)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "options",
    [
        {"suffix": ":0", "noisy": False, "averages": False},
        {"suffix": "", "noisy": True, "averages": False},
        {"suffix": "", "noisy": True, "averages": True},
        {"suffix": ":0", "noisy": True, "averages": True},
    ],
    ids=str,
)
def test_by_name(name, options):
    model = MAKERS[name]()
    load_official(model, checkpoint(name, **options))
    assert same_state(model, snapshot(loaded(name)))


@pytest.mark.parametrize("first", [0, 1, 500])
def test_layers_that_are_counted_in_each_scope(first):
    """`use_keras=False` and a second graph number convolutions differently."""
    counts: dict[tuple[str, str], int] = {}
    seen: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        scope, layer = match[1], match[0]
        if layer not in seen:
            number = counts.get((scope, "conv2d"), first)
            counts[scope, "conv2d"] = number + 1
            seen[layer] = f"{scope}/conv2d" + (f"_{number}" if number else "")
        return seen[layer]

    renamed = {
        re.sub(r"([\w/-]+)/conv2d(_\d+)?(?=/)", renumber, per_scope(full)): value
        for full, value in official_variables("mixnet-s").items()
    }
    assert len(renamed) == len(official_variables("mixnet-s"))
    model = mixnet_s()
    load_official(model, dict(reversed(renamed.items())))
    assert same_state(model, snapshot(loaded("mixnet-s")))


def test_an_npz_file_is_a_mapping(tmp_path):
    variables = {name.removesuffix(":0"): v for name, v in official_variables("mixnet-s").items()}
    np.savez(tmp_path / "weights.npz", **variables)  # type: ignore[arg-type]
    model = mixnet_s()
    with np.load(tmp_path / "weights.npz") as file:
        load_official(model, file)
    assert same_state(model, snapshot(loaded("mixnet-s")))


# --- errors -----------------------------------------------------------------------------------


def broken(kind: str) -> Any:
    variables = official_variables("mixnet-s")
    values = list(variables.values())
    if kind == "none":
        return []
    if kind == "short":
        return values[:-1]
    if kind == "long":
        return [*values, values[-1]]
    if kind == "other network":
        return official_variables("mixnet-m")
    if kind == "missing name":
        return dict(list(variables.items())[1:])
    if kind == "extra name":
        return variables | {"mixnet-s/mixnet_model/stem/conv2d_99/kernel:0": values[0]}
    if kind == "strange names":
        return {f"layer-{i}": v for i, v in enumerate(values)}
    if kind == "wrong shape":
        return [*values[:-1], values[-1][:-1]]
    if kind == "wrong rank":
        return [*values[:-1], values[-1][None]]
    return [values[1], values[0], *values[2:]]  # swapped


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "got 0"), ("short", "got"), ("long", "got"), ("other network", "blocks_"),
        ("missing name", "stem/conv2d"), ("extra name", "stem/conv2d"),
        ("strange names", "stem"), ("swapped", r"\(16,\)"),
        ("wrong shape", r"\(999,\).*\(1000,\)"), ("wrong rank", r"\(1, 1000\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(kind, words):
    model = mixnet_s()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        load_official(model, broken(kind))
    assert same_state(model, before)


# --- other widths -----------------------------------------------------------------------------


def tensorflow_shapes(model: MixNet) -> list[tuple[int, ...]]:
    """Official shapes in creation order, read off the modules by their names."""
    shapes: list[tuple[int, ...]] = []
    for _, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            shapes += [(layer.num_features,)] * 4
        elif isinstance(layer, nn.Linear):
            shapes += [(layer.in_features, layer.out_features), (layer.out_features,)]
        elif isinstance(layer, nn.Conv2d):
            k, groups = layer.kernel_size, layer.groups
            if groups == layer.in_channels:
                shapes.append((*k, groups, 1))
            else:
                shape = (*k, layer.in_channels // groups, layer.out_channels // groups)
                shapes += [shape] * groups
            shapes += [(layer.out_channels,)] * (layer.bias is not None)
    return shapes


@pytest.mark.parametrize(("maker", "width"), [(mixnet_s, 0.35), (mixnet_l, 1.0), (mixnet_m, 1.4)])
def test_other_widths(maker, width):
    model: Any = maker(width_multiplier=width, num_classes=11)
    shapes = tensorflow_shapes(model)
    values = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    load_official(model, values)
    stem = values[0].permute(3, 2, 0, 1)
    assert torch.equal(model.stem.conv.weight, stem)
    assert torch.equal(model.classifier.weight, values[-2].T)
    assert torch.equal(model.head.norm.running_var, values[-3])
    held = torch.cat([t.flatten() for n, t in model.state_dict().items() if "batches" not in n])
    given = torch.cat([value.flatten() for value in values])
    assert torch.equal(held.sort().values, given.sort().values)  # each once, none left over


def test_kernels_are_told_by_where_they_stand():
    """A 1×1 of as many groups as channels has the shape of a depthwise kernel."""
    model: Any = MixNet(MixNetConfig(("r1_k3_a1.1_p1.1_s11_e2_i2_o2",), 2, 4), num_classes=0)
    block = [(1, 1, 1, 2)] * 2 + [(4,)] * 4 + [(3, 3, 4, 1)] + [(4,)] * 4 + [(1, 1, 2, 1)] * 2
    shapes = [(3, 3, 3, 2), *[(2,)] * 4, *block, *[(2,)] * 4, (1, 1, 2, 4), *[(4,)] * 4]
    values = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    load_official(model, values)
    for group, value in zip(model.blocks[0].expand.conv.weight.chunk(2), values[5:7], strict=True):
        assert torch.equal(group, value.permute(3, 2, 0, 1))
    assert torch.equal(model.blocks[0].depthwise.conv.weight, values[11].permute(2, 3, 0, 1))


def test_without_a_classifier_there_are_two_variables_fewer():
    variables = list(official_variables("mixnet-s").values())
    model: Any = MixNet(MIXNET_S, num_classes=0)
    load_official(model, variables[:-2])
    assert torch.equal(model.head.norm.running_var, torch.from_numpy(variables[-3]))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_number_types(dtype):
    variables = [value.astype(dtype) for value in official_variables("mixnet-s").values()]
    model = mixnet_s()
    load_official(model, variables)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(loaded("mixnet-s").state_dict()), atol=1e-2, rtol=1e-3
    )
