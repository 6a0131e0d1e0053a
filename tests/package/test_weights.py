"""Weights under our names and timm's: in, out, and what does not fit."""

import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from mixconv import MixNet, MixNetConfig, fuse_for_inference, load_weights, mixnet_s, to_timm

from .common import TINY, noise, randomize, same_state, snapshot


def tiny(seed: int = 1, **options: Any) -> MixNet:
    model = MixNet(TINY, **({"num_classes": 7} | options))
    randomize(model, seed)
    return model


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrappings(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict as training scripts save it; `other` is what must not be taken."""
    return {
        "bare": state,
        "ordered": OrderedDict(state),
        "state_dict": {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        "model": {"model": state, "args": {"lr": 1}},
        "model_state_dict": {"model_state_dict": state},
        "net": {"net": state, "acc": 71.0},
        "twice": {"checkpoint": 1, "model": {"params": state}},
        "model_ema": {"model": other, "model_ema": state},
        "lightning": {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1}},
        "counted": {**state, "n_averaged": torch.tensor(3), "blocks.0.total_ops": torch.zeros(1)},
        "average": {"state_dict": other, "state_dict_ema": state},
        "distributed": prefixed(state, "module."),
        "wrapped distributed": {"state_dict": prefixed(state, "module.")},
    }


@pytest.mark.parametrize("kind", wrappings({}, {}))
@pytest.mark.parametrize("names", ["ours", "timm"])
def test_files_and_wrappings(kind, names, tmp_path):
    source, other = tiny(), tiny(2)
    states = [dict(m.state_dict()) if names == "ours" else to_timm(m) for m in (source, other)]
    path = tmp_path / "weights.pth"
    torch.save(wrappings(states[0], states[1])[kind], path)
    for where in (path, str(path)):
        model = tiny(3)
        load_weights(model, where)
        assert same_state(model, snapshot(source))
    model = tiny(3)
    load_weights(model, wrappings(states[0], states[1])[kind])
    assert same_state(model, snapshot(source))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_compiled_models(prefix):
    source, model = tiny(), tiny(2)
    load_weights(model, prefixed(dict(source.state_dict()), prefix))
    assert same_state(model, snapshot(source))


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_models_that_are_compiled_or_data_parallel(wrap):
    source, model = tiny(), tiny(2)
    load_weights(wrap(model), source.state_dict())
    assert same_state(model, snapshot(source))
    assert to_timm(wrap(source)).keys() == to_timm(source).keys()


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.DataParallel(torch.nn.ReLU())])
def test_other_models_are_refused(model):
    for function in (to_timm, lambda model: load_weights(model, {})):
        with pytest.raises(TypeError, match=f"must be a MixNet, got {type(model).__name__}"):
            function(model)


def test_a_model_of_other_settings_is_told():
    source = tiny()
    with pytest.warns(UserWarning, match="want padding='same', the model has 'symmetric'") as seen:
        load_weights(MixNet(TINY, num_classes=7, padding="symmetric"), source.state_dict())
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match=r"want norm_eps=0\.001, the model has 0\.5"):
        load_weights(MixNet(TINY, num_classes=7, norm_eps=0.5), to_timm(source))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_a_stem_for_other_colors_sees_grey_as_it_was(channels):
    """A grey picture in every channel gives what it gave in red, green and blue."""
    source, model = tiny(), MixNet(TINY, num_classes=7, in_channels=channels)
    load_weights(model, source.state_dict())
    grey = torch.rand(1, 1, 8, 8)
    convs: list[Any] = [network.stem.conv for network in (model, source)]
    seen = convs[0](grey.expand(1, channels, 8, 8))
    wanted = convs[1](grey.expand(1, 3, 8, 8))
    if channels == 1 or channels % 3 == 0:
        torch.testing.assert_close(seen, wanted)
    assert seen.shape == wanted.shape
    weight = convs[1].weight
    kinds = {1: weight.sum(1, keepdim=True), 2: weight[:, :2] * 1.5}
    kinds |= {4: weight[:, [0, 1, 2, 0]] * 0.75, 7: weight[:, [0, 1, 2, 0, 1, 2, 0]] * 3 / 7}
    torch.testing.assert_close(convs[0].weight, kinds[channels])


def strange(kind: str, tensor: Tensor) -> Tensor:
    return {
        "sparse": tensor.to_sparse(), "complex": tensor.to(torch.complex64),
        "integer": tensor.to(torch.int32), "meta": tensor.to("meta"), "bool": tensor != 0,
    }[kind]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "complex", "integer", "meta", "bool"])
@pytest.mark.parametrize("name", ["classifier.weight", "stem.conv.weight", "head.norm.bias"])
def test_what_is_no_dense_numbers_changes_nothing(kind, name):
    model, state = tiny(2), dict(tiny().state_dict())
    state[name] = strange(kind, state[name])
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"no dense numbers: {name}"):
        load_weights(model, state)
    assert same_state(model, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_tensor_without_a_shape_changes_nothing():
    model, state = tiny(2), dict(tiny().state_dict())
    first, second, *_ = state["head.conv.weight"]
    state["head.conv.weight"] = torch.nested.nested_tensor([first, second])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no dense numbers: head\.conv\.weight"):
        load_weights(model, state)
    assert same_state(model, before)


def test_timm_names():
    state = to_timm(tiny())
    assert state["conv_stem.weight"].shape == (8, 3, 3, 3)
    assert state["blocks.0.0.conv_pw.weight"].shape == (8, 8, 1, 1)
    assert state["blocks.1.1.conv_pw.1.weight"].shape == (24, 8, 1, 1)
    assert state["blocks.1.0.conv_dw.1.weight"].shape == (12, 1, 5, 5)
    assert state["blocks.1.0.se.conv_reduce.bias"].shape == (4,)
    assert state["blocks.2.0.conv_pwl.weight"].shape == (24, 32, 1, 1)
    assert state["bn2.weight"].shape == (32,)
    assert state["classifier.weight"].shape == (7, 32)
    assert len(state) == len(set(state))


def test_timm_tensors_are_copies():
    model = tiny()
    before = snapshot(model)
    for tensor in to_timm(model).values():
        tensor.zero_()
    assert same_state(model, before)


def test_timm_stages_do_not_depend_on_the_width():
    narrow = to_timm(mixnet_s(width_multiplier=0.35))
    assert [name for name in narrow if ".conv_dw." in name] == [
        name for name in to_timm(mixnet_s()) if ".conv_dw." in name
    ]


# --- what does not fit ------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_are_listed():
    state = dict(tiny().state_dict())
    del state["stem.conv.weight"]
    state["head.conv.weight"] = state["head.conv.weight"][:-1]
    state["extra.weight"] = torch.zeros(1)
    model = tiny(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_weights(model, state)
    for words in ("missing.* stem.conv.weight", "unexpected.* extra.weight"):
        assert re.search(words, str(caught.value))
    assert re.search(r"head.conv.weight.*\(31, 24, 1, 1\).*\(32, 24, 1, 1\)", str(caught.value))
    assert same_state(model, before)


@pytest.mark.parametrize("bad", [torch.zeros(24, 5, 1, 1), torch.zeros(())])
def test_a_misshapen_part_of_a_grouped_layer_is_listed(bad):
    state = to_timm(tiny())
    state["blocks.1.0.conv_pw.1.weight"] = bad
    model = tiny(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks.1.0.conv_pw"):
        load_weights(model, state)
    assert same_state(model, before)


@pytest.mark.parametrize("backend", ["kernel", "merged"])
def test_weights_of_a_fused_copy_are_told(backend):
    fused = fuse_for_inference(tiny().eval(), backend=backend)
    with pytest.raises(ValueError, match="norms are folded in them: save the model before"):
        load_weights(tiny(), fused.state_dict())
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_weights(tiny(), {})
    assert "folded" not in str(caught.value)


def test_a_long_list_is_cut():
    state = {"classifier.weight": torch.zeros(7, 32)}
    with pytest.raises(ValueError, match=r"missing.* stem.*and \d+ more"):
        load_weights(tiny(), state)


def test_counters_may_be_missing():
    source, model = tiny(), tiny(2)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    load_weights(model, state)
    x = noise(1, 3, 20, 20)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("names", ["ours", "timm"])
def test_another_number_of_classes_warns_and_keeps_the_classifier(classes, names):
    source, model = tiny(), tiny(2, num_classes=classes)
    before = snapshot(model)
    state = dict(source.state_dict()) if names == "ours" else to_timm(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_weights(model, state)
    messages = [str(warning.message) for warning in caught]
    # Features were asked for: nothing to warn of.
    assert len(messages) == bool(classes)
    assert all(f"7 classes, the model has {classes}" in message for message in messages)
    for name, tensor in model.state_dict().items():
        wanted = before[name] if name.startswith("classifier") else source.state_dict()[name]
        assert torch.equal(tensor, wanted), name


def test_weights_without_a_classifier_do_not_pass_in_silence():
    model = tiny(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"missing.* classifier\.weight"):
        load_weights(model, dict(tiny(num_classes=0).state_dict()))
    assert same_state(model, before)


def test_the_warning_points_at_the_caller():
    state = dict(tiny().state_dict())
    with pytest.warns(UserWarning, match="classes") as caught:
        load_weights(tiny(num_classes=3), state)
    assert caught[0].filename == __file__


def test_a_fitting_classifier_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(tiny(2), dict(tiny().state_dict()))


def test_groups_are_told_by_where_they_stand():
    """A 1×1 of as many groups as channels has the shape of a depthwise kernel."""
    narrow = MixNetConfig(("r1_k3_a1.1_p1.1_s11_e2_i2_o2",), 2, 4)
    source, model = MixNet(narrow, num_classes=3), MixNet(narrow, num_classes=3)
    randomize(source)
    state = to_timm(source)
    assert state["blocks.0.0.conv_pw.1.weight"].shape == (2, 1, 1, 1)
    assert state["blocks.0.0.conv_dw.weight"].shape == (4, 1, 3, 3)
    load_weights(model, state)
    assert same_state(model, snapshot(source))
