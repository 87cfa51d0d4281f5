"""What of a text from outside is refused, and how the rest is shown."""

import re
import unicodedata

import pytest
from markdown_it import MarkdownIt

from dpp_lightning.storage.safe_text import (
    check_name,
    has_controls,
    is_task_name,
    markdown_code,
    markdown_text,
    printable,
    read_utf8,
)

EVERY = [chr(code) for code in range(0x110000)]
NAMES = [
    "a|b",
    "`x`",
    "``",
    "**a** _b_ ~~c~~",
    "[a](http://b)",
    "<b>a</b>",
    "&amp;",
    "# a",
    "![a](b)",
    "a_b_c",
    "\\|",
    "\\",
]


def test_what_is_shown_is_one_line_of_characters_that_are_seen():
    shown = printable("".join(EVERY))
    assert shown.isprintable()
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert printable("Größe 重み … a b") == "Größe 重み … a b"
    assert printable("a\n\x1b[1m\u202e\ud800") == r"a\n\x1b[1m\u202e\ud800"


@pytest.mark.parametrize(
    "letter", "\x00\n\x1b\x7f\x9b\xad\u061c\u200b\u200d\u200f\u2028\u2029\u202e\u2060\u2066\u3164\ufeff\ud800\U000e0041"
)
def test_names_of_tensors_have_no_character_that_is_not_seen(letter):
    with pytest.raises(ValueError, match="cannot be named"):
        check_name(f"a{letter}b")


def test_other_texts_may_join_letters_but_not_control_a_terminal():
    assert not has_controls("\u0645\u06cc\u200c\u062e 👨\u200d👩")
    assert all(map(has_controls, "\x00\n\x1b\x7f\x9b\u2028\u202e\u2069\ud800"))


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_text_as_it_is(name):
    """As CommonMark with GitHub's tables reads it."""
    for written, code in ((markdown_text(name), False), (markdown_code(name), True)):
        html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"| a |\n|---|\n| x{written}y |\n")
        cell = re.search(r"<td>x(.*)y</td>", html)[1]
        escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert cell == (f"<code>{escaped}</code>" if code else escaped)


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("sst2", True),
        ("a.b-c_d", True),
        ("", False),
        ("a b", False),
        ("a\n", False),
        ("../a", False),
        ("a.", False),
        ("`", False),
    ],
)
def test_names_of_tasks_begin_names_of_files(name, fine):
    assert is_task_name(name) == fine


def test_a_text_that_is_no_utf8_is_refused_with_the_byte_and_a_mark_at_the_start_is_none(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts\.txt is no text in UTF-8: its byte 4 is 0xe9; save it in UTF-8"):
        read_utf8(path)
    path.write_bytes("\ufeffcaf\u00e9\n".encode())
    assert read_utf8(path) == "caf\u00e9\n"
