"""Mutants: the package's source with one small thing changed (see `tools/mutants.py`)."""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.notebooks import ROOT

OPERATORS = 1  # the number of this set of changes: another set draws another sample

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip

# Calls whose text only tells somebody something, and arguments that do.
_TELLING = {"warning", "warn", "error", "info", "print", "cast", "ArgumentParser"}
_TOLD = {"help", "metavar", "description", "prog"}


class Mutant(NamedTuple):
    """One small change: some bytes of a file become others."""

    path: str
    name: str  # of the function or class, and the change: stays as other code moves
    kind: str
    line: int
    span: tuple[int, int]  # bytes of the file
    new: str
    judged: tuple[int, int]  # lines: tests that run one of these are the ones to ask

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.path} {self.name}".encode()).hexdigest()[:12]

    def apply(self, source: bytes) -> bytes:
        start, stop = self.span
        return source[:start] + self.new.encode() + source[stop:]


def _with(node: Any, **fields: Any) -> str:
    """The text of a node with some of its fields changed; an expression in brackets."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    text = ast.unparse(changed)
    return f"({text})" if isinstance(node, ast.expr) else text


def changes(node: ast.AST, telling: bool) -> Iterator[tuple[Any, str, str]]:
    """What may be changed at a node: the part to replace, its new text, the kind of change."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPS:
            yield node, _with(node, op=_SWAPS[type(op)]()), "operator"
        case ast.Compare(ops=ops):
            for i, old in enumerate(ops):
                swapped = [*ops[:i], _SWAPS[type(old)](), *ops[i + 1 :]]
                yield node, _with(node, ops=swapped), "comparison"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, _with(operand), "sign or not dropped"
        case ast.Constant(value=bool(value)):
            yield node, str(not value), "flag"
        case ast.Constant(value=int(value) | float(value)):
            yield node, repr(value + 1), "number"
        case ast.Constant(value=str(value)) if not telling:
            yield node, repr(value + "x"), "text"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield test, f"(not {_with(test)})", "condition"
        case ast.comprehension(ifs=ifs):
            yield from ((test, f"(not {_with(test)})", "condition") for test in ifs)
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if keyword.arg and keyword.arg not in _TOLD:
                    rest = [other for other in keywords if other is not keyword]
                    yield node, _with(node, keywords=rest), "argument dropped"
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield node, "pass", "statement dropped"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, "None", "returned value"
        case ast.Break() | ast.Continue():
            yield node, "continue" if isinstance(node, ast.Break) else "break", "jump"
        case ast.FunctionDef(decorator_list=decorators) | ast.ClassDef(decorator_list=decorators):
            yield from ((decorator, "", "decorator dropped") for decorator in decorators)


def inside(node: ast.AST) -> Iterable[ast.AST]:
    """What may be changed within a node: no annotations, docstrings, `__all__`, f-strings."""
    match node:
        case ast.JoinedStr() | ast.Expr(value=ast.Constant()):
            return []  # before Python 3.12 what is in an f-string has no place of its own
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return []
        case ast.AnnAssign(value=value):
            return [value] if value else []
        case ast.FunctionDef(args=args):
            given = [d for d in (*args.defaults, *args.kw_defaults) if d]
            return [*node.decorator_list, *given, *node.body]
        case ast.ClassDef():
            return [*node.decorator_list, *node.keywords, *node.body]
    return ast.iter_child_nodes(node)


def _only_tells(node: ast.AST) -> bool:
    """Whether text in a node is a message, and so another text as good."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in _TELLING
    return isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg in _TOLD)


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def contrast(old: str, new: str, around: int = 30) -> str:
    """Two texts, cut to where they differ."""
    start = _alike(old, new)
    end = _alike(old[start:][::-1], new[start:][::-1])
    before = ("…" if start > around else "") + old[max(0, start - around) : start]
    after = old[len(old) - end :][:around] + ("…" if end > around else "")
    middles = [text[start : len(text) - end] for text in (old, new)]
    if max(map(len, middles)) > 80:
        middles = [m if len(m) <= 80 else f"{m[:38]}…{m[-38:]}" for m in middles]
    return " → ".join(before + middle + after for middle in middles)


class Finder:
    """Walks a file; `found` holds its mutants."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.found: list[Mutant] = []
        lines = source.splitlines(keepends=True)
        self.begins = [0, *itertools.accumulate(map(len, lines))]
        self.walk(ast.parse(source), "", (1, len(lines)), in_function=False, telling=False)

    def walk(
        self, node: Any, where: str, judged: tuple[int, int], *, in_function: bool, telling: bool
    ) -> None:
        """Collect what can be changed at a node and in it.

        Args:
            node: of the syntax tree.
            where: names of the functions and classes around it.
            judged: a test that runs one of these lines can tell whether the node is right.
            in_function: whether it is in a function's body, where a statement runs when called.
            telling: whether it is within a message.
        """
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".lstrip(".")
            judged = node.body[0].lineno, node.end_lineno or 0
        elif isinstance(node, ast.stmt) and in_function:
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or 0
            judged = node.lineno, max(node.lineno, last)
        telling = telling or _only_tells(node)
        for part, new, kind in changes(node, telling):
            self.add(part, new, kind, where, judged)
        body = node.body if isinstance(node, ast.FunctionDef) else []
        for child in inside(node):
            within = in_function or child in body
            self.walk(child, where, judged, in_function=within, telling=telling)

    def add(self, part: Any, new: str, kind: str, where: str, judged: tuple[int, int]) -> None:
        """Note a mutant, under a name that no other has."""
        start = self.begins[part.lineno - 1] + part.col_offset - (kind == "decorator dropped")
        stop = self.begins[part.end_lineno - 1] + part.end_col_offset
        change = contrast(ast.unparse(part), new.removeprefix("(").removesuffix(")"))
        name = f"{where}: {change}"
        name += f" #{n + 1}" if (n := sum(m.name.startswith(name) for m in self.found)) else ""
        lines = part.lineno, (start, stop), new, judged
        self.found.append(Mutant(self.path, name, kind, *lines))


def all_mutants(root: Path = ROOT) -> list[Mutant]:
    """Every mutant of the package, in order."""
    paths = sorted((root / "mixconv").rglob("*.py"))
    finders = (Finder(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)
    return [mutant for finder in finders for mutant in finder.found]


def draw(mutants: Iterable[Mutant], seed: int, size: int) -> list[Mutant]:
    """A sample that stays nearly the same while other code is written: by hash, not by place."""
    return sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest())[:size]
