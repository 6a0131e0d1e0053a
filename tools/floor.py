"""`python -m tools.floor`: count what is asserted, file by file, and store the counts.

A test that is deleted, or an assert that is taken out of a notebook, leaves everything green.
`tests/tools/test_guards.py` compares with the stored counts: there may be more, never fewer.
Of ways out there may be fewer, never more: what can skip a test, what silences a checker, numbers
in prose that only a measurement or a source holds.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

from tools.claims import claims_of_book
from tools.notebooks import ROOT, find_chapters, read_notebook

STORED = ROOT / "tests" / "data" / "floor.json"
CHECKING = {"check", "check_rewrite", "expect", "attempt", "assert_close", "raises"}
SKIPPING = {"skip", "skipif", "importorskip", "slow"}
SILENCED = re.compile(r"# (?:type: ignore|noqa|fmt: off)")
WAYS_OUT = "ways out: "  # how the names of these counts begin


def count_asserts(source: str) -> int:
    """`assert`s, and calls of what asserts, in a Python source."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            count += name in CHECKING
        count += isinstance(node, ast.Assert) and not is_idle(node.test)
    return count


def is_idle(test: ast.expr) -> bool:
    """Whether a condition is true without looking: `True`, `__debug__`, `x or True`, `(x, y)`."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(map(is_idle, test.values))
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name | ast.Constant):
        return ast.dump(test.left) == ast.dump(test.comparators[0])
    return isinstance(test, ast.Constant | ast.Tuple) or ast.unparse(test) == "__debug__"


def count_ways_out(root: Path = ROOT) -> dict[str, int]:
    """Skips of each test file, silenced lines of each folder, numbers that no cell holds."""
    counts: Counter[str] = Counter()
    for folder in ("tests", "tools", "mixconv"):
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            counts[f"lines silenced in {folder}"] += len(SILENCED.findall(source))
            if folder == "tests":
                nodes = list(ast.walk(ast.parse(source)))
                skips = sum(getattr(node, "attr", "") in SKIPPING for node in nodes)
                counts[f"skips in {path.relative_to(root).as_posix()}"] += skips
    for claim in claims_of_book(root):
        if claim.by in ("a measurement", "a source"):
            counts[f"numbers in prose held by {claim.by}"] += 1
    return {WAYS_OUT + name: count for name, count in counts.items() if count}


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
    return counts | count_ways_out(root)


def worse(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """What asserts less than it did, and the ways out that are more than they were."""
    return [
        f"{name}: {now.get(name, 0)}, was {before.get(name, 0)}"
        for name in sorted({*now, *before})
        if (now.get(name, 0) > before.get(name, 0) if name.startswith(WAYS_OUT)
            else now.get(name, 0) < before.get(name, 0))
    ]  # fmt: skip


def main() -> int:
    STORED.write_text(json.dumps(count_all(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
