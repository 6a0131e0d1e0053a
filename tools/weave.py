"""Notebooks → Markdown pages and figures, from stored outputs; nothing is executed here."""

from __future__ import annotations

import base64
import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

from nbconvert.exporters import MarkdownExporter

from tools.notebooks import FOLDED_TAGS, ROOT, BookError, fold_title

TEMPLATES = Path(__file__).resolve().parent / "templates"
DISPLAY_MATH = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.MULTILINE | re.DOTALL)
NOTEBOOK_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb(#[^)]*)?\)")
FIGURE_NAME = re.compile(r"^[a-z0-9_]+\.png$")


def title_of(notebook: Any) -> str:
    """The first line of a chapter, without its mark."""
    return str(notebook.cells[0].source.splitlines()[0].removeprefix("# "))


def links_around(position: int, notebooks: list[tuple[str, Any]]) -> str:
    """The line at the head of a page: the chapter before, the way up, the chapter after."""
    links = ["[all chapters](../README.md#the-chapters)"]
    if any(stem == "00_start_here" for stem, _ in notebooks):
        links.append("[notation](00_start_here.md#notation)")
        links.append("[words](00_start_here.md#words)")
    links.append("[lists](README.md)")
    if position:
        stem, notebook = notebooks[position - 1]
        links.insert(0, f"[← {title_of(notebook)}]({stem}.md)")
    if position + 1 < len(notebooks):
        stem, notebook = notebooks[position + 1]
        links.append(f"[{title_of(notebook)} →]({stem}.md)")
    return " · ".join(links)


def weave(
    notebook: Any, stem: str, around: str = "", before: int = 0
) -> tuple[str, dict[str, bytes]]:
    """The page of one notebook, and the figures it shows by file name.

    Args:
        notebook: with its outputs.
        stem: its name, such as `03_layer`.
        around: a line of links for the page's head.
        before: how many figures the earlier pages of this chapter have.

    Raises:
        BookError: for a figure without a name or alt text, two figures of one name, or the title
            of a fold in a cell that is not folded.
    """
    notebook = copy.deepcopy(notebook)
    figures: dict[str, bytes] = {}
    chapter = title_of(notebook).partition(" ")[0]
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown":
            source = DISPLAY_MATH.sub(r"```math\n\1\n```", cell.source)  # safe from Markdown
            cell.source = NOTEBOOK_LINK.sub(r"](\1.md\2)", source)
            continue
        for tag, summary in FOLDED_TAGS.items():
            if tag in cell.metadata.get("tags", []):
                cell.metadata.fold = summary
                cell.metadata.fold_outputs = tag == "solution"
        if title := fold_title(cell.source, f"{stem}, cell {number}"):
            if "fold" not in cell.metadata:
                raise BookError(f"{stem}, cell {number}: a title, {title!r}, of a cell not folded")
            cell.metadata.fold = title
            cell.source = cell.source.partition("\n")[2].lstrip("\n")  # its summary says it
        for output in cell.outputs:
            if "image/svg+xml" in output.get("data", {}):
                raise BookError(f"{stem}, cell {number}: an SVG output; draw PNG, with show()")
            if "image/png" in output.get("data", {}):
                name, image = take_figure(output, f"{stem}, cell {number}")
                if figures.setdefault(name, image) != image:
                    raise BookError(f"{stem}, cell {number}: a second figure named {name}")
                first_sentence = re.match(r".*?[.](?=\s|$)|.*", output.metadata.alt)
                assert first_sentence
                said = output.metadata.get("caption") or first_sentence[0]
                output.metadata.caption = f"Figure {chapter}.{before + len(figures)}. {said}"
    exporter = MarkdownExporter(
        template_name="page",
        extra_template_basedirs=[str(TEMPLATES)],
    )
    page, _ = exporter.from_notebook_node(
        notebook, resources={"page": {"stem": stem, "around": around}}
    )
    return close_gaps(page), figures


def close_gaps(page: str) -> str:
    """One blank line between blocks; code and outputs keep theirs."""
    parts = re.split(r"(^```.*?^```$)", page, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", part) for part in parts[::2]]
    return "".join(parts).strip() + "\n"


def take_figure(output: Any, where: str) -> tuple[str, bytes]:
    name = output.metadata.get("filename", "")
    if not FIGURE_NAME.match(name):
        raise BookError(f"{where}: a figure needs a name such as bars.png, got {name!r}")
    if re.search(r"[\[\]\n]", output.metadata.get("alt", "")):
        raise BookError(f"{where}: the alt text of {name} has a bracket or a line break")
    if not output.metadata.get("alt", "").strip():
        raise BookError(f"{where}: {name} needs alt text that states what it shows")
    return name, base64.b64decode(output.data["image/png"])


def weave_all(notebooks: list[tuple[str, Any]], root: Path = ROOT) -> dict[Path, bytes]:
    """Every page and figure of the book, by path."""
    files: dict[Path, bytes] = {}
    origin: dict[Path, str] = {}
    count: Counter[str] = Counter()
    for position, (stem, notebook) in enumerate(notebooks):
        number = stem.partition("_")[0]
        page, figures = weave(notebook, stem, links_around(position, notebooks), count[number])
        count[number] += len(figures)
        files[root / "notebooks" / f"{stem}.md"] = page.encode()
        for name, image in figures.items():
            path = root / "figures" / name
            if path in files:
                raise BookError(f"{stem} and {origin[path]} both draw a figure named {name}")
            files[path], origin[path] = image, stem
    return files
