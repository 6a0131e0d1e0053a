"""What could be switched off without a red line: asserts, tests, package data, the workflow."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests import conftest
from tests.tools.test_environment import WORKFLOW
from tools.floor import STORED, count_all, count_asserts, worse
from tools.notebooks import ROOT

# Nothing asserts less than it did


def test_nothing_asserts_less_than_it_did():
    """After a wanted removal, or one more way out, run `python -m tools.floor` and say so."""
    assert worse(count_all(), json.loads(STORED.read_text())) == []


def test_a_removed_assert_is_seen():
    source = "assert x\nwith pytest.raises(E):\n    f()\ncheck(a, b, 'c')\nprint(check)\n"
    assert count_asserts(source) == 3
    now, before = {"a": 3, "b": 2}, {"a": 3, "b": 3, "c": 1}
    assert worse(now, before) == ["b: 2, was 3", "c: 0, was 1"]
    now, before = {"ways out: x": 1, "ways out: y": 1}, {"ways out: y": 2}
    assert worse(now, before) == ["ways out: x: 1, was 0"]


@pytest.mark.parametrize("idle", ["True", "__debug__", "x or True", "(x, y)", "'x'", "x == x"])
def test_an_assert_that_cannot_fail_is_none(idle):
    assert count_asserts(f"assert {idle}") == 0
    assert count_asserts(f"assert f({idle})") == 1


# Nothing is skipped in silence


@pytest.mark.parametrize(
    ("reason", "ci", "options", "code"),
    [
        ("could not import 'timm'", "true", [], 1),
        ("could not import 'timm'", "true", ["-n", "2"], 1),
        ("could not import 'timm'", "", [], 0),
        ("no C++ compiler", "true", [], 1),
        ("not a git checkout", "true", [], 0),
    ],
)
def test_a_test_left_out_fails_the_run_where_ci_runs(reason, ci, options, code, tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    skip = f'pytest.skip("{reason}"'
    (tmp_path / "test_x.py").write_text(
        f"import pytest\n\n\ndef test_a(): {skip})\n\n\ndef test_b(): pass\n"
    )
    (tmp_path / "test_y.py").write_text(f"import pytest\n\n{skip}, allow_module_level=True)\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "CI": ci},
    )  # fmt: skip
    assert run.returncode == code, run.stdout + run.stderr
    for name in ("test_x.py::test_a", "test_y.py"):
        assert (f"{name}: {reason}" in run.stdout) == bool(code)


def test_every_allowed_reason_is_one_that_a_test_gives():
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    sources.append((ROOT / "tests" / "peers" / "conftest.py").read_text())
    unused = [why for why in conftest.MAY_SKIP if not any(why in source for source in sources)]
    assert unused == []


# What is installed is what is here


def test_a_wheel_holds_all_that_the_package_needs(tmp_path):
    """Built, installed apart from this folder, it compiles its kernel and computes with it."""
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mixconv", source / "mixconv")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run = [*build, "wheel", *offline, "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(run, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mixconv/")}
    here = (path for path in (ROOT / "mixconv").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in here if path.suffix != ".pyc"}
    assert packed == wanted
    place = tmp_path / "installed"
    subprocess.run([*build, "install", *offline, "--quiet", "--target", place, wheel], check=True)
    program = (
        "import torch, mixconv; from mixconv.fast.kernel import load_kernel\n"
        "fast = mixconv.fuse_for_inference(mixconv.MixConv2d(8, (3, 5)).eval())\n"
        "print(mixconv.__file__, load_kernel() is not None, type(fast).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(place), "XDG_CACHE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", program]
    answer = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, *rest = answer.stdout.split()
    assert file.startswith(str(place))
    assert rest == [str(shutil.which("c++") is not None), "FusedMixConv2d"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_roofline_of_the_bench_compiles():
    """`make bench` takes an hour and runs nowhere else."""
    command = ["c++", "-std=c++17", "-march=native", "-fsyntax-only", f"{ROOT}/tools/roofline.cpp"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


# The workflow cannot pass what fails


def test_the_workflow_fails_where_a_step_fails():
    text = json.dumps(WORKFLOW)
    assert not re.search(r"continue-on-error|\|\| *true|always\(\)|set \+e|exit 0", text)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in WORKFLOW["jobs"].items():
        assert "if" not in job, name
        for step in job["steps"]:
            assert "if" not in step, (name, step)
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False, name
            if "uses" in step:
                assert re.search(r"@[0-9a-f]{40}$", step["uses"]), "a tag can be moved"


def test_ci_runs_the_readme_and_stops_at_the_first_error():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert [line for line in script.splitlines() if line.startswith("make")] == ["make test"]
    assert "\nmake test " in (ROOT / "README.md").read_text()
