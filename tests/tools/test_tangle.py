"""Notebooks → package: what the tangler joins, keeps and refuses."""

import ast

import pytest

from tests.tools.conftest import code, markdown, notebook, read, real_chapters
from tools.notebooks import ROOT, BookError
from tools.tangle import export_target, header, tangle

HEAD = '#| export toy.py\n"""A toy."""\n'
PIECE = "#| export toy.py\n"


def toy_module(*sources):
    return tangle([("02_toy", notebook(*sources))], ROOT)["toy.py"]


def run(source):
    namespace = {"__name__": "toy"}
    exec(compile(source, "toy.py", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("marker", ["#| export toy.py", "#|export toy.py", "#|  export  toy.py  "])
def test_marker(marker):
    assert export_target(f"{marker}\nx = 1", "here") == "toy.py"


@pytest.mark.parametrize("source", ["x = 1", "# export toy.py is what a marker says", ""])
def test_no_marker(source):
    assert export_target(source, "here") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("#| exprt toy.py", "is not a marker"),
        ("#| Export toy.py", "is not a marker"),
        ("#| exports toy.py", "is not a marker"),
        ("#|", "is not a marker"),
        ("#| export", "does not name a module"),
        ("#| export toy", "does not name a module"),
        ("#| export Toy.py", "does not name a module"),
        ("#| export ../toy.py", "does not name a module"),
        ("#| export toy.py other.py", "does not name a module"),
        ("#| export __init__.py", "does not name a module"),
        ("#| export fast/__init__.py", "does not name a module"),
        ("#| export fast/../toy.py", "does not name a module"),
        ("#| export a/b/toy.py", "does not name a module"),
        ("x = 1\n#| export toy.py", "must be the first line"),
        ("\n#| export toy.py", "must be the first line"),
    ],
)
def test_misspelt_marker(source, message):
    with pytest.raises(BookError, match=f"^02_toy, cell 3: .*{message}"):
        export_target(source, "02_toy, cell 3")


def test_title_of_a_fold_stays_out_of_the_module():
    titled = "# fold: How it is halved\n" + PIECE + "# why\ndef half(x):\n    return x / 2\n"
    assert export_target(titled, "here") == "toy.py"
    module = toy_module(HEAD, titled)
    assert "fold" not in module
    assert "# why\ndef half(x):" in module
    with pytest.raises(BookError, match="must be the first line"):
        export_target("# fold: A name\n\n" + PIECE, "here")


def test_module_opens_with_the_notebook_to_edit_and_its_docstring():
    lines = toy_module(HEAD).splitlines()
    assert "notebooks/02_toy.ipynb" in lines[0]
    assert "Edit the notebook" in lines[0]
    assert ast.get_docstring(ast.parse("\n".join(lines))) == "A toy."


def test_a_long_first_line_is_broken():
    short = (
        "# Generated from notebooks/02_toy.ipynb by `make book`. Edit the notebook, not this file."
    )
    assert header("02_toy", "#") == short
    first, second = header("02_" + "long" * 5, "//").splitlines()
    assert first.endswith("by `make book`.")
    assert second == "// Edit the notebook, not this file."


def test_only_marked_code_cells_are_taken():
    text = toy_module(HEAD + "x = 1", "y = 2", markdown(PIECE + "w = 0"), PIECE + "z = 3")
    assert [name for name in run(text) if name in "wxyz"] == ["x", "z"]


def test_imports_are_hoisted_merged_and_sorted():
    text = toy_module(
        HEAD + "import math\n\nhalf = math.pi / 2",
        PIECE + "from collections import deque\nimport math\n\nqueue = deque([half])",
        PIECE + "from collections import Counter\n\ncounts = Counter(queue)",
    )
    block = "import math\nfrom collections import Counter, deque\n"
    assert text.count("import") == 2
    assert text.index(block) < text.index("half =")


def test_future_import_of_a_later_cell_comes_first():
    text = toy_module(HEAD + "import math", PIECE + "from __future__ import annotations")
    assert text.index("__future__") < text.index("import math")
    run(text)


def test_all_lists_public_names_sorted():
    text = toy_module(
        HEAD + "def b():\n    return _c\n\n\nclass A:\n    inner = 1",
        PIECE + "_c = 3\nSIZE: int = 4",
    )
    assert run(text)["__all__"] == ["SIZE", "A", "b"]


def test_no_all_without_public_names():
    assert "__all__" not in toy_module(HEAD + "_x = 1")


def test_class_told_in_pieces_is_one_class():
    text = toy_module(
        HEAD + 'class Layer(dict):\n    """A layer."""\n\n    size = 3',
        PIECE + "def between():\n    return Layer()",
        PIECE + "class Layer(Layer):\n    def area(self):\n        return self.size**2",
        PIECE
        + "class Layer(Layer):\n    # why\n    def twice(self):\n        return 2 * self.area()",
    )
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 1
    assert ast.unparse(classes[0].bases[0]) == "dict"
    assert "    # why\n    def twice" in text
    assert run(text)["between"]().twice() == 18


def test_decorators_stay_with_what_they_decorate():
    text = toy_module(
        HEAD + "from functools import cache\n\n\n# slow\n@cache\ndef f(x):\n    return x",
        PIECE + "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: int = 0",
        PIECE + "class Point(Point):\n    @staticmethod\n    def zero():\n        return 0",
    )
    assert "# slow\n@cache\ndef f(x):" in text
    made = run(text)
    assert made["f"].cache_info().hits == 0
    assert made["Point"](x=2) == made["Point"](x=2)
    assert made["Point"].zero() == 0


def test_overloads_repeat_a_name():
    text = toy_module(
        HEAD + "from typing import overload\n\n\n@overload\ndef f(x: int) -> int: ...",
        PIECE + "@overload\ndef f(x: str) -> str: ...",
        PIECE + "def f(x):\n    return x",
    )
    assert text.count("def f(") == 3
    assert run(text)["f"](3) == 3


def test_property_setter_in_a_later_piece():
    text = toy_module(
        HEAD + "class A:\n    @property\n    def x(self):\n        return self._x",
        PIECE + "class A(A):\n    @x.setter\n    def x(self, value):\n        self._x = value",
    )
    a = run(text)["A"]()
    a.x = 5
    assert a.x == 5


@pytest.mark.parametrize(
    "source",
    [
        HEAD + "# kept\nx = 1",
        HEAD + "x = 1  # kept",
        HEAD + "# kept\nimport math\n\nx = math.pi",
        HEAD + "import math  # kept\n\nx = math.pi",
        HEAD + "def f():\n    return 1\n    # kept",
        HEAD + "# kept\n@staticmethod\ndef f():\n    return 1",
        HEAD + "x = [\n    # kept\n    1,\n]",
        PIECE + '# kept\n"""A toy."""\nx = 1',
    ],
)
def test_comments_are_kept(source):
    assert toy_module(source).count("# kept") == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("class B(B):\n    x = 1", "adds to class B, which no cell before begins"),
        ("def f():\n    return 2", "f is exported already in 02_toy, cell 1"),
        ("x = 2", "x is exported already in 02_toy, cell 1"),
        ("class A:\n    y = 2", "A is exported already in 02_toy, cell 1"),
        ("class A(A):\n    def m(self):\n        return 2", "A.m is defined twice"),
        ("class A(A, dict):\n    y = 2", "belong to its first piece"),
        ("class A(A, metaclass=type):\n    y = 2", "belong to its first piece"),
        ("@str\nclass A(A):\n    y = 2", "belong to its first piece"),
        ('class A(A):\n    """Again."""', "docstring of A belongs to its first piece"),
        ("# lost\nclass A(A):\n    y = 2", "inside the class body"),
        ("from cmath import pi", "give one name two meanings"),
        ('"""Stray."""', "a stray string"),
        ("y = 1\n\n# lost", "comments after the last statement"),
        ("# alone", "comments after the last statement"),
        ("y = 1\nz = (2", "line 3: '\\(' was never closed"),
        ("def g()\n    return 1", "line 2: expected ':'"),
        ("%matplotlib inline", "line 2: invalid syntax"),
        ("!ls", "line 2: invalid syntax"),
    ],
)
def test_refusal_names_notebook_and_cell(second, message):
    first = "from math import pi\n\nx = pi\n\n\ndef f():\n    return 1\n\n\n"
    first += "class A:\n    def m(self):\n        return 1"
    with pytest.raises(BookError, match=f"^02_toy, cell 3(: |, ).*{message}"):
        toy_module(HEAD + first, "x = 'not exported'", PIECE + second)


def test_member_of_an_earlier_piece_may_not_be_repeated():
    pieces = [f"{PIECE}class A(A):\n    def m(self):\n        return {i}" for i in range(2)]
    with pytest.raises(BookError, match=r"^02_toy, cell 3: A\.m is defined twice"):
        toy_module(HEAD + "class A:\n    x = 1", *pieces)


def test_module_must_begin_with_its_docstring():
    with pytest.raises(BookError, match=r"^02_toy, cell 1: toy.py must begin with its docstring"):
        toy_module(PIECE + "import math")


def test_module_from_two_chapters_is_refused():
    chapters = [("02_toy", notebook(HEAD)), ("03_more", notebook("y = 1", PIECE + "x = 1"))]
    with pytest.raises(BookError, match=r"^03_more, cell 2: toy.py belongs to chapter 02_toy"):
        tangle(chapters, ROOT)


def test_one_chapter_may_make_two_modules():
    cells = notebook(HEAD + "x = 1", code('#| export more.py\n"""More."""\nx = 2'))
    assert sorted(tangle([("02_toy", cells)], ROOT)) == ["more.py", "toy.py"]


def test_real_notebooks_make_the_stored_package():
    made = tangle([(chapter.stem, read(chapter)) for chapter in real_chapters()], ROOT)
    package = ROOT / "mixconv"
    paths = [path for ending in ("py", "cpp") for path in package.rglob(f"*.{ending}")]
    written = [path for path in paths if path.name != "__init__.py"]
    stored = {path.relative_to(package).as_posix(): path.read_text() for path in written}
    assert sorted(made) == sorted(stored)
    assert [name for name in made if made[name] != stored[name]] == []


def test_a_module_in_a_folder_of_the_package():
    cells = notebook(code('#| export fast/toy.py\n"""A toy."""\n\nX = 1'))
    assert list(tangle([("02_toy", cells)], ROOT)) == ["fast/toy.py"]
