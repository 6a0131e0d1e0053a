"""Where a check can be switched off by a setting: those settings, written down a second time.

Whoever changes one changes what a green run means: it is a change to make here, too.
"""

import ast
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import conftest
from tests.tools.conftest import find_all
from tests.tools.test_environment import (
    CONDA,
    EXTRAS,
    MAKEFILE,
    PINS,
    PROJECT,
    WORKFLOW,
    makefile_recipe,
)
from tools.notebooks import ROOT

TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_ruff_is_as_strict_as_it_was():
    assert set(TOOL["ruff"]) == {"line-length", "target-version", "extend-exclude", "lint"}
    assert TOOL["ruff"]["extend-exclude"] == ["notebooks/*.py", "*.md"]
    lint = TOOL["ruff"]["lint"]
    assert set(lint) == {"select", "ignore", "per-file-ignores", "isort"}
    wanted = {"E", "F", "W", "I", "B", "UP", "N", "D", "RET", "SIM", "PT", "RUF"}
    assert set(lint["select"]) >= wanted
    allowed = {
        "D100", "D104", "D105", "D107", "D203", "D212", "D213", "D401", "D407", "D413", "D416",
        "N812", "RUF001", "RUF002", "RUF003",
    }  # fmt: skip
    assert set(lint["ignore"]) <= allowed
    assert lint["per-file-ignores"] == {
        "notebooks/*.ipynb": ["B018", "D", "E402", "F811", "N803", "N806", "B015"],
        "tests/*": ["D"],
        "tools/*": ["D101", "D102", "D103", "D205"],
    }


def test_mypy_is_as_strict_as_it_was():
    assert TOOL["mypy"]["strict"] is True
    assert TOOL["mypy"]["files"] == ["mixconv", "tools", "tests"]
    assert set(TOOL["mypy"]) == {
        "python_version", "files", "strict", "untyped_calls_exclude", "overrides",
    }  # fmt: skip
    loosened = {name: part for part in TOOL["mypy"]["overrides"] for name in part["module"]}
    assert set(loosened) == {
        "tools.*", "tests.*", "nbformat.*", "nbclient.*", "nbconvert.*", "yaml.*",
    }  # fmt: skip
    settings = {key for part in loosened.values() for key in part} - {"module"}
    assert settings == {
        "disallow_untyped_calls", "disallow_untyped_defs", "disallow_incomplete_defs",
        "check_untyped_defs", "ignore_missing_imports",
    }  # fmt: skip


def test_pytest_collects_all_of_it():
    assert TOOL["pytest"] == {
        "ini_options": {
            "testpaths": ["tests"],
            "pythonpath": ["."],
            "addopts": "-q --strict-markers",
            "filterwarnings": ["error::DeprecationWarning:mixconv"],
        }
    }


def test_no_other_file_holds_settings():
    """They would be read before pyproject.toml, or beside it."""
    names = "pytest.ini .pytest.ini tox.ini setup.cfg setup.py ruff.toml .ruff.toml mypy.ini"
    names += " .mypy.ini conftest.py sitecustomize.py"
    assert [name for name in names.split() if (ROOT / name).exists()] == []
    hooks = {path.relative_to(ROOT).as_posix() for path in TESTS if path.name == "conftest.py"}
    assert hooks == {"tests/conftest.py", "tests/peers/conftest.py", "tests/tools/conftest.py"}


# One file at a time

OFF = re.compile(
    r"^#\s*(?:mypy: *ignore|ruff: *noqa|flake8: *noqa|type: *ignore\s*$)|^__test__|collect_ignore"
    r"|\b(?:mark|pytest)\.xfail|pytest_ignore_collect"
    r"|def pytest_collection_modifyitems|pytest_pyfunc_call|pytest_runtest_(?:protocol|setup|call)",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "line",
    [
        "# mypy: ignore-errors", "# ruff: noqa", "# type: ignore", "__test__ = False",
        "collect_ignore = []", "@pytest.mark.xfail", 'pytest.xfail("later")',
        "def pytest_collection_modifyitems(items): items.clear()",
    ],
)  # fmt: skip
def test_a_file_that_switches_itself_off_is_seen(line):
    assert OFF.search(f'"""Doc."""\n{line}\n')


def test_no_file_switches_itself_off():
    places = [*(ROOT / "mixconv").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *TESTS]
    places += (ROOT / "notebooks").glob("*.py")
    this = ROOT / "tests" / "tools" / "test_switches.py"
    found = {p: hit[0] for p in places if p != this and (hit := OFF.search(p.read_text()))}
    # One leaves out what is marked as slow, one picks the tests that judge a mutant.
    picking = {ROOT / "tests" / "peers" / "conftest.py", ROOT / "tools" / "judge.py"}
    assert found == dict.fromkeys(picking, "def pytest_collection_modifyitems")


# A reason that counts as one for leaving a test out counts in these files only.
REASONS = {
    "slow: ask for it with -m slow": {"tests/peers/conftest.py"},
    "mixconv is not installed beside this Python": {"tests/package/test_main.py"},
    "mounting is not allowed here": {"tests/package/test_native.py"},
    "only root can give files away": {"tests/package/test_native.py"},
    "no -fsanitize=": {"tests/fast/test_sanitizers.py"},
    "the compiler does not take -march=": {"tests/fast/test_sanitizers.py"},
    "not a git checkout": {"tests/tools/test_house.py"},
    "node is not on the path": {"tests/widgets/test_widgets.py"},
}


def test_reasons_to_leave_tests_out_stay_where_they_are():
    assert set(conftest.MAY_SKIP) == set(REASONS)
    for why, files in REASONS.items():
        said = {p.relative_to(ROOT).as_posix() for p in TESTS if why in p.read_text()}
        told_only = {"tests/conftest.py", "tests/tools/test_guards.py"}
        assert said - told_only - {"tests/tools/test_switches.py"} == files


# What is run


def test_make_test_runs_its_steps_with_nothing_added():
    pytest_ = "$(ONE_THREAD) $(RUN) -m pytest $(PARALLEL)"
    assert makefile_recipe("test").splitlines() == [
        "\t$(RUN) -m ruff check .",
        "\t$(RUN) -m ruff format --check .",
        "\t$(RUN) -m mypy",
        "\t$(RUN) -m tools.check",
        f"\t{pytest_} --ignore tests/lab tests",
        f"\tFIGURES=$(CURDIR)/figures {pytest_} --nbval --nbval-cell-timeout=300 notebooks",
    ]
    assert find_all(r"^PARALLEL .*", MAKEFILE) == ["PARALLEL := --numprocesses 2 --dist loadfile"]
    assert find_all(r"^RUN .*", MAKEFILE) == ["RUN := $(VENV)/bin/python"]
    assert find_all(r"^ONE_THREAD .*", MAKEFILE) == [
        "ONE_THREAD := OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1)"
    ]
    off = r"MAKEFLAGS|\.IGNORE|\.ONESHELL|SHELLFLAGS|^SHELL|PYTEST_|^ *-?include|^export"
    assert find_all(off, MAKEFILE) == []


def test_ci_is_four_lines():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line[:1] != "#"] == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "make test",
    ]


def test_the_workflow_has_nothing_that_could_soften_it():
    assert set(WORKFLOW) == {"name", True, "permissions", "jobs"}  # YAML reads `on` as True
    assert WORKFLOW[True] == ["push", "pull_request"]
    assert set(WORKFLOW["jobs"]) == {"all", "package"}
    for job in WORKFLOW["jobs"].values():
        assert set(job) <= {"runs-on", "timeout-minutes", "strategy", "steps"}
        assert job["timeout-minutes"] >= 30
        assert all(set(step) <= {"uses", "with", "run"} for step in job["steps"])
    runs = [step["run"] for step in WORKFLOW["jobs"]["package"]["steps"] if "run" in step]
    torch = "torch==${{ matrix.torch }}"
    assert runs == [f"pip install {torch} . pytest numpy hypothesis", "pytest tests/package"]


# What is installed


def imported(folder, pattern):
    """Names of the distributions that the Python files of a folder import."""
    owners = packages_distributions()
    names = set()
    for path in (ROOT / folder).glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return {canonicalize_name(owners[name][0]) for name in names if name in owners}


def named_by(*extras):
    """Names of the distributions that extras ask for."""
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    for requirement in (Requirement(line) for extra in extras for line in EXTRAS[extra]):
        ours = requirement.name == PROJECT["name"]
        names |= named_by(*requirement.extras) if ours else {requirement.name}
    return {canonicalize_name(name) for name in names}


def test_what_is_imported_is_asked_for():
    """A package that comes only because another one brings it may go with that one."""
    brought = {"ipython", "packaging", "mixconv"}  # by ipykernel, by pytest; ourselves
    assert imported("notebooks", "*.py") <= named_by("tutorial", "hub", "export") | brought
    assert imported("mixconv", "**/*.py") <= named_by("tutorial", "hub") | brought | {"traitlets"}
    assert imported("tests", "**/*.py") <= named_by("tutorial", "test", "lab") | brought
    assert {"matplotlib", "pillow", "numpy", "anywidget"} <= named_by("tutorial")
    assert {"safetensors", "huggingface-hub"} == named_by("hub") - {"torch"}


def test_constraints_are_the_versions_that_run_here():
    different = {}
    for name, pinned in (line.split("==") for line in PINS):
        try:
            here = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
        if here != pinned:
            different[name] = f"{here} runs, {pinned} is said"
    assert different == {}


def test_conda_environment_has_the_name_that_is_said():
    readme = (ROOT / "README.md").read_text()
    assert f"conda activate {CONDA['name']}`" in readme
    conda = (ROOT / "environment.yml").read_text()
    assert f"conda activate {CONDA['name']} " in conda


def test_no_tracked_file_is_ignored():
    """Its next version would not be seen by `git add`."""
    run = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        pytest.skip("not a git checkout")
    assert run.stdout.splitlines() == []
