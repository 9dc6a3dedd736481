"""Draw docs/images/rooms.svg: the rooms of the house, from the bottom to the top, as the structure test knows them.

    python docs/images/draw_rooms.py

It is drawn by this script so that it cannot differ from the rule that is tested; tests/test_docs.py compares.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = {
    "launch": "commands a person types",
    "train": "the loop and what it needs",
    "tracking": "metrics, MLflow, plots",
    "planner": "FLOPs, memory, hardware",
    "evaluation": "perplexity, harness",
    "engine": "sharded weights, backward, step",
    "inference": "prompt in, text out",
    "parallel": "wraps a model from outside",
    "checkpoint": "saves, resumes, other formats",
    "model": "the math, on one device",
    "config": "one tree of settings",
    "data_pipeline": "text, tokens, shards, batches",
    "ops": "hot operations and back ends",
    "distributed": "processes, collectives",
    "cluster": "jobs for SLURM",
}
WIDTH, ROW, GAP, TOP = 900, 74, 12, 44


def levels() -> list[list[str]]:
    """Rooms that exist, from the top level to the bottom one, as tests/test_structure.py orders them."""
    tree = ast.parse((ROOT / "tests/test_structure.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LEVELS"
    )
    found = [[room for room in WORDS if room in level] for level in ast.literal_eval(value)]
    places = [ROOT, ROOT / "gptoss_dist"]
    return [[room for room in level if any((place / room).is_dir() for place in places)] for level in found[::-1]]


def svg() -> str:
    """The picture as text: a row of boxes for each level."""
    rows = levels()
    height = TOP + len(rows) * (ROW + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">',
        "<title>The rooms of gptoss_dist; imports point down</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z" fill="#5c6773"/></marker></defs>',
        '<text x="60" y="28" font-size="15">A room imports rooms below it, and never one above.</text>',
        f'<path d="M30 {TOP + 8} V{height - 24}" stroke="#5c6773" stroke-width="2" marker-end="url(#tip)"/>',
    ]
    for index, row in enumerate(rows):
        y, left = TOP + index * (ROW + GAP), 60
        width = (WIDTH - left - 12 - GAP * (len(row) - 1)) / len(row)
        for column, room in enumerate(row):
            x = left + column * (width + GAP)
            fill = "#fff4dc" if room == "data_pipeline" else "#e8f0fb" if room != "launch" else "#e9f6ea"
            middle = x + width / 2
            parts += [
                f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW}" rx="8" fill="{fill}" stroke="#8a97a6"/>',
                f'<text x="{middle:.0f}" y="{y + 32}" text-anchor="middle" font-size="19" fill="#1f2933">{room}</text>',
                f'<text x="{middle:.0f}" y="{y + 55}" text-anchor="middle" font-size="14" fill="#46515c">'
                f"{WORDS[room]}</text>",
            ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("rooms.svg").write_text(svg())
