"""Bytes and settings as they are typed behind ``dpp prune``."""

import pytest

from dpp_lightning.cli.prune import _named
from dpp_lightning.storage.byte_count import number_of_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("50000", 50_000),
        ("50kB", 50_000),
        ("0.24MB", 240_000),
        ("48KiB", 49_152),
        ("1 M", 1_000_000),
        ("2GB", 2 * 10**9),
    ],
)
def test_bytes_with_their_unit(text, number):
    assert number_of_bytes(text, "--max_bytes") == number


@pytest.mark.parametrize("text", ["", "kB", "-5", "50 apples", "1e3"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="number of bytes such as"):
        number_of_bytes(text, "--max_bytes")


def test_settings_are_numbers_where_they_read_as_numbers():
    assert _named(["rank=4", "rest=0.995", "spread=even"]) == {"rank": 4, "rest": 0.995, "spread": "even"}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        _named(["rank"])
