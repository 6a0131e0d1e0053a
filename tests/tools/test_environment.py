"""One set of dependencies, told in five places: they must not disagree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.tools.conftest import find_all
from tools.notebooks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line[:1] not in ("", "#")
]


def installed_here():
    """Every requirement of the two extras that `make` installs, and of the extras they include."""
    found, extras, seen = list(PROJECT["dependencies"]), ["tutorial", "test"], set()
    while extras:
        extra = extras.pop()
        for line in EXTRAS[extra] if extra not in seen else []:
            requirement = Requirement(line)
            if requirement.name == PROJECT["name"]:
                extras += requirement.extras
            else:
                found.append(line)
        seen.add(extra)
    return sorted(set(found))


def commands(job):
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


def pythons(job):
    steps, matrix = WORKFLOW["jobs"][job]["steps"], WORKFLOW["jobs"][job].get("strategy", {})
    named = [
        step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")
    ]
    several = [entry["python"] for entry in matrix.get("matrix", {}).get("include", [])]
    return several if named == ["${{ matrix.python }}"] else named


def pip_options(line):
    """`--option value` pairs, without quotes and without how much pip says."""
    words = line.replace('"', "").replace("\\\n", " ").split()
    return {" ".join(pair) for pair in pairwise(words) if pair[0][:2] == "--"}


def makefile_recipe(target):
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert found, target
    return found[1]


def test_conda_gives_python_and_pip_and_pip_the_rest():
    *from_conda, from_pip = CONDA["dependencies"]
    names = [re.split(r"[=<> ]", entry)[0] for entry in from_conda]
    assert names == ["python", "pip"]
    assert list(from_pip) == ["pip"]
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


def test_conda_and_make_install_the_same():
    from_pip = CONDA["dependencies"][-1]["pip"]
    assert set(from_pip) == {"--constraint constraints.txt", "--editable .[tutorial,test]"}
    made = pip_options(makefile_recipe("$(INSTALLED)"))
    assert set(from_pip) <= made
    assert {"tutorial", "test"} <= set(EXTRAS)


def test_python_versions_suit_the_package():
    wanted = SpecifierSet(PROJECT["requires-python"])
    conda = CONDA["dependencies"][0].partition("=")[2]
    assert conda in wanted
    assert pythons("all") == [conda]
    assert all(version in wanted for job in WORKFLOW["jobs"] for version in pythons(job))
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"({oldest.replace('.', ', ')})" in makefile_recipe("$(INSTALLED)")


def test_constraints_pin_exactly_one_version_each():
    assert [line for line in PINS if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)] == []
    names = [canonicalize_name(line.partition("==")[0]) for line in PINS]
    assert sorted(set(names)) == sorted(names)
    assert len(names) > 50


@pytest.mark.parametrize("wanted", installed_here())
def test_constraints_cover_every_dependency(wanted):
    pins = {canonicalize_name(name): version for name, version in (p.split("==") for p in PINS)}
    requirement = Requirement(wanted)
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_package_alone_needs_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_workflow_runs_what_a_person_runs():
    assert commands("all") == ["make test"]


def test_workflow_names_folders_that_exist():
    named = [word for job in WORKFLOW["jobs"] for line in commands(job) for word in line.split()]
    folders = [word for word in named if word.startswith("tests/")]
    assert [folder for folder in folders if not (ROOT / folder).exists()] == []


def test_ci_runs_make_test_and_nothing_else():
    path = ROOT / ".ci" / "run"
    lines = path.read_text().splitlines()
    aside = ("#", "set ", "cd ")
    assert [line for line in lines if line and not line.startswith(aside)] == ["make test"]
    assert os.access(path, os.X_OK)


def test_make_test_runs_every_check():
    steps = makefile_recipe("test").splitlines()
    for step in ("ruff check .", "ruff format --check .", "mypy", "tools.check"):
        assert any(line.endswith(f" -m {step}") for line in steps), step
    assert any("-m pytest " in line and line.endswith(" tests") for line in steps)
    last = steps[-1]
    assert "--nbval " in last
    assert last.endswith(" notebooks")
    assert "lax" not in last


def steps_of_check(folder, *options):
    """What `make check` would run in a folder."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "-n", "check", *options]
    done = subprocess.run(
        command, cwd=folder, env=quiet, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


@pytest.fixture
def set_up(tmp_path):
    """A folder whose environment was set up, as far as make can see; its name has a space."""
    folder = tmp_path / "my book"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/.installed").write_text(f"{folder} {VERSION}\n")
    return folder


VERSION = ".".join(map(str, sys.version_info[:2]))
ANEW = "rm -rf .venv"


def test_an_environment_that_fits_is_kept(set_up):
    assert steps_of_check(set_up) == [".venv/bin/python -m tools.check"]
    assert steps_of_check(set_up, f"PYTHON={sys.executable}") == steps_of_check(set_up)


def test_a_set_up_that_was_interrupted_begins_anew(set_up):
    (set_up / ".venv/.installed").unlink()
    assert steps_of_check(set_up)[0] == ANEW


def test_a_folder_that_was_moved_gets_a_new_environment(set_up):
    moved = set_up.rename(set_up.parent / "elsewhere")
    assert steps_of_check(moved)[0] == ANEW


def test_another_python_gets_an_environment_of_its_own(set_up):
    (set_up / ".venv/.installed").write_text(f"{set_up} 3.99\n")
    assert steps_of_check(set_up, f"PYTHON={sys.executable}")[0] == ANEW
    assert steps_of_check(set_up) == [".venv/bin/python -m tools.check"]


def test_a_new_request_is_installed_into_the_environment(set_up):
    os.utime(set_up / "constraints.txt", (2**31 - 1, 2**31 - 1))
    steps = steps_of_check(set_up)
    assert ANEW not in steps
    assert any("-m pip install" in step for step in steps)


def test_help_lists_every_target():
    targets = find_all(r"^([a-z][\w-]*):", MAKEFILE)
    assert set(targets) >= {"help", "lab", "test", "book", "check", "clean"}
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        env=quiet,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert find_all(r"^make (\S+) +\S", listed) == targets
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony
    assert sorted(phony[1].split()) == sorted(targets)


def test_the_claimed_range_is_the_one_that_was_tried():
    """`make test-range` stores what came of the oldest and the newest; all claims follow it."""
    tried = json.loads((ROOT / "tests" / "data" / "range.json").read_text())
    assert all(result["passed"] for result in tried["results"])
    oldest, newest = tried["results"][0], tried["results"][-1]
    (torch_range,) = PROJECT["dependencies"]
    assert Requirement(torch_range).specifier.contains(oldest["torch"])
    assert torch_range == "torch>=" + oldest["torch"].rpartition(".")[0]
    first_python = oldest["python"].rpartition(".")[0]
    assert PROJECT["requires-python"] == f">={first_python}"
    readme = (ROOT / "README.md").read_text()
    for claim in (
        f"Python {first_python}", f"torch {oldest['torch']}",
        f"Python {newest['python'].rpartition('.')[0]} and torch {newest['torch']}", tried["date"],
    ):  # fmt: skip
        assert claim in readme, claim
    matrix = WORKFLOW["jobs"]["package"]["strategy"]["matrix"]["include"]
    assert matrix == [
        {"python": pair["python"].rpartition(".")[0], "torch": pair["torch"]}
        for pair in (oldest, newest)
    ]
    assert f"torch=={'${{ matrix.torch }}'}" in commands("package")[0]
