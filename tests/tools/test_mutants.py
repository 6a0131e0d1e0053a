"""Mutants, the choice of tests that judge them, and the stored report's form."""

import json
import types
from pathlib import Path

import pytest

from tools.judge import Judge, Record
from tools.mutants import WHY, read_report, sum_up
from tools.mutate import OPERATORS, Finder, Mutant, contrast, draw


def mutants(source: str) -> list[Mutant]:
    return Finder("mixconv/x.py", source.encode()).found


def mutated(source: str) -> set[str]:
    return {mutant.apply(source.encode()).decode() for mutant in mutants(source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("y = a + b * c", {"y = (a - b * c)", "y = a + (b / c)"}),
        ("y += x", {"y -= x"}),
        ("y = a < b == c", {"y = (a <= b == c)", "y = (a < b != c)"}),
        ("y = a and b", {"y = (a or b)"}),
        ("y = not a", {"y = (a)"}),
        ("y = True", {"y = False"}),
        ("y = 3", {"y = 4"}),
        ("y = 'é', -a", {"y = 'éx', -a", "y = 'é', (a)"}),
        ("y = a if b else c", {"y = a if (not (b)) else c"}),
        ("y = [a for a in b if c]", {"y = [a for a in b if (not (c))]"}),
        ("y = f(a, b=c)", {"y = (f(a))"}),
        ("f(a)", {"pass"}),
        ("if a:\n    raise E('no')", {"if (not (a)):\n    raise E('no')", "if a:\n    pass"}),
        ("def f(x: int = 3) -> 'g':\n    '''D.'''\n    return x",
         {"def f(x: int = 4) -> 'g':\n    '''D.'''\n    return x",
          "def f(x: int = 3) -> 'g':\n    '''D.'''\n    return None"}),
        ("@d\nclass A:\n    x: int = 1",
         {"\nclass A:\n    x: int = 1", "@d\nclass A:\n    x: int = 2"}),
        ("for a in b:\n    break", {"for a in b:\n    continue"}),
    ],
)  # fmt: skip
def test_each_thing_is_changed_in_its_way(source, expected):
    assert mutated(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring: 1 + 1."""',
        "__all__ = ['a']",
        "import a",
        "x: Literal['a']",
        "def f(x: A | B) -> C | D: ...",
        "y = f'{a} + {b}'",
        "y = cast('A', b)",
    ],
)
def test_what_only_tells_is_left_alone(source):
    assert mutated(source) == set()


def test_words_of_a_message_stay():
    assert mutated("raise E('no', 1)") == {"pass", "raise E('no', 2)"}
    assert mutated("log.warning('slow')") == {"pass"}
    assert mutated("add('--size', help='in pixels')") == {
        "pass",
        "add('--sizex', help='in pixels')",
    }


def test_equal_changes_have_names_of_their_own():
    names = [mutant.name for mutant in mutants("def f():\n    g(1, 1)\n    g(2, 1)")]
    assert len(set(names)) == len(names) == 6
    assert "f: 1 → 2 #2" in names


def test_a_long_change_is_cut_to_where_it_is():
    assert contrast("a" * 99 + "+" + "b" * 99, "a" * 99 + "-" + "b" * 99) == " → ".join(
        f"…{'a' * 30}{sign}{'b' * 30}…" for sign in "+-"
    )


def test_a_sample_stays_as_other_code_is_written():
    source = "".join(f"def f{i}():\n    return g({i})\n" for i in range(50))
    first = draw(mutants(source), 1, 20)
    more = draw(mutants("def new():\n    return 1 + 1\n" + source), 1, 20)
    assert len({m.name for m in first} & {m.name for m in more}) >= 17
    assert draw(mutants(source), 2, 20) != first


def test_a_mutant_is_judged_by_the_tests_of_its_lines(tmp_path):
    source = (
        "X = 1\n\ndef f(a=2):\n    if a:\n        b = 3\n    return b\n\ndef g():\n    return 4\n"
    )
    near = tmp_path / "tests/package/test_x.py"
    near.parent.mkdir(parents=True)
    near.touch()
    runs = {4: ["t.py::f"], 5: ["t.py::slow", "t.py::b"], 6: ["t.py::f"], 9: ["t.py::g"]}
    seconds = {"t.py::slow": 9.0, "t.py::b": 0.2, "t.py::f": 0.1, "t.py::g": 0.1, "t.py::z": 0.1}
    seconds |= {"tests/package/test_x.py::own": 0.5}
    record = Record(seconds, {"mixconv/x.py": runs}, [])
    judge = types.SimpleNamespace(tree=tmp_path, patience=5.0, record=record)
    asked = {m.name: Judge.choose(judge, m) for m in mutants(source)}  # type: ignore[arg-type]
    own = ["tests/package/test_x.py::own"]
    assert asked["f: 3 → 4"] == [own, ["t.py::b"]]  # slow would take too long
    assert asked["g: 4 → 5"] == [own, ["t.py::g"]]
    assert asked["f: 2 → 3"] == [own, ["t.py::f", "t.py::b"]]  # a default: all that call f
    assert asked[": 1 → 2"] == [own, ["t.py::f", "t.py::g", "t.py::b"]]


def test_what_no_test_can_see_does_not_count():
    survivors = [{"why": "equivalent"}, {"why": "real"}, {"why": "speed only"}]
    summed = sum_up(99, survivors)
    assert summed["killed_share"] == 0.99
    assert summed["counts"] == {
        "killed": 99, "equivalent": 1, "message only": 0, "speed only": 1, "real": 1,
    }  # fmt: skip


def test_the_stored_report_is_whole():
    report = read_report()
    survivors, killed = report["survivors"], report["killed"]
    assert report["sample"] == len(survivors) + len(killed) == len({*killed, *names(survivors)})
    assert sum_up(len(killed), survivors).items() <= report.items()
    assert (report["operators"], report["seed"]) == (OPERATORS, 1)
    assert 150 <= report["sample"] < report["of"]
    assert report["killed_share"] >= 0.97
    for survivor in survivors:
        assert survivor["why"] in WHY, survivor
        assert len(survivor["because"].split()) >= 3, survivor
    for name in ("date", "python", "torch", "coverage", "patience"):
        assert report[name], name


def names(survivors: list[dict[str, str]]) -> list[str]:
    return [survivor["key"] for survivor in survivors]


def test_before_there_is_a_report_there_is_none(tmp_path: Path):
    assert read_report(tmp_path / "mutants.json") == {}
    (tmp_path / "mutants.json").write_text(json.dumps({"seed": 1}), encoding="utf-8")
    assert read_report(tmp_path / "mutants.json") == {"seed": 1}
