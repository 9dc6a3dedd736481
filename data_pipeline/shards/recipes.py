"""Which recipe makes a dataset that is missing: the one whose `output` is its folder.

A run names the folders that it reads, and a recipe (`configs/data/`) the folder that it makes. So who starts a run
without its data can be told the command that makes them, and nobody writes down twice what belongs together.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.foreign import parse_yaml, read_text

FOLDER = Path("configs/data")
"""Where recipes are looked for: in the working directory, and beside the code."""


def find_recipe(directory: Path) -> Path | None:
    """Return the recipe that makes a dataset; None where none does.

    Args:
        directory: Folder of the dataset. A relative one counts from the working directory, as a recipe's `output` does.
    """
    wanted = os.path.abspath(directory)
    return next((path for path, output in _outputs() if os.path.abspath(output) == wanted), None)


def _outputs() -> Iterator[tuple[Path, str]]:
    """Yield recipes, and the folders that they make."""
    beside_code = Path(__file__).parents[2] / FOLDER
    here = Path.cwd() / FOLDER
    for folder in (FOLDER,) if here == beside_code else (FOLDER, beside_code):
        for path in sorted(folder.rglob("*.yaml")):
            try:
                recipe = parse_yaml(read_text(path), path)
            except ValueError:  # no recipe; whoever reads it will say so
                continue
            if isinstance(recipe, dict) and isinstance(recipe.get("output"), str):
                yield path, recipe["output"]
