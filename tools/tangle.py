"""Notebooks → package.

A code cell whose first line is `#| export layer.py` is source of `mixconv/layer.py`, and
`#| export fast/kernel.py` of `mixconv/fast/kernel.py`. In a folded cell that begins with a title
(`# fold: How a name is found`) it is the second line, and the title stays behind. Cells go to
their module in reading order. Imports move to the top. A class may be told in pieces: a later cell
that says `class MixConv2d(MixConv2d):` adds its members to the class begun before.

C++ is told in Markdown cells: a fenced block of `c++` whose first line is
`//| export fast/depthwise.cpp` is source of that file. Its blocks are joined in reading order.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.notebooks import ROOT, BookError, fold_title

MARKER = re.compile(r"^#\|\s*export\b(?P<rest>.*)$")
MODULE = re.compile(r"^(?:[a-z][a-z0-9_]*/)?[a-z_][a-z0-9_]*\.py$")
GENERATED = "Generated from notebooks/{}.ipynb by `make book`. Edit the notebook, not this file."
LINE_LENGTH = 100  # as pyproject.toml says
CPP_FENCE = re.compile(r"^```c(?:pp|\+\+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CPP_MARKER = re.compile(
    r"^//\|\s*export\s+(?P<name>(?:[a-z][a-z0-9_]*/)?[a-z_][a-z0-9_]*\.cpp)\s*$"
)


@dataclass
class Piece:
    """One top-level statement of a module, with the comments above it."""

    text: str
    where: str
    node: ast.stmt


@dataclass
class Module:
    name: str
    chapter: str
    docstring: str = ""
    imports: list[str] = field(default_factory=list)
    imported: dict[str, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)


def export_target(source: str, where: str) -> str | None:
    """The module a cell is exported to, or None for a cell that stays in its notebook.

    Raises:
        BookError: for a marker that is misspelt, not on the first line, or names no module.
    """
    lines = source.splitlines()
    first = 1 if fold_title(source, where) else 0
    for number, line in enumerate(lines):
        if re.match(r"\s*#\s+\|\s*export|\s+#\|", line):
            raise BookError(f"{where}: {line!r} is not a marker; write `#| export NAME.py`")
        if not line.startswith("#|"):
            continue
        match = MARKER.match(line)
        if match is None:
            raise BookError(f"{where}: {line!r} is not a marker; write `#| export NAME.py`")
        if number != first:
            raise BookError(f"{where}: `#| export` must be the first line of its cell")
        name = match["rest"].strip()
        if not MODULE.match(name) or name.endswith("__init__.py"):
            raise BookError(f"{where}: `#| export {name}` does not name a module such as layer.py")
        return name
    return None


def cpp_blocks(source: str, where: str) -> list[tuple[str, str]]:
    """File name and code of each exported C++ block of a Markdown cell.

    Raises:
        BookError: for a marker that is misspelt, or not the first line of a `c++` block.
    """
    blocks = []
    for match in CPP_FENCE.finditer(source):
        first, _, code = match["code"].partition("\n")
        marker = CPP_MARKER.match(first)
        if marker:
            blocks.append((marker["name"], code.rstrip() + "\n"))
    strays = [line for line in source.splitlines() if line.lstrip().startswith("//|")]
    if len(strays) != len(blocks):
        raise BookError(
            f"{where}: `//| export NAME.cpp` must be the first line of a ```c++ block: {strays}"
        )
    return blocks


def tangle(notebooks: Iterable[tuple[str, Any]], root: Path = ROOT) -> dict[str, str]:
    """The text of every generated file of the package, by name.

    Args:
        notebooks: (stem, notebook) pairs in reading order.
        root: the repository, for the formatter's settings.

    Raises:
        BookError: naming notebook and cell, for anything that would not make a sound module.
    """
    modules: dict[str, Module] = {}
    cpp: dict[str, tuple[str, list[str]]] = {}
    for stem, notebook in notebooks:
        for number, cell in enumerate(notebook.cells, start=1):
            where = f"{stem}, cell {number}"
            if cell.cell_type == "markdown":
                for name, code in cpp_blocks(cell.source, where):
                    add_cpp(cpp, name, code, stem, where)
            if cell.cell_type != "code":
                continue
            target = export_target(cell.source, where)
            if target is None:
                continue
            module = modules.setdefault(target, Module(target, stem))
            if module.chapter != stem:
                raise BookError(
                    f"{where}: {target} belongs to chapter {module.chapter}; "
                    "one module, one chapter"
                )
            add_cell(module, cell.source, where)
    for module in modules.values():
        if not module.docstring:
            raise BookError(f"{module.chapter}: {module.name} has no docstring and no content")
    files = {name: tidy(render(module), name, root) for name, module in modules.items()}
    for name, (stem, blocks) in cpp.items():
        files[name] = "\n".join([header(stem, "//") + "\n", *blocks])
    return files


def add_cpp(
    files: dict[str, tuple[str, list[str]]], name: str, code: str, stem: str, where: str
) -> None:
    chapter, blocks = files.setdefault(name, (stem, []))
    if chapter != stem:
        raise BookError(f"{where}: {name} belongs to chapter {chapter}; one file, one chapter")
    blocks.append(code)


def add_cell(module: Module, source: str, where: str) -> None:
    """Take one exported cell apart into docstring, imports and pieces."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise BookError(f"{where}, line {error.lineno}: {error.msg}") from error
    lines = source.splitlines()
    position = 2 if fold_title(source, where) else 1  # a title, perhaps, and the marker
    for node in tree.body:
        start, end = first_line(node) - 1, node.end_lineno or node.lineno
        above = lines[position:start]
        if module.docstring == "":
            if not is_string(node):
                raise BookError(f"{where}: {module.name} must begin with its docstring")
            module.docstring = "\n".join([*above, *lines[start:end]]).strip()
        elif isinstance(node, ast.Import | ast.ImportFrom):
            add_import(module, node, where)
            module.imports.append("\n".join([*above, *lines[start:end]]))
        elif is_string(node):
            raise BookError(f"{where}: a stray string; a module has one docstring, its first line")
        else:
            tail = indented_comments(lines, end)
            end += len(tail)
            add_piece(module, Piece("\n".join([*above, *lines[start:end]]), where, node))
        position = end
    if any(line.strip() for line in lines[position:]):
        raise BookError(f"{where}: comments after the last statement would be lost; move them up")


def first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def is_string(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def indented_comments(lines: list[str], start: int) -> list[str]:
    """Comment lines that still belong to the body of the statement that ends above them."""
    taken: list[str] = []
    for line in lines[start:]:
        if line.strip() and not re.match(r"\s+#", line):
            break
        taken.append(line)
    while taken and not taken[-1].strip():
        taken.pop()
    return taken


def add_import(module: Module, node: ast.Import | ast.ImportFrom, where: str) -> None:
    for alias in node.names:
        name = alias.asname or alias.name
        origin = ast.unparse(
            ast.Import([alias])
            if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, [alias], node.level)
        )
        if module.imported.setdefault(name, origin) != origin:
            raise BookError(
                f"{where}: `{origin}` and `{module.imported[name]}` give one name two meanings"
            )


def add_piece(module: Module, piece: Piece) -> None:
    """Append a statement, or add a class piece to the class it continues."""
    node = piece.node
    if isinstance(node, ast.ClassDef) and continues_itself(node):
        extend_class(module, node, piece)
        return
    for name in defined_names(node):
        if name in module.imported:
            raise BookError(f"{piece.where}: {name} is imported already, as a thing of its own")
        for earlier in module.pieces:
            overloaded = is_accessor(node) or is_accessor(earlier.node)
            if name in defined_names(earlier.node) and not overloaded:
                raise BookError(
                    f"{piece.where}: {name} is exported already in {earlier.where}; "
                    f"to add to a class write `class {name}({name}):`"
                )
    module.pieces.append(piece)


def continues_itself(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == node.name for base in node.bases)


def extend_class(module: Module, node: ast.ClassDef, piece: Piece) -> None:
    base = next(
        (
            earlier
            for earlier in module.pieces
            if isinstance(earlier.node, ast.ClassDef) and earlier.node.name == node.name
        ),
        None,
    )
    if base is None:
        raise BookError(f"{piece.where}: adds to class {node.name}, which no cell before begins")
    assert isinstance(base.node, ast.ClassDef)
    if len(node.bases) > 1 or node.keywords or node.decorator_list:
        raise BookError(
            f"{piece.where}: bases and decorators of {node.name} belong to its first piece"
        )
    if is_string(node.body[0]):
        raise BookError(f"{piece.where}: the docstring of {node.name} belongs to its first piece")
    members = {name for member in base.node.body for name in defined_names(member)}
    for member in node.body:
        for name in defined_names(member):
            if name in members and not isinstance(member, ast.FunctionDef):
                raise BookError(f"{piece.where}: {node.name}.{name} is defined twice")
            if name in members and not is_accessor(member):
                raise BookError(f"{piece.where}: {node.name}.{name} is defined twice")
    lines = piece.text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("class "))
    if any(line.strip() for line in lines[:header]):
        raise BookError(f"{piece.where}: put comments on {node.name} inside the class body")
    base.text += "\n\n" + "\n".join(lines[header + 1 :])
    base.node.body.extend(node.body)


def is_accessor(member: ast.stmt) -> bool:
    """`@x.setter` and `@overload` rightly repeat a name."""
    decorators = getattr(member, "decorator_list", [])
    return any(re.search(r"\.(setter|deleter)$|overload", ast.unparse(d)) for d in decorators)


def defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        names = (name for target in node.targets for name in ast.walk(target))
        return [
            name.id
            for name in names
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        ]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def header(stem: str, comment: str) -> str:
    """The line that says which notebook to edit; two lines where one would be too long."""
    made, _, edit = (line := f"{comment} {GENERATED.format(stem)}").partition(". Edit")
    return line if len(line) <= LINE_LENGTH else f"{made}.\n{comment} Edit{edit}"


def render(module: Module) -> str:
    """Header, docstring, imports, `__all__`, pieces."""
    names = [name for piece in module.pieces for name in defined_names(piece.node)]
    public = sorted({name for name in names if not name.startswith("_")})
    parts = [header(module.chapter, "#"), module.docstring, "\n".join(module.imports)]
    if public:
        parts.append("__all__ = [" + "".join(f'"{name}", ' for name in public).rstrip(", ") + "]")
    parts += [piece.text for piece in module.pieces]
    return "\n\n".join(part for part in parts if part) + "\n"


def tidy(source: str, name: str, root: Path = ROOT) -> str:
    """Sort the imports and format, as a person's editor would."""
    for command in (
        [sys.executable, "-m", "ruff", "check", "--quiet", "--select", "I,RUF022", "--fix"],
        [sys.executable, "-m", "ruff", "format", "--quiet"],
    ):
        result = subprocess.run(
            [*command, "--stdin-filename", f"mixconv/{name}", "-"],
            input=source,
            capture_output=True,
            text=True,
            cwd=root,
        )
        if result.returncode:
            raise BookError(f"mixconv/{name} would not be valid Python: {result.stderr.strip()}")
        source = result.stdout
    return source
