"""`make check`: is everything that is derived what the notebooks derive? Writes nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from tools.book import derive
from tools.claims import Claim, claims_of_book, summary
from tools.notebooks import (
    KNOWN_TAGS,
    METADATA,
    ROOT,
    BookError,
    Chapter,
    find_chapters,
    normalise,
    read_notebook,
    to_text,
)

HAND_WRITTEN = {"__init__.py", "py.typed"}
PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}
# What nbval obeys inside a cell: it would then compare nothing, run nothing, or want an error.
MARKER = re.compile(r"NBVAL_[A-Z_]+|PYTEST_VALIDATE_[A-Z_]+")


def cell_problems(stem: str, notebook: Any) -> list[str]:
    """What nbval would pass over in silence: cells not run, misspelt tags, stored warnings."""
    problems = []
    count = 0
    for number, cell in enumerate(notebook.cells, start=1):
        where = f"notebooks/{stem}.ipynb, cell {number}"
        unknown = set(cell.metadata.get("tags", [])) - KNOWN_TAGS
        if unknown:
            problems.append(f"{where}: unknown tag {', '.join(sorted(unknown))}")
        if cell.cell_type != "code":
            continue
        if marker := MARKER.search(cell.source):
            problems.append(f"{where}: {marker[0]} switches the comparison off")
        count += 1
        if cell.get("execution_count") != count:
            problems.append(f"{where}: execution count {cell.get('execution_count')}, not {count}")
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                problems.append(f"{where}: a stored error, {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"{where}: a stored warning: {output.text.strip()[:80]}")
    return problems


def find_problems(root: Path = ROOT) -> list[str]:
    """One line for each thing that is stale, naming it."""
    problems: list[str] = []
    notebooks: list[tuple[Chapter, Any]] = []
    for chapter in find_chapters(root):
        if not chapter.ipynb.exists():
            problems.append(f"notebooks/{chapter.stem}.ipynb: missing, its .py is alone")
            continue
        text = chapter.ipynb.read_text("utf-8")
        notebook = read_notebook(text, f"notebooks/{chapter.ipynb.name}")
        problems += cell_problems(chapter.stem, notebook)
        if chapter.py.exists() and chapter.py.read_text("utf-8") != to_text(notebook, root):
            problems.append(f"notebooks/{chapter.stem}: the .ipynb and the .py differ")
        kernel = notebook.metadata.get("kernelspec", {}).get("name")
        if kernel != METADATA["kernelspec"]["name"]:
            problems.append(f"notebooks/{chapter.stem}.ipynb: kernel {kernel}, not python3")
        # Opened and saved in Lab, a notebook holds other metadata and cut streams: not content.
        notebooks.append((chapter, normalise(notebook)))
    files = derive(notebooks, root)
    pairs = {chapter.py for chapter, _ in notebooks}
    for path, content in files.items():
        name = path.relative_to(root).as_posix()
        if not path.exists():
            problems.append(f"{name}: missing")
        elif path.read_bytes() != content and path not in pairs:  # pairs: compared above
            problems.append(f"{name}: stale, differs from what its notebook makes")
    return problems + strays({*files, *(c.ipynb for c, _ in notebooks)}, root)


def claim_problems(claims: list[Claim]) -> list[str]:
    """One line for each number in prose that nothing holds (see `tools/claims.py`)."""
    return [
        f"{claim.where}: {claim.number.text} is held by no cell, equation, file or source: "
        f"… {claim.sentence} …"
        for claim in claims
        if not claim.by
    ]


def strays(expected: set[Path], root: Path) -> list[str]:
    """Files and folders in generated places that no notebook makes."""
    found = [*(root / "mixconv").rglob("*"), *(root / "figures").rglob("*")]
    found += (root / "notebooks").rglob("*")
    widgets = root / "mixconv" / "widgets"  # by hand: not what the book teaches
    return [
        f"{path.relative_to(root)}: no notebook makes it; remove it"
        for path in sorted(found)
        if not any(part in PASSED_OVER for part in path.relative_to(root).parts)
        and path not in expected
        and not any(path in known.parents for known in expected)
        and path.name not in HAND_WRITTEN
        and not (path.suffix == ".json" and path.parent.name == "figures")
        and path not in {widgets, *widgets.glob("*.mjs")}
    ]


def main() -> int:
    claims: list[Claim] = []
    try:
        problems = find_problems()
        claims = claims_of_book()
        problems += claim_problems(claims)
    except BookError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} found. What is stale or missing: make book", file=sys.stderr)
        return 1
    print("check: pairs, package, pages and figures are what the notebooks make")
    print(f"check: {summary(claims)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
