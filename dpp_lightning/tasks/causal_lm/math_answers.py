"""The final answer of a worked solution, and whether two answers are the same number."""

import re
from fractions import Fraction

MARKERS = ("####", "The answer is:")

_MARKER = re.compile(r"####|the answer is\s*:?", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = re.compile(
    r"""(?P<sign>[-+−]?)\s*[$£€]?\s*(?P<inner>[-+−]?)
        (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?
        (?:\s*/\s*(?P<below>\d{1,3}(?:,\d{3})+(?!\d)|\d+))?""",
    re.VERBOSE,
)
_MIXED = re.compile(r"(?P<sign>[-−]?)(?P<whole>\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)")
_MOST_DIGITS = 1000  # read of one answer; a model may repeat a digit without end


def final_answer(text: str) -> str | None:
    """What follows the last ``####`` or ``The answer is:``, to the end of its line; ``None`` without either.

    Args:
        text: a worked solution, as in GSM8K (``#### 18``) or MetaMathQA (``The answer is: 18``).
    """
    ends = [marker.end() for marker in _MARKER.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].strip().partition("\n")[0].strip()
    return line or None


def number_in(answer: str) -> Fraction | None:
    """The first number of an answer, exactly; ``None`` where there is none.

    It reads commas between thousands, signs, decimals, ``3/4``, ``1 1/2``, ``\\frac{3}{4}`` and a currency sign before
    the number. Units behind the number are ignored, so that ``50 %`` is 50.
    """
    answer = _LATEX_FRACTION.sub(r"\1/\2", answer)
    if len(answer) > _MOST_DIGITS:
        answer = answer[:_MOST_DIGITS]
    for match in _NUMBER.finditer(answer):
        if match["whole"] is None and match["decimals"] is None:
            continue
        if mixed := _MIXED.match(answer, match.start()):
            return _mixed(mixed)
        value = Fraction(f"{(match['whole'] or '0').replace(',', '')}{match['decimals'] or ''}")
        below = int((match["below"] or "1").replace(",", ""))
        negative = any(match[sign] in ("-", "−") for sign in ("sign", "inner"))
        return (-value if negative else value) / below if below else None
    return None


def same_answer(answer: str | None, expected: str) -> bool:
    """Exact match: equal numbers, or, where the expected answer holds none, equal texts up to spaces, case and ``$``.

    Args:
        answer: a final answer, ``None`` where the model gave none.
        expected: the reference's.
    """
    if answer is None:
        return False
    number = number_in(expected)
    return _plain(answer) == _plain(expected) if number is None else number_in(answer) == number


def _mixed(match: re.Match[str]) -> Fraction | None:
    """The value of a mixed number such as ``1 1/2``; ``None`` for a denominator of 0."""
    below = int(match["below"])
    if not below:
        return None
    value = int(match["whole"]) + Fraction(int(match["above"]), below)
    return -value if match["sign"] else value


def _plain(answer: str) -> str:
    return re.sub(r"[\s$]+", "", answer).rstrip(".").casefold()
