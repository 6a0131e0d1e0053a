"""Every exercise has one form: grade, hints, stub, test, solution, and wrong answers that fail.

That each test refuses its wrong answers, nothing, a constant and the identity is `attempt`'s work
when the solution cell runs; here its printed lines are demanded.
"""

import ast
import re
from collections import defaultdict

import pytest

from tests.tools.conftest import read, real_chapters
from tests.tools.test_house import number_of, printed

GRADED = real_chapters()
each_graded = pytest.mark.parametrize("chapter", GRADED, ids=lambda chapter: chapter.stem)

TITLE = re.compile(r"^\*\*(\d+\.\d+)\*\*(.*)", re.MULTILINE)
GRADE = re.compile(r" ★{1,3} \*\d+ minutes?, (no|\w+) lines?\.\* ")
HINT = re.compile(
    r"^<details><summary>Hint: (the idea|the equation|the first line)</summary>\n\n.+?\n\n"
    r"</details>$",
    re.MULTILINE | re.DOTALL,
)


def exercises(notebook):
    """(number, text, stub cell, solution cell) of each exercise of a notebook."""
    found = []
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (title := TITLE.search(cell.source)):
            code = [c for c in notebook.cells[position + 1 :] if c.cell_type == "code"]
            found.append((title[1], cell.source[title.start() :], code[0], code[1]))
    return found


def functions(source):
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def signature(function):
    return ast.unparse(function.args), function.returns and ast.unparse(function.returns)


def attempts(source):
    """The arguments of each `attempt(…)`, and its keywords."""
    found = []
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "attempt":
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            found.append(([ast.unparse(argument) for argument in call.args], keywords))
    return found


def faults_of(text, stub_cell, solution_cell):
    """What an exercise lacks, in words."""
    title = TITLE.search(text)
    if not title or not GRADE.match(title[2]):
        yield "no grade such as ★★ *10 minutes, two lines.*"
    if not 1 <= len(HINT.findall(text)) == text.count("<details>"):
        yield "no hint, or one of another form"
    defined, tried = functions(stub_cell.source), attempts(stub_cell.source)
    if len(tried) != 1 or len(tried[0][0]) != 2 or not set(tried[0][0]) <= set(defined):
        yield "no stub, or no test, or not one attempt(stub, test)"
        return
    stub, test = tried[0][0]
    if ast.unparse(defined[stub].body[-1]) != "raise NotImplementedError":
        yield f"{stub} is no stub"
    if printed(stub_cell) != f"to do: {stub}\n":
        yield "the stub's cell does not print that it is to do"
    if "solution" not in solution_cell.metadata.get("tags", []):
        yield "no solution follows"
        return
    answers, tried = functions(solution_cell.source), attempts(solution_cell.source)
    if len(tried) != 1 or tried[0][0] != [f"{stub}_solution", test]:
        yield f"no attempt({stub}_solution, {test}, wrong=[…])"
        return
    listed = tried[0][1].get("wrong")
    wrong = [ast.unparse(name) for name in listed.elts] if isinstance(listed, ast.List) else []
    if len(wrong) < 2:
        yield "fewer than two wrong answers"
    for name in (f"{stub}_solution", *wrong):
        if name not in answers or signature(answers[name]) != signature(defined[stub]):
            yield f"{name} is not defined there with the stub's signature"
    lines = printed(solution_cell)
    if f"solved: {stub}_solution\n" not in lines:
        yield "the solution does not print that it is solved"
    for name in wrong:
        misconception = ast.get_docstring(answers[name]) if name in answers else None
        caught = " ".join(f"caught: {misconception} → ".split())  # it may be broken into lines
        if not misconception or caught not in " ".join(lines.split()):
            yield f"{name} has no docstring that is printed as caught"


@each_graded
def test_every_exercise_has_the_form(chapter):
    faults = {
        number: list(faults_of(text, stub, solution))
        for number, text, stub, solution in exercises(read(chapter))
    }
    assert {number: found for number, found in faults.items() if found} == {}


def test_every_chapter_has_enough_of_them():
    count: dict[int, list[str]] = defaultdict(list)
    for chapter in GRADED:
        count[number_of(chapter)] += [number for number, *_ in exercises(read(chapter))]
    for chapter_number, numbers in count.items():
        assert numbers == [f"{chapter_number}.{i}" for i in range(1, len(numbers) + 1)]
        few, many = (2, 4) if 11 <= chapter_number <= 17 else (4, 6)
        assert few <= len(numbers) <= many, f"chapter {chapter_number} has {len(numbers)}"


# The rules, seen to fail

TEXT = """\
**1.1** ★ *1 minute, one line.* Double.

<details><summary>Hint: the idea</summary>

Add it to itself.

</details>
"""
STUB = "def f(x: int) -> int:\n    raise NotImplementedError\n\ndef t(a): ...\n\nattempt(f, t)"
SOLUTION = """\
def f_solution(x: int) -> int:
    return 2 * x

def g(x: int) -> int:
    \"\"\"forget it\"\"\"
    return x

def h(x: int) -> int:
    \"\"\"square\"\"\"
    return x * x

attempt(f_solution, t, wrong=[g, h])"""
CAUGHT = "solved: f_solution\ncaught: forget it → no\ncaught: square → no\n"


class Cell:
    def __init__(self, source, text, tags):
        from nbformat.v4 import new_output

        self.source, self.metadata = source, {"tags": tags}
        self.outputs = [new_output("stream", name="stdout", text=text)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("", ""), None),
        (("★ ", ""), "no grade"),
        (("*1 minute, one line.*", "*1 minute.*"), "no grade"),
        (("Hint: the idea", "Hint"), "no hint"),
        (("Add it to itself.\n\n</details>", ""), "no hint"),
        (("raise NotImplementedError", "return 2 * x"), "f is no stub"),
        (("to do: f", "solved: f"), "does not print that it is to do"),
        (("'solution'", "'drawing'"), "no solution follows"),
        (("f_solution, t, w", "f_solution, u, w"), "no attempt"),
        (("wrong=[g, h]", "wrong=[g]"), "fewer than two"),
        (("def h(x: int)", "def h(x: float)"), "h is not defined there with"),
        (('"""square"""', ""), "h has no docstring"),
        (("caught: square", "square"), "h has no docstring that is printed"),
        (("solved: f_solution", ""), "does not print that it is solved"),
    ],
)
def test_the_rules_see_what_is_missing(change, fault):
    parts = [TEXT, STUB, SOLUTION, "to do: f\n", CAUGHT, "'solution'"]
    text, stub, solution, todo, caught, tag = (part.replace(*change) for part in parts)
    cells = Cell(stub, todo, []), Cell(solution, caught, [tag.strip("'")])
    found = list(faults_of(text, *cells))
    assert (fault is None and found == []) or (fault and any(fault in line for line in found))
