"""timm's MixNets and ours: weights both ways, features, files, the hub."""

import sys
import tomllib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixconv import load_weights, mixnet_s, to_timm
from tests.peers.common import (
    BUILD,
    NAMES,
    assert_near,
    assert_same_step,
    build,
    images,
    import_timm,
    randomize,
)

timm = import_timm()

MOMENTUM = 0.03  # neither PyTorch's nor TensorFlow's, to see that it is obeyed


@cache
def peer(name: str) -> nn.Module:
    torch.manual_seed(NAMES.index(name))
    return randomize(timm.create_model(name, bn_momentum=MOMENTUM), NAMES.index(name))


def state_of(name: str) -> dict[str, Tensor]:
    return dict(peer(name).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters(name: str) -> None:
    counts = [sum(p.numel() for p in model.parameters()) for model in (build(name), peer(name))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_logits_at_many_sizes(name: str) -> None:
    model = build(name, state_of(name))
    for shape in [(2, 3, 64, 64), (1, 3, 65, 98), (1, 3, 97, 33)]:
        x = images(*shape)
        with torch.no_grad():
            assert_near(model(x), peer(name)(x))


@pytest.mark.parametrize(
    ("name", "training"), [(name, True) for name in NAMES] + [("tf_mixnet_s", False)]
)
def test_the_same_gradients_and_statistics(name: str, training: bool) -> None:
    model = build(name, state_of(name), norm_momentum=MOMENTUM)
    assert_same_step(model, peer(name), images(2, 3, 49, 64), training)


@pytest.mark.parametrize("name", NAMES)
def test_back_into_timm(name: str) -> None:
    ours, theirs = build(name), timm.create_model(name).eval()
    randomize(ours, seed=5)
    theirs.load_state_dict(to_timm(ours), strict=True)
    x = images(2, 3, 63, 64)
    with torch.no_grad():
        assert_near(theirs(x), ours(x))


@pytest.mark.parametrize("name", ["tf_mixnet_s", "mixnet_l"])
def test_there_and_back_is_the_same_state(name: str) -> None:
    state, again = state_of(name), to_timm(build(name, state_of(name)))
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_the_feature_pyramid(name: str) -> None:
    theirs = timm.create_model(name, features_only=True).eval()
    theirs.load_state_dict(state_of(name), strict=False)
    assert set(theirs.state_dict()) <= set(state_of(name))
    model = build(name, state_of(name))
    for key in ("num_chs", "reduction"):
        listed = [info[key] for info in theirs.feature_info.get_dicts()]
        assert [info[key] for info in model.feature_info] == listed
    x = images(1, 3, 65, 96)
    with torch.no_grad():
        ours, expected = model.features(x), theirs(x)
    assert len(ours) == len(expected) == 5
    for mine, other in zip(ours, expected, strict=True):
        assert_near(mine, other)


def test_features_and_logits_before_the_classifier() -> None:
    model, x = build("mixnet_m", state_of("mixnet_m")), images(2, 3, 64, 64)
    theirs: Any = peer("mixnet_m")
    with torch.no_grad():
        mine, other = model.forward_features(x), theirs.forward_features(x)
        assert_near(mine, other)
        pooled = model.forward_head(mine, pre_logits=True)
        assert_near(pooled, theirs.forward_head(other, pre_logits=True))


@pytest.mark.filterwarnings("ignore:the weights are for 1000 classes")
@pytest.mark.parametrize("classes", [0, 10])
def test_another_number_of_classes_drops_the_classifier(classes: int) -> None:
    state = state_of("tf_mixnet_s")
    model = build("tf_mixnet_s", num_classes=classes)
    load_weights(model, state)
    assert state.keys() == peer("tf_mixnet_s").state_dict().keys()  # the caller's stays whole
    x = images(1, 3, 64, 64)
    theirs: Any = peer("tf_mixnet_s")
    with torch.no_grad():
        assert_near(model.forward_features(x), theirs.forward_features(x))
        assert model(x).shape == (1, classes or 1536)


def test_a_dropped_classifier_is_told() -> None:
    with pytest.warns(UserWarning, match="1000 classes, the model has 10") as caught:
        build("tf_mixnet_s", state_of("tf_mixnet_s"), num_classes=10)
    assert len(caught) == 1


@pytest.mark.parametrize("gone", [["weight", "bias"], ["bias"], ["weight"]])
def test_weights_that_lack_the_classifier_are_not_taken_in_silence(gone: list[str]) -> None:
    state = state_of("tf_mixnet_s")
    for name in gone:
        del state[f"classifier.{name}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises((ValueError, UserWarning), match="classifier"):
            build("tf_mixnet_s", state)


def test_the_same_number_of_classes_does_not_warn() -> None:
    theirs = randomize(timm.create_model("tf_mixnet_s", num_classes=7, in_chans=1), 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build("tf_mixnet_s", theirs.state_dict(), num_classes=7, in_channels=1)
    x = images(1, 1, 64, 64)
    with torch.no_grad():
        assert_near(model(x), theirs(x))


@pytest.mark.parametrize("width", [0.35, 0.75, 1.6])
@pytest.mark.parametrize("size", ["s", "m"])
def test_other_widths(size: str, width: float) -> None:
    # At 0.35 neighbouring stages have equal channels; timm's mixnet_xl is M at 1.6.
    make = getattr(timm.models.efficientnet, f"_gen_mixnet_{size}")
    theirs = randomize(make(f"mixnet_{size}", channel_multiplier=width), 4)
    model = build(f"mixnet_{size}", width_multiplier=width)
    load_weights(model, theirs.state_dict())
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x), theirs(x))


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


FILES = [
    ("tf_mixnet_s", "tf_mixnet_s.in1k.safetensors"),
    ("mixnet_s", "mixnet_s.ft_in1k.safetensors"),
    ("tf_mixnet_m", "tf_mixnet_m-4156cc9b.pth"),
    ("mixnet_l", "mixnet_l-4156cc9b.pth"),
]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_picks_padding_and_epsilon_by_its_name(
    name: str, file: str, as_text: bool, tmp_path: Path
) -> None:
    path = save(state_of(name), tmp_path / file)
    model = BUILD[name[-1]](weights=str(path) if as_text else path).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x), peer(name)(x))
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.01 if name.startswith("tf_") else 0.1}


def test_arguments_win_over_the_name(tmp_path: Path) -> None:
    path = save(state_of("tf_mixnet_s"), tmp_path / "mixnet_s.safetensors")
    model = mixnet_s(weights=path, padding="same", norm_eps=1e-3).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x), peer("tf_mixnet_s")(x))
        assert not torch.allclose(mixnet_s(weights=path).eval()(x), model(x), atol=1e-3)


def test_without_a_name_the_official_options_hold_and_a_warning_says_so() -> None:
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="nothing tells which settings"):
            model = mixnet_s(weights=state_of("tf_mixnet_s")).eval()
        assert_near(model(x), peer("tf_mixnet_s")(x))


def test_our_own_file_named_like_timms_keeps_our_options(tmp_path: Path) -> None:
    model = randomize(mixnet_s(), 2)
    path = tmp_path / "mixnet_s.pth"
    torch.save(model.state_dict(), path)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(mixnet_s(weights=path).eval()(x), model(x))


HUB_NAMES = [
    ("timm/tf_mixnet_s.in1k", "tf_mixnet_s"),
    ("timm/mixnet_s.ft_in1k", "mixnet_s"),
    ("hf-hub:timm/mixnet_s.ft_in1k", "mixnet_s"),
]


@pytest.mark.parametrize(("text", "name"), HUB_NAMES)
def test_a_hub_name_asks_the_hub(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    path, asked = save(state_of(name), tmp_path / "model.safetensors"), []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = mixnet_s(weights=text).eval()
    assert asked == [(text.removeprefix("hf-hub:"), "model.safetensors")]
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x), peer(name)(x))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real huggingface_hub, offline, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_the_cache_serves(offline: Path) -> None:
    repository = offline / "models--timm--mixnet_s.ft_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save(state_of("mixnet_s"), repository / "blobs" / "b.safetensors").rename(
        repository / "blobs" / "b"
    )
    (snapshot / "model.safetensors").symlink_to("../../blobs/b")
    model = mixnet_s(weights="timm/mixnet_s.ft_in1k").eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x), peer("mixnet_s")(x))


@pytest.mark.usefixtures("offline")
def test_offline_without_the_file_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"'timm/tf_mixnet_s.in1k'.*hub.*cache") as caught:
        mixnet_s(weights="timm/tf_mixnet_s.in1k")
    assert caught.value.__cause__ is not None


def test_a_missing_hub_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub.*mixconv\[hub\]"):
        mixnet_s(weights="timm/tf_mixnet_s.in1k")


def test_a_missing_safetensors_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(state_of("tf_mixnet_s"), tmp_path / "tf_mixnet_s.safetensors")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"safetensors.*mixconv\[hub\]"):
        mixnet_s(weights=path)


def test_the_extra_that_the_messages_name_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    extra = " ".join(project["project"]["optional-dependencies"].get("hub", []))
    assert "huggingface_hub" in extra.replace("-", "_")
    assert "safetensors" in extra


def test_another_network_is_refused_with_a_list() -> None:
    with pytest.raises(ValueError, match=r"missing: .*unexpected: ") as caught:
        build("mixnet_s", state_of("mixnet_m"))
    assert "blocks" in str(caught.value)
    state = state_of("tf_mixnet_s")
    state["extra.weight"] = state.pop("blocks.3.0.conv_dw.1.weight")
    with pytest.raises(ValueError, match="do not fit") as caught:
        build("tf_mixnet_s", state)
    assert "missing: blocks.3.0.conv_dw.1.weight" in str(caught.value)
    assert "unexpected: extra.weight" in str(caught.value)
