"""`make book`: text or notebook edited → executed → package → pages and figures.

Everything is made in a staging folder first. Only when every chapter has run do files move into
place, each in one step: an interrupted or failed build changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.contents import contents_page
from tools.notebooks import (
    RECORD,
    ROOT,
    BookError,
    Chapter,
    check_round_trip,
    committed,
    digest,
    dump,
    execute,
    find_chapters,
    format_code,
    merge_pair,
    normalise,
    read_record,
    title_folds,
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
    pages = {stem: files[root / "notebooks" / f"{stem}.md"].decode() for stem, _ in named}
    files[root / "notebooks" / "README.md"] = contents_page(pages).encode()
    return files


def stage_package(sources: dict[str, str], root: Path, staging: Path) -> None:
    """The package as it will be, beside nothing else, for the kernels to import."""
    package = staging / "mixconv"
    shutil.copytree(root / "mixconv", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in sources.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(source, "utf-8")


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


def run_all(notebooks: list[tuple[Chapter, Any]], staging: Path) -> None:
    """Execute every notebook in place, two at a time, with a line for each as it ends."""

    def run(chapter: Chapter, notebook: Any) -> None:
        started = time.perf_counter()
        execute(notebook, chapter, staging)
        seconds = time.perf_counter() - started
        print(f"{chapter.stem:<24} {seconds:5.1f} s{warn_if_slow(notebook, seconds)}", flush=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(run, *pair) for pair in notebooks]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def warn_if_slow(notebook: Any, seconds: float) -> str:
    """A remark if a chapter took longer than its first cell tells the reader."""
    promised = re.search(r"Runs in under (\d+) seconds", notebook.cells[0].source)
    if promised and seconds > int(promised[1]):
        return f"  (its first cell says under {promised[1]} s)"
    return ""


def has_run(notebook: Any) -> bool:
    """Whether every code cell holds what it gave; an edited side comes without outputs."""
    return all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def build(root: Path = ROOT, only: Sequence[str] = ()) -> int:
    """Build the book; returns how many files changed.

    Args:
        root: the repository.
        only: chapters to run, by the beginnings of their names; the edited ones are run, too.
            All, if none is named.

    Raises:
        BookError: saying what is wrong; nothing is written then.
    """
    chapters = find_chapters(root)
    if unknown := [n for n in only if not any(c.stem.startswith(n) for c in chapters)]:
        raise BookError(f"no chapter begins with {', '.join(unknown)}")
    sides = [path for c in chapters for path in (c.ipynb, c.py) if path.exists()]
    read = {path: path.read_bytes() for path in sides}
    notebooks: list[tuple[Chapter, Any]] = []
    for chapter in chapters:
        notebook = merge_pair(chapter)
        check_round_trip(notebook, chapter.stem, root)
        title_folds(notebook)
        format_code(notebook, chapter.stem, root)
        notebooks.append((chapter, normalise(notebook)))
    sources = tangle([(chapter.stem, notebook) for chapter, notebook in notebooks], root)

    def wanted(chapter: Chapter, notebook: Any) -> bool:
        return not only or chapter.stem.startswith(tuple(only)) or not has_run(notebook)

    record = read_record(root)
    package = {root / "mixconv" / name: text.encode() for name, text in sources.items()}
    refuse_hand_edits(package, root, record)

    with tempfile.TemporaryDirectory(prefix="mixconv-book-") as folder:
        staging = Path(folder)
        stage_package(sources, root, staging)
        run_all([pair for pair in notebooks if wanted(*pair)], staging)
    notebooks = [(chapter, normalise(notebook)) for chapter, notebook in notebooks]

    files = derive(notebooks, root)
    pages = {path: data for path, data in files.items() if path.suffix == ".md"}
    refuse_hand_edits(pages, root, record)
    if late := [path.name for path, data in read.items() if path.read_bytes() != data]:
        raise BookError(f"{', '.join(late)} changed during the build: run `make book` again")
    for chapter, notebook in notebooks:
        files[chapter.ipynb] = dump(notebook).encode()
    for path in files:
        for left in path.parent.glob(f".{path.name}.*"):  # by a build that was killed
            left.unlink(missing_ok=True)
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
    parser = argparse.ArgumentParser(prog="make book", description=__doc__)
    parser.add_argument("chapters", nargs="*", metavar="NN", help="run these and the edited only")
    try:
        changed = build(only=parser.parse_args().chapters)
    except BookError as error:
        print(f"\nmake book: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"\nmake book: {error.filename} cannot be written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake book: interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(f"book is up to date, {changed} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
