"""The report of a proof: report.json and report.md, written anew, each at once, whenever something is known.

So it is there, and true, at whatever moment the proof is stopped. Standard library only.
"""

import datetime
import json
import sys
import time
from collections import Counter
from pathlib import Path

from data_pipeline.disk import write_file_atomically

PASS, FAIL, SLOW, SKIPPED, RUNNING = "PASS", "FAIL", "SLOW", "SKIPPED", "RUNNING"
WAITING = "WAITING"
REHEARSAL = "A rehearsal on a CPU at tiny size: the figures mean nothing, and nothing is proven of a GPU."
MEANINGS = {
    PASS: "right, and no floor is missed",
    SLOW: "right, but slower than its floor",
    FAIL: "wrong, broken, or over its own time limit",
    SKIPPED: "not judged; the reason says why",
    RUNNING: "the proof was killed during this item, or it still runs",
}


class Report:
    """What is known so far.

    Args:
        folder: Where the report lies.
        names: The items and what each proves, in order.
        rehearsal: Whether figures mean nothing.
        minutes: The time that the proof was given.
    """

    def __init__(self, folder: Path, names: dict[str, str], *, rehearsal: bool, minutes: float) -> None:
        self.folder = folder
        self.content: dict = {
            "format": 1,
            "rehearsal": rehearsal,
            "note": REHEARSAL if rehearsal else "",
            "minutes": minutes,
            "started": _now(),
            "written": "",
            "state": "running",
            "code": {},
            "machine": {},
            "versions": {},
            "items": [
                {
                    "name": name,
                    "what": what,
                    "result": WAITING,
                    "reason": "",
                    "seconds": None,
                    "checks": [],
                    "figures": [],
                    "texts": [],
                }
                for name, what in names.items()
            ],
        }
        self._begun: dict[str, float] = {}

    def item(self, name: str) -> dict:
        return next(item for item in self.content["items"] if item["name"] == name)

    def begin(self, name: str) -> None:
        """Say that an item runs from now on."""
        self._begun[name] = time.monotonic()
        self.item(name)["result"] = RUNNING
        self.write()

    def end(self, name: str, result: str, reason: str, findings: list[dict]) -> dict:
        """Record how an item ended, and return its entry.

        Args:
            name: The item.
            result: PASS, FAIL, SLOW or SKIPPED.
            reason: Why it is not PASS, or what there is to say.
            findings: What it said, as `findings.py` writes it.
        """
        item = self.item(name)
        item["result"], item["reason"] = result, reason
        if name in self._begun:
            item["seconds"] = round(time.monotonic() - self._begun[name], 1)
        for kind, place in (("check", "checks"), ("figure", "figures"), ("text", "texts")):
            item[place] = [{k: v for k, v in f.items() if k != "kind"} for f in findings if f["kind"] == kind]
        self.write()
        return item

    def close(self, state: str) -> None:
        """Say how the proof ended; items that were not reached are SKIPPED."""
        self.content["state"] = state
        for item in self.content["items"]:
            if item["result"] in (WAITING, RUNNING):
                item["result"], item["reason"] = SKIPPED, state
        self.write()

    def results(self) -> Counter:
        """Return how many items have each result."""
        return Counter(item["result"] for item in self.content["items"])

    def write(self) -> None:
        """Write both files."""
        self.content["written"] = _now()
        text = json.dumps(self.content, indent=1, allow_nan=False, default=str) + "\n"
        try:
            write_file_atomically(self.folder / "report.json", text.encode())
            write_file_atomically(self.folder / "report.md", markdown(self.content).encode())
        except OSError as error:  # the next item may find room again
            print(f"prove_gpu: {self.folder}: the report cannot be written ({error.strerror})", file=sys.stderr)


def markdown(content: dict) -> str:
    """Return a report for people."""
    title = "# Rehearsal of the proof on a GPU" if content["rehearsal"] else "# Proof on a GPU"
    lines = [title, ""]
    if content["note"]:
        lines += [f"**{content['note']}**", ""]
    counts = Counter(item["result"] for item in content["items"])
    lines += [
        f"{', '.join(f'{count} {result}' for result, count in counts.items())}; {content['state']}. Begun "
        f"{content['started']}, written {content['written']}; {content['minutes']:g} minutes were given.",
        "",
        *(f"- {key}: {value}" for part in ("code", "machine") for key, value in content[part].items()),
        *(["- " + ", ".join(f"{k} {v}" for k, v in content["versions"].items())] if content["versions"] else []),
        "",
        "| item | result | seconds | why, or what was checked |",
        "|---|---|---|---|",
    ]
    for item in content["items"]:
        right = sum(check["right"] for check in item["checks"])
        about = item["reason"] or f"{right} of {len(item['checks'])} checks right"
        seconds = "" if item["seconds"] is None else f"{item['seconds']:g}"
        lines.append(f"| [{item['name']}](#{item['name']}) | {item['result']} | {seconds} | {_cell(about)} |")
    lines += ["", *(f"- {result}: {meaning}" for result, meaning in MEANINGS.items())]
    for item in content["items"]:
        lines += _section(item)
    return "\n".join(lines) + "\n"


def _section(item: dict) -> list[str]:
    lines = ["", f"## {item['name']}", "", f"{item['result']}: {item['what']}. {item['reason']}".rstrip()]
    if item["checks"]:
        lines += ["", "| check | | |", "|---|---|---|"]
        for check in item["checks"]:
            lines.append(f"| {check['name']} | {'right' if check['right'] else 'WRONG'} | {_cell(check['detail'])} |")
    if item["figures"]:
        lines += ["", "| figure | value | |", "|---|---|---|"]
        for figure in item["figures"]:
            value = "does not apply" if figure["value"] is None else f"{figure['value']:,.5g} {figure['unit']}".rstrip()
            lines.append(f"| {figure['name']} | {value} | {_cell(figure['note'])} |")
    for text in item["texts"]:
        lines += ["", f"{text['name']}:", "", "```text", text["text"].rstrip(), "```"]
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
