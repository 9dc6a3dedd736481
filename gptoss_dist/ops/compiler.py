"""The compilers that torch.compile calls."""

import os
import shutil


def missing_compiler(on_cuda: bool) -> str | None:
    """Return what is missing for torch.compile and the variable that would name it, in words; None if it is there.

    Args:
        on_cuda: Whether Triton is to compile its launchers in C, instead of the whole in C++.
    """
    variable, usual = ("CC", ("gcc", "clang")) if on_cuda else ("CXX", ("g++", "clang++"))
    wanted = (os.environ[variable],) if os.environ.get(variable) else usual
    if any(shutil.which(name.split()[0]) for name in wanted if name.strip()):
        return None
    return f"needs a compiler, and there is no {' or '.join(wanted)}; install one, name it in {variable},"
