"""What a terminal would obey is printed as text."""

import io

import pytest

from data_pipeline.command_line import print_line
from data_pipeline.printable import printable, shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ünïcode \N{GRINNING FACE}\n\ttext", "plain ünïcode \N{GRINNING FACE}\n\ttext"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\rb\x9b2J\x7f\0", r"a\x0db\x9b2J\x7f\x00"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("lone \udcff", r"lone \udcff"),
    ],
)
def test_control_characters_are_escapes(text, safe):
    assert printable(text, lines=True) == safe
    assert printable(safe, lines=True) == safe


def test_a_name_is_one_line_without_secrets():
    assert shown("https://u:pw@h/a\n\tb") == r"https://***@h/a\x0a\x09b"


def test_a_line_fits_the_encoding_of_its_stream():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    print_line("ß \x1b \udc80", stream)
    stream.seek(0)
    assert stream.read() == "\\xdf \\x1b \\udc80\n"
