"""`python -m tools.floor`: count what is asserted, file by file, and store the counts.

A test that is deleted, or an assert that is taken out of a notebook, leaves everything green.
`tests/tools/test_guards.py` compares with the stored counts: there may be more, never fewer.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from tools.notebooks import ROOT, find_chapters, read_notebook

STORED = ROOT / "tests" / "data" / "floor.json"
CHECKING = {"check", "check_rewrite", "expect", "attempt", "assert_close", "raises"}


def count_asserts(source: str) -> int:
    """`assert`s, and calls of what asserts, in a Python source."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            count += name in CHECKING
        count += isinstance(node, ast.Assert)
    return count


def count_all(root: Path = ROOT) -> dict[str, int]:
    """Asserts of each test file and each notebook by path, and test functions by `path::tests`."""
    counts = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        name, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        counts[name] = count_asserts(source)
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        counts[f"{name}::tests"] = sum(n.name.startswith("test_") for n in functions)
    for chapter in find_chapters(root):
        notebook = read_notebook(chapter.ipynb.read_text(encoding="utf-8"), chapter.stem)
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        counts[chapter.ipynb.relative_to(root).as_posix()] = sum(map(count_asserts, cells))
    return counts


def fewer(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """What asserts less than it did."""
    return [
        f"{name}: {now.get(name, 0)}, was {count}"
        for name, count in before.items()
        if now.get(name, 0) < count
    ]


def main() -> int:
    STORED.write_text(json.dumps(count_all(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
