"""A filter for `prepare`: what a document must look like to be trained on, as a function of its text.

    python -m data_pipeline.prepare pystdlib --output data/few --filter filter_for_prepare:keep --allow-code examples

`prepare` imports the module in each of its worker processes and calls the function with every text, after Unicode
normalization and before the limits of length and the search for copies. True keeps the document, False drops it, and a
text takes its place. The manifest counts what each filter dropped, under its name.

A prepared part is taken over after a kill, and a dataset is answered with "already prepared", as long as the request is
the same. The text of this file is part of the request, so that a change to it prepares anew. What the function reads
from elsewhere (a word list, a model) is not: change `VERSION` with it.
"""

VERSION = 1

LONGEST_LINE = 1_000
"""Characters. Longer lines are mostly tables of data, or code that a program wrote."""


def keep(text: str) -> bool | str:
    """Drop generated files and documents with very long lines; take the spaces from the ends of the other's lines."""
    beginning = text[:1000].lower()
    if "do not edit" in beginning or "automatically generated" in beginning:
        return False
    lines = text.splitlines()
    if any(len(line) > LONGEST_LINE for line in lines):
        return False
    return "\n".join(line.rstrip() for line in lines) + "\n"
