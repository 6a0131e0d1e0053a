"""`make test-range`: the package's own tests with the oldest and the newest torch and Python.

Each pair gets a virtual environment of its own under `.range/` (gigabytes, downloaded). What
came of it, and when, goes into `tests/data/range.json`, which pyproject.toml and the README are
held to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
from typing import Any

from tools.notebooks import ROOT, write_atomically

RESULT = ROOT / "tests" / "data" / "range.json"
FOLDER = ROOT / ".range"
NEEDED = ["pytest>=8", "numpy", "hypothesis", "safetensors", "ipython", "matplotlib"]


def claimed_floor() -> str:
    """The oldest torch that pyproject.toml allows, such as "2.13"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = project["dependencies"]
    return str(requirement).removeprefix("torch>=")


def run_tests(pair: str) -> dict[str, Any]:
    """Install one version of torch for one Python and run the tests; what pytest said last."""
    version, _, interpreter = pair.partition("@")
    home = FOLDER / pair.replace("/", "_")
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter or sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={version}", *NEEDED], check=True)
    tests = subprocess.run(
        [str(python), "-m", "pytest", "-p", "no:cacheprovider", "tests/package"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^=*\s*(\d+ (?:passed|failed|error).*?)\s*=*$", tests.stdout, re.MULTILINE)
    sys.stdout.write(tests.stdout[-2000:] if tests.returncode else "")
    return {
        "torch": version,
        "python": subprocess.check_output([str(python), "-V"], text=True).split()[1],
        "passed": tests.returncode == 0,
        "said": found[-1].partition(" in ")[0] if found else tests.stderr.strip()[-200:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-range", description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="TORCH@PYTHON", help="the oldest torch first")
    results = [run_tests(pair) for pair in parser.parse_args().pairs]
    for result in results:
        print(f"torch {result['torch']}, Python {result['python']}: {result['said']}")
    text = {"date": datetime.date.today().isoformat(), "results": results}
    write_atomically(RESULT, json.dumps(text, indent=1) + "\n")
    return int(not all(result["passed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
