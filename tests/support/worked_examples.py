"""Reading the tables of worked examples in docstrings, so that tests can compare them with what the code does."""

import re


def tables_of(docstring: str) -> list[dict[str, list[str]]]:
    """Cells by label of every indented table.

    A line is a label, two or more spaces, and cells, which are separated by as much or are single characters. Bars
    between those are only for the eye.
    """
    tables = []
    for block in re.findall(r"(?:^    \S.*\n)+", docstring, re.MULTILINE):
        rows = {}
        for line in block.splitlines():
            label, cells = re.split(r"  +", line.strip(), maxsplit=1)
            words = cells.replace("|", " ").split()
            rows[label] = words if all(len(word) == 1 for word in words) else re.split(r"  +", cells)
        tables.append(rows)
    return tables


def integers(cells: list[str]) -> list[int]:
    """Cells that are all numbers."""
    return [int(cell) for cell in cells]
