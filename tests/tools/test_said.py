"""What is said outside cells: README, CITATION, docstrings, times, references to other places."""

import ast
import importlib
import json
import re
import shlex

import pytest
import yaml
from packaging.version import Version

import mixconv
from mixconv.__main__ import parse
from tests.tools.conftest import find_all, real_chapters
from tests.tools.test_environment import EXTRAS, MAKEFILE, PROJECT
from tests.tools.test_house import number_of, title_of
from tools.notebooks import ROOT

README = (ROOT / "README.md").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PAPER = json.loads((ROOT / "tests" / "data" / "paper.json").read_text())
CHAPTERS = real_chapters()
PAGES = {chapter.stem: chapter.page.read_text() for chapter in CHAPTERS}
SOURCES = {
    path.relative_to(ROOT / "mixconv").as_posix(): path.read_text()
    for kind in ("*.py", "*.cpp")
    for path in sorted((ROOT / "mixconv").rglob(kind))
}
TEXTS = {
    **{f"notebooks/{stem}.md": page for stem, page in PAGES.items()},
    **{f"mixconv/{name}": source for name, source in SOURCES.items()},
    "README.md": README,
    "TROUBLESHOOTING.md": (ROOT / "TROUBLESHOOTING.md").read_text(),
}

# The README's table of chapters: read off the chapters


def made_by(stem):
    header = f"Generated from notebooks/{stem}.ipynb"
    return sorted(name for name, source in SOURCES.items() if header in source.partition("\n")[0])


def rows_of_chapters():
    """Number, title, page, sources and minutes of every chapter, as the README writes them."""
    for chapter in CHAPTERS:
        sources = ", ".join(f"[`{name}`](mixconv/{name})" for name in made_by(chapter.stem))
        title = title_of(chapter).partition(" · ")[2]
        (minutes,) = find_all(r"^\*\*Time:\*\* (\d+) minutes", PAGES[chapter.stem])
        page = f"[{title}](notebooks/{chapter.stem}.md)"
        yield str(number_of(chapter)), page, sources, minutes


def rows_of_readme(text):
    for line in find_all(r"^\| \d+ \| .*\|$", text):
        number, page, sources, _, minutes = (cell.strip() for cell in line[1:-1].split("|"))
        yield number, page, sources, minutes


def test_readme_lists_the_chapters_as_they_are():
    assert list(rows_of_readme(README)) == list(rows_of_chapters())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 25 |", "| 35 |"),
        ("| 4 | [Blocks]", "| 4 | [Bricks]"),
        ("(mixconv/blocks.py)", "(mixconv/layer.py)"),
        ("(notebooks/04_blocks.md)", "(notebooks/03_layer.md)"),
        ("[`heirs.py`](mixconv/heirs.py)", ""),
    ],
)
def test_a_wrong_row_is_seen(old, new):
    assert old in README
    assert list(rows_of_readme(README.replace(old, new))) != list(rows_of_chapters())


# What can be typed


def test_the_commands_that_are_named_can_be_typed():
    said = "\n".join(TEXTS.values())
    for line in re.findall(r"`(mixconv [^`]+)`", README):
        words = shlex.split(line)[1:]
        if words[0] != "predict":
            assert parse(words).model
    extras = {name for names in re.findall(r"\.\[([\w,]+)\]", said) for name in names.split(",")}
    assert extras <= set(EXTRAS)
    targets = set(find_all(r"^([a-z][\w-]*):", MAKEFILE))
    assert set(re.findall(r"`make ([a-z][\w-]*)", said)) <= targets
    variables = set(re.findall(r"`make [a-z-]+ ([A-Z_]+)=", said))
    assert {"PYTHON", "CPU_WHEELS"} <= variables
    assert all(f"$({name})" in MAKEFILE for name in variables)
    module, _, function = PROJECT["scripts"]["mixconv"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


# Who it is by


def test_citation_agrees_with_the_paper_and_the_project():
    paper = CITATION["preferred-citation"]
    assert PAPER["source"].startswith(f"Tan and Le, {paper['title']}, BMVC {paper['year']} (arXiv")
    assert [author["family-names"] for author in paper["authors"]] == ["Tan", "Le"]
    assert paper["url"].rpartition("/")[2] in PAPER["source"]
    assert f"]({paper['url']})" in README
    assert CITATION["title"].startswith(f"{PROJECT['name']}: ")
    assert "version" not in CITATION, "the package says it"
    assert CITATION["license"] == PROJECT["license"] == "MIT"
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License\n")
    assert "to deal\nin the Software without restriction, including" in licence


def test_the_version_is_one():
    assert str(Version(mixconv.__version__)) == mixconv.__version__


# Times and grades


def test_times_are_those_of_a_person():
    """Nobody reads 300 words of this a minute; an hour is more than one sitting."""
    for stem, page in PAGES.items():
        ((minutes, seconds),) = find_all(r"^\*\*Time:\*\* (\d+) min.*under (\d+) seconds", page)
        assert int(minutes) % 5 == 0 < int(minutes) <= 45, stem
        assert int(seconds) in (10, 15, 20, 30, 60, 90), stem
        open_text = re.sub(r"(?ms)^<details>.*?^</details>$", "", page)
        assert 90 <= len(open_text.split()) / int(minutes) <= 300, stem
        for stars, minutes_to_try in find_all(r"^\*\*\d+\.\d+\*\* (★+) \*(\d+) minutes?,", page):
            low, high = {1: (1, 10), 2: (5, 20), 3: (10, 45)}[len(stars)]
            assert low <= int(minutes_to_try) <= high, (stem, stars, minutes_to_try)


# References are followed

NUMBERS = {number_of(chapter) for chapter in CHAPTERS}
EXERCISES = {
    number for page in PAGES.values() for number in find_all(r"^\*\*(\d+\.\d+)\*\* ★", page)
}
FIGURES = {n for page in PAGES.values() for n in find_all(r"^\*Figure (\d+\.\d+)\. ", page)}
SECTIONS = {"1", "2", "3", "4", "5", *(f"{s}.{i}" for s in (3, 4) for i in range(1, 5))}


def lost_references(text):
    """Chapters, exercises and figures that the book, sections that the paper, does not have."""
    several = r"(\d+(?:\.\d+)?(?:(?:, | and | or | to |–)\d+(?:\.\d+)?)*)"
    kinds = {
        rf"\b[Cc]hapters? {several}": lambda n: int(float(n)) in NUMBERS and "." not in n,
        rf"\b[Ee]xercises? {several}": lambda n: n in EXERCISES,
        r"\b[Ff]igure (\d+\.\d+)": lambda n: n in FIGURES,
        r"\b[Pp]aper(?:, |\.\*\* |'s | \()[Ss]ection (\d+(?:\.\d+)?)": lambda n: n in SECTIONS,
        r"\bpaper(?:, |'s )[Ff]igure (\d+)": lambda n: 1 <= int(n) <= 8,
        r"\bpaper(?:, |'s )[Tt]able (\d+)": lambda n: 1 <= int(n) <= 3,
    }
    for pattern, known in kinds.items():
        for found in re.finditer(pattern, text):
            for number in re.findall(r"\d+(?:\.\d+)?", found[1]):
                if not known(number):
                    yield found[0]


@pytest.mark.parametrize("name", TEXTS)
def test_references_lead_somewhere(name):
    assert list(lost_references(TEXTS[name])) == []


@pytest.mark.parametrize(
    "text",
    ["as chapter 47 shows", "chapters 3, 4 and 71", "Exercise 1.9 had it", "exercises 1.1 and 2.99",
     "in figure 4.99", "paper, section 7.9; `x`", "the paper's Figure 12", "paper, table 6"],
)  # fmt: skip
def test_a_lost_reference_is_seen(text):
    assert len(list(lost_references(text))) == 1


def wrong_chapters(source):
    """Chapters that a module's docstrings call theirs, and that do not make it."""
    (own,) = re.findall(r"^# Generated from notebooks/(\d\d)_", source)
    first_line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    named = re.findall(r"chapter (\d+)\)\.?", first_line)
    named += find_all(r"\bChapter (\d+)\.$", source)
    named += re.findall(r"\bours;? \(?chapter (\d+)\)", source)
    return [number for number in named if int(number) != int(own)]


def test_docstrings_name_the_chapter_that_makes_them():
    modules = {name: s for name, s in SOURCES.items() if s.startswith("# Generated from")}
    wrong = {name: found for name, s in modules.items() if (found := wrong_chapters(s))}
    assert wrong == {}
    layer = modules["layer.py"]
    for old, new in (("Chapter 3.", "Chapter 5."), ("chapter 3)", "chapter 2)")):
        assert wrong_chapters(layer.replace(old, new))
    for name, source in modules.items():
        (line,) = (ast.get_docstring(ast.parse(source)) or "?").splitlines()[:1]
        assert re.search(r"chapter \d+\)\.?$", line), f"{name}: {line}"


# The README's own numbers


def test_readme_says_what_figure_4_shows():
    """Accuracy falls behind its peak "by 1.2 points on MobileNetV1, by 0.1 on V2"."""
    plotted = PAPER["figure_4"]["depthwise"]
    v1, v2 = ([plotted[k][i] for k in sorted(plotted, key=int)] for i in (1, 3))
    falls = [f"{max(accuracy) - accuracy[-1]:.1f}" for accuracy in (v1, v2)]
    assert f"(by {falls[0]} points on MobileNetV1, by {falls[1]} on V2;" in README
    sizes = sorted(int(k) for k in plotted)
    assert [sizes[accuracy.index(max(accuracy))] for accuracy in (v1, v2)] == [7, 9]
    assert "past 7×7 or 9×9, accuracy falls" in README


def test_troubleshooting_names_the_settings_of_official_weights():
    official = mixconv.mixnet_s(num_classes=1).settings()
    assert (official["padding"], official["norm_eps"]) == ("same", 1e-3)
    assert "official weights want TensorFlow's 'SAME' and 1e-3." in TEXTS["TROUBLESHOOTING.md"]
