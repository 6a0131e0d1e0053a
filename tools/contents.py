"""Pages → notebooks/README.md, the book's lists: reading time, figures, who says what."""

from __future__ import annotations

import re

HEAD = """\
<!-- Made from the chapters by `make book`. Edit those, not this page. -->

# The book's lists

[all chapters](../README.md#the-chapters) · [notation](00_start_here.md#notation) · \
[glossary](00_start_here.md#words)

- [How long it takes](#how-long-it-takes)
- [Figures](#figures)
- [Paper, official code, ours](#paper-official-code-ours)
"""
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
MINUTES = re.compile(r"^\*\*Time:\*\* (\d+) minutes", re.MULTILINE)
EXERCISE = re.compile(r"^\*\*\d+\.\d+\*\* (★+) \*(\d+) minutes?,", re.MULTILINE)
CAPTION = re.compile(r"^\*(Figure [\d.]+)\. (.+)\*$", re.MULTILINE)
BOX = re.compile(r"^> (📄 \*\*Paper|⚙️ \*\*Official code|✏️ \*\*Ours)([^*]*)\*\*\s*(.+)$")
OTHERS = re.compile(r"\(([^)]+)\)")  # of another paper: "Paper (Sandler et al., 2018)."
SENTENCE = re.compile(r".+?[.!?][)\"”*_]*(?=\s+[\"“(*_`$]*[A-Z\d\"“]|$)")
VOICES = {"📄": "The paper says", "⚙️": "The official code does", "✏️": "Ours"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SHORTEST, LENGTH = 30, 110  # of a box's beginning, in characters; a sentence is never cut


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def beginning(text: str) -> str:
    """The first sentences of a box, whole, without links; at least one."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("|", "\\|")
    if len(text) <= LENGTH:
        return text
    end = 0
    for sentence in SENTENCE.finditer(text):
        if end >= SHORTEST and sentence.end() > LENGTH:
            break
        end = sentence.end()
    return text[:end] or text


def number_of(title: str) -> str:
    return title.partition(" ")[0]


def contents_page(pages: dict[str, str]) -> str:
    """The page of lists.

    Args:
        pages: the Markdown page of each chapter by its stem, in reading order.
    """
    rows, figures, minutes, exercises, practice = [], [], 0, 0, 0
    boxes: dict[str, list[str]] = {mark: [] for mark in VOICES}
    for stem, page in pages.items():
        prose = FENCE.sub("", page)
        found = TITLE.search(prose)
        title = found[1] if found else stem
        reading = int(time[1]) if (time := MINUTES.search(prose)) else 0
        tasks = EXERCISE.findall(prose)
        trying = sum(int(task[1]) for task in tasks)
        rows.append(f"| [{title}]({stem}.md) | {reading} | {len(tasks)} | {trying} |")
        minutes, exercises, practice = (
            minutes + reading, exercises + len(tasks), practice + trying,
        )  # fmt: skip
        section = ""
        for line in prose.splitlines():
            if line.startswith("## "):
                section = "#" + anchor(line.removeprefix("## "))
            if caption := CAPTION.match(line):
                figures.append(f"- [{caption[1]}]({stem}.md{section}) {caption[2]}")
            if box := BOX.match(line):
                link = f"[{number_of(title)}]({stem}.md{section})"
                whose = f"{other[1]}: " if (other := OTHERS.search(box[2])) else ""
                boxes[box[1][: box[1].index(" ")]].append(f"- {link} {whose}{beginning(box[3])}")
    total = f"| **together** | **{minutes}** | **{exercises}** | **{practice}** |"
    table = ["| chapter | minutes to read | exercises | minutes to try |", "|---|---:|---:|---:|"]
    parts = [
        HEAD,
        "## How long it takes\n",
        "\n".join([*table, *rows, total]) + "\n",
        "## Figures\n",
        "\n".join(figures) + "\n",
        "## Paper, official code, ours\n",
        "The boxes of the book, by who speaks. A link leads to the section that holds the box.\n",
    ]
    for mark, said in VOICES.items():
        parts += [f"### {mark} {said}\n", "\n".join(boxes[mark]) + "\n"]
    return "\n".join(parts)
