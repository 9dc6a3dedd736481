"""What went wrong, as one line for a person: errors of the system in words, near misses, and nothing unprintable."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from data_pipeline.printable import printable

MOST_CHARACTERS = 800
"""A longer message is cut in its middle: what was given may be a file of any size."""

_REMEDIES = {
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.EROFS: "choose another place, which can be written",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
    errno.ELOOP: "remove the circle of links",
}


def is_explained(error: BaseException) -> bool:
    """Return whether `in_words` makes a line for a person out of an error, rather than a developer's traceback."""
    known = (ValueError, OSError, MemoryError, OverflowError, RecursionError)
    return isinstance(error, known) or _is_out_of_memory(error) or _is_homeless(error)


def in_words(error: BaseException) -> str:
    """Return what an error means in one line, with its file where it knows one, and a remedy where there is one."""
    if isinstance(error, UnicodeDecodeError):
        text = f"it is not {error.encoding.upper()} text: {_bytes_shown(error)}; save it in that encoding"
    elif isinstance(error, UnicodeEncodeError):
        character = error.object[error.start : error.start + 1]
        text = f"{character!r} cannot be written in {error.encoding}; set PYTHONUTF8=1"
    elif isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0)
        files = " -> ".join(_name(file) for file in (error.filename, error.filename2) if file is not None)
        text = f"{files + ': ' if files else ''}{error.strerror.lower()}{'; ' + remedy if remedy else ''}"
    elif _is_out_of_memory(error):
        detail = re.sub(r"^\[enforce fail.*? \w*Allocator: ", "", str(error).partition("\n")[0])
        text = f"not enough memory: {detail or 'an allocation failed'}; choose smaller sizes"
    elif _is_homeless(error):
        text = "the home directory that is meant is not known; set HOME, or give a path without ~"
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply; flatten it"
    elif isinstance(error, OverflowError):
        text = f"a number is too large: {error}"
    else:
        text = str(error) or type(error).__name__
    return one_line(text)


def lacks_subject(error: BaseException) -> bool:
    """Return whether an error comes from deep inside, so that its words name neither a file nor a setting."""
    if isinstance(error, OSError):
        return bool(error.strerror) and error.filename is None
    return isinstance(error, UnicodeError) or not isinstance(error, ValueError)


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Give errors that do not know what they are about its name: a file, or a key and its value.

    Raises:
        ValueError: In the place of the error, with its words.
    """
    try:
        yield
    except Exception as error:
        if not is_explained(error):
            raise
        words = in_words(error)
        raise ValueError(words if str(what) in words else f"{what}: {words}") from error


def one_line(text: str) -> str:
    """Return a text in one line that a terminal shows as it is: control characters escaped, its middle cut if long."""
    words = " ".join(text.split())
    if len(words) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        words = f"{words[:half]} [...] {words[-half:]}"
    return printable(words)


_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_steps": "steps",
    "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_grad_norm": "clip_norm",
    "max_length": "seq_len",
    "lr_scheduler_type": "schedule",
    "save_steps": "every",
}
"""What other tools call a setting, by the last part of its name."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known word that is closest to one that is not, or nothing."""
    known = sorted(known)
    head, dot, tail = word.rpartition(".")
    ours = _NAMES_ELSEWHERE.get(tail.lstrip("-").replace("-", "_"))
    same = [name for name in known if ours and name.startswith(head + dot) and name.endswith(f".{ours}")]
    close = same[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    # torch has a class for CUDA only; on the CPU its message has to do.
    name, text = type(error).__name__, str(error)
    return isinstance(error, RuntimeError) and (name == "OutOfMemoryError" or "can't allocate memory" in text)


def _is_homeless(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "home directory" in str(error)  # pathlib's


def _bytes_shown(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at position {error.start}"


def _name(file: object) -> str:
    return file.decode("utf-8", "replace") if isinstance(file, bytes) else str(file)
