"""`make check`: nothing to say about a clean book, and every kind of staleness by name."""

import nbformat
import pytest

from tests.tools.conftest import edit, edit_notebook, snapshot
from tools import check
from tools.check import find_problems
from tools.notebooks import BookError

NOTEBOOK = "notebooks/00_start.ipynb"
STDERR = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: beware\n")
ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])


def test_clean_book_has_no_problems_and_is_not_touched(toy):
    before = snapshot(toy)
    assert find_problems(toy) == []
    assert snapshot(toy) == before


def append(name):
    def spoil(root):
        with (root / name).open("ab") as file:
            file.write(b"\n")

    return spoil


def remove(name):
    return lambda root: (root / name).unlink()


def write(name, text="x = 1\n"):
    def spoil(root):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)

    return spoil


def change(function):
    """Change the stored notebook and keep its form, as a careless editor of JSON would."""
    return lambda root: edit_notebook(root / NOTEBOOK, function)


SPOILERS = {
    "edited module": (append("mixconv/start.py"), "mixconv/start.py: stale"),
    "missing module": (remove("mixconv/then.py"), "mixconv/then.py: missing"),
    "edited page": (append("notebooks/01_then.md"), "notebooks/01_then.md: stale"),
    "missing page": (remove("notebooks/01_then.md"), "notebooks/01_then.md: missing"),
    "edited figure": (append("figures/dot.png"), "figures/dot.png: stale"),
    "missing figure": (remove("figures/dot.png"), "figures/dot.png: missing"),
    "stray module": (write("mixconv/old.py"), "mixconv/old.py: no notebook makes it"),
    "stray figure": (write("figures/old.png"), "figures/old.png: no notebook makes it"),
    "stray script": (write("mixconv/old.mjs"), "mixconv/old.mjs: no notebook makes it"),
    "stray folder": (write("mixconv/old/x.py"), "mixconv/old: no notebook makes it"),
    "stray data": (write("notebooks/data.csv"), "notebooks/data.csv: no notebook makes it"),
    "nbval marker": (
        change(lambda nb: nb.cells[1].update(source="# NBVAL_IGNORE_OUTPUT\ndouble(21)")),
        f"{NOTEBOOK}, cell 2: NBVAL_IGNORE_OUTPUT switches the comparison off",
    ),
    "stray page": (write("notebooks/07_old.md"), "notebooks/07_old.md: no notebook makes it"),
    "edited text": (append("notebooks/00_start.py"), "notebooks/00_start: the .ipynb and the .py"),
    "missing text": (remove("notebooks/00_start.py"), "notebooks/00_start.py: missing"),
    "missing notebook": (remove(NOTEBOOK), f"{NOTEBOOK}: missing"),
    "edited notebook": (
        lambda root: edit(root / NOTEBOOK, "Twice x.", "Two x."),
        "notebooks/00_start: the .ipynb and the .py differ",
    ),
    "unknown tag": (
        change(lambda nb: nb.cells[1].metadata.update(tags=["nbval-ignore_output"])),
        f"{NOTEBOOK}, cell 2: unknown tag nbval-ignore_output",
    ),
    "no execution count": (
        change(lambda nb: nb.cells[1].update(execution_count=None)),
        f"{NOTEBOOK}, cell 2: execution count None, not 1",
    ),
    "cells run out of order": (
        change(lambda nb: nb.cells[2].update(execution_count=7)),
        f"{NOTEBOOK}, cell 3: execution count 7, not 2",
    ),
    "stored stderr": (
        change(lambda nb: nb.cells[2].outputs.append(STDERR)),
        f"{NOTEBOOK}, cell 3: a stored warning: UserWarning: beware",
    ),
    "stored error": (
        change(lambda nb: nb.cells[2].outputs.append(ERROR)),
        f"{NOTEBOOK}, cell 3: a stored error, ValueError",
    ),
    "another kernel": (
        change(lambda nb: nb.metadata.kernelspec.update(name="my_env")),
        f"{NOTEBOOK}: kernel my_env, not python3",
    ),
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_staleness_is_reported_by_name(toy, kind):
    spoil, line = SPOILERS[kind]
    spoil(toy)
    problems = find_problems(toy)
    assert any(problem.startswith(line) for problem in problems), problems


def cut_the_stream(notebook):
    """As a kernel may send it: one stream in two pieces."""
    (output,) = notebook.cells[2].outputs
    first, second = (nbformat.from_dict(dict(output)) for _ in range(2))
    first.text, second.text = output.text[:1], output.text[1:]
    notebook.cells[2].outputs = [first, second]


# What JupyterLab, or another version of it, writes when a notebook is opened, run and saved.
NOT_CONTENT = {
    "random cell ids": change(lambda nb: nb.cells[0].update(id="b3c1f00d")),
    "time stamps": change(
        lambda nb: nb.cells[1].metadata.update(execution={"iopub.status.busy": "now"})
    ),
    "a fold opened or closed": change(
        lambda nb: nb.cells[1].metadata.update(jupyter={"source_hidden": False})
    ),
    "the language's version": change(lambda nb: nb.metadata.language_info.update(version="3.12")),
    "the kernel's title": change(lambda nb: nb.metadata.kernelspec.update(display_name="mine")),
    "a note by jupytext": change(lambda nb: nb.metadata.update(jupytext={"formats": "ipynb,py"})),
    "another layout of the JSON": lambda root: edit(root / NOTEBOOK, "\n ", "\n  "),
    "a stream in pieces": lambda root: edit_notebook(
        root / "notebooks" / "01_then.ipynb", cut_the_stream
    ),
}


@pytest.mark.parametrize("kind", NOT_CONTENT)
def test_what_is_not_content_is_passed_over(toy, kind):
    before = snapshot(toy)
    NOT_CONTENT[kind](toy)
    assert snapshot(toy) != before
    assert find_problems(toy) == []


def test_page_is_stale_when_a_stored_output_changes(toy):
    edit(toy / NOTEBOOK, '"42"', '"43"')
    assert find_problems(toy) == [
        "notebooks/00_start.md: stale, differs from what its notebook makes"
    ]


def test_every_problem_is_told_at_once(toy):
    for kind in ("edited module", "edited page", "missing figure", "stray module"):
        SPOILERS[kind][0](toy)
    assert len(find_problems(toy)) == 4


def test_unreadable_notebook_is_named(toy):
    (toy / NOTEBOOK).write_text("<<<<<<< HEAD")
    with pytest.raises(BookError, match=NOTEBOOK):
        find_problems(toy)


def test_main_names_the_command_that_mends(monkeypatch, capsys):
    monkeypatch.setattr(check, "find_problems", lambda: ["mixconv/x.py: stale"])
    assert check.main() == 1
    told = capsys.readouterr().err
    assert "mixconv/x.py: stale" in told
    assert "make book" in told


def test_main_turns_a_book_error_into_a_line(monkeypatch, capsys):
    def broken():
        raise BookError("02_x, cell 3: a stray string")

    monkeypatch.setattr(check, "find_problems", broken)
    assert check.main() == 1
    assert "02_x, cell 3: a stray string" in capsys.readouterr().err


def test_main_is_content(monkeypatch):
    monkeypatch.setattr(check, "find_problems", list)
    assert check.main() == 0
