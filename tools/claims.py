"""Every number in prose is held by something: `make check` says by what, and names the rest.

A number is a claim if it has a unit, a decimal or two digits. What can hold it, best first:

- a sum: it stands in an equation written out in the sentence, which is worked out here;
- a cell: a cell of its section, or of the one before, printed it or computed with it;
- the chapter: some other cell of its chapter did, or one of a chapter that the paragraph names;
- a file or a test: the paragraph ends in `<!-- held: figures/x.json -->`, and the number is in
  that file, or in `<!-- held: tests/x.py::test_y -->`, a test that compares it;
- a measurement: it ends in `<!-- measured: command, date -->`, for what no test can repeat;
- a source: the paragraph cites one where the reader sees it.

nbval holds what cells print, so a number that a cell holds cannot go stale without a red line.
"""

from __future__ import annotations

import ast
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.notebooks import ROOT, find_chapters, normalise, read_notebook

# Not prose: code, formulas, comments, link targets, tags.
NOT_PROSE = re.compile(
    r"```.*?```|<!--.*?-->|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|<[^>\n]*>|https?://\S+",
    re.DOTALL,
)
# Numbers that are names: headings, exercise heads, times to read, "chapters 11 to 13", "[14]".
NAME = re.compile(
    r"^\*\*\d+\.\d+\*\*.*$|^#+ .*$|^\*\*Time:\*\*.*$|^\d+\. |\[\d+\b(?: ·.*)?(?=⟂)|AVX-\d+"
    r"|MixConv \d+|\b(?:chapters?|sections?|figures?|fig\.|tables?|exercises?|steps?|equations?"
    r"|pages?|python|torch|timm|rows?|blocks?|seed)\s\d[\d.]*(?:(?:, | and | or | to |–)\d[\d.]*)*",
    re.MULTILINE | re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?<![\w.])(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<part>\.\d+)?"
    r"(?:\s?(?P<unit>%|×|M\b|million\b|billion\b|thousand\b|percent\b))?(?!\w)"
)
SCALE = {"%": 0.01, "percent": 0.01, "thousand": 1e3, "M": 1e6, "million": 1e6, "billion": 1e9}
YEAR = re.compile(r"(?:19|20)\d\d")
TERM = r"(?:\(*\d(?:[\d.,]*\d)?\)*)"
SUM = rf"{TERM}(?: ?[-+−–·×*/] ?{TERM})+"
EQUATION = re.compile(rf"{SUM}(?: = {TERM})+|{TERM} = {SUM}")
SOURCE = re.compile(
    r"📄|⚙️|arxiv\.org|github\.com|\bpaper\b|\bofficial\b|\bet al\b|\bTable \d|\bFigure \d"
    r"|\*, [^*]*(?:19|20)\d\d"
)
MARK = re.compile(r"<!-- (held|measured): (.+?) -->")
CHAPTER = re.compile(r"\b[Cc]hapters? (\d+)|\((?:notebooks/)?(\d\d)_\w+\.")


@dataclass(frozen=True)
class Number:
    """A number as it is written: `7.3M` is 7.3, one place, unit M."""

    text: str
    value: float
    places: int
    unit: str

    @property
    def is_claim(self) -> bool:
        """Not years, nor what is smaller than ten and whole: those are counted on fingers."""
        if self.unit or self.places:
            return True
        return self.value >= 10 and not YEAR.fullmatch(self.text)


@dataclass(frozen=True)
class Claim:
    """A number, the sentence it stands in, and what holds it; `by` is empty if nothing does."""

    where: str
    number: Number
    sentence: str
    by: str


class Pool:
    """The numbers that cells printed or computed with."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = sorted(values)

    def has(self, number: Number) -> bool:
        """Whether one of them, rounded as `number` is, is equal to it.

        A whole number without a unit is not rounded: it must be there exactly.
        """
        half = 0.5 * 10.0**-number.places if number.unit or number.places else 0.0
        for scale in {1.0, SCALE.get(number.unit, 1.0)}:
            low = (number.value - half) * scale
            high = (number.value + half) * scale
            slack = 1e-9 * max(1.0, high)
            place = bisect_left(self.values, low - slack)
            if place < len(self.values) and self.values[place] <= high + slack:
                return True
        return False


def numbers_in(text: str) -> Iterator[Number]:
    for found in NUMBER.finditer(text):
        part = found["part"] or ""
        value = float(found["whole"].replace(",", "") + part)
        yield Number(found[0], value, max(0, len(part) - 1), found["unit"] or "")


def values_in(text: str) -> Iterator[float]:
    """All that `text` may stand for: `64%` is 64 and 0.64, `1e-05` and `4_134_606` themselves."""
    text = re.sub(r"<[^>]*>", " ", text)
    for found in re.finditer(r"\d[\d_]*\.?\d*e[-+]?\d+|\d+(?:_\d+)+", text):
        yield float(found[0].replace("_", ""))
    for number in numbers_in(text):
        yield number.value
        yield number.value * SCALE.get(number.unit, 1.0)


def literals(source: str) -> Iterator[float]:
    """The numbers that a cell computes with: constants, not the words in its strings."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of C++
        yield from values_in(re.sub(r"//.*", "", source))
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield float(node.value)


def pool_of(cells: Iterable[Any]) -> Pool:
    values: list[float] = []
    for cell in cells:
        if cell.cell_type != "code":
            continue
        values += literals(cell.source)
        for output in cell.get("outputs", []):
            shown = [output.get("text", "")]
            shown += [str(v) for kind, v in output.get("data", {}).items() if kind[:5] == "text/"]
            for text in shown:
                values += values_in(text)
    return Pool(values)


def prose_of(paragraph: str) -> str:
    return NAME.sub(" ", NOT_PROSE.sub("⟂", paragraph))


def worked_out(texts: Iterable[str]) -> Pool:
    """The numbers on either side of the equations in `texts` that are true."""
    true = [equation for text in texts for equation, holds in equations_in(prose_of(text)) if holds]
    return Pool(number.value for equation in true for number in numbers_in(equation))


def equations_in(text: str) -> Iterator[tuple[str, bool]]:
    """Each equation between written numbers, and whether it is true as far as it is rounded."""
    for found in EQUATION.finditer(text):
        sides = [re.sub(r"(?<=\d),(?=\d{3})", "", side) for side in found[0].split(" = ")]
        if any(side.count("(") != side.count(")") for side in sides):
            continue
        plain = [side.translate(str.maketrans("−–·×", "--**")).rstrip(",.") for side in sides]
        values = [eval(side, {"__builtins__": {}}) for side in plain]  # digits and operators only
        places = [max((n.places for n in numbers_in(side)), default=0) for side in sides]
        off = 0.5 * 10.0 ** -min(places) * (1 + 1e-9) if max(places) or "/" in found[0] else 1e-9
        yield found[0], max(values) - min(values) <= off


def split(text: str) -> list[str]:
    """The paragraphs of a text, without its blocks of code."""
    return re.split(r"\n\s*\n", re.sub(r"(?ms)^```.*?^```$", "", text))


def written_alts(cell: Any) -> Iterator[str]:
    """The alt texts and captions in a cell, word for word; numbers it computes, it holds."""
    if any(output.get("metadata", {}).get("alt") for output in cell.get("outputs", [])):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show":
                for said in [*node.args[2:], *(word.value for word in node.keywords)]:
                    parts = [n.value for n in ast.walk(said) if isinstance(n, ast.Constant)]
                    yield " ⟂ ".join(part for part in parts if isinstance(part, str))


def paragraphs(cell: Any) -> list[str]:
    """The paragraphs of a text cell, or the alt texts of a code cell's figures."""
    return split(cell.source) if cell.cell_type == "markdown" else list(written_alts(cell))


def sections_of(cells: list[Any]) -> list[list[Any]]:
    sections: list[list[Any]] = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            sections.append([])
        sections[-1].append(cell)
    return sections


def held_by_mark(paragraph: str, number: Number, root: Path) -> str:
    for kind, what in MARK.findall(paragraph):
        if kind == "measured":
            return "a measurement"
        name, _, test = what.partition("::")
        text = (root / name).read_text("utf-8") if (root / name).is_file() else ""
        if test and f"\ndef {test}(" in text:
            return "a test"
        if not test and Pool(values_in(text)).has(number):
            return "a file"
    return ""


def claims_in(
    paragraph: str, where: str, sums: Pool, near: Pool, far: list[Pool], root: Path = ROOT
) -> Iterator[Claim]:
    """The claims of one paragraph; a false equation is one, held by nothing."""
    prose = prose_of(paragraph)
    for equation, true in equations_in(prose):
        if not true:
            yield Claim(where, Number(equation, 0.0, 0, ""), "not equal", "")
    for number in numbers_in(prose):
        if not number.is_claim:
            continue
        by = held_by_mark(paragraph, number, root)
        if sums.has(number):
            by = "a sum"
        elif near.has(number):
            by = "a cell"
        elif any(pool.has(number) for pool in far):
            by = "the chapter"
        elif not by and SOURCE.search(paragraph):
            by = "a source"
        at = max(0, prose.find(number.text) - 40)
        yield Claim(where, number, " ".join(prose[at : at + 90].split()), by)


def chapters_in(text: str) -> set[int]:
    """The chapters that a paragraph names or links to."""
    return {int(number or link) for number, link in CHAPTER.findall(text)}


def claims_of_book(root: Path = ROOT) -> list[Claim]:
    """Every claim of every chapter, of its figures' alt texts, and of the README."""
    books = [
        (c.stem, normalise(read_notebook(c.ipynb.read_text("utf-8"), c.stem)))
        for c in find_chapters(root)
    ]
    whole: dict[int, list[Pool]] = {}
    for stem, notebook in books:
        prose = worked_out(text for cell in notebook.cells for text in paragraphs(cell))
        whole.setdefault(int(stem[:2]), []).extend([pool_of(notebook.cells), prose])
    found: list[Claim] = []
    for stem, notebook in books:
        before: list[Any] = []
        for section in sections_of(notebook.cells):
            near = pool_of([*before, *section])
            before = section
            texts = [text for cell in section for text in paragraphs(cell)]
            sums = worked_out(texts)
            for text in texts:
                named = {int(stem[:2]), *chapters_in(text)}
                far = [pool for number in named for pool in whole.get(number, [])]
                found += claims_in(text, f"notebooks/{stem}", sums, near, far, root)
    readme = root / "README.md"
    for text in split(readme.read_text("utf-8")) if readme.exists() else []:
        far = [pool for number in chapters_in(text) for pool in whole.get(number, [])]
        found += claims_in(text, "README.md", worked_out([text]), Pool([]), far, root)
    return found


def summary(claims: list[Claim]) -> str:
    """One line: how many numbers there are, and what holds them."""
    by = Counter(claim.by for claim in claims)
    parts = [f"{count} by {holder}" for holder, count in by.most_common() if holder]
    return f"{len(claims)} numbers in prose: {', '.join(parts)}; {by['']} by nothing"


def main() -> int:
    claims = claims_of_book()
    for claim in claims:
        if not claim.by or "--all" in sys.argv:
            print(f"{claim.where}: {claim.number.text}: {claim.by or 'held by nothing'}: "
                  f"{claim.sentence}")  # fmt: skip
    print(summary(claims))
    return any(not claim.by for claim in claims)


if __name__ == "__main__":
    sys.exit(main())
