"""Text for people: what a terminal would obey is written as escapes, and secrets are hidden.

Names of files, keys of records and texts come from elsewhere. A terminal that prints them as they are can be made to
change its title, to hide lines, or to show text in another order.
"""

import re

from data_pipeline.secrets import without_secrets

# Control characters, those that change the direction of text, and lone surrogates, which stand for bytes of file names
# that are not UTF-8.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return a text from elsewhere as it may be printed, with `\x1b` and the like written like that.

    Args:
        text: A name or a text, or anything with a `str`.
        lines: Line breaks and tabs stay.
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return found[0] if lines and found[0] in "\n\t" else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _OBEYED.sub(escaped, str(text))


def shown(name: str) -> str:
    """Return the name of a file or source in one line, without secrets, as people and files may see it."""
    return printable(without_secrets(name))


def shortened(text: object, most: int = 60) -> str:
    """Return a text of at most `most` characters, of which dots stand for those that were cut out of its middle."""
    text = str(text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - half]}...{text[-half:]}"


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error of another library, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
