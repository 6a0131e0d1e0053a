"""`mixnet_s`, `mixnet_m`, `mixnet_l`: arguments, conventions by name, weights."""

import argparse
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixconv import MIXNET_L, MIXNET_M, MIXNET_S, MixNet, mixnet_l, mixnet_m, mixnet_s, to_timm, zoo
from mixconv.checkpoint import Checkpoint, read_checkpoint
from mixconv.weights import OFFICIAL, PYTORCH, settings_of

from .common import TINY, noise, randomize

MAKERS = {"s": mixnet_s, "m": mixnet_m, "l": mixnet_l}
CONFIGS = {"s": MIXNET_S, "m": MIXNET_M, "l": MIXNET_L}
each_maker = pytest.mark.parametrize("name", MAKERS)


def tiny(**options: Any) -> MixNet:
    model = MixNet(TINY, num_classes=7, **options)
    randomize(model)
    return model


# --- what Shift-Tab shows ---------------------------------------------------------------------


@each_maker
def test_every_argument_is_in_the_signature_and_in_the_docstring(name):
    shown = inspect.signature(MAKERS[name]).parameters
    wanted = [n for n in inspect.signature(MixNet).parameters if n != "config"]
    assert list(shown) == ["weights", *wanted]
    kinds = {parameter.kind for n, parameter in shown.items() if n != "weights"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    text = inspect.getdoc(MAKERS[name]) or ""
    assert [n for n in shown if f"    {n}: " not in text] == []
    assert text.startswith(f"MixNet-{name.upper()}, ")
    assert MAKERS[name].__name__ == f"mixnet_{name}"
    assert pickle.loads(pickle.dumps(MAKERS[name])) is MAKERS[name]


def test_defaults_are_those_of_mixnet():
    """Where the zoo has None, the official convention fills in what `MixNet` has."""
    of_zoo, of_mixnet = (inspect.signature(f).parameters for f in (mixnet_s, MixNet))
    for name, parameter in of_zoo.items():
        if name != "weights":
            wanted = of_mixnet[name].default
            given = parameter.default
            usual = OFFICIAL | {"num_classes": 1000, "in_channels": 3}
            assert (usual.get(name) if given is None else given) == wanted, name


@each_maker
def test_every_argument_arrives(name):
    with torch.device("meta"):
        model: Any = MAKERS[name](
            num_classes=3, in_channels=5, width_multiplier=0.5, drop_rate=0.1, drop_path_rate=0.4,
            padding="symmetric", norm_eps=0.5, norm_momentum=0.25,
        )  # fmt: skip
    assert model.config.blocks == CONFIGS[name].blocks
    assert model.config.width_multiplier == CONFIGS[name].width_multiplier * 0.5
    assert (model.num_classes, model.stem.conv.in_channels, model.drop_rate) == (3, 5, 0.1)
    last = len(model.blocks) - 1
    assert model.blocks[last].drop_path.rate == pytest.approx(0.4 * last / (last + 1))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}
    assert type(model.stem.conv) is nn.Conv2d


@each_maker
def test_timms_in_chans_is_an_error_that_names_ours(name):
    with pytest.raises(TypeError, match=r"in_channels=1"):
        MAKERS[name](in_chans=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("classes", [True, 2.0])
def test_a_number_of_classes_is_no_accident(classes):
    with pytest.raises(TypeError, match="num_classes"):
        mixnet_s(num_classes=classes)


# --- conventions by name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("timm/tf_mixnet_s.in1k", OFFICIAL), ("hf-hub:timm/tf_mixnet_l.in1k", OFFICIAL),
        ("tf_mixnet_m-4eb8f0d3.pth", OFFICIAL), ("models--timm--tf_mixnet_s.in1k", OFFICIAL),
        ("timm/mixnet_s.ft_in1k", PYTORCH), ("mixnet_xl_ra-aac3c00c.pth", PYTORCH),
        ("checkpoint.pth", None), ("timm/efficientnet_b0", None), ("my_mixnet_small", None),
        ("my_mixnet_s", None), ("runs_tf_mixnet_s.pth", None),
    ],
)  # fmt: skip
def test_settings_follow_timms_names(name, settings):
    timm = {"conv_stem.weight": torch.zeros(1)}
    assert settings_of(Checkpoint(timm, (name,), None)) == settings
    assert settings_of(Checkpoint(timm, ("x", name, "tf_mixnet_s"), None)) == (settings or OFFICIAL)
    assert settings_of(Checkpoint({"stem.conv.weight": torch.zeros(1)}, (name,), None)) is None
    assert settings_of(Checkpoint(timm, (name,), {"padding": "x"})) == {"padding": "x"}


def save_timm(kind: str, folder: Path, model: MixNet) -> Any:
    """timm weights that tell their network in one of many ways; what to give to `mixnet_s`."""
    state = dict(to_timm(model))  # a plain one: without our record
    told = {
        "arch": {"arch": "mixnet_s", "state_dict": state},
        "options of timm's train.py": {
            "args": argparse.Namespace(model="mixnet_s"),
            "model": state,
        },
        "options as a dictionary": {"args": {"model": "mixnet_s"}, "state_dict": state},
    }
    path = folder / "model.pth"
    if kind == "folder":
        path = folder / "mixnet_s.ft_in1k" / "model.pth"
    elif kind == "hub cache":
        path = folder / "models--timm--mixnet_s.ft_in1k" / "snapshots" / "1f" / "model.pth"
    elif kind == "file":
        path = folder / "mixnet_s-1a2b.pth"
    elif kind == "config beside it":
        (folder / "config.json").write_text('{"architecture": "mixnet_s"}')
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(told.get(kind, state), path)
    return path.parent if kind in ("folder", "hub cache") else path


KINDS = ["arch", "options of timm's train.py", "options as a dictionary", "folder", "hub cache",
         "file", "config beside it"]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_names_the_network_tells_the_settings(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    source = tiny(padding="symmetric", norm_eps=1e-5).eval()
    model = mixnet_s(weights=save_timm(kind, tmp_path, source)).eval()
    x = noise(2, 3, 34, 34)
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("names", [MixNet.state_dict, to_timm])
def test_our_own_state_dicts_carry_their_settings(names, padding, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    source = tiny(padding=padding, norm_eps=2e-4, norm_momentum=0.3).eval()
    state = names(source)
    torch.save({"epoch": 1, "net": state}, tmp_path / "last.pth")
    x = noise(2, 3, 34, 34)
    for weights in (state, tmp_path / "last.pth", str(tmp_path / "last.pth")):
        model = mixnet_s(weights=weights).eval()
        assert model.settings() == source.settings()
        torch.testing.assert_close(model(x), source(x))
    wrapped = torch.nn.DataParallel(source)
    assert read_checkpoint(wrapped.state_dict()).settings == source.settings()


@pytest.mark.filterwarnings("error")
def test_sizes_are_those_of_the_weights(monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    model = mixnet_s(weights=tiny(in_channels=2).state_dict())
    assert (model.num_classes, model.stem.conv.weight.shape[1]) == (7, 2)  # type: ignore[union-attr,index]
    assert mixnet_s(weights=tiny().state_dict(), num_classes=0).num_classes == 0
    with pytest.warns(UserWarning, match="for 7 classes, the model has 3") as caught:
        assert mixnet_s(weights=tiny().state_dict(), num_classes=3).num_classes == 3
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("name", "padding"), [("tf_mixnet_s.x.pth", "same"), ("mixnet_s.pth", "symmetric")]
)
def test_timm_files_choose_padding_and_epsilon(name, padding, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    source = tiny(padding=padding, norm_eps=1e-3 if padding == "same" else 1e-5).eval()
    torch.save(dict(to_timm(source)), tmp_path / name)
    model = mixnet_s(weights=tmp_path / name, num_classes=7).eval()
    x = noise(2, 3, 34, 34)
    torch.testing.assert_close(model(x), source(x))
    forced = mixnet_s(weights=tmp_path / name, num_classes=7, norm_eps=0.5)
    assert forced.stem.norm.eps == 0.5  # type: ignore[union-attr]


def test_our_own_file_named_mixnet_s_keeps_our_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    source = tiny().eval()
    torch.save(source.state_dict(), tmp_path / "mixnet_s.pth")
    model = mixnet_s(weights=tmp_path / "mixnet_s.pth", num_classes=7).eval()
    x = noise(2, 3, 34, 34)
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize("given", [{}, {"padding": "same"}, {"norm_eps": 1e-3}])
def test_timm_weights_without_a_name_do_not_pass_in_silence(given, monkeypatch):
    """Either convention loads; the wrong one computes something else."""
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    with pytest.warns(UserWarning, match="padding='symmetric', norm_eps=1e-5") as caught:
        model = mixnet_s(weights=dict(to_timm(tiny())), num_classes=7, **given).eval()
    assert [warning.filename for warning in caught] == [__file__]
    x = noise(2, 3, 34, 34)
    torch.testing.assert_close(model(x), tiny().eval()(x))


@pytest.mark.filterwarnings("error")
def test_what_is_said_or_known_does_not_warn(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MIXNET_S", TINY)
    torch.save(dict(to_timm(tiny())), tmp_path / "tf_mixnet_s.pth")
    mixnet_s(weights=tmp_path / "tf_mixnet_s.pth", num_classes=7)
    mixnet_s(weights=dict(to_timm(tiny())), padding="symmetric", norm_eps=1e-5)
    mixnet_s(weights=tiny().state_dict(), num_classes=7)
    mixnet_s(num_classes=7)
