"""The final answer of a worked solution, and when two are equal."""

from fractions import Fraction

import pytest

from dpp_lightning.tasks.causal_lm.math_answers import final_answer, number_in, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("so 5 remain.\nThe answer is: 1,234.50", "1,234.50"),
        ("so 5 remain. The answer is 7.", "7."),
        ("#### 18\nThe answer is: 18", "18"),
        ("The answer is: 3\nNo, wait.\nThe answer is: 4\nmore words 9", "4"),
        ("####72", "72"),
        ("THE ANSWER IS: $5", "$5"),
        ("it is 72", None),
        ("####", None),
        ("#### \n", None),
        ("", None),
    ],
)
def test_what_follows_the_last_marker(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72", Fraction(72)),
        ("7.", Fraction(7)),
        ("1,234", Fraction(1234)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("-3", Fraction(-3)),
        ("+3", Fraction(3)),
        ("−3", Fraction(-3)),
        ("$18", Fraction(18)),
        ("-$18.50", Fraction(-37, 2)),
        ("$ -4", Fraction(-4)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2 hours", Fraction(-3, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("\\dfrac{-1}{2}", Fraction(-1, 2)),
        ("50 %", Fraction(50)),
        ("18 dollars and 5 cents", Fraction(18)),
        ("about 12 apples", Fraction(12)),
        ("0.1", Fraction(1, 10)),
        ("1,23", Fraction(1)),  # no thousands: the number ends at the comma
        ("3/0", None),
        ("x + y", None),
        ("", None),
        ("9" * 100_000, Fraction(int("9" * 1000))),
    ],
)
def test_the_first_number_exactly(answer, expected):
    assert number_in(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("18", "18", True),
        ("18.00", "18", True),
        ("$1,800", "1800", True),
        ("3/4", "0.75", True),
        ("18", "81", False),
        ("-18", "18", False),
        (None, "18", False),
        ("eighteen", "18", False),
        ("x+1", "x + 1", True),
        ("$X+1$.", "x+1", True),
        ("x", "y", False),
    ],
)
def test_equal_numbers_or_equal_texts(answer, expected, same):
    assert same_answer(answer, expected) is same
