"""Notebooks → pages and figures, from what is stored."""

import base64

import nbformat
import pytest

from tests.tools.conftest import ALT, DOT, code, figure, markdown, notebook
from tools.notebooks import BookError
from tools.weave import close_gaps, weave, weave_all

NAMED = {"filename": "dot.png", "alt": ALT}


def page_of(*cells):
    return weave(notebook(*cells), "02_toy")[0]


def output(kind="execute_result", **data):
    return nbformat.v4.new_output(kind, data=data)


def test_page_says_where_it_comes_from():
    first = page_of(markdown("# Title")).splitlines()[0]
    assert "02_toy.ipynb" in first
    assert "make book" in first


def test_figure_gets_its_name_and_alt_text():
    page, figures = weave(notebook(code("draw()", [figure(**NAMED)])), "02_toy")
    assert f"\n![{ALT}](../figures/dot.png)\n" in page
    assert figures == {"dot.png": base64.b64decode(DOT)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"alt": ALT}, "a figure needs a name"),
        ({"alt": ALT, "filename": "../dot.png"}, "a figure needs a name"),
        ({"alt": ALT, "filename": "Dot.PNG"}, "a figure needs a name"),
        ({"filename": "dot.png"}, "dot.png needs alt text"),
        ({"filename": "dot.png", "alt": " "}, "dot.png needs alt text"),
    ],
)
def test_figure_without_name_or_alt_is_refused(metadata, message):
    with pytest.raises(BookError, match=f"^02_toy, cell 2: .*{message}"):
        page_of(markdown("# Title"), code("draw()", [figure(**metadata)]))


def test_two_figures_of_one_name_are_refused():
    other = figure(**NAMED)
    other.data["image/png"] = base64.b64encode(b"another picture").decode()
    with pytest.raises(BookError, match=r"^02_toy, cell 1: a second figure named dot.png"):
        page_of(code("draw()", [figure(**NAMED), other]))


def test_figure_drawn_by_two_chapters_is_refused(tmp_path):
    drawn = notebook(code("draw()", [figure(**NAMED)]))
    with pytest.raises(BookError, match=r"03_more and 02_toy both draw .* dot.png"):
        weave_all([("02_toy", drawn), ("03_more", drawn)], tmp_path)


@pytest.mark.parametrize(
    ("written", "rendered"),
    [
        ("[next](03_layer.ipynb)", "[next](03_layer.md)"),
        ("[part](03_layer.ipynb#the-loop)", "[part](03_layer.md#the-loop)"),
        ("[a](01_x.ipynb) · [b](03_y.ipynb)", "[a](01_x.md) · [b](03_y.md)"),
        ("[the module](../mixconv/layer.py)", "[the module](../mixconv/layer.py)"),
        ("`03_layer.ipynb`", "`03_layer.ipynb`"),
    ],
)
def test_links_lead_to_pages(written, rendered):
    assert rendered in page_of(markdown(written))


def test_links_in_code_stay():
    assert '"[x](03_layer.ipynb)"' in page_of('print("[x](03_layer.ipynb)")')


def test_solution_is_folded_with_its_output():
    printed = nbformat.v4.new_output("stream", name="stdout", text="solved: f\n")
    page = page_of("before = 1", code("answer = 42", [printed], ["solution"]), "after = 2")
    fold = page[page.index("<details>") : page.index("</details>")]
    assert "<summary>Solution</summary>\n\n```python\nanswer = 42\n```" in fold
    assert "solved: f" in fold
    assert "before" not in fold
    assert page.count("<details>") == page.count("</details>") == 1
    assert "after = 2" in page[page.index("</details>") :]


def test_drawing_code_is_folded_and_its_figure_is_not():
    page = page_of(code("draw()", [figure(**NAMED)], ["drawing"]))
    fold = page[page.index("<details>") : page.index("</details>")]
    assert "draw()" in fold
    assert "dot.png" not in fold
    assert "dot.png" in page


def test_a_folded_cell_may_name_its_fold():
    source = "# fold: How a name is found\n\ndef find():\n    return 1"
    page = page_of(code(source, tags=["plumbing"]), code("draw()", tags=["drawing"]))
    assert "<summary>How a name is found</summary>\n\n```python\ndef find():" in page
    assert "# fold" not in page
    assert "<summary>The code that draws this</summary>" in page


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (code("# fold: A name\nx = 1"), "a title, 'A name', of a cell not folded"),
        (code("x = 1\n# fold: A name", tags=["tool"]), "'# fold: A name'; the first line"),
        (code("#| fold: A name\nx = 1", tags=["tool"]), "may be `# fold: TITLE`"),
        (code("# Fold: A name\nx = 1", tags=["tool"]), "may be `# fold: TITLE`"),
        (code("# fold:\nx = 1", tags=["tool"]), "may be `# fold: TITLE`"),
    ],
)
def test_a_misplaced_or_misspelt_title_of_a_fold_is_refused(cell, message):
    with pytest.raises(BookError, match=f"^02_toy, cell 2: .*{message}"):
        page_of(markdown("# Title"), cell)


def test_code_and_outputs_keep_their_blank_lines():
    source = "a = 1\n\n\n\ndef f():\n    return a"
    text = nbformat.v4.new_output("stream", name="stdout", text="one\n\n\n\ntwo\n")
    page = page_of(markdown("# Title"), code(source, [text]))
    assert f"```python\n{source}\n```" in page
    assert "```text\none\n\n\n\ntwo\n```" in page


def test_one_blank_line_between_blocks():
    text = output(**{"text/plain": "3"})
    page = page_of(markdown("# Title"), code("1 + 2", [text]), "x = 1", markdown("The end."))
    assert "\n\n\n" not in page
    assert page.endswith("The end.\n")
    assert "# Title\n\n```python\n1 + 2\n```\n\n```text\n3\n```\n\n```python\nx = 1\n```\n" in page


def test_close_gaps_leaves_code_alone():
    assert close_gaps("a\n\n\n\nb\n\n```\nc\n\n\n\nd\n```\n") == "a\n\nb\n\n```\nc\n\n\n\nd\n```\n"


def test_table_is_rendered_as_markdown():
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |"
    both = output(**{"text/plain": "Table(...)", "text/markdown": table})
    page = page_of(code("table()", [both]))
    assert f"```\n\n{table}\n" in page
    assert "Table(...)" not in page


def test_weaving_leaves_the_notebook_as_it_was():
    made = notebook(code("draw()", [figure(**NAMED)], ["drawing"]), markdown("[a](01_x.ipynb)"))
    before = nbformat.writes(made)
    weave(made, "02_toy")
    assert nbformat.writes(made) == before


def test_figures_are_numbered_and_captioned_within_their_chapter():
    alt = "Two dots, v1.5 against v2. The second is larger."
    other = figure(filename="two.png", alt=alt)
    page, _ = weave(
        notebook(markdown("# 7 · Toy"), code("a()", [figure(**NAMED)]), code("b()", [other])),
        "07_toy",
    )
    assert f"](../figures/dot.png)\n\n*Figure 7.1. {ALT}*\n" in page
    assert "](../figures/two.png)\n\n*Figure 7.2. Two dots, v1.5 against v2.*\n" in page


def test_display_math_is_fenced_and_inline_math_is_not():
    page = page_of(markdown("a\n\n$$\n(E w)_{i,j} = \\_x\n$$\n\nand $x_t$"))
    assert "a\n\n```math\n(E w)_{i,j} = \\_x\n```\n\nand $x_t$" in page


def test_a_page_leads_to_its_neighbours(tmp_path):
    stems = ["00_start_here", "01_one", "02_two"]
    chapters = [(s, notebook(markdown(f"# {i} · {s}"))) for i, s in enumerate(stems)]
    files = weave_all(chapters, tmp_path)
    lines = [files[tmp_path / "notebooks" / f"{s}.md"].decode().splitlines()[2] for s in stems]
    up = (
        "[all chapters](../README.md#the-chapters) · [notation](00_start_here.md#notation) · "
        "[words](00_start_here.md#words) · [lists](README.md)"
    )
    assert lines == [
        f"{up} · [1 · 01_one →](01_one.md)",
        f"[← 0 · 00_start_here](00_start_here.md) · {up} · [2 · 02_two →](02_two.md)",
        f"[← 1 · 01_one](01_one.md) · {up}",
    ]


def test_a_caption_of_its_own_stands_in_place_of_the_alt_texts_first_sentence():
    told = figure(filename="dot.png", alt="One dot. It is grey.", caption="Grey is enough.")
    page, _ = weave(notebook(markdown("# 4 · Dots"), code("show(x)", [told])), "04_dots")
    assert "![One dot. It is grey.](" in page
    assert "*Figure 4.1. Grey is enough.*" in page
