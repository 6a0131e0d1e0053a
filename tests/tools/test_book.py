"""`make book` on a toy book: all or nothing, twice the same, and no hand edit lost."""

import os

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_output

from tests.tools.conftest import DOT, edit, read, snapshot
from tools import book
from tools.book import build, warn_if_slow
from tools.check import find_problems
from tools.notebooks import RECORD, BookError, Chapter, find_chapters, write_atomically

KINDS = ("ipynb", "py", "md")


def pretend_to_run(notebook, chapter, package_parent):
    """Number the cells as a kernel would, and leave it at that."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    for count, cell in enumerate(cells, start=1):
        cell.execution_count = count


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(book, "execute", pretend_to_run)


def change_both_chapters(root):
    edit(root / "notebooks" / "00_start.py", "return 2 * x", "return x + x")
    edit(root / "notebooks" / "01_then.py", "Four times", "Twice twice")


def test_first_build_makes_every_file(built_book):
    names = set(snapshot(built_book))
    assert names - {".gitignore", "pyproject.toml", "mixconv/__init__.py"} == {
        ".book.json",
        "figures/dot.png",
        "mixconv/start.py",
        "mixconv/then.py",
        "notebooks/README.md",
        *(f"notebooks/{stem}.{kind}" for stem in ("00_start", "01_then") for kind in KINDS),
    }
    assert "```text\n42\n```" in (built_book / "notebooks" / "00_start.md").read_text()
    assert "```text\n40\n```" in (built_book / "notebooks" / "01_then.md").read_text()
    counts = [cell.get("execution_count") for cell in read(Chapter("00_start", built_book)).cells]
    assert counts == [None, 1, 2, 3]


def test_second_build_changes_nothing(toy):
    before = snapshot(toy)
    assert build(toy) == 0
    assert snapshot(toy) == before


@pytest.mark.usefixtures("no_kernel")
def test_edited_text_reaches_notebook_package_and_page(toy):
    edit(toy / "notebooks" / "00_start.py", "Twice x.", "Two x.")
    build(toy)
    for name in ("notebooks/00_start.ipynb", "notebooks/00_start.md", "mixconv/start.py"):
        assert "Two x." in (toy / name).read_text(), name


@pytest.mark.usefixtures("no_kernel")
def test_edited_notebook_reaches_text_package_and_page(toy):
    edit(toy / "notebooks" / "00_start.ipynb", "Twice x.", "Two x.")
    build(toy)
    for name in ("notebooks/00_start.py", "notebooks/00_start.md", "mixconv/start.py"):
        assert "Two x." in (toy / name).read_text(), name


@pytest.mark.usefixtures("no_kernel")
def test_cells_are_formatted(toy):
    edit(toy / "notebooks" / "00_start.py", "return 2 * x", "return 2*x")
    assert "return 2*x" in (toy / "notebooks" / "00_start.py").read_text()
    build(toy)
    assert "return 2 * x" in (toy / "notebooks" / "00_start.py").read_text()
    assert "return 2 * x" in (toy / "mixconv" / "start.py").read_text()


def test_failing_cell_changes_no_file(toy):
    change_both_chapters(toy)
    edit(toy / "notebooks" / "01_then.py", "print(quadruple(10))", "print(quadruple('a') / 2)")
    before = snapshot(toy)
    with pytest.raises(BookError, match=r"01_then: a cell failed\n(?s:.*)TypeError"):
        build(toy)
    assert snapshot(toy) == before


def test_what_kernels_leave_is_stored_in_one_form(toy, monkeypatch):
    """One stream may arrive in pieces, and kernels add time stamps; neither is stored."""

    def noisy(notebook, chapter, package_parent):
        pretend_to_run(notebook, chapter, package_parent)
        pieces = [new_output("stream", name="stdout", text=text) for text in ("one\n", "two\n")]
        notebook.cells[1].outputs = pieces
        notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "now"}

    monkeypatch.setattr(book, "execute", noisy)
    build(toy)
    stored = read(Chapter("00_start", toy)).cells[1]
    assert [output.text for output in stored.outputs] == ["one\ntwo\n"]
    assert stored.metadata == {}
    assert find_problems(toy) == []


def test_dead_kernel_names_the_chapter(toy, monkeypatch):
    def die(*arguments, **keywords):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(NotebookClient, "execute", die)
    with pytest.raises(BookError, match=r"0._\w+: a cell failed\nKernel died"):
        build(toy)


@pytest.mark.parametrize("side", ["ipynb", "py"])
def test_edit_saved_during_the_build_is_not_lost(toy, monkeypatch, side):
    path = toy / "notebooks" / f"01_then.{side}"

    def run_and_save(notebook, chapter, package_parent):
        pretend_to_run(notebook, chapter, package_parent)
        if chapter.stem == "01_then":
            edit(path, "Four times", "Twice twice")

    monkeypatch.setattr(book, "execute", run_and_save)
    before = snapshot(toy)
    with pytest.raises(BookError, match=f"01_then.{side} changed during the build"):
        build(toy)
    after = snapshot(toy)
    assert [name for name in after if after[name] != before[name]] == [f"notebooks/01_then.{side}"]
    assert "Twice twice" in path.read_text()


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("broken", ["def double(x: int) -> int", "%%bash\necho hello"])
def test_syntax_error_names_the_chapter_and_changes_no_file(toy, broken):
    edit(toy / "notebooks" / "00_start.py", "def double(x: int) -> int:", broken)
    before = snapshot(toy)
    with pytest.raises(BookError, match="00_start"):
        build(toy)
    assert snapshot(toy) == before


def test_interrupt_while_running_changes_no_file(toy, monkeypatch):
    def interrupted(notebook, chapter, package_parent):
        if chapter.stem == "01_then":
            raise KeyboardInterrupt
        pretend_to_run(notebook, chapter, package_parent)

    monkeypatch.setattr(book, "execute", interrupted)
    change_both_chapters(toy)
    before = snapshot(toy)
    with pytest.raises(KeyboardInterrupt):
        build(toy)
    assert snapshot(toy) == before


@pytest.mark.usefixtures("no_kernel")
def test_interrupt_while_moving_leaves_whole_files(toy, monkeypatch):
    """Each file is as before or as after, none is half written, and the next build finishes."""
    change_both_chapters(toy)
    before = snapshot(toy)
    moves = []

    def replace(source, target, real=os.replace):
        moves.append(target)
        if len(moves) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            build(toy)
    between = snapshot(toy)
    assert build(toy) > 0
    after = snapshot(toy)
    assert set(between) == set(before) == set(after)
    assert all(between[name] in (before[name], after[name]) for name in between)
    assert before != between != after
    assert build(toy) == 0


@pytest.mark.parametrize("name", ["mixconv/start.py", "notebooks/01_then.md"])
@pytest.mark.usefixtures("no_kernel")
def test_hand_edit_is_refused_and_kept(toy, name):
    with (toy / name).open("a") as file:
        file.write("# mine\n")
    before = snapshot(toy)
    with pytest.raises(BookError, match=f"edited by hand.*{name}"):
        build(toy)
    assert snapshot(toy) == before


@pytest.mark.usefixtures("no_kernel")
def test_hand_edit_is_refused_in_a_fresh_clone(toy):
    (toy / RECORD).unlink()
    edit(toy / "mixconv" / "start.py", "return 2 * x", "return 3 * x")
    with pytest.raises(BookError, match=r"edited by hand.*mixconv/start.py"):
        build(toy)


@pytest.mark.usefixtures("no_kernel")
def test_edit_not_yet_committed_may_be_built_again(toy):
    """What the last build wrote is no hand edit, whatever HEAD says."""
    for old, new in (("Twice x.", "Two x."), ("Two x.", "x, twice.")):
        edit(toy / "notebooks" / "00_start.py", old, new)
        assert build(toy) > 0


@pytest.mark.usefixtures("no_kernel")
def test_first_edit_in_a_fresh_clone_is_built(toy):
    """There is no record of a build yet; HEAD knows the module and the page that will change."""
    (toy / RECORD).unlink()
    edit(toy / "notebooks" / "00_start.py", "Twice x.", "Two x.")
    assert build(toy) > 0
    assert "Two x." in (toy / "mixconv" / "start.py").read_text()


def test_kernels_import_the_package_as_it_will_be(toy):
    """Chapter 1 sees chapter 0's edit in the same build."""
    edit(toy / "notebooks" / "00_start.py", "return 2 * x", "return 3 * x")
    build(toy)
    assert "```text\n90\n```" in (toy / "notebooks" / "01_then.md").read_text()
    assert (toy / "figures" / "dot.png").read_bytes()[:4] == b"\x89PNG"
    assert DOT in (toy / "notebooks" / "00_start.ipynb").read_text()


@pytest.mark.parametrize(("seconds", "remark"), [(9.9, False), (10.1, True)])
def test_slow_chapter_is_remarked_on(toy, seconds, remark):
    notebook = read(Chapter("00_start", toy))
    assert not warn_if_slow(notebook, 1e9)
    notebook.cells[0].source += "\nRuns in under 10 seconds"
    assert bool(warn_if_slow(notebook, seconds)) is remark


def test_chapters_are_found_in_reading_order(toy):
    for name in ("10_late.ipynb", "02_more.py", "notes.py", "02_more.md"):
        (toy / "notebooks" / name).write_text("")
    stems = [chapter.stem for chapter in find_chapters(toy)]
    assert stems == ["00_start", "01_then", "02_more", "10_late"]


def test_equal_file_is_left_alone(tmp_path):
    path = tmp_path / "new" / "file"
    assert write_atomically(path, "text")
    inode = path.stat().st_ino
    assert not write_atomically(path, b"text")
    assert path.stat().st_ino == inode
    assert write_atomically(path, "other")
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("fails", [False, True])
def test_main_says_how_it_went(monkeypatch, capsys, fails):
    def fake(only):
        assert only == []
        if fails:
            raise BookError("00_start: a cell failed")
        return 3

    monkeypatch.setattr(book, "build", fake)
    monkeypatch.setattr("sys.argv", ["make book"])
    assert book.main() == int(fails)
    told = capsys.readouterr()
    assert ("00_start: a cell failed" in told.err) is fails
    assert ("3 files changed" in told.out) is not fails


def test_only_the_named_and_the_edited_chapters_are_run(toy, capsys):
    build(toy, only=["01"])
    assert "01_then" in (said := capsys.readouterr().out)
    assert "00_start" not in said
    edit(toy / "notebooks" / "00_start.py", "double(21)", "double(22)")
    build(toy, only=["01"])
    assert "00_start" in capsys.readouterr().out
    assert find_problems(toy) == []
    with pytest.raises(BookError, match="no chapter begins with 7"):
        build(toy, only=["7"])


def test_what_a_killed_build_left_is_seen_and_swept(toy):
    left = toy / "notebooks" / ".00_start.md.x1y2"
    left.write_text("half a page")
    assert find_problems(toy) == ["notebooks/.00_start.md.x1y2: no notebook makes it; remove it"]
    build(toy)
    assert not left.exists()
    assert find_problems(toy) == []


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "no", "notebooks/00_x.md"), 1, "notebooks/00_x.md cannot be written"),
    ],
)
def test_main_turns_interruptions_into_a_line(monkeypatch, capsys, error, code, told):
    def stop(**_):
        raise error

    monkeypatch.setattr(book, "build", stop)
    monkeypatch.setattr("sys.argv", ["book"])
    assert book.main() == code
    assert told in capsys.readouterr().err


def test_a_closed_fold_says_in_lab_what_it_holds(toy):
    drawing = read(Chapter("00_start", toy)).cells[-1]
    assert drawing.source.startswith("# fold: The code that draws this\nmetadata = ")
    page = (toy / "notebooks" / "00_start.md").read_text()
    assert page.count("The code that draws this") == 1  # the page's summary says it
