"""How an item says what it finds: lines of JSON, appended to a file as they come, which outlive its process.

- a *check* is right or wrong, and one that is wrong makes the item FAIL;
- a *figure* is a measurement;
- a *floor* is a figure with a bound, and one that is missed makes the item SLOW, except in a rehearsal;
- a *text* is a table to read.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class Findings:
    """What one item finds.

    Args:
        path: The file to append to.
        rehearse: Whether figures mean nothing, so that no floor is judged.
    """

    def __init__(self, path: Path, rehearse: bool) -> None:
        self.path, self.rehearse = path, rehearse

    def check(self, name: str, right: bool, detail: str = "") -> None:
        """Report whether something is as it has to be, with what was seen."""
        self._append({"kind": "check", "name": name, "right": bool(right), "detail": detail})

    def figure(self, name: str, value: float | None, unit: str = "", note: str = "") -> None:
        """Report a measurement; None is one that does not apply here, as the note says."""
        if value is not None and not math.isfinite(value):  # JSON has no such numbers
            value, note = None, f"it is {value}; {note}"
        self._append({"kind": "figure", "name": name, "value": value, "unit": unit, "note": note})

    def floor(
        self, name: str, value: float, unit: str = "", *, least: float | None = None, most: float | None = None
    ) -> None:
        """Report a measurement that should be at least, or at most, so much."""
        bound = f"at least {least:g}" if least is not None else f"at most {most:g}"
        reached = value >= least if least is not None else value <= most
        self.figure(name, value, unit, bound)
        if not reached and not self.rehearse:
            self._append({"kind": "slow", "name": name, "detail": f"{value:.4g} {unit}".strip() + f", {bound} wanted"})

    def text(self, name: str, text: str) -> None:
        """Report lines of text under a name."""
        self._append({"kind": "text", "name": name, "text": text})

    def _append(self, finding: dict) -> None:
        with open(
            self.path, "a", encoding="utf-8"
        ) as file:  # one write of a whole line: a kill leaves none that is torn
            file.write(json.dumps(finding) + "\n")
        print(*(f"{value}" for value in finding.values()), flush=True)


def read_findings(path: Path) -> list[dict]:
    """Return what an item has said so far; a line that a full disk tore is left out."""
    findings = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            findings.append(json.loads(line))
        except ValueError:
            continue
    return findings


def run_item(items: dict[str, Callable[[Findings, Path], None]], description: str) -> None:
    """Run one of a module's items, as the driver's command line says.

    Args:
        items: Functions by the items' names; they get the findings, and a folder that all items share.
        description: For `--help`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("item", choices=list(items))
    parser.add_argument("--findings", type=Path, required=True, help="the file to append findings to")
    parser.add_argument("--work", type=Path, required=True, help="a folder that all items share")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    arguments = parser.parse_args()
    items[arguments.item](Findings(arguments.findings, arguments.rehearse), arguments.work)
