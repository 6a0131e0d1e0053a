"""TROUBLESHOOTING.md: its code runs, its messages are the package's, its links lead somewhere."""

import re

import pytest

from tests.tools.conftest import find_all
from tests.tools.test_house import broken_links
from tools.notebooks import ROOT

PAGE = ROOT / "TROUBLESHOOTING.md"
TEXT = PAGE.read_text()


def test_its_code_runs():
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert len(names) > 10


def test_readme_code_gives_what_its_comments_say():
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(import torch.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert eval('partition_channels(32, (3, 5, 7, 9), "exponential")', names) == (16, 8, 4, 4)
    assert eval("tuple(y.shape)", names) == (1, 32, 28, 28)
    assert eval("len(maps)", names) == 5
    for said in ("# (16, 8, 4, 4)", "# (1, 32, 28, 28)", "# five strides"):
        assert said in block


def test_its_messages_are_the_packages():
    sources = (path.read_text() for path in (ROOT / "mixconv").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a message may be broken into lines
    quoted = find_all(r"^> (.+)$", TEXT)
    assert len(quoted) >= 6
    assert [message for message in quoted if message not in said] == []


def test_its_links_lead_somewhere():
    assert broken_links(TEXT, PAGE) == []
    assert "TROUBLESHOOTING.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("lost", ["these weights do not match", "no compiler anywhere"])
def test_a_message_that_nobody_gives_would_be_seen(lost):
    sources = "\n".join(path.read_text() for path in (ROOT / "mixconv").rglob("*.py"))
    assert lost not in sources
