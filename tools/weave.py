"""Notebooks → Markdown pages and figures, from stored outputs; nothing is executed here."""

from __future__ import annotations

import base64
import copy
import re
from pathlib import Path
from typing import Any

from nbconvert.exporters import MarkdownExporter

from tools.notebooks import FOLDED_TAGS, ROOT, BookError

TEMPLATES = Path(__file__).resolve().parent / "templates"
NOTEBOOK_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb(#[^)]*)?\)")
FIGURE_NAME = re.compile(r"^[a-z0-9_]+\.png$")


def weave(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """The page of one notebook, and the figures it shows by file name.

    Raises:
        BookError: for a figure without a name or alt text, or two figures of one name.
    """
    notebook = copy.deepcopy(notebook)
    figures: dict[str, bytes] = {}
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown":
            cell.source = NOTEBOOK_LINK.sub(r"](\1.md\2)", cell.source)
            continue
        for tag, summary in FOLDED_TAGS.items():
            if tag in cell.metadata.get("tags", []):
                cell.metadata.fold = summary
                cell.metadata.fold_outputs = tag == "solution"
        for output in cell.outputs:
            if "image/svg+xml" in output.get("data", {}):
                raise BookError(f"{stem}, cell {number}: an SVG output; draw PNG, with show()")
            if "image/png" in output.get("data", {}):
                name, image = take_figure(output, f"{stem}, cell {number}")
                if figures.setdefault(name, image) != image:
                    raise BookError(f"{stem}, cell {number}: a second figure named {name}")
    exporter = MarkdownExporter(
        template_name="page",
        extra_template_basedirs=[str(TEMPLATES)],
    )
    page, _ = exporter.from_notebook_node(notebook, resources={"page": {"stem": stem}})
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
    for stem, notebook in notebooks:
        page, figures = weave(notebook, stem)
        files[root / "notebooks" / f"{stem}.md"] = page.encode()
        for name, image in figures.items():
            path = root / "figures" / name
            if path in files:
                raise BookError(f"{stem} and {origin[path]} both draw a figure named {name}")
            files[path], origin[path] = image, stem
    return files
