"""Files, state dicts and hub names as tensors by name, read as data only."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mixconv import MixNet, checkpoint, load_weights
from mixconv.checkpoint import read_state_dict

from .common import TINY, randomize, same_state, snapshot


def tiny(seed: int = 1) -> MixNet:
    model = MixNet(TINY, num_classes=7)
    randomize(model, seed)
    return model


class Trap:
    """Unpickled without care, this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "foreign.pth")
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"foreign\.pth"):
        load_weights(model, tmp_path / "foreign.pth")
    assert not (tmp_path / "sprung").exists()
    assert same_state(model, before)


def test_what_was_saved_on_a_gpu_is_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"a": torch.ones(2)}, tmp_path / "trained.pth")
    tensor = read_state_dict(tmp_path / "trained.pth")["a"]
    assert (tensor.device.type, tensor.tolist()) == ("cpu", [1, 1])


@pytest.mark.parametrize("keep", [0, 1, 1000, -200])
def test_damaged_files(keep, tmp_path):
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save(tiny().state_dict(), whole)
    part.write_bytes(whole.read_bytes()[:keep])
    model = tiny(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"part.pth holds no readable weights"):
        load_weights(model, part)
    assert same_state(model, before)


@pytest.mark.parametrize("data", [[1, 2], {"state_dict": {"a": 1}}, {"a": {"b": 1}}], ids=str)
def test_files_of_something_else(data, tmp_path):
    torch.save(data, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds no state dict"):
        read_state_dict(tmp_path / "other.pth")


USUAL = """
    state_dict_ema model_ema params_ema ema state_dict model_state_dict model net network params
    weights
"""


@pytest.mark.parametrize("name", USUAL.split())
def test_every_usual_wrapping_is_known(name):
    tensor = torch.ones(2)
    assert read_state_dict({"epoch": 3, name: {"a": tensor}})["a"] is tensor


def test_an_error_lists_the_keys():
    with pytest.raises(ValueError, match="no state dict of tensors, its keys: 'lr', 'epoch'"):
        read_state_dict({"lr": 0.1, "epoch": 3})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404", "it is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_was_downloaded_in_place_of_weights_is_named(content, words, suffix, tmp_path):
    (tmp_path / f"weights{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_state_dict(tmp_path / f"weights{suffix}")


def test_nobody_is_told_to_run_what_a_file_asks_for(tmp_path):
    torch.save(tiny(), tmp_path / "model.pth")
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name, what in (("model", "mixconv.mixnet.MixNet"), ("trap", "mkdir"), ("plain", "")):
        with pytest.raises(ValueError, match="holds no readable weights") as caught:
            read_state_dict(tmp_path / f"{name}.pth")
        assert what in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["named.pth", "named.safetensors"])
def test_a_file_is_what_it_holds_not_what_it_is_called(name, tmp_path):
    state = tiny().state_dict()
    if name.endswith(".pth"):
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    assert read_state_dict(tmp_path / name).keys() == state.keys()


def test_a_checkpoint_that_holds_itself_ends(tmp_path):
    loop: dict[str, Any] = {"epoch": 3}
    loop["model"] = {"state_dict": loop}
    torch.save(loop, tmp_path / "loop.pth")
    for weights in (loop, tmp_path / "loop.pth"):
        with pytest.raises(ValueError, match="no state dict of tensors, its keys: 'epoch'"):
            read_state_dict(weights)


def test_an_archive_that_inflates_is_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
        bomb.writestr("archive/data/999", bytes(20 << 20))
    with pytest.raises(ValueError, match=r"bomb\.pth holds no readable weights: .*unpack to 20 MB"):
        read_state_dict(tmp_path / "bomb.pth")


def test_what_is_no_hub_name_is_not_asked_for(monkeypatch, tmp_path):
    """Offline, the hub would be tried for half a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(checkpoint, "_download", lambda name: pytest.fail(f"asked for {name}"))
    for name in ("runs/mixnet_s", "checkpoints/last", "x/mixnet_s.pth", "mixnet_s", "a/b/mixnet_s"):
        with pytest.raises(FileNotFoundError, match="no weights file"):
            read_state_dict(name)
    monkeypatch.setattr(checkpoint, "_download", lambda name: Path(name))
    for name in ("timm/tf_mixnet_s.in1k", "hf-hub:me/tuned"):
        assert checkpoint._find_file(name) == Path(name.removeprefix("hf-hub:"))


def test_whole_models_are_refused(tmp_path):
    torch.save(tiny(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth holds no readable weights"):
        read_state_dict(tmp_path / "model.pth")


def test_no_such_file(tmp_path):
    for name in ("gone.pth", "gone.safetensors", "deep/gone.pt"):
        with pytest.raises(FileNotFoundError, match="gone"):
            read_state_dict(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path)  # a folder
    with pytest.raises(FileNotFoundError, match="gone"):
        read_state_dict(tmp_path / "gone")  # a Path is never a hub name


@pytest.mark.parametrize("name", ["mixnet_s", "a/b/c", "https://example.org/x", ""])
def test_names_that_are_no_hub_names(name):
    with pytest.raises((ValueError, FileNotFoundError), match="weights"):
        read_state_dict(name)


@pytest.mark.parametrize("weights", [3, b"x.pth", [("a", torch.zeros(1))]])
def test_other_types(weights):
    with pytest.raises(TypeError, match=type(weights).__name__):
        read_state_dict(weights)
