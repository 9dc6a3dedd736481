"""Text for people: what a terminal would obey is written as escapes, and secrets are hidden.

Names of files, keys of records and texts come from elsewhere. A terminal that prints them as they are can be made to
change its title, to hide lines, or to show text in another order.
"""

import re

from data_pipeline.secrets import without_secrets

# Control characters but tab and newline, those that change the direction of text, and lone surrogates, which stand for
# bytes of file names that are not UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_A_NAME = re.compile("[\t\n]")


def printable(text: str) -> str:
    r"""Return a text, of one or more lines, in which `\x1b` and the like are written like that."""
    return _OBEYED.sub(_escaped, text)


def shown(name: str) -> str:
    """Return the name of a file or source in one line, without secrets, as people and files may see it."""
    return _IN_A_NAME.sub(_escaped, printable(without_secrets(name)))


def _escaped(found: re.Match) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
