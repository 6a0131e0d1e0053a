"""Notebooks made of a few strings, and a toy book of two chapters, built once and copied."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from tools.book import build
from tools.notebooks import ROOT, Chapter, find_chapters

for _name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[_name]  # inside a git hook they would point the toy repositories at this one

STORED = nbformat.NO_CONVERT
DOT = (  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOoAQAAgQCBYpgDzwAAAABJRU5ErkJggg=="
)
ALT = "One grey dot, alone on its page."

START = f'''\
# %% [markdown]
# # 0 · Start
#
# Next: [1 · Then](01_then.ipynb)

# %%
#| export start.py
"""The start."""


def double(x: int) -> int:
    """Twice x."""
    return 2 * x


# %%
double(21)

# %% tags=["drawing"]
metadata = {{"filename": "dot.png", "alt": "{ALT}"}}
display({{"image/png": "{DOT}"}}, raw=True, metadata=metadata)
'''

THEN = '''\
# %% [markdown]
# # 1 · Then
#
# Previous: [0 · Start](00_start.ipynb)

# %%
#| export then.py
"""What follows."""

from mixconv.start import double


def quadruple(x: int) -> int:
    """Four times x."""
    return double(double(x))


# %%
print(quadruple(10))
'''


def code(source, outputs=(), tags=(), count=None):
    metadata = {"tags": list(tags)} if tags else {}
    cell = nbformat.v4.new_code_cell(source, metadata=metadata, execution_count=count)
    cell.outputs = list(outputs)
    return cell


def markdown(source):
    return nbformat.v4.new_markdown_cell(source)


def notebook(*cells):
    """Cells, or sources of code cells, as a notebook."""
    made = [code(cell) if isinstance(cell, str) else cell for cell in cells]
    return nbformat.v4.new_notebook(cells=made)


def figure(**metadata):
    return nbformat.v4.new_output("display_data", data={"image/png": DOT}, metadata=metadata)


def git(root, *arguments):
    identity = ["-c", "user.name=toy", "-c", "user.email=toy", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def commit_all(root):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=all")


def new_repository(root: Path):
    """A git repository with this one's settings, and no chapter yet."""
    (root / "notebooks").mkdir(parents=True)
    (root / "mixconv").mkdir()
    (root / "mixconv" / "__init__.py").write_text('"""A toy."""\n')
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    git(root, "init", "--quiet")
    return root


def snapshot(root):
    """Every file outside .git, with its content. A forgotten temporary file shows up here too."""
    files = (path for path in root.rglob("*") if path.is_file())
    wanted = (path for path in files if not {".git", "__pycache__"} & set(path.parts))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in wanted}


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new))


def edit_notebook(path, change):
    """Apply `change` to the stored notebook, and store it as any notebook program would."""
    stored = nbformat.read(path, STORED)
    change(stored)
    path.write_text(nbformat.writes(stored).rstrip("\n") + "\n")


def read(chapter: Chapter):
    return nbformat.read(chapter.ipynb, 4)


def real_chapters():
    """Chapters of this book that have run; `test_house` says which have not."""
    return [chapter for chapter in find_chapters(ROOT) if chapter.ipynb.exists()]


def find_all(pattern, text):
    return re.findall(pattern, text, flags=re.MULTILINE)


@pytest.fixture(scope="session")
def built_book(tmp_path_factory):
    root = new_repository(tmp_path_factory.mktemp("book") / "toy")
    (root / "notebooks" / "00_start.py").write_text(START)
    (root / "notebooks" / "01_then.py").write_text(THEN)
    build(root)
    commit_all(root)
    return root


@pytest.fixture
def toy(built_book, tmp_path):
    """The toy book, built and committed; the test's own copy."""
    return shutil.copytree(built_book, tmp_path / "toy")
