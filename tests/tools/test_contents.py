"""The page of lists: every time, exercise, figure and box of the book, under the right link."""

import pytest

from tests.tools.conftest import find_all, real_chapters
from tools.contents import anchor, beginning, contents_page

PAGE = """\
# 3 · The layer

**Time:** 25 minutes to read. Runs in under 10 seconds on two cores.

## What `padding` does, in [code](x.md)

> ⚙️ **Official code.** Pads on the right | first.

> 💡 **Not a voice.** Passed over.

*Figure 3.1. A bar.*

**3.1** ★★ *10 minutes, two lines.* Do it.

```text
# 9 · Not a title
**3.2** ★ *5 minutes, one line.* Printed, so not counted.
```
"""


def test_every_list_is_read_off_the_page():
    page = contents_page({"03_layer": PAGE, "04_blocks": PAGE.replace("# 3", "# 4", 1)})
    assert "| [3 · The layer](03_layer.md) | 25 | 1 | 10 |" in page
    assert "| **together** | **50** | **2** | **20** |" in page
    assert "- [Figure 3.1](03_layer.md#what-padding-does-in-code) A bar." in page
    assert "- [3](03_layer.md#what-padding-does-in-code) Pads on the right \\| first." in page
    assert "Not a voice" not in page
    assert "Not a title" not in page


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Short [link](a.md) text.", "Short link text."),
        ("Word " * 20 + "at 3.5 and v.7. And $x + y$ then.", "Word " * 20 + "at 3.5 and v.7."),
        ("Section 3.1. " + "Word " * 25 + "end. More.", "Section 3.1. " + "Word " * 25 + "end."),
        ("One is short enough to be kept. " * 5, " ".join(["One is short enough to be kept."] * 3)),
        ("word " * 30 + "`code that is long`", "word " * 30 + "`code that is long`"),
    ],
)
def test_a_beginning_is_whole(text, wanted):
    assert beginning(text) == wanted


def test_a_box_about_another_paper_says_which():
    box = "> 📄 **Paper (Sandler et al., 2018).** Table 2.\n\n> 📄 **Paper, section 3.**"
    page = contents_page({"04_blocks": f"# 4 · Blocks\n\n{box} Ours to read."})
    assert "- [4](04_blocks.md) Sandler et al., 2018: Table 2." in page
    assert "- [4](04_blocks.md) Ours to read." in page


def test_anchors_are_githubs():
    assert anchor("The paper's arithmetic: 1×1, [a](b) `c_d`") == "the-papers-arithmetic-11-a-c_d"


def test_no_chapter_is_missing():
    pages = {c.stem: c.page.read_text() for c in real_chapters()}
    page = contents_page(pages)
    assert [stem for stem in pages if f"]({stem}.md) |" not in page] == []
    figures = sum(text.count("![") for text in pages.values())
    assert page.count("- [Figure ") <= figures
    assert "| 0 | 0 | 0 |" not in page


def test_figures_are_numbered_through_a_chapter():
    """A chapter of several pages has one Figure 13.1."""
    pages = [c.page.read_text() for c in real_chapters()]
    names = [name for page in pages for name in find_all(r"^\*(Figure \d+\.\d+)\. ", page)]
    assert len(names) > 40
    assert sorted(set(names)) == sorted(names)
