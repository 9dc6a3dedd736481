"""Code that a recipe names runs only if the command line allows the file it is in.

A recipe is data, and people exchange recipes. `filter: [os:system]` in one of them would run each text as a command. So
a filter is imported only if `--allow-code` names its file or a folder around it, and that option is read on the command
line alone. Where a module is, is found without importing it or the packages around it, which would run their code.
"""

import inspect
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from data_pipeline.corpora.files import local_path
from data_pipeline.prepare.rules import load_filter
from data_pipeline.printable import shown


def import_from_allowed(filters: Iterable[str], allowed: Iterable[str]) -> None:
    """Import the modules of filters, if all their files are allowed; files that are allowed can be imported by name.

    Args:
        filters: MODULE:FUNCTION each.
        allowed: Python files and folders.

    Raises:
        ValueError: A filter's file is not allowed, or there is no such file or function. The message is one line with
            the remedy.
    """
    paths = [_existing(path) for path in allowed]
    for path in paths:
        folder = str(path if path.is_dir() else path.parent)
        if folder not in sys.path:
            sys.path.append(folder)  # last, that it hides no module of others
    for name in filters:
        module, colon, function = name.partition(":")
        if not colon or not module or not function.isidentifier():
            raise ValueError(f"filter {name!r}: expected MODULE:FUNCTION, such as my_filter:keep")
        files = _files_of(module, name)
        _check_allowed(files, paths, name)
        found = load_filter(name)
        _check_own(found, module, paths, name)


def _existing(path: str) -> Path:
    found = local_path(path)
    if not found.exists():
        raise ValueError(f"--allow-code {shown(path)}: no such file or folder")
    return found.resolve()


def _files_of(module: str, name: str) -> list[Path]:
    """Return the files that importing a module would run: its own, and those of the packages around it.

    Raises:
        ValueError: There is no such module, or it is not in a file of Python code.
    """
    files, parts, places = [], module.split("."), None
    for count in range(1, len(parts) + 1):
        dotted = ".".join(parts[:count])
        try:
            spec: Any = PathFinder.find_spec(dotted, places)
        except (ImportError, ValueError, OSError):
            spec = None
        loaded = getattr(sys.modules.get(dotted), "__file__", None)
        if spec is None or (spec.origin is None and spec.submodule_search_locations is None):
            raise ValueError(
                f"filter {name!r}: there is no module {dotted!r} that may be imported; write FUNCTION into a file of "
                f"your own, {parts[0]}.py, and allow it with --allow-code PATH/{parts[0]}.py"
            )
        files += [Path(file).resolve() for file in (spec.origin, loaded) if file]
        places = spec.submodule_search_locations
    return files


def _check_allowed(files: list[Path], allowed: list[Path], name: str) -> None:
    for file in files:
        if not _is_allowed(file, allowed):
            raise ValueError(
                f"filter {name!r}: {shown(str(file))} may not be run; if you trust it, allow it with --allow-code "
                f"{shown(str(file))}"
            )
        if file.suffix != ".py":
            raise ValueError(f"filter {name!r}: {shown(str(file))} is no file of Python code")


def _check_own(function: Any, module: str, allowed: list[Path], name: str) -> None:
    """Check that a function is not one that an allowed file only imports: that file may import `os.system`."""
    home: str | None = module  # that of an object which the file made
    if inspect.isroutine(function) or inspect.isclass(function):
        home = getattr(function, "__module__", None) or getattr(type(function), "__module__", "")
    files = [getattr(sys.modules.get(place or ""), "__file__", None) for place in (module, home)]
    if not all(file and _is_allowed(Path(file).resolve(), allowed) for file in files):
        raise ValueError(
            f"filter {name!r}: the function is from module {home!r}, not from {module!r}; name one that {module!r} "
            f"defines itself"
        )


def _is_allowed(file: Path, allowed: list[Path]) -> bool:
    return any(file == path or path in file.parents for path in allowed)
