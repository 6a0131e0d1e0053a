# Generated from notebooks/00_start_here.ipynb by `make book`. Edit the notebook, not this file.

"""Exercises: a test that explains, an attempt that tests its own test (chapter 0)."""

import ast
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Answer", "Test", "WrongAnswerError", "attempt", "expect"]


class WrongAnswerError(AssertionError):
    """An answer that gave something else than was expected; says what, and why.

    Attributes:
        arguments: of the call.
        value: what it gave.
    """

    def __init__(self, message: str, arguments: tuple[object, ...], value: object) -> None:
        super().__init__(message)
        self.arguments, self.value = arguments, value


def _same(one: object, other: object) -> bool:
    """Whether two answers are equal: numbers and tensors up to rounding, the rest exactly."""
    if type(one) is not type(other) and not {type(one), type(other)} <= {int, float}:
        return False
    try:
        torch.testing.assert_close(one, other)
    except (AssertionError, TypeError, ValueError):
        return bool(type(one) is type(other) and not isinstance(one, Tensor) and one == other)
    return True


def _show(value: object) -> str:
    """In one short line, without addresses."""
    if isinstance(value, Tensor):
        numbers = _show(value.detach().squeeze().tolist()) if value.numel() <= 12 else "…"
        return f"{numbers} {tuple(value.shape)}" if value.ndim > 1 else numbers
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_show, value)) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__}(…)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_show(one)}" for key, one in value.items()) + "}"
    name = getattr(value, "__name__", "")
    return "a function" if name == "<lambda>" else f"the function {name}" if name else repr(value)


def expect(answer: Callable[..., object], *arguments: object, gives: object, why: str) -> None:
    """Assert, inside the test of an exercise, that an answer gives what it should.

    Args:
        answer: the function under test.
        arguments: to call it with.
        gives: the right value; tensors and floats are compared up to rounding.
        why: the reason, in a few words; the reader is shown it.

    Raises:
        WrongAnswerError: with the call, what came back, what was expected, and why.
    """
    value = answer(*arguments)
    if not _same(value, gives):
        call = f"{answer.__name__}({', '.join(map(_show, arguments))})"
        message = f"{call} gave {_show(value)}, expected {_show(gives)}: {why}"
        raise WrongAnswerError(message, arguments, value)


Answer = Callable[..., object]

Test = Callable[[Answer], None]


_KNOWN_MISTAKES: dict[str, list[Answer]] = {}  # by the name of the test


def _stored_mistakes(test: Test) -> list[Answer]:
    """The wrong answers in the solution cell of this notebook, if the reader has not run it."""
    try:
        notebook = json.loads(Path(os.environ["JPY_SESSION_NAME"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):  # not in Jupyter, or not from a file
        return []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "solution" in cell["metadata"].get("tags", []) and f", {test.__name__}," in source:
            return _run_definitions(ast.parse(source), vars(sys.modules[test.__module__]))
    return []


def _run_definitions(tree: ast.Module, known: dict[str, Any]) -> list[Answer]:
    """Define what a solution cell defines, apart from the reader's names; its `wrong` list."""
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Expr)]
    assert isinstance(call, ast.Call)
    (wrong,) = [keyword.value for keyword in call.keywords if keyword.arg == "wrong"]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    scope = dict(known)
    exec(compile(tree, "solution", "exec"), scope)
    return list(eval(compile(ast.Expression(wrong), "solution", "eval"), scope))


def _explain(error: AssertionError, test: Test) -> str:
    """The message of a failed attempt; names the misconception if the value is a known one's."""
    if not isinstance(error, WrongAnswerError):
        return str(error)
    for mistake in _KNOWN_MISTAKES.get(test.__name__) or _stored_mistakes(test):
        if _same(mistake(*error.arguments), error.value):
            return f"{error}\nThis is what you get if you {mistake.__doc__}."
    return str(error)


def attempt(answer: Answer, test: Test, *, wrong: Sequence[Answer] = ()) -> None:
    """Try an exercise: run `test(answer)` and say whether it is to do or solved.

    Args:
        answer: the reader's function, or the solution.
        test: raises AssertionError for a wrong answer; see `expect`.
        wrong: wrong answers that the test must catch. The docstring of each names one
            misconception, and completes "this is what you get if you …".

    Raises:
        AssertionError: from the test, if the answer is wrong; or if a wrong answer passes.
    """
    try:
        test(answer)
    except NotImplementedError:
        print(f"to do: {answer.__name__}")
        return
    except AssertionError as error:
        raise AssertionError(_explain(error, test)) from None
    print(f"solved: {answer.__name__}")
    if wrong:
        _KNOWN_MISTAKES[test.__name__] = list(wrong)
        _try_wrong_answers(test, wrong)


_WRONG_EVERYWHERE: dict[str, Answer] = {
    "return nothing": lambda *arguments: None,
    "return 1, whatever the question": lambda *arguments: 1,
    "return an empty list": lambda *arguments: [],
    "return the first argument as it came": lambda *arguments: arguments[0] if arguments else None,
}


def _try_wrong_answers(test: Test, wrong: Sequence[Answer]) -> None:
    """Assert that a test catches each wrong answer, and those that are wrong everywhere."""
    named = {str(answer.__doc__): answer for answer in wrong}
    for mistake, answer in (named | _WRONG_EVERYWHERE).items():
        try:
            test(answer)
        except AssertionError as error:
            if answer in wrong:
                line = f"caught: {mistake} → {str(error).splitlines()[0]}"
                print(textwrap.fill(line, 96, subsequent_indent="    "))
        except Exception as error:
            if answer in wrong:  # the others may fail in any way
                raise AssertionError(f"{answer.__name__} raised {error!r}") from error
        else:
            raise AssertionError(f"{test.__name__} accepts a wrong answer: {mistake}")
