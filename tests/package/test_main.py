"""The command line: `mixconv` and `python -m mixconv`."""

import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mixconv.__main__ import main

ROOT = Path(__file__).parents[2]
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
        (["--model", "mixnet_s", "--image", "gone.jpg"], "mixconv: --image gone.jpg"),
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
