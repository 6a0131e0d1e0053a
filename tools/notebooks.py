"""Chapters on disk: reading a pair, comparing its two sides, normal form, execution."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import nbformat
from jupytext.config import load_jupytext_config  # type: ignore[import-untyped]
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 120
RECORD = ".book.json"

# Tags change what a page or a check does with a cell; any other tag is a typing error.
FOLDED_TAGS = {
    "solution": "Solution",
    "drawing": "The code that draws this",
    "plumbing": "The plumbing: checks, names, files",
    "tool": "The source of this tool",
}
KNOWN_TAGS = set(FOLDED_TAGS)
# A folded cell may say itself what it holds, on its first line: `# fold: How a name is found`.
FOLD_TITLE = re.compile(r"^# fold: (?P<title>\S.*)$")

# A running kernel draws this; stored without it, Lab would say "model not found" over the picture.
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


class BookError(Exception):
    """Something in the book is wrong; the message says where and what mends it."""


@dataclass(frozen=True)
class Chapter:
    """One chapter: the three files of `notebooks/` that share a stem."""

    stem: str
    root: Path = ROOT

    @property
    def ipynb(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.ipynb"

    @property
    def py(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.py"

    @property
    def page(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.md"


def find_chapters(root: Path = ROOT) -> list[Chapter]:
    """All chapters, in reading order. A chapter is `NN_topic`, as a notebook, as text, or both."""
    folder = root / "notebooks"
    files = [*folder.glob("*.ipynb"), *folder.glob("*.py")]
    stems = sorted({path.stem for path in files if re.match(r"\d\d_", path.name)})
    return [Chapter(stem, root) for stem in stems]


def fold_title(source: str, where: str) -> str | None:
    """What a cell's first line says that its fold holds, or None if it says nothing.

    Raises:
        BookError: for such a line that is misspelt, or not the first of its cell.
    """
    lines = source.splitlines()
    match = FOLD_TITLE.match(lines[0]) if lines else None
    for line in lines[1 if match else 0 :]:
        if re.match(r"\s*#+[\s|]*fold\w*\s*:", line, re.IGNORECASE):
            raise BookError(f"{where}: {line!r}; the first line of a cell may be `# fold: TITLE`")
    return match["title"].strip() if match else None


def write_atomically(path: Path, content: str | bytes) -> bool:
    """Replace `path` in one step, so that an interrupted build never leaves half a file.

    Returns whether the content changed; an equal file is left alone.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def read_notebook(text: str, where: str) -> Any:
    try:
        return nbformat.reads(text, as_version=4)
    except Exception as error:  # nbformat raises many kinds; all mean "not a notebook"
        raise BookError(f"{where} is not a readable notebook: {error}") from error


def to_text(notebook: Any, root: Path = ROOT) -> str:
    """The `py:percent` side of a notebook, as the pair's settings in pyproject.toml want it."""
    config = load_jupytext_config(str(root / "notebooks" / "any.ipynb"))
    filters = {
        "notebook_metadata_filter": config.notebook_metadata_filter,
        "cell_metadata_filter": config.cell_metadata_filter,
    }
    bare = nbformat.v4.new_notebook(cells=notebook.cells, metadata={"jupytext": filters})
    return str(jupytext.writes(bare, fmt="py:percent"))


def from_text(text: str) -> Any:
    """A notebook without outputs from its `py:percent` side."""
    return jupytext.reads(text, fmt="py:percent")


def check_round_trip(notebook: Any, where: str, root: Path = ROOT) -> None:
    """Refuse a cell that would come back from the `py:percent` side as something else."""
    again = from_text(to_text(notebook, root))
    for number, (cell, back) in enumerate(zip(notebook.cells, again.cells), start=1):  # noqa: B905
        if cell.source.rstrip() != back.source.rstrip():
            raise BookError(f"{where}, cell {number}: does not survive as text; a line with # %%?")


def title_folds(notebook: Any) -> None:
    """Give folded cells their first line, in place: JupyterLab shows it of a closed fold.

    Not those of plumbing: what they hold differs, and they say it themselves.
    """
    for cell in notebook.cells:
        for tag in FOLDED_TAGS.keys() & set(cell.metadata.get("tags", [])) - {"plumbing"}:
            if not FOLD_TITLE.match(cell.source.partition("\n")[0]):
                cell.source = f"# fold: {FOLDED_TAGS[tag]}\n{cell.source}"


def format_code(notebook: Any, stem: str, root: Path = ROOT) -> None:
    """Format the code cells in place, by the same rules as the package."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", f"{stem}.ipynb", "-"],
        input=nbformat.writes(notebook),
        capture_output=True,
        text=True,
        cwd=root,
    )
    if result.returncode:
        raise BookError(f"ruff could not format a cell: {result.stderr.strip()}")
    formatted = nbformat.reads(result.stdout, as_version=4)
    for cell, new in zip(notebook.cells, formatted.cells, strict=True):
        cell.source = new.source


def normalise(notebook: Any) -> Any:
    """The one stored form: ids by position, fixed metadata, joined streams, nothing that moves."""
    cells = []
    for index, cell in enumerate(notebook.cells):
        tags = list(cell.metadata.get("tags", []))
        metadata: dict[str, Any] = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            if FOLDED_TAGS.keys() & set(tags):
                metadata["jupyter"] = {"source_hidden": True}
            new = nbformat.v4.new_code_cell(cell.source.rstrip(), metadata=metadata)
            new.outputs = join_streams(cell.get("outputs", []))
            new.execution_count = cell.get("execution_count")
            for output in new.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = new.execution_count
                output.get("data", {}).pop(WIDGET_VIEW, None)
        elif cell.cell_type == "markdown" and not cell.get("attachments"):
            new = nbformat.v4.new_markdown_cell(cell.source.rstrip(), metadata=metadata)
        else:
            raise BookError(
                f"cell {index + 1} is raw or holds a pasted image, which a .py file cannot keep;\n"
                "use a Markdown cell, and a figure drawn by code"
            )
        new.id = f"cell-{index:02d}"
        cells.append(new)
    result = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    result.nbformat_minor = 5
    return result


def join_streams(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream become one output: how they were cut depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(nbformat.from_dict(dict(output)))
    return joined


def dump(notebook: Any) -> str:
    return str(nbformat.writes(notebook)).rstrip("\n") + "\n"


def execute(notebook: Any, chapter: Chapter, package_parent: Path) -> None:
    """Run every cell in a fresh kernel, with `package_parent` first on the import path."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")  # two chapters run: their threads would fight
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(package_parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(chapter.ipynb.parent)}},
    )
    try:
        client.execute(env=environment, stderr=subprocess.DEVNULL)  # a TCP notice
    except (CellExecutionError, DeadKernelError) as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        raise BookError(f"{chapter.stem}: a cell failed\n{plain}") from error
    except CellTimeoutError as error:
        raise BookError(f"{chapter.stem}: a cell ran longer than {CELL_TIMEOUT} s") from error


def committed(path: Path, root: Path = ROOT) -> str | None:
    """The text of `path` at HEAD, or None where there is none."""
    result = subprocess.run(
        ["git", "show", f"HEAD:./{path.relative_to(root).as_posix()}"],
        cwd=root,
        capture_output=True,
    )
    return result.stdout.decode() if result.returncode == 0 else None


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_record(root: Path = ROOT) -> dict[str, str]:
    """Digests of the files as the last `make book` here wrote them; empty before the first."""
    path = root / RECORD
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def merge_pair(chapter: Chapter) -> Any:
    """The notebook that the two sides of a pair mean.

    Where they differ, one is the edit: the side whose text is not that of the last build here
    or, where that tells nothing, of HEAD. File times are never asked: a checkout sets them at
    random.

    Raises:
        BookError: when both sides were edited, differently, or neither was.
    """
    if not chapter.ipynb.exists():
        return from_text(chapter.py.read_text("utf-8"))
    notebook = read_notebook(chapter.ipynb.read_text("utf-8"), chapter.ipynb.name)
    if not chapter.py.exists():
        return notebook
    sides = [to_text(notebook, chapter.root), chapter.py.read_text("utf-8")]
    if sides[0] == sides[1]:
        return notebook
    name = chapter.py.relative_to(chapter.root).as_posix()
    last_build = read_record(chapter.root).get(name)
    head = digest((committed(chapter.py, chapter.root) or "").encode())
    for base in (last_build, head):
        notebook_edited, text_edited = (digest(side.encode()) != base for side in sides)
        if text_edited != notebook_edited:
            return from_text(sides[1]) if text_edited else notebook
    raise BookError(
        f"notebooks/{chapter.stem}: the .ipynb and the .py differ, and it cannot be told\n"
        f"which is the edit. Keep one: move notebooks/{chapter.stem}.py (or .ipynb) away,\n"
        f"then run `make book` again; it makes the missing side from the other."
    )
