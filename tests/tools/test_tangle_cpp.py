"""C++ in Markdown cells → files of the package."""

import pytest

from tests.tools.conftest import code, commit_all, edit, markdown, notebook
from tools.book import build
from tools.check import find_problems
from tools.notebooks import ROOT, BookError
from tools.tangle import cpp_blocks, tangle


def block(body, name="toy.cpp", fence="```cpp"):
    return f"Text before.\n\n{fence}\n//| export {name}\n{body}\n```\n\nText after."


def made(*cells):
    return tangle([("02_toy", notebook(*cells))], ROOT)["toy.cpp"]


def test_blocks_are_joined_in_order_without_markers():
    two = markdown(block("int one = 1;") + "\n" + block("int two = 2;"))
    lines = made(two, code("x = 1"), markdown(block("int three = 3;"))).splitlines()
    assert lines[0].startswith("// ")
    assert "notebooks/02_toy.ipynb" in lines[0]
    assert "Edit the notebook" in lines[0]
    assert [line for line in lines[1:] if line] == [
        "int one = 1;",
        "int two = 2;",
        "int three = 3;",
    ]


@pytest.mark.parametrize("fence", ["```cpp", "```c++"])
def test_both_names_of_the_language_are_taken(fence):
    assert "int x;" in made(markdown(block("int x;", fence=fence)))


def test_a_file_in_a_folder_of_the_package():
    cells = notebook(markdown(block("int x;", name="fast/toy.cpp")))
    assert list(tangle([("02_toy", cells)], ROOT)) == ["fast/toy.cpp"]


def test_code_is_kept_to_the_letter():
    body = "struct A {\n\n  // why\n  int b;  // `not` Markdown: $x$\n};"
    assert body in made(markdown(block(body)))


@pytest.mark.parametrize(
    "cell",
    [
        markdown("```cpp\nint shown_only;\n```"),
        markdown("`//| export` is a marker"),
        code("# //| export toy.cpp"),
    ],
)
def test_what_is_not_marked_is_not_taken(cell):
    assert tangle([("02_toy", notebook(cell))], ROOT) == {}


@pytest.mark.parametrize(
    "source",
    [
        "//| export toy.cpp",
        block("int x;", fence="```c"),
        block("int x;", fence="```"),
        block("int x;", name="Toy.cpp"),
        block("int x;", name="../toy.cpp"),
        block("int x;", name="toy.h"),
        block("int x;", name=""),
        "```cpp\nint x;\n//| export toy.cpp\n```",
        block("//| export toy.cpp"),
        "```cpp\n//| exprt toy.cpp\n```",
    ],
)
def test_misplaced_or_misspelt_marker(source):
    with pytest.raises(BookError, match=r"^02_toy, cell 1: .*first line of a ```c\+\+ block"):
        cpp_blocks(source, "02_toy, cell 1")


def test_one_file_belongs_to_one_chapter():
    cells = notebook(markdown(block("int x;")))
    with pytest.raises(BookError, match=r"03_more, cell 1: toy\.cpp belongs to chapter 02_toy"):
        tangle([("02_toy", cells), ("03_more", cells)], ROOT)


def test_book_writes_the_file_and_check_sees_an_edit(toy):
    text = toy / "notebooks" / "01_then.py"
    cell = "\n# %% [markdown]\n# ```cpp\n# //| export toy.cpp\n# int x = 1;\n# ```\n"
    text.write_text(text.read_text() + cell)
    assert build(toy) > 0
    commit_all(toy)
    made = toy / "mixconv" / "toy.cpp"
    assert made.read_text().endswith("int x = 1;\n")
    assert find_problems(toy) == []
    edit(made, "x = 1", "x = 2")
    assert find_problems(toy) == ["mixconv/toy.cpp: stale, differs from what its notebook makes"]
    (toy / ".book.json").unlink()
    with pytest.raises(BookError, match=r"edited by hand.*mixconv/toy\.cpp"):
        build(toy)
    made.unlink()
    assert find_problems(toy) == ["mixconv/toy.cpp: missing"]
