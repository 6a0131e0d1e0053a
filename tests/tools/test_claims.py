"""Numbers in prose: what holds them, and that a wrong one is named."""

import pytest

from tests.tools.conftest import edit_notebook, markdown
from tools import check
from tools.check import claim_problems
from tools.claims import (
    Pool,
    claims_in,
    claims_of_book,
    equations_in,
    numbers_in,
    summary,
    worked_out,
)
from tools.notebooks import ROOT

PRINTED = Pool([4134606.0, 0.6351, 92176.0, 41.0, 23.0])

HERE = "tests/tools/test_claims.py"


def states(text, pool=PRINTED, root=ROOT):
    return [(c.number.text, c.by) for c in claims_in(text, "x", worked_out([text]), pool, [], root)]


@pytest.mark.parametrize(
    ("text", "by"),
    [
        ("4,134,606 parameters", "a cell"),
        ("4.13 million parameters", "a cell"),
        ("4.1M parameters", "a cell"),
        ("64% of the area", "a cell"),
        ("92,176 more", "a cell"),
        ("98 thousand more", ""),  # what chapter 5 once said of 92,176
        ("92 thousand more", "a cell"),
        ("65% of the area", ""),
        ("4.2M parameters", ""),
        ("42 weights", ""),
        ("about 24 rows", ""),
        ("the paper prints 256M", "a source"),
        ("mAP 21.8, [they say](https://arxiv.org/abs/1907.09595)", "a source"),
        ("2.6 GB <!-- measured: du -sh .venv, 2026-11-25 -->", "a measurement"),
        ("4,652,008 in all <!-- held: nowhere.json -->", ""),
        (f"5.2 times <!-- held: {HERE}::test_no_such -->", ""),
        (f"5.2 times <!-- held: {HERE}::test_names_are_not_claims -->", "a test"),
    ],
)
def test_a_number_has_what_holds_it(text, by):
    assert [state for _, state in states(text)] == [by]


def test_a_file_holds_the_numbers_in_it(tmp_path):
    (tmp_path / "x.json").write_text('{"kept": 1812, "parameters": 4652008}')
    text = "4,652,008 parameters, 1,813 kept. <!-- held: x.json -->"
    assert states(text, root=tmp_path) == [("4,652,008", "a file"), ("1,813", "")]


@pytest.mark.parametrize(
    "text",
    [
        "## 12.5 A heading",
        "in chapters 11 and 12, and in figure 4.13",
        "`conv2d_13`, `42` and $k^{42}$",
        "[14 · The whole kernel](14_whole_kernel.ipynb)",
        "Python 3.11 and torch 2.13.0",
        "published in 2019 with three layers of 5 kernels",
        "MixConv 3579, EfficientNet-Lite0, V2, conv2d",
        "**4.2** ★★ *15 minutes, 12 lines.* Predict.",
    ],
)
def test_names_are_not_claims(text):
    assert states(text) == []


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("(25 − 9) · 240 = 3,840", True),
        ("(25 − 9) · 240 = 3,850", False),
        ("32 · 1.10 / 6.85 = 5.1", True),
        ("32 · 1.10 / 6.85 = 5.2", False),
        ("14 × 14 = 196", True),
        ("9 + 25 + 49 + 81 = 164", True),
        ("480 · 20 + 20 = 9,640", False),
        ("1.10 + 1.61 + 1.95 + 2.20 = 6.86", True),
        ("224 = 16 · 14", True),
    ],
)
def test_an_equation_is_worked_out(text, true):
    assert [held for _, held in equations_in(text)] == [true]
    by = [state for _, state in states(f"It is {text}.", Pool([]))]
    assert ("" in by) is not true


def test_numbers_are_read_as_they_are_written():
    found = [(n.value, n.places, n.unit) for n in numbers_in("1,066 then 7.30M, 8 × and 12.5%")]
    assert found == [(1066.0, 0, ""), (7.3, 2, "M"), (8.0, 0, "×"), (12.5, 1, "%")]


def test_a_wrong_number_in_a_chapter_is_named(toy, monkeypatch, capsys):
    def tell(text):
        (toy / "README.md").write_text("No numbers.\n")
        edit_notebook(
            toy / "notebooks" / "01_then.ipynb", lambda nb: nb.cells.append(markdown(text))
        )
        return claim_problems(claims_of_book(toy))

    assert tell("Four times ten is 40.") == []
    (problem,) = tell("Four times ten is 42.")
    assert problem.startswith("notebooks/01_then: 42 is held by no cell")
    monkeypatch.setattr(check, "find_problems", list)
    monkeypatch.setattr(check, "claims_of_book", lambda: claims_of_book(toy))
    assert check.main() == 1
    assert "42 is held by no cell" in capsys.readouterr().err


def test_every_number_in_the_book_is_held():
    claims = claims_of_book()
    assert claim_problems(claims) == []
    assert "0 by nothing" in summary(claims)
    assert len(claims) > 700
    by_cells = [claim for claim in claims if claim.by in ("a cell", "a sum", "the chapter")]
    assert len(by_cells) > 0.85 * len(claims)
