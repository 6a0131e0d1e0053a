"""House rules, held against the real book: what style.md asks for and a machine can see."""

import ast
import io
import json
import re
import subprocess
import tokenize

import pytest

from tests.tools.conftest import find_all, read, real_chapters
from tools.notebooks import KNOWN_TAGS, ROOT, find_chapters
from tools.tangle import defined_names, export_target

# Lines of code in one cell. Docstrings, comments, blank lines, imports, signatures with their
# decorators, and lines of closing brackets are free.
LINES = 15
LINES_FOLDED = 32  # drawing code; plumbing; a solution with its wrong answers
ALT_CHARACTERS = 20

CHAPTERS = real_chapters()
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
each_page = pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "notebooks" / "README.md", *(c.page for c in CHAPTERS)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)


def number_of(chapter):
    return int(chapter.stem[:2])


def cells_of(chapter, kind):
    """(position from 1, cell) of one kind."""
    cells = enumerate(read(chapter).cells, start=1)
    return [(position, cell) for position, cell in cells if cell.cell_type == kind]


def prose(text):
    """Markdown without its code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "`code`", text)


def printed(cell):
    streams = (output for output in cell.outputs if output.output_type == "stream")
    return "".join(output.text for output in streams)


def test_every_chapter_has_its_three_files():
    wanted = [path for c in find_chapters(ROOT) for path in (c.ipynb, c.py, c.page)]
    assert [path.name for path in wanted if not path.exists()] == []


# Cells


@each_chapter
def test_every_code_cell_has_run_in_order(chapter):
    counts = [cell.execution_count for _, cell in cells_of(chapter, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each_chapter
def test_every_tag_is_known(chapter):
    tags = {tag for cell in read(chapter).cells for tag in cell.metadata.get("tags", [])}
    assert tags <= KNOWN_TAGS


@each_chapter
def test_every_exported_cell_is_reached(chapter):
    """What an exported cell defines is in its module, members of classes included."""

    def definitions(source):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield from (prefix + name for part in node.body for name in defined_names(part))

    lost = []
    for position, cell in cells_of(chapter, "code"):
        module = export_target(cell.source, chapter.stem)
        if module:
            made = set(definitions((ROOT / "mixconv" / module).read_text()))
            lost += [(position, name) for name in definitions(cell.source) if name not in made]
    assert lost == []


def lines_of_code(source):
    """How many lines of a cell a reader has to follow."""
    free: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            free.update(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            free.update(range(first, max(node.body[0].lineno, first + 1)))
        documented = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            free.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.strip()
        if text and token.type != tokenize.COMMENT and text not in (")", "]", "}", ","):
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - free)


def test_lines_of_code_are_counted_as_said():
    assert lines_of_code('"""Doc."""\nimport math\n\n# why\nx = [\n    1,\n]\n\nx  # end') == 3
    assert (
        lines_of_code('@cache\ndef f(\n    x,\n):\n    """Doc.\n\n    More.\n    """\n    return x')
        == 1
    )
    assert lines_of_code("class A:\n    b: int\n    c: int\n\n    def d(self): ...") == 2
    assert lines_of_code("if x:\n    y = '''\n    a\n    '''\nelse:\n    y = 2") == 6


@each_chapter
def test_cells_are_short(chapter):
    long = {}
    for position, cell in cells_of(chapter, "code"):
        folded = {"drawing", "solution", "plumbing"} & set(cell.metadata.get("tags", []))
        limit = LINES_FOLDED if folded else LINES
        count = lines_of_code(cell.source)
        if count > limit:
            long[f"cell {position}"] = f"{count} lines, {limit} allowed"
    assert long == {}


# Modules

MODULES = [p for p in sorted((ROOT / "mixconv").rglob("*.py")) if p.name != "__init__.py"]
CPP = sorted((ROOT / "mixconv").rglob("*.cpp"))
LINES_OF_A_PAGE, WITH_FOLDS = 900, 1400  # solutions, hints, drawing code: closed, read by few
LINES_OF_A_MODULE = 350
FOLD = re.compile(r"^<details>.*?^</details>$", re.MULTILINE | re.DOTALL)


def dotted(path):
    """`mixconv.fast.kernel` for `mixconv/fast/kernel.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def file_of(name):
    """The file of a module or package by its dotted name."""
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def too_long(paths, limit, passed_over=None):
    texts = {path.name: path.read_text() for path in paths}
    if passed_over:
        texts = {name: passed_over.sub("", text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    return {name: count for name, count in lines.items() if count > limit}


def cycles(imports):
    """The modules that can be reached from themselves, in a dictionary module -> imported ones."""

    def reach(name, seen):
        for other in imports.get(name, ()):
            if other not in seen:
                seen.add(other)
                reach(other, seen)
        return seen

    return {name for name in imports if name in reach(name, set())}


def test_a_page_and_a_module_hold_one_idea_each(tmp_path):
    pages = [chapter.page for chapter in CHAPTERS]
    assert too_long(pages, LINES_OF_A_PAGE, passed_over=FOLD) == {}
    assert too_long(pages, WITH_FOLDS) == {}
    assert too_long([*MODULES, *CPP], LINES_OF_A_MODULE) == {}
    long = tmp_path / "long.py"
    long.write_text("x = 1\n" * 420)
    assert too_long([long], LINES_OF_A_MODULE) == {"long.py": 420}
    long.write_text("x\n" * 890 + "<details>\n" + "y\n" * 300 + "</details>\nx\n")
    assert too_long([long], LINES_OF_A_PAGE, passed_over=FOLD) == {}
    assert too_long([long], 890, passed_over=FOLD) == {"long.py": 892}
    assert too_long([long], 1190) == {"long.py": 1193}


def test_no_modules_import_each_other():
    imports = {dotted(path): set(imported_modules(path.read_text())) for path in MODULES}
    assert cycles(imports) == set()
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}


def test_the_book_does_not_need_the_accelerator():
    """Outside `mixconv/fast`, only the package's front door imports it."""
    outside = [path for path in MODULES if path.parent.name != "fast" and path.stem != "__main__"]
    users = {
        path.name: [name for name in imported_modules(path.read_text()) if ".fast" in name]
        for path in outside
    }
    assert {name: used for name, used in users.items() if used} == {}


def test_no_module_imports_from_a_later_chapter():
    chapter_of, imports = {}, []
    for path in MODULES:
        source = path.read_text()
        header = re.match(r"# Generated from notebooks/(\d\d)_", source)
        assert header, f"{path.name} does not name its notebook"
        chapter_of[dotted(path)] = int(header[1])
        imports += [(dotted(path), name) for name in imported_modules(source)]
    late = [(user, used) for user, used in imports if chapter_of[used] > chapter_of[user]]
    assert late == []


def imported_modules(source):
    """Modules of the package that a source imports; an import of the whole package counts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mixconv"))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the module's whole name"
            if str(node.module).startswith("mixconv"):
                yield node.module


@each_chapter
def test_no_chapter_uses_a_later_one(chapter):
    late = []
    for position, cell in cells_of(chapter, "code"):
        for name in imported_modules(cell.source):
            made_by = re.match(r"# Generated from notebooks/(\d\d)_", file_of(name).read_text())
            if made_by and int(made_by[1]) > number_of(chapter):
                late.append((position, name))
    assert late == []


# What each chapter says


@each_chapter
def test_chapter_opens_as_every_chapter_does(chapter):
    first = read(chapter).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(rf"# {number_of(chapter)} · \S", first.source)
    assert re.search(r"^\*\*You will be able to\*\*\n(- .+\n){2,}", first.source, re.MULTILINE)
    assert re.search(r"^\*\*Know first:\*\* \S", first.source, re.MULTILINE)
    time = r"^\*\*Time:\*\* \d+ minutes to read\. Runs in under \d+ seconds"
    assert re.search(time, first.source, re.MULTILINE)


@each_chapter
def test_know_first_names_earlier_pages_only(chapter):
    line = re.search(r"^\*\*Know first:\*\*(.*)$", read(chapter).cells[0].source, re.MULTILINE)
    assert line
    stems = [other.stem for other in CHAPTERS]
    earlier = set(stems[: stems.index(chapter.stem)])
    assert set(find_all(r"\((\w+)\.ipynb", line[1])) <= earlier


@each_chapter
def test_chapter_ends_with_takeaways_and_the_way_on(chapter):
    last = read(chapter).cells[-1].source
    assert re.match(r"## Takeaways\n(- .+\n){2,}", last)
    here = CHAPTERS.index(chapter)
    around = {"Previous": here - 1, "Next": here + 1}
    links = [
        f"{word}: [{title_of(CHAPTERS[index])}]({CHAPTERS[index].ipynb.name})"
        for word, index in around.items()
        if 0 <= index < len(CHAPTERS)
    ]
    assert last.splitlines()[-1] == " · ".join(links)


def title_of(chapter):
    return read(chapter).cells[0].source.splitlines()[0].removeprefix("# ")


@each_chapter
def test_every_exercise_has_a_solution_that_solves_it(chapter):
    text = "\n".join(cell.source for _, cell in cells_of(chapter, "markdown"))
    numbers = find_all(r"^\*\*(\d+\.\d+)\*\*", text)  # a later page of a chapter goes on counting
    first = int(numbers[0].partition(".")[2]) if numbers else 1
    later = any(number_of(c) == number_of(chapter) and c.stem < chapter.stem for c in CHAPTERS)
    assert first == 1 or later
    count = range(first, first + len(numbers))
    assert numbers == [f"{number_of(chapter)}.{i}" for i in count]
    cells = cells_of(chapter, "code")
    todo = [index for index, (_, cell) in enumerate(cells) if "to do:" in printed(cell)]
    assert len(todo) == len(numbers)
    for index in todo:
        position, answer = cells[index + 1] if index + 1 < len(cells) else (0, cells[index][1])
        assert "solution" in answer.metadata.get("tags", []), f"after cell {cells[index][0]}"
        assert "solved:" in printed(answer), f"cell {position}"


# Math that GitHub draws in a notebook and on a page

DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<![\\$])\$([^$\n]+?)\$(?!\$)")


def math_problems(text):
    text = prose(text)
    displays = DISPLAY.findall(text)
    inline = INLINE.findall(DISPLAY.sub("", text))
    found = []
    for macro in (r"\operatorname", r"\newcommand", r"\def", r"\DeclareMathOperator"):
        found += [f"{macro}: {math}" for math in displays + inline if macro in math]
    found += [
        rf"\{{ or \}} in inline math: {math}" for math in inline if re.search(r"\\[{}]", math)
    ]
    for math in displays:
        found += [
            f"a line starts with {line[0]}: {line}" for line in find_all(r"^\s*[=+-].*", math)
        ]
    found += [
        f"display math in a list: {line}" for line in find_all(r"^\s*(?:[-*]|\d+\.) .*\$\$", text)
    ]
    if "$$" in DISPLAY.sub("", text):
        found.append("an unpaired $$")
    return found


@pytest.mark.parametrize(
    "text",
    [
        r"$\operatorname{Concat}(x)$",
        "$$\n\\newcommand{\\x}{y}\n$$",
        r"the set $\{1, 2\}$",
        "$$\na\n= b\n$$",
        "$$a\n  + b$$",
        "$$a\n-b$$",
        "- a list $$x$$",
        "$$a",
    ],
)
def test_math_traps_are_seen(text):
    assert len(math_problems(text)) == 1


def test_sound_math_passes():
    sound = (
        "$x_t$ costs \\$5; `$\\{$`\n\n$$\na = b \\\\\nb = \\{c\\}\n$$\n\n```\n$$\n= 2\n$$\n```\n"
    )
    assert math_problems(sound) == []


@each_chapter
def test_math_avoids_what_github_misreads(chapter):
    problems = {
        f"cell {position}": math_problems(cell.source)
        for position, cell in cells_of(chapter, "markdown")
    }
    assert {where: found for where, found in problems.items() if found} == {}


# Figures and links

IMAGE = re.compile(r"!\[(?P<alt>.*?)\]\((?P<target>[^)\s]+)\)", re.DOTALL)


@each_page
def test_figures_are_there_and_described(path):
    text = prose(path.read_text())
    images = [(match["alt"], match["target"]) for match in IMAGE.finditer(text)]
    assert len(images) == text.count("![")
    for alt, target in images:
        assert len(alt) >= ALT_CHARACTERS, f"{target}: {alt!r}"
        assert not re.search(r"[\n\[\]]", alt), f"{target}: {alt!r} breaks the link"
        assert (path.parent / target).is_file(), target


def test_every_figure_is_shown():
    pages = [path for path in [ROOT / "README.md", *(c.page for c in CHAPTERS)] if path.exists()]
    shown = {m["target"].rpartition("/")[2] for p in pages for m in IMAGE.finditer(p.read_text())}
    assert [f.name for f in sorted((ROOT / "figures").glob("*.png")) if f.name not in shown] == []


def test_readme_speeds_are_those_of_the_bench():
    networks = json.loads((ROOT / "figures" / "bench.json").read_text())["networks"]
    keys = {
        "`fuse_for_inference`": "fused",
        "`fuse_for_inference`, no compiler": "fused, merged",
        "our export in ONNX Runtime": "ours, ONNX Runtime",
        "timm's export in ONNX Runtime": "timm, ONNX Runtime",
        "timm's export in OpenVINO": "timm, OpenVINO",
    }
    line = r"^\| (\S[^|]*), (1|16) images? \|(.*)\|$"
    rows = re.findall(line, (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 2 * len(keys)
    for label, batch, cells in rows:
        times = [
            row["seconds"]
            for name in ("MixNet-S", "MixNet-M", "MixNet-L")
            for row in networks
            if row["network"] == name and row["batch"] == int(batch)
        ]
        ratios = [f"{row['timm, eager'] / row[keys[label]]:.1f}" for row in times]
        assert cells.replace(" ", "").split("|") == ratios, label


def anchors(path):
    """The names that GitHub gives to a page's headings."""
    titles = find_all(r"^#+ +(.+?) *$", prose_keeping_inline_code(path.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def prose_keeping_inline_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def broken_links(text, path):
    """Relative links of a Markdown text that stands in `path` and lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        there = file.exists()
        if there and anchor and file.suffix == ".md":
            there = anchor in anchors(file)
        if not there:
            broken.append(target)
    return broken


@each_page
def test_links_of_pages_lead_somewhere(path):
    assert broken_links(path.read_text(), path) == []


@each_chapter
def test_links_of_notebooks_lead_somewhere(chapter):
    text = "\n\n".join(cell.source for _, cell in cells_of(chapter, "markdown"))
    assert broken_links(text, chapter.ipynb) == []


@each_chapter
def test_page_links_to_pages(chapter):
    """Only the line that names the notebook leads to one."""
    assert find_all(r"\]\((\w+\.ipynb)", chapter.page.read_text()) == [chapter.ipynb.name]


# What no file may hold

FORBIDDEN = {
    "a registry": r"index[-]url|find[-]links|pypi\.org|pythonhosted\.org|anaconda\.(?:org|com)"
    r"|download\.pytorch\.org|://[\w.-]*(?:registry|mirror|artifactory|nexus)",
    "a path of one machine": r"(?<![\w./*>])/(?:work|root|home|Users)(?![\w-])",
    "an e-mail address": r"[\w.+-]+@[\w-]+\.[a-z]{2,}\b",
}


def forbidden(text):
    text = re.sub(r'"image/png": ".*"', "", text)
    return [
        f"{what}: {match[0]}"
        for what, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text, flags=re.IGNORECASE)
    ]


@pytest.mark.parametrize(
    "pieces",
    [("https://py", "pi.org/simple"), ("/ro", "ot/x"), ('"/wo', 'rk"'), ("a.b@exam", "ple.org")],
)
def test_forbidden_text_is_seen(pieces):
    assert len(forbidden("".join(pieces))) == 1
    assert forbidden(" ".join(pieces)) == []


def test_no_file_names_a_machine_a_registry_or_an_address():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = {}
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in (".png", ".npz"):
            found[name] = forbidden(path.read_text(errors="replace"))
    assert len(found) > 10
    assert {name: hits for name, hits in found.items() if hits} == {}


SOURCES = [p for folder in ("mixconv", "tools") for p in (ROOT / folder).rglob("*.py")]


def without_encoding(source):
    """Calls that read or write text as the locale has it: `PYTHONUTF8=0 LC_ALL=…` breaks them."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    places = {"read_text": 1, "write_text": 2}
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in places
        if len(call.args) < places[call.func.attr]
        if not any(word.arg == "encoding" for word in call.keywords)
    ]


def test_no_text_is_read_or_written_as_the_locale_has_it():
    found = {p.name: lines for p in SOURCES if (lines := without_encoding(p.read_text("utf-8")))}
    assert found == {}
    assert without_encoding('p.read_text()\np.write_text("é")\np.read_text("utf-8")\n') == [1, 2]


@each_chapter
def test_a_fold_says_what_it_holds(chapter):
    folded = [c for c in read(chapter).cells if KNOWN_TAGS & set(c.metadata.get("tags", []))]
    untold = [c.source.splitlines()[0] for c in folded if not c.source.startswith("# fold: ")]
    assert untold == []
