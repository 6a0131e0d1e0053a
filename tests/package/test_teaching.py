"""The tools of chapter 0: what they accept, what they refuse, what they say."""

import json

import matplotlib.pyplot as plt
import pytest
import torch

from mixconv import exercises, teaching
from mixconv._readable import hard_to_read
from mixconv.teaching import (
    KERNEL_COLORS,
    WrongAnswerError,
    attempt,
    check,
    check_rewrite,
    expect,
    kernel_color,
    live,
    photograph,
    show,
    table,
    use_style,
)

X = torch.arange(6.0).view(2, 3)


def double(x):
    return 2 * x


def once(x):
    """forget to double"""
    return x


def test_double(answer):
    expect(answer, 3, gives=6, why="twice three")
    expect(answer, X, gives=2 * X, why="twice each number")


test_double.__test__ = False  # type: ignore[attr-defined]  # an exercise's, not pytest's


def test_check_says_what_is_equal_and_refuses_the_rest(capsys):
    check(X + X, 2 * X, "doubling")
    assert capsys.readouterr().out == "equal: doubling, shape (2, 3)\n"
    for other in (X * 1.01, X.double(), X[0]):
        with pytest.raises(AssertionError, match="doubling"):
            check(other, X, "doubling")


def same_sum(t):
    return t + (t.sum() - t.sum().detach())


def same_mean_slope(t):
    """Its extra gradient is one number for the first half of the outputs, minus it for the rest."""
    signs = torch.ones(t.numel()).view(t.shape)
    signs.view(-1)[t.numel() // 2 :] = -1
    extra = (signs * t).sum()
    return t + (extra - extra.detach())


@pytest.mark.parametrize("shape", [(1,), (2, 3), (4, 5, 6)])
@pytest.mark.parametrize("rewrite", [lambda t: t.detach() + 0 * t, same_sum, same_mean_slope])
def test_gradient_errors_that_values_do_not_show(rewrite, shape):
    x = torch.randn(shape)
    check(rewrite(x), x, "values")
    with pytest.raises(AssertionError, match="it, gradient 0"):
        check_rewrite(lambda t: t, rewrite, x, what="it")


def test_rewrites_that_agree_pass_in_both_precisions(capsys):
    for x in (X, X.double()):
        check_rewrite(lambda t: t * t, lambda t: t**2, x, what="squares")
    assert capsys.readouterr().out == 2 * "equal: squares, output (2, 3), gradients: 1\n"
    with pytest.raises(AssertionError, match="it, output"):
        check_rewrite(lambda t: t, lambda t: 2 * t, X, what="it")
    with pytest.raises(AssertionError, match="it, gradient 1"):
        check_rewrite(lambda a, b: a * b, lambda a, b: a * b.detach() + 0 * b, X, X, what="it")


def test_expect_tells_call_value_right_value_and_reason():
    with pytest.raises(WrongAnswerError) as caught:
        expect(once, 3, gives=6, why="twice three")
    assert str(caught.value) == "once(3) gave 3, expected 6: twice three"
    assert (caught.value.arguments, caught.value.value) == ((3,), 3)
    expect(lambda: 0.1 + 0.2, gives=0.3, why="floats are compared up to rounding")
    expect(lambda: (1, "a"), gives=(1, "a"), why="the rest exactly")


@pytest.mark.parametrize("value", [None, 7, True, "6", [6], torch.tensor(6)])
def test_expect_refuses_what_is_not_the_same(value):
    with pytest.raises(WrongAnswerError, match="expected 6"):
        expect(lambda: value, gives=6, why="six")


def stub(x):
    raise NotImplementedError


def test_attempt_says_to_do_or_solved(capsys):
    attempt(stub, test_double)
    attempt(double, test_double)
    assert capsys.readouterr().out == "to do: stub\nsolved: double\n"
    with pytest.raises(AssertionError, match="expected 6"):
        attempt(once, test_double)


def test_wrong_answers_are_caught_and_named_afterwards(monkeypatch, capsys):
    monkeypatch.setattr(exercises, "_KNOWN_MISTAKES", {})
    attempt(double, test_double, wrong=[once])
    assert capsys.readouterr().out.splitlines() == [
        "solved: double",
        "caught: forget to double → once(3) gave 3, expected 6: twice three",
    ]
    with pytest.raises(AssertionError, match="This is what you get if you forget to double"):
        attempt(lambda x: x * 1, test_double)
    with pytest.raises(AssertionError) as caught:
        attempt(lambda x: x + 1, test_double)
    assert "This is what" not in str(caught.value)


def test_a_test_that_accepts_a_wrong_answer_is_refused(monkeypatch):
    monkeypatch.setattr(exercises, "_KNOWN_MISTAKES", {})

    def accepts_all(answer):
        answer(1)

    with pytest.raises(AssertionError, match="accepts a wrong answer: forget to double"):
        attempt(double, accepts_all, wrong=[once])

    def accepts_the_argument(answer):
        expect(answer, 1, gives=1, why="one")

    def zero(x):
        """return 0"""
        return 0

    with pytest.raises(AssertionError, match="accepts a wrong answer: return 1, whatever"):
        attempt(once, accepts_the_argument, wrong=[zero])


def test_a_wrong_answer_that_crashes_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(exercises, "_KNOWN_MISTAKES", {})

    def crash(x):
        """crash"""
        raise KeyError("x")

    with pytest.raises(AssertionError, match="crash raised KeyError"):
        attempt(double, test_double, wrong=[crash])


def test_table_as_text_and_as_markdown():
    drawn = table(["name", "count", "gain"], [["a", 1234, "+0.5"], ["b", 5, "–"]])
    assert repr(drawn).splitlines() == [
        "name  count  gain",
        "   a  1,234  +0.5",
        "   b      5     –",
    ]
    assert drawn._repr_markdown_().splitlines() == [
        "| name | count | gain |",
        "| --- | ---: | ---: |",
        "| a | 1,234 | +0.5 |",
        "| b | 5 | – |",
    ]
    assert table(["by"], [["x2"]])._repr_markdown_().splitlines()[1] == "| --- |"


def test_a_colour_for_each_kernel_size():
    assert len(set(KERNEL_COLORS.values())) == len(KERNEL_COLORS) == 6
    assert kernel_color(3) == KERNEL_COLORS[3]
    assert kernel_color(99) not in KERNEL_COLORS.values()


def test_figures_are_plain_and_readable():
    use_style()
    for key, value in {
        "figure.dpi": 144, "figure.constrained_layout.use": True, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
        "axes.titlesize": 11, "legend.frameon": False,
    }.items():  # fmt: skip
        assert plt.rcParams[key] == value, key  # type: ignore[index]


def test_show_gives_name_and_alt_text_and_closes(monkeypatch):
    shown = []
    monkeypatch.setattr(teaching, "display", lambda *what, **how: shown.append((what, how)))
    use_style()
    figure, _ = plt.subplots(figsize=(3, 2))
    show(figure, "dot.png", "A dot.")
    metadata = {"filename": "dot.png", "alt": "A dot.", "image/png": {"width": 300}}
    assert shown == [((figure,), {"metadata": metadata})]
    assert not plt.fignum_exists(figure.number)


def test_show_gives_what_moves_beside_the_picture(monkeypatch):
    shown = []
    monkeypatch.setattr(teaching, "display", lambda *what, **how: shown.append((what, how)))
    figure, _ = plt.subplots(figsize=(3, 2))
    widget = live("Convolution")
    show(figure, "dot.png", "A dot.", live=widget)
    [((bundle,), how)] = shown
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == widget.model_id
    assert bundle["text/plain"].startswith("<Figure size ")  # and no address, as of a widget
    metadata = {"filename": "dot.png", "alt": "A dot.", "image/png": {"width": 300}}
    assert how == {"raw": True, "metadata": metadata}
    assert not plt.fignum_exists(figure.number)


def test_photograph_is_a_batch_of_one_between_0_and_1():
    image = photograph(32)
    assert image.shape == (1, 3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < 0.2
    assert 0.8 < image.max() <= 1


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ({"color": "#E69F00"}, "'5×5' in #E69F00 has too little contrast"),
        ({"color": "#777777"}, "'5×5' in #777777 has too little contrast"),
        ({"fontsize": 7}, "'5×5' is 9.7 pixels high, not 10"),
        ({"color": "#757575"}, None),  # 4.6 to 1
        ({"color": "#555555", "fontsize": 7.3}, None),
        ({"color": "white"}, None),  # lies on something dark
        ({"color": "#E69F00", "visible": False}, None),
    ],
)
def test_pale_and_small_text_is_refused(words, fault):
    figure = plt.figure(figsize=(8.3, 2))
    figure.text(0.5, 0.5, "5×5", **words)
    assert hard_to_read(figure) == ([fault] if fault else [])
    if fault:
        with pytest.raises(ValueError, match=r"^dot\.png: '5×5' "):
            show(figure, "dot.png", "A word.")
    plt.close(figure)


SOLUTION = """\
def double_solution(x):
    return twice(x)


def twice(x):
    return 2 * x


def half(x):
    \"\"\"divide where the question says double\"\"\"
    return x / 2


def square(x):
    \"\"\"take the square: 2 is right by chance\"\"\"
    return twice(x) * x // 2


attempt(double_solution, test_double, wrong=[half, square])
"""


@pytest.mark.parametrize("tag", ["solution", "drawing"])
def test_mistakes_are_known_before_the_solution_cell_has_run(tag, monkeypatch, tmp_path):
    path = tmp_path / "00.ipynb"
    cell = {"source": SOLUTION.splitlines(keepends=True), "metadata": {"tags": [tag]}}
    path.write_text(json.dumps({"cells": [{"source": "# x", "metadata": {}}, cell]}))
    monkeypatch.setenv("JPY_SESSION_NAME", str(path))
    monkeypatch.setattr(exercises, "_KNOWN_MISTAKES", {})
    with pytest.raises(AssertionError) as caught:
        attempt(lambda x: x**2, test_double)
    named = "\nThis is what you get if you take the square: 2 is right by chance."
    assert str(caught.value).endswith(named) == (tag == "solution")


@pytest.mark.parametrize("path", ["", "missing.ipynb", __file__])
def test_no_notebook_is_no_mistake(path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", path)
    monkeypatch.setattr(exercises, "_KNOWN_MISTAKES", {})
    with pytest.raises(AssertionError, match="expected") as caught:
        attempt(lambda x: x**2, test_double)
    assert "This is what" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.ones(3), "[1, 1, 1]"),
        (torch.tensor(2), "2"),
        (torch.ones(1, 1, 2, 2), "[[1, 1], [1, 1]] (1, 1, 2, 2)"),
        (torch.ones(5, 5), "… (5, 5)"),
        (torch.ones(99), "…"),
        ([torch.ones(5, 5), (3,)], "[… (5, 5), (3,)]"),
        ((1, "a"), "(1, 'a')"),
        ([1 / 3, 2.0, True], "[0.333333, 2, True]"),
        (torch.nn.ReLU(), "ReLU(…)"),
        ({"a": lambda x: x, "b": 1.0}, "{'a': a function, 'b': 1}"),
        (test_double, "the function test_double"),
    ],
)
def test_values_are_shown_in_a_line_without_addresses(value, shown):
    assert exercises._show(value) == shown


def test_a_replaced_picture_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(teaching, "display", lambda *what, **how: None)
    monkeypatch.setenv("FIGURES", str(tmp_path))

    def draw(word):
        figure = plt.figure(figsize=(4, 2))
        figure.text(0.5, 0.5, word)
        return figure

    draw("17").savefig(tmp_path / "x.png", bbox_inches="tight", facecolor="white")
    show(draw("17"), "x.png", "A number.")
    with pytest.raises(AssertionError, match=r"^x\.png is not what is drawn: "):
        show(draw("18"), "x.png", "Another number.")
    with pytest.raises(FileNotFoundError):
        show(draw("17"), "y.png", "A number.")
