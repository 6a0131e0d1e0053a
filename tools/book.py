"""`make book`: text or notebook edited → executed → package → pages and figures.

Everything is made in a staging folder first. Only when every chapter has run do files move into
place, each in one step: an interrupted or failed build changes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.notebooks import (
    RECORD,
    ROOT,
    BookError,
    Chapter,
    committed,
    digest,
    dump,
    execute,
    find_chapters,
    format_code,
    merge_pair,
    normalise,
    read_record,
    to_text,
    write_atomically,
)
from tools.tangle import tangle
from tools.weave import weave_all


def derive(notebooks: list[tuple[Chapter, Any]], root: Path) -> dict[Path, bytes]:
    """All that is made from stored notebooks: their text sides, the package, pages, figures."""
    named = [(chapter.stem, notebook) for chapter, notebook in notebooks]
    files = {chapter.py: to_text(notebook, root).encode() for chapter, notebook in notebooks}
    for name, source in tangle(named, root).items():
        files[root / "mixconv" / name] = source.encode()
    files.update(weave_all(named, root))
    return files


def stage_package(sources: dict[str, str], root: Path, staging: Path) -> None:
    """The package as it will be, beside nothing else, for the kernels to import."""
    package = staging / "mixconv"
    shutil.copytree(root / "mixconv", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in sources.items():
        (package / name).write_text(source)


def refuse_hand_edits(files: dict[Path, bytes], root: Path, record: dict[str, str]) -> None:
    """Generated files that are neither as last built, nor as committed, nor as built now."""
    edited = []
    for path, content in files.items():
        if not path.exists() or path.suffix == ".png":
            continue
        data = path.read_bytes()
        name = path.relative_to(root).as_posix()
        known = data == content or record.get(name) == digest(data)
        if not known and committed(path, root) != data.decode(errors="replace"):
            edited.append(name)
    if edited:
        raise BookError(
            "edited by hand, but made by `make book`: " + ", ".join(edited) + "\n"
            "Move the change into the chapter's notebook; `git checkout` or delete the file,\n"
            "then run `make book` again. Nothing was written."
        )


def build(root: Path = ROOT) -> int:
    """Build the book; returns how many files changed."""
    chapters = find_chapters(root)
    notebooks: list[tuple[Chapter, Any]] = []
    for chapter in chapters:
        notebook = merge_pair(chapter)
        format_code(notebook, root)
        notebooks.append((chapter, normalise(notebook)))
    sources = tangle([(chapter.stem, notebook) for chapter, notebook in notebooks], root)

    record = read_record(root)
    package = {root / "mixconv" / name: text.encode() for name, text in sources.items()}
    refuse_hand_edits(package, root, record)

    with tempfile.TemporaryDirectory(prefix="mixconv-book-") as folder:
        staging = Path(folder)
        stage_package(sources, root, staging)
        for number, (chapter, notebook) in enumerate(notebooks):
            print(f"{chapter.stem:<24}", end=" ", flush=True)
            started = time.perf_counter()
            execute(notebook, chapter, staging)
            notebooks[number] = (chapter, normalise(notebook))
            print(f"{time.perf_counter() - started:5.1f} s", flush=True)

    files = derive(notebooks, root)
    pages = {path: data for path, data in files.items() if path.suffix == ".md"}
    refuse_hand_edits(pages, root, record)
    for chapter, notebook in notebooks:
        files[chapter.ipynb] = dump(notebook).encode()
    changed = [path for path, data in files.items() if write_atomically(path, data)]
    write_atomically(
        root / RECORD,
        json.dumps(
            {path.relative_to(root).as_posix(): digest(data) for path, data in files.items()},
            indent=1,
            sort_keys=True,
        ),
    )
    for path in changed:
        print(f"  wrote {path.relative_to(root)}")
    return len(changed)


def main() -> int:
    argparse.ArgumentParser(prog="make book", description=__doc__).parse_args()
    try:
        changed = build()
    except BookError as error:
        print(f"\nmake book: {error}", file=sys.stderr)
        return 1
    print(f"book is up to date, {changed} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
