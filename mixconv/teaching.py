# Generated from notebooks/00_start_here.ipynb by `make book`. Edit the notebook, not this file.

"""What every chapter uses: checks, exercises, tables, figures, the photograph (chapter 0).

The only module that needs more than torch: install `mixconv[tutorial]`.
"""

import ast
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from mixconv._readable import hard_to_read

__all__ = [
    "KERNEL_COLORS",
    "Answer",
    "Table",
    "Test",
    "WrongAnswerError",
    "attempt",
    "check",
    "check_rewrite",
    "expect",
    "kernel_color",
    "photograph",
    "show",
    "table",
    "use_style",
]


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    """Assert that two tensors are equal up to rounding, and say so.

    Args:
        actual: the new result.
        expected: the result to trust, of the same shape and dtype.
        what: a name for the comparison, used in the message.

    Raises:
        AssertionError: if shape, dtype or a value differs (tolerances of `torch.testing`).
    """
    torch.testing.assert_close(actual, expected, msg=lambda details: f"{what}: {details}")
    print(f"equal: {what}, shape {tuple(actual.shape)}")


def _uneven(like: Tensor) -> Tensor:
    """Numbers from 1 to 2, all different, with no pattern for an error to hide in."""
    golden = 0.6180339887498949  # its multiples never come back to where they were
    steps = torch.arange(like.numel(), dtype=torch.float64) * golden
    return (1 + steps % 1).to(like.dtype).view(like.shape)


def check_rewrite(
    before: Callable[..., Tensor], after: Callable[..., Tensor], *tensors: Tensor, what: str
) -> None:
    """Assert that two functions agree in their output and in the gradient of every argument.

    Args:
        before: the function to trust.
        after: its rewrite.
        tensors: arguments for both, floating point.
        what: a name for the rewrite, used in the message.

    Raises:
        AssertionError: naming the output or the argument whose gradient differs.
    """
    results = []
    for function in (before, after):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, _uneven(output))])
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, expected, actual in zip(names, *results, strict=True):
        try:
            torch.testing.assert_close(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from None
    print(f"equal: {what}, output {tuple(output.shape)}, gradients: {len(tensors)}")


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
    return f"the function {value.__name__}" if hasattr(value, "__name__") else repr(value)


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


class Table:
    """Rows under a header; the last line of a notebook cell draws it.

    Args:
        header: the column names.
        rows: one sequence a row; integers are shown with thousands separators.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.header = list(header)
        self.rows = [[self._cell(value) for value in row] for row in rows]

    @staticmethod
    def _cell(value: object) -> str:
        number = isinstance(value, int) and not isinstance(value, bool)
        return f"{value:,}" if number else str(value)

    @staticmethod
    def _is_number(cell: str) -> bool:
        return cell == "–" or cell.strip("+-")[:1].isdigit()

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def _repr_markdown_(self) -> str:
        columns = zip(*self.rows, strict=True)
        right = [all(map(self._is_number, column)) for column in columns]
        rule = ["---:" if numbers else "---" for numbers in right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.header, rule, *self.rows])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table to end a cell with."""
    return Table(header, rows)


KERNEL_COLORS = {
    3: "#0072B2",
    5: "#E69F00",
    7: "#009E73",
    9: "#CC79A7",
    11: "#D55E00",
    13: "#56B4E9",
}


def kernel_color(kernel_size: int) -> str:
    """The colour that means this kernel size in every figure; grey for an unusual one."""
    return KERNEL_COLORS.get(kernel_size, "#777777")


def use_style() -> None:
    """Set the figure style of the book: sparse axes, readable text, no chart junk."""
    plt.rcParams.update(
        {
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "legend.frameon": False,
        }
    )


def show(figure: Figure, filename: str, alt: str) -> None:
    """Draw a figure at the end of a cell.

    Args:
        figure: a matplotlib figure; it is closed afterwards.
        filename: its name in `figures/`, such as `partition_bars.png`.
        alt: one or two sentences that state what the picture shows.

    Raises:
        ValueError: for text that is too small or too pale.
    """
    if hard := hard_to_read(figure):
        raise ValueError(f"{filename}: " + "; ".join(hard))
    width = round(figure.get_figwidth() * 100)
    metadata = {"filename": filename, "alt": alt, "image/png": {"width": width}}
    display(figure, metadata=metadata)
    plt.close(figure)


def photograph(size: int = 224) -> Tensor:
    """The book's photograph: Grace Hopper, public domain, shipped with matplotlib.

    Args:
        size: height and width in pixels, at most 512.

    Shape:
        Output: `(1, 3, size, size)`, float32, values 0 to 1, red-green-blue.
    """
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = torch.from_numpy(np.array(plt.imread(path)))
    image = pixels.permute(2, 0, 1)[None].float() / 255
    image = image[..., :512, :]  # 600 rows, 512 columns; the face is above the middle
    small = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return small.clamp(0, 1)  # antialiasing overshoots by a rounding error
