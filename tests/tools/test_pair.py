"""The two sides of a chapter: which one is the edit, and that JupyterLab writes the same text."""

import json
import shutil

import nbformat
import pytest
from jupytext import TextFileContentsManager  # type: ignore[import-untyped]
from jupytext.cli import jupytext as jupytext_command  # type: ignore[import-untyped]

from tests.tools.conftest import (
    code,
    commit_all,
    edit,
    markdown,
    new_repository,
    notebook,
    read,
    real_chapters,
)
from tools.notebooks import (
    RECORD,
    ROOT,
    BookError,
    Chapter,
    digest,
    dump,
    from_text,
    merge_pair,
    normalise,
    read_notebook,
    to_text,
)

RICH = [
    markdown("# Title\n\nText with `code`, $c_t$ and a [link](01_x.ipynb).\n\n- item"),
    code('#| export toy.py\n"""A toy."""\n\nx = 1'),
    code("# a comment\nx\n\n\ny = 2  # two"),
    code("%matplotlib inline\n!ls", tags=["drawing"]),
    code("answer = 42", tags=["solution"]),
    markdown("```python\nfenced = True\n```"),
]


def sources(made):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in made.cells]


@pytest.fixture
def pair(tmp_path):
    """A committed chapter whose two sides agree; nothing has been built here."""
    root = new_repository(tmp_path / "toy")
    chapter = Chapter("00_start", root)
    made = normalise(notebook(markdown("# 0 · Start"), "x = 1", "x"))
    chapter.ipynb.write_text(dump(made))
    chapter.py.write_text(to_text(made, root))
    commit_all(root)
    return chapter


def write_record(chapter):
    """What `make book` leaves behind, with the sides as they are now."""
    name = chapter.py.relative_to(chapter.root).as_posix()
    record = {name: digest(chapter.py.read_bytes())}
    (chapter.root / RECORD).write_text(json.dumps(record))


@pytest.fixture(params=["before a build", "after a build", "after a build not committed"])
def either(pair, request):
    """The pair with git as its referee, or with the record of a build."""
    if request.param == "after a build not committed":
        for path in (pair.ipynb, pair.py):
            edit(path, "x = 1", "x = 10")
    if request.param != "before a build":
        write_record(pair)
    return pair


def test_sides_agree(either):
    assert "x = 1" in merge_pair(either).cells[1].source


def test_only_the_text_was_edited(either):
    edit(either.py, "x = 1", "x = 2")
    assert "x = 2" in merge_pair(either).cells[1].source


def test_only_the_notebook_was_edited(either):
    edit(either.ipynb, "x = 1", "x = 3")
    assert "x = 3" in merge_pair(either).cells[1].source


def test_same_edit_on_both_sides(either):
    for path in (either.ipynb, either.py):
        edit(path, "x = 1", "x = 4")
    assert "x = 4" in merge_pair(either).cells[1].source


def test_different_edits_are_refused(either):
    edit(either.ipynb, "x = 1", "x = 2")
    edit(either.py, "x = 1", "x = 3")
    with pytest.raises(BookError, match=r"00_start: the \.ipynb and the \.py differ"):
        merge_pair(either)


def test_neither_tells(tmp_path):
    """Never built, never committed: nothing says which side is the edit."""
    root = new_repository(tmp_path / "toy")
    chapter = Chapter("00_start", root)
    chapter.ipynb.write_text(dump(normalise(notebook("x = 1"))))
    chapter.py.write_text("# %%\nx = 2\n")
    with pytest.raises(BookError, match=r"which is the edit"):
        merge_pair(chapter)


def test_record_wins_over_the_commit(pair):
    """Built but not committed: both sides differ from HEAD, one from the record."""
    for path in (pair.ipynb, pair.py):
        edit(path, "x = 1", "x = 2")
    write_record(pair)
    edit(pair.ipynb, "x = 2", "x = 3")
    assert merge_pair(pair).cells[1].source == "x = 3"


@pytest.mark.parametrize("side", ["ipynb", "py"])
def test_one_side_missing(either, side):
    before = sources(merge_pair(either))
    getattr(either, side).unlink()
    assert sources(merge_pair(either)) == before


def test_broken_notebook_is_named(pair):
    pair.ipynb.write_text("<<<<<<< HEAD\n{")
    with pytest.raises(BookError, match=r"00_start\.ipynb is not a readable notebook"):
        merge_pair(pair)


def test_round_trip():
    made = normalise(notebook(*RICH))
    text = to_text(made, ROOT)
    again = normalise(from_text(text))
    assert sources(again) == sources(made)
    assert to_text(again, ROOT) == text


@pytest.mark.parametrize("chapter", real_chapters(), ids=lambda chapter: chapter.stem)
def test_round_trip_of_real_chapters(chapter):
    stored = read(chapter)
    assert sources(normalise(from_text(to_text(stored, ROOT)))) == sources(stored)


def test_text_has_no_header_and_no_noise():
    made = normalise(notebook(*RICH))
    made.metadata["widgets"] = {"noise": 1}
    made.cells[1].metadata.update(collapsed=True, scrolled=False, jupyter={"source_hidden": True})
    text = to_text(made, ROOT)
    assert text.startswith("# %% [markdown]\n# # Title\n")
    for noise in ("jupytext", "kernelspec", "widgets", "collapsed", "scrolled", "hidden", "cell-0"):
        assert noise not in text
    assert '# %% tags=["solution"]' in text


def test_what_moves_is_not_stored():
    """Lab prints "model not found" for it where no kernel runs, even beside a picture."""
    made = notebook(*RICH)
    cell = next(cell for cell in made.cells if cell.cell_type == "code")
    data = {"text/plain": "<Figure>", "application/vnd.jupyter.widget-view+json": {"model_id": "7"}}
    cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    kept = next(cell for cell in normalise(made).cells if cell.cell_type == "code")
    assert kept.outputs[0].data == {"text/plain": "<Figure>"}


@pytest.fixture
def in_lab(tmp_path):
    """A folder with this repository's settings and one notebook, as JupyterLab meets it."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    stored = normalise(notebook(*RICH))
    stored.cells[2].metadata["scrolled"] = True
    (tmp_path / "notebooks" / "00_start.ipynb").write_text(dump(stored))
    return tmp_path


def test_lab_saves_the_same_text(in_lab):
    """JupyterLab saves through this contents manager, which finds the settings by itself."""
    manager = TextFileContentsManager()
    manager.root_dir = str(in_lab)
    manager.save(manager.get("notebooks/00_start.ipynb"), "notebooks/00_start.ipynb")
    made = read_notebook((in_lab / "notebooks" / "00_start.ipynb").read_text(), "here")
    assert (in_lab / "notebooks" / "00_start.py").read_text() == to_text(made, ROOT)
    assert sources(made) == sources(notebook(*RICH))


def test_lab_writes_an_edited_text_side_into_the_notebook(in_lab):
    manager = TextFileContentsManager()
    manager.root_dir = str(in_lab)
    model = manager.get("notebooks/00_start.ipynb")
    model["content"].cells[4].source = "answer = 43"
    manager.save(model, "notebooks/00_start.ipynb")
    assert "answer = 43" in (in_lab / "notebooks" / "00_start.py").read_text()
    chapter = Chapter("00_start", in_lab)
    assert merge_pair(chapter).cells[4].source == "answer = 43"


def test_jupytext_command_makes_the_same_text(in_lab):
    jupytext_command(["--quiet", "--to", "py:percent", str(in_lab / "notebooks/00_start.ipynb")])
    made = nbformat.read(in_lab / "notebooks" / "00_start.ipynb", 4)
    assert (in_lab / "notebooks" / "00_start.py").read_text() == to_text(made, ROOT)
